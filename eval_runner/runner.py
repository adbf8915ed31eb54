"""The runner: claim → verify → evaluate → record → commit → publish, one ticket at a time.

Read it from `Runner.run` downwards: a ticket's path is in order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autoeval_hooks import fsio, pin
from autoeval_hooks import ticket as tickets
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import Keeper, boottime
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.retention import ENDED, needless
from autoeval_hooks.ticket import Ticket
from eval_runner import attempt as attempts
from eval_runner import breaker, parts, scratch
from eval_runner.attempt import Attempt
from eval_runner.breaker import Breakers
from eval_runner.config.models import Config
from eval_runner.evaluators.base import Evaluator
from eval_runner.lease import Lease
from eval_runner.process import Stopped
from eval_runner.progress import Progress
from eval_runner.publisher import Publisher
from eval_runner.results import store
from eval_runner.results.schema import Failure
from eval_runner.servers.base import Server
from eval_runner.sinks.base import Sink
from eval_runner.stop import Stop

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
    stopped: Stop = field(default_factory=Stop)
    """Set it to have the ticket in hand given back and `run` return."""
    server: Server | None = None
    """What checkpoints that evaluators cannot load themselves are served with, checked."""
    ops: FileOps = field(default_factory=FileOps)
    """Every call into the file system that moves a ticket or records what became of it."""
    done: int = 0
    """Tickets that this runner evaluated."""
    failed: int = 0
    """Tickets that ended here without a result, those in quarantine included."""
    given_back: set[str] = field(default_factory=set)
    """Tickets that this runner took; once `run` has returned from ``once`` or ``drain``, those that nobody ended."""

    def __post_init__(self) -> None:
        section = self.config.runner
        self.queue = Queue(str(self.config.queue), runner=self.name, ops=self.ops)
        self.queue.create()
        for folder in ("logs", breaker.FOLDER, parts.FOLDER):
            (self.config.queue / folder).mkdir(exist_ok=True)
        self.breakers = Breakers(self.config.queue, section.breaker, self.ops)
        self._keeper = Keeper(self.queue, lease=section.lease, max_failures=section.max_attempts)
        self._swept_at = float("-inf")
        self._not_before: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    # ------------------------------------------------------------------ the loop

    def run(self, mode: Mode) -> bool:
        """Evaluate: ``forever``, ``once`` (one ticket at most), or ``drain`` (until no ticket is left to take).

        True when what was finished could be shown everywhere; False when points still wait for their run.
        """
        with contextlib.suppress(OSError):
            scratch.sweep()
        lease = Lease(self.queue, self.config.runner.lease, lambda: self.progress.now)
        with lease, Publisher(self.queue, self.sinks) as publisher:
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
            with contextlib.suppress(OSError):
                self._let_go()
            if mode == "forever":
                return True
            self.progress.settling()
            settled = publisher.settle(SETTLE_S, self.stopped)
            self.stopped.set()      # a sink that is still at work ends soon
            self.given_back &= {token.ticket for token in self.queue.tokens("pending", "claimed")}
            return settled

    def _housekeeping(self) -> None:
        """Now and then, with no ticket in hand: free what others hold and died with, and what we hold unknowingly."""
        now = time.monotonic()
        if now - self._swept_at < self.config.runner.lease / 3:
            return
        self._swept_at = now
        for token, became in self._keeper.sweep():
            log.warning("ticket %s: runner %s is gone; the ticket is %s", token.ticket[:12], token.runner, became)
        self._let_go()

    def _let_go(self) -> None:
        """Give back what we hold and do not work at: a file server told us nothing of a claim, or failed a release."""
        for token in self.queue.tokens("claimed"):
            if token.runner == self.name:
                self.queue.release(token, failed=False)

    def _claim(self, lease: Lease) -> Token | None:
        if not lease.held_since(boottime()):
            return None     # the shared file system does not answer: take nothing that we could not hold
        self.breakers.look()
        now = time.monotonic()
        return self.queue.claim(
            newest_first=self.config.runner.order == "newest",
            wanted=lambda token: self._not_before.get(token.ticket, now) <= now and not self._stops(token),
        )

    def _stops(self, token: Token) -> bool:
        """Whether the ticket is of a suite that is stopped; found out without claiming it."""
        return self.breakers.any_open() and self.breakers.stops(self._digest(token))

    def _digest(self, token: Token) -> str:
        """The digest of the ticket's suite, as long as it is defined so here. Else it is filed again, or left: ""."""
        if token.ticket not in self._digests:
            try:
                ticket = self.queue.ticket(token.ticket)
            except (TicketError, OSError):
                return ""       # for whoever claims it to deal with
            suite = self.config.suites.get(ticket.suite)
            ours = suite is not None and suite.digest == ticket.suite_digest
            self._digests[token.ticket] = ticket.suite_digest if ours else ""
        return self._digests[token.ticket]

    def _nothing_left(self) -> bool:
        """Whether no ticket is pending that this runner may take, nor may become so by a runner that died, nor is held
        by us without our knowledge."""
        pending = any(
            self._not_before.get(t.ticket) != NEVER and not self._stops(t) for t in self.queue.tokens("pending")
        )
        ours = any(t.runner == self.name for t in self.queue.tokens("claimed"))
        return not pending and not ours and not self._keeper.unsure()

    def held_back(self) -> list[breaker.Open]:
        """The suites that are stopped and have tickets waiting for this runner."""
        stopped = breaker.read(self.config.queue, self.ops)
        waiting = {self._digest(t) for t in self.queue.tokens("pending")} if stopped else set()
        return [one for one in stopped if one.suite_digest in waiting]

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
            self.failed += 1
            return False
        except FileNotFoundError:
            return False        # reaped in the meantime; if it is ours all the same, housekeeping gives it back
        except OSError as error:
            log.error("ticket %s cannot be read: %s", token.ticket[:12], error)
            self.failed += self._retry_later(token) == "failed"
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
        attempt = Attempt(ticket, token, suite)
        if not attempt.ours:
            self._attempt(attempt, lambda: self._refile(attempt))
            return False
        self.breakers.trying(suite.digest)
        with lease.watching(token, claimed_at) as held:
            self._attempt(attempt, lambda: self._evaluate(attempt, lambda: self.stopped.is_set() or not held()))
        return True

    def _attempt(self, attempt: Attempt, work: Callable[[], None]) -> None:
        """Do the work; whatever goes wrong, record why and never leave the ticket claimed."""
        token = attempt.token
        try:
            work()
        except Stopped as error:
            if self.queue.release(token, failed=False) == "lost":
                self._lost(token)
            else:
                log.warning("ticket %s: given back unfinished: %s", token.ticket[:12], error)
        except AutoEvalError as error:
            self._failed(attempt, Failure(error.kind, str(error)))
        except Exception as error:
            log.debug("unexpected", exc_info=True)
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._failed(
                attempt,
                Failure("transient", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"),
            )

    def _evaluate(self, attempt: Attempt, stopping: Callable[[], bool]) -> None:
        """Evaluate, record, and commit."""
        ticket, token, root = attempt.ticket, attempt.token, self.config.queue
        result, instances, details = attempts.evaluate(
            attempt, self.evaluators[attempt.suite.name], self.server, self.config, stopping, self.progress, self.ops
        )
        store.write(root, token.result_name, result, instances, details=details, ops=self.ops)
        try:
            committed = self.queue.complete(token)
        except OSError:     # it may have been done; a second time it is the same, and saves the evaluation
            committed = self.queue.complete(token)
        if not committed:
            self._lost(token)
            return
        self.done += 1
        self.progress.finished(result)
        self.breakers.succeeded(attempt.suite.digest)
        try:
            parts.remove(root, ticket.id, self.ops)
        except OSError as error:
            log.warning("parts of ticket %s could not be removed: %s", ticket.id[:12], error)
        self._release_pin(ticket)

    def _refile(self, attempt: Attempt) -> None:
        """The suite is defined otherwise here than when the ticket was made: file it under our definition."""
        old, token = attempt.ticket, attempt.token
        if token.generation >= REFILES and self._refiled(old) >= REFILES:
            raise ConfigError(
                f"suite {old.suite}: runners of this queue define it differently and file the ticket back and forth; "
                f"give them all the same {self.config.path.name}"
            )
        fresh = tickets.new(old.manifest, old.suite, attempt.suite.digest, attempt.suite.cadence.priority, old.pin)
        if not self._file(fresh):
            log.info("ticket %s: its suite has changed; filed again once %s is given back", old.id[:12], fresh.id[:12])
            self._not_before[old.id] = time.monotonic() + RETRY_S
            self.queue.release(token, failed=False)
            return
        record = attempt.result("refiled", refiled_as=fresh.id)
        store.write(self.config.queue, token.result_name, record, (), ops=self.ops)
        if not self.queue.complete(token):
            return
        log.info("ticket %s: suite %s has changed; filed again as %s", old.id[:12], old.suite, fresh.id[:12])
        if self.queue.ticket(fresh.id).pin != old.pin:
            self._release_pin(old)

    def _refiled(self, ticket: Ticket) -> int:
        """How often it was filed under another definition. Its generation says no more than that it is no less."""
        results = self.config.queue / "results"
        found = 0
        for name in self.ops.listdir(str(results)):
            if name.startswith(ticket.id):
                with contextlib.suppress(store.ResultError):
                    found += store.read(results / name, self.ops).status == "refiled"
        return found

    def _file(self, ticket: Ticket) -> bool:
        """Enqueue a ticket; one that had been filed away under the definition before is opened again. False while a
        runner holds it: one that files it back at this moment would end it, and we the other."""
        if self.queue.enqueue(ticket):
            return True
        if any(t.ticket == ticket.id for t in self.queue.tokens("claimed")):
            return False
        for token in (t for t in self.queue.tokens("done") if t.ticket == ticket.id):
            if store.read(self.config.queue / "results" / token.result_name).status == "refiled":
                self._share_pin(ticket.pin, self.queue.ticket(ticket.id).pin)
                self.queue.retry(token)
        return True

    def _failed(self, attempt: Attempt, failure: Failure) -> None:
        """Record why, then give the ticket another try or end it."""
        token = attempt.token
        result = attempt.result("failed", failure=failure)
        with contextlib.suppress(OSError, AutoEvalError):     # a full disk must not keep the ticket from going back
            store.write(self.config.queue, token.result_name, result, (), ops=self.ops)
        m = attempt.ticket.manifest
        if attempt.ours and self.breakers.failed(attempt.suite.name, attempt.suite.digest, m.digest, failure):
            became = self.queue.release(token, failed=False)    # the suite is to blame: the ticket waits for it
        elif failure.kind == "transient":
            became = self._retry_later(token)
        else:
            became = "failed" if self.queue.fail(token) else "lost"
        self.failed += became == "failed"
        self.progress.failed(result, "no longer ours" if became == "lost" else became)

    def _retry_later(self, token: Token) -> str:
        """Give a ticket back after a failure that may pass; ``failed`` once it had its attempts."""
        self._not_before[token.ticket] = time.monotonic() + min(RETRY_S * 2**token.failures, RETRY_MAX_S)
        became = self.queue.release(token, failed=True, max_failures=self.config.runner.max_attempts)
        if became == "failed":
            del self._not_before[token.ticket]      # whoever retries it has mended something
        return became

    def _lost(self, token: Token) -> None:
        """Say where a ticket went that was taken from us; what we found does not count."""
        for t in self.queue.tokens("cancelled"):
            if t.ticket == token.ticket:
                log.warning("ticket %s: cancelled: %s", t.ticket[:12], self.queue.reason(t) or "no reason was left")
                return
        log.warning("ticket %s: another runner took it over; what this one found does not count", token.ticket[:12])

    # ------------------------------------------------------------------ pins

    def _share_pin(self, source: str, target: str) -> None:
        """The pin `target` of a ticket that is opened again was freed when it ended: make it anew from `source`."""
        source, target = (map_path(path, self.config.path_map) for path in (source, target))
        if not target or os.path.isdir(target) or not os.path.isdir(source):
            return
        try:
            made = pin.make(source, os.path.dirname(target), "auto", self.ops)
            pin.adopt(made, os.path.basename(target), self.ops)
        except (OSError, AutoEvalError) as error:
            log.warning("pin %s could not be made again: %s", target, error)

    def _release_pin(self, ticket: Ticket) -> None:
        """Free the pin of a ticket that is done, unless another lives on it; `gc` frees that one later."""
        if not ticket.pin:
            return
        try:
            name = os.path.basename(ticket.pin)
            if name in needless(self.queue, [name], *ENDED):
                pin.release(map_path(ticket.pin, self.config.path_map), self.ops)
        except (OSError, AutoEvalError) as error:
            log.warning("pin %s could not be freed: %s", ticket.pin, error)


@contextlib.contextmanager
def stopped_by_signals(runner: Runner) -> Iterator[None]:
    """SIGTERM and SIGINT give the ticket back; a second one ends the program at once, children first."""

    def handle(number: int, frame: object) -> None:
        if runner.stopped.is_set():
            raise SystemExit(128 + number)
        runner.stopped.set()        # first: the message may fail, where the signal interrupts another
        log.warning("stopping: the ticket in hand is given back; signal again to end at once")

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

