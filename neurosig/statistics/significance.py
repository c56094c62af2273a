"""Significance of a difference between two systems: p-values, many tests at once, the smallest detectable effect.

The unit is the question with all K of its samples: K samples of one question are not K observations. Intervals are in
`neurosig.statistics.metrics`; everything here works on their draws or on one value per question.

At about the paper's accuracy and K = 8 a paired test on 1,000 questions sees, with 80% power, changes of 1.1 points
(both systems find the same questions hard) to 2.1 (correlation .85), an unpaired one 4.7; on 200 questions a paired
test sees 2.6 to 4.7, about 3 at a correlation of .98. See `planned_mde`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.metrics import calibration_bins

# Draws


@takes_arrays
def mean_draws(
    values: Float[np.ndarray, "questions runs"], counts: Int[np.ndarray, "draws questions"]
) -> Float[np.ndarray, "draws runs"]:
    """Mean over the questions of each draw, for every run."""
    return counts @ values / counts.sum(axis=1, keepdims=True)


@takes_arrays
def ece_draws(
    votes: Int[np.ndarray, "questions runs"],
    k: int,
    accuracy: Float[np.ndarray, "questions runs"],
    counts: Int[np.ndarray, "draws questions"],
) -> Float[np.ndarray, "draws runs"]:
    """`neurosig.statistics.metrics.ece` of each draw, for every run: one product of matrices instead of a loop over
    draws.
    """
    bins = calibration_bins(votes, k)
    gaps = votes / k - accuracy
    total = np.zeros((len(counts), votes.shape[1]))
    for key in np.unique(bins):
        total += np.abs(counts @ np.where(bins == key, gaps, 0.0))
    return total / counts.sum(axis=1, keepdims=True)


# p-values


@takes_arrays
def bootstrap_p(draws: Float[np.ndarray, " draws"]) -> float:
    """Two-sided p-value of a difference from its bootstrap draws: twice the share on the rarer side of zero.

    Agrees with the percentile interval: below .05 where the 95% interval leaves zero out, and 1 where every draw is
    zero or there is none. Never 0; the least is ``2 / (draws + 1)``.
    """
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + len(draws)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down rule (Holm 1979), in the given order."""
    corrected, worst = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


# The smallest effect a test can see


def minimum_detectable_effect(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided test of size ``alpha`` finds with chance ``power``.

    ``(z_{1 - alpha/2} + z_power)`` standard errors, 2.80 by default; normal approximation.

    Args:
        standard_error: Of the observed difference, in any unit; the result has the same.

    Raises:
        UserError: A chance outside (0, 1), a negative standard error, or a power that is no greater than ``alpha``.
    """
    if not 0 < alpha < power < 1:
        raise UserError(f"minimum detectable effect: alpha {alpha} and power {power}; give 0 < alpha < power < 1")
    if standard_error < 0:
        raise UserError(f"minimum detectable effect: the standard error is {standard_error}; it cannot be negative")
    return float((stats.norm.isf(alpha / 2) + stats.norm.ppf(power)) * standard_error)


def planned_mde(
    n: int,
    k: int,
    *,
    correlation: float,
    accuracy: float = 0.7242,
    spread: float = 0.1325,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """Minimum detectable change of Avg@k, before anything is measured.

    A question's chance of a right sample varies over questions with variance ``spread``, alike in both systems, and k
    samples measure it: the difference has variance ``2 spread (1 - correlation) + 2 E[p (1 - p)] / k`` per question.
    The defaults are the paper's average accuracy and a spread at which most questions are nearly always right or
    nearly always wrong (a Beta of .38 and .14), which gives 4.7 points unpaired.

    Args:
        n: Questions.
        k: Samples per question.
        correlation: Of the two systems' chances over questions; 0 is an unpaired comparison.
        accuracy: Mean chance.
        spread: Variance of the chances.

    Returns:
        The effect as a fraction; times 100 for points.

    Raises:
        UserError: Numbers out of range.
    """
    if n < 2 or k < 1:
        raise UserError(f"planned_mde: n is {n} and k is {k}; give at least 2 questions and 1 sample")
    bernoulli = accuracy * (1 - accuracy)
    if not (0 <= spread <= bernoulli and 0 <= correlation <= 1):
        raise UserError(
            f"planned_mde: spread {spread} must lie between 0 and {bernoulli:.4f}, correlation {correlation} in [0, 1]"
        )
    variance = 2 * spread * (1 - correlation) + 2 * (bernoulli - spread) / k
    return minimum_detectable_effect(math.sqrt(variance / n), alpha=alpha, power=power)
