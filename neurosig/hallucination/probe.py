"""The L1 probe that locates hallucination-indicative neurons without labels.

A question whose rollouts agree is likely known, one whose rollouts split is likely guessed; questions in between are
not used for fitting but are still scored. A sparse logistic regression on the neurons' contributions learns the
difference; the neurons it keeps are the H-neurons (the probe of H-Neurons, arXiv 2512.01797, with agreement in place of
its gold labels: reconstruction). `neurosig.hallucination.locate` adds what a claim about single neurons needs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold
from sklearn.utils.class_weight import compute_sample_weight

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.lasso import design, entry_penalty, fit_l1
from neurosig.neurons.contributions import PAD
from neurosig.statistics.arrays import takes_arrays

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Fit = Callable[[sparse.csr_array, Int[np.ndarray, " rollouts"], float, int], LogisticRegression]
"""A logistic regression of labels on a matrix at an inverse penalty, with a seed of the solver."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Cross-fitted scores and the neurons of the probe fitted on everything.

    Attributes:
        scores: Probability that a rollout's question is guessed, from folds that did not see the question or its group;
            the mean over ``by_seed``.
        by_seed: The same of each drawing of the folds.
        neurons: Column of each neuron with a weight, heaviest first.
        weights: Their weights on contributions scaled to a largest magnitude of 1; positive points to hallucination.
        shortage: Why there was nothing to learn from; all scores are then 0.5. Empty for a probe that was fitted.
    """

    scores: Float[np.ndarray, " rollouts"]
    by_seed: Float[np.ndarray, "seeds rollouts"]
    neurons: Int[np.ndarray, " neurons"]
    weights: Float[np.ndarray, " neurons"]
    shortage: str = ""

    @property
    def informative(self) -> bool:
        """Whether the probe learned anything."""
        return not self.shortage


@takes_arrays
def contribution_matrix(
    ids: Int[np.ndarray, "rollouts size"], values: Float[np.ndarray, "rollouts size"], n_neurons: int
) -> sparse.csr_array:
    """Contributions as a sparse matrix [rollouts, n_neurons]; a neuron outside a rollout's active set counts 0.

    Args:
        ids: Flat neuron ids of each rollout's active set, unique in a row; `PAD` where sets differ in size.
        values: Their contributions; values at a `PAD` are ignored.
        n_neurons: Neurons of the model, ``n_layers * d_mlp``.
    """
    order = np.argsort(ids, axis=1)
    columns = np.take_along_axis(ids, order, axis=1).astype(np.int32)  # liblinear takes 32-bit indices only
    data = np.take_along_axis(values, order, axis=1).astype(np.float64)
    kept = columns != PAD
    pointers = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return sparse.csr_array((data[kept], columns[kept], pointers), shape=(len(ids), n_neurons))


@takes_arrays
def agreement_labels(shares: Float[np.ndarray, " questions"], config: ProbeConfig) -> Int[np.ndarray, " questions"]:
    """1 where rollouts split (guessed), 0 where they agree (known), -1 in between."""
    return np.where(shares >= config.agree_share, 0, np.where(shares < config.split_share, 1, -1))


def rollout_labels(
    answers: Sequence[Sequence[str | None]], winners: Sequence[str | None], config: ProbeConfig
) -> Int[np.ndarray, " rollouts"]:
    """The labels of all rollouts in order: 1 suspect, 0 trusted, -1 not used for fitting.

    ``agreement``: those of the rollout's question (`agreement_labels`). ``contrast``: in a question whose rollouts give
    several answers, of which one has the most votes and at least ``split_share`` of them, 1 for a rollout with another
    answer and 0 for one with that answer; a rollout without an answer has no label. With one rollout per question
    nothing has.

    Args:
        answers: Question by question, the candidate that each rollout votes for.
        winners: Each question's majority answer.
        config: The probe's options.
    """
    votes = [Counter[str | None](answer for answer in given if answer is not None) for given in answers]
    shares = np.array(
        [count[winner] / len(given) for given, winner, count in zip(answers, winners, votes, strict=True)]
    )
    if config.labels == "agreement":
        labels = agreement_labels(shares, config)
        sizes = np.array([len(given) for given in answers])
        return np.repeat(np.where(sizes > 1, labels, -1), sizes)
    contrasts = []
    for given, winner, share, count in zip(answers, winners, shares, votes, strict=True):
        first, second = (*(n for _, n in count.most_common(2)), 0, 0)[:2]
        clear = first > second > 0 and share >= config.split_share
        contrasts += [int(answer != winner) if clear and answer is not None else -1 for answer in given]
    return np.array(contrasts)


@takes_arrays
def probe_matrix(
    ids: Int[np.ndarray, "rollouts size"],
    values: Float[np.ndarray, "rollouts size"],
    n_layers: int,
    n_neurons: int,
    config: ProbeConfig,
) -> sparse.csr_array:
    """What the probe reads of each rollout: `contribution_matrix`, or with ``layer_z`` in standard deviations.

    ``layer_z`` divides a contribution by the standard deviation over all neurons of its layer in that rollout, those
    outside the active set counting 0: a z-score taken from an inactive neuron's level, so that such a neuron stays 0.
    It leaves out how strongly a layer speaks as a whole; contributions with a sign (``unembed``) keep it.

    Args:
        ids: See `contribution_matrix`, as for ``values``.
        n_layers: Layers of the model.
        n_neurons: Its neurons over all layers.
        config: The probe's options.
    """
    if config.values == "layer_z":
        size = n_neurons // n_layers
        cells = np.arange(len(ids))[:, None] * n_layers + ids.clip(min=0) // size
        kept = np.where(ids == PAD, 0.0, values)
        total, square = (np.bincount(cells.ravel(), part.ravel(), len(ids) * n_layers) for part in (kept, kept**2))
        deviation = np.sqrt(np.maximum(square / size - (total / size) ** 2, 0))[cells]
        values = np.divide(kept, deviation, out=np.zeros(kept.shape), where=deviation > 0)
    return contribution_matrix(ids, values, n_neurons)


@takes_arrays
def fit_probe(
    contributions: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    fold_groups: Sequence[str],
    config: ProbeConfig,
) -> ProbeResult:
    """Fit the probe on the labelled rollouts and score every rollout by cross-fitting over groups of questions.

    Args:
        contributions: One row per rollout (`probe_matrix`).
        labels: 1 guessed, 0 known, -1 unlabelled (`rollout_labels`), or given.
        fold_groups: What no fold splits: the rollout's question, or a column of it such as its kind
            (`neurosig.hallucination.groups.fold_groups`).
        config: The probe's options.
    """
    groups = np.unique(np.asarray(fold_groups), return_inverse=True)[1]
    shortage = too_few(labels, groups, config)
    prepared = design(contributions, config.min_active_share)
    shortage = shortage or no_contrast(prepared.matrix, labels)
    if shortage:
        return _without_signal(shortage, len(labels), config)
    if fold_count(groups, config) < config.folds:
        logger.info("probe: %d values of %s, so as many folds", len(np.unique(groups)), config.groups)
    by_seed = cross_fit_by_seed(prepared.matrix, labels, groups, config)
    labelled = np.flatnonzero(labels >= 0)
    penalty = _penalty(prepared.matrix, labels, groups, config)
    weights = fit_l1(prepared.matrix[labelled], labels[labelled], penalty, config.seed).coef_[0]
    heaviest = np.argsort(-np.abs(weights), kind="stable")[: np.count_nonzero(weights)]
    if not len(heaviest) and np.ptp(by_seed) < 1e-6:
        return _without_signal("no neuron tells the two apart at this penalty", len(labels), config)
    return ProbeResult(by_seed.mean(axis=0), by_seed, prepared.columns[heaviest], weights[heaviest])


def _without_signal(shortage: str, rollouts: int, config: ProbeConfig) -> ProbeResult:
    logger.warning("probe: no signal: %s, so probe_score is 0.5 for every question", shortage)
    empty, same = np.empty(0), np.full((config.fold_seeds, rollouts), 0.5)
    return ProbeResult(same[0], same, empty.astype(np.int64), empty, shortage)


@takes_arrays
def no_contrast(matrix: sparse.csr_array, labels: Int[np.ndarray, " rollouts"]) -> str:
    """Why no probe can tell the labelled rollouts apart by these contributions; empty when one may."""
    if not matrix.shape[1]:
        return "no neuron is active in enough rollouts"
    labelled = matrix[np.flatnonzero(labels >= 0)]
    if not (labelled.max(axis=0) - labelled.min(axis=0)).count_nonzero():
        return "every neuron contributes the same to all rollouts"
    return ""


@takes_arrays
def too_few(labels: Int[np.ndarray, " rollouts"], groups: Int[np.ndarray, " rollouts"], config: ProbeConfig) -> str:
    """Why the folds cannot all hold questions of both labels; empty when they can."""
    known, guessed = (len(np.unique(groups[labels == label])) for label in (0, 1))
    if config.groups != "question":
        if min(known, guessed) >= 2 and all(
            {0, 1} <= set(labels[seen]) for seen, _ in _every_fold(labels, groups, config)
        ):
            return ""
        return (
            f"of {len(np.unique(groups))} values of {config.groups}, questions whose rollouts agree have {known} and "
            f"questions whose rollouts split {guessed}; both are needed outside every fold"
        )
    needed = config.folds * (2 if config.inverse_penalty is None else 1)  # folds within folds choose the penalty
    if min(known, guessed) >= needed:
        return ""
    if config.labels == "contrast":
        return (
            f"of {len(np.unique(groups))} questions, {min(known, guessed)} have a clear majority and rollouts outside "
            f"it; at least {needed} are needed"
        )
    return (
        f"of {len(np.unique(groups))} questions, the rollouts of {known} agree and of {guessed} split; at least "
        f"{needed} of each are needed"
    )


def cross_fit_by_seed(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    groups: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    fit: Fit = fit_l1,
) -> Float[np.ndarray, "seeds rollouts"]:
    """`cross_fit` with the folds of each of ``config.fold_seeds`` seeds; their mean has less of the folds' noise."""
    drawn = range(config.seed, config.seed + config.fold_seeds)
    return np.stack([cross_fit(matrix, labels, groups, replace(config, seed=seed), fit) for seed in drawn])


@takes_arrays
def cross_fit(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    groups: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    fit: Fit = fit_l1,
) -> Float[np.ndarray, " rollouts"]:
    """Score every rollout by a probe that saw no rollout of its group, not even to choose its penalty.

    Args:
        matrix: Scaled contributions (`neurosig.hallucination.lasso.design`).
        labels: 1 guessed, 0 known, -1 unlabelled (scored, but not used for fitting).
        groups: Index of the rollout's question, or of its kind, ...
        config: The probe's options.
        fit: The regression; default: sparse.
    """
    scores = np.empty(len(labels))
    for seen, unseen in fold_splits(labels, groups, config):
        seen = seen[labels[seen] >= 0]
        penalty = _penalty(matrix[seen], labels[seen], groups[seen], config, fit)
        scores[unseen] = fit(matrix[seen], labels[seen], penalty, config.seed).predict_proba(matrix[unseen])[:, 1]
    return scores


@takes_arrays
def regularisation_path(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    groups: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    fit: Fit = fit_l1,
) -> pd.DataFrame:
    """The probe at each inverse penalty: its size, and how well it does on questions it did not see.

    Columns: ``inverse_penalty`` ascending, ``neurons`` with a weight when fitted on everything, and mean and standard
    deviation over the folds of the AUROC and of the log loss with both labels weighing the same (nats).
    """
    import pandas as pd

    rows = np.flatnonzero(labels >= 0)
    matrix, labels, groups = matrix[rows], labels[rows], groups[rows]
    weight = compute_sample_weight("balanced", labels)
    folds = [
        (matrix[seen], labels[seen], matrix[unseen], unseen) for seen, unseen in fold_splits(labels, groups, config)
    ]
    table = []
    for penalty in inverse_penalties(matrix, labels, config):
        aurocs, losses = [], []
        for fitted, known, held_out, unseen in folds:
            scores = fit(fitted, known, penalty, config.seed).predict_proba(held_out)[:, 1]
            if len(np.unique(labels[unseen])) == 2:
                aurocs.append(roc_auc_score(labels[unseen], scores))
            losses.append(log_loss(labels[unseen], scores, sample_weight=weight[unseen], labels=[0, 1]))
        table.append(
            {
                "inverse_penalty": penalty,
                "neurons": np.count_nonzero(fit(matrix, labels, penalty, config.seed).coef_),
                "auroc_mean": np.mean(aurocs),
                "auroc_sd": np.std(aurocs, ddof=1),
                "log_loss_mean": np.mean(losses),
                "log_loss_sd": np.std(losses, ddof=1),
            }
        )
    return pd.DataFrame(table)


def fold_count(groups: Int[np.ndarray, " rollouts"], config: ProbeConfig) -> int:
    """Cross-fitting folds: as many as asked for, and at most one per group."""
    return min(config.folds, len(np.unique(groups)))


@takes_arrays
def inverse_penalties(
    matrix: sparse.csr_array, labels: Int[np.ndarray, " rollouts"], config: ProbeConfig
) -> list[float]:
    """The path's inverse penalties, ascending from where the first neuron enters."""
    steps = np.geomspace(1, config.path_span, config.path_steps)
    return [float(penalty) for penalty in entry_penalty(matrix, labels) * steps]


def chosen_penalty(path: pd.DataFrame, config: ProbeConfig) -> float:
    """The inverse penalty that cross-validation chooses from a `regularisation_path`.

    With ``one_standard_error``, the smallest whose mean is within one standard error (of the best one's mean over
    the folds) of the best mean: the sparsest probe that is not measurably worse.
    """
    sign = 1 if config.choose_by == "log_loss" else -1
    loss = sign * path[f"{config.choose_by}_mean"].to_numpy()
    best = int(np.argmin(loss))
    if config.one_standard_error:
        error = path[f"{config.choose_by}_sd"].to_numpy()[best] / np.sqrt(config.folds)
        best = int(np.argmax(loss <= loss[best] + error))
    return float(path["inverse_penalty"].iloc[best])


def _penalty(
    matrix: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    groups: Int[np.ndarray, " rollouts"],
    config: ProbeConfig,
    fit: Fit = fit_l1,
) -> float:
    if config.inverse_penalty is not None:
        return config.inverse_penalty
    return chosen_penalty(regularisation_path(matrix, labels, groups, config, fit), config)


def _every_fold(
    labels: Int[np.ndarray, " rollouts"], groups: Int[np.ndarray, " rollouts"], config: ProbeConfig
) -> Iterator[tuple[Int[np.ndarray, " seen"], Int[np.ndarray, " unseen"]]]:
    for seed in range(config.seed, config.seed + config.fold_seeds):
        yield from fold_splits(labels, groups, replace(config, seed=seed))


def fold_splits(
    labels: Int[np.ndarray, " rollouts"], groups: Int[np.ndarray, " rollouts"], config: ProbeConfig
) -> Iterator[tuple[Int[np.ndarray, " seen"], Int[np.ndarray, " unseen"]]]:
    """The rows of each fold's outside and of the fold itself; no fold splits a group."""
    folds = fold_count(groups, config)
    if folds == len(np.unique(groups)):
        return LeaveOneGroupOut().split(labels, labels, groups)
    return StratifiedGroupKFold(folds, shuffle=True, random_state=config.seed).split(labels, labels, groups)
