"""Accuracy and calibration of majority voting, and intervals for them.

Arrays have one entry per question, and a question always carries all K of its samples. Confidence is ``votes /
K`` with every sample in the denominator: an answer that could not be parsed is never a candidate but lowers
the confidence, and a question without any candidate has zero votes and counts as wrong.

The paper (arXiv 2607.02460) reports Avg@8 and ECE of the majority vote; the binning and tie rules here are a
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.resampling import percentile_ends, question_draws

LARGEST_EXACT_K = 16
"""Up to this K the calibration error has one bin for each of the K + 1 possible confidences."""

_FLOOR_CANDIDATES = 8
_FLOOR_REPEATS = 100
_SMOOTH_GRID = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its percentile bootstrap interval.

    ``n`` is the number of questions; ``estimate`` comes from the data as given, not from the resamples.
    """

    estimate: float
    low: float
    high: float
    n: int
    resamples: int
    seed: int

    def __format__(self, spec: str) -> str:
        """``f"{interval:+.3f}"`` is ``+0.012 [+0.004, +0.020]``."""
        return format_interval(self.estimate, self.low, self.high, spec)


def format_interval(estimate: float, low: float, high: float, spec: str) -> str:
    """``+0.012 [+0.004, +0.020]``: an estimate and its interval, each number formatted by ``spec``."""
    return f"{estimate:{spec}} [{low:{spec}}, {high:{spec}}]"


# Accuracy


@takes_arrays
def avg_at_k(correct: Bool[np.ndarray, "questions k"]) -> Float[np.ndarray, " questions"]:
    """Share of the K samples of each question that are right; unparsed samples are wrong.

    Raises:
        UserError: if there is no question or no sample.
    """
    if correct.ndim != 2 or correct.size == 0:
        raise UserError(f"avg_at_k: shape {correct.shape} holds no samples; give [questions, k]")
    return correct.mean(axis=1)


@takes_arrays
def maj_at_k(
    n_tied_right: Int[np.ndarray, " questions"], n_tied: Int[np.ndarray, " questions"]
) -> Float[np.ndarray, " questions"]:
    """Expected correctness of the majority vote when a tie is broken uniformly at random.

    Args:
        n_tied_right: how many of the answers tied for most votes are right.
        n_tied: how many answers are tied for most votes: 1 without a tie, 0 without any candidate.

    Returns:
        ``n_tied_right / n_tied``; 0 where there is no candidate.

    Raises:
        UserError: if more tied answers are right than are tied.
    """
    _check_same_length("maj_at_k", n_tied_right, n_tied)
    if np.any(n_tied_right < 0) or np.any(n_tied_right > n_tied):
        raise UserError("maj_at_k: n_tied_right must lie between 0 and n_tied")
    return n_tied_right / np.maximum(n_tied, 1)


@takes_arrays
def pass_at_k(n: int, c: Int[np.ndarray, " questions"], k: int) -> Float[np.ndarray, " questions"]:
    """Unbiased chance that at least one of k samples is right (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        n: samples drawn for each question.
        c: how many of them are right.
        k: samples allowed, at most ``n``.

    Raises:
        UserError: if ``k`` or ``c`` is out of range.
    """
    if not 1 <= k <= n:
        raise UserError(f"pass_at_k: k is {k}; it must lie between 1 and the {n} samples drawn")
    _check_counts("pass_at_k: c", c, n)
    return np.array([1.0 - math.comb(n - right, k) / math.comb(n, k) for right in range(n + 1)])[c]


# Calibration


@takes_arrays
def ece(
    votes: Int[np.ndarray, " questions"], k: int, accuracy: Float[np.ndarray, " questions"], *, bins: int = 15
) -> float:
    """Expected calibration error (L1, Guo et al. 2017) of the confidence ``votes / k``.

    Up to K = 16 every possible confidence is a bin of its own; beyond, ``bins`` equal-width bins ``(a, b]``
    with 0 in the first. Bins are found by integer arithmetic, so no confidence falls to the wrong side of an
    edge. Values for different ``k`` cannot be compared: see `ece_floor`.

    Args:
        votes: samples that gave the winning answer; 0 when no sample had an answer.
        k: samples drawn for each question, unparsed ones included.
        accuracy: 0 or 1, or a fraction in between for tied answers (`maj_at_k`).

    Raises:
        UserError: on empty, unequal or out-of-range arrays.
    """
    _check_calibration("ece", votes, k, accuracy)
    keys = calibration_bins(votes, k, bins=bins)
    return float(np.abs(np.bincount(keys, weights=votes / k - accuracy)).sum() / len(votes))


@takes_arrays
def calibration_bins(votes: Int[np.ndarray, "*shape"], k: int, *, bins: int = 15) -> Int[np.ndarray, "*shape"]:
    """Bin of the confidence ``votes / k`` in `ece`: the votes themselves up to K = 16, else equal-width ``(a, b]``."""
    return votes if k <= LARGEST_EXACT_K else np.maximum((votes * bins + k - 1) // k - 1, 0)


@takes_arrays
def brier(votes: Int[np.ndarray, " questions"], k: int, accuracy: Float[np.ndarray, " questions"]) -> float:
    """Brier score of the confidence ``votes / k``, in expectation over tied answers.

    A fractional accuracy ``a`` is a chance of being right: ``E (c - y)^2 = (c - a)^2 + a (1 - a)``.

    Raises:
        UserError: on empty, unequal or out-of-range arrays.
    """
    _check_calibration("brier", votes, k, accuracy)
    return float(np.mean((votes / k - accuracy) ** 2 + accuracy * (1 - accuracy)))


@takes_arrays
def signed_gap(votes: Int[np.ndarray, " questions"], k: int, accuracy: Float[np.ndarray, " questions"]) -> float:
    """Mean confidence minus mean accuracy: above 0 is overconfident.

    Raises:
        UserError: on empty, unequal or out-of-range arrays.
    """
    _check_calibration("signed_gap", votes, k, accuracy)
    return float(np.mean(votes / k - accuracy))


@takes_arrays
def smooth_ece(votes: Int[np.ndarray, " questions"], k: int, accuracy: Float[np.ndarray, " questions"]) -> float:
    """Smooth calibration error smECE of Blasiok & Nakkiran 2023 (arXiv 2309.12236).

    ``smECE_s`` is the integral over [0, 1] of the absolute residual smoothed by a Gaussian of width s,
    reflected at both ends; it falls with s, and smECE is the s at which ``smECE_s = s``. Needs no bins and
    never exceeds `ece` on the exact support.

    Raises:
        UserError: on empty, unequal or out-of-range arrays.
    """
    _check_calibration("smooth_ece", votes, k, accuracy)
    support, rows = np.unique(votes, return_inverse=True)
    residuals = np.bincount(rows, weights=votes / k - accuracy) / len(votes)
    if np.abs(residuals).sum() < 1e-9:
        return 0.0

    def excess(width: float) -> float:
        return float(np.abs(residuals @ _reflected_gaussian(support / k, width)).sum()) - width

    narrowest = 1e-9
    if excess(narrowest) <= 0:
        return narrowest
    return float(optimize.brentq(excess, narrowest, 1.0 + 1e-6, xtol=1e-9))


def ece_floor(k: int, n: int, *, seed: int = 0) -> float:
    """ECE that a perfectly calibrated sampler shows on average with votes over its own k samples.

    Voting picks the answer that happened to come up most often, so its share overstates its probability, and
    n questions add binning noise; neither is miscalibration. Simulation: each question has a distribution
    over 8 answers drawn from a symmetric Dirichlet of total concentration 1; k samples and the truth are
    drawn from that same distribution; ties count in expectation. Mean over 100 data sets: .122, .066 and .048
    for K = 4, 8 and 16 at n = 1,000. A floor for this spread of difficulty, not a bound.

    Args:
        k: samples for each question.
        n: questions in the data set.
        seed: of the simulation.

    Raises:
        UserError: if ``k`` or ``n`` is below 1.
    """
    if k < 1 or n < 1:
        raise UserError(f"ece_floor: k is {k} and n is {n}; both must be at least 1")
    rng = np.random.default_rng(seed)
    questions = np.arange(n)
    errors = []
    for _ in range(_FLOOR_REPEATS):
        answers = rng.dirichlet(np.full(_FLOOR_CANDIDATES, 1 / _FLOOR_CANDIDATES), size=n)
        samples = rng.multinomial(k, answers)
        truth = rng.multinomial(1, answers).argmax(axis=1)
        votes = samples.max(axis=1)
        tied = samples == votes[:, None]
        errors.append(ece(votes, k, maj_at_k(tied[questions, truth].astype(np.int64), tied.sum(axis=1))))
    return float(np.mean(errors))


# Intervals and tests, paired over questions


def bootstrap_interval(
    statistic: Callable[[Int[np.ndarray, " questions"]], float],
    n: int,
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap over questions for any statistic of question indices.

    Index every run with the same argument and the comparison is paired::

        def change(q):
            return ece(votes_after[q], 8, right_after[q]) - ece(votes_before[q], 8, right_before[q])

        bootstrap_interval(change, n, seed=0)

    Results repeat exactly for one seed and one order of the questions: sort the rows by question id.

    Args:
        statistic: from n question indices, repeats included, to a number.
        n: questions.

    Raises:
        UserError: if there are fewer than two questions.
    """
    blocks = question_draws(n, resamples, seed=seed)
    draws = np.array([statistic(questions) for block in blocks for questions in block], dtype=np.float64)
    return Interval(float(statistic(np.arange(n))), *percentile_ends(draws, level), n, resamples, seed)


@takes_arrays
def paired_mean_interval(
    a: Float[np.ndarray, " questions"],
    b: Float[np.ndarray, " questions"],
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """`bootstrap_interval` for ``mean(a) - mean(b)`` over the same questions, vectorised.

    Raises:
        UserError: if the arrays differ in length or hold fewer than two questions.
    """
    _check_same_length("paired_mean_interval", a, b)
    n = len(a)
    difference = np.asarray(a, dtype=np.float64) - b
    draws = [difference[block].mean(axis=1) for block in question_draws(n, resamples, seed=seed)]
    return Interval(float(difference.mean()), *percentile_ends(np.concatenate(draws), level), n, resamples, seed)


def _reflected_gaussian(centres: Float[np.ndarray, " support"], width: float) -> Float[np.ndarray, "support cells"]:
    """Mass that a Gaussian of the given width, folded into [0, 1], puts on each cell of an equal grid."""
    edges = np.linspace(0.0, 1.0, _SMOOTH_GRID + 1)
    mass = np.zeros((len(centres), _SMOOTH_GRID))
    reach = math.ceil((1 + 6 * width) / 2)
    for shift in range(-reach, reach + 1):
        for image in (edges + 2 * shift, 2 * shift - edges):
            mass += np.abs(np.diff(special.ndtr((image - centres[:, None]) / width), axis=1))
    return mass


def _check_same_length(where: str, *arrays: Sized) -> None:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise UserError(f"{where}: arrays of {lengths} questions; give one entry per question in each")


def _check_counts(where: str, counts: Int[np.ndarray, " questions"], k: int) -> None:
    if not np.issubdtype(counts.dtype, np.integer):
        raise UserError(f"{where}: dtype {counts.dtype}; give integer counts, not shares")
    if len(counts) == 0:
        raise UserError(f"{where}: no questions")
    if counts.min() < 0 or counts.max() > k:
        raise UserError(f"{where}: {counts.min()} to {counts.max()}; counts must lie between 0 and {k}")


def _check_calibration(
    where: str, votes: Int[np.ndarray, " questions"], k: int, accuracy: Float[np.ndarray, " questions"]
) -> None:
    _check_same_length(where, votes, accuracy)
    _check_counts(f"{where}: votes", votes, k)
    if not bool(np.all((accuracy >= 0) & (accuracy <= 1))):
        raise UserError(f"{where}: accuracy must lie between 0 and 1 and not be nan")
