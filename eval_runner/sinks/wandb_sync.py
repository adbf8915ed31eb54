"""Compare results with what their W&B run holds, and take again what is missing there.

A row is a result's by its ``bench/step`` and its ``bench/lag_s``. Nothing in the run is changed: a row with
other values, or one that no result accounts for, is only told. What is missing goes back to points/, from where it is
logged as ever; what is there and was thought to wait goes to logged/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.relay_files import AXIS, Point
from eval_runner.results.schema import Result
from eval_runner.sinks.base import OF_POINT, Standing, State, point
from eval_runner.sinks.wandb_cases import Seen
from eval_runner.sinks.wandb_reader import STEP, Held, Row, equal, holds, keys

if TYPE_CHECKING:
    from eval_runner.sinks.wandb import WandbSink

AGAIN = "again"
"""Who has taken a point whose file was gone: nobody, so it must be looked for before it is logged."""


def where(directory: Path, ticket: str) -> str:
    """Where the point of a ticket stands, ``<stage>/<name>``; "" if nowhere. A point moves in the order of STAGES."""
    return places(directory).get(ticket, "")


def places(directory: Path) -> dict[str, str]:
    """Ticket → where its point stands."""
    found: dict[str, str] = {}
    for stage in files.STAGES:
        for name in files.waiting(str(directory), stage):
            found.setdefault(files.ticket_of(name), f"{stage}/{name}")
    return found


def compare(sink: WandbSink, results: Sequence[Result], *, repair: bool) -> list[Standing]:
    """The findings of one run; `results` are all that it has."""
    run, points = results[0].run, [point(result) for result in results]
    try:
        seen = sink.seen(run)
        output = sink.directory(run).parents[1] / "logs" / "wandb-sync.log"
        output.parent.mkdir(parents=True, exist_ok=True)
        # Before the look: what is logged after it is not there yet, and is not missing.
        stand = places(sink.directory(seen.run))
        held = sink.children.look(seen.run, ((STEP, AXIS), *keys(points, values=True)), output)
        if not held.exists:
            raise AutoEvalError("W&B has no such run: it was deleted, or run.entity and run.project are not right")
        # A step that is no number is no row of ours, whoever logged it.
        rows = [row for row in held.rows if isinstance(row[AXIS], int | float) and math.isfinite(row[AXIS])]
        at: dict[float, list[Row]] = {}
        for row in rows:
            at.setdefault(row[AXIS], []).append(row)
        matches = {p.ticket: [row for row in at.get(p.step, ()) if holds(row, p)] for p in points}
        ours = {id(row) for rows in matches.values() for row in rows}
        free = [row for row in rows if id(row) not in ours]
        found = []
        for result, p in zip(results, points, strict=True):
            place = stand.get(p.ticket, "")
            state, says = _stands(sink, seen, held, p, place, matches[p.ticket], free)
            if repair:
                try:
                    _repair(sink, seen, p, place, there=bool(matches[p.ticket]), missing=state == "missing")
                except (AutoEvalError, OSError) as error:       # it must not hold up the others
                    says = f"{says}; it cannot be repaired: {error}".removeprefix("; ")
            found.append(Standing(run.key, result.suite, p.step, p.ticket, state, says))
    except (AutoEvalError, OSError) as error:
        return [Standing(run.key, r.suite, r.step, r.ticket, "unclear", str(error)) for r in results]
    return found + [Standing(run.key, "", int(row[AXIS]), "", "unknown", _shown(row)) for row in free]


def _stands(
    sink: WandbSink, seen: Seen, held: Held, p: Point, place: str, rows: list[Row], free: list[Row]
) -> tuple[State, str]:
    if len(rows) > 1:
        return "twice", f"{len(rows)} rows of the run have it; W&B cannot remove a row"
    if rows:
        other = _other(rows[0], p)
        return ("different", other) if other else ("shown", "")
    stage, _, name = place.partition("/")
    if stage == "points":
        return "waiting", seen.case.why
    if stage and sink.lives(seen.run, files.owner_of(name), seen):
        return "waiting", "it was logged and may still be sent" if stage == "logged" else seen.case.why
    if why := sink.children.cannot_tell(seen, held):
        return "unclear", why
    for row in free:
        scores = [key for key in p.metrics if key in row and key not in OF_POINT]
        if row[AXIS] == p.step and scores:
            free.remove(row)
            return "different", _other(row, p)
    return "missing", ""


def _repair(sink: WandbSink, seen: Seen, p: Point, place: str, *, there: bool, missing: bool) -> None:
    stage, _, name = place.partition("/")
    if missing:
        _to(sink, seen, p, place, f"points/{p.ticket}.json")
    elif there and stage != "logged" and not (stage == "taken" and sink.lives(seen.run, files.owner_of(name), seen)):
        _to(sink, seen, p, place, f"logged/{files.taken(p.ticket, AGAIN)}")


def _to(sink: WandbSink, seen: Seen, p: Point, place: str, to: str) -> None:
    directory = sink.directory(seen.run)
    if place:
        files.move(str(directory), place, to)       # nothing, if it went on meanwhile
    elif not where(directory, p.ticket):
        sink.offer(seen.run, p, to)


def _other(row: Row, p: Point) -> str:
    """Which metrics the row has with another value."""
    wrong = [key for key, value in sorted(p.metrics.items()) if not equal(row.get(key), value)]
    told = [f"{key} is {row.get(key, 'not there')}, not {p.metrics[key]}" for key in wrong]
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")


def _shown(row: Row) -> str:
    told = [f"{key}={value}" for key, value in sorted(row.items()) if key not in (STEP, AXIS)]
    return f"no result accounts for this row{': ' if told else ''}{', '.join(told[:3])}"
