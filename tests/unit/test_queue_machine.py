"""The whole queue at random: several runners and submitters, deaths, pauses longer than the lease, lost races.

The model knows what was acknowledged; after every step the directory is compared with it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from autoeval_hooks import ticket as tickets
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import Keeper
from autoeval_hooks.manifest import FileRecord, Manifest, digest_of
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket

LEASE = 60.0
MAX_FAILURES = 3


def ticket_of(step: int) -> Ticket:
    files = (FileRecord("model.safetensors", 1, 1, "a" * 64),)
    draft = Manifest(
        version=1, path="/out/c", kind="huggingface", step=step, samples=None, tokens=None, files=files,
        weights_digest="b" * 64, digest="", run=RunIdentity("run"), tokenizer="", host="h", saved_at=0.0,
    )  # fmt: skip
    return tickets.new(replace(draft, digest=digest_of(draft)), "quick", "5" * 64, 5)


class CutOff(BaseException):
    """The process is gone."""


class DiesAfter(FileOps):
    """Dies once it has done that many calls that change the directory."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def _count(self) -> None:
        if self.left == 0:
            raise CutOff
        self.left -= 1

    def create(self, path: str) -> int:
        self._count()
        return super().create(path)

    def link(self, src: str, dst: str) -> None:
        self._count()
        super().link(src, dst)

    def rename(self, src: str, dst: str) -> None:
        self._count()
        super().rename(src, dst)

    def sync_dir(self, path: str) -> None:
        self._count()
        super().sync_dir(path)


@dataclass
class Runner:
    queue: Queue
    heart: int
    beats: int = 0


class QueueMachine(RuleBasedStateMachine):
    claims = Bundle("claims")

    @initialize()
    def start(self) -> None:
        self.root = tempfile.mkdtemp(prefix="autoeval-machine-")
        self.now = 0.0
        self.submitter = Queue(self.root, runner="submitter")
        self.submitter.create()
        self.runners = []
        for name in ("r0", "r1", "r2"):
            queue = Queue(self.root, runner=name)
            self.runners.append(Runner(queue, queue.start_heart()))
        self.keeper = Keeper(
            Queue(self.root, runner="keeper"), lease=LEASE, max_failures=MAX_FAILURES, clock=lambda: self.now
        )
        self.acknowledged: set[str] = set()
        self.committed: dict[str, int] = {}
        self.generations: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for runner in self.runners:
                os.close(runner.heart)
            shutil.rmtree(self.root)

    # ------------------------------------------------------------------ submitters

    @rule(step=st.integers(0, 5))
    def submit(self, step: int) -> None:
        ticket = ticket_of(step)
        known = self.submitter.known(ticket.id)
        assert self.submitter.enqueue(ticket) == (not known)
        self.acknowledged.add(ticket.id)

    @rule(step=st.integers(0, 5), calls=st.integers(0, 4))
    def submit_and_die(self, step: int, calls: int) -> None:
        ticket = ticket_of(step)
        try:
            Queue(self.root, runner="doomed", ops=DiesAfter(calls)).enqueue(ticket)
        except CutOff:
            return
        self.acknowledged.add(ticket.id)

    # ------------------------------------------------------------------ runners

    @rule(target=claims, who=st.integers(0, 2), newest=st.booleans())
    def claim(self, who: int, newest: bool) -> tuple[int, Token | None]:
        return who, self.runners[who].queue.claim(newest_first=newest)

    @rule(claim=consumes(claims))
    def complete(self, claim: tuple[int, Token | None]) -> None:
        who, token = claim
        if token is None:
            return
        held = self._held(token)
        assert self.runners[who].queue.complete(token) == held
        if held:
            self.committed[token.ticket] = self.committed.get(token.ticket, 0) + 1

    @rule(claim=claims)
    def zombie_completes(self, claim: tuple[int, Token | None]) -> None:
        """A runner that was paused for long believes in a claim that is another's by now."""
        who, token = claim
        if token is None or self._held(token) or self._is("done", token):
            return
        assert not self.runners[who].queue.complete(token)

    @rule(claim=consumes(claims), failed=st.booleans())
    def give_back(self, claim: tuple[int, Token | None], failed: bool) -> None:
        who, token = claim
        if token is None:
            return
        held = self._held(token)
        became = self.runners[who].queue.release(token, failed=failed, max_failures=MAX_FAILURES)
        if held:
            assert became != "lost"
        elif became == "pending":      # the reaper gave it back by the same rename: as good as ours
            assert any(t.ticket == token.ticket for t in self.submitter.tokens("pending"))

    @rule(claim=consumes(claims))
    def refuse(self, claim: tuple[int, Token | None]) -> None:
        who, token = claim
        if token is not None:
            held = self._held(token)
            assert self.runners[who].queue.quarantine(token, "because") == held

    @rule(who=st.integers(0, 2))
    def beat(self, who: int) -> None:
        runner = self.runners[who]
        runner.beats += 1
        runner.queue.beat(runner.heart, runner.beats)

    # ------------------------------------------------------------------ time, housekeeping, the user

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        self.keeper.sweep()

    @rule()
    def retry(self) -> None:
        for token in list(self.submitter.tokens("failed", "quarantine")):
            assert self.submitter.retry(token)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def exactly_one_token(self) -> None:
        if not hasattr(self, "root"):
            return
        tokens = list(self.submitter.tokens())
        names = [t.ticket for t in tokens]
        assert len(names) == len(set(names))
        known = set(os.listdir(os.path.join(self.root, "tickets")))
        waiting = {n.split("~")[0].split("-")[2] for n in os.listdir(os.path.join(self.root, "tmp")) if "~" in n}
        assert set(names) <= known
        assert known <= set(names) | waiting        # registered by a submitter that died: the janitor's work
        assert self.acknowledged <= known
        for name in known:
            assert os.stat(os.path.join(self.root, "tickets", name)).st_nlink == 2

    @invariant()
    def acknowledged_tickets_are_handed_out_or_will_be(self) -> None:
        if not hasattr(self, "root"):
            return
        tokens = {t.ticket for t in self.submitter.tokens()}
        if self.acknowledged - tokens:      # only where another submitter died in the middle of the same ticket
            self.keeper.sweep()
            assert self.acknowledged <= {t.ticket for t in self.submitter.tokens()}

    @invariant()
    def committed_once_and_generations_rise(self) -> None:
        if not hasattr(self, "root"):
            return
        for token in self.submitter.tokens():
            assert token.generation >= self.generations.get(token.ticket, 0)
            self.generations[token.ticket] = token.generation
        assert all(n == 1 for n in self.committed.values())
        assert {t.ticket for t in self.submitter.tokens("done")} == set(self.committed)

    def _held(self, token: Token) -> bool:
        return self._is("claimed", token)

    def _is(self, state: str, token: Token) -> bool:
        return token.name in os.listdir(os.path.join(self.root, state))


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase
