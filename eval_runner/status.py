"""What a queue holds, ticket by ticket, for people and for scripts."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import TicketError
from autoeval_hooks.queue import STATES, Queue, Token
from eval_runner.results import store


@dataclass(frozen=True)
class TicketStatus:
    """One ticket. `why` says what its last failure or its quarantine was about, "" if there was none."""

    ticket: str
    state: str
    run: str
    suite: str
    step: int | None
    generation: int
    failures: int
    runner: str
    why: str


@dataclass(frozen=True)
class Status:
    """`points_waiting` counts, by run, the scores that have not reached their W&B run yet."""

    queue: str
    counts: dict[str, int]
    tickets: list[TicketStatus]
    points_waiting: dict[str, int]


def read(root: Path) -> Status:
    """The state of the queue at `root`. Raises OSError when there is none."""
    queue = Queue(str(root))
    tokens = list(queue.tokens())
    attempts = _attempts(root)
    counts = Counter(t.state for t in tokens)
    return Status(
        queue=str(root),
        counts={state: counts.get(state, 0) for state in STATES},
        tickets=[_ticket(queue, t, attempts.get(t.ticket, [])) for t in tokens],
        points_waiting=_points_waiting(root),
    )


def _ticket(queue: Queue, token: Token, attempts: list[str]) -> TicketStatus:
    run, suite, step = "", "", None
    with contextlib.suppress(TicketError, OSError):
        ticket = queue.read(token)
        run, suite, step = ticket.manifest.run.name, ticket.suite, ticket.manifest.step
    return TicketStatus(
        ticket=token.ticket, state=token.state, run=run, suite=suite, step=step, generation=token.generation,
        failures=token.failures, runner=token.runner, why=_why(queue, token, attempts),
    )  # fmt: skip


def _why(queue: Queue, token: Token, attempts: list[str]) -> str:
    if token.state == "quarantine":
        return queue.reason(token)
    if token.state == "done" or not token.failures + (token.state == "failed"):
        return ""
    for name in sorted(attempts, key=lambda n: int(n.split("~")[1][1:]), reverse=True):
        with contextlib.suppress(store.ResultError):
            failure = store.read(Path(queue.root) / "results" / name).failure
            return failure.message if failure else ""
    return f"runner {token.runner or '?'} died while it held the ticket; it left no record"


def _attempts(root: Path) -> dict[str, list[str]]:
    """Ticket → the names of its records under results/."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(root / "results"):
        found.setdefault(name.split("~")[0], []).append(name)
    return found


def _points_waiting(root: Path) -> dict[str, int]:
    counts = {}
    for run in sorted((root / "relay").glob("*/points")):
        if waiting := len(list(run.glob("*.json"))):
            counts[run.parent.name] = waiting
    return counts
