"""The half of the MLflow, trackio and TensorBoard sinks that lives in the runner: light, and never held up.

A result waits in a file (`spool`) until a process of its own (`tracker`) has logged it, or found it there. That process
loads the tracker's client, which takes seconds and may print; it is ended where it takes too long, and then tried again
after a pause that grows. So a service that is away costs the other sinks `WRITE_S` now and then, and no more.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from autoeval_hooks import fsio, strict
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.findings import Finding
from autoeval_hooks.relay_files import clock
from eval_runner import process, secrets
from eval_runner.results.schema import Result
from eval_runner.sinks import wandb_lease
from eval_runner.sinks.base import Context, Standing
from eval_runner.sinks.spool import Spool
from eval_runner.sinks.tracked import BUSY, DONE, Entry, entry
from eval_runner.sinks.tracker import Answer, Request

log = logging.getLogger("autoeval")
ANOTHER = "another runner is at it"
T = TypeVar("T")

WRITE_S, LOOK_S, PROBE_S = 120.0, 120.0, 10.0
"""Seconds that a process may take to log a batch, to read what a target holds, and to find whether it answers. MLflow
makes a new database in the first, which took 40 s on a machine with too much to do."""
PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0
"""Between two tries."""
BUSY_S = 2.0
"""Until the next try where another runner is writing."""
NAME_S = 0.5
"""Seconds more for each name of a score, to look what a target holds: MLflow is asked for each."""
BATCH = 200
"""So many results at most are given to one process; fewer after one that took too long."""


class TrackerSink:
    """`publish`, `flush` and `compare` are those of `eval_runner.sinks.base.Sink`. One for each kind of tracker is
    below: its package and extra, its store's module, and what the store's process finds in its environment."""

    kind: ClassVar[str]
    """What `type` says in the file."""
    package: ClassVar[str]
    """The module that must be there."""
    environment: ClassVar[Mapping[str, str]]
    """Variables of the store's process; those that are "" are taken away."""
    defaults: ClassVar[Mapping[str, str]] = {}
    """Variables of the store's process, unless they are set."""
    outside: str = ""
    """What tells the target and does not stand in the file; without a password."""

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        """Raises ConfigError."""
        self._context = context
        self._errors: list[str] = []
        self._settings = self._read(settings)
        if find_spec(self.package) is None:
            self.fault("", f"the Python package {self.package} is not installed; {self._install()}")
        if self._errors:
            file = context.config_file or "configuration"
            raise ConfigError("\n".join(f"{file}: {error}" for error in self._errors))
        # As the file says it: one target may be mounted elsewhere on another host.
        told = json.dumps([context.written or self._settings, self.outside], sort_keys=True)
        self.target = f"{self.kind}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        self.spool = Spool(context.queue / "sinks" / self.target, context.ops)
        self._until, self._tries, self._said = 0.0, 0, ""
        self._batch, self._last = BATCH, ""
        self._holder: tuple[str, float] = ("", 0.0)

    # ---------------------------------------------------------------- what each kind has of its own

    def _read(self, settings: dict[str, Any]) -> dict[str, str]:
        """The store's settings, from those of the file; what is wrong is told to `fault`."""
        raise NotImplementedError

    def _target(self) -> str:
        """Where the scores go, for people; without a password."""
        raise NotImplementedError

    def _lease(self) -> Path:
        """Where the right to write to the target is."""
        return self.spool.root / "writer"

    def fault(self, key: str, what: str) -> None:
        """Something is wrong with a setting."""
        self._errors.append(f"{self._context.where}{'.' if key else ''}{key}: {what}")

    def built(self, cls: type[T], settings: dict[str, Any]) -> T | None:
        """The settings as this dataclass; None where they are none, which has been told."""
        return strict.build(cls, settings, self._context.where, self._errors)

    def path(self, text: str) -> str:
        """A path of the file, which starts at the file."""
        return str(Path(self._context.config_file).absolute().parent / Path(text).expanduser())

    def _install(self) -> str:
        return f"pip install 'autoeval-hooks[{self.kind}]'"

    # ---------------------------------------------------------------- the contract

    def publish(self, result: Result) -> None:
        """Let the result wait for `flush`."""
        self.spool.put(entry(result))

    def flush(self) -> bool:
        """Log what waits: one process of `WRITE_S` at most, where something does and it is no time of pause."""
        names = self.spool.names()
        if not names:
            self._settled()
            return True
        if clock() < self._until:
            return False
        turn = bisect.bisect_right(names, self._last)       # so that what cannot be shown holds up no other
        batch = (names[turn:] + names[:turn])[: self._batch]
        entries = self._entries(batch)
        why = self._bring(entries) if entries else ""
        left = self.spool.names()
        if why == ANOTHER:
            self._until = clock() + BUSY_S
            return False
        self._last = batch[-1]
        if why:
            self._later(why, moved=len(left) < len(names))
        elif not left:
            self._settled()
        return not left

    def compare(self, results: Sequence[Result], *, repair: bool) -> list[Standing]:
        """See base.Sink."""
        entries = [entry(result) for result in results]
        if not entries:
            return []
        keys = {key for one in entries for key in one.metrics()}
        try:
            waiting = set(self.spool.names())
            answer = self._ask("look", entries, LOOK_S + NAME_S * len(keys))
        except (AutoEvalError, OSError) as error:
            return [_unclear(one, str(error)) for one in entries]
        names = {one.point.ticket: one for one in entries}
        found = [_unclear(one, answer.errors[one.run.key]) for one in entries if one.run.key in answer.errors]
        for standing in answer.standings:
            mine = names.get(standing.ticket)
            if standing.state == "missing" and mine is not None:
                if mine.name in waiting:
                    standing = replace(standing, state="waiting", says=self.spool.why() or "a runner brings it")
                elif repair:
                    standing = self._repair(mine, standing)
            found.append(standing)
        if repair:
            self._until = 0.0       # somebody asks for it now
        return found

    def stands(self, attempt: str) -> str:
        """Where a result stands that was given; `attempt` is its `Entry.name`. Raises OSError."""
        if attempt in self.spool.names():
            return f"it waits for {self._target()}: {self.spool.why() or 'no runner has tried yet'}"
        return f"shown in {self._target()}"

    def findings(self) -> list[Finding]:
        """What `doctor` says: the package, whether the target answers, and what waits for it."""
        where = self._context.where
        found = [self._package()]
        try:
            found.append(Finding("ok", where, f"{self._target()}: {self._ask('probe', (), PROBE_S).probed}"))
        except (AutoEvalError, OSError) as error:
            means = f"{self._target()} cannot be written to from here ({error}); scores wait until it can"
            found.append(Finding("warning", where, means, self._remedy()))
        with contextlib.suppress(OSError):
            if count := len(self.spool.names()):
                means = f"{count} result(s) wait for {self._target()}: {self.spool.why() or 'no runner has tried yet'}"
                found.append(Finding("warning", where, means, "a runner brings them, or `autoeval-runner sync`"))
        return found

    def _remedy(self) -> str:
        return "look at the service, the network and the rights of this user; evaluation goes on"

    def _package(self) -> Finding:
        for name in (self.package, f"{self.package}-skinny"):
            with contextlib.suppress(PackageNotFoundError):
                return Finding("ok", name, f"version {version(name)}")
        return Finding("problem", self.package, "is not installed here", self._install())

    # ---------------------------------------------------------------- the work

    def _entries(self, names: Iterable[str]) -> list[Entry]:
        entries = []
        for name in names:
            try:
                one = self.spool.read(name)
            except TicketError as error:
                log.warning("autoeval: %s: left out, `autoeval-runner sync` brings it: %s", self.spool.root, error)
                self.spool.remove(name)
                continue
            if one is not None:
                entries.append(one)
        return entries

    def _bring(self, entries: Sequence[Entry]) -> str:
        """Have them logged; why some still wait, or ""."""
        try:
            answer = self._ask("write", entries, WRITE_S)
            self._batch = min(2 * self._batch, BATCH)
            for name in answer.shown:
                self._tries = 0     # it answers, and some run alone is in trouble
                self.spool.remove(name)
        except process.Stopped:
            return "the runner was told to stop"
        except (AutoEvalError, OSError) as error:
            return str(error)
        return "; ".join(sorted(set(answer.errors.values())))

    def _repair(self, mine: Entry, standing: Standing) -> Standing:
        try:
            self.spool.put(mine)
        except (AutoEvalError, OSError) as error:
            return replace(standing, says=f"{standing.says}; it cannot be repaired: {error}".removeprefix("; "))
        return standing

    def _ask(self, what: Any, entries: Sequence[Entry], timeout: float) -> Answer:
        """What the store's process answers. Raises AutoEvalError that says why it does not."""
        who, store = fsio.unique(), f"eval_runner.sinks.{self.kind}_store"
        with tempfile.TemporaryDirectory(prefix="autoeval-sink-") as scratch:
            folder, output = Path(scratch), Path(scratch) / "log"
            if what == "write":
                fsio.make_dirs(self._context.ops, str(self.spool.root))
                output = self.spool.root / "log"
            request = Request(
                what=what, module=store, settings=self._settings,
                entries=tuple(entries), answer=str(folder / "answer.json"), lease=str(self._lease()), who=who,
                broken=self._holder[0] if clock() - self._holder[1] > wandb_lease.STALE_S else "",
            )  # fmt: skip
            (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
            argv = [sys.executable, "-m", "eval_runner.sinks.tracker", str(folder / "request.json")]
            try:
                status = process.run(
                    argv, log=output, env=self._environment(), cwd=folder, stopping=self._context.stopping,
                    timeout=timeout,
                )  # fmt: skip
            except process.TimedOut as error:
                self._batch = max(1, min(self._batch, len(entries)) // 4)
                raise AutoEvalError(f"{self._target()} gives no answer within {timeout:g} s") from error
            if status not in (DONE, BUSY):
                said = process.tail(output, 1) or process.reason(status)
                raise AutoEvalError(f"{self._target()}: {secrets.masked(said)}")
            answer = Answer.load(folder / "answer.json")
            if answer.holder != self._holder[0]:
                self._holder = (answer.holder, clock())
            if status == BUSY:
                raise AutoEvalError(ANOTHER)
            return answer

    def _environment(self) -> dict[str, str]:
        source = str(Path(__file__).parents[2])  # the process starts elsewhere, and runs what we are
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        merged = {**self.defaults, **os.environ, **self.environment, "PYTHONPATH": path}
        return {name: value for name, value in merged.items() if value or name not in self.environment}

    def _later(self, why: str, *, moved: bool) -> None:
        """Try again after a pause, or, where something was `moved`, with the next ones at once."""
        if why != self._said:
            log.warning("autoeval: the scores are not in %s yet: %s", self._target(), why)
        if not moved:
            self._until = clock() + min(PAUSE_S * 2 ** min(self._tries, 16), LONGEST_PAUSE_S)
            self._tries += 1
        self._said = why
        self.spool.say(why)

    def _settled(self) -> None:
        if self._tries or self._said:
            self._until, self._tries, self._said = 0.0, 0, ""
        self.spool.say("")


def _unclear(one: Entry, why: str) -> Standing:
    return Standing(one.run.key, one.suite, one.point.step, one.point.ticket, "unclear", why)
