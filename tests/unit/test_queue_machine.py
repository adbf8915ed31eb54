"""The whole queue at random: runners and submitters that die at any call, stand still for longer than a lease, and have
clocks of their own; duplicate submits, cancels, retries, and a file server that loses replies.

The model knows what was acknowledged and what was committed; after every step the directory is compared with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from autoeval_hooks import ticket as tickets
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import ORPHAN_S, Keeper
from autoeval_hooks.manifest import FileRecord, Manifest, digest_of, weights_digest_of
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Evaluation, Result, Score

LEASE = 60.0
MAX_FAILURES = 3
CLOCKS = ((0.0, 1.0), (120.0, 1.3), (-5000.0, 0.8))
"""How far each runner's clock is off, in seconds, and how fast it goes."""


def ticket_of(step: int) -> Ticket:
    files = (FileRecord("model.safetensors", 1, 1, "a" * 64),)
    draft = Manifest(
        version=1, path="/out/c", kind="huggingface", step=step, samples=None, tokens=None, files=files,
        weights_digest=weights_digest_of(files), digest="", run=RunIdentity("run"), tokenizer="", host="h",
        saved_at=0.0,
    )  # fmt: skip
    return tickets.new(replace(draft, digest=digest_of(draft)), "quick", "5" * 64, 5)


def result_of(token: Token) -> Result:
    score = Score("b", "m", "test", 1.0, n=1)
    return Result(
        version=VERSION, ticket=token.ticket, generation=token.generation, runner=token.runner, status="ok",
        suite="quick", suite_digest="5" * 64, suite_text="", run=RunIdentity("run"), checkpoint="/out/c",
        checkpoint_digest="d", step=1, tokens=None, saved_at=0.0, started_at=1.0, finished_at=2.0,
        evaluations=(Evaluation("stand-in", 0.1, (score,)),),
    )  # fmt: skip


class CutOff(BaseException):
    """The process is gone: no handler of the program sees it. (It stands in for SIGKILL.)"""


@dataclass
class Plan:
    """What goes wrong with the calls to come: the process dies before or after the n-th, or replies are lost."""

    dies_at: int | None = None
    after: bool = False
    lost: bool = False


PLANS = st.builds(
    Plan, dies_at=st.sampled_from([None] * 9 + list(range(9))), after=st.booleans(),
    lost=st.sampled_from([False, False, True]),
)  # fmt: skip
SAFE = st.builds(Plan, lost=st.booleans())


class Trouble(FileOps):
    """Calls that go by a plan. Nothing is synced: no power is cut here."""

    plan = Plan()
    calls = 0

    @contextlib.contextmanager
    def by(self, plan: Plan) -> Iterator[None]:
        self.plan, self.calls = plan, 0
        try:
            yield
        finally:
            self.plan = Plan()

    def _do(self, name: str, *args: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if number == self.plan.dies_at and not self.plan.after:
            raise CutOff
        done = getattr(super(), name)(*args)
        if number == self.plan.dies_at:
            raise CutOff
        return done

    def create(self, path: str) -> int:
        fd: int = self._do("create", path)
        return fd

    def write(self, fd: int, data: bytes) -> int:
        count: int = self._do("write", fd, data)
        return count

    def link(self, src: str, dst: str) -> None:
        self._do("link", src, dst)
        if self.plan.lost:
            raise FileExistsError(errno.EEXIST, "reply lost", dst)

    def rename(self, src: str, dst: str) -> None:
        self._do("rename", src, dst)
        if self.plan.lost:
            raise FileNotFoundError(errno.ENOENT, "reply lost", src)

    def unlink(self, path: str) -> None:
        self._do("unlink", path)
        if self.plan.lost:
            raise FileNotFoundError(errno.ENOENT, "reply lost", path)

    def mkdir(self, path: str) -> None:
        self._do("mkdir", path)
        if self.plan.lost:
            raise FileExistsError(errno.EEXIST, "reply lost", path)

    def nlink(self, path: str) -> int:
        count: int = self._do("nlink", path)
        return count

    def sync_dir(self, path: str) -> None:
        if self.calls == self.plan.dies_at:
            raise CutOff

    def fsync(self, fd: int) -> None: ...


@dataclass
class Runner:
    """A process with a keeper and a clock of its own. Another takes its place when it dies."""

    queue: Queue
    keeper: Keeper
    ops: Trouble
    heart: int
    rate: float
    beats: int = 0
    beat_at: float | None = None
    """When it last beat, by the true time."""
    alive: bool = True


@dataclass
class Claim:
    runner: Runner
    token: Token
    recorded: bool = False


class QueueMachine(RuleBasedStateMachine):
    claims = Bundle("claims")

    @initialize()
    def start(self) -> None:
        self.root = tempfile.mkdtemp(prefix="autoeval-machine-")
        self.now = 0.0
        self.names = 0
        self.ops = Trouble()
        self.user = Queue(self.root, runner="user", ops=self.ops)
        self.user.create()
        self.runners = [self.new_runner(i) for i in range(3)]
        self.acknowledged: set[str] = set()
        self.generations: dict[str, int] = {}
        self.handed_out: dict[str, int] = {}
        """Ticket → the generation of its last claim."""

    def new_runner(self, number: int) -> Runner:
        skew, rate = CLOCKS[number]
        self.names += 1
        ops = Trouble()
        queue = Queue(self.root, runner=f"r{number}.{self.names}", ops=ops)
        keeper = Keeper(
            queue, lease=LEASE, max_failures=MAX_FAILURES, clock=lambda: skew + rate * self.now
        )
        return Runner(queue, keeper, ops, queue.start_heart(), rate)

    def teardown(self) -> None:
        """Whatever was left: a fresh runner brings every ticket to an end."""
        if not hasattr(self, "root"):
            return
        try:
            self.drain()
        finally:
            for runner in self.runners:
                os.close(runner.heart)
            shutil.rmtree(self.root)

    def drain(self) -> None:
        fresh = self.new_runner(0)
        self.runners.append(fresh)
        for _ in range(4):
            fresh.keeper.sweep()
            self.now += ORPHAN_S + 1
        while token := fresh.queue.claim():
            store.write(Path(self.root), token.result_name, result_of(token), (), ops=fresh.ops)
            assert fresh.queue.complete(token)
        self.what_must_hold()
        assert list(self.user.tokens("pending", "claimed")) == []
        assert {t.ticket for t in self.user.tokens()} == set(os.listdir(os.path.join(self.root, "tickets")))
        assert os.listdir(os.path.join(self.root, "tmp")) == []

    @contextlib.contextmanager
    def doing(self, runner: Runner, plan: Plan) -> Iterator[None]:
        """A runner at work, which may die of the plan."""
        try:
            with runner.ops.by(plan):
                yield
        except CutOff:
            runner.alive = False
            os.close(runner.heart)
            number = self.runners.index(runner)
            self.runners[number] = self.new_runner(number)

    # ------------------------------------------------------------------ submitters and users

    @rule(step=st.integers(0, 5), plan=PLANS)
    def submit(self, step: int, plan: Plan) -> None:
        ticket = ticket_of(step)
        known = ticket.id in os.listdir(os.path.join(self.root, "tickets"))
        before = self.everything()
        try:
            with self.ops.by(plan):
                new = self.user.enqueue(ticket)
        except CutOff:
            return
        assert new == (not known)
        if known:
            assert self.everything() == before
        self.acknowledged.add(ticket.id)

    @rule(pick=st.integers(0, 9), plan=PLANS)
    def cancel(self, pick: int, plan: Plan) -> None:
        tokens = list(self.user.tokens("pending", "claimed"))
        if tokens:
            token = tokens[pick % len(tokens)]
            with contextlib.suppress(CutOff), self.ops.by(plan):
                assert self.user.cancel(token, "because")
                (cancelled,) = (t for t in self.user.tokens("cancelled") if t.ticket == token.ticket)
                assert self.user.reason(cancelled) == "because"

    @rule(pick=st.integers(0, 9), plan=PLANS)
    def retry(self, pick: int, plan: Plan) -> None:
        tokens = list(self.user.tokens("failed", "quarantine", "cancelled"))
        if tokens:
            with contextlib.suppress(CutOff), self.ops.by(plan):
                assert self.user.retry(tokens[pick % len(tokens)])

    @rule(pick=st.integers(0, 9), plan=SAFE)
    def lose_a_result_and_retry(self, pick: int, plan: Plan) -> None:
        """A file system that does not keep what was synced; the ticket is done, and its user wants the result back."""
        tokens = list(self.user.tokens("done"))
        if tokens:
            token = tokens[pick % len(tokens)]
            shutil.rmtree(os.path.join(self.root, "results", token.result_name))
            with self.ops.by(plan):
                assert self.user.retry(token)

    # ------------------------------------------------------------------ runners

    @rule(target=claims, who=st.integers(0, 2), newest=st.booleans(), plan=PLANS)
    def claim(self, who: int, newest: bool, plan: Plan) -> Any:
        runner = self.runners[who]
        token = None
        with self.doing(runner, plan):
            token = runner.queue.claim(newest_first=newest)
            if token is not None:
                assert self.held(token)
                assert token.generation > self.handed_out.get(token.ticket, -1)
                self.handed_out[token.ticket] = token.generation
        return multiple() if token is None else Claim(runner, token)

    @rule(claim=claims, plan=SAFE)
    def record(self, claim: Claim, plan: Plan) -> None:
        """A runner that lost its claim meanwhile records too: it does not know."""
        if claim.runner.alive and not claim.recorded:
            with self.doing(claim.runner, plan):
                path = store.write(
                    Path(self.root), claim.token.result_name, result_of(claim.token), (), ops=claim.runner.ops
                )
                assert store.read(path).runner == claim.token.runner
            claim.recorded = True

    @rule(claim=consumes(claims), plan=PLANS)
    def complete(self, claim: Claim, plan: Plan) -> None:
        if claim.runner.alive:
            self.record(claim, Plan())
            held = self.held(claim.token)
            with self.doing(claim.runner, plan):
                assert claim.runner.queue.complete(claim.token) == held

    @rule(claim=consumes(claims), failed=st.booleans(), plan=PLANS)
    def give_back(self, claim: Claim, failed: bool, plan: Plan) -> None:
        if claim.runner.alive:
            held = self.held(claim.token)
            with self.doing(claim.runner, plan):
                became = claim.runner.queue.release(claim.token, failed=failed, max_failures=MAX_FAILURES)
                if became != "lost" and not held:
                    # What the reaper gave back, or ended, by the same rename is as good as ours: there it stands.
                    mine = (claim.token.ticket, claim.token.generation + (became == "pending"))
                    assert mine in {(t.ticket, t.generation) for t in self.user.tokens(became)}
                assert became != "lost" or not held

    @rule(claim=consumes(claims), plan=PLANS)
    def refuse(self, claim: Claim, plan: Plan) -> None:
        if claim.runner.alive:
            held = self.held(claim.token)
            with self.doing(claim.runner, plan):
                assert claim.runner.queue.quarantine(claim.token, "because") == held

    @rule(who=st.integers(0, 2), plan=PLANS)
    def beat(self, who: int, plan: Plan) -> None:
        runner = self.runners[who]
        runner.beats += 1
        with self.doing(runner, plan):
            runner.queue.beat(runner.heart, runner.beats)
            runner.beat_at = self.now
            assert runner.queue.heartbeat(runner.queue.runner) == b"%020d" % runner.beats

    @rule(who=st.integers(0, 2))
    def die(self, who: int) -> None:
        with self.doing(self.runners[who], Plan()):
            raise CutOff

    # ------------------------------------------------------------------ time and housekeeping

    @rule(seconds=st.sampled_from([1.0, 20.0, 61.0, 100.0, ORPHAN_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 2), plan=PLANS)
    def sweep(self, who: int, plan: Plan) -> None:
        runner = self.runners[who]
        beat_at = {r.queue.runner: r.beat_at for r in self.runners}
        with self.doing(runner, plan):
            for token, became in runner.keeper.sweep():
                assert became in ("pending", "failed")
                last = beat_at.get(token.runner)
                assert last is None or runner.rate * (self.now - last) > LEASE, "a runner that lives was reaped"

    @rule(who=st.integers(0, 2), seconds=st.sampled_from([50.0, 61.0, 100.0]))
    def others_stand_still(self, who: int, seconds: float) -> None:
        """Time passes that one runner alone sees."""
        self.sweep(who, Plan())
        self.now += seconds
        self.sweep(who, Plan())

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def what_must_hold(self) -> None:
        """The seven invariants, but for that of `complete`, `submit` and their like, which stand with their rules."""
        if not hasattr(self, "root"):
            return
        tokens = list(self.user.tokens())
        names = [t.ticket for t in tokens]
        known = set(os.listdir(os.path.join(self.root, "tickets")))
        # A submitter that died between its two names left the second in tmp/: the janitor's work.
        waiting = [n.split("~")[0].split("-")[2] for n in self.listing("tmp") if self.registered(n)]
        assert sorted([*names, *waiting]) == sorted(known)
        assert self.acknowledged <= known
        for name in known:
            assert os.stat(os.path.join(self.root, "tickets", name)).st_nlink == 2
        for token in tokens:
            assert token.generation >= self.generations.get(token.ticket, 0)
            self.generations[token.ticket] = token.generation
        results, problems = store.done(Path(self.root))
        assert problems == []
        assert sorted(r.ticket for r in results) == sorted(t.ticket for t in tokens if t.state == "done")

    def registered(self, name: str) -> bool:
        return "~g" in name and os.stat(os.path.join(self.root, "tmp", name)).st_nlink == 2 and name[0].isdigit()

    def listing(self, state: str) -> list[str]:
        return os.listdir(os.path.join(self.root, state))

    def everything(self) -> dict[str, list[str]]:
        return {name: sorted(self.listing(name)) for name in os.listdir(self.root)}

    def held(self, token: Token) -> bool:
        return token.name in self.listing("claimed")


QueueMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestQueueMachine = QueueMachine.TestCase
