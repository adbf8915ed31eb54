"""How sure a score is, and whether one checkpoint differs from another. Pure functions, no dependencies.

For an evaluator: give `mean_stderr` the per-instance values of a score that is their mean, and keep them as
its instances. For a score that is a ratio of sums (bits per byte = all bits / all bytes) use `ratio_stderr`,
and keep `ratio_values` as its instances: their mean is the ratio, so that paired tests stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eval_runner.results.schema import Score

Z95 = 1.959963984540054
"""The standard normal distribution's 97.5 % quantile."""

ALPHA = 0.05
"""A difference with a p-value below this is called one."""

Verdict = Literal["better", "worse", "higher", "lower", "within noise", "not tested"]
"""`higher` and `lower` where no direction is known to be the better one; `not tested` where nothing is known
of the noise."""


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error s / sqrt(n) with the sample's s; None for the error of one value.

    Raises ValueError for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def ratio_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """The ratio sum(a) / sum(b) over instances, and its standard error by the delta method.

    With R the ratio: sqrt(n / (n - 1) * sum((a - R b)^2)) / sum(b), after Cochran, Sampling Techniques,
    3rd edition (Wiley 1977), section 2.11, for a sample that is a small part of its population.
    None for the error of one instance. Raises ValueError for no instances or a sum of b that is not positive.
    """
    values = ratio_values(numerators, denominators)
    return math.fsum(numerators) / math.fsum(denominators), mean_stderr(values)[1]


def ratio_values(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """R + (a - R b) / mean(b) for each instance: what it adds to the ratio R, to first order.

    Their mean is R and the standard error of that mean is the ratio's. Where two checkpoints share the
    denominators (the same text), the differences of these values give the standard error of the difference.
    Raises like `ratio_stderr`.
    """
    total = math.fsum(denominators)
    if not numerators or total <= 0:
        raise ValueError("the ratio of no instances, or of a total that is not positive")
    ratio, mean = math.fsum(numerators) / total, total / len(denominators)
    return [ratio + (a - ratio * b) / mean for a, b in zip(numerators, denominators, strict=True)]


def interval(value: float, stderr: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a score: `value` ± 1.96 `stderr`, or Wilson's where the score is a proportion.

    The first says "0 ± 0" when no answer of 20 is right; Wilson's says 0 to 0.16. A mean of values from 0 to 1
    has the standard error of a proportion only if each value is 0 or 1 (Bhatia and Davis, American Mathematical
    Monthly 107 (2000) 353), so the score itself tells. None where the error is unknown.
    """
    if stderr is None:
        return None
    if n > 1 and 0 <= value <= 1:
        largest = value * (1 - value) / (n - 1)
        if math.isclose(stderr**2, largest, rel_tol=1e-9, abs_tol=1e-15):
            return wilson(value, n)
    return value - Z95 * stderr, value + Z95 * stderr


def bounds(score: Score) -> tuple[float, float] | None:
    """The 95 % interval of a score: the evaluator's own, else `interval` of its standard error."""
    if score.low is not None and score.high is not None:
        return score.low, score.high
    return interval(score.value, score.stderr, score.n)


def wilson(proportion: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion of `n` (Wilson, J. Am. Stat. Assoc. 22 (1927) 209)."""
    z2 = Z95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(proportion * (1 - proportion) / n + z2 / (4 * n * n))
    # At the ends the bound is exact; the difference of two equal numbers is not.
    return (0.0 if proportion == 0 else centre - half), (1.0 if proportion == 1 else centre + half)


@dataclass(frozen=True)
class Difference:
    """How a score changed from one checkpoint to another: new - old. `p` is two-sided; `n` counts instances.

    `test` is ``paired t``, ``McNemar`` (exact) or ``unpaired``.
    """

    value: float
    stderr: float
    n: int
    p: float
    test: str

    def verdict(self, higher_is_better: bool | None) -> Verdict:
        """What the change means, at the 5 % level."""
        if self.p >= ALPHA:
            return "within noise"
        rose = self.value > 0
        if higher_is_better is None:
            return "higher" if rose else "lower"
        return "better" if rose == higher_is_better else "worse"


def paired(old: Mapping[str, float], new: Mapping[str, float]) -> Difference | None:
    """The mean difference over the instances (by id) that both have; None for fewer than two of them.

    Values that are all 0 or 1 are compared by McNemar's exact test, others by the paired t test.
    """
    ids = old.keys() & new.keys()
    if len(ids) < 2:
        return None
    differences = [new[i] - old[i] for i in ids]
    mean, stderr = mean_stderr(differences)
    assert stderr is not None
    if all(v in (0, 1) for i in ids for v in (old[i], new[i])):
        p, test = sign_test(differences.count(1), differences.count(-1)), "McNemar"
    elif stderr <= 1e-12 * abs(mean) or stderr == 0:     # all alike: only their common sign is left to test
        p, test = sign_test(*((len(ids), 0) if mean else (0, 0))), "paired t"
    else:
        p, test = t_two_sided(mean / stderr, len(ids) - 1), "paired t"
    return Difference(mean, stderr, len(ids), p, test)


def unpaired(old: float, old_stderr: float, new: float, new_stderr: float, n: int) -> Difference | None:
    """The difference of two scores whose instances cannot be paired, by the normal distribution.

    `n` is the smaller of their numbers of instances. None where neither score has any error to test against.
    """
    stderr = math.hypot(old_stderr, new_stderr)
    if stderr == 0:
        return None
    return Difference(new - old, stderr, n, math.erfc(abs(new - old) / stderr / math.sqrt(2)), "unpaired")


def sign_test(ups: int, downs: int) -> float:
    """The two-sided exact p-value of so many changes up and down, when both are equally likely."""
    n, ways, total = ups + downs, 1, 0
    for k in range(min(ups, downs) + 1):
        total += ways
        ways = ways * (n - k) // (k + 1)     # n over k + 1, exactly
    return min(1.0, 2 * total / (1 << n))


def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with so many degrees of freedom.

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4; good to
    an absolute 1e-12.
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cos2, total = math.cos(theta) ** 2, 0.0
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    for k in range(freedom // 2):
        total += term
        term *= cos2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))
