"""The statistics of a comparison against scipy, and against what a simulation finds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval_runner.results import pairs
from tests.results_samples import score


def by_id(values: list[float]) -> dict[str, float]:
    return {f"id{i}": float(v) for i, v in enumerate(values)}


@pytest.mark.parametrize(("p", "freedom"), [(0.025, 1), (0.025, 9), (0.2, 3), (0.2, 200), (0.005, 2)])
def test_students_quantile(p: float, freedom: int) -> None:
    assert pairs.t_upper(p, freedom) == pytest.approx(stats.t.isf(p, freedom), rel=1e-8)


def test_the_paired_t_test_with_its_interval() -> None:
    draw = np.random.default_rng(1)
    old, new = draw.normal(0, 1, 40), draw.normal(0.3, 1, 40)
    found = pairs.by_pairs(by_id(list(old)), by_id(list(new)))
    assert found is not None
    assert found.interval is not None
    wanted = stats.ttest_rel(new, old)
    assert found.difference.p == pytest.approx(wanted.pvalue, rel=1e-8)
    assert found.interval == pytest.approx((wanted.confidence_interval().low, wanted.confidence_interval().high))


def test_mcnemars_test_is_the_binomial_one() -> None:
    old, new = [1] * 30 + [0] * 12 + [1] * 3 + [0] * 5, [1] * 30 + [1] * 12 + [0] * 3 + [0] * 5
    found = pairs.by_pairs(by_id(old), by_id(new))
    assert found is not None
    assert found.interval is not None
    assert (found.difference.test, found.difference.value) == ("McNemar", pytest.approx(9 / 50))
    assert found.difference.p == pytest.approx(stats.binomtest(12, 15).pvalue)
    # (13 - 4) / 52 = 0.1731, and 1.96 sqrt((17 / 52 - 0.1731²) / 52) = 0.1481
    assert found.interval == pytest.approx((0.02495, 0.32120), abs=1e-4)


def test_answers_that_are_all_alike_have_no_interval_that_says_so() -> None:
    found = pairs.by_pairs(by_id([0.25] * 9), by_id([0.5] * 9))
    assert found is not None
    assert (found.interval, found.detectable) == (None, None)
    none_changed = pairs.by_pairs(by_id([1, 0, 1]), by_id([1, 0, 1]))
    assert none_changed is not None
    assert (none_changed.detectable, none_changed.difference.p) == (None, 1)


def test_the_unpaired_difference_needs_both_errors() -> None:
    found = pairs.by_errors(score(0.5, 0.03), score(0.6, 0.04))
    assert found is not None
    assert found.interval == pytest.approx((0.1 - 1.96 * 0.05, 0.1 + 1.96 * 0.05), abs=1e-4)
    assert found.detectable == pytest.approx((1.95996 + 0.84162) * 0.05, abs=1e-5)
    assert pairs.by_errors(score(0.5), score(0.6, 0.04)) is None


@pytest.mark.parametrize("n", [12, 60])
def test_the_t_test_finds_a_detectable_difference_four_times_in_five(n: int) -> None:
    draw = np.random.default_rng(n)
    old = draw.normal(0, 1, n)
    found = pairs.by_pairs(by_id(list(old)), by_id(list(old + draw.normal(0, 1, n))))
    assert found is not None
    assert found.detectable is not None
    shift = found.detectable / (found.difference.stderr * math.sqrt(n))
    t, centre = stats.t.isf(0.025, n - 1), shift * math.sqrt(n)
    power = stats.nct.sf(t, n - 1, centre) + stats.nct.cdf(-t, n - 1, centre)
    assert power == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize(("changed", "n"), [(0.2, 300), (0.4, 150), (0.1, 1000)])
def test_mcnemar_finds_a_detectable_difference_four_times_in_five(changed: float, n: int) -> None:
    d = pairs.mcnemar_detectable(changed, n)
    assert d is not None
    draw = np.random.default_rng(7)
    counts = draw.multinomial(n, [(changed + d) / 2, (changed - d) / 2, 1 - changed], size=4000)
    ups, downs = counts[:, 0], counts[:, 1]
    found = np.mean([stats.binom.cdf(min(u, v), u + v, 0.5) * 2 < 0.05 for u, v in zip(ups, downs, strict=True)])
    assert 0.72 < found < 0.84      # the exact test finds a little less


def test_where_not_even_all_changes_one_way_would_be_found() -> None:
    assert pairs.mcnemar_detectable(0.02, 100) is None      # two changes: p is 0.5 at best
    assert pairs.mcnemar_detectable(0.0, 100) is None
    assert pairs.mcnemar_detectable(0.2, 100) is not None


def test_mcnemars_interval_covers() -> None:
    draw = np.random.default_rng(3)
    counts = draw.multinomial(80, [0.15, 0.05, 0.8], size=2000)
    ends = [pairs.mcnemar_interval(int(u), int(d), 80) for u, d, _ in counts]
    assert np.mean([low <= 0.1 <= high for low, high in ends]) == pytest.approx(0.955, abs=0.02)


def test_the_bootstrap_agrees_with_the_t_test_on_many_values_and_is_the_same_twice() -> None:
    draw = random.Random(5)
    old = by_id([draw.gauss(0, 1) for _ in range(150)])
    new = {i: v + draw.gauss(0.16, 1) for i, v in old.items()}
    plain, first = pairs.by_pairs(old, new), pairs.by_pairs(old, new, resampled=True)
    assert plain is not None
    assert first is not None
    assert first.difference.test == "bootstrap"
    assert first.difference.p != plain.difference.p
    assert first.difference.p == pytest.approx(plain.difference.p, abs=0.02)
    assert first.interval == pytest.approx(plain.interval, abs=0.02)
    assert pairs.by_pairs(old, new, resampled=True) == first


Ps = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(Ps)
def test_benjamini_and_hochberg_as_scipy_has_it(ps: list[float]) -> None:
    assert pairs.benjamini_hochberg(ps) == pytest.approx(stats.false_discovery_control(ps, method="bh"))


def test_holm_by_hand() -> None:
    assert pairs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert pairs.holm([0.9, 0.8]) == [1.0, 1.0]


@settings(max_examples=100)
@given(Ps)
def test_holm_rejects_what_the_steps_reject(ps: list[float]) -> None:
    """Holm's own procedure: the k-th smallest is rejected while it is below 0.05 / (m - k + 1)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    rejected = set()
    for place, i in enumerate(order):
        if ps[i] * (len(ps) - place) >= 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(pairs.holm(ps)) if p < 0.05} == rejected
