"""Read from a W&B run the rows that hold scores: `python -m eval_runner.sinks.wandb_reader LOOK.json`.

A process of its own, as the writer is. Nothing is written to the run, so it may have a writer meanwhile. Online it
asks the service's history (wandb.Api); offline it reads the transaction logs (wandb_log). The run beside it,
`<id>-eval`, which the sink's `late: companion` writes to, counts as a part of the run.
"""

from __future__ import annotations

import glob
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks import strict
from autoeval_hooks.relay_files import AXIS, POINT_BYTES, Point
from autoeval_hooks.run_identity import RunIdentity

DONE, FAILED, BUSY, REFUSED = 0, 1, 75, 78
"""Exit: done; try again; the run has a writer, try again later; the configuration must change."""
PROBE = "bench/lag_s"
"""Each point has it, and no two the same: by its value a row is recognised."""
STEP = "_step"

Keys = tuple[tuple[str, ...], ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What to look at. `logs` are the run's transaction logs, the oldest first, `beside` those of `<id>-eval`; both
    are used offline only. `keys`: rows that have one of these sets of keys are wanted, with these keys. `answer` is the
    file that a `Held` goes to."""

    run: RunIdentity
    offline: bool
    logs: tuple[str, ...]
    beside: tuple[str, ...]
    keys: Keys
    answer: str


def save(request: Any, file: Path) -> None:
    """Write a request to one of our programs."""
    file.write_text(json.dumps(asdict(request)), encoding="utf-8")


@dataclass
class Held:
    """What a run holds. `state` is the service's word: "running" while somebody writes to it, or did until lately."""

    exists: bool
    state: str
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> Held:
        """Raises ValueError."""
        data = json.loads(path.read_bytes())
        return cls(bool(data["exists"]), str(data["state"]), [dict(row) for row in data["rows"]])


class Refused(Exception):
    """No other try will do better."""


def probe(point: Point) -> str:
    """The metric by whose value a row is recognised as this point's."""
    return PROBE if PROBE in point.metrics else min(point.metrics)


def holds(row: Row, point: Point) -> bool:
    """Whether this is the point's row."""
    name = probe(point)
    return row.get(AXIS) == point.step and equal(row.get(name), point.metrics[name])


def equal(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=1e-12)


def keys(points: Iterable[Point], *, values: bool = False) -> Keys:
    """The sets of keys by which these points' rows are found, with all their metrics if `values`."""
    points = list(points)
    sets: set[tuple[str, ...]] = {(STEP, AXIS, probe(point)) for point in points}
    if values:
        sets |= {(STEP, AXIS, *sorted(point.metrics)) for point in points}
    return tuple(sorted(sets))


def rows(look: Look) -> Held:
    """What the run holds. Raises Refused, and what W&B raises."""
    if look.offline:
        found = [row for log in (*look.logs, *look.beside) for row in _log(log).rows]
        return Held(True, "", [_ours(row) for row in found if AXIS in row])
    check_service(look.run)
    remote, beside = remote_run(look.run, look.run.wandb_id), remote_run(look.run, f"{look.run.wandb_id}-eval")
    found = [row for run in (remote, beside) if run is not None for row in _scan(run, look.keys)]
    return Held(remote is not None, remote.state if remote is not None else "", found)


def logs(directory: Path, run_id: str) -> list[str]:
    """The run's transaction logs below a directory that W&B was given, or that it made in one; the oldest first."""
    name = glob.escape(run_id)
    found = {
        log for base in (directory, directory / "wandb")
        for log in glob.glob(f"{glob.escape(str(base))}/offline-run-*-{name}/run-{name}.wandb")
    }  # fmt: skip
    return sorted(found, key=lambda log: Path(log).parent.name)


def _log(path: str) -> Any:
    from eval_runner.sinks.wandb_log import Content

    content = Content()
    content.add(Path(path))
    return content


def _ours(row: Row) -> Row:
    return {key: value for key, value in row.items() if key == STEP or key.startswith("bench/")}


def _scan(remote: Any, sets: Keys) -> list[Row]:
    """The rows with one of these sets of keys. What finds a row first gives it; the other sets add to it."""
    found: dict[Any, list[Row]] = {}
    for names in sorted(sets, key=len):
        before = {step: list(some) for step, some in found.items()}
        for row in remote.scan_history(keys=list(names), use_cache=False):
            known = [r for r in before.get(row[STEP], ()) if all(r.get(k, v) == v for k, v in row.items())]
            if known:
                known[0].update(row)
            else:
                found.setdefault(row[STEP], []).append(_ours(row))
    return [row for some in found.values() for row in some]


def path(run: RunIdentity, run_id: str) -> str:
    return "/".join(part for part in (run.entity, run.project or "uncategorized", run_id) if part)


def remote_run(run: RunIdentity, run_id: str) -> Any | None:
    """The run as W&B's API has it; None if there is none. Raises what wandb raises."""
    import wandb

    try:
        return wandb.Api().run(path(run, run_id))
    except (ValueError, wandb.errors.CommError) as error:
        if "could not find run" not in str(error).lower():
            raise
        return None


def check_service(run: RunIdentity) -> None:
    """The key in our environment goes to the service that we are set up for, never to one that a ticket names."""
    import wandb

    ours, theirs = wandb.setup().settings.base_url.rstrip("/"), run.wandb_base_url.rstrip("/")
    if theirs and theirs != ours:
        raise Refused(f"the run reports to {theirs}, this runner to {ours}; set the wandb sink's base_url to the first")


def main(argv: list[str]) -> int:
    errors: list[str] = []
    look = strict.parse(Look, Path(argv[1]).read_bytes(), argv[1], errors, max_bytes=16 * POINT_BYTES)
    if look is None:
        print(errors[0])
        return REFUSED
    try:
        save(rows(look), Path(look.answer))
    except Refused as reason:
        print(reason)
        return REFUSED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv))
