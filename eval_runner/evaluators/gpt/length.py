"""The win rate that answers as long as the baseline's would have: judges prefer the longer answer.

After Dubois, Galambosi, Liang and Hashimoto, Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators
(2024, arXiv:2404.04475): a logistic regression of the preference on a constant and on tanh(d / s), where d is the
difference of the lengths, the checkpoint's less the baseline's, and s its standard deviation; what it predicts for
d = 0 is the rate. Their third term, the difficulty of each question, is left out: it takes many models to fit, and here
one is compared with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from eval_runner.results.statistics import mean_stderr

RIDGE = 0.1
"""The penalty RIDGE / 2 * slope^2, which is a normal prior with variance 10: it keeps the slope finite where lengths
tell wins from losses without exception, and moves it by 2 % for eighty questions."""


class Fit(NamedTuple):
    constant: float
    slope: float


def telling(differences: Sequence[float]) -> bool:
    """Whether equal length lies within these differences, or their terms. Where all answers are longer than the
    baseline's, or all shorter, nothing was seen of equal length: tanh is then nearly the same for all, the ridge sets
    the slope to 0, and the raw rate would go by the controlled one's name."""
    return min(differences) <= 0 <= max(differences)


def terms(differences: Sequence[float]) -> list[float] | None:
    """tanh(d / s) of each difference of lengths. All 0 where all lengths are equal; None where they are not `telling`:
    what length does cannot be told from what the answers are worth then."""
    if not telling(differences):
        return None
    if not any(differences):
        return [0.0] * len(differences)
    spread = (mean_stderr(differences)[1] or 0.0) * math.sqrt(len(differences))
    return [math.tanh(d / spread) for d in differences]


def fit(preferences: Sequence[float], lengths: Sequence[float], start: Fit | None = None) -> Fit | None:
    """The regression's coefficients, of preferences from 0 to 1 on `terms`; `start` is a guess.

    None where all preferences are equal: the rate is that one, and 0 and 1 have no logarithm of their odds. Else the
    penalised likelihood has one maximum. Newton's method finds it: a step that changes no prediction's log odds by more
    than 1 always gains (Bach, Self-concordant analysis for logistic regression, Electronic Journal of Statistics 4
    (2010) 384, proposition 1), so longer ones are cut to that.
    """
    if min(preferences) == max(preferences):
        return None
    constant, slope = start or (0.0, 0.0)
    change = 1.0
    while change > 1e-5:        # the error is about its square
        g0 = g1 = h00 = h01 = h11 = 0.0
        for y, x in zip(preferences, lengths, strict=True):
            p = _logistic(constant + slope * x)
            error, weight = y - p, p * (1 - p)
            g0 += error
            g1 += error * x
            h00 += weight
            h01 += weight * x
            h11 += weight * x * x
        g1 -= RIDGE * slope
        h11 += RIDGE
        scale = h00 * h11 - h01 * h01
        d0, d1 = (h11 * g0 - h01 * g1) / scale, (h00 * g1 - h01 * g0) / scale
        change = abs(d0) + abs(d1)      # a length's term is below 1
        cut = max(1.0, change)
        constant, slope = constant + d0 / cut, slope + d1 / cut
    return Fit(constant, slope)


def rate(preferences: Sequence[float], lengths: Sequence[float], start: Fit | None = None) -> float:
    """The length-controlled rate: what the regression predicts for answers of equal length."""
    found = fit(preferences, lengths, start)
    return preferences[0] if found is None else _logistic(found.constant)


def values(preferences: Sequence[float], lengths: Sequence[float]) -> list[float]:
    """For each question what it adds to the rate, to first order: rate + n * d rate / d constant * (H^-1 g_i), with H
    the likelihood's second derivative and g_i the question's share in the first.

    Their mean is the rate, and their standard error its robust ("sandwich") one by the delta method (White,
    Econometrica 50 (1982) 1), with n - 1 for n.
    """
    found = fit(preferences, lengths)
    if found is None:
        return list(preferences)
    chances = [_logistic(found.constant + found.slope * x) for x in lengths]
    weights = [p * (1 - p) for p in chances]
    h00, h11 = math.fsum(weights), math.fsum(w * x * x for w, x in zip(weights, lengths, strict=True)) + RIDGE
    h01 = math.fsum(w * x for w, x in zip(weights, lengths, strict=True))
    predicted, n = _logistic(found.constant), len(preferences)
    per = n * predicted * (1 - predicted) / (h00 * h11 - h01 * h01)
    added = [per * (h11 - h01 * x) * (y - p) for y, p, x in zip(preferences, chances, lengths, strict=True)]
    extra = math.fsum(added) / n        # the ridge's share, which is nobody's
    return [predicted + a - extra for a in added]


def _logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
