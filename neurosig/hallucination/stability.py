"""Stability selection: which neurons the probe selects again on other questions.

The labelled questions are split at random into two halves, again and again; the L1 fit on each half selects its
heaviest neurons, and a neuron's selection frequency is the share of all halves that selected it. Complementary pairs
after Shah & Samworth (2013), the bound on false discoveries after Meinshausen & Buehlmann (2010).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from neurosig.hallucination.lasso import fit_l1
from neurosig.runtime.cli import progress
from neurosig.statistics.arrays import takes_arrays


@dataclass(frozen=True, slots=True)
class Stability:
    """Selection frequency of each neuron, and the bound on false discoveries.

    Attributes:
        frequency: Share of the ``2 * pairs`` halves that selected each candidate neuron.
        threshold: Frequency from which a neuron counts as stable.
        selected_per_half: Neurons that a half selects on average.
        pairs: Complementary pairs of halves.
    """

    frequency: Float[np.ndarray, " candidates"]
    threshold: float
    selected_per_half: float
    pairs: int

    @property
    def stable(self) -> Bool[np.ndarray, " candidates"]:
        """Whether each candidate reaches the threshold."""
        return self.frequency >= self.threshold

    @property
    def expected_false(self) -> float:
        """`expected_false_discoveries` at these numbers."""
        return expected_false_discoveries(self.selected_per_half, len(self.frequency), self.threshold)


def expected_false_discoveries(selected_per_half: float, candidates: int, threshold: float) -> float:
    """Upper bound ``q^2 / ((2 t - 1) p)`` on the expected number of false discoveries among the stable neurons.

    ``q`` neurons are selected in a half, on average, out of ``p`` candidates; ``t`` is the threshold, above 0.5. The
    bound holds for every neuron whose chance of selection in one half is at most the average ``q / p``, without any
    further assumption (Shah & Samworth 2013, theorem 1), and so for all neurons without signal where these are
    selected no more readily than the average neuron (Meinshausen & Buehlmann 2010, theorem 1).
    """
    return selected_per_half**2 / ((2 * threshold - 1) * candidates)


def selection_limit(max_false: float, candidates: int, threshold: float) -> int:
    """The most neurons a half may select while `expected_false_discoveries` stays within ``max_false``; at least 1."""
    return max(1, math.floor(math.sqrt(max_false * (2 * threshold - 1) * candidates)))


@takes_arrays
def stability_selection(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    questions: Int[np.ndarray, " rollouts"],
    *,
    limit: int,
    inverse_penalty: float,
    pairs: int,
    threshold: float,
    seed: int,
    quiet: bool = True,
) -> Stability:
    """Fit the probe on both halves of the questions, ``pairs`` times, and count each neuron's selections.

    Each half holds the same number of questions of either label (a question's own is that of most of its rollouts);
    a question left over by an odd number sits the pair out. Questions are split, never their rollouts: these are too
    alike to count as several observations.

    Args:
        matrix: Scaled contributions of the labelled rollouts (`neurosig.hallucination.lasso.design`).
        labels: 0 or 1.
        questions: Index of the rollout's question.
        limit: A half selects at most this many neurons, the heaviest (`selection_limit`).
        inverse_penalty: Of the fit on a half; large enough that it finds about ``limit`` neurons.
        pairs: Complementary pairs of halves.
        threshold: Frequency from which a neuron counts as stable, above 0.5.
        seed: Seed of the splits and the solver.
        quiet: No progress bar.
    """
    rng = np.random.default_rng(seed)
    share = np.bincount(questions, weights=labels) / np.maximum(np.bincount(questions), 1)
    by_label = [np.unique(questions[(share[questions] >= 0.5) == label]) for label in (False, True)]
    selections = np.zeros(matrix.shape[1])
    for _ in progress(range(pairs), desc="halves", quiet=quiet):
        shuffled = [rng.permutation(members) for members in by_label]
        for side in (0, 1):
            half = np.concatenate([members[side * (len(members) // 2) :][: len(members) // 2] for members in shuffled])
            rows = np.flatnonzero(np.isin(questions, half))
            if len(np.unique(labels[rows])) == 2:
                weights = np.abs(fit_l1(matrix[rows], labels[rows], inverse_penalty, seed).coef_[0])
                heaviest = np.argsort(-weights, kind="stable")[:limit]
                selections[heaviest[weights[heaviest] > 0]] += 1
    return Stability(selections / (2 * pairs), threshold, float(selections.sum()) / (2 * pairs), pairs)
