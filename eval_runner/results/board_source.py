"""The leaderboard's entries from our own results: a model is a run, its scores are those of `series.rows`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner.recorder import metrics
from eval_runner.results.leaderboard import Column, Entry, Value
from eval_runner.results.schema import Result, Score
from eval_runner.results.series import ANCHORS, Row, judge, rows
from eval_runner.results.statistics import Z95, bounds

Key = tuple[str, str, str, str]
"""Suite, benchmark, metric, split."""


@dataclass
class Read:
    """What there is to rank. `notes` say what was left out."""

    entries: list[Entry] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(results: Iterable[Result], *, wanted: Sequence[str] = (), excluded: Collection[str] = ()) -> Read:
    """The entries of all runs that are not `excluded`, over the metrics that are `wanted`.

    `wanted` names metrics as ``benchmark.METRIC`` (HELM's display names or ours; the mean where a benchmark has parts)
    or ``suite/benchmark.METRIC``. By default the first metric of each benchmark counts of which it is known whether
    more is better, but no categories of a benchmark and no judge's anchors. Scores of earlier definitions of a suite
    and of checkpoints that were written again are left out; scores by several judges are different columns. Of several
    results at one step the last counts.
    Raises ConfigError for a metric or an excluded run that nobody knows.
    """
    every = rows(results)
    out = Read()
    runs = {row.run for row in every if not row.superseded}
    if unknown := sorted({*excluded} - runs) if every else []:
        raise ConfigError(f"excluded model {unknown[0]!r}: no run is called so{near(unknown[0], runs)}")
    table = [row for row in every if not row.superseded and row.suite == row.result.suite and row.run not in excluded]
    earlier = sum(row.suite != row.result.suite and not row.superseded for row in every)
    if earlier:
        out.notes.append(f"{earlier} scores by earlier definitions of a suite are left out")
    names = _Names(table)
    values: dict[tuple[str, int], dict[str, Value]] = {}
    directions: dict[str, bool | None] = {}
    for name, row, value in _asked(table, wanted, names, out) if wanted else _mains(table, names):
        values.setdefault((row.run, row.result.step), {})[name] = value
        directions.setdefault(name, row.score.higher_is_better)
    tokens = {(row.run, row.result.step): row.result.tokens for row in table}
    for run, step in dict.fromkeys((row.run, row.result.step) for row in table):
        counted = tokens[run, step]
        billions = None if counted is None else counted / 1e9
        out.entries.append(Entry(run, step, values.get((run, step), {}), billions))
    out.columns = [Column(name, higher) for name, higher in directions.items()]
    return out


def value(score: Score) -> Value:
    """A score with its standard error: that of its 95 % interval, which knows more where the error is 0."""
    if (ends := bounds(score)) is None:
        return Value(score.value, score.stderr)
    return Value(score.value, (ends[1] - ends[0]) / (2 * Z95))


class _Names:
    """What columns are called: with the suite if there are several, and with the judge if a metric has several."""

    def __init__(self, table: Sequence[Row]) -> None:
        self.suites = len({row.suite for row in table}) > 1
        judges: dict[Key, set[str]] = {}
        for row in table:
            judges.setdefault(row.key, set()).add(_judge(row))
        self.several = {key for key, found in judges.items() if len(found) > 1}

    def of(self, row: Row, metric: str) -> str:
        label = f" ({_judge(row) or 'no judge'})" if self.several and row.key in self.several else ""
        return (f"{row.suite}/" if self.suites else "") + metric + label


def _judge(row: Row) -> str:
    """`series.judge`, which looks for the score, only where there is a judge at all."""
    return judge(row) if any("judge" in e.versions for e in row.result.evaluations) else ""


def _mains(table: Sequence[Row], names: _Names) -> Iterable[tuple[str, Row, Value]]:
    """(column, row, value) of each benchmark's main metric."""
    places: dict[Key, tuple[int, Key]] = {}
    for row in table:
        if row.score.higher_is_better is not None:
            places.setdefault(row.key, (row.place, row.key))
    benchmarks = {row.key[:2] for row in table}
    first: dict[tuple[str, str], tuple[int, Key]] = {}
    for key, place in places.items():
        if not _part(key, benchmarks):
            first[key[:2]] = min(first.get(key[:2], place), place)
    in_order = sorted(first.values(), key=lambda place: (place[1][0], place))      # by suite
    chosen: dict[Key, list[Row]] = {key: [] for _, key in in_order}
    for row in table:
        if (key := row.key) in chosen:
            chosen[key].append(row)
    for (_, benchmark, metric, _), some in chosen.items():
        for row in some:
            yield names.of(row, f"{benchmark}.{metric}"), row, value(row.score)


def _part(key: Key, benchmarks: Collection[tuple[str, str]]) -> bool:
    """Whether it is a category of another benchmark, or frozen answers."""
    suite, name, *_ = key
    whole = [name[:i] for i, letter in enumerate(name) if letter == "."]
    return name.endswith(f".{ANCHORS}") or any((suite, part) in benchmarks for part in whole)


def _asked(table: Sequence[Row], wanted: Sequence[str], names: _Names, out: Read) -> Iterable[tuple[str, Row, Value]]:
    """(column, a row of it, value) of what is asked for."""
    for name in wanted:
        columns: dict[str, list[Row]] = {}
        for row in table:
            plain = name.removeprefix(f"{row.suite}/")
            if metrics.matches(plain, *_names(row)):
                columns.setdefault(names.of(row, plain), []).append(row)
        if not columns and table:
            known = {".".join(_names(row)) for row in table}
            out.notes.append(f"no entry has a value, so this is no column: {name}{near(name, known)}")
        for column, some in sorted(columns.items()):
            plain = name.removeprefix(f"{some[0].suite}/")
            for row, average in _averaged(plain, some, out):
                yield column, row, average


def _averaged(wanted: str, some: Sequence[Row], out: Read) -> Iterable[tuple[Row, Value]]:
    """The value at each run and step: a score, or the mean over the parts of a benchmark if none is missing."""
    last: dict[tuple[str, int], dict[Key, Row]] = {}
    for row in some:
        last.setdefault((row.run, row.result.step), {})[row.key] = row
    groups = {key: [*of_step.values()] for key, of_step in last.items()}    # of several results at a step the last
    found, missing = metrics.averages(wanted, {key: [row.score for row in group] for key, group in groups.items()})
    for (run, step), parts in missing.items():
        out.notes.append(f"{run} at step {step} has no value of {wanted}, since parts are missing: {', '.join(parts)}")
    for key, average in found.items():
        of = {row.score.benchmark: row for row in reversed(groups[key]) if row.score.metric == average.metric}
        taken = [of[part] for part in average.parts]
        errors = [error for row in taken if (error := value(row.score).stderr) is not None]
        stderr = math.hypot(*errors) / len(taken) if len(errors) == len(taken) else None
        yield taken[0], Value(average.value, stderr)


def _names(row: Row) -> tuple[str, str]:
    return row.score.benchmark, row.score.metric
