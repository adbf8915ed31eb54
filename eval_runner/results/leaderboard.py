"""Models and steps ranked over many metrics: mean win rates, min-max sums, and how sure a rank is. Pure functions.

- **Mean win rate**, as HELM has it (`compute_aggregate_row_win_rates` of `helm/benchmark/presentation/summarize.py`,
  crfm-helm 0.5.16): of each column, the share of the other entries with a value that an entry beats, a tie counting
  half; its mean over the columns in which the entry has a value. Columns with fewer than two values count for nobody,
  and so do those of which no direction is known.
- **Min-max sum**, the score of the older tool (`cal_score` of Data-Juicer's tools/evaluator/recorder/wandb_writer.py):
  (value - min) / (max - min) summed over the columns, where min is at most 1 and max at least 0, over all entries of
  the board that lack no column. As there, the others have no sum. Where we differ: a column whose values are all alike
  counts 0 for everybody (the older tool divided by zero), an entry that is the only one has no sum, and where lower is
  better the best value counts 1 (it counted 0).
- **Mean score**: the plain mean of the values, where the entry has them all and all columns have the same direction.
  HELM's takes the mean of what is there; means over different columns are nothing to compare.

Ranks are by the mean win rate; `ranks` has their 95 % intervals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eval_runner.results import ranks
from eval_runner.results.ranks import Measured

Steps = Literal["last", "best", "all"]
"""Of each model its last step, its best one (of those with the most metrics, the one with the highest mean win rate
among all), or all."""


@dataclass(frozen=True)
class Column:
    """A metric, `name` as ``benchmark.METRIC``, with ``suite/`` in front where there are several suites."""

    name: str
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Value:
    """A finite value; `stderr` is its standard error, None where it is not known."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Entry:
    """A model at a step with its values by column name. `tokens` are in billions, None where they are not known."""

    model: str
    step: int
    values: Mapping[str, Value]
    tokens: float | None = None


@dataclass(frozen=True)
class Line:
    """An entry's place. `values` are in the order of the board's columns. None is what cannot be told; `missing` names
    the columns without a value."""

    model: str
    step: int
    tokens: float | None
    rank: int | None
    rank_low: int | None
    rank_high: int | None
    win_rate: float | None
    min_max: float | None
    mean: float | None
    values: tuple[Value | None, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Board:
    """Lines by rank; `notes` say what is left out, and why something cannot be told."""

    columns: tuple[Column, ...] = ()
    lines: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    steps: Steps = "all"


@dataclass
class _Told:
    notes: list[str] = field(default_factory=list)

    def about(self, what: str, names: Iterable[str]) -> None:
        if named := list(dict.fromkeys(names)):
            self.notes.append(f"{what}: {', '.join(named)}")


def make(
    entries: Iterable[Entry], columns: Sequence[Column], *, steps: Steps = "all", notes: Iterable[str] = ()
) -> Board:
    """The board of these entries over these columns; of several entries for a model and step the last counts.

    `notes` are of whoever read the entries, and stand before ours.
    """
    told = _Told(list(notes))
    unique = {(entry.model, entry.step): entry for entry in entries}
    names = {column.name for column in columns}
    shown = [entry for entry in unique.values() if names & entry.values.keys()]
    empty = (f"{e.model} at step {e.step}" for e in unique.values() if not names & e.values.keys())
    told.about("no value at all, and so no place", empty)
    shown = choose(shown, columns, steps)
    there = {name for entry in shown for name in entry.values}
    told.about("no entry has a value, so these are no columns", (c.name for c in columns if c.name not in there))
    kept = tuple(column for column in columns if column.name in there)
    told.about(
        "it is not known whether more is better, so these count for no win rate, sum or mean",
        (c.name for c in kept if c.higher_is_better is None),
    )
    rates = win_rates(shown, kept)
    places = _places(rates)
    bounds = _bounds(shown, kept, rates, told)
    sums, means = min_max_sums(shown, kept), mean_scores(shown, kept)
    if len({column.higher_is_better for column in kept}) > 1:
        told.notes.append("no mean score: more is not better in all columns")
    lines = [
        Line(
            model=entry.model, step=entry.step, tokens=entry.tokens, rank=places[i],
            rank_low=bound[0] if (bound := bounds[i]) else None, rank_high=bound[1] if bound else None,
            win_rate=rates[i], min_max=sums[i], mean=means[i],
            values=tuple(entry.values.get(column.name) for column in kept),
            missing=tuple(column.name for column in kept if column.name not in entry.values),
        )
        for i, entry in enumerate(shown)
    ]
    lines.sort(key=lambda line: (line.rank is None, line.rank, line.model, line.step))
    return Board(kept, tuple(lines), tuple(told.notes), steps)


def choose(entries: Sequence[Entry], columns: Sequence[Column], steps: Steps) -> list[Entry]:
    """The entries of the steps that are asked for, in their order."""
    if steps == "all":
        return list(entries)
    rates = win_rates(entries, columns)
    names = {column.name for column in columns}
    best: dict[str, tuple[tuple[float, ...], Entry]] = {}
    for entry, rate in zip(entries, rates, strict=True):
        size = len(names & entry.values.keys())
        merit = (entry.step,) if steps == "last" else (size, -1.0 if rate is None else round(rate, 12), -entry.step)
        if entry.model not in best or best[entry.model][0] < merit:
            best[entry.model] = merit, entry
    return [entry for _, entry in best.values()]


def win_rates(entries: Sequence[Entry], columns: Iterable[Column]) -> list[float | None]:
    """Each entry's mean win rate, None where it can be compared in no column."""
    found: list[list[float]] = [[] for _ in entries]
    for column in columns:
        have = [(i, entry.values[column.name].value) for i, entry in enumerate(entries) if column.name in entry.values]
        if column.higher_is_better is None or len(have) < 2:
            continue
        counts = Counter(value for _, value in have)
        wins, below = {}, 0
        for value in sorted(counts, reverse=not column.higher_is_better):
            wins[value] = below + (counts[value] - 1) / 2
            below += counts[value]
        for i, value in have:
            found[i].append(wins[value] / (len(have) - 1))
    return [math.fsum(rates) / len(rates) if rates else None for rates in found]


def min_max_sums(entries: Sequence[Entry], columns: Sequence[Column]) -> list[float | None]:
    """Each entry's min-max sum over the columns with a direction, None where it lacks one of them or no other entry
    has them all."""
    directed = [column for column in columns if column.higher_is_better is not None]
    complete = [i for i, entry in enumerate(entries) if all(column.name in entry.values for column in directed)]
    parts: list[list[float]] = [[] for _ in entries]
    for column in directed if len(complete) > 1 else ():
        have = [(i, entries[i].values[column.name].value) for i in complete]
        different = {value for _, value in have}
        low, high = min(1.0, *different), max(0.0, *different)
        for i, value in have:
            share = (value - low) / (high - low) if len(different) > 1 else 0.0
            parts[i].append(share if column.higher_is_better or len(different) == 1 else 1 - share)
    return [math.fsum(own) if own else None for own in parts]


def mean_scores(entries: Sequence[Entry], columns: Sequence[Column]) -> list[float | None]:
    """Each entry's mean value, None where it lacks a column or the columns differ in direction."""
    directions = {column.higher_is_better for column in columns}
    if len(directions) != 1 or None in directions:
        return [None] * len(entries)
    names = [column.name for column in columns]
    return [
        math.fsum(entry.values[name].value for name in names) / len(names)
        if all(name in entry.values for name in names) else None
        for entry in entries
    ]  # fmt: skip


def _places(rates: Sequence[float | None]) -> list[int | None]:
    """1 for the best; those that are alike share the better place."""
    rounded = [None if rate is None else round(rate, 12) for rate in rates]
    first: dict[float, int] = {}
    for place, rate in enumerate(sorted((r for r in rounded if r is not None), reverse=True), 1):
        first.setdefault(rate, place)
    return [None if rate is None else first[rate] for rate in rounded]


def _bounds(
    entries: Sequence[Entry], columns: Sequence[Column], rates: Sequence[float | None], told: _Told
) -> list[tuple[int, int] | None]:
    """The interval of each rank, None where a value has no standard error."""
    known = [True] * len(entries)
    measured = []
    for column in columns:
        have = [(i, entry.values[column.name]) for i, entry in enumerate(entries) if column.name in entry.values]
        if column.higher_is_better is None or len(have) < 2:
            continue
        sign = 1.0 if column.higher_is_better else -1.0
        for i, value in have:
            known[i] &= value.stderr is not None
        numbers = [sign * value.value for _, value in have]
        measured.append(Measured([i for i, _ in have], numbers, [value.stderr or 0.0 for _, value in have]))
    ranked = [i for i, rate in enumerate(rates) if rate is not None]
    if unsure := sum(not known[i] for i in ranked):
        told.notes.append(f"rank without an interval: {unsure} of {len(ranked)} entries have values of unknown error")
    out: list[tuple[int, int] | None] = [None] * len(entries)
    if unsure == len(ranked):
        return out
    variances = ranks.spread(measured, len(entries))
    found = ranks.intervals([rates[i] or 0.0 for i in ranked], [variances[i] if known[i] else None for i in ranked])
    for i, interval in zip(ranked, found, strict=True):
        out[i] = interval
    return out
