"""Is the latest checkpoint better than the one before it, or than the best so far, or is it noise?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eval_runner.results.schema import Instance, Result
from eval_runner.results.series import Row, change, comparable
from eval_runner.results.statistics import Difference, Verdict, paired, unpaired
from eval_runner.results.store import ResultError

Values = dict[tuple[str, str, str], dict[str, float]]
"""Per-instance values by id, for each (benchmark, metric, split)."""


@dataclass(frozen=True)
class Comparison:
    """The latest score against an earlier one. `note` says where and why the instances were not paired, or the scores
    not compared at all."""

    against: Row
    difference: Difference | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Latest:
    """A series' latest score; `best` is the best of the earlier ones (by the same judge, if there are any), None where
    no direction is known."""

    row: Row
    previous: Comparison | None
    best: Comparison | None


def latest(
    rows: Sequence[Row], instances: Callable[[Result], Iterable[Instance]]
) -> tuple[list[Latest], list[str]]:
    """The latest score of each series, compared; and a line for each file of instances that cannot be read.

    `rows` are sorted as `series.rows` does. Where a run was evaluated with several definitions of a suite,
    its last one is taken.
    """
    values = Reader(instances)
    last_definition: dict[tuple[str, str], Row] = {}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row.superseded:
            groups.setdefault((row.run, *row.key), []).append(row)
            name = (row.run, row.result.suite)
            if name not in last_definition or last_definition[name].result.finished_at < row.result.finished_at:
                last_definition[name] = row
    found = [
        _latest(group, values) for group in groups.values()
        if last_definition[group[0].run, group[0].result.suite].suite == group[0].suite
    ]  # fmt: skip
    return found, values.problems


def _latest(group: list[Row], values: Reader) -> Latest:
    *earlier, last = group
    if not earlier:
        return Latest(last, None, None)
    better = last.score.higher_is_better
    best = None
    if better is not None:
        alike = [row for row in earlier if comparable(row, last)]
        best = (max if better else min)(alike or earlier, key=lambda row: row.score.value)
    return Latest(last, _compare(earlier[-1], last, values), _compare(best, last, values) if best else None)


def _compare(old: Row, new: Row, values: Reader) -> Comparison:
    if not comparable(old, new):
        return Comparison(old, None, "not tested", f"the judge changed: {change(old, new)}")
    before, after = values.of(old), values.of(new)
    difference = paired(before, after) if before and after else None
    note = ""
    if difference is None:
        note = "no per-instance values to pair"
        a, b = old.score, new.score
        if a.stderr is not None and b.stderr is not None:
            difference = unpaired(a.value, a.stderr, b.value, b.stderr, min(a.n, b.n))
    verdict: Verdict = difference.verdict(new.score.higher_is_better) if difference else "not tested"
    return Comparison(old, difference, verdict, note)


class Reader:
    """Reads each result's instances once."""

    def __init__(self, instances: Callable[[Result], Iterable[Instance]]) -> None:
        self.instances = instances
        self.problems: list[str] = []
        self._read: dict[tuple[str, int, str], Values] = {}

    def of(self, row: Row) -> dict[str, float]:
        """The values behind a score by id; none where they are missing, or where the score is not their mean,
        so that a test of them would not be a test of it."""
        r, s = row.result, row.score
        key = (r.ticket, r.generation, r.runner)
        if key not in self._read:
            self._read[key] = self._load(r)
        found = self._read[key].get((s.benchmark, s.metric, s.split), {})
        if found and math.isclose(math.fsum(found.values()) / len(found), s.value, rel_tol=1e-6, abs_tol=1e-9):
            return found
        return {}

    def _load(self, result: Result) -> Values:
        values: Values = {}
        try:
            for i in self.instances(result):
                values.setdefault((i.benchmark, i.metric, i.split), {})[i.id] = i.value
        except ResultError as error:
            self.problems.append(str(error))
            return {}
        return values
