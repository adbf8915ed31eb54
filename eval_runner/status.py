"""What a queue holds, ticket by ticket, for people and for scripts."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import STATES, Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import breaker
from eval_runner.results import store


@dataclass(frozen=True)
class TicketStatus:
    """One ticket. `why` says what its last failure, its quarantine or its cancelling was about, "" if there was none.
    """

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
    """`points_waiting` counts, by run, the scores that are not known to be in their W&B run yet, and `points_why` says
    why, once a runner has looked ("" before); `points_refused` counts what is no point and was put aside, beside the
    reason, in relay/RUN/refused. `results_waiting` and `results_why` say the same of the results that are not known to
    be in MLflow, trackio or TensorBoard yet, by their target's directory under sinks/. `stopped` has the suites that no
    runner takes tickets of, since they failed on one checkpoint after the other; `problems` says what could not be
    looked at."""

    queue: str
    counts: dict[str, int]
    tickets: list[TicketStatus]
    points_waiting: dict[str, int]
    points_why: dict[str, str]
    points_refused: dict[str, int]
    results_waiting: dict[str, int]
    results_why: dict[str, str]
    stopped: list[breaker.Open]
    problems: list[str] = field(default_factory=list)

    @property
    def points(self) -> Backlog:
        return Backlog(self.points_waiting, self.points_why, self.points_refused, [])

    @property
    def results(self) -> Backlog:
        return Backlog(self.results_waiting, self.results_why, {}, [])


@dataclass(frozen=True)
class Backlog:
    """What waits for all W&B runs, or for all other trackers: as the fields of `Status`."""

    waiting: dict[str, int]
    why: dict[str, str]
    refused: dict[str, int]
    problems: list[str]


def read(root: Path) -> Status:
    """The state of the queue at `root`. Raises OSError when there is none."""
    queue = Queue(str(root))
    tokens = list(queue.tokens())
    records = attempts(root)
    counts = Counter(t.state for t in tokens)
    at_wandb, elsewhere = points(root), results(root)
    return Status(
        queue=str(root),
        counts={state: counts.get(state, 0) for state in STATES},
        tickets=[_ticket(queue, t, records.get(t.ticket, [])) for t in tokens],
        points_waiting=at_wandb.waiting,
        points_why=at_wandb.why,
        points_refused=at_wandb.refused,
        results_waiting=elsewhere.waiting,
        results_why=elsewhere.why,
        stopped=breaker.read(root),
        problems=at_wandb.problems + elsewhere.problems,
    )


def is_run(run: RunIdentity, name: str) -> bool:
    """Whether a user who says `name` means this run: its name, its W&B id, our id, or its key under relay/."""
    return bool(name) and name in (run.name, run.wandb_id, run.id, run.key)


def _ticket(queue: Queue, token: Token, records: list[str]) -> TicketStatus:
    run, suite, step, why = "", "", None, ""
    try:
        ticket = queue.read(token)
        run, suite, step = ticket.manifest.run.name, ticket.suite, ticket.manifest.step
    except FileNotFoundError:
        pass        # it moved on
    except (TicketError, OSError) as error:
        why = str(error)
    return TicketStatus(
        ticket=token.ticket, state=token.state, run=run, suite=suite, step=step, generation=token.generation,
        failures=token.failures, runner=token.runner, why=why_of(queue, token, records) or why,
    )  # fmt: skip


def why_of(queue: Queue, token: Token, records: list[str]) -> str:
    """What a ticket's last failure, its quarantine or its cancelling was about; `records` as `attempts` finds them."""
    if token.state in ("quarantine", "cancelled"):
        return queue.reason(token)
    if token.state == "done":
        return store.unreadable(Path(queue.root), token)
    if not token.failures + (token.state == "failed"):
        return ""
    for name in sorted(records, key=generation, reverse=True):
        with contextlib.suppress(store.ResultError):
            failure = store.read(Path(queue.root) / "results" / name).failure
            return failure.message if failure else store.UNCOMMITTED
    return f"runner {token.runner or '?'} died while it held the ticket; it left no record"


_ATTEMPT = re.compile(r"[0-9a-f]{64}~g[0-9]{1,9}~[A-Za-z0-9._-]{1,100}")


def generation(name: str) -> int:
    """The generation of an attempt, by the name of its record."""
    return int(name.split("~")[1][1:])


def attempts(root: Path) -> dict[str, list[str]]:
    """Ticket → the names of its records under results/."""
    found: dict[str, list[str]] = {}
    for name in filter(_ATTEMPT.fullmatch, os.listdir(root / "results")):
        found.setdefault(name.split("~")[0], []).append(name)
    return found


def points(root: Path) -> Backlog:
    """The points of all W&B runs. A directory that cannot be listed is named, and hides no other."""
    return _backlog(root, "relay", ("points", "taken"))


def results(root: Path) -> Backlog:
    """The results that wait for the other trackers, by their directory under sinks/ (see sinks/spool). A directory
    that cannot be listed is named, and hides no other."""
    return _backlog(root, "sinks", ("waiting",))


def _backlog(root: Path, under: str, stages: tuple[str, ...]) -> Backlog:
    found = Backlog({}, {}, {}, [])
    try:
        names = files.waiting(str(root), under)
    except OSError as error:
        names = []
        found.problems.append(_unlisted(root / under, error))
    for directory in (root / under / name for name in names):
        name = directory.name
        try:
            waiting = sum(len(files.waiting(str(directory), stage)) for stage in stages)
            refused = sum(file.endswith(".reason") for file in files.waiting(str(directory), "refused"))
        except OSError as error:
            if not isinstance(error, NotADirectoryError) or directory.is_dir():     # else a file of somebody's
                found.problems.append(_unlisted(directory, error))
            continue
        if waiting:
            found.waiting[name], found.why[name] = waiting, _why(directory)
        if refused:
            found.refused[name] = refused
    return found


def _unlisted(directory: Path, error: OSError) -> str:
    return f"{error.filename or directory}: cannot be listed ({error.strerror}); what waits there is not counted here"


def _why(directory: Path) -> str:
    with contextlib.suppress(OSError):
        return FileOps().read(str(directory / "why"), 10_000).decode(errors="replace")
    return ""
