"""Faults at every call into the file system: which calls there are, what can go wrong at each, and what must hold
afterwards.

A scenario is run once to record its calls. Each of them is a point; a new operation in the product adds points by
itself. Then the scenario is run again for each point and fault, a fresh runner drains the queue, and `World.check`
asserts the outcome. fsync does nothing here: what a killed process wrote stays in the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoeval_hooks import config as hook_configs
from autoeval_hooks import fsio, manifest, pin, relay_files, retention, ticket
from autoeval_hooks.config import HookConfig
from autoeval_hooks.errors import AutoEvalError, CheckpointError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.keeper import ORPHAN_S, Keeper
from autoeval_hooks.queue import STATES, Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner.config.models import Config
from eval_runner.progress import Progress
from eval_runner.publisher import Publisher
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Evaluation, Failure, Instance, Result, Score
from eval_runner.runner import Runner
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from eval_runner.sinks.wandb_sync import AGAIN
from tests.stand_ins import StandIn

RUN = RunIdentity("run1", name="run1", project="p", entity="e", wandb_id="w1")
LEASE = 60.0
SUITES = ("quick", "slow")
COUNTS: Counter[str] = Counter()
"""How often each fault was tried, for the line in the test summary."""
SEEN: dict[str, int] = {}
"""Scenario → its points."""

# ---------------------------------------------------------------------- points and faults


@dataclass(frozen=True)
class Point:
    """A call into the file system: its name, the file with what differs between runs made alike, and which time."""

    call: str
    where: str
    nth: int

    def __str__(self) -> str:
        return f"{self.call} {self.where}" + (f" (time {self.nth + 1})" if self.nth else "")


@dataclass(frozen=True)
class Fault:
    """What happens in place of a call: `do(call, name)`. `then` fails the next calls of these names as well."""

    name: str
    do: Callable[[Callable[[], Any], str], Any]
    calls: frozenset[str] = frozenset()
    """The calls that it can happen to; empty: any."""
    then: frozenset[str] = frozenset()


    def fits(self, point: Point) -> bool:
        return not self.calls or point.call in self.calls


ALLOCATING = frozenset({"create", "write", "pwrite", "fsync", "link", "reflink", "copy", "rename", "mkdir"})
CHANGING = ALLOCATING | {"unlink", "rmdir"}
LOST = {
    "rename": errno.ENOENT, "link": errno.EEXIST, "mkdir": errno.EEXIST, "unlink": errno.ENOENT, "rmdir": errno.ENOENT,
}  # fmt: skip
"""What an NFS client reports when the call was done, its reply was lost, and it asked again. (An exclusive create
carries a verifier, by which the server knows it again.)"""
LASTS = 12
"""Calls for which a fault lasts that lasts."""


def _kill(call: Callable[[], Any], name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _done_and_kill(call: Callable[[], Any], name: str) -> None:
    try:
        call()
    finally:
        _kill(call, name)


def _lost(call: Callable[[], Any], name: str) -> None:
    call()
    raise OSError(LOST[name], f"{os.strerror(LOST[name])} (done, and the reply was lost)")


def _fails(number: int) -> Callable[[Callable[[], Any], str], Any]:
    def do(call: Callable[[], Any], name: str) -> None:
        raise OSError(number, os.strerror(number))

    return do


def _done_and_fails(call: Callable[[], Any], name: str) -> None:
    call()
    raise OSError(errno.EIO, "Input/output error (and yet it was done)")


KILLS = (Fault("killed before", _kill), Fault("killed after", _done_and_kill))
ERRORS = tuple(
    Fault(errno.errorcode[n], _fails(n)) for n in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE)
)
LASTING = (
    Fault("ENOSPC for a while", _fails(errno.ENOSPC), ALLOCATING, ALLOCATING),
    Fault("EROFS for a while", _fails(errno.EROFS), CHANGING, CHANGING),
)
REPLIES = (
    Fault("reply lost", _lost, frozenset(LOST)),
    Fault("done and EIO", _done_and_fails, CHANGING | {"sync_dir"}),
)


PAUSE = Fault("paused", _kill)
"""What is done meanwhile is the trial's own."""


class Faulty(FileOps):
    """Numbers every call, and does `fault` at the point `at`, once."""

    def __init__(self, base: Path, at: Point | None = None, fault: Fault | None = None) -> None:
        self.base = str(base)
        self.at, self.fault = at, fault
        self.points: list[Point] = []
        self.met = False
        self.lasting = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    def _call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        def call() -> Any:
            result = real(self, *args)
            if name == "create":
                self._paths[result] = args[0]
            return result

        with self._lock:
            where = self._where(args)
            point = Point(name, where, self._counts[name, where])
            self._counts[name, where] += 1
            self.points.append(point)
            now = not self.met and self.fault is not None and point == self.at
            again = self.lasting > 0 and self.fault is not None and name in self.fault.then
            self.lasting = LASTS if now and self.fault and self.fault.then else self.lasting - 1
            self.met = self.met or now
        if now or again:
            assert self.fault is not None
            return self.fault.do(call, name)
        return call()

    def _where(self, args: tuple[Any, ...]) -> str:
        paths = [self._paths.get(a, "?") if isinstance(a, int) else a for a in args if isinstance(a, int | str)]
        text = " → ".join(os.path.relpath(p, self.base) for p in paths if isinstance(p, str) and p.startswith("/"))
        for pattern, alike in _ALIKE:
            text = pattern.sub(alike, text)
        return text


_ALIKE = (
    (re.compile(re.escape(fsio.hostname()) + r"-\d+-[0-9a-f]{8}"), "UNIQUE"),
    (re.compile(r"[0-9a-f]{64}"), "ID"),
    (re.compile(r"\d-\d{10,}"), "ORDER"),
    (re.compile(r"w1-[0-9a-f]+"), "RUN"),
)

for _name, _real in vars(FileOps).items():
    if not _name.startswith("_"):
        setattr(Faulty, _name, functools.partialmethod(Faulty._call, _name, _real))


# ---------------------------------------------------------------------- a queue, and what must hold


class Relay(WandbSink):
    """The W&B sink, whose points nobody takes: the run's writer is no part of these tests."""

    def flush(self) -> bool:
        return True


@dataclass
class Board:
    """A stand-in for a sink, which outlives its runner: a file for each ticket and runner that it was shown."""

    directory: Path

    def publish(self, result: Result) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / f"{result.ticket}~{result.runner}").touch()

    def flush(self) -> bool:
        return True

    def shown(self) -> dict[str, set[str]]:
        """Ticket → the runners whose results of it were shown."""
        found: dict[str, set[str]] = {}
        for name in os.listdir(self.directory) if self.directory.exists() else ():
            found.setdefault(name.split("~")[0], set()).add(name.split("~")[1])
        return found


@dataclass
class World:
    """A queue and its training's output directory in `base`. `told` is what the doomed process was told."""

    base: Path
    config: Config
    hook_config: HookConfig
    progress: Progress
    told: dict[str, Any] = field(default_factory=dict)
    token: Token | None = None
    tickets: list[Ticket] = field(default_factory=list)
    ends: frozenset[str] = frozenset({"done"})
    """The states in which a ticket may end."""
    acknowledged: set[str] = field(default_factory=set)
    handover: Handover | None = None
    lost: set[str] = field(default_factory=set)
    """Tickets whose token was taken from the outside."""
    rows: Counter[str] = field(default_factory=Counter)
    """Ticket → how many rows its W&B run has of it."""

    def __post_init__(self) -> None:
        self.root = self.base / "queue"
        self.out = self.base / "out"
        self.board = Board(self.base / "board")
        self.config = replace(self.config, queue=self.root)
        self.hook_config = replace(self.hook_config, queue=str(self.root))

    # ------------------------------------------------------------------ making

    def queue(self, runner: str = "", ops: FileOps | None = None) -> Queue:
        return Queue(str(self.root), runner=runner, ops=ops)

    def checkpoint(self, step: int = 100) -> Path:
        path = self.out / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"%d" % step * 200)
        (path / "config.json").write_text("{}")
        (path / "tokenizer.json").write_text("{}")
        return path

    def ticket(self, step: int = 100, suite: str = "quick", digest: str = "") -> Ticket:
        path = self.out / f"checkpoint-{step}"
        if not path.exists():
            self.checkpoint(step)
        found = manifest.build(str(path), path=str(path), step=step, run=RUN, saved_at=0.0)
        new = ticket.new(found, suite, digest or self.config.suites[suite].digest, 5)
        self.tickets.append(new)
        return new

    def queued(self, step: int = 100, **how: Any) -> Ticket:
        self.queue().create()
        new = self.ticket(step, **how)
        assert self.queue().enqueue(new)
        self.acknowledged.add(new.id)
        return new

    def claimed(self, runner: str = "doomed") -> Token:
        self.queued()
        self.token = self.queue(runner).claim()
        assert self.token is not None
        return self.token

    def record(self, token: Token, ops: FileOps | None = None, *, failed: bool = False) -> None:
        score = Score("length", "bytes", "test", 1.0, n=1)
        (found,) = (t for t in self.tickets if t.id == token.ticket)
        m = found.manifest
        result = Result(
            version=VERSION, ticket=token.ticket, generation=token.generation, runner=token.runner,
            status="failed" if failed else "ok", suite=found.suite, suite_digest=found.suite_digest, suite_text="",
            run=m.run, checkpoint=m.path, checkpoint_digest=m.digest, step=m.step, tokens=None, saved_at=0.0,
            started_at=1.0, finished_at=2.0, evaluations=() if failed else (Evaluation("stand-in", 0.1, (score,)),),
            failure=Failure("checkpoint", "it is broken") if failed else None,
        )  # fmt: skip
        values = [] if failed else [Instance("length", "bytes", "test", "0", 1.0)]
        store.write(self.root, token.result_name, result, values, ops=ops)

    def sinks(self, runner: str, ops: FileOps | None = None) -> dict[str, Any]:
        context = Context(queue=self.root, runner=runner, where="sinks[0]", ops=ops or FileOps())
        return {"wandb": Relay({}, context), "board": self.board}

    def publisher(self, ops: FileOps | None = None) -> Publisher:
        return Publisher(self.queue("doomed", ops), self.sinks("doomed", ops))

    def runner(self, name: str, evaluator: StandIn | None = None, ops: FileOps | None = None) -> Runner:
        evaluators: dict[str, list[Any]] = {suite: [evaluator or StandIn()] for suite in SUITES}
        return Runner(self.config, evaluators, self.sinks(name, ops), self.progress, name=name, ops=ops or FileOps())

    # ------------------------------------------------------------------ a fresh runner

    def sweep(self, *, long: bool = True, runner: str = "keeper", ops: FileOps | None = None) -> None:
        """Housekeeping by an observer to whom a lease passes, or (`long`) more than `ORPHAN_S`, three times over."""
        now = [0.0]
        keeper = Keeper(self.queue(runner, ops), lease=LEASE, max_failures=3, clock=lambda: now[0])
        for _ in range(4 if long else 2):
            keeper.sweep()
            now[0] += (ORPHAN_S if long else LEASE) + 1

    def drain(self) -> None:
        """What a runner that comes later does, a lease after what has happened, and what is left after hours."""
        self.queue().create()
        self.sweep(long=False)
        self._run()
        held = {token.ticket for token in self.queue().tokens()}
        assert self.acknowledged - self.lost <= held, "an acknowledged ticket was lost"
        self.sweep()
        if next(self.queue().tokens("pending"), None):
            self._run()

    def _run(self) -> None:
        runner = self.runner(fsio.unique())
        assert runner.run("drain")
        assert not runner.given_back
        self._log()

    def _log(self) -> None:
        """A stand-in for the run's only writer: each point that waits becomes a row, and one that was offered again
        only if the run has none of it."""
        for directory in map(str, self.root.glob("relay/*")):
            for stage in ("taken", "points"):
                for name in relay_files.waiting(directory, stage):
                    found, again = relay_files.ticket_of(name), relay_files.owner_of(name) == AGAIN
                    self.rows[found] += not (again and found in self.rows)
                    assert relay_files.move(directory, f"{stage}/{name}", f"logged/{relay_files.taken(found, 'w')}")

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """Whatever happened: one token for each ticket, one result, one point; a reason where there is none."""
        tokens = list(self.queue().tokens())
        names = [t.ticket for t in tokens]
        tickets = os.listdir(self.root / "tickets")
        assert sorted(names) == sorted(tickets), "exactly one token for each ticket"
        assert {(self.root / "tickets" / t).stat().st_nlink for t in tickets} <= {2}, "two names for each token"
        assert self.acknowledged <= set(tickets), "an acknowledged ticket was lost"
        assert {t.state for t in tokens} <= self.ends, [t.state for t in tokens]
        done = {t.ticket: t for t in tokens if t.state == "done"}
        results, problems = store.done(self.root)
        assert problems == []
        assert sorted(r.ticket for r in results) == sorted(done)
        ok = {r.ticket for r in results if r.status == "ok"}
        assert self.rows == Counter(ok), "one row for each result"
        assert self.board.shown() == {t: {done[t].runner} for t in ok}, "a result that is none was published"
        failures = {f.ticket: f.failure.message for f in store.collect(self.root).failed}
        for t in tokens:
            if t.state != "done":
                assert failures.get(t.ticket) or self.queue().reason(t), f"{t.state} without a reason"
        for name in ("tmp", "hb"):
            assert os.listdir(self.root / name) == [], f"left in {name}/"
        self._check_pins()
        if self.told.get("committed"):
            assert any(t.runner == "doomed" for t in done.values()), "a commit was told and is none"

    def _check_pins(self) -> None:
        pins = self.out / ticket.PINS
        needed = set()
        for token in self.queue().tokens("pending", "claimed", "failed"):
            needed.add(Path(self.queue().read(token).pin).name)
        needed -= {""}
        before = set(os.listdir(pins)) if pins.exists() else set()
        assert needed <= before, "a pin that a live ticket needs was freed"
        for name in before:     # this process ends
            if name.startswith(f".new-{fsio.hostname()}-{os.getpid()}-"):
                os.rename(pins / name, pins / name.replace(str(os.getpid()), str(_ended_process())))
        retention.tidy_pins(self.queue(), str(self.out))
        known = set(os.listdir(self.root / "tickets"))
        after = set(os.listdir(pins)) if pins.exists() else set()
        assert needed <= after
        # What never became a ticket is freed by `gc`, or taken up when the checkpoint is submitted again.
        assert after - needed <= {p for p in after if re.fullmatch("[0-9a-f]{64}", p) and p not in known}


# ---------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenario:
    """`prepare` without faults, then `act` with them. `again`: whether the caller acts again after an error."""

    name: str
    prepare: Callable[[World], object]
    act: Callable[[World, FileOps], object]
    ends: frozenset[str] = frozenset({"done"})
    again: bool = True
    threads: bool = False
    """It runs several threads, so that only the first call of each kind is a point that is surely met."""
    after: Callable[[World], object] = lambda world: None
    """Once the queue was drained: what happens then, before it is drained again."""


def _enqueue(world: World, ops: FileOps) -> None:
    world.queue(ops=ops).enqueue(world.tickets[0])
    world.acknowledged.add(world.tickets[0].id)


def _renew(world: World, ops: FileOps) -> None:
    queue = world.queue(fsio.unique(), ops)
    fd = queue.start_heart()
    queue.beat(fd, 1)
    os.unlink(world.root / "hb" / queue.runner)     # as housekeeping does while the runner is paused for long
    queue.beat(fd, 2)
    queue.stop_heart(fd)


def _complete(world: World, ops: FileOps) -> None:
    assert world.token is not None
    world.told["committed"] = world.queue("doomed", ops).complete(world.token)


def _put_back(state: str) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        token = world.claimed()
        if state == "failed":
            world.record(token, failed=True)
            world.queue("doomed").fail(token)
        elif state == "quarantine":
            world.queue("doomed").quarantine(token, "because")
        elif state == "cancelled":
            world.queue("user").cancel(token, "because")
        else:       # done, and a power cut on a file system that does not keep its word took the result
            world.queue("doomed").complete(token)
        (world.token,) = world.queue().tokens(state)

    return prepare


def _reap_prepare(world: World) -> None:
    for step in (100, 200):
        world.queued(step)
    for name in ("dead", "gone"):
        queue = world.queue(name)
        assert queue.claim() is not None
        fd = queue.start_heart()
        queue.beat(fd, 1)
        os.close(fd)


def _janitor_prepare(world: World) -> None:
    """What the dead left: a ticket with its first name only and one that lost its second, files, a heartbeat."""
    for step in (100, 200):
        world.queued(step)
    half, lost = world.queue().tokens("pending")
    tmp = world.root / "tmp"
    os.rename(world.root / "pending" / half.name, tmp / f"{half.name}~{fsio.unique()}")
    os.unlink(world.root / "pending" / lost.name)
    world.lost.add(lost.ticket)
    (tmp / f"5-1-{'a' * 64}~g0f0~{fsio.unique()}").write_bytes(b"{")
    (tmp / "result-x").mkdir()
    (tmp / "result-x" / "result.json").write_text("{")
    (world.root / "hb" / "dead").write_text("1")


def _pin(world: World, ops: FileOps) -> None:
    source = world.out / "checkpoint-100"
    made = pin.make(str(source), pin.pins_dir(str(source)), "hardlink", ops)
    final = pin.adopt(made, "a" * 64, ops)
    pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto", ops), "a" * 64, ops)
    pin.release(final, ops)


def _handover(world: World, ops: FileOps) -> None:
    """As the hook does it: what failed is tried again by the same hand-over."""
    path = world.out / "checkpoint-100"
    if world.handover is None:
        save = Save(str(path), 100, RUN, 0.0)
        world.handover = Handover(world.hook_config, world.queue(ops=ops), save, SUITES)
    world.handover.queue.create()
    world.handover.run()
    world.acknowledged |= set(os.listdir(world.root / "tickets"))
    assert len(world.acknowledged) == len(SUITES)


def _submitted_again(world: World) -> None:
    """The trainer's retention took the checkpoint, and what was queued was evaluated; the training is resumed."""
    os.rename(world.base / "kept", world.out / "checkpoint-100")
    world.handover = None
    _handover(world, FileOps())
    _rotate(world)


def _rotate(world: World) -> None:
    """Retention deletes the checkpoint: it lives on in its pins."""
    os.rename(world.out / "checkpoint-100", world.base / "kept")


def _runner(evaluator: Callable[[], StandIn] = StandIn) -> Callable[[World, FileOps], None]:
    def act(world: World, ops: FileOps) -> None:
        world.runner("doomed", evaluator(), ops).run("once")

    return act


def _broken(world: World, ops: FileOps) -> None:
    world.runner("doomed", StandIn([CheckpointError("it is broken")]), ops).run("once")


def _torn(world: World) -> None:
    world.queued()
    (world.root / "tickets" / world.tickets[0].id).write_bytes(b"{")


def _pinned(world: World) -> None:
    world.checkpoint()
    _handover(world, FileOps())
    world.handover = None
    _rotate(world)


def _publish_prepare(world: World) -> None:
    token = world.claimed()
    world.record(token)
    world.queue("doomed").complete(token)
    for name in world.sinks("doomed"):
        (world.root / "published" / name).mkdir(parents=True)


QUARANTINED = frozenset({"done", "quarantine"})
SCENARIOS = (
    Scenario("create", lambda w: w.ticket(), lambda w, ops: w.queue(ops=ops).create(),
             after=lambda w: _enqueue(w, FileOps())),
    Scenario("enqueue", lambda w: (w.queue().create(), w.ticket()), _enqueue),
    Scenario("enqueue what is known", lambda w: w.queued(), _enqueue),
    Scenario("claim", lambda w: w.queued(), lambda w, ops: w.queue("doomed", ops).claim()),
    Scenario("renew", lambda w: w.queued(), _renew),
    Scenario("record", lambda w: w.claimed(), lambda w, ops: w.record(w.token, ops), again=False),  # type: ignore[arg-type]
    Scenario("complete", lambda w: w.record(w.claimed()), _complete),
    Scenario("fail", lambda w: w.record(w.claimed(), failed=True),
             lambda w, ops: w.queue("doomed", ops).fail(w.token), frozenset({"done", "failed"})),  # type: ignore[arg-type]
    Scenario("quarantine", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).quarantine(w.token, "because"), QUARANTINED),  # type: ignore[arg-type]
    Scenario("cancel what waits", lambda w: w.queued(),
             lambda w, ops: [w.queue("user", ops).cancel(t, "because") for t in w.queue().tokens("pending")],
             frozenset({"done", "cancelled"})),
    Scenario("cancel what runs", lambda w: w.claimed("live"),
             lambda w, ops: w.queue("user", ops).cancel(w.token, "because"),  # type: ignore[arg-type]
             frozenset({"done", "cancelled"})),
    Scenario("release", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).release(w.token, failed=True, max_failures=3)),  # type: ignore[arg-type]
    Scenario("release for the last time", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).release(w.token, failed=True, max_failures=1),  # type: ignore[arg-type]
             frozenset({"done", "failed"})),
    *(
        Scenario(f"retry what is {state}", _put_back(state),
                 lambda w, ops: w.queue("user", ops).retry(w.token), frozenset({"done", state}),  # type: ignore[arg-type]
                 after=lambda w: [w.queue().retry(t) for t in w.queue().tokens(*STATES[2:]) if t == w.token])
        for state in ("failed", "quarantine", "cancelled")
    ),
    Scenario("reap", _reap_prepare, lambda w, ops: w.sweep(long=False, ops=ops)),
    Scenario("janitor", _janitor_prepare, lambda w, ops: w.sweep(ops=ops)),
    Scenario("pin", lambda w: (w.queue().create(), w.checkpoint()), _pin),
    Scenario("hand-over", lambda w: w.checkpoint(), _handover, after=_submitted_again),
    Scenario("publish", _publish_prepare, lambda w, ops: w.publisher(ops).look()),
    Scenario("runner", _pinned, _runner(), again=False, threads=True),
    Scenario("runner, broken checkpoint", lambda w: w.queued(), _broken, frozenset({"done", "failed"}), again=False,
             threads=True),
    Scenario("runner, torn ticket", _torn, _runner(), frozenset({"quarantine"}), again=False, threads=True),
    Scenario("runner, changed suite", lambda w: w.queued(digest="5" * 64), _runner(), again=False, threads=True),
)  # fmt: skip


# ---------------------------------------------------------------------- running


class NotMet(Exception):
    """The call was not made this time: which there are depends on time where several threads run."""


Trial = Callable[["Scenario", Point, Fault], None]


@dataclass
class Lab:
    """Makes worlds in `base`, each used once."""

    base: Path
    config: Config
    hook_config: HookConfig
    progress: Progress
    made: int = 0

    @contextlib.contextmanager
    def world(self, scenario: Scenario) -> Iterator[World]:
        self.made += 1
        base = self.base / str(self.made)
        base.mkdir()
        world = World(base, self.config, self.hook_config, self.progress, ends=scenario.ends)
        scenario.prepare(world)
        yield world
        shutil.rmtree(base)     # kept where the check failed

    def points(self, scenario: Scenario) -> list[Point]:
        """The calls that a scenario makes, without faults."""
        with self.world(scenario) as world:
            ops = Faulty(world.base)
            scenario.act(world, ops)
            self.finish(scenario, world)
        return [p for p in ops.points if p.nth == 0 or not scenario.threads]

    def try_all(self, scenario: Scenario, trials: Callable[[int, Point], list[tuple[Fault, Trial]]]) -> None:
        """These trials at each point, which the function is given by number and content; all that went wrong, at once.
        """
        points = self.points(scenario)
        wrong, unmet = [], []
        for i, point in enumerate(points):
            for fault, trial in trials(i, point):
                try:
                    trial(scenario, point, fault)
                except NotMet:
                    unmet.append(str(point))
                    continue
                except Exception as error:
                    wrong.append(f"{fault.name} at {i}, {point}: {type(error).__name__}: {error} ({self.made})")
                COUNTS[fault.name] += 1
        SEEN[scenario.name] = len(points)
        assert not wrong, f"{len(wrong)} at {len(points)} points\n" + "\n".join(wrong)
        assert len(unmet) <= scenario.threads * len(points) // 10, f"not met: {unmet}"

    def finish(self, scenario: Scenario, world: World) -> None:
        """A fresh runner drains, and everything must hold."""
        if scenario.name == "hand-over":
            _rotate(world)
        world.drain()
        world.check()
        scenario.after(world)
        world.drain()
        world.check()

    def kill(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """In a child process, which dies there."""
        with self.world(scenario) as world:
            ops, said = Faulty(world.base, point, fault), world.base / "said"

            def act() -> None:
                scenario.act(world, ops)
                said.write_text("not met" if not ops.met else "not killed")

            if not os.WIFSIGNALED(_in_child(act, said)):
                raise NotMet if said.read_text() == "not met" else AssertionError(said.read_text())
            self.finish(scenario, world)

    def fault(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """In this process, whose caller is told of it, or is not, and may try again."""
        with self.world(scenario) as world:
            self._act(scenario, world, Faulty(world.base, point, fault))
            self.finish(scenario, world)

    def pause(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """The process stands still before the call, for so long that all it holds is taken over; then it goes on."""

        def stand_still(call: Callable[[], Any], name: str) -> Any:
            world.drain()
            return call()

        with self.world(scenario) as world:
            ops = Faulty(world.base, point, replace(fault, do=stand_still))
            self._act(scenario, world, ops)
            self.finish(scenario, world)

    def _act(self, scenario: Scenario, world: World, ops: Faulty) -> None:
        """As a caller that may be told of an error, and then tries again."""
        for _ in range(3):
            try:
                scenario.act(world, ops)
            except (OSError, AutoEvalError):
                ops.lasting = 0
                if scenario.again:
                    continue
            if not ops.met:
                raise NotMet
            return
        raise AssertionError("calling again does not help")


@functools.cache
def _ended_process() -> int:
    """The id of a process that was, and is no more."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def _in_child(act: Callable[[], object], said: Path) -> int:
    """The wait status of a child process that did this; an error goes to the file."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(3)
    return os.waitpid(pid, 0)[1]


def load(path: Path) -> tuple[Config, HookConfig]:
    """One configuration for both sides."""
    from eval_runner import config as configs

    path.write_text(
        f"queue: queue\nrunner: {{lease: {LEASE}}}\nsinks: []\nsuites:\n"
        + "".join(f"  {s}: {{evaluators: [{{type: helm, entries: [{s}]}}]}}\n" for s in SUITES)
    )
    return configs.load(str(path)), hook_configs.load(path)
