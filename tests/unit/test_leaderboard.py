"""Win rates, sums and ranks: by hand, by HELM's own test cases, and by what must hold of any board."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_runner.results import board_files, ranks
from eval_runner.results.leaderboard import (
    Board,
    Column,
    Entry,
    Steps,
    Value,
    make,
    mean_scores,
    min_max_sums,
    win_rates,
)

A, B, C = Column("a.EM"), Column("b.F1"), Column("c.bpb", higher_is_better=False)


def entry(model: str, *values: float | None, step: int = 0, stderr: float | None = None) -> Entry:
    named = zip((A, B, C), values, strict=False)
    return Entry(model, step, {column.name: Value(v, stderr) for column, v in named if v is not None})


def lone(values: list[float | None], *, higher: bool | None = True) -> list[float | None]:
    return win_rates([entry(str(i), v) for i, v in enumerate(values)], [Column(A.name, higher)])


def test_the_cases_of_helms_own_test() -> None:
    """`test_compute_win_rates_*` of helm/benchmark/presentation/test_summarize.py (crfm-helm 0.5.16)."""
    assert lone([1, 2, 3, 4, 5]) == [0, 0.25, 0.5, 0.75, 1]
    assert lone([1, 1, 1, 4, 5]) == [0.25, 0.25, 0.25, 0.75, 1.0]
    assert lone([1, 2, 3, 4, 5], higher=False) == [1, 0.75, 0.5, 0.25, 0]
    assert lone([1, 2, 3, 4, 5], higher=None) == [None] * 5
    assert lone([None] * 5) == [None] * 5
    two = [entry("A", 1, 3), entry("B", 2, 1), entry("C", 3, 2), entry("D", 4, 5), entry("E", 5, 4)]
    assert win_rates(two, [A, B]) == [0.25, 0.125, 0.375, 0.875, 0.875]
    incomplete = [entry("A", 1, 3), entry("B", 2, 1), entry("C", 3), entry("D", 4), entry("E", 5)]
    assert win_rates(incomplete, [A, B]) == [0.5, 0.125, 0.5, 0.75, 1]
    lonely = [entry("A", 1), entry("B", 2, 1), entry("C", 3), entry("D", 4), entry("E", 5)]
    assert win_rates(lonely, [A, B]) == [0, 0.25, 0.5, 0.75, 1]


def older_tool(scores: list[float]) -> list[float]:
    """What `cal_score` of the older recorder makes of one metric."""
    high, low = 0.0, 1.0
    for score in scores:
        high, low = max(score, high), min(score, low)
    return [(score - low) / (high - low) for score in scores]


def test_the_older_tools_sum() -> None:
    entries = [entry("x", 0.2, 30.0), entry("y", 0.5, 50.0), entry("z", 0.4, 10.0)]
    a, b = older_tool([0.2, 0.5, 0.4]), older_tool([30.0, 50.0, 10.0])
    assert min_max_sums(entries, [A, B]) == pytest.approx([p + q for p, q in zip(a, b, strict=True)])
    # By hand: min of b is 1, not 10, since it begins there.
    assert min_max_sums(entries, [A, B]) == pytest.approx([0 + 29 / 49, 1 + 1, 2 / 3 + 9 / 49])


def test_where_the_sum_differs_from_the_older_tools() -> None:
    alike = [entry("x", 0.4, 0.1), entry("y", 0.4, 0.3)]
    with pytest.raises(ZeroDivisionError):
        older_tool([0.4, 0.4])
    assert min_max_sums(alike, [A, B]) == [0, 1]
    lower = [entry("x", 0.1, 0.1, 1.5), entry("y", 0.3, 0.3, 3.0)]
    assert min_max_sums(lower, [C]) == pytest.approx([1 - 0.5 / 2, 0])


def test_the_sums_extremes_are_of_complete_entries_and_the_only_one_has_no_sum() -> None:
    """The older tool reads only rows that have all metrics."""
    complete = [entry("x", 0.5, 0.5), entry("y", 0.6, 0.4)]
    assert min_max_sums([*complete, entry("z", 0.0)], [A, B]) == [*min_max_sums(complete, [A, B]), None] == [1, 1, None]
    assert min_max_sums([entry("x", 0.1), entry("y", 0.3, 0.3)], [A, B]) == [None, None]
    (line,) = make([entry("x", 0.1, 0.2)], [A, B]).lines
    assert (line.rank, line.win_rate, line.min_max) == (None, None, None)


def test_a_mean_needs_all_values_and_one_direction() -> None:
    entries = [entry("x", 0.2, 0.4, 1.0), entry("y", 0.6)]
    assert mean_scores(entries, [A, B]) == [pytest.approx(0.3), None]
    assert mean_scores(entries, [A, C]) == [None, None]
    assert mean_scores(entries, [Column("a.EM", None)]) == [None, None]


def named(board: Board) -> list[tuple[str, int, int | None]]:
    return [(line.model, line.step, line.rank) for line in board.lines]


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ("last", [("y", 3, 1), ("x", 2, 2)]),
        ("best", [("x", 1, 1), ("y", 3, 2)]),
        ("all", [("x", 1, 1), ("y", 3, 2), ("x", 2, 3), ("y", 2, 4)]),
    ],
)
def test_last_best_or_all_steps(steps: Steps, wanted: list[tuple[str, int, int]]) -> None:
    entries = [entry("x", 0.9, step=1), entry("x", 0.2, step=2), entry("y", 0.1, step=2), entry("y", 0.5, step=3)]
    assert named(make(entries, [A], steps=steps)) == wanted


def test_the_best_step_is_one_with_all_metrics() -> None:
    entries = [entry("x", 0.9, step=1), entry("x", 0.2, 0.2, step=2), entry("y", 0.3, 0.3, step=1)]
    assert named(make(entries, [A, B], steps="best")) == [("y", 1, 1), ("x", 2, 2)]


def test_what_is_missing_is_named_and_no_zero() -> None:
    board = make([entry("x", 0.5), entry("y", 0.4, 0.1), Entry("z", 7, {})], [A, B, Column("nobody.EM")])
    assert [column.name for column in board.columns] == ["a.EM", "b.F1"]
    x, y = board.lines
    assert (x.missing, x.win_rate, x.min_max, x.mean) == (("b.F1",), 1.0, None, None)
    assert (y.missing, y.win_rate) == ((), 0.0)
    assert "no value at all, and so no place: z at step 7" in board.notes
    assert "no entry has a value, so these are no columns: nobody.EM" in board.notes


def test_ties_share_the_better_rank() -> None:
    board = make([entry("x", 1, 2), entry("y", 2, 1), entry("z", 0, 0)], [A, B])
    assert named(board) == [("x", 0, 1), ("y", 0, 1), ("z", 0, 3)]


def test_a_column_without_a_direction_counts_for_nobody_and_is_said() -> None:
    board = make([entry("x", 1), entry("y", 2)], [Column("a.EM", None)])
    assert [(line.rank, line.win_rate, line.min_max) for line in board.lines] == [(None, None, None)] * 2
    assert any("not known whether more is better" in note for note in board.notes)


def test_the_last_of_two_entries_counts() -> None:
    assert [line.values[0] for line in make([entry("x", 1), entry("x", 2)], [A]).lines] == [Value(2)]


def test_an_empty_board() -> None:
    assert make([], []) == Board()


# ---------------------------------------------------------------------- intervals


def test_sure_differences_have_sure_ranks_and_ties_none() -> None:
    sure = make([entry("x", 0.9, 0.9, stderr=0.01), entry("y", 0.5, 0.5, stderr=0.01)], [A, B])
    assert [(line.rank_low, line.rank_high) for line in sure.lines] == [(1, 1), (2, 2)]
    near = make([entry("x", 0.51, 0.5, stderr=0.1), entry("y", 0.5, 0.5, stderr=0.1)], [A, B])
    assert [(line.rank_low, line.rank_high) for line in near.lines] == [(1, 2), (1, 2)]


def test_an_unknown_error_is_not_none() -> None:
    """Whose error is unknown has no interval, and makes those of others wider."""
    entries = [entry("x", 0.9, stderr=0.01), entry("y", 0.5, stderr=0.01), entry("z", 0.1, stderr=None)]
    board = make(entries, [A])
    assert [(line.rank_low, line.rank_high) for line in board.lines] == [(1, 2), (2, 3), (None, None)]
    assert "rank without an interval: 1 of 3 entries have values of unknown error" in board.notes


def test_a_class_of_errors_counts_as_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, variances = [0.0, 0.1], [1e-8, 0.01]
    assert ranks.intervals(scores, variances) == [(1, 2), (1, 2)]
    monkeypatch.setattr(ranks, "CLASSES", 1)
    assert ranks.intervals(scores, variances) == [(1, 2), (1, 2)]


def test_the_same_board_twice() -> None:
    draw = random.Random(2)
    entries = [entry(str(i), draw.random(), draw.random(), stderr=0.2) for i in range(30)]
    assert make(entries, [A, B]) == make(entries, [A, B])


@pytest.mark.parametrize(("models", "columns", "gap"), [(2, 1, 0.05), (6, 3, 0.04), (25, 4, 0.02), (20, 1, 0.002)])
def test_intervals_cover_the_true_rank(models: int, columns: int, gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of true scores that are `gap` apart, measured with an error of 0.05; 95 % of intervals or more must hold the
    rank, and they must tell something."""
    monkeypatch.setattr(ranks, "MAX_DRAWS", 60)
    draw = random.Random(models)
    names = [Column(f"m{i}") for i in range(columns)]
    held = width = total = 0
    for _ in range(600 // models):
        entries = [
            Entry(f"{m:03d}", 0, {c.name: Value(draw.gauss(m * gap, 0.05), 0.05) for c in names}) for m in range(models)
        ]
        for line in make(entries, names).lines:
            assert line.rank_low is not None
            assert line.rank_high is not None
            held += line.rank_low <= models - int(line.model) <= line.rank_high
            width += line.rank_high - line.rank_low
            total += 1
    assert held / total >= 0.95
    assert width / total < 0.85 * (models - 1) or gap < 0.005


def test_percentiles_of_drawn_ranks_would_not_cover() -> None:
    """Why `ranks` does not do the obvious thing: near ties break such intervals, in the case that ours hold above."""
    draw, held, total = random.Random(4), 0, 0
    for _ in range(40):
        measured = [draw.gauss(m * 0.002, 0.05) for m in range(20)]
        places: list[list[int]] = [[] for _ in measured]
        for _ in range(100):
            drawn = [draw.gauss(value, 0.05) for value in measured]
            for place, i in enumerate(sorted(range(20), key=drawn.__getitem__, reverse=True), 1):
                places[i].append(place)
        for m, found in enumerate(places):
            found.sort()
            held += found[2] <= 20 - m <= found[97]
            total += 1
    assert held / total < 0.9


# ---------------------------------------------------------------------- what must hold of any board

Cells = st.lists(
    st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=3, max_size=3), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(Cells, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(cells: list[list[float | None]], shuffle: random.Random) -> None:
    entries, columns = [entry(str(i), *values) for i, values in enumerate(cells)], [A, B, C]
    board = make(entries, columns)
    shuffle.shuffle(entries)
    shuffle.shuffle(columns)
    again = make(entries, columns)
    assert named(board) == named(again)
    for old, new in zip(board.lines, again.lines, strict=True):
        assert (old.win_rate, old.min_max) == pytest.approx((new.win_rate, new.min_max))


@settings(max_examples=200, deadline=None)
@given(Cells)
def test_win_rates_add_up(cells: list[list[float | None]]) -> None:
    """In each column half of all comparisons are won; in one column the better value has the better rate."""
    for place, column in enumerate((A, B, C)):
        rates = win_rates([entry(str(i), *values) for i, values in enumerate(cells)], [column])
        there = [(values[place], rate) for values, rate in zip(cells, rates, strict=True) if values[place] is not None]
        if len(there) < 2:
            assert not any(rate is not None for rate in rates)
            continue
        assert sum(rate or 0.0 for _, rate in there) == pytest.approx(len(there) / 2)
        ordered = sorted(there, key=lambda pair: (pair[0] or 0.0), reverse=not column.higher_is_better)
        found = [rate for _, rate in ordered]
        assert found == sorted(found, key=lambda rate: rate or 0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.none() | st.sampled_from([0.0, 1e-4, 0.01])), min_size=2, max_size=40))
def test_intervals_hold_the_rank_and_count_what_is_sure(given: list[tuple[int, float | None]]) -> None:
    """The counting by classes gives nothing narrower than a look at each pair, and the same for equal variances."""
    scores, variances = [place / 20 for place, _ in given], [v for _, v in given]
    n = len(given)
    z = ranks.NormalDist().inv_cdf(1 - 0.05 / (2 * n))
    for i, found in enumerate(ranks.intervals(scores, variances)):
        mine = variances[i]
        if mine is None:
            assert found is None
            continue
        assert found is not None
        rank = 1 + sum(score > scores[i] for score in scores)
        assert found[0] <= rank <= found[1]
        far = [
            (scores[j] - scores[i]) / max(1e-12, (z * z * (mine + v) * n / (n - 1)) ** 0.5)
            for j, v in enumerate(variances) if v is not None and j != i
        ]  # fmt: skip
        exact = 1 + sum(d > 1 + 1e-9 for d in far), n - sum(d < -1 - 1e-9 for d in far)
        assert found[0] <= exact[0] <= exact[1] <= found[1]
        if n <= ranks.CLASSES:
            near = 1 + sum(d > 1 - 1e-9 for d in far), n - sum(d < -1 + 1e-9 for d in far)
            assert (found[0], -found[1]) >= (min(exact[0], near[0]), -max(exact[1], near[1]))


def test_ten_thousand_entries_of_twenty_metrics_take_seconds(tmp_path: Path) -> None:
    """200 models, 50 steps, 20 metrics: under 10 s of this process, with intervals of ranks and all files."""
    draw = random.Random(1)
    columns = [Column(f"b{i}.EM") for i in range(20)]
    entries = [
        Entry(str(model), step, {c.name: Value(draw.gauss(model / 500 + step / 300, 0.02), 0.02) for c in columns})
        for model in range(200) for step in range(50)
    ]  # fmt: skip
    before = time.process_time()
    board = make(entries, columns)
    board_files.write(board, tmp_path)
    assert time.process_time() - before < 10
    assert len(board.lines) == 10_000
    assert all((line.rank_low or 0) <= (line.rank or 0) <= (line.rank_high or 0) for line in board.lines)
