"""Whether a neuron means the same in every kind of question, or only tells the kinds apart.

Where one kind of question is harder than another, a neuron that marks the kind also predicts which rollouts split.
Within a kind it then predicts nothing, so that its sign there is a coin toss; a neuron that goes with guessing itself
has one sign in every kind. The rule is a reconstruction; `neurosig.hallucination.planted` shows what it can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.locate import stable_neurons
from neurosig.runtime.cli import progress
from neurosig.statistics.arrays import takes_arrays

LEAST_QUESTIONS = 5
"""Known and guessed questions that a kind must each have before the sign of a neuron in it counts."""
LEAST_KINDS = 2
"""Kinds in which a neuron must have the same sign; in one kind alone nothing can disagree."""


@dataclass(frozen=True, slots=True, eq=False)
class SignsByKind:
    """The association of neurons with the label, kind by kind.

    Attributes:
        auroc: Of the question's mean contribution for "guessed", within each kind; ``nan`` where it cannot be told
            because the kind has too few questions of either label, or the neuron is the same in all of them.
        n_kinds: Kinds in which it can be told, for each neuron.
        n_agreeing: Those of them in which its sign is that of its weight.
    """

    auroc: Float[np.ndarray, "kinds neurons"]
    n_kinds: Int[np.ndarray, " neurons"]
    n_agreeing: Int[np.ndarray, " neurons"]

    @property
    def survives(self) -> Bool[np.ndarray, " neurons"]:
        """Whether a neuron's sign can be told in at least `LEAST_KINDS` kinds and agrees in all of them."""
        return (self.n_kinds >= LEAST_KINDS) & (self.n_agreeing == self.n_kinds)


@takes_arrays
def signs_by_kind(
    matrix: sparse.csr_array,
    signs: Float[np.ndarray, " neurons"],
    labels: Int[np.ndarray, " rollouts"],
    questions: Int[np.ndarray, " rollouts"],
    kinds: Int[np.ndarray, " rollouts"],
    *,
    least: int = LEAST_QUESTIONS,
) -> SignsByKind:
    """The sign of each neuron in each kind, compared with ``signs``.

    Args:
        matrix: Contributions of the neurons in question, [rollouts, neurons].
        signs: Their weights, or any numbers of the same sign; 0 agrees with nothing.
        labels: 1 guessed, 0 known, -1 unlabelled.
        questions: Index of the rollout's question.
        kinds: Index of the question's kind, or domain.
        least: See `LEAST_QUESTIONS`.
    """
    rows = np.flatnonzero(labels >= 0)
    owners = 2 * questions[rows] + labels[rows]  # the labels `contrast` differ within a question
    _, first, index, size = np.unique(owners, return_index=True, return_inverse=True, return_counts=True)
    mean = sparse.csr_array((1 / size[index], (index, np.arange(len(rows)))), shape=(len(size), len(rows)))
    means = (mean @ matrix[rows]).toarray()
    by_owner, kind = labels[rows][first], kinds[rows][first]
    auroc = np.full((int(kinds.max()) + 1, means.shape[1]), np.nan)
    for one in np.unique(kind):
        members = np.flatnonzero(kind == one)
        guessed = by_owner[members] == 1
        pairs = guessed.sum() * (~guessed).sum()
        if min(guessed.sum(), (~guessed).sum()) < least:
            continue
        ranks = stats.rankdata(means[members], axis=0)
        won = ranks[guessed].sum(axis=0) - guessed.sum() * (guessed.sum() + 1) / 2
        auroc[one] = np.where(np.ptp(means[members], axis=0) > 0, won / pairs, np.nan)
    n_kinds = (~np.isnan(auroc)).sum(axis=0)
    n_agreeing = ((np.sign(auroc - 0.5) == np.sign(signs)) & (np.sign(signs) != 0)).sum(axis=0)
    return SignsByKind(auroc, n_kinds, n_agreeing)


@takes_arrays
def marginal_signs(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    questions: Int[np.ndarray, " rollouts"],
) -> Float[np.ndarray, " neurons"]:
    """The sign of each neuron's association with "guessed" over all questions, 0 where it has none."""
    whole = signs_by_kind(matrix, np.ones(matrix.shape[1]), labels, questions, np.zeros_like(questions), least=1)
    return np.sign(np.nan_to_num(whole.auroc[0], nan=0.5) - 0.5)


@takes_arrays
def frequency_without_kind(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    questions: Int[np.ndarray, " rollouts"],
    kinds: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    *,
    quiet: bool = True,
) -> Float[np.ndarray, "kinds candidates"]:
    """Selection frequency of every neuron with each kind left out in turn; ``nan`` where too few questions remain.

    Args:
        matrix: Scaled contributions of the labelled rollouts (`neurosig.hallucination.lasso.design`).
        labels: 0 or 1.
        questions: Index of the rollout's question.
        kinds: Index of the question's kind, or domain.
        config: Options of stability selection (`neurosig.hallucination.locate.stable_neurons`).
        quiet: No progress bar.
    """
    frequency = np.full((int(kinds.max()) + 1, matrix.shape[1]), np.nan)
    for one in progress(np.unique(kinds).tolist(), desc="leave out", quiet=quiet):
        rows = np.flatnonzero(kinds != one)
        counts = [len(np.unique(questions[rows][labels[rows] == label])) for label in (0, 1)]
        if min(counts) < 2 * LEAST_QUESTIONS:  # each half has to hold questions of either label
            continue
        frequency[one] = stable_neurons(matrix[rows], labels[rows], questions[rows], config).frequency
    return frequency
