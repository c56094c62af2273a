"""The least-squares line and its intervals over questions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from neurosig.runtime.errors import UserError
from neurosig.statistics.regression import line_fit


def test_the_fit_is_a_least_squares_line_with_an_interval_that_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    gap = rng.uniform(0, 1, 300)
    gain = 0.4 * gap - 0.1 + rng.normal(0, 0.1, 300)
    questions = [f"q{index // 3}" for index in range(300)]
    fit = line_fit(gap, gain, questions, seed=1)
    reference = stats.linregress(gap, gain)
    assert fit.slope.estimate == pytest.approx(reference.slope) and fit.r.estimate == pytest.approx(reference.rvalue)
    assert fit.intercept == pytest.approx(reference.intercept) and fit.slope.n == 100
    assert fit.slope.low < 0.4 < fit.slope.high < 0.6
    noise = line_fit(gap, rng.permutation(gain), questions)
    assert noise.slope.low < 0 < noise.slope.high


def test_points_of_one_question_are_resampled_together() -> None:
    """Copies of every point under further contexts add no certainty."""
    rng = np.random.default_rng(2)
    gap, gain = rng.uniform(0, 1, 40), rng.uniform(0, 1, 40)
    names = [f"q{index:02d}" for index in range(40)]
    once = line_fit(gap, gain, names)
    often = line_fit(np.tile(gap, 5), np.tile(gain, 5), names * 5)
    assert (often.slope.low, often.slope.high) == pytest.approx((once.slope.low, once.slope.high))


def test_a_flat_gap_gives_a_flat_line() -> None:
    fit = line_fit(np.zeros(6), np.arange(6.0), list("abcdef"))
    assert fit.slope.estimate == fit.r.estimate == 0 and fit.intercept == 2.5
    with pytest.raises(UserError, match="one per point"):
        line_fit(np.zeros(2), np.zeros(2), ["a", "b", "c"])
    with pytest.raises(UserError, match="at least 2"):
        line_fit(np.zeros(2), np.zeros(2), ["a", "a"])
