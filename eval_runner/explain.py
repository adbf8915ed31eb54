"""What became of one step, from save to point, or why it has no score: the story that `autoeval-runner explain` tells.

Everything is read from what the queue holds and the configuration says; nothing is changed. A time is by the clock of
the host that wrote it, which stands beside it: no order is made of the times, and where they contradict the order in
which things must have happened, that is said.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.config import map_path
from autoeval_hooks.errors import AutoEvalError, ConfigError, TicketError
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.strict import near
from autoeval_hooks.ticket import Ticket
from eval_runner import breaker, missing, registry, status
from eval_runner.config.models import Config
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.sinks import wandb_cases
from eval_runner.sinks.base import named, point
from eval_runner.sinks.trackers import TrackerSink
from eval_runner.sinks.wandb import WandbSink

WATCH_S = 2.5 * 2.0
"""How long a training process is watched that may log a waiting point: it shows itself every two seconds."""
NO_WANDB = "evaluated; no W&B run shows it, since training has none"
SKEW_S = 1.0
"""By so much two clocks may contradict each other before it is worth saying."""


@dataclass(frozen=True)
class Event:
    """`at` is in seconds since the epoch by the clock of the host or runner `by`; None where no time was written."""

    what: str
    at: float | None = None
    by: str = ""


@dataclass(frozen=True)
class Story:
    """One step in one suite. `ticket` and `state` are "" where there is none; `outcome` is one sentence: where the
    score stands, or why there is none and what to do."""

    run: str
    suite: str
    step: int
    ticket: str
    state: str
    outcome: str
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class _Found:
    """The queue as it was read: every ticket with its token, and the names of all records."""

    config: Config
    queue: Queue
    tickets: tuple[tuple[Token, Ticket], ...]
    attempts: dict[str, list[str]]
    unreadable: int


def explain(config: Config, step: int, *, run: str | None = None, suite: str | None = None) -> list[Story]:
    """The stories of this step, one for each run and suite. Raises ConfigError for a run or suite that nobody knows."""
    found = _read(config)
    runs = {ticket.manifest.run for _, ticket in found.tickets}
    if run is not None and not any(status.is_run(r, run) for r in runs):
        known = {name for r in runs for name in (r.name, r.wandb_id, r.id) if name}
        raise ConfigError(f"{config.queue}: no ticket is of a run called {run!r}{near(run, known)}")
    suites = set(config.suites) | {ticket.suite for _, ticket in found.tickets}
    if suite is not None and suite not in suites:
        raise ConfigError(f"{config.path}: no suite is called {suite!r}{near(suite, suites)}")
    mine = [
        (token, ticket) for token, ticket in found.tickets
        if suite in (None, ticket.suite) and (run is None or status.is_run(ticket.manifest.run, run))
    ]  # fmt: skip
    stories = [_told(found, token, ticket) for token, ticket in mine if ticket.manifest.step == step]
    there = {story.suite for story in stories}
    every = [ticket for _, ticket in found.tickets if run is None or status.is_run(ticket.manifest.run, run)]
    untold = [
        _untold(found, every, step, name) for name, s in config.suites.items()
        if suite in (None, name) and name not in there and (s.cadence.due(step) or not stories)
    ]  # fmt: skip
    return stories + untold


def _read(config: Config) -> _Found:
    queue = Queue(str(config.queue), runner="explain")
    tickets, unreadable = [], 0
    for token in queue.tokens():
        try:
            tickets.append((token, queue.read(token)))
        except FileNotFoundError:
            continue        # it moved on this moment, and is seen where it went if that is listed later
        except (TicketError, OSError):
            unreadable += 1
    return _Found(config, queue, tuple(tickets), status.attempts(config.queue), unreadable)


# ---------------------------------------------------------------------- a step with a ticket


def _told(found: _Found, token: Token, ticket: Ticket) -> Story:
    m = ticket.manifest
    records = list(_records(found, token))
    events = [
        Event(f"saved as {m.path} ({_size(sum(f.size for f in m.files))} of model files)", m.saved_at, m.host),
        Event(_pinned(found, ticket)),
        Event(f"ticket queued for suite {ticket.suite}", _stamp(token), m.host),
        *_refiled_from(found, ticket),
        *_attempts(found, token, records),
    ]
    counted = next((r for name, r in records if r is not None and name == token.result_name), None)
    outcome, more = _outcome(found, token, ticket, counted)
    events += more
    if clock := _contradiction(m.host, m.saved_at, [r for _, r in records if r is not None]):
        events.append(Event(clock))
    return Story(m.run.name or m.run.id, ticket.suite, m.step, ticket.id, token.state, outcome, tuple(events))


def _stamp(token: Token) -> float | None:
    """When the ticket was made, by its submitter's clock; None for one that the janitor brought back."""
    made = int(token.sort.partition("-")[2]) / 1e6
    return made or None


def _pinned(found: _Found, ticket: Ticket) -> str:
    if not ticket.pin:
        return "not pinned: it lives only as long as training keeps it"
    path = map_path(ticket.pin, found.config.path_map)
    try:
        sizes = [os.stat(os.path.join(path, name)) for name in os.listdir(path)]
    except FileNotFoundError:
        return f"pinned in {path}, which was freed since"
    except OSError as error:
        return f"pinned in {path}, which cannot be looked at from here ({error.strerror})"
    shared = "links" if any(s.st_nlink > 1 for s in sizes) else "copies or clones"
    return f"pinned in {path}, still there: {len(sizes)} {shared}, {_size(sum(s.st_size for s in sizes))}"


def _refiled_from(found: _Found, ticket: Ticket) -> Iterator[Event]:
    """The tickets of the same checkpoint that were filed again as this one."""
    for token, other in found.tickets:
        if token.state != "done" or other.manifest.digest != ticket.manifest.digest or other.id == ticket.id:
            continue
        with contextlib.suppress(store.ResultError):
            record = store.read(found.config.queue / "results" / token.result_name)
            if record.refiled_as == ticket.id:
                yield Event(f"filed again from ticket {other.id[:12]}, since the suite's definition had changed",
                            record.finished_at, record.runner)  # fmt: skip


def _records(found: _Found, token: Token) -> Iterator[tuple[str, Result | None]]:
    """The records of a ticket by generation; None for one that cannot be read."""
    for name in sorted(found.attempts.get(token.ticket, []), key=status.generation):
        try:
            yield name, store.read(found.config.queue / "results" / name)
        except store.ResultError:
            yield name, None


def _attempts(found: _Found, token: Token, records: list[tuple[str, Result | None]]) -> Iterator[Event]:
    by_generation: dict[int, list[tuple[str, Result | None]]] = {}
    for name, record in records:
        by_generation.setdefault(status.generation(name), []).append((name, record))
    open_ = token.state in ("pending", "claimed", "cancelled")
    for generation in range(token.generation + (not open_)):
        for name, record in by_generation.get(generation, [("", None)]):
            yield _attempt(found, token, generation, name, record)
    for name, record in by_generation.get(token.generation, []) if open_ else ():
        yield _attempt(found, token, token.generation, name, record)


def _attempt(found: _Found, token: Token, generation: int, name: str, record: Result | None) -> Event:
    title = f"attempt {generation + 1}"
    if not name:
        return Event(f"{title}: left no record: its runner was stopped, died or lost its lease, or a retry came first")
    runner = name.split("~")[2]
    if record is None:
        return Event(f"{title}: its record results/{name} cannot be read", by=runner)
    took = f"started {_clock(record.started_at)}, took {record.eval_s:.0f} s"
    logs = sorted(str(p) for p in (found.config.queue / "logs").glob(f"{name}.*"))
    log = f"; log: {', '.join(logs)}" if logs else ""
    lost = token.state == "done" and name != token.result_name
    if record.status == "failed":
        failure = record.failure
        said = f"failed ({failure.kind}): {failure.message}" if failure else "failed"
        return Event(f"{title}: {said}; {took}{log}", record.finished_at, runner)
    if record.status == "refiled":
        as_ = f"filed again as ticket {record.refiled_as[:12]}, since this runner defines the suite otherwise"
        return Event(f"{title}: {as_}", record.finished_at, runner)
    scores = ", ".join(f"{s.benchmark} {s.metric} {s.value:.4g}" for s in record.scores[:6])
    more = f" and {len(record.scores) - 6} more" if len(record.scores) > 6 else ""
    if lost:
        said = f"{title}: evaluated, but its lease was lost, so that it does not count; {took}"
        return Event(said, record.finished_at, runner)
    return Event(f"{title}: evaluated: {scores}{more}; {took}; {record.lag_s:.0f} s after the save{log}",
                 record.finished_at, runner)  # fmt: skip


def _contradiction(host: str, saved_at: float, records: Iterable[Result]) -> str:
    off = max((saved_at - r.started_at for r in records), default=0.0)
    if off <= SKEW_S:
        return ""
    return (
        f"the clocks contradict each other: an evaluation began {off:.0f} s before the save by {host}'s clock; the "
        "order here is that of what caused what, and lags are wrong by as much"
    )


# ---------------------------------------------------------------------- where it stands


def _outcome(
    found: _Found, token: Token, ticket: Ticket, counted: Result | None
) -> tuple[str, list[Event]]:
    """The story's last sentence, and what happened after the attempts."""
    short, reason = token.ticket[:12], found.queue.reason(token)
    if token.state == "quarantine":
        return f"refused: {reason or 'no reason was left'}; mend it and `autoeval-runner retry {short}`", []
    if token.state == "cancelled":
        return f"cancelled: {reason or 'no reason was left'}; `autoeval-runner retry {short}` brings it back", []
    if token.state == "failed":
        why = counted.failure.message if counted and counted.failure else f"runner {token.runner} left no record"
        return f"failed: {why}; mend it and `autoeval-runner retry {short}`", []
    if token.state == "claimed":
        return f"is being evaluated by runner {token.runner}, if that lives (`autoeval-runner doctor`)", []
    if token.state == "pending":
        return _waits(found, token, ticket), []
    if counted is None:
        return f"done, but its record results/{token.result_name} cannot be read; `autoeval-runner retry {short}`", []
    if counted.status == "refiled":
        return f"filed again as ticket {counted.refiled_as[:12]}: see there", []
    return _shown(found, token, counted)


def _waits(found: _Found, token: Token, ticket: Ticket) -> str:
    stopped = [o for o in breaker.read(found.config.queue) if o.suite_digest == ticket.suite_digest]
    if stopped:
        return f"waits: {breaker.said(stopped[0])}"
    if ticket.suite not in found.config.suites:
        return f"waits: {found.config.path} defines no suite {ticket.suite}; start a runner whose configuration does"
    ahead = sum(1 for t, _ in found.tickets if t.state == "pending" and t.sort[:1] < token.sort[:1])
    before = f"; {ahead} of higher priority go first" if ahead else ""
    again = f"; it failed {token.failures} time(s) and is tried again" if token.failures else ""
    held = sum(1 for t, _ in found.tickets if t.state == "claimed")
    other = found.config.suites[ticket.suite].digest != ticket.suite_digest
    refiled = "; it is filed again under the definition here then, which has changed since" if other else ""
    return f"waits for a runner ({held} ticket(s) are being evaluated){before}{again}{refiled}"


def _shown(found: _Found, token: Token, result: Result) -> tuple[str, list[Event]]:
    """Where a result's score stands with each sink."""
    if not found.config.sinks:
        return "evaluated; no sink is configured, `autoeval-runner report` shows it", []
    try:
        sinks = named((entry["type"] for entry in found.config.sinks), registry.build_sinks(found.config))
    except ConfigError as error:
        return f"evaluated; what the sinks have cannot be told from here: {error}", []
    events, head, others = [], "evaluated", []
    for name, sink in sinks.items():
        mark = found.config.queue / "published" / name / token.result_name
        says = ""
        try:
            events.append(Event(f"given to sink {name}", mark.stat().st_mtime, "the file server"))
            says = sink.stands(f"{token.ticket}~g{token.generation}") if isinstance(sink, TrackerSink) else ""
        except OSError:
            events.append(Event(f"not given to sink {name} yet: the runner does so, if it lives"))
            says = f"it is not given to sink {name} yet"
        if isinstance(sink, WandbSink):
            head = _in_wandb(found, result)
        elif says:
            others.append(says)
    if head == NO_WANDB and not others:
        others = ["`autoeval-runner report` shows it"]
    return "; ".join([head, *others]), events


def _in_wandb(found: _Found, result: Result) -> str:
    """Where the point stands that the W&B sink made of a result."""
    if not result.run.wandb_id:
        return NO_WANDB
    where, why = _point(found, result)
    return {
        "logged": f"shown: {_title(result)} in W&B run {result.run.wandb_id}",
        "": "evaluated; its point is not made yet: a runner with a wandb sink does so",
        "refused": f"evaluated, but its point was refused: {why}",
        "taken": f"evaluated; its point is being logged, or was when who did so died: {why}",
        "points": f"evaluated; its point waits: {why}",
    }[where]


def _title(result: Result) -> str:
    names = [name for name in point(result).metrics if name.startswith(f"bench/{result.suite}/")]
    return f"{min(names, key=len)} at bench/step {result.step}" if names else f"bench/step {result.step}"


def _point(found: _Found, result: Result) -> tuple[str, str]:
    """The directory of relay/<run>/ that the point stands in, "" if in none; and why, if it waits there."""
    directory = found.config.queue / "relay" / result.run.key
    for stage in ("logged", "taken", "points", "refused"):      # what is logged twice, was logged
        try:
            heads = (result.ticket, result.ticket[:60])     # a refused one's name is cut (relay_files.set_aside)
            names = [n for n in os.listdir(directory / stage) if n.replace(".", "~").partition("~")[0] in heads]
        except OSError:
            continue
        if names and stage == "refused":
            return stage, _text(directory / stage / f"{min(names, key=len)}.reason") or "no reason was left"
        if names:
            return stage, "" if stage == "logged" else _why(found, directory)
    return "", ""


def _why(found: _Found, directory: Path) -> str:
    """Why points of a run wait: what the runner that looked last left, else what can be seen now."""
    if said := _text(directory / "why"):
        return said
    late = next((str(e.get("late", "wait")) for e in found.config.sinks if e["type"] == "wandb"), "wait")
    watch = wandb_cases.Watch()
    try:
        seen = watch.look(directory, late)
        end = time.monotonic() + WATCH_S
        while seen.case.hook == "unclear" and time.monotonic() < end:
            time.sleep(0.25)
            seen = watch.look(directory, late)
    except (AutoEvalError, OSError) as error:
        return str(error)
    if seen.case.hook == "unclear":
        return f"its training process has not shown itself for {WATCH_S:g} s; a runner waits longer, then acts"
    return seen.case.why


# ---------------------------------------------------------------------- a step without a ticket


def _untold(found: _Found, tickets: list[Ticket], step: int, suite: str) -> Story:
    """Why a suite has no ticket at this step."""
    names = sorted({t.manifest.run.name or t.manifest.run.id for t in tickets})
    run = names[0] if len(names) == 1 else ""
    outcome = missing.why(found.config, tickets, step, suite)
    if found.unreadable:
        outcome += f" ({found.unreadable} ticket(s) cannot be read: see `autoeval-runner status`)"
    return Story(run, suite, step, "", "", outcome)


# ---------------------------------------------------------------------- words


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode(errors="replace").strip()
    except OSError:
        return ""


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024  # type: ignore[assignment]  # bytes no longer
    raise AssertionError
