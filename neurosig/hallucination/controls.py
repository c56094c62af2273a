"""The control of a located set of neurons: probes on random neurons, after H-Neurons (arXiv 2512.01797)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.lasso import design
from neurosig.hallucination.probe import chosen_penalty, cross_fit_by_seed, regularisation_path, too_few
from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays


@dataclass(frozen=True, slots=True, eq=False)
class RandomNeurons:
    """Cross-fitted AUROC of probes on random neurons: mean and 95% range over the draws."""

    auroc: float
    low: float
    high: float
    draws: Float[np.ndarray, " draws"]
    n_neurons: int
    seed: int


@takes_arrays
def random_neuron_auroc(
    contributions: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    question_ids: Sequence[str],
    n_neurons: int,
    config: ProbeConfig,
    *,
    exclude: Int[np.ndarray, " excluded"] | None = None,
    draws: int = 20,
) -> RandomNeurons:
    """The control of a located set: probes that may use only ``n_neurons`` random neurons, fitted the same way.

    The neurons are drawn among those active often enough for the probe. Each draw's penalty is the best one of the
    folds that it is then scored on, which favours the control.

    Args:
        contributions: As fitted.
        labels: As fitted.
        question_ids: As fitted.
        n_neurons: Size of the located set.
        config: The probe's options; its seed also draws the neurons.
        exclude: Flat ids that are not drawn: the located set itself.
        draws: Random sets.

    Raises:
        UserError: Either label has too few questions, or fewer than ``n_neurons`` can be drawn.
    """
    groups = np.unique(np.asarray(question_ids), return_inverse=True)[1]
    shortage = too_few(labels, groups, config)
    if shortage:
        raise UserError(f"random neurons: {shortage}; label more questions or lower the number of folds")
    prepared = design(contributions, config.min_active_share)
    pool = np.flatnonzero(~np.isin(prepared.columns, [] if exclude is None else exclude))
    if not 1 <= n_neurons <= len(pool):
        raise UserError(f"random neurons: {n_neurons} of {len(pool)} to draw from; ask for 1 to {len(pool)}")
    rng = np.random.default_rng(config.seed)
    rows, best = np.flatnonzero(labels >= 0), replace(config, one_standard_error=False)
    aurocs = []
    for _ in range(draws):
        matrix = prepared.matrix[:, np.sort(rng.choice(pool, n_neurons, replace=False))]
        penalty = chosen_penalty(regularisation_path(matrix, labels, groups, best), best)
        scores = cross_fit_by_seed(matrix, labels, groups, replace(config, inverse_penalty=penalty)).mean(axis=0)
        aurocs.append(roc_auc_score(labels[rows], scores[rows]))
    low, high = np.quantile(aurocs, [0.025, 0.975])
    return RandomNeurons(float(np.mean(aurocs)), float(low), float(high), np.array(aurocs), n_neurons, config.seed)
