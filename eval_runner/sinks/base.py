"""What a sink is: a place that shows results. It is a projection; the results directory is the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autoeval_hooks.fsio import FileOps
from eval_runner.results.schema import Result


@dataclass(frozen=True)
class Point:
    """What a tracker is given for one result: numbers by metric name, and where they stand.

    `metrics` has ``bench/<suite>/<benchmark>/<metric>`` and, with it, ``…/stderr`` and ``…/n``, and
    ``bench/lag_s`` and ``bench/eval_s``; `step` goes to ``bench/step``, `tokens` (in billions, None if
    unknown) to ``bench/tokens``.
    """

    ticket: str
    step: int
    tokens: float | None
    metrics: dict[str, float]


def point(result: Result) -> Point:
    """The point of an ok result. Where a benchmark has the same metric on two splits, the split joins the name."""
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
    tokens = None if result.tokens is None else result.tokens / 1e9
    return Point(ticket=result.ticket, step=result.step, tokens=tokens, metrics=metrics)


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
    stopping: Callable[[], bool] = lambda: False
    """True once the runner must end: `flush` then returns soon."""


class Sink(Protocol):
    """Built once: `__init__(self, settings: dict, context: Context)` raises ConfigError that names the key.

    A sink may be called again with what it already shows: the outcome is the same."""

    def publish(self, result: Result) -> None:
        """Take one ok result, durably. Raises AutoEvalError (or OSError) when it could not; it is then called again."""

    def flush(self) -> bool:
        """Move on whatever can be moved on now. True when nothing of what was taken waits any longer."""
