"""The W&B sink: scores into the W&B run that trained the checkpoint, late and out of order, no training row touched.

Each result becomes a file in the run's directory (autoeval_hooks.relay_files). While the training process is
alive, its own writer logs them (autoeval_hooks.relay). Once it is gone `TABLE` says who does:
this runner as the run's only writer (wandb_writer, in a child process), or nobody yet. W&B's row counter moves on with
each row, so a run whose trainer logs with `step=` (Megatron) is written to only when it is over for good.

What a runner holds that was killed while it logged is given back. If training has resumed by then, its relay logs
these points without a look at the run's rows: one that the dead runner had already logged then stands there twice.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from autoeval_hooks import fsio, strict
from autoeval_hooks import relay_files as files
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import process
from eval_runner.results.schema import Result
from eval_runner.sinks.base import Context, point
from eval_runner.sinks.wandb_writer import BUSY, DONE, Request, heartbeat

log = logging.getLogger("autoeval")
T = TypeVar("T")

WRITER_TIMEOUT_S = 300.0
PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0
"""Between two tries of the writer for one run. Longer than W&B's own processes outlive a killed one (2 s)."""
_KEPT = {
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"),
    *("WANDB_HTTP_TIMEOUT", "WANDB_INIT_TIMEOUT", "WANDB_ERROR_REPORTING", "WANDB_IDENTITY_TOKEN_FILE"),
    *("WANDB_CREDENTIALS_FILE", "WANDB_X_PROXIES", "WANDB_X_EXTRA_HTTP_HEADERS"),
}
"""W&B's variables of this process that the writer gets too. The others describe some run, and not this one."""

Hook = Literal["none", "alive", "unclear", "gone"]
Way = Literal["relay", "wait", "write", "companion"]


@dataclass(frozen=True)
class Case:
    """A row of `TABLE`; None fits anything. `free`: a row of ours takes no step of the trainer's, since it does
    not log by step or ended at its planned last step. `closed`: the user says the run is over."""

    hook: Hook
    closed: bool | None
    free: bool | None
    late: str | None
    way: Way
    why: str


TABLE = (
    Case("alive", None, None, None, "relay", "the training process is alive and logs them"),
    Case("unclear", None, None, None, "wait", "watching whether the training process is alive"),
    Case("gone", None, True, None, "write", "the training process is gone"),
    Case("gone", True, None, None, "write", "the run is closed"),
    Case("gone", None, None, "companion", "companion", "the training process is gone and may come back"),
    Case("gone", None, None, "wait", "wait", "training may resume, and its next step must be free; if it will not: "
         "`autoeval-runner close RUN`"),
    Case("none", True, None, None, "write", "the run is closed"),
    Case("none", None, None, "companion", "companion", "whether the run has a writer is unknown"),
    Case("none", None, None, "wait", "wait", "no training process has shown itself, so the run may have a writer; "
         "if it has none any more: `autoeval-runner close RUN`"),
)  # fmt: skip
"""Who logs the waiting points of a run: the first row that fits."""


def decide(hook: Hook, *, closed: bool, free: bool, late: str) -> Case:
    """The row of `TABLE` for this case."""
    return next(
        c for c in TABLE
        if c.hook == hook and c.closed in (None, closed) and c.free in (None, free) and c.late in (None, late)
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The keys of the sink's entry. `dir` takes offline runs whose own directory cannot be reached from here;
    the key goes to `base_url`, or where W&B's own settings say."""

    late: Literal["wait", "companion"] = "wait"
    dir: str = ""
    base_url: str = ""
    api_key_env: str = ""


@dataclass(frozen=True)
class Waiting:
    """Points of one run that are not in W&B yet: its key, how many, and why."""

    run: str
    points: int
    why: str


@dataclass
class _Watched:
    """A heartbeat's content and when, by our clock, it was first seen so; when to try the writer again, and why."""

    content: str
    since: float
    not_before: float = 0.0
    tries: int = 0
    said: str = ""


class WandbSink:
    """See the module. `publish` and `flush` are those of `eval_runner.sinks.base.Sink`.

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
        self._watched: dict[Path, _Watched] = {}
        self.waiting: list[Waiting] = []
        """What the last `flush` left."""

    def publish(self, result: Result) -> None:
        """Leave the result's point for the run's writer; nothing where training has no W&B. See base.Sink."""
        if not result.run.wandb_id:
            return
        p = point(result)
        name = f"{p.ticket}.json"
        data = files.encode(files.Point(files.VERSION, p.ticket, p.step, p.tokens, p.metrics))
        files.parse_point(data, name)
        directory = self._root / result.run.key
        for part in ("points", "taken", "logged"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        if not (directory / "identity.json").exists():
            fsio.replace(str(directory / "identity.json"), files.encode(result.run), self._context.ops)
        # A point moves in this order; looked for in it, none is missed.
        for part in ("points", "taken", "logged"):
            if any(found.split("~")[0] in (name, p.ticket) for found in os.listdir(directory / part)):
                return
        tmp = directory / "points" / f".{p.ticket}.{fsio.unique()}"
        ops = self._context.ops
        fsio.write_new(ops, str(tmp), data)
        try:
            with contextlib.suppress(FileExistsError):
                ops.link(str(tmp), str(directory / "points" / name))
        finally:
            ops.unlink(str(tmp))
        ops.sync_dir(str(directory / "points"))

    def flush(self) -> bool:
        """Let go of what can go now. Takes seconds where it logs, `WRITER_TIMEOUT_S` at most for each run."""
        self.waiting = []
        for directory in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            if not directory.is_dir() or not (count := _count(directory)):
                continue
            try:
                why = self._move(directory)
            except (AutoEvalError, OSError) as error:
                why = str(error)
                self._later(directory, why)
                log.warning("autoeval: the scores of %s are not in W&B yet: %s", directory.name, why)
            count = _count(directory) if not why else count
            if count:
                self.waiting.append(Waiting(directory.name, count, why or "came meanwhile"))
        return not self.waiting

    # ----------------------------------------------------------------

    def _move(self, directory: Path) -> str:
        """Log the points of one run if that is ours to do now; why they wait, or ""."""
        case, run, by_step = self._case(directory)
        if case.way in ("relay", "wait"):
            if _taken(directory):
                with _alone(directory / "writer.lock") as alone:
                    if alone:  # who took them is dead, and a training that resumed can log them
                        _give_back(directory)
            return case.why
        watched = self._watched[directory]
        if files.clock() < watched.not_before:
            return watched.said
        with _alone(directory / "writer.lock") as alone:
            if not alone:
                return "another runner logs them"
            taken = self._take(directory)
            try:
                return self._write(directory, run, by_step, case.way == "companion", watched.content, taken)
            finally:
                _give_back(directory)

    def _case(self, directory: Path) -> tuple[Case, RunIdentity, bool]:
        hook, identity, by_step, free = self._look(directory)
        closed = (directory / "closed").exists()
        return decide(hook, closed=closed, free=free, late=self._settings.late), identity, by_step

    def _look(self, directory: Path) -> tuple[Hook, RunIdentity, bool, bool]:
        """What is seen of the training process, and whether a row of ours takes no step of its."""
        announced = _read(files.Announcement, directory / "run.json")
        # The end is read before the heartbeat: a process that says it ended was alive when it said so.
        ended = _read(files.Ended, directory / "ended.json")
        content, now = heartbeat(str(directory / "heartbeat")), files.clock()
        watched = self._watched.get(directory)
        if watched is None or watched.content != content:
            fresh = watched is not None
            watched = self._watched[directory] = _Watched(content, now)
        else:
            fresh = False
        if announced is None:
            identity = _read(RunIdentity, directory / "identity.json")
            if identity is None:
                raise AutoEvalError(f"{directory}: neither run.json nor identity.json says which run this is")
            return "none", identity, False, False
        ended = ended if ended is not None and ended.incarnation == announced.incarnation else None
        still = files.ENDED_STALE_S if ended else files.STALE_S
        hook: Hook = "alive" if fresh else "gone" if now - watched.since > still else "unclear"
        free = not announced.logs_by_step or (ended is not None and ended.complete)
        return hook, announced.run, announced.logs_by_step, free

    def _take(self, directory: Path) -> list[str]:
        """Take the waiting points for us; those of a runner that died as well, since the lock is ours."""
        _give_back(directory)
        taken = []
        for name in files.waiting(str(directory)):
            try:
                ticket = files.read_point(str(directory), name).ticket
            except TicketError as error:
                log.warning("autoeval: refused a point in %s: %s", directory, error)
                files.set_aside(str(directory), name, str(error))
                continue
            path = directory / "taken" / f"{ticket}~{self._context.runner}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(directory / "points" / name, path)
                taken.append(str(path))
        return taken

    def _write(
        self, directory: Path, run: RunIdentity, by_step: bool, companion: bool, beat: str, taken: list[str]
    ) -> str:
        if not taken:
            return ""
        offline = run.wandb_mode in ("offline", "dryrun")
        with tempfile.TemporaryDirectory(prefix="autoeval-wandb-") as scratch:
            own = self._offline_dir(run) if offline else Path(scratch)
            name = f"{run.wandb_id}-eval" if companion else run.wandb_id
            logs = [p for base in {own, self._fallback()} for p in _logs(base, name)] if offline else []
            request = Request(
                run=run, companion=companion, logs_by_step=by_step, offline=offline, points=tuple(taken),
                logs=tuple(sorted(logs, key=lambda p: Path(p).parent.name)), logged=str(directory / "logged"),
                directory=str(_parent(own) if offline else own),
                heartbeat=str(directory / "heartbeat"), heartbeat_seen=beat,
            )  # fmt: skip
            request.save(Path(scratch) / "request.json")
            output = directory / "writer.log"
            status = process.run(
                [sys.executable, "-m", "eval_runner.sinks.wandb_writer", str(Path(scratch) / "request.json")],
                log=output, env=self._environment(scratch), cwd=Path(scratch), stopping=self._context.stopping,
                timeout=WRITER_TIMEOUT_S,
            )  # fmt: skip
        if status == DONE:
            self._watched[directory].tries = 0
            return ""
        said = process.tail(output, 1)
        self._later(directory, said)
        level = logging.INFO if status == BUSY else logging.WARNING
        log.log(level, "autoeval: the scores of %s are not in W&B yet: %s (%s)", run.name or run.key, said, output)
        return said

    def _later(self, directory: Path, why: str) -> None:
        if watched := self._watched.get(directory):
            watched.said = why
            watched.not_before = files.clock() + min(PAUSE_S * 2**watched.tries, LONGEST_PAUSE_S)
            watched.tries = min(watched.tries + 1, 16)

    def _fallback(self) -> Path:
        return Path(self._settings.dir) if self._settings.dir else self._context.queue / "wandb"

    def _offline_dir(self, run: RunIdentity) -> Path:
        """The directory with the run's own offline directories, if it is here and holds them: a path in a ticket
        is only data. Else ours."""
        own = Path(map_path(run.wandb_dir, self._context.path_map)) if run.wandb_dir else None
        if own is not None and _logs(own, run.wandb_id) and os.access(own, os.W_OK):
            return own
        log.warning(
            "autoeval: %s: the offline directories of the run (%s) are not here, so its scores go to %s; after "
            "`wandb sync` of both, the summary and the chart definitions of the run are those of the scores",
            run.name or run.key, run.wandb_dir or "unknown", self._fallback(),
        )  # fmt: skip
        self._fallback().mkdir(parents=True, exist_ok=True)
        return self._fallback()

    def _environment(self, scratch: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") or k in _KEPT}
        if self._settings.base_url:
            env["WANDB_BASE_URL"] = self._settings.base_url
        if self._settings.api_key_env:
            env["WANDB_API_KEY"] = os.environ[self._settings.api_key_env]
        source = str(Path(__file__).parents[2])  # the child starts elsewhere, and runs what we are
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        return env | {"WANDB_DIR": scratch, "WANDB_SILENT": "true", "PYTHONPATH": path}


def close_run(queue: Path, name: str) -> str:
    """Record that the run will not go on, so that its late scores can be logged; its key. `name` is the key, the
    W&B run id, our id or the run's name. Raises ConfigError where no run, or more than one, has it."""
    known: dict[str, set[str]] = {}
    root = queue / "relay"
    for directory in sorted(root.iterdir()) if root.is_dir() else ():
        if directory.is_dir():
            known[directory.name] = {directory.name, *_names(directory)}
    found = [key for key, names in known.items() if name in names]
    if not found:
        raise ConfigError(f"{root}: there is no run called {name!r}{strict.near(name, set().union(*known.values()))}")
    if len(found) > 1:
        raise ConfigError(f"{root}: there are {len(found)} runs called {name!r}; name one of {', '.join(found)}")
    (root / found[0] / "closed").touch()
    return found[0]


def _names(directory: Path) -> set[str]:
    with contextlib.suppress(TicketError):
        announced = _read(files.Announcement, directory / "run.json")
        run = announced.run if announced else _read(RunIdentity, directory / "identity.json")
        return {run.id, run.wandb_id, run.name} - {""} if run else set()
    return set()


def _read(cls: type[T], path: Path) -> T | None:
    try:
        data = fsio.FileOps().read(str(path), files.POINT_BYTES)
    except FileNotFoundError:
        return None
    return files.parse(cls, data, str(path))


def _count(directory: Path) -> int:
    return len(files.waiting(str(directory))) + len(_taken(directory))


def _taken(directory: Path) -> list[str]:
    try:
        return os.listdir(directory / "taken")
    except FileNotFoundError:
        return []


def _give_back(directory: Path) -> None:
    for name in _taken(directory):
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory / "taken" / name, directory / "points" / f"{name.split('~')[0]}.json")


def _logs(directory: Path, run_id: str) -> list[str]:
    name = glob.escape(run_id)
    return glob.glob(f"{glob.escape(str(directory))}/offline-run-*-{name}/run-{name}.wandb")


def _parent(directory: Path) -> Path:
    """What `wandb.init(dir=…)` must be told for its directories to stand in this one."""
    return directory.parent if directory.name == "wandb" else directory


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether no other runner writes to this run."""
    from filelock import Timeout, UnixFileLock

    lock = UnixFileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
