"""Metrics against values worked out by hand, torchmetrics, and simulations with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from neurosig.runtime.errors import UserError
from neurosig.statistics import metrics


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def voted_questions(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Votes of the winner and 0/1 correctness, overconfident by about a tenth."""
    rng = np.random.default_rng(seed)
    votes = rng.integers(0, k + 1, size=n)
    return votes, (rng.random(n) < 0.9 * votes / k).astype(np.float64)


# Accuracy


def test_avg_at_k_is_the_share_of_right_samples():
    correct = np.array([[True, False, False, False], [True, True, True, False]])
    assert metrics.avg_at_k(correct).tolist() == [0.25, 0.75]


def test_maj_at_k_is_the_expectation_over_tied_winners():
    # one right winner; one of two tied; none of three tied; no candidate at all
    assert metrics.maj_at_k(ints(1, 1, 0, 0), ints(1, 2, 3, 0)).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_maj_at_k_rejects_more_right_answers_than_tied_ones():
    with pytest.raises(UserError, match="n_tied_right"):
        metrics.maj_at_k(ints(2), ints(1))


def test_pass_at_k_by_hand():
    # n=4: none right; 1 right: 1 - C(3,2)/C(4,2) = 1/2; 2 right: 1 - 1/6; 3 right: one of any two is right
    assert metrics.pass_at_k(4, ints(0, 1, 2, 3, 4), 2) == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    assert metrics.pass_at_k(8, ints(3), 1) == pytest.approx([3 / 8])


def test_pass_at_k_equals_counting_the_subsets():
    from itertools import combinations

    for right in range(7):
        draws = list(combinations([True] * right + [False] * (6 - right), 3))
        assert metrics.pass_at_k(6, ints(right), 3)[0] == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("c", "k"), [(ints(1), 0), (ints(1), 5), (ints(5), 2), (ints(-1), 2)])
def test_pass_at_k_out_of_range(c, k):
    with pytest.raises(UserError, match="pass_at_k"):
        metrics.pass_at_k(4, c, k)


# Calibration


def test_ece_by_hand():
    # 2/4: two questions, half right, gap 0; 4/4: two, half right, gap 0.5; 1/4: one, wrong, gap 0.25
    votes, accuracy = ints(2, 2, 4, 4, 1), floats(1, 0, 1, 0, 0)
    assert metrics.ece(votes, 4, accuracy) == pytest.approx((2 * 0 + 2 * 0.5 + 0.25) / 5)
    assert metrics.signed_gap(votes, 4, accuracy) == pytest.approx((0.5 + 0.5 + 1 + 1 + 0.25) / 5 - 2 / 5)
    assert metrics.brier(votes, 4, accuracy) == pytest.approx((0.25 + 0.25 + 0 + 1 + 0.0625) / 5)


def test_unparsed_questions_stay_at_confidence_zero():
    # two questions without any answer: confidence 0 and wrong, no error of their own, but in the denominator
    with_unparsed = metrics.ece(ints(4, 4, 0, 0), 4, floats(1, 0, 0, 0))
    assert with_unparsed == pytest.approx(metrics.ece(ints(4, 4), 4, floats(1, 0)) / 2) == pytest.approx(0.25)


def test_confidence_zero_is_not_pooled_with_one_vote_of_sixteen():
    # pooled, the two gaps of -1/2 and +1/16 would partly cancel
    assert metrics.ece(ints(0, 1), 16, floats(0.5, 0)) == pytest.approx((1 / 2 + 1 / 16) / 2)


def test_bins_beyond_k_16_are_open_below():
    # K=30, 15 bins: 2/30 is the upper edge of bin 0 and 3/30 is in bin 1; 0 belongs to bin 0
    pooled = metrics.ece(ints(2, 0), 30, floats(0.0, 0.5))
    apart = metrics.ece(ints(2, 3), 30, floats(0.0, 0.5))
    assert pooled == pytest.approx(abs(2 / 30 - 0.5) / 2)
    assert apart == pytest.approx((2 / 30 + abs(0.1 - 0.5)) / 2)


@pytest.mark.parametrize("k", [1, 3, 4, 8, 10, 16])
def test_ece_equals_torchmetrics_on_the_exact_support(k):
    votes, accuracy = voted_questions(400, k)
    # 1/64 is finer than the support; float64 keeps each confidence on its side of an edge
    oracle = BinaryCalibrationError(n_bins=64, norm="l1", validate_args=False)
    expected = oracle(torch.from_numpy(votes / k), torch.from_numpy(accuracy).long()).item()
    assert metrics.ece(votes, k, accuracy) == pytest.approx(expected, abs=1e-6)


def test_fifteen_bins_agree_with_torchmetrics_at_k_8():
    votes, accuracy = voted_questions(400, 8)
    oracle = BinaryCalibrationError(n_bins=15, norm="l1")
    expected = oracle(torch.from_numpy(votes / 8), torch.from_numpy(accuracy).long()).item()
    assert metrics.ece(votes, 8, accuracy) == pytest.approx(expected, abs=1e-6)


def test_ece_equals_torchmetrics_multiclass_with_the_vote_as_top_class():
    votes, accuracy = voted_questions(300, 8)
    votes = np.maximum(votes, 1)
    confidence = torch.from_numpy(votes / 8)
    classes = 12  # 1/8 for the winner, 7/88 for each other class
    preds = ((1 - confidence) / (classes - 1)).unsqueeze(1).repeat(1, classes)
    preds[:, 5] = confidence
    target = torch.where(torch.from_numpy(accuracy) == 1, 5, 0)
    oracle = MulticlassCalibrationError(num_classes=classes, n_bins=64, norm="l1")
    assert metrics.ece(votes, 8, accuracy) == pytest.approx(oracle(preds, target).item(), abs=1e-6)


def test_binned_ece_equals_torchmetrics_away_from_the_edges():
    votes, accuracy = voted_questions(500, 32)
    votes = np.minimum(votes, 31)  # torchmetrics bins [a, b) and gives 1.0 a bin of its own
    oracle = BinaryCalibrationError(n_bins=15, norm="l1")
    expected = oracle(torch.from_numpy(votes / 32), torch.from_numpy(accuracy).long()).item()
    assert metrics.ece(votes, 32, accuracy) == pytest.approx(expected, abs=1e-6)


def test_brier_of_a_tie_is_the_mean_over_its_outcomes():
    tie = metrics.brier(ints(4), 8, floats(0.5))
    outcomes = [metrics.brier(ints(4), 8, floats(right)) for right in (0, 1)]
    assert tie == pytest.approx(np.mean(outcomes)) == pytest.approx(0.25)


def test_calibration_does_not_depend_on_the_order_of_questions():
    votes, accuracy = voted_questions(200, 8)
    shuffled = np.random.default_rng(1).permutation(200)
    for metric in (metrics.ece, metrics.brier, metrics.signed_gap, metrics.smooth_ece):
        assert metric(votes, 8, accuracy) == pytest.approx(metric(votes[shuffled], 8, accuracy[shuffled]), abs=1e-12)


@pytest.mark.parametrize(
    ("votes", "accuracy", "message"),
    [
        (ints(9), floats(1), "between 0 and 8"),
        (ints(-1), floats(1), "between 0 and 8"),
        (ints(), floats(), "no questions"),
        (ints(4), floats(1.5), "accuracy"),
        (ints(4), floats(math.nan), "accuracy"),
    ],
)
def test_calibration_names_what_is_out_of_range(votes, accuracy, message):
    with pytest.raises(UserError, match=message):
        metrics.ece(votes, 8, accuracy)


@pytest.mark.parametrize(("votes", "accuracy"), [(ints(4, 4), floats(1)), (floats(0.5), floats(1))])
def test_unequal_lengths_and_shares_for_counts_are_refused(votes, accuracy):
    with pytest.raises((UserError, TypeCheckError)):  # the shape checks of the tests may come first
        metrics.ece(votes, 8, accuracy)


# Smooth calibration error


def test_smooth_ece_of_a_constant_gap_is_that_gap():
    # one confidence, gap r: the kernel keeps its mass, so smECE_s = |r| at every width
    assert metrics.smooth_ece(ints(6, 6, 6, 6), 8, floats(1, 0, 0, 0)) == pytest.approx(0.5, abs=1e-6)
    assert metrics.smooth_ece(ints(8), 8, floats(0)) == pytest.approx(1.0, abs=1e-6)


def test_smooth_ece_of_opposite_gaps_solves_its_fixed_point():
    # half of the questions at confidence 0, half at 1, each off by 0.2 in opposite directions. Folded into
    # [0, 1], a kernel at 0 puts the mass m = 2 Phi(1 / 2s) - 1 on the lower half (images from beyond 1 weigh
    # below 1e-12), so smECE_s = 0.2 (m - (1 - m)), and its fixed point follows by iteration.
    s = 0.2
    for _ in range(60):
        m = math.erf(0.5 / s / math.sqrt(2))
        s = 0.2 * (2 * m - 1)
    votes, accuracy = ints(0, 0, 0, 0, 0, 4, 4, 4, 4, 4), floats(0, 0, 0, 0, 1, 1, 1, 1, 1, 0)
    assert metrics.smooth_ece(votes, 4, accuracy) == pytest.approx(s, abs=1e-5)
    assert s == pytest.approx(0.196, abs=1e-3)


def test_smooth_ece_is_zero_without_a_gap_and_never_above_ece():
    assert metrics.smooth_ece(ints(2, 2, 4), 4, floats(1, 0, 1)) == 0.0
    for seed in range(5):
        votes, accuracy = voted_questions(60, 8, seed)
        assert 0 < metrics.smooth_ece(votes, 8, accuracy) <= metrics.ece(votes, 8, accuracy) + 1e-9


def test_smooth_ece_of_one_sided_gaps_is_the_signed_gap():
    # all gaps positive: smoothing cancels nothing
    votes, accuracy = ints(2, 4, 6, 8), floats(0, 0.25, 0.5, 0.75)
    assert metrics.smooth_ece(votes, 8, accuracy) == pytest.approx(metrics.signed_gap(votes, 8, accuracy), abs=1e-6)


# What a calibrated sampler scores


@pytest.mark.parametrize(("k", "expected"), [(4, 0.128), (8, 0.070), (16, 0.049)])
def test_ece_floor_of_a_thousand_questions(k, expected):
    assert metrics.ece_floor(k, 1000) == pytest.approx(expected, abs=0.01)


def test_ece_floor_repeats_by_seed_and_falls_with_n():
    assert metrics.ece_floor(8, 100, seed=3) == metrics.ece_floor(8, 100, seed=3)
    assert metrics.ece_floor(8, 100, seed=3) != metrics.ece_floor(8, 100, seed=4)
    assert metrics.ece_floor(8, 50) > metrics.ece_floor(8, 1000)
    with pytest.raises(UserError, match="ece_floor"):
        metrics.ece_floor(0, 100)


# Intervals


def test_paired_mean_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        difficulty = rng.normal(size=60)
        before, after = difficulty + rng.normal(size=60), difficulty + 0.3 + rng.normal(size=60)
        interval = metrics.paired_mean_interval(after, before, seed=trial, resamples=400)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_narrows_the_interval_where_runs_share_hard_questions():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=300)
    before, after = difficulty + 0.2 * rng.normal(size=300), difficulty + 0.2 * rng.normal(size=300)
    paired = metrics.paired_mean_interval(after, before, seed=0, resamples=1000)
    unpaired = metrics.paired_mean_interval(after, rng.permutation(before), seed=0, resamples=1000)
    assert paired.high - paired.low < 0.4 * (unpaired.high - unpaired.low)
    assert paired.estimate == pytest.approx(unpaired.estimate)


def test_intervals_repeat_by_seed_only():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    first = metrics.paired_mean_interval(a, b, seed=1, resamples=200)
    assert first == metrics.paired_mean_interval(a, b, seed=1, resamples=200)
    assert first != metrics.paired_mean_interval(a, b, seed=2, resamples=200)
    assert (first.n, first.resamples, first.seed) == (50, 200, 1)


def test_the_general_interval_agrees_with_the_vectorised_mean():
    a, b = np.random.default_rng(0).normal(size=(2, 80))
    fast = metrics.paired_mean_interval(a, b, seed=0, resamples=4000)
    slow = metrics.bootstrap_interval(lambda q: float((a - b)[q].mean()), 80, seed=0, resamples=4000)
    assert slow.estimate == pytest.approx(fast.estimate)
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high), abs=0.02)


def test_interval_of_an_ece_difference_uses_the_same_questions_for_both_runs():
    votes, accuracy = voted_questions(200, 8)

    def change(shift: int):
        moved = np.minimum(votes + shift, 8)
        return lambda q: metrics.ece(moved[q], 8, accuracy[q]) - metrics.ece(votes[q], 8, accuracy[q])

    same = metrics.bootstrap_interval(change(0), 200, seed=0, resamples=200)
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = metrics.bootstrap_interval(change(2), 200, seed=0, resamples=500)
    assert 0 < worse.low < worse.estimate < worse.high


def test_intervals_are_those_of_scipy_to_the_bit():
    a, b = np.random.default_rng(0).normal(size=(2, 41))
    expected = stats.bootstrap(
        (a - b,), np.mean, n_resamples=999, confidence_level=0.95, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    for found in (
        metrics.paired_mean_interval(a, b, seed=7, resamples=999),
        metrics.bootstrap_interval(lambda q: float((a - b)[q].mean()), 41, seed=7, resamples=999),
    ):
        assert (found.low, found.high) == tuple(expected)


def test_an_interval_is_formatted_by_one_spec():
    assert f"{metrics.Interval(0.0123, -0.004, 0.02, 10, 100, 0):+.3f}" == "+0.012 [-0.004, +0.020]"


def test_one_question_has_no_interval():
    with pytest.raises(UserError, match="at least 2"):
        metrics.paired_mean_interval(floats(1), floats(0), seed=0)
    with pytest.raises(UserError, match="at least 2"):
        metrics.bootstrap_interval(lambda q: 0.0, 1, seed=0)
