"""A queue with a training and a W&B run, and what must hold of them whatever happened."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio, manifest, relay_files, retention, ticket
from autoeval_hooks.config import HookConfig
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.handover import Handover
from autoeval_hooks.keeper import ORPHAN_S, Keeper
from autoeval_hooks.queue import Queue, Token
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
        """Housekeeping by an observer to whom three leases pass, or (`long`) three times `ORPHAN_S`."""
        now = [0.0]
        keeper = Keeper(self.queue(runner, ops), lease=LEASE, max_failures=3, clock=lambda: now[0])
        for _ in range(4):
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


@functools.cache
def _ended_process() -> int:
    """The id of a process that was, and is no more."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid
