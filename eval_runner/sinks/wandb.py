"""The W&B sink: scores into the W&B run that trained the checkpoint, late and out of order, no training row touched.

Each result becomes a file in the run's directory (autoeval_hooks.relay_files). `wandb_cases` says who logs it:
the training process, this runner, or nobody yet. It is logged once:

- A point stands in points/ while nobody can have logged it. Whoever logs takes it first (taken/), under a name of his.
- What is left in taken/ by one who is gone may be in the run or not. It is looked for (wandb_reader): what is there
  moves on to logged/, what is not goes back to points/. If nothing can be looked at, it waits, and says so.
- Once a training process is gone, what it had put in logged/ is looked for too: it knows only that W&B had time.

What W&B itself cannot tell is left: a row that the service shows later than `SHOWN_S` after it was sent (the last ones
of a training: `ENDED_STALE_S` after its end) would be logged again, and so would a row that a suspended process sends
after all. All this was measured against a stand-in for the service, since the service itself is not reachable where the
tests run: its delay between taking a row and showing it is not known. W&B's shared mode is not used; a run whose
trainer uses it is treated as any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio, strict
from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import process
from eval_runner.results.schema import Result
from eval_runner.sinks import wandb_sync
from eval_runner.sinks.base import Context, Standing, point
from eval_runner.sinks.wandb_cases import Seen, Watch, audited, names, unseen
from eval_runner.sinks.wandb_children import OFFLINE, Children, NotNow, Settings
from eval_runner.sinks.wandb_reader import holds, keys
from eval_runner.sinks.wandb_writer import heartbeat

log = logging.getLogger("autoeval")

PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0
"""Between two tries for one run. Longer than W&B's own processes outlive a killed one (2 s)."""
TURN_S = 20.0
"""After so long, a `flush` starts nothing more: results wait to be taken meanwhile, and other runs have their turn."""
@dataclass(frozen=True)
class Waiting:
    """Points of one run that are not in W&B yet, for all that is known: its key, how many, and why."""

    run: str
    points: int
    why: str


@dataclass
class _Pause:
    """When to try a run again, and what was said."""

    until: float
    tries: int
    said: str


class WandbSink:
    """See the module. `publish`, `flush` and `compare` are those of `eval_runner.sinks.base.Sink`.

    One sink object must live as long as its runner: that a training process is gone is what it has seen itself.
    """

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        errors: list[str] = []
        parsed = strict.build(Settings, settings, context.where, errors)
        if parsed is not None and parsed.api_key_env and not os.environ.get(parsed.api_key_env):
            errors.append(f"{context.where}.api_key_env: the environment has no {parsed.api_key_env}; set it")
        if parsed is None or errors:
            raise ConfigError(f"{context.config_file or 'configuration'}: {'; '.join(errors)}")
        self._settings = parsed
        self._context = context
        self._root = context.queue / "relay"
        self.children = Children(parsed, context)
        self._watch = Watch()
        self._pauses: dict[Path, _Pause] = {}
        self._turn_ends = 0.0
        self.waiting: list[Waiting] = []
        """What the last `flush` left."""

    # ---------------------------------------------------------------- taking a result

    def publish(self, result: Result) -> None:
        """Leave the result's point for the run's writer; nothing where training has no W&B. See base.Sink."""
        if not result.run.wandb_id:
            return
        p, directory = point(result), self.directory(result.run)
        if wandb_sync.where(directory, p.ticket):
            return
        data = self._room(result.run, p)
        if not _give(self._context.ops, directory, p.ticket, data) and not wandb_sync.where(directory, p.ticket):
            # Offered before, and its file was removed: it must be looked for before it is logged.
            _place(self._context.ops, directory, f"taken/{files.taken(p.ticket, wandb_sync.AGAIN)}", data)

    def offer(self, run: RunIdentity, p: files.Point, place: str) -> None:
        """Put a point into the run's directory, at ``<stage>/<name>``, whether or not it was offered before."""
        _place(self._context.ops, self.directory(run), place, self._room(run, p))

    def _room(self, run: RunIdentity, p: files.Point) -> bytes:
        """Make the run's directory where it is missing; what the point's file holds."""
        ops, directory = self._context.ops, self.directory(run)
        data = files.encode(p)
        files.parse_point(data, f"{p.ticket}.json")
        for part in (*files.STAGES, "given"):
            fsio.make_dirs(ops, str(directory / part))
        if not (directory / "identity.json").exists():
            fsio.replace(str(directory / "identity.json"), files.encode(run), ops)
        return data

    # ---------------------------------------------------------------- moving on

    def flush(self) -> bool:
        """Let go of what can go now. Takes seconds where it looks or logs; where W&B gives no answer, `LOOK_TIMEOUT_S`
        and `WRITER_TIMEOUT_S` at most, in which no new result is taken either."""
        self.waiting = []
        self._turn_ends = files.clock() + TURN_S
        for directory in self._in_turn():
            if self._context.stopping():
                self.waiting.append(Waiting(directory.name, 0, "the runner was told to stop"))
                break
            try:
                why = self._move(directory)
            except process.Stopped:
                why = "the runner was told to stop"
            except (AutoEvalError, OSError) as error:
                why = str(error)
                news = self._later(directory, why) != why
                level = logging.WARNING if news and not isinstance(error, NotNow) else logging.INFO
                log.log(level, "autoeval: the scores of %s are not in W&B yet: %s", directory.name, why)
            count = _count(directory)
            if count or why:
                self.waiting.append(Waiting(directory.name, count, why or "came meanwhile"))
            _say_why(directory, why if count else "")
        return not self.waiting

    def _in_turn(self) -> list[Path]:
        """The runs' directories; those that were tried last come last."""
        found = [path for path in self._root.iterdir() if path.is_dir()] if self._root.is_dir() else []
        return sorted(found, key=lambda path: (self._pauses[path].until if path in self._pauses else 0.0, path))

    def _move(self, directory: Path) -> str:
        """Look for, or log, the points of one run if that is ours to do now; why they wait, or "". Raises AutoEvalError
        and OSError, whose text is why."""
        points, taken, logged = (files.waiting(str(directory), stage) for stage in files.STAGES)
        if not points and not taken and (not logged or audited(directory, heartbeat(str(directory / "heartbeat")))):
            return ""
        seen = self._watch.look(directory, self._settings.late)
        dead = [n for n in taken if not self._watch.owner_lives(directory, files.owner_of(n), seen)]
        audit = seen.case.hook == "gone" and not audited(directory, seen.beat)
        writes = bool(points) and seen.case.way in ("write", "companion")
        if not dead and not writes and not (audit and logged):
            unclear = logged and seen.case.hook == "unclear"    # it may be gone, and what it logged be lost
            return seen.case.why if points or taken or unclear else ""
        pause = self._pauses.get(directory)
        if pause is not None and files.clock() < pause.until:
            return pause.said
        if files.clock() > self._turn_ends:
            return "other runs have their turn first"
        unsure = self._settle(directory, seen, dead, logged if audit else [])
        if audit and (not unsure or seen.run.wandb_mode in OFFLINE):
            fsio.replace(str(directory / "audited"), seen.beat.encode(), self._context.ops)
        waiting = files.waiting(str(directory))
        if waiting and seen.case.way in ("write", "companion"):
            self.children.write(directory, seen, self._watch.broken(directory))
            waiting = []
        if unsure:
            raise NotNow(unsure)
        self._pauses.pop(directory, None)
        return seen.case.why if waiting else ""

    def _settle(self, directory: Path, seen: Seen, taken: list[str], logged: list[str]) -> str:
        """Look for these points in the run: what is there goes to logged/, what is not to points/. Why it is not
        certain for some, or ""."""
        found, unsure = self._points(directory, [("taken", n) for n in taken] + [("logged", n) for n in logged])
        if not found:
            return unsure
        held = self.children.look(seen.run, keys(found.values()), directory / "writer.log")
        if heartbeat(str(directory / "heartbeat")) != seen.beat and seen.case.hook == "gone":
            raise NotNow("a training process has come to life in this run; the points are left to it")
        for (stage, name), p in found.items():
            if any(holds(row, p) for row in held.rows):
                if stage == "taken":
                    files.move(str(directory), f"taken/{name}", f"logged/{name}", self._context.ops)
            elif stage == "logged" and not held.exists:
                continue        # the run was deleted: that is no loss of ours
            elif why := self.children.cannot_tell(seen, held):
                if stage == "taken" or seen.run.wandb_mode not in OFFLINE:
                    unsure = why
            else:
                if stage == "logged":
                    log.warning("autoeval: %s: the point of step %d was lost on its way to W&B", directory.name, p.step)
                files.move(str(directory), f"{stage}/{name}", f"points/{p.ticket}.json", self._context.ops)
        return unsure

    def _points(
        self, directory: Path, found: Iterable[tuple[str, str]]
    ) -> tuple[dict[tuple[str, str], files.Point], str]:
        """These points, and why one of them cannot be read now, or ""."""
        points, unread = {}, ""
        for stage, name in found:
            try:
                points[stage, name] = files.read_point(str(directory), name, stage)
            except TicketError as error:
                log.warning("autoeval: refused a point in %s: %s", directory, error)
                files.set_aside(str(directory), name, str(error), stage)
            except FileNotFoundError:
                continue
            except OSError as error:    # it must not hold up the others
                unread = f"{stage}/{name} cannot be read: {error.strerror}"
        return points, unread

    def _later(self, directory: Path, why: str) -> str:
        """Let some time pass before the next try; why the last one failed."""
        last = self._pauses.get(directory, _Pause(0.0, -1, ""))
        pause = min(PAUSE_S * 2 ** min(last.tries + 1, 16), LONGEST_PAUSE_S)
        self._pauses[directory] = _Pause(files.clock() + pause, last.tries + 1, why)
        return last.said

    # ---------------------------------------------------------------- comparing

    def compare(self, results: Sequence[Result], *, repair: bool) -> list[Standing]:
        """See base.Sink, and wandb_sync."""
        runs: dict[str, list[Result]] = {}
        for result in results:
            if result.run.wandb_id:
                runs.setdefault(result.run.key, []).append(result)
        return [f for some in runs.values() for f in wandb_sync.compare(self, some, repair=repair)]

    def seen(self, run: RunIdentity) -> Seen:
        """What is known of the run now."""
        directory = self.directory(run)
        if not (directory / "run.json").exists() and not (directory / "identity.json").exists():
            return unseen(run, self._settings.late)
        return self._watch.look(directory, self._settings.late)

    def lives(self, run: RunIdentity, owner: str, seen: Seen) -> bool:
        """Whether who took or logged a point may still send it."""
        return self._watch.owner_lives(self._root / run.key, owner, seen)

    def directory(self, run: RunIdentity) -> Path:
        """The run's directory."""
        return self._root / run.key

def close_run(queue: Path, name: str) -> str:
    """Record that the run will not go on, so that its late scores can be logged; its key. `name` is the key, the
    W&B run id, our id or the run's name. Raises ConfigError where no run, or more than one, has it."""
    root = queue / "relay"
    directories = sorted(root.iterdir()) if root.is_dir() else []
    known = {directory.name: names(directory) for directory in directories if directory.is_dir()}
    found = [key for key, called in known.items() if name in called]
    if not found:
        raise ConfigError(f"{root}: there is no run called {name!r}{strict.near(name, set().union(*known.values()))}")
    if len(found) > 1:
        raise ConfigError(f"{root}: there are {len(found)} runs called {name!r}; name one of {', '.join(found)}")
    (root / found[0] / "closed").touch()
    return found[0]


def _give(ops: fsio.FileOps, directory: Path, ticket: str, data: bytes) -> bool:
    """Offer a point in points/; False when it was offered before, which is then finished if it was cut off.

    As a ticket's, its file gets a first name, in given/, which one call alone can give, however long another stands
    still; its second name then moves through the stages.
    """
    points, first = str(directory / "points"), str(directory / "given" / ticket)
    tmp = os.path.join(points, f".{ticket}.{fsio.unique()}")
    fsio.write_new(ops, tmp, data)
    new = True
    try:
        ops.link(tmp, first)
    except FileExistsError:
        new = ops.nlink(tmp) == 2       # the server lost its reply
    if not new:
        fsio.remove(ops, tmp)
    for name in ops.listdir(points):
        if name.startswith(f".{ticket}."):
            with contextlib.suppress(FileNotFoundError):
                if ops.nlink(os.path.join(points, name)) == 2:
                    fsio.moved(ops, os.path.join(points, name), os.path.join(points, f"{ticket}.json"))
    ops.sync_dir(os.path.dirname(first))
    ops.sync_dir(points)
    return new


def _place(ops: fsio.FileOps, directory: Path, name: str, data: bytes) -> None:
    """Put a point at ``<stage>/<name>``, durably, unless it is there."""
    stage = directory / Path(name).parent
    tmp = stage / f".{fsio.unique()}"
    fsio.write_new(ops, str(tmp), data)
    try:
        with contextlib.suppress(FileExistsError):
            ops.link(str(tmp), str(directory / name))
    finally:
        fsio.remove(ops, str(tmp))
    ops.sync_dir(str(stage))


def _count(directory: Path) -> int:
    """How many points of the run wait; 0 where its directory cannot be listed, of which `_move` has said why."""
    with contextlib.suppress(OSError):      # one run's must not keep the others from their turn
        return sum(len(files.waiting(str(directory), stage)) for stage in ("points", "taken"))
    return 0


def _say_why(directory: Path, why: str) -> None:
    """Leave for `status` why the run's points wait, or take it away."""
    path = directory / "why"
    with contextlib.suppress(OSError):      # it is only said
        if not why:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text(encoding="utf-8") != why:
            fsio.replace(str(path), why.encode("utf-8", "replace"))
