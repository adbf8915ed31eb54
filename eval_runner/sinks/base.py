"""What a sink is: a place that shows results. It is a projection; the results directory is the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from autoeval_hooks.fsio import FileOps
from autoeval_hooks.relay_files import VERSION, Point
from eval_runner.results.schema import Result

OF_POINT = frozenset({"bench/lag_s", "bench/eval_s", "bench/cost_usd"})
"""What is of the point as a whole and of no score, so that two points of a step may both have it."""


def point(result: Result) -> Point:
    """What a tracker is given for one ok result: ``bench/<suite>/<benchmark>/<metric>`` and, with it, ``…/stderr`` and
    ``…/n``; ``bench/lag_s`` and ``bench/eval_s`` in seconds; ``bench/cost_usd``, what its evaluations paid, where the
    price of one is known. Where a benchmark has the same metric on two splits, the split joins the name. Intervals
    stay in the results: they would be two more keys for each score."""
    names: dict[str, list[str]] = {}
    for s in result.scores:
        names.setdefault(f"{s.benchmark}/{s.metric}", []).append(s.split)
    metrics: dict[str, float] = {}
    for s in result.scores:
        name = f"{s.benchmark}/{s.metric}"
        if len(names[name]) > 1:
            name = f"{s.benchmark}/{s.split}/{s.metric}"
        key = f"bench/{result.suite}/{name}"
        metrics[key] = s.value
        metrics[f"{key}/n"] = float(s.n)
        if s.stderr is not None:
            metrics[f"{key}/stderr"] = s.stderr
    metrics["bench/lag_s"] = result.lag_s
    metrics["bench/eval_s"] = result.eval_s
    if costs := [e.usage["cost_usd"] for e in result.evaluations if "cost_usd" in e.usage]:
        metrics["bench/cost_usd"] = math.fsum(costs)
    tokens = None if result.tokens is None else result.tokens / 1e9
    return Point(VERSION, ticket=result.ticket, step=result.step, tokens=tokens, metrics=metrics)


@dataclass(frozen=True)
class Context:
    """What a sink may know of its runner."""

    queue: Path
    """The queue's directory."""
    runner: str
    """The runner's name, which no other has."""
    where: str
    """The key path of the settings, for messages: ``sinks[0]``."""
    config_file: str = ""
    """The file that the settings stand in, for messages."""
    path_map: Mapping[str, str] = field(default_factory=dict)
    """Paths of the training host → ours."""
    ops: FileOps = field(default_factory=FileOps)
    """Every call into the file system by which a result is taken."""
    written: str = ""
    """The sink's entry as it stands in the file, without its variables' values, as canonical JSON."""
    stopping: Callable[[], bool] = lambda: False
    """True once the runner must end: `flush` then returns soon."""


State = Literal["shown", "waiting", "missing", "different", "twice", "unknown", "unclear"]
"""How one result stands in a tracker: there once, with the same values; taken, and on its way; not there; there with
other values; there more than once. ``unknown`` is something there that no result accounts for, ``unclear`` what could
not be looked at."""


@dataclass(frozen=True)
class Standing:
    """How one result stands in a tracker. `says` is why, or what is to be done. `ticket` and `suite` are "" where
    `state` is ``unknown``."""

    run: str
    suite: str
    step: int
    ticket: str
    state: State
    says: str = ""


def named(types: Iterable[str], sinks: Iterable[Sink]) -> dict[str, Sink]:
    """The sinks of a configuration by the names under which it is remembered what each was given."""
    pairs = enumerate(zip(types, sinks, strict=True))
    return {getattr(sink, "target", "") or f"{i}-{kind}": sink for i, (kind, sink) in pairs}


class Sink(Protocol):
    """Built once: `__init__(self, settings: dict, context: Context)` raises ConfigError that names the key.

    A sink may be called again with what it already shows: the outcome is the same.

    What it was given is remembered by its place in the file. A sink with a text attribute `target`, a file's name that
    tells where it shows results, has it remembered by that: a new place is then given everything."""

    def publish(self, result: Result) -> None:
        """Take one ok result, durably. Raises AutoEvalError (or OSError) when it could not; it is then called again."""

    def flush(self) -> bool:
        """Move on whatever can be moved on now. True when nothing of what was taken waits any longer."""

    def compare(self, results: Sequence[Result], *, repair: bool) -> list[Standing]:
        """How each of these ok results stands in the tracker, and what else is there; `results` are all of their runs.

        With `repair`, what is missing is taken again, for `flush` to bring; nothing in the tracker is ever changed or
        removed. A tracker that cannot be looked at gives ``unclear``, not an error. May take minutes."""
