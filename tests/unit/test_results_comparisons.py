from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from eval_runner.results.comparisons import Latest, latest
from eval_runner.results.schema import Instance, Result, Score
from eval_runner.results.series import judge_changes, rows
from eval_runner.results.statistics import mean_stderr, ratio_stderr, ratio_values
from eval_runner.results.store import ResultError
from tests.results_samples import T0, digest, instances_of, result, score

Given = dict[int, list[Instance]]


def answered(values: Sequence[float], **names: object) -> tuple[Score, list[Instance]]:
    value, stderr = mean_stderr(values)
    s = score(value, stderr, n=len(values), **names)  # type: ignore[arg-type]
    return s, instances_of(s, values)


def compare(results: Sequence[Result], given: Given) -> list[Latest]:
    def instances(r: Result) -> Iterable[Instance]:
        return given[r.step]

    found, problems = latest(rows(results), instances)
    assert problems == []
    return found


def runs_of(*steps: Sequence[float], **names: object) -> tuple[list[Result], Given]:
    """One result a step (1, 2, …) with these per-instance values."""
    results, given = [], {}
    for step, values in enumerate(steps, 1):
        s, given[step] = answered(values, **names)
        results.append(result(step, s))
    return results, given


RIGHT, WRONG = [1.0] * 20, [0.0] * 20


def test_a_first_checkpoint_has_nothing_to_be_compared_with() -> None:
    (found,) = compare(*runs_of(RIGHT))
    assert (found.previous, found.best) == (None, None)


def test_a_regression_an_improvement_and_noise() -> None:
    (fell,) = compare(*runs_of(RIGHT, WRONG))
    (rose,) = compare(*runs_of(WRONG, RIGHT))
    (noise,) = compare(*runs_of(RIGHT, [0.0, *RIGHT[1:]]))
    verdicts = [item.previous.verdict for item in (fell, rose, noise) if item.previous]
    assert verdicts == ["worse", "better", "within noise"]


@pytest.mark.parametrize(("higher", "best_step", "verdict"), [(True, 2, "worse"), (False, 1, "worse")])
def test_the_best_is_by_the_scores_direction(higher: bool, best_step: int, verdict: str) -> None:
    half = [1.0, 0.0] * 10
    last = WRONG if higher else RIGHT
    first, second = (half, RIGHT) if higher else (WRONG, half)
    (found,) = compare(*runs_of(first, second, half, last, higher=higher))
    assert found.best is not None
    assert found.previous is not None
    assert (found.best.against.result.step, found.best.verdict) == (best_step, verdict)
    assert found.previous.against.result.step == 3


def test_without_a_direction_there_is_no_best_and_no_better() -> None:
    (found,) = compare(*runs_of(WRONG, RIGHT, higher=None))
    assert found.best is None
    assert found.previous is not None
    assert found.previous.verdict == "higher"


def test_pairing_finds_what_the_errors_alone_would_not() -> None:
    """Every text got easier by about 2 %: far within each score's error, and yet certain."""
    b = [100.0 + i for i in range(30)]
    old = [x * (1 + i % 7) for i, x in enumerate(b)]
    new = [a * (0.98 + 0.001 * (i % 3)) for i, a in enumerate(old)]
    results, given = [], {}
    for step, a in ((1, old), (2, new)):
        value, stderr = ratio_stderr(a, b)
        s = score(value, stderr, n=30, metric="bits_per_byte", higher=False)
        results.append(result(step, s))
        given[step] = instances_of(s, ratio_values(a, b))
    (found,) = compare(results, given)
    assert found.previous is not None
    difference = found.previous.difference
    assert difference is not None
    assert difference.value == pytest.approx(results[1].scores[0].value - results[0].scores[0].value)
    assert (found.previous.verdict, difference.test) == ("better", "paired t")
    (unpaired,) = compare(results, {1: [], 2: []})
    assert unpaired.previous is not None
    assert unpaired.previous.verdict == "within noise"
    assert "no per-instance values" in unpaired.previous.note


def test_instances_that_a_score_is_not_the_mean_of_are_not_tested_for_it() -> None:
    """A metric that is no mean (an F1 over all, say): a test of the instances' mean would not be one of it."""
    results = [result(step, score(value, 0.01)) for step, value in ((1, 0.70), (2, 0.71))]
    given = {step: instances_of(score(0.0), values) for step, values in ((1, WRONG), (2, RIGHT))}
    (found,) = compare(results, given)
    assert found.previous is not None
    assert found.previous.difference is not None
    assert (found.previous.difference.test, found.previous.verdict) == ("unpaired", "within noise")


def test_without_any_error_nothing_is_called() -> None:
    (found,) = compare([result(1, score(0.1)), result(2, score(0.9))], {1: [], 2: []})
    assert found.previous is not None
    assert (found.previous.difference, found.previous.verdict) == (None, "not tested")


def test_unreadable_instances_are_reported_once_and_the_rest_goes_on() -> None:
    results, given = runs_of(WRONG, RIGHT, RIGHT)

    def torn(r: Result) -> Iterable[Instance]:
        yield from given[r.step][:3]
        if r.step == 2:
            raise ResultError("instances of step 2 are torn")

    (found,), problems = latest(rows(results), torn)
    assert problems == ["instances of step 2 are torn"]
    assert found.previous is not None
    assert found.previous.note


def test_a_run_is_compared_within_its_own_last_definition_of_the_suite() -> None:
    old, new = digest("old"), digest("new")
    s, t = score(0.9, 0.01), score(0.2, 0.01)
    results = [
        result(1, s, suite_digest=old, finished=T0 + 1), result(2, s, suite_digest=old, finished=T0 + 2),
        result(2, t, suite_digest=new, finished=T0 + 3),
        result(1, s, run="earlier", suite_digest=old, finished=T0),
    ]  # fmt: skip
    found, _ = latest(rows(results), lambda r: [])
    assert [(i.row.run, i.row.suite, i.row.score.value, i.previous) for i in found] == [
        ("demo", "quick", 0.2, None),
        ("earlier", f"quick@{old[:8]}", 0.9, None),
    ]


def test_a_superseded_checkpoint_is_not_compared_with() -> None:
    results = [
        result(1, score(0.9, 0.01), checkpoint_digest=digest("gone"), finished=T0 + 1),
        result(1, score(0.5, 0.01), checkpoint_digest=digest("kept"), finished=T0 + 2),
        result(2, score(0.7, 0.01), finished=T0 + 3),
    ]
    (found,), _ = latest(rows(results), lambda r: [])
    assert found.best is not None
    assert found.best.against.score.value == 0.5


def by(judge: str, r: Result) -> Result:
    (e,) = r.evaluations
    return replace(r, evaluations=(replace(e, versions={"judge": judge} if judge else {}),))


def test_scores_by_two_judges_are_not_compared() -> None:
    results, given = runs_of(RIGHT, RIGHT, WRONG, WRONG)
    (found,) = compare([by(judge, r) for judge, r in zip("aabb", results, strict=True)], given)
    assert found.previous is not None
    assert found.best is not None
    assert found.previous.verdict == "within noise"
    assert found.best.against.result.step == 3          # the best by the same judge
    (first,) = compare([by(judge, r) for judge, r in zip("aab", results[:3], strict=True)], given)
    for comparison, step in ((first.previous, 2), (first.best, 1)):
        assert comparison is not None
        assert (comparison.difference, comparison.verdict) == (None, "not tested")
        assert comparison.note == "the judge changed: a → b"
        assert comparison.against.result.step == step


def test_anchors_are_compared_between_judges() -> None:
    results, given = runs_of(RIGHT, WRONG, benchmark="general.judge_anchors")
    (found,) = compare([by(judge, r) for judge, r in zip("ab", results, strict=True)], given)
    assert found.previous is not None
    assert found.previous.verdict == "worse"


def test_a_judge_that_comes_or_goes_is_a_change() -> None:
    results = runs_of(RIGHT, RIGHT, RIGHT)[0]
    table = rows([by(judge, r) for judge, r in zip(("", "a", "b"), results, strict=True)])
    changes = judge_changes(table)
    assert {step: change for (_, _, step), change in changes.items()} == {2: "none → a", 3: "a → b"}
