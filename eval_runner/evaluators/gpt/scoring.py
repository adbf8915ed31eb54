"""From reviews to scores: pure functions on what was judged."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import length
from eval_runner.evaluators.gpt.records import Judged, Mode
from eval_runner.evaluators.written import label
from eval_runner.results import bootstrap
from eval_runner.results.schema import Instance, Score
from eval_runner.results.statistics import mean_stderr, wilson

SPLIT = "test"

FEW = 5
"""Where fewer questions than this differ from the rest, resamples often have none of them."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A score that is the mean over the reviewed questions of `value`; of a `share`, that is from 0 to 1."""

    name: str
    value: Callable[[Judged], float]
    higher_is_better: bool | None = None
    share: bool = True


def preference(judged: Judged) -> float:
    """The mean over both orders of 1 for a win of the checkpoint, 0.5 for a tie, 0 for a loss: 0, 0.25 … 1."""
    return math.fsum(_verdicts(judged)) / 2


def outcome(judged: Judged) -> str:
    """``win``, ``tie`` or ``loss`` by both orders together; a win in one and a loss in the other are a tie."""
    p = preference(judged)
    return "win" if p > 0.5 else "loss" if p < 0.5 else "tie"


def _verdicts(judged: Judged) -> list[float]:
    """What each of the two orders says."""
    ours, theirs = _points(judged)
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(ours, theirs, strict=True)]


def _points(judged: Judged) -> tuple[tuple[float, float], tuple[float, float]]:
    """The judge's scores of the checkpoint's answer in both orders, and of the baseline's."""
    (a1, b1), (b2, a2) = (review.scores for review in judged.reviews)
    return (a1, a2), (b1, b2)


def _only(judged: Judged) -> float:
    (review,) = judged.reviews
    (points,) = review.scores
    return points


ANSWER_LENGTH = Metric("answer_length", lambda j: float(len(j.answer.text)), share=False)
PAIRWISE = (
    Metric("win_rate", preference, True),
    Metric("score", lambda j: math.fsum(_points(j)[0]) / 2, True, share=False),
    Metric("baseline_score", lambda j: math.fsum(_points(j)[1]) / 2, share=False),
    Metric("wins", lambda j: float(outcome(j) == "win"), True),
    Metric("ties", lambda j: float(outcome(j) == "tie")),
    Metric("losses", lambda j: float(outcome(j) == "loss"), False),
    Metric("position_consistency", lambda j: float(len(set(_verdicts(j))) == 1)),
    ANSWER_LENGTH,
)
SINGLE = (Metric("score", _only, True, share=False), ANSWER_LENGTH)
UNREVIEWED = Metric("unreviewed", lambda j: float(not j.reviewed), False)


def scores(judged: Sequence[Judged], name: str, mode: Mode, seed: int = 0) -> tuple[list[Score], list[Instance]]:
    """The scores of the benchmark `name` and, where there are several categories, of ``name.CATEGORY``, with the values
    behind them.

    An instance's id is ``str(question.id)``. `n` counts all questions in ``unreviewed``, the reviewed ones elsewhere.
    Intervals are the bootstrap's over questions, seeded by `seed` and the values, whatever the questions' order, and a
    share's is no narrower than Wilson's where few questions differ (`_widened`). Where all values are 0 or 1, it knows
    no more than `statistics.interval`, and none is given; nor is one, or a standard error, to points and lengths that
    are all alike, which say nothing of how others vary.
    A category without a reviewed question has ``unreviewed`` only; ``win_rate_lc`` is not there where `length.terms`
    says that it cannot be told. Raises ConfigError where no question at all was reviewed (another try would be given
    the same replies), ValueError for reviews that do not fit the mode.
    """
    if not any(j.reviewed for j in judged):
        raise ConfigError(
            f"{name}: none of its {len(judged)} questions was reviewed: the judge refused, or its replies cannot be "
            f"parsed{_such_as(judged)}; mend the prompt file or choose another judge"
        )
    ordered = sorted(judged, key=lambda j: str(j.question.id))
    groups = {name: ordered}
    categories = sorted({j.question.category for j in ordered})
    for category in categories if len(categories) > 1 else ():
        groups[f"{name}.{label(category)}"] = [j for j in ordered if j.question.category == category]
    found = [_group(members, benchmark, mode, seed) for benchmark, members in groups.items()]
    return [s for scored, _ in found for s in scored], [i for _, instances in found for i in instances]


def _such_as(judged: Sequence[Judged]) -> str:
    """One reply without scores, shortened; "" where there is none."""
    texts = [" ".join(review.text.split()) for j in judged for review in j.reviews if review.state != "ok"]
    return f", such as {texts[0] if len(texts[0]) <= 120 else texts[0][:120] + '…'!r}" if texts else ""


def _group(members: Sequence[Judged], benchmark: str, mode: Mode, seed: int) -> tuple[list[Score], list[Instance]]:
    reviewed = [j for j in members if j.reviewed]
    metrics = PAIRWISE if mode == "pairwise" else SINGLE
    ids = [str(j.question.id) for j in reviewed]
    columns = [_mean(m, [m.value(j) for j in reviewed], ids) for m in metrics] if reviewed else []
    draws = _seed(seed, benchmark, columns)
    if reviewed and mode == "pairwise" and (controlled := _controlled(reviewed, ids)):
        columns.insert(1, controlled)
    columns.append(_mean(UNREVIEWED, [UNREVIEWED.value(j) for j in members], [str(j.question.id) for j in members]))
    bounds = _bounds(columns, draws)
    scored, instances = [], []
    for c in columns:
        value, stderr = mean_stderr(c.values)
        low, high = bounds[c.metric] or (None, None)
        if c.shares is None and len(set(c.values)) == 1:
            stderr = None       # 7 ± 0 would be certain
        scored.append(Score(benchmark, c.metric, SPLIT, value, len(c.values), stderr, c.higher_is_better, low, high))
        instances += [Instance(benchmark, c.metric, SPLIT, i, v) for i, v in zip(c.ids, c.values, strict=True)]
    return scored, instances


@dataclass(frozen=True)
class Column:
    """One metric over questions: `values`, whose mean is the score, and how it is computed for a resample of them (None
    where that one cannot tell). `shares` are numbers from 0 to 1 that it is the mean of, corrected or not."""

    metric: str
    higher_is_better: bool | None
    ids: Sequence[str]
    values: Sequence[float]
    shares: Sequence[float] | None
    resampled: Callable[[Sequence[int]], float | None]

    @property
    def bootstrapped(self) -> bool:
        """Whether resamples tell more than the standard error and Wilson's interval do."""
        return len(set(self.values)) > 1 and not set(self.values) <= {0.0, 1.0}


def _mean(metric: Metric, values: Sequence[float], ids: Sequence[str]) -> Column:
    n, value = len(values), values.__getitem__
    shares = values if metric.share else None
    return Column(metric.name, metric.higher_is_better, ids, values, shares, lambda p: sum(map(value, p)) / n)


def _controlled(reviewed: Sequence[Judged], ids: Sequence[str]) -> Column | None:
    """The length-controlled win rate. In resamples, too, lengths are measured in their spread over all questions.

    A resample that is not `length.telling` is left out, as the score itself would be: its rate is the raw one, and
    would draw the interval there. About half of them stay, at the least: one question is in 63 % of the resamples.
    """
    preferences = [preference(j) for j in reviewed]
    lengths = length.terms([len(j.answer.text) - len(j.baseline.text) for j in reviewed if j.baseline is not None])
    if lengths is None:
        return None
    start, preferred, long = length.fit(preferences, lengths), preferences.__getitem__, lengths.__getitem__

    def resampled(places: Sequence[int]) -> float | None:
        drawn = list(map(long, places))
        return length.rate(list(map(preferred, places)), drawn, start) if length.telling(drawn) else None

    return Column("win_rate_lc", True, ids, length.values(preferences, lengths), preferences, resampled)


def _seed(seed: int, benchmark: str, columns: Sequence[Column]) -> str:
    """The same for the same values, on any machine: nothing is in it that a logarithm or a tangent went into."""
    content = [seed, benchmark, [(c.metric, c.ids, c.values) for c in columns]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _bounds(columns: Sequence[Column], seed: str) -> dict[str, Interval | None]:
    """The 95 % interval of each metric, all from the same resamples; None where it has none of its own."""
    varied = [c for c in columns if c.bootstrapped]
    drawn: dict[str, list[float]] = {c.metric: [] for c in varied}
    n = len(varied[0].values) if varied else 0
    for places in bootstrap.resamples(n, seed) if varied else ():
        for c in varied:
            if (found := c.resampled(places)) is not None:
                drawn[c.metric].append(found)
    ends = {metric: bootstrap.interval(values, n) for metric, values in drawn.items()}
    return {c.metric: _widened(c, ends.get(c.metric)) for c in columns}


def _widened(column: Column, ends: Interval | None) -> Interval | None:
    """The bootstrap's interval, and at least Wilson's of the same mean where fewer than `FEW` questions differ from the
    most frequent value, as of few questions they always do. Of values from 0 to 1 with one mean, those that are all 0
    or 1 vary most (Bhatia and Davis, American Mathematical Monthly 107 (2000) 353): for others Wilson's is rather wide.
    """
    shares = column.shares
    if shares is None or len(shares) < 2 or (ends is None and set(shares) <= {0.0, 1.0}):
        return ends
    n = len(shares)
    if n - max(Counter(shares).values()) >= FEW:
        return ends
    low, high = wilson(mean_stderr(column.values)[0], n)
    return (low, high) if ends is None else (min(low, ends[0]), max(high, ends[1]))
