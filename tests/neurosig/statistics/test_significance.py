"""What a difference is worth: simulations with a known truth, and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from neurosig.runtime.errors import UserError
from neurosig.statistics import metrics
from neurosig.statistics.resampling import question_counts
from neurosig.statistics.significance import (
    bootstrap_p,
    ece_draws,
    holm,
    mean_draws,
    minimum_detectable_effect,
    planned_mde,
)

Array = np.ndarray[Any, Any]
K = 8
ACCURACY, SPREAD = 0.7242, 0.1325


def paper_like(rng: np.random.Generator, shape: tuple[int, ...], correlation: float = 1.0) -> tuple[Array, Array]:
    """Chances of a right sample of two systems: Beta over questions, the spread of `planned_mde`, correlated."""
    size = ACCURACY * (1 - ACCURACY) / SPREAD - 1
    shared = rng.random(shape) < correlation  # the same chance with this probability, else one of its own
    first, second = rng.beta(ACCURACY * size, (1 - ACCURACY) * size, (2, *shape))
    return first, np.where(shared, first, second)


# Draws


def test_counts_are_draws_with_replacement_whatever_the_block() -> None:
    whole = np.concatenate(list(question_counts(7, 50, seed=3)))
    assert whole.shape == (50, 7)
    assert (whole.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(whole, np.concatenate(list(question_counts(7, 50, seed=3, block=4))))
    assert not np.array_equal(whole, np.concatenate(list(question_counts(7, 50, seed=4))))
    with pytest.raises(UserError, match="at least 2"):
        list(question_counts(1, 50, seed=0))


@pytest.mark.parametrize("k", [8, 64])
def test_draws_of_mean_and_ece_equal_the_metric_of_the_drawn_questions(k: int) -> None:
    rng = np.random.default_rng(0)
    votes = rng.integers(0, k + 1, (40, 3))
    accuracy = rng.choice([0.0, 0.5, 1.0], (40, 3))
    counts = np.concatenate(list(question_counts(40, 6, seed=1)))
    for draw, count in enumerate(counts):
        rows = np.repeat(np.arange(40), count)
        for run in range(3):
            expected = metrics.ece(votes[rows, run], k, accuracy[rows, run])
            assert ece_draws(votes, k, accuracy, counts)[draw, run] == pytest.approx(expected)
            assert mean_draws(accuracy, counts)[draw, run] == pytest.approx(accuracy[rows, run].mean())


# Intervals and p-values: what they promise


def test_the_95_percent_interval_covers_the_truth_93_to_97_times_in_100() -> None:
    """Paired Avg@8 of two systems whose true difference is known; the binomial error over 2,500 trials is .0044."""
    rng = np.random.default_rng(0)
    trials, n, effect = 2500, 150, 0.02
    before, _ = paper_like(rng, (trials, n))
    after = before + effect * (1 - before) / (1 - ACCURACY)
    a, b = rng.binomial(K, after) / K, rng.binomial(K, before) / K
    truth = float((after - before).mean())
    assert truth == pytest.approx(effect, abs=0.001)
    covered = 0
    for trial in range(trials):
        interval = metrics.paired_mean_interval(a[trial], b[trial], seed=trial, resamples=500)
        covered += interval.low <= effect <= interval.high
    assert 0.93 <= covered / trials <= 0.97


@pytest.mark.parametrize("test", ["bootstrap", "bootstrap of the ECE"])
def test_identical_systems_give_uniform_p(test: str) -> None:
    """Equal chances, fresh samples. Counts are a lattice, so a tie at p = 1 (2% here) stays in any test."""
    rng = np.random.default_rng(2)
    trials, n = 400, 300
    right = rng.binomial(K, rng.random((trials, n)), (2, trials, n))
    p_values = []
    for trial in range(trials):
        a, b = right[:, trial]
        counts = np.concatenate(list(question_counts(n, 400, seed=trial)))
        if test == "bootstrap":
            draws = mean_draws((a - b)[:, None] / K, counts)[:, 0]
        else:  # the majority is right where most samples are, and has their votes
            votes, maj = np.maximum([a, b], K - np.array([a, b])).T, (np.array([a, b]) > K / 2).T.astype(float)
            draws = np.diff(ece_draws(votes, K, maj, counts), axis=1)[:, 0]
        p_values.append(bootstrap_p(draws))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_shifted_system_does_not_give_uniform_p() -> None:
    """The check above can fail: with a difference that is there, small p-values pile up."""
    rng = np.random.default_rng(1)
    chance, _ = paper_like(rng, (100, 120))
    a, b = rng.binomial(K, chance + 0.1 * (1 - chance)) / K, rng.binomial(K, chance) / K
    p_values = [
        bootstrap_p(mean_draws((a - b)[t][:, None], counts)[:, 0])
        for t in range(100)
        for counts in question_counts(120, 400, seed=t)
    ]
    assert stats.kstest(p_values, "uniform").pvalue < 1e-3


def test_bootstrap_p_by_hand() -> None:
    assert bootstrap_p(np.array([1.0, 2.0, 3.0, -1.0])) == pytest.approx(2 * 2 / 5)
    assert bootstrap_p(np.ones(99)) == pytest.approx(2 / 100)
    assert bootstrap_p(np.zeros(10)) == 1.0
    assert bootstrap_p(np.array([])) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


# The smallest effect


def test_minimum_detectable_effect_by_hand() -> None:
    assert minimum_detectable_effect(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    assert minimum_detectable_effect(1.0, power=0.5) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "correlation", "points"), [(1000, 1.0, 1.1), (1000, 0.85, 2.1), (1000, 0.0, 4.7), (200, 0.98, 3.0)]
)
def test_what_a_test_sees_at_the_papers_size(n: int, correlation: float, points: float) -> None:
    assert 100 * planned_mde(n, K, correlation=correlation) == pytest.approx(points, abs=0.06)
    rng = np.random.default_rng(n)
    one, other = paper_like(rng, (20, n), correlation)
    a, b = rng.binomial(K, one) / K, rng.binomial(K, other) / K
    paired, unpaired = (a - b).std(axis=1, ddof=1), np.hypot(a.std(axis=1, ddof=1), b.std(axis=1, ddof=1))
    for spread, expected in ((paired, points), (unpaired, 4.7 * math.sqrt(1000 / n))):
        seen = [100 * minimum_detectable_effect(float(sd) / math.sqrt(n)) for sd in spread]
        assert np.mean(seen) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("n", "correlation"), [(1000, 1.0), (1000, 0.85), (200, 0.98)])
def test_an_effect_of_that_size_is_found_four_times_in_five(n: int, correlation: float) -> None:
    rng = np.random.default_rng(0)
    effect = planned_mde(n, K, correlation=correlation)
    before, twin = paper_like(rng, (2000, n), correlation)
    after = twin + effect * (1 - twin) / (1 - ACCURACY)
    difference = (rng.binomial(K, after) - rng.binomial(K, before)) / K
    assert difference.mean() == pytest.approx(effect, abs=0.001)
    power = np.mean(stats.ttest_1samp(difference, 0.0, axis=1).pvalue <= 0.05)
    assert power == pytest.approx(0.8, abs=0.05)  # few questions that differ much: no normal differences


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minimum_detectable_effect(1.0, alpha=0.9), "0 < alpha < power < 1"),
        (lambda: minimum_detectable_effect(-1.0), "cannot be negative"),
        (lambda: planned_mde(100, 0, correlation=1.0), "k is 0"),
        (lambda: planned_mde(100, 8, correlation=1.0, spread=0.5), "spread 0.5 must lie"),
    ],
)
def test_numbers_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
