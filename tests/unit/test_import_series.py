"""Imports that can be compared form one series, and others do not, in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_runner.results import store
from eval_runner.results.importing.base import Found
from eval_runner.results.importing.publish import Imports, remove
from eval_runner.results.schema import Result
from tests import results_samples
from tests.unit.test_import_publish import found


def bring(root: Path, *all_of_them: Found) -> dict[int, Result]:
    """The imports by step."""
    for one in all_of_them:
        assert Imports(root).take(one, Path("/from"), None).state == "imported"
    return {r.step: r for r in store.imported(root)[0]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return results_samples.queue(tmp_path / "queue")


def test_what_contradicts_a_definition_founds_another(root: Path) -> None:
    brought = bring(
        root, found(10, a=0.1), found(20, a=0.1, b=0.1, shots=0), found(30, b=0.2, shots=0), found(40, a=0.3)
    )
    definition = {step: r.suite_digest for step, r in brought.items()}
    assert definition[10] == definition[40] != definition[20]
    assert definition[30] == definition[20]


def test_what_has_no_benchmark_in_common_joins_its_run_or_founds_its_own(root: Path) -> None:
    brought = bring(
        root, found(10, a=0.1), found(20, run="n", a=0.1, shots=0), found(30, b=0.1), found(40, run="n", c=0.1),
        found(50, run="o", d=0.1),
    )  # fmt: skip
    definition = {step: r.suite_digest for step, r in brought.items()}
    assert definition[10] == definition[30]
    assert definition[20] == definition[40]
    assert len({definition[10], definition[20], definition[50]}) == 3


def test_what_has_no_benchmark_in_common_joins_the_only_series(root: Path) -> None:
    assert len({r.suite_digest for r in bring(root, found(10, a=0.1), found(20, run="n", b=0.1)).values()}) == 1


ONE_BY_ONE = [(step, name, shots) for step, name in enumerate("abcab", 1) for shots in (0, 5)]


@given(st.permutations(ONE_BY_ONE))
def test_benchmarks_that_come_one_by_one_are_compared_in_any_order(order: Iterable[tuple[int, str, int]]) -> None:
    """Where each import has one benchmark: all that were evaluated in one way share a series, and no others do."""
    dry = Imports(Path("/nowhere"), dry=True)
    series: dict[tuple[str, int], set[str]] = {}
    for step, name, shots in order:
        outcome = dry.take(found(step, run=f"r{step % 3}", shots=shots, **{name: 0.5}), Path("/from"), None)
        assert outcome.state == "imported"
        assert outcome.result is not None
        series.setdefault((name, shots), set()).add(outcome.result.suite_digest)
    assert {len(digests) for digests in series.values()} == {1}
    assert all(series[name, 0] != series[name, 5] for name in "abc")


def test_a_series_that_lost_its_founder_is_not_founded_again_by_what_contradicts_it(root: Path) -> None:
    first = bring(root, found(10, a=0.1), found(20, b=0.1))[10]
    remove(root, first.ticket)
    bring(root, found(40, a=0.1, shots=0))      # joins b
    again = bring(root, found(10, a=0.1))
    assert again[10].suite_digest != again[40].suite_digest


def test_a_benchmark_stands_once_whatever_series_it_is_in(root: Path) -> None:
    """Several series may have a benchmark in common: a checkpoint's score of it is in one of them."""
    bring(root, found(10, a=0.1), found(20, b=0.1, shots=0))
    both = found(10, a=0.1, b=0.1)           # contradicts that series
    assert Imports(root).take(both, Path("/from"), None).why.startswith("replaces")
    assert sorted((r.step, len(r.scores)) for r in store.imported(root)[0]) == [(10, 2), (20, 1)]
