"""Two checkpoints on the same instances: the difference, its interval, and what the comparison could have found.

Beside the tests of `statistics`: intervals, the paired bootstrap, the smallest difference that is found four times in
five, and p-values that hold for many tests at once. Pure functions, standard library only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from eval_runner.results import bootstrap
from eval_runner.results.schema import Score
from eval_runner.results.statistics import ALPHA, Z95, Difference, paired, t_two_sided, unpaired

POWER = 0.8
Z_POWER = NormalDist().inv_cdf(POWER)
LEAST_P = 1 / (1 + bootstrap.RESAMPLES)
"""The bootstrap's p-values are no smaller."""


@dataclass(frozen=True)
class Tested:
    """A difference (new - old) with its 95 % interval, None where all instances differ alike. `detectable` is the size
    of a true difference that this comparison finds (p < 0.05) with a power of 80 %; None where none can be told."""

    difference: Difference
    interval: tuple[float, float] | None
    detectable: float | None


def by_pairs(old: Mapping[str, float], new: Mapping[str, float], *, resampled: bool = False) -> Tested | None:
    """McNemar's exact test for values that are all 0 or 1, else the paired t test; the paired bootstrap where it is
    asked for. None for fewer than two common instances."""
    ids = sorted(old.keys() & new.keys())
    difference = paired(old, new)
    if difference is None:
        return None
    changes = [new[i] - old[i] for i in ids]
    n = len(ids)
    if difference.test == "McNemar":
        ups, downs = changes.count(1), changes.count(-1)
        found = Tested(difference, mcnemar_interval(ups, downs, n), mcnemar_detectable((ups + downs) / n, n))
    elif difference.stderr <= 1e-12 * abs(difference.value) or difference.stderr == 0:
        found = Tested(difference, None, None)
    else:
        half = t_upper(ALPHA / 2, n - 1) * difference.stderr
        ends = difference.value - half, difference.value + half
        found = Tested(difference, ends, (t_upper(ALPHA / 2, n - 1) + t_upper(1 - POWER, n - 1)) * difference.stderr)
    return _bootstrapped(found, changes) if resampled and difference.stderr > 0 else found


def by_errors(old: Score, new: Score) -> Tested | None:
    """By the scores' standard errors; None where these are not known, or 0."""
    if old.stderr is None or new.stderr is None:
        return None
    difference = unpaired(old.value, old.stderr, new.value, new.stderr, min(old.n, new.n))
    if difference is None:
        return None
    half = Z95 * difference.stderr
    ends = difference.value - half, difference.value + half
    return Tested(difference, ends, (Z95 + Z_POWER) * difference.stderr)


def mcnemar_interval(ups: int, downs: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions of the same `n` instances, of which so many changed.

    Wald's after one more of each change: Bonett and Price, J. Educ. Behav. Stat. 37 (2012) 479; recommended by
    Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850.
    """
    up, down = (ups + 1) / (n + 2), (downs + 1) / (n + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar_detectable(changed: float, n: int) -> float | None:
    """The difference of two proportions that McNemar's test finds with a power of 80 %, where a share `changed` of
    `n` instances comes out otherwise.

    Connor, Biometrics 43 (1987) 207: n d² = (z_a √ψ + z_b √(ψ - d²))², solved for d. None where not even changes all
    in one direction would be found. The exact test finds a little less.
    """
    a, b = Z95, Z_POWER
    root = (a * a * n - (n + b * b) * (a * a - b * b)) * changed
    if changed == 0 or root < 0:
        return None
    d = (a * math.sqrt(n * changed) + math.sqrt(root)) / (n + b * b)
    return d if d <= changed else None


def t_upper(p: float, freedom: int) -> float:
    """The t that Student's distribution exceeds upwards with probability `p` (below 0.5), by halving."""
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > 2 * p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > 2 * p else (low, middle)
    return high


def _bootstrapped(found: Tested, changes: Sequence[float]) -> Tested:
    """The same with the paired bootstrap's p-value and interval.

    p is the share of resampled means that are as far from the mean as the mean from 0, one more counted: Davison and
    Hinkley, Bootstrap Methods and their Application (1997), section 4.4. The seed is fixed.
    """
    d, n = found.difference, len(changes)
    draw = random.Random("compare")
    means = [math.fsum(draw.choices(changes, k=n)) / n for _ in range(bootstrap.RESAMPLES)]
    far = sum(abs(mean - d.value) >= abs(d.value) - 1e-12 for mean in means)
    p = (1 + far) / (1 + len(means))
    return Tested(Difference(d.value, d.stderr, n, p, "bootstrap"), bootstrap.interval(means, n), found.detectable)


# ---------------------------------------------------------------------- many tests at once


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values: with all of them below 0.05 kept, one false among them has a probability of 5 % at most
    (Holm, Scandinavian Journal of Statistics 6 (1979) 65)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    out, most = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(ps) - place) * ps[i]))
        out[i] = most
    return out


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values: of those below 0.05, 5 % are false on average (Benjamini and Hochberg, J. R. Stat. Soc. B 57
    (1995) 289)."""
    order = sorted(range(len(ps)), key=ps.__getitem__, reverse=True)
    out, least = [0.0] * len(ps), 1.0
    for place, i in enumerate(order):
        least = min(least, len(ps) / (len(ps) - place) * ps[i])
        out[i] = least
    return out


Adjusting = Callable[[Sequence[float]], list[float]]
CORRECTIONS: dict[str, Adjusting] = {"holm": holm, "bh": benjamini_hochberg, "none": list}
