"""The L1 probe that locates hallucination-indicative neurons without labels.

A question whose rollouts agree is likely known, one whose rollouts split is likely guessed; what lies between the two
teaches nothing but is scored all the same. A sparse logistic regression on the neurons' contributions learns the
difference; the neurons it keeps are the H-neurons (the probe of H-Neurons, arXiv 2512.01797, with agreement in place
of its gold labels: reconstruction).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import MaxAbsScaler

from neurosig.contributions import PAD
from neurosig.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """Options of the probe.

    Attributes:
        agree_share: A question is labelled known when its majority holds at least this share of the K answers; 1
            asks for unanimity, which a weak model rarely reaches.
        split_share: A question is labelled guessed when its majority holds less than this share.
        inverse_penalty: sklearn's ``C``; smaller keeps fewer neurons.
        folds: Cross-fitting folds; a question's rollouts are always scored by a probe that never saw the question.
        seed: Seed of the folds and the solver.
    """

    agree_share: float = 0.75
    split_share: float = 0.5
    inverse_penalty: float = 0.1
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("agree_share", 0 <= self.agree_share <= 1, "0 to 1"),
            ("split_share", 0 <= self.split_share <= self.agree_share, "0 to --probe-agree-share"),
            ("inverse_penalty", self.inverse_penalty > 0, "above 0"),
            ("folds", self.folds >= 2, "at least 2"),
        ):
            if not valid:
                raise UserError(f"probe-{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Cross-fitted scores and the neurons of the probe fitted on everything.

    Attributes:
        scores: Probability that a rollout's question is guessed, from the fold that did not see the question.
        neurons: Column of each neuron with a weight, heaviest first.
        weights: Their weights on contributions scaled to a maximum of 1; positive points to hallucination.
        informative: False when one class is too small to learn from; all scores are then 0.5.
    """

    scores: Float[np.ndarray, " rollouts"]
    neurons: Int[np.ndarray, " neurons"]
    weights: Float[np.ndarray, " neurons"]
    informative: bool


def contribution_matrix(
    ids: Int[np.ndarray, "rollouts size"], values: Float[np.ndarray, "rollouts size"], n_neurons: int
) -> sparse.csr_array:
    """Contributions as a sparse matrix [rollouts, n_neurons]; a neuron outside a rollout's active set counts 0.

    Args:
        ids: Flat neuron ids of each rollout's active set, unique in a row; `PAD` where sets differ in size.
        values: Their contributions; what stands beside a `PAD` is ignored.
        n_neurons: Neurons of the model, ``n_layers * d_mlp``.
    """
    order = np.argsort(ids, axis=1)
    columns = np.take_along_axis(ids, order, axis=1).astype(np.int32)  # liblinear takes 32-bit indices only
    data = np.take_along_axis(values, order, axis=1).astype(np.float64)
    kept = columns != PAD
    pointers = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return sparse.csr_array((data[kept], columns[kept], pointers), shape=(len(ids), n_neurons))


def agreement_labels(shares: Float[np.ndarray, " questions"], config: ProbeConfig) -> Int[np.ndarray, " questions"]:
    """1 where rollouts split (guessed), 0 where they agree (known), -1 in between."""
    return np.where(shares >= config.agree_share, 0, np.where(shares < config.split_share, 1, -1))


def fit_probe(
    contributions: sparse.csr_array,
    labels: Int[np.ndarray, " rollouts"],
    question_ids: Sequence[str],
    config: ProbeConfig,
) -> ProbeResult:
    """Fit the probe on the labelled rollouts and score every rollout by cross-fitting over questions.

    Args:
        contributions: One row a rollout (`contribution_matrix`).
        labels: Label of the rollout's question (`agreement_labels`).
        question_ids: The rollout's question; the group of cross-fitting.
        config: The probe's options.
    """
    first, groups = np.unique(np.asarray(question_ids), return_index=True, return_inverse=True)[1:]
    by_question = labels[first]
    guessed, known = int((by_question == 1).sum()), int((by_question == 0).sum())
    if min(guessed, known) < config.folds:
        logger.warning(
            "probe: no signal: of %d questions, the rollouts of %d agree and of %d split; at least %d of each are "
            "needed, so every hallucination score is 0.5",
            len(by_question), known, guessed, config.folds,
        )  # fmt: skip
        empty = np.empty(0)
        return ProbeResult(np.full(len(labels), 0.5), empty.astype(np.int64), empty, informative=False)

    folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    scores = np.empty(len(labels))
    for seen, unseen in folds.split(contributions, labels, groups):
        seen = seen[labels[seen] >= 0]
        model, scaler = _fit(contributions[seen], labels[seen], config)
        scores[unseen] = model.predict_proba(scaler.transform(contributions[unseen]))[:, 1]
    labelled = np.flatnonzero(labels >= 0)
    weights = _fit(contributions[labelled], labels[labelled], config)[0].coef_[0]
    kept = np.flatnonzero(weights)
    kept = kept[np.argsort(-np.abs(weights[kept]), kind="stable")]
    return ProbeResult(scores, kept, weights[kept], informative=True)


def _fit(
    contributions: sparse.csr_array, labels: Int[np.ndarray, " rollouts"], config: ProbeConfig
) -> tuple[LogisticRegression, MaxAbsScaler]:
    scaler = MaxAbsScaler().fit(contributions)
    model = LogisticRegression(
        l1_ratio=1.0,
        C=config.inverse_penalty,
        solver="liblinear",
        class_weight="balanced",
        random_state=config.seed,
        max_iter=1000,
    )
    return model.fit(scaler.transform(contributions), labels), scaler
