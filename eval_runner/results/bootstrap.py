"""The bootstrap's 95 % interval of any statistic over instances. Pure functions, standard library only."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from statistics import NormalDist

from eval_runner.results.statistics import ALPHA, t_two_sided

RESAMPLES = 4000
"""The ends of an interval then vary by 2 % of its width between two seeds."""


def resamples(n: int, seed: str, count: int = RESAMPLES) -> Iterator[list[int]]:
    """`count` lists of `n` places from 0 to n - 1, drawn with replacement; the same for the same seed."""
    places, draw = range(n), random.Random(seed)
    return (draw.choices(places, k=n) for _ in range(count))


def interval(found: Sequence[float], n: int) -> tuple[float, float]:
    """The 95 % interval from a statistic's values over resamples of `n` instances (2 or more).

    The expanded percentile interval of Hesterberg, What Teachers Should Know About the Bootstrap (The American
    Statistician 69 (2015) 371): the plain one is too narrow for few instances, since a resample varies by (n - 1) / n
    too little and the normal distribution stands in for Student's.
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1))
    ordered = sorted(found)
    return quantile(ordered, tail), quantile(ordered, 1 - tail)


def quantile(ordered: Sequence[float], at: float) -> float:
    """The quantile of sorted values, linear between two neighbours."""
    place = at * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2)
    return ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])


def t_quantile(freedom: int) -> float:
    """The t that Student's distribution with so many degrees of freedom exceeds, either way, with p = 0.05."""
    low, high = 1.0, 16.0       # 12.7 for one degree of freedom, and less for more
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > ALPHA else (low, middle)
    return high
