"""From reviews to scores: by hand where a hand suffices, else against scipy and simulated judges."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import length
from eval_runner.evaluators.gpt.records import Answer, Judged, Question, Review
from eval_runner.evaluators.gpt.scoring import outcome, preference, scores
from eval_runner.results import bootstrap
from eval_runner.results.schema import Instance, Score
from eval_runner.results.statistics import bounds, mean_stderr, wilson

Points = tuple[float, float]
REFUSED = Review("refused", (), "I cannot judge this.", "judge")


def review(*points: float) -> Review:
    return Review("ok", points, "…", "judge")


def pair(
    number: int, first: Points | None, second: Points | None, *, category: str = "writing", ours: int = 100,
    theirs: int = 100,
) -> Judged:  # fmt: skip
    """A question whose reviews gave (ours, theirs), whichever was shown first; None for one that was refused. The
    answers have so many characters."""
    return Judged(
        Question(number, "?", category), Answer(number, "m", "x" * ours), Answer(number, "b", "y" * theirs),
        (review(*first) if first else REFUSED, review(*second[::-1]) if second else REFUSED),
    )  # fmt: skip


def single(number: int, points: float | None, category: str = "writing") -> Judged:
    reviews = (review(points) if points else REFUSED,)
    return Judged(Question(number, "?", category), Answer(number, "m", "x" * number), None, reviews)


def by_name(found: Sequence[Score]) -> dict[tuple[str, str], Score]:
    assert len({(s.benchmark, s.metric) for s in found}) == len(found)
    assert {s.split for s in found} == {"test"}
    return {(s.benchmark, s.metric): s for s in found}


# ---------------------------------------------------------------------- by hand

WIN, TIE, LOSS = (9.0, 4.0), (5.0, 5.0), (2.0, 8.0)
HAND = [
    pair(1, WIN, WIN, ours=10),
    pair(2, WIN, TIE, ours=20),
    pair(3, WIN, LOSS, ours=130),
    pair(4, TIE, LOSS, ours=140, category="maths"),
    pair(5, WIN, None, ours=5000, category="maths"),
]


def test_each_score_by_hand() -> None:
    found = by_name(scores(HAND, "general", "pairwise")[0])
    overall = {metric: s for (benchmark, metric), s in found.items() if benchmark == "general"}
    assert {metric: s.value for metric, s in overall.items() if metric != "win_rate_lc"} == {
        "win_rate": (1 + 0.75 + 0.5 + 0.25) / 4,
        "score": (9 + 7 + 5.5 + 3.5) / 4,
        "baseline_score": (4 + 4.5 + 6 + 6.5) / 4,
        "wins": 0.5, "ties": 0.25, "losses": 0.25,
        "position_consistency": 0.25,
        "answer_length": 75.0,
        "unreviewed": 0.2,
    }  # fmt: skip
    assert {metric: s.higher_is_better for metric, s in overall.items()} == {
        "win_rate": True, "win_rate_lc": True, "score": True, "baseline_score": None, "wins": True, "ties": None,
        "losses": False, "position_consistency": None, "answer_length": None, "unreviewed": False,
    }  # fmt: skip
    assert {metric: s.n for metric, s in overall.items() if s.n != 4} == {"unreviewed": 5}
    assert overall["win_rate"].stderr == mean_stderr([1, 0.75, 0.5, 0.25])[1]
    assert found["general.writing", "win_rate"].value == 0.75
    assert found["general.maths", "unreviewed"].value == 0.5
    assert {benchmark for benchmark, _ in found} == {"general", "general.writing", "general.maths"}


def test_a_category_with_one_reviewed_question_has_its_scores_without_an_error() -> None:
    found = by_name(scores(HAND, "general", "pairwise")[0])
    rate = found["general.maths", "win_rate"]
    assert (rate.value, rate.n, rate.stderr, rate.low, rate.high) == (0.25, 1, None, None, None)
    assert ("general.maths", "win_rate_lc") not in found        # one question tells nothing of lengths


def test_one_category_is_no_score_of_its_own_and_a_slash_makes_no_level() -> None:
    assert {s.benchmark for s in scores([pair(1, WIN, WIN), pair(2, WIN, LOSS)], "set", "pairwise")[0]} == {"set"}
    two = [pair(1, WIN, WIN, category="a/b"), pair(2, WIN, LOSS, category="common sense")]
    assert {s.benchmark for s in scores(two, "set", "pairwise")[0]} == {"set", "set.a_b", "set.common_sense"}
    two = [pair(1, WIN, WIN, category="数学"), pair(2, WIN, LOSS, category="文章")]
    assert {s.benchmark for s in scores(two, "set", "pairwise")[0]} == {"set", "set.数学", "set.文章"}


def test_a_category_without_a_reviewed_question_says_only_that() -> None:
    found = by_name(scores([*HAND, pair(6, None, None, category="law")], "general", "pairwise")[0])
    assert [(m, s.value, s.n) for (b, m), s in found.items() if b == "general.law"] == [("unreviewed", 1.0, 1)]


def test_single_and_reference_have_the_judges_points() -> None:
    judged = [single(10, 3.0), single(20, 8.0), single(30, None), single(40, 4.0, "maths")]
    for mode in ("single", "reference"):
        found, instances = scores(judged, "general", mode)  # type: ignore[arg-type]
        overall = [(s.metric, s.value, s.n) for s in found if s.benchmark == "general"]
        assert overall == [("score", 5.0, 3), ("answer_length", 70 / 3, 3), ("unreviewed", 0.25, 4)]
        assert [i.value for i in instances if (i.benchmark, i.metric) == ("general", "score")] == [3.0, 8.0, 4.0]


def test_no_reviewed_question_is_an_error_and_never_a_zero() -> None:
    for judged, mode in (([pair(1, None, WIN)], "pairwise"), ([single(1, None)], "single"), ([], "single")):
        with pytest.raises(ConfigError, match=rf"general: none of its {len(judged)} questions was reviewed"):
            scores(judged, "general", mode)  # type: ignore[arg-type]


def test_no_reviewed_question_quotes_a_reply_shortened() -> None:
    long = Review("unparsable", (), "I think\nthat " + "both " * 50, "judge")
    judged = replace(pair(1, WIN, None), reviews=(review(9.0, 4.0), long))
    with pytest.raises(ConfigError) as caught:
        scores([judged], "general", "pairwise")
    quoted = ("I think that " + "both " * 50)[:120]
    assert str(caught.value) == (
        "general: none of its 1 questions was reviewed: the judge refused, or its replies cannot be parsed, such as "
        f"'{quoted}…'; mend the prompt file or choose another judge"
    )
    with pytest.raises(ConfigError, match=r"cannot be parsed, such as 'I cannot judge this\.'; mend"):
        scores([pair(1, None, None)], "general", "pairwise")


def test_reviews_that_do_not_fit_the_mode_are_an_error() -> None:
    for judged, mode in (([single(1, 5.0)], "pairwise"), ([pair(1, WIN, WIN)], "single")):
        with pytest.raises(ValueError, match="unpack"):
            scores(judged, "general", mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "rate", "word"),
    [(WIN, WIN, 1, "win"), (WIN, TIE, 0.75, "win"), (LOSS, WIN, 0.5, "tie"), (TIE, TIE, 0.5, "tie"),
     (TIE, LOSS, 0.25, "loss"), (LOSS, LOSS, 0, "loss")],
)  # fmt: skip
def test_a_question_is_won_by_both_orders_together(first: Points, second: Points, rate: float, word: str) -> None:
    judged = pair(1, first, second)
    assert (preference(judged), outcome(judged)) == (rate, word)


def test_a_judge_that_prefers_the_first_place_decides_nothing() -> None:
    first_wins = [pair(i, WIN, LOSS) for i in range(20)]
    found = by_name(scores(first_wins, "general", "pairwise")[0])
    assert found["general", "win_rate"].value == 0.5
    assert found["general", "ties"].value == 1
    assert found["general", "position_consistency"].value == 0


# ---------------------------------------------------------------------- instances


def test_the_mean_of_the_instances_is_the_score_and_their_error_its_error() -> None:
    found, instances = scores(simulated(60, seed=1, unreviewed=7), "general", "pairwise")
    for s in found:
        mine = [i for i in instances if (i.benchmark, i.metric, i.split) == (s.benchmark, s.metric, s.split)]
        value, stderr = mean_stderr([i.value for i in mine])
        assert (len(mine), len({i.id for i in mine})) == (s.n, s.n)
        assert value == s.value
        assert stderr == s.stderr
    assert {i.id for i in instances if i.metric == "unreviewed"} == {str(n) for n in range(60)}


def test_the_order_of_the_questions_does_not_matter_and_the_seed_does() -> None:
    judged = simulated(40, seed=2)
    once = scores(judged, "general", "pairwise")
    assert scores(judged[::-1], "general", "pairwise") == once
    other = scores(judged, "general", "pairwise", seed=1)
    assert other[1] == once[1]
    assert by_name(other[0])["general", "answer_length"].low != by_name(once[0])["general", "answer_length"].low


def test_eighty_questions_in_eight_categories_take_no_time() -> None:
    judged = [replace(j, question=replace(j.question, category=f"c{i % 8}")) for i, j in enumerate(simulated(80))]
    started = time.process_time()
    found, _ = scores(judged, "general", "pairwise")
    assert len(found) == 9 * 10
    assert time.process_time() - started < 5


# ---------------------------------------------------------------------- intervals


def test_intervals_are_scipys() -> None:
    """The ends vary by about 2 % of the width from seed to seed; scipy is asked for the same, expanded, level."""
    found, instances = scores(simulated(80, seed=3), "general", "pairwise")
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(80 / 79) * stats.t.ppf(0.975, 79))
    for metric in ("win_rate", "score", "answer_length"):
        s = by_name(found)["general", metric]
        values = [i.value for i in instances if (i.benchmark, i.metric) == ("general", metric)]
        theirs = stats.bootstrap(
            (values,), np.mean, confidence_level=level, n_resamples=20_000, method="percentile", rng=5
        ).confidence_interval
        assert s.low is not None
        assert s.high is not None
        assert s.low == pytest.approx(theirs.low, abs=0.06 * (theirs.high - theirs.low))
        assert s.high == pytest.approx(theirs.high, abs=0.06 * (theirs.high - theirs.low))


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 40, 79, 999])
def test_the_quantile_of_students_t_is_scipys(freedom: int) -> None:
    assert bootstrap.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_quantiles_are_numpys() -> None:
    values = sorted(random.Random(4).gauss(0, 1) for _ in range(37))
    for at in (0.0, 0.021, 0.5, 0.979, 1.0):
        assert bootstrap.quantile(values, at) == pytest.approx(float(np.quantile(values, at)), abs=1e-12)


@pytest.mark.parametrize(("n", "least"), [(10, 0.92), (50, 0.92)])
def test_an_interval_covers_the_truth_as_often_as_it_says(n: int, least: float) -> None:
    """400 evaluations of a model that wins 0, a quarter … all of a question: 95 %, give or take 2.2 (2 errors)."""
    draw, chances = random.Random(n), (0.15, 0.15, 0.2, 0.2, 0.3)
    truth = sum(p * v for p, v in zip(chances, (0, 0.25, 0.5, 0.75, 1), strict=True))
    covered = 0
    for trial in range(400):
        values = draw.choices((0, 0.25, 0.5, 0.75, 1), chances, k=n)
        found = [sum(map(values.__getitem__, p)) / n for p in bootstrap.resamples(n, str(trial), 400)]
        low, high = bootstrap.interval(found, n)
        covered += low <= truth <= high
    assert least < covered / 400 < 0.98


def test_where_all_questions_are_alike_wilsons_interval_stands() -> None:
    """Resamples of twenty wins are twenty wins; that does not make the rate certain."""
    found = by_name(scores([pair(i, WIN, WIN, ours=i, theirs=9) for i in range(20)], "general", "pairwise")[0])
    for metric in ("win_rate", "win_rate_lc", "wins"):
        s = found["general", metric]
        assert (s.value, s.stderr, s.low, s.high) == (1.0, 0.0, None, None)
        assert bounds(s) == wilson(1.0, 20)


def ends(judged: Sequence[Judged], metric: str = "win_rate") -> tuple[float, float]:
    found = bounds(by_name(scores(judged, "general", "pairwise")[0])["general", metric])
    assert found is not None
    return found


def lost_but(*others: tuple[Points, Points], n: int = 80) -> list[Judged]:
    """All are lost but these, with lengths on both sides of the baseline's."""
    pairs = [*others, *[(LOSS, LOSS)] * (n - len(others))]
    return [pair(i, *reviews, ours=100 + (i % 7) - 3) for i, reviews in enumerate(pairs)]


@pytest.mark.parametrize("metric", ["win_rate", "win_rate_lc"])
def test_a_rare_win_makes_no_interval_narrower(metric: str) -> None:
    """Of 80 questions, a quarter more than none: resamples knew no more than 0 to 0.0094, less than of none at all."""
    none, quarter, three = ends(lost_but(), metric), ends(lost_but((TIE, LOSS)), metric), lost_but(*[(TIE, LOSS)] * 3)
    assert none == wilson(0.0, 80)
    assert quarter[0] == pytest.approx(0.0, abs=1e-3)
    assert none[1] < quarter[1] < ends(three, metric)[1] < 0.1
    rate = by_name(scores(lost_but((TIE, LOSS)), "general", "pairwise")[0])["general", metric].value
    assert quarter[1] == wilson(rate, 80)[1]


def test_where_enough_questions_differ_the_bootstrap_stands_alone() -> None:
    for count, alone in ((4, False), (5, True)):
        judged = lost_but(*[(TIE, LOSS)] * count)
        low, high = ends(judged)
        theirs = wilson(count / 4 / 80, 80)
        assert (high < theirs[1]) is alone
        assert low >= 0


def test_two_questions_have_more_than_their_range() -> None:
    low, high = ends([pair(1, WIN, TIE), pair(2, TIE, LOSS)])
    assert (low, high) == wilson(0.5, 2)
    assert low < 0.25
    assert high > 0.75


def test_the_wider_of_both_intervals_is_taken_at_each_end() -> None:
    low, high = ends([pair(1, WIN, WIN), pair(2, TIE, LOSS), pair(3, LOSS, LOSS)])
    assert (low, high) == (0.0, 1.0)        # of resamples; Wilson's is 0.085 to 0.846
    assert wilson(1.25 / 3, 3)[0] > 0


def test_ties_alone_are_not_certain() -> None:
    judged = [pair(i, WIN, LOSS) for i in range(80)]
    found = by_name(scores(judged, "general", "pairwise")[0])
    for metric in ("win_rate", "win_rate_lc"):
        s = found["general", metric]
        assert (s.value, s.stderr, s.low, s.high) == (0.5, 0.0, *wilson(0.5, 80))


@pytest.mark.parametrize("points", [1.0, 7.0])
def test_points_and_lengths_that_are_all_alike_have_no_interval(points: float) -> None:
    """1 is the least of the points, and no share."""
    judged = [replace(single(i, points), answer=Answer(i, "m", "x")) for i in range(1, 9)]
    for s in scores(judged, "general", "single")[0]:
        if s.metric != "unreviewed":
            assert (s.value, s.stderr, bounds(s)) == (points if s.metric == "score" else 1.0, None, None)


# ---------------------------------------------------------------------- length control


def simulated(n: int, *, seed: int = 0, quality: float = 0.0, bias: float = 0.0, longer: float = 0.0,
              unreviewed: int = 0) -> list[Judged]:  # fmt: skip
    """Answers that a stand-in judge prefers by the log odds `quality` + `bias` * tanh(d / 200), d being how many
    characters ours is longer: by `longer` on average, with a standard deviation of 200."""
    draw, judged = random.Random(seed), []
    for i in range(n):
        theirs = 1000
        ours = max(1, round(theirs + draw.gauss(longer, 200)))
        chance = 1 / (1 + math.exp(-quality - bias * math.tanh((ours - theirs) / 200)))
        first, second = (WIN if draw.random() < chance else LOSS for _ in range(2))
        judged.append(pair(i, None if i < unreviewed else first, second, ours=ours, theirs=theirs))
    return judged


def test_the_regression_is_the_one_that_scipy_finds() -> None:
    draw = random.Random(6)
    for n in (5, 30, 200):
        x = np.array(length.terms([draw.gauss(100, 300) for _ in range(n)]))
        y = np.array([draw.choice((0, 0.25, 0.5, 0.75, 1)) for _ in range(n)])

        def loss(c: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> float:
            z = c[0] + c[1] * x
            return float(np.sum(np.logaddexp(0, z) - y * z) + length.RIDGE / 2 * c[1] ** 2)

        theirs = optimize.minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-8}).x
        ours = length.fit(list(y), list(x))
        assert ours == pytest.approx(tuple(theirs), abs=1e-5)
        far = length.fit(list(y), list(x), length.Fit(30.0, -40.0))
        assert far == pytest.approx(ours, abs=1e-8)


def test_terms_are_the_papers() -> None:
    d = [-100.0, 50.0, 400.0]
    assert length.terms(d) == pytest.approx([math.tanh(v / np.std(d, ddof=1)) for v in d])
    assert length.terms([0, 0, 0]) == [0, 0, 0]
    assert length.terms([7, 7, 7]) is None
    assert length.terms([7]) is None
    assert length.terms([7, 9, 400]) is None
    assert length.terms([-7, -9, -400]) is None
    assert length.terms([0, 9, 400]) is not None
    assert length.terms([0]) == [0]


@pytest.mark.parametrize("longer", [900, -900])
def test_answers_that_are_all_longer_or_all_shorter_have_no_controlled_rate(longer: int) -> None:
    """The raw win rate would stand there, and call itself controlled."""
    judged = [pair(i, WIN if i % 3 else LOSS, WIN, ours=1000 + longer + i, theirs=1000) for i in range(40)]
    assert ("general", "win_rate_lc") not in by_name(scores(judged, "general", "pairwise")[0])
    other = pair(40, WIN, LOSS, ours=1000, theirs=1000)
    assert ("general", "win_rate_lc") in by_name(scores([*judged, other], "general", "pairwise")[0])


def test_resamples_that_cannot_tell_are_left_out_of_the_controlled_rates_interval() -> None:
    """One answer is as long as the baseline's, and 40 % of the resamples lack it: these would say the raw rate."""
    judged = [pair(i, *((WIN, WIN) if i % 4 else (LOSS, LOSS)), ours=2000 + i, theirs=1000) for i in range(12)]
    judged += [pair(i, LOSS, LOSS, ours=1000, theirs=1000) for i in (12, 13)]
    columns = [preference(j) for j in sorted(judged, key=lambda j: str(j.question.id))]
    terms = length.terms([len(j.answer.text) - 1000 for j in sorted(judged, key=lambda j: str(j.question.id))])
    assert terms is not None
    raw = [
        length.rate([columns[p] for p in places], [terms[p] for p in places])
        for places in bootstrap.resamples(14, "any", 1000) if not length.telling([terms[p] for p in places])
    ]  # fmt: skip
    high = ends(judged, "win_rate_lc")[1]
    assert len(raw) > 50
    assert high < sum(raw) / len(raw)


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    found = by_name(scores([pair(1, WIN, TIE), pair(2, LOSS, LOSS), pair(3, WIN, WIN)], "g", "pairwise")[0])
    assert found["g", "win_rate_lc"].value == pytest.approx(found["g", "win_rate"].value, abs=1e-9)
    assert found["g", "win_rate_lc"].stderr == pytest.approx(found["g", "win_rate"].stderr, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_lengths_that_tell_wins_from_losses_do_not_blow_up(share: float) -> None:
    """Every longer answer wins and every shorter one loses; with `share` 0 or 1 all are lost or won."""
    judged = [
        pair(i, *((WIN, WIN) if i < 20 * share else (LOSS, LOSS)), ours=2000 - 50 * i, theirs=1500) for i in range(20)
    ]
    s = by_name(scores(judged, "general", "pairwise")[0])["general", "win_rate_lc"]
    assert 0 <= s.value <= 1
    assert s.stderr is not None
    assert math.isfinite(s.stderr)
    assert s.value == pytest.approx(share, abs=0.3)
    if s.low is not None and s.high is not None:
        assert 0 <= s.low <= s.value <= s.high <= 1


def test_one_answer_that_is_far_longer_does_not_rule() -> None:
    judged = [pair(i, WIN if i % 2 else LOSS, TIE, ours=100 + i, theirs=100) for i in range(40)]
    judged.append(pair(99, WIN, WIN, ours=10_000_000, theirs=1))
    s = by_name(scores(judged, "general", "pairwise")[0])["general", "win_rate_lc"]
    assert s.value == pytest.approx(0.5, abs=0.05)


def test_a_judge_that_likes_length_is_corrected_for_it() -> None:
    """Equally good answers, ours longer by a standard deviation and more: the win rate says 70 %, and means nothing."""
    plain, controlled = [], []
    for seed in range(60):
        found = simulated_rates(80, seed=seed, bias=1.5, longer=250)
        plain.append(found[0])
        controlled.append(found[1])
    assert mean_stderr(plain)[0] > 0.65
    value, stderr = mean_stderr(controlled)
    assert stderr is not None
    assert abs(value - 0.5) < 0.03 + 2 * stderr


def simulated_rates(n: int, **judge: float) -> tuple[float, float, float]:
    """The win rate, the length-controlled one, and its standard error, of `simulated`."""
    judged = simulated(n, **judge)  # type: ignore[arg-type]
    preferences = [preference(j) for j in judged]
    terms = length.terms([len(j.answer.text) - 1000 for j in judged])
    assert terms is not None
    value, stderr = mean_stderr(length.values(preferences, terms))
    assert value == pytest.approx(length.rate(preferences, terms), abs=1e-12)
    assert stderr is not None
    return mean_stderr(preferences)[0], value, stderr


def test_the_error_of_the_controlled_rate_is_how_much_it_varies() -> None:
    found = [simulated_rates(80, seed=seed, quality=0.4, bias=1.0, longer=100) for seed in range(300)]
    rates, errors = [f[1] for f in found], [f[2] for f in found]
    spread = (mean_stderr(rates)[1] or 0) * math.sqrt(len(rates))
    assert mean_stderr(errors)[0] == pytest.approx(spread, rel=0.12)        # two of the spread's own errors are 8 %


def test_instances_are_records_of_one_benchmark_each() -> None:
    _, instances = scores(HAND, "general", "pairwise")
    assert Instance("general", "win_rate", "test", "2", 0.75) in instances
    assert Instance("general.maths", "win_rate", "test", "4", 0.25) in instances
    assert not any(i.id == "5" for i in instances if i.metric != "unreviewed")
