"""How sure a mean win rate is, and the place in a ranking. Pure functions, standard library only.

A mean win rate is no mean of independent values, so its error comes from a parametric bootstrap: every score is drawn
anew around what was measured, with its own standard error, all win rates are counted again, and so on. The errors of
two models on the same instances usually go together; here they count as independent, which makes intervals wider.

The percentiles of the ranks that such draws give are no intervals for ranks: where many are nearly alike, whoever was
lucky looks good in all draws (Hall and Miller, Annals of Statistics 37 (2009) 3929; of 20 models that lie closer than a
standard error, such intervals hold the rank of some in half the cases). Instead the rank's
interval counts who is surely better and who is surely worse, by tests of all pairs that an entry is part of: Mogstad,
Romano, Shaikh and Wilhelm, Inference for Ranks (Review of Economic Studies 91 (2024) 476), with Bonferroni's
correction.
"""

from __future__ import annotations

import bisect
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, mul
from statistics import NormalDist

from eval_runner.results.statistics import ALPHA

MAX_DRAWS, MIN_DRAWS = 1000, 8
DRAWN_CELLS = 2_000_000
"""Cells drawn in all, where that leaves MIN_DRAWS draws of a column: about a second. The columns' variances add up, so
8 draws of 20 columns tell a standard error to 6 %, and 1000 of one to 2 %."""
CLASSES = 16
"""Of variances, by which pairs are counted without a look at each: an entry's is taken as the largest of its class."""


@dataclass(frozen=True)
class Measured:
    """One column: the entries (by number, rising) that have a value, their values, more being better, and the standard
    deviations of their errors."""

    entries: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float]


def spread(columns: Sequence[Measured], entries: int, *, seed: int = 0) -> list[float]:
    """The variance of each entry's mean win rate over parametric draws; the same for the same seed.

    Columns hold two values or more. 0 for an entry of no column.
    """
    cells = sum(len(column.values) for column in columns)
    draws = max(MIN_DRAWS, min(MAX_DRAWS, DRAWN_CELLS // max(cells, 1)))
    choose = random.Random(seed)
    longest = max((len(column.values) for column in columns), default=0)
    normal = _normal(max(1 << 16, 4 * longest), seed)
    total, count = [0.0] * entries, [0] * entries
    for column in columns:
        for i, variance in zip(column.entries, _column_spread(column, draws, normal, choose), strict=True):
            total[i] += variance
            count[i] += 1
    return [variance / (n * n) if n else 0.0 for variance, n in zip(total, count, strict=True)]


@functools.cache
def _normal(size: int, seed: int) -> list[float]:
    """Normal deviates; a draw is a part of them, which is quicker than to make each anew."""
    make = random.Random(seed)
    return [make.gauss(0.0, 1.0) for _ in range(size)]


def _column_spread(column: Measured, draws: int, normal: Sequence[float], choose: random.Random) -> list[float]:
    """The variance of each win rate in one column."""
    n = len(column.values)
    rates = [place / (n - 1) for place in range(n)]
    sums, squares = [0.0] * n, [0.0] * n
    for _ in range(draws):
        start = choose.randrange(len(normal) - n)
        drawn = list(map(add, column.values, map(mul, column.errors, normal[start : start + n])))
        rate = dict(zip(sorted(drawn), rates, strict=True))     # of equal ones the last: it is so in every draw
        won = list(map(rate.__getitem__, drawn))
        sums = list(map(add, sums, won))
        squares = list(map(add, squares, map(mul, won, won)))
    return [
        max(0.0, (square - total * total / draws) / (draws - 1)) for total, square in zip(sums, squares, strict=True)
    ]


def intervals(
    scores: Sequence[float], variances: Sequence[float | None], alpha: float = ALPHA
) -> list[tuple[int, int] | None]:
    """The interval of each entry's rank (1 is the best), which holds the true one with 1 - `alpha` or more.

    An entry is surely above another where their difference is larger than z standard errors of it, z for the normal
    distribution and as many comparisons as there are entries. Win rates of a column sum to a constant, so two of n
    have the correlation -1 / (n - 1), and their difference n / (n - 1) times the variance of independent ones. None
    where the variance is not known; such an entry is never surely above or below another.
    """
    n = len(scores)
    if n < 2:
        return [(1, 1) if variance is not None else None for variance in variances]
    z = NormalDist().inv_cdf(1 - alpha / (2 * n))
    scale = z * z * n / (n - 1)
    known = sorted((v, s) for v, s in zip(variances, scores, strict=True) if v is not None)
    size = max(1, math.ceil(len(known) / CLASSES))
    classes = [known[i : i + size] for i in range(0, len(known), size)]
    sorted_classes = [(members[-1][0], sorted(s for _, s in members)) for members in classes]
    out: list[tuple[int, int] | None] = []
    for score, variance in zip(scores, variances, strict=True):
        if variance is None:
            out.append(None)
            continue
        above = below = 0
        for largest, members in sorted_classes:
            far = math.sqrt(scale * (variance + largest)) + 1e-12       # sums of win rates differ by their rounding
            above += len(members) - bisect.bisect_right(members, score + far)
            below += bisect.bisect_left(members, score - far)
        out.append((1 + above, n - below))
    return out
