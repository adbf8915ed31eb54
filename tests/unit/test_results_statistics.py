from __future__ import annotations

import math
import random

import pytest

from eval_runner.results import statistics as st


def test_mean_and_its_error_of_known_numbers() -> None:
    mean, stderr = st.mean_stderr([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert mean == 5.0
    assert stderr == pytest.approx(math.sqrt(32 / 7 / 8), rel=1e-14)


def test_the_error_of_one_value_is_unknown_and_the_mean_of_none_does_not_exist() -> None:
    assert st.mean_stderr([3.0]) == (3.0, None)
    with pytest.raises(ValueError, match="no values"):
        st.mean_stderr([])


def test_a_ratio_is_that_of_the_sums_not_the_mean_of_ratios() -> None:
    ratio, stderr = st.ratio_stderr([10.0, 90.0], [10.0, 30.0])
    assert ratio == 100 / 40                       # the mean of 1 and 3 would be 2
    # residuals 10 - 25 = -15 and 90 - 75 = 15: sqrt(2/1 * 450) / 40
    assert stderr == pytest.approx(30 / 40, rel=1e-14)


def test_a_ratio_with_equal_denominators_has_the_error_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    assert st.ratio_stderr([v * 3 for v in values], [3.0] * 4) == pytest.approx(st.mean_stderr(values), rel=1e-14)


def test_the_ratio_error_is_what_resampling_finds() -> None:
    rng = random.Random(1)
    pairs = []
    for _ in range(200):
        size = rng.uniform(50, 500)
        pairs.append((size * rng.gauss(2.0, 0.3), size))
    _, stderr = st.ratio_stderr([a for a, _ in pairs], [b for _, b in pairs])
    ratios = []
    for _ in range(2000):
        again = rng.choices(pairs, k=len(pairs))
        ratios.append(sum(a for a, _ in again) / sum(b for _, b in again))
    spread = math.sqrt(sum((r - sum(ratios) / 2000) ** 2 for r in ratios) / 1999)
    assert stderr == pytest.approx(spread, rel=0.08)


def test_the_values_of_a_ratio_have_its_value_and_error_also_for_a_difference() -> None:
    b = [10.0, 20.0, 40.0, 15.0]
    old, new = [21.0, 37.0, 90.0, 33.0], [19.0, 35.0, 88.0, 28.0]
    assert st.mean_stderr(st.ratio_values(old, b)) == pytest.approx(st.ratio_stderr(old, b), rel=1e-12)
    change = [y - x for x, y in zip(st.ratio_values(old, b), st.ratio_values(new, b), strict=True)]
    wanted = st.ratio_stderr([y - x for x, y in zip(old, new, strict=True)], b)
    assert st.mean_stderr(change) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [0.0]), ([1.0, 1.0], [1.0, -2.0])])
def test_a_ratio_over_nothing_is_an_error(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="ratio of no instances"):
        st.ratio_stderr(a, b)


def test_wilson_by_its_definition() -> None:
    # The bounds p solve |p - x| = z sqrt(p (1 - p) / n): put them back in.
    for right, n in ((7, 20), (1, 10), (99, 100)):
        for p in st.wilson(right / n, n):
            assert abs(p - right / n) == pytest.approx(st.Z95 * math.sqrt(p * (1 - p) / n), rel=1e-12)
    assert st.wilson(0.0, 20) == (0.0, pytest.approx(st.Z95**2 / (20 + st.Z95**2)))
    assert st.wilson(1.0, 20)[1] == 1.0


def test_an_interval_knows_a_proportion_by_its_error() -> None:
    answers = [1.0] * 7 + [0.0] * 13
    value, stderr = st.mean_stderr(answers)
    assert st.interval(value, stderr, 20) == st.wilson(0.35, 20)
    assert st.interval(0.0, 0.0, 20) == st.wilson(0.0, 20)
    value, stderr = st.mean_stderr([0.3, 0.4, 0.35, 0.35])
    assert stderr is not None
    assert st.interval(value, stderr, 4) == (value - st.Z95 * stderr, value + st.Z95 * stderr)
    assert st.interval(3.2, 0.1, 50) == (3.2 - st.Z95 * 0.1, 3.2 + st.Z95 * 0.1)
    assert st.interval(3.2, None, 1) is None


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (1.0, 1, 0.5), (12.70620474, 1, 0.05), (4.30265273, 2, 0.05), (2.57058184, 5, 0.05),
        (3.24983554, 9, 0.01), (2.09302405, 19, 0.05), (2.62640546, 99, 0.01), (0.0, 7, 1.0),
    ],
)  # fmt: skip
def test_student_t_against_published_quantiles(t: float, freedom: int, p: float) -> None:
    assert st.t_two_sided(t, freedom) == pytest.approx(p, rel=1e-7)
    assert st.t_two_sided(-t, freedom) == st.t_two_sided(t, freedom)


def test_student_t_tends_to_the_normal_distribution() -> None:
    assert st.t_two_sided(st.Z95, 10**6) == pytest.approx(0.05, rel=1e-4)


def test_sign_test_by_counting_all_outcomes() -> None:
    for n in range(9):
        for ups in range(n + 1):
            extreme = min(ups, n - ups)
            tail = sum(1 for flips in range(2**n) if flips.bit_count() <= extreme) / 2**n
            assert st.sign_test(ups, n - ups) == pytest.approx(min(1.0, 2 * tail), rel=1e-14)
    assert st.sign_test(3000, 2000) < 1e-40


def by_id(values: list[float]) -> dict[str, float]:
    return {f"id{i}": v for i, v in enumerate(values)}


def test_right_and_wrong_answers_are_compared_by_mcnemar() -> None:
    old = [1.0] * 5 + [0.0] * 15
    new = [1.0] * 4 + [0.0] + [1.0] * 8 + [0.0] * 7         # one lost, eight won
    found = st.paired(by_id(old), by_id(new))
    assert found is not None
    assert (found.test, found.n, found.value) == ("McNemar", 20, pytest.approx(0.35))
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert found.verdict(True) == "better"
    assert found.verdict(False) == "worse"
    assert found.verdict(None) == "higher"


def test_values_are_compared_by_paired_t() -> None:
    old, new = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.4, 2.3, 3.7, 4.2, 5.8, 6.6]
    found = st.paired(by_id(old), by_id(new))
    assert found is not None
    differences = [0.4, 0.3, 0.7, 0.2, 0.8, 0.6]
    mean = sum(differences) / 6
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / 5 / 6)
    assert (found.test, found.value, found.stderr) == ("paired t", pytest.approx(mean), pytest.approx(stderr))
    assert 0.002 < found.p < 0.01        # t = 5.0 with 5 degrees: between the 1 % (4.03) and 0.1 % (6.87) points
    assert found.verdict(False) == "worse"


def test_only_instances_that_both_have_are_paired() -> None:
    old = {"a": 1.0, "b": 2.0, "c": 3.5, "gone": 100.0}
    new = {"a": 1.5, "b": 2.4, "c": 4.1, "new": -100.0}
    found = st.paired(old, new)
    assert found is not None
    assert (found.n, found.value) == (3, pytest.approx(0.5))
    assert st.paired({"a": 1.0}, {"a": 2.0}) is None
    assert st.paired({"a": 1.0, "b": 0.0}, {"c": 2.0, "d": 1.0}) is None


def test_no_change_and_a_change_that_is_the_same_everywhere() -> None:
    same = st.paired(by_id([0.5, 1.5, 2.5]), by_id([0.5, 1.5, 2.5]))
    assert same is not None
    assert (same.value, same.p, same.verdict(True)) == (0.0, 1.0, "within noise")
    few = st.paired(by_id([0.5, 1.5, 2.5]), by_id([1.5, 2.5, 3.5]))
    assert few is not None
    assert (few.p, few.verdict(True)) == (0.25, "within noise")
    many = st.paired(by_id([0.1 * i for i in range(20)]), by_id([0.1 * i + 0.3 for i in range(20)]))
    assert many is not None
    assert many.p == pytest.approx(2**-19)
    assert many.verdict(None) == "higher"


def test_noise_is_called_a_difference_as_often_as_the_level_says() -> None:
    """Half of the verdicts on pure noise would fail this, and so would a test that never finds anything."""
    rng = random.Random(7)
    called = real = 0
    for _ in range(2000):
        old = [rng.gauss(0, 1) for _ in range(20)]
        called += _verdict(old, [v + rng.gauss(0, 1) for v in old]) != "within noise"
        real += _verdict(old, [v + rng.gauss(1, 1) for v in old]) == "better"
    assert 0.03 < called / 2000 < 0.07
    assert real / 2000 > 0.95


def _verdict(old: list[float], new: list[float]) -> str:
    found = st.paired(by_id(old), by_id(new))
    assert found is not None
    return found.verdict(True)


def test_unpaired_scores_by_both_errors() -> None:
    found = st.unpaired(0.5, 0.03, 0.6, 0.04, 50)
    assert found is not None
    assert (found.value, found.stderr, found.n) == (pytest.approx(0.1), pytest.approx(0.05), 50)
    assert found.p == pytest.approx(0.0455002638963584, rel=1e-9)      # two standard errors
    assert found.verdict(True) == "better"
    assert st.unpaired(0.5, 0.0, 0.6, 0.0, 50) is None


@pytest.mark.parametrize("n", [7, 20, 100, 101, 12345])
def test_the_interval_of_none_and_of_all_ends_where_it_must(n: int) -> None:
    assert st.wilson(0.0, n)[0] == 0.0
    assert st.wilson(1.0, n)[1] == 1.0
    assert 0 < st.wilson(0.0, n)[1] == pytest.approx(1 - st.wilson(1.0, n)[0])
