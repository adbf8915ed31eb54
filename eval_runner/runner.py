"""The runner: claim → verify → evaluate → record → commit → publish, one ticket at a time.

Read it from `Runner.run` downwards: a ticket's path is in order.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks import fsio, pin
from autoeval_hooks import ticket as tickets
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import Keeper, boottime
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket
from eval_runner.checkpoints import huggingface
from eval_runner.config.models import Config, Suite
from eval_runner.evaluators.base import Evaluator, Job
from eval_runner.lease import Lease
from eval_runner.process import Stopped
from eval_runner.progress import Progress
from eval_runner.publisher import Publisher
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Evaluation, Failure, Instance, Result
from eval_runner.sinks.base import Sink

log = logging.getLogger("autoeval")

Mode = Literal["forever", "once", "drain"]

RETRY_S = 30.0
"""Pause of this runner before it takes a ticket again that failed here; doubled each time, up to `RETRY_MAX_S`."""
RETRY_MAX_S = 900.0
IDLE_S = (0.2, 5.0)
"""Shortest and longest pause between two looks at an empty queue."""
NEVER = float("inf")
REFILES = 20
"""Generations after which a ticket that is filed from one definition to another is no longer."""
SETTLE_S = 180.0
"""How long a runner that is done waits for late points to reach their run."""


@dataclass
class Runner:
    """Evaluates the tickets of one queue by one configuration."""

    config: Config
    evaluators: dict[str, list[Evaluator]]
    """Suite → its evaluators, checked."""
    sinks: dict[str, Sink]
    progress: Progress
    name: str = field(default_factory=fsio.unique)
    ops: FileOps = field(default_factory=FileOps)
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set it to have the ticket in hand given back and `run` return."""
    done: int = 0
    """Tickets that this runner evaluated."""
    failed: int = 0
    """Tickets that ended here without a result, those in quarantine included."""
    given_back: set[str] = field(default_factory=set)
    """Tickets that this runner took and that are not ended yet."""

    def __post_init__(self) -> None:
        section = self.config.runner
        self.queue = Queue(str(self.config.queue), runner=self.name, ops=self.ops)
        self.queue.create()
        (self.config.queue / "logs").mkdir(exist_ok=True)
        self._keeper = Keeper(self.queue, lease=section.lease, max_failures=section.max_attempts)
        self._swept_at = float("-inf")
        self._not_before: dict[str, float] = {}

    # ------------------------------------------------------------------ the loop

    def run(self, mode: Mode) -> bool:
        """Evaluate: ``forever``, ``once`` (one ticket at most), or ``drain`` (until no ticket is left to take).

        True when what was finished could be shown everywhere; False when points still wait for their run.
        """
        with Lease(self.queue, self.config.runner.lease) as lease, Publisher(self.queue, self.sinks) as publisher:
            pause = IDLE_S[0]
            while not self.stopped.is_set():
                try:
                    self._housekeeping()
                    token = self._claim(lease)
                    took = token is not None and self._process(token, lease)
                    over = (took and mode == "once") or (token is None and mode != "forever" and self._nothing_left())
                except OSError as error:
                    log.warning("the queue does not answer: %s; trying again", error)
                    self.stopped.wait(IDLE_S[1])
                    continue
                if over:
                    break
                if token is not None:
                    publisher.wake()
                    pause = IDLE_S[0]
                else:
                    self.progress.idle(self.done, self.failed)
                    self.stopped.wait(pause)
                    pause = min(pause * 1.5, IDLE_S[1])
            if mode == "forever":
                return True
            self.progress.settling()
            settled = publisher.settle(SETTLE_S, self.stopped)
            self.stopped.set()      # a sink that is still at work ends soon
            return settled

    def _housekeeping(self) -> None:
        """Now and then, with no ticket in hand: free what others hold and died with, and what we hold unknowingly."""
        now = time.monotonic()
        if now - self._swept_at < self.config.runner.lease / 3:
            return
        self._swept_at = now
        for token, became in self._keeper.sweep():
            log.warning("ticket %s: runner %s is gone; the ticket is %s", token.ticket[:12], token.runner, became)
        for token in self.queue.tokens("claimed"):
            if token.runner == self.name:       # a claim whose success a file server did not tell us
                self.queue.release(token, failed=False)

    def _claim(self, lease: Lease) -> Token | None:
        if not lease.held_since(boottime()):
            return None     # the shared file system does not answer: take nothing that we could not hold
        now = time.monotonic()
        return self.queue.claim(
            newest_first=self.config.runner.order == "newest",
            wanted=lambda token: self._not_before.get(token.ticket, now) <= now,
        )

    def _nothing_left(self) -> bool:
        """Whether no ticket is pending that this runner may take, nor may become so by a runner that died."""
        pending = any(self._not_before.get(t.ticket) != NEVER for t in self.queue.tokens("pending"))
        return not pending and not self._keeper.unsure()

    # ------------------------------------------------------------------ one ticket

    def _process(self, token: Token, lease: Lease) -> bool:
        """Take a claimed ticket to its next state, whatever happens; whether it was evaluated, or tried."""
        claimed_at = boottime()
        self.given_back.add(token.ticket)
        try:
            ticket = self.queue.read(token)
        except TicketError as error:
            log.error("ticket %s refused: %s", token.ticket[:12], error)
            self.queue.quarantine(token, str(error))
            self._ended(token, failed=True)
            return False
        except FileNotFoundError:
            return False        # reaped in the meantime; if it is ours all the same, housekeeping gives it back
        except OSError as error:
            log.error("ticket %s cannot be read: %s", token.ticket[:12], error)
            self._retry_later(token)
            return True
        suite = self.config.suites.get(ticket.suite)
        if suite is None:
            log.warning(
                "ticket %s: suite %r is not in %s; left for another runner",
                token.ticket[:12], ticket.suite, self.config.path,
            )  # fmt: skip
            self._not_before[token.ticket] = NEVER
            self.given_back.discard(token.ticket)
            self.queue.release(token, failed=False)
            return False
        attempt = _Attempt(ticket, token, suite, time.time())
        if suite.digest != ticket.suite_digest:
            self._attempt(attempt, lambda: self._refile(attempt))
            return False

        def stopping() -> bool:
            return self.stopped.is_set() or not lease.held_since(claimed_at)

        self._attempt(attempt, lambda: self._evaluate(attempt, stopping))
        return True

    def _attempt(self, attempt: _Attempt, work: Callable[[], None]) -> None:
        """Do the work; whatever goes wrong, record why and never leave the ticket claimed."""
        token = attempt.token
        try:
            work()
        except Stopped:
            self.queue.release(token, failed=False)
            log.warning("ticket %s: given back unfinished", token.ticket[:12])
        except AutoEvalError as error:
            self._failed(attempt, Failure(error.kind, str(error)))
        except Exception as error:
            log.debug("unexpected", exc_info=True)
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._failed(
                attempt,
                Failure("transient", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"),
            )

    def _evaluate(self, attempt: _Attempt, stopping: Callable[[], bool]) -> None:
        """Verify, evaluate, verify again, and commit."""
        ticket, token = attempt.ticket, attempt.token
        section = self.config.runner
        checkpoint = huggingface.verify(
            ticket, self.config.path_map, allow_pickled_weights=section.allow_pickled_weights
        )
        evaluations: list[Evaluation] = []
        with contextlib.ExitStack() as stack:
            instances: list[Instance] = []
            for i, evaluator in enumerate(self.evaluators[attempt.suite.name]):
                kind = attempt.suite.evaluators[i]["type"]
                work = Path(tempfile.mkdtemp(prefix=f"autoeval-{kind}-"))
                stack.callback(shutil.rmtree, work, ignore_errors=True)
                job = Job(
                    path=checkpoint.path, tokenizer=checkpoint.tokenizer, name=_model_name(ticket), work_dir=work,
                    log=self.config.queue / "logs" / f"{token.result_name}.{i}-{kind}.log",
                    stopping=stopping,
                    progress=self.progress.evaluation(ticket, kind),
                )  # fmt: skip
                outcome = evaluator.evaluate(job)
                evaluations.append(outcome.evaluation)
                instances.extend(outcome.instances)
            checkpoint.unchanged()
            result = attempt.result("ok", evaluations=tuple(evaluations))
            store.write(self.config.queue, token.result_name, result, instances, ops=self.ops)
        if not self.queue.complete(token):
            log.warning("ticket %s: the lease was lost; this result does not count", token.ticket[:12])
            return
        self.done += 1
        self._ended(token)
        self.progress.finished(result)
        self._release_pin(ticket)

    def _refile(self, attempt: _Attempt) -> None:
        """The suite is defined otherwise here than when the ticket was made: file it under our definition."""
        old, token = attempt.ticket, attempt.token
        if token.generation >= REFILES:
            raise ConfigError(
                f"suite {old.suite}: runners of this queue define it differently and file the ticket back and forth; "
                f"give them all the same {self.config.path.name}"
            )
        fresh = tickets.new(old.manifest, old.suite, attempt.suite.digest, attempt.suite.cadence.priority, old.pin)
        self._file(fresh)
        store.write(self.config.queue, token.result_name, attempt.result("refiled", refiled_as=fresh.id), (), ops=self.ops)
        if not self.queue.complete(token):
            return
        self._ended(token)
        log.info("ticket %s: suite %s has changed; filed again as %s", old.id[:12], old.suite, fresh.id[:12])
        if self.queue.ticket(fresh.id).pin != old.pin:
            self._release_pin(old)

    def _file(self, ticket: Ticket) -> None:
        """Enqueue a ticket; one that had been filed away under the definition before is opened again."""
        if self.queue.enqueue(ticket):
            return
        for token in (t for t in self.queue.tokens("done") if t.ticket == ticket.id):
            if store.read(self.config.queue / "results" / token.result_name).status == "refiled":
                self.queue.retry(token)

    def _failed(self, attempt: _Attempt, failure: Failure) -> None:
        """Record why, then give the ticket another try or end it."""
        token = attempt.token
        result = attempt.result("failed", failure=failure)
        with contextlib.suppress(OSError, AutoEvalError):     # a full disk must not keep the ticket from going back
            store.write(self.config.queue, token.result_name, result, (), ops=self.ops)
        if failure.kind == "transient":
            became = self._retry_later(token)
        else:
            became = "failed" if self.queue.fail(token) else "lost"
            self._ended(token, failed=became == "failed")
        self.progress.failed(result, became)

    def _retry_later(self, token: Token) -> str:
        """Give a ticket back after a failure that may pass; ``failed`` once it had its attempts."""
        self._not_before[token.ticket] = time.monotonic() + min(RETRY_S * 2**token.failures, RETRY_MAX_S)
        became = self.queue.release(token, failed=True, max_failures=self.config.runner.max_attempts)
        if became == "failed":
            self._ended(token, failed=True)
        return became

    def _ended(self, token: Token, *, failed: bool = False) -> None:
        self.failed += failed
        self.given_back.discard(token.ticket)

    # ------------------------------------------------------------------ pins

    def _release_pin(self, ticket: Ticket) -> None:
        if not ticket.pin:
            return
        try:
            pin.release(map_path(ticket.pin, self.config.path_map), self.ops)
        except (OSError, AutoEvalError) as error:
            log.warning("pin %s could not be freed: %s", ticket.pin, error)


@dataclass(frozen=True)
class _Attempt:
    """A ticket in hand: what every record of it has in common."""

    ticket: Ticket
    token: Token
    suite: Suite
    started_at: float

    def result(self, status: Literal["ok", "failed", "refiled"], **outcome: Any) -> Result:
        m, ours = self.ticket.manifest, self.suite.digest == self.ticket.suite_digest
        return Result(
            version=VERSION, ticket=self.ticket.id, generation=self.token.generation, runner=self.token.runner,
            status=status, suite=self.suite.name, suite_digest=self.ticket.suite_digest,
            suite_text=self.suite.text if ours else "",     # a definition that is not here cannot be told
            run=m.run, checkpoint=m.path, checkpoint_digest=m.digest, step=m.step, tokens=m.tokens,
            saved_at=m.saved_at, started_at=self.started_at, finished_at=time.time(), **outcome,
        )  # fmt: skip


def _model_name(ticket: Ticket) -> str:
    """Unique for the weights: no cache of any evaluator can take another checkpoint's answers for this one's."""
    m = ticket.manifest
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", Path(m.path).name).lstrip(".-")[:80]
    return f"{readable or 'checkpoint'}-{m.weights_digest[:16]}"


@contextlib.contextmanager
def stopped_by_signals(runner: Runner) -> Iterator[None]:
    """SIGTERM and SIGINT give the ticket back; a second one ends the program at once, children first."""

    def handle(number: int, frame: object) -> None:
        if runner.stopped.is_set():
            raise SystemExit(128 + number)
        log.warning("stopping: the ticket in hand is given back; signal again to end at once")
        runner.stopped.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

