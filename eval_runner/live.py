"""The queue as it is now, looked at again and again: what runs, what waits, what went wrong.

What cannot change is read once. Ages are differences between the clocks of the training host, of the runner, and of
whoever looks: they are for people to read, and nothing is decided by them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import TicketError
from autoeval_hooks.queue import STATES, Queue, Token
from eval_runner import breaker, running
from eval_runner import status as statuses
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.status import Backlog

TROUBLES = 10
"""How many of the tickets that went wrong are told of, the newest."""


@dataclass(frozen=True)
class Ticket:
    """What of a ticket never changes; `saved_at` in seconds since the epoch."""

    run: str
    suite: str
    step: int
    saved_at: float


@dataclass(frozen=True)
class Working:
    """A claimed ticket. `ticket` None: it cannot be read. `note` None: its runner does not say what it is at."""

    runner: str
    ticket: Ticket | None
    note: running.Note | None


@dataclass(frozen=True)
class Waiting:
    """A suite's pending tickets; `longest` is how long ago the oldest checkpoint was saved, in seconds. `suite` "?" and
    `longest` None: these tickets cannot be read."""

    suite: str
    tickets: int
    longest: float | None


@dataclass(frozen=True)
class Finished:
    """The last evaluation that was committed. `lag` is from save to scores, in seconds; None where it is not known."""

    run: str
    suite: str
    step: int
    lag: float | None


@dataclass(frozen=True)
class Trouble:
    """A ticket that failed, or was refused, or failed and is tried again (`state` tells)."""

    state: str
    ticket: Ticket | None
    failures: int
    why: str


@dataclass(frozen=True)
class View:
    """One look. `more` counts the troubles that are not in `troubles`."""

    queue: str
    counts: dict[str, int]
    working: list[Working]
    waiting: list[Waiting]
    last: Finished | None
    troubles: list[Trouble]
    more: int
    stopped: list[breaker.Open]
    points: Backlog
    results: Backlog


class Watcher:
    """Looks at the queue at `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._queue = Queue(str(root), runner="reader")
        self._tickets: dict[str, Ticket] = {}
        self._why: dict[Token, str] = {}
        self._written: dict[str, float] = {}
        self._scores: dict[str, Finished | None] = {}

    def look(self) -> View:
        """Raises OSError when the queue does not answer."""
        tokens = list(self._queue.tokens())
        counts = Counter(t.state for t in tokens)
        wrong = [
            t for t in tokens
            if t.state in ("failed", "quarantine") or (t.failures and t.state in ("pending", "claimed"))
        ]  # fmt: skip
        return View(
            queue=str(self._root),
            counts={state: counts.get(state, 0) for state in STATES},
            working=[self._working(t) for t in tokens if t.state == "claimed"],
            waiting=self._waiting([t for t in tokens if t.state == "pending"]),
            last=self._finished([t for t in tokens if t.state == "done"]),
            troubles=self._troubles(sorted(wrong, key=lambda t: t.sort[2:], reverse=True)[:TROUBLES]),
            more=max(0, len(wrong) - TROUBLES),
            stopped=breaker.read(self._root),
            points=statuses.points(self._root),
            results=statuses.results(self._root),
        )

    def _read(self, token: Token) -> Ticket:
        """Raises TicketError, and OSError: FileNotFoundError once it moved on."""
        if token.ticket not in self._tickets:
            found = self._queue.read(token)
            m = found.manifest
            self._tickets[token.ticket] = Ticket(m.run.name or m.run.id, found.suite, m.step, m.saved_at)
        return self._tickets[token.ticket]

    def _ticket(self, token: Token) -> Ticket | None:
        try:
            return self._read(token)
        except (TicketError, OSError):      # it moved on, or is refused by whoever claims it
            return None

    def _working(self, token: Token) -> Working:
        note = running.load(self._queue.note(token.runner), token.ticket)
        return Working(token.runner, self._ticket(token), note)

    def _waiting(self, tokens: list[Token]) -> list[Waiting]:
        found: list[Ticket] = []
        unreadable = 0
        for token in tokens:
            try:
                found.append(self._read(token))
            except FileNotFoundError:       # it moved on
                continue
            except (TicketError, OSError):
                unreadable += 1
        count = Counter(ticket.suite for ticket in found)
        oldest = {suite: min(t.saved_at for t in found if t.suite == suite) for suite in count}
        rows = [Waiting(suite, n, max(0.0, time.time() - oldest[suite])) for suite, n in sorted(count.items())]
        return [*rows, Waiting("?", unreadable, None)] if unreadable else rows

    def _finished(self, tokens: list[Token]) -> Finished | None:
        """The last that has scores, by the time at which the results were written, as the file server has it."""
        for name in {t.result_name for t in tokens} - self._written.keys():
            with contextlib.suppress(OSError):
                self._written[name] = os.stat(self._root / "results" / name).st_mtime
        there = [t.result_name for t in tokens if t.result_name in self._written]
        for name in sorted(there, key=lambda n: self._written[n], reverse=True):
            with contextlib.suppress(store.ResultError):
                if name not in self._scores:
                    self._scores[name] = _scored(store.read(self._root / "results" / name))
                if last := self._scores[name]:
                    return last
        return None

    def _troubles(self, tokens: list[Token]) -> list[Trouble]:
        fresh = [t for t in tokens if t not in self._why]
        records = statuses.attempts(self._root) if fresh else {}
        for token in fresh:
            self._why[token] = statuses.why_of(self._queue, token, records.get(token.ticket, []))
        return [Trouble(t.state, self._ticket(t), t.failures, self._why[t]) for t in tokens]


def _scored(r: Result) -> Finished | None:
    """None for a ticket that was filed again under another suite."""
    return Finished(r.run.name or r.run.id, r.suite, r.step, r.lag_s if r.timed else None) if r.status == "ok" else None
