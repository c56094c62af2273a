"""The probes of the signal search: every variant fitted on one task's exports and applied to its judged rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from figures.experiments.search_features import READINGS, Features
from figures.experiments.search_judge import STRICT, Judge
from figures.experiments.search_plan import Task, Variant
from neurosig.exported import Exported
from neurosig.hallucination.config import INVERSE_PENALTY, ProbeConfig, ProbeLabels
from neurosig.hallucination.groups import fold_groups
from neurosig.hallucination.lasso import design, fit_l1
from neurosig.hallucination.probe import probe_matrix, rollout_labels
from neurosig.statistics.permutation import permuted_labels

Array = np.ndarray[Any, Any]
HIDDEN_PENALTY = 0.01


class Source:
    """The rollouts of an export: features, labels and kinds, and how they are judged."""

    def __init__(self, exported: Exported, features: Features, judge: Judge, seed: int) -> None:
        self.exported, self.features, self.judge, self.seed = exported, features, judge, seed
        rows = list(exported.rows.values())
        sizes = [len(row.answers) for row in rows]
        self.owners = np.repeat(np.arange(len(rows)), sizes)
        named = fold_groups(rows, "kind") or {}
        self.kinds = np.array([named[row.question_id] for row in rows])[self.owners]
        self._matrices: dict[tuple[str, str], Any] = {}

    def labels(self, variant: Variant) -> Array:
        """Labels of the rollouts: 1 suspect, 0 trusted, -1 not used for fitting."""
        if variant.labels == "gold":
            return 1 - np.asarray(self.judge.right[STRICT], dtype=np.int64)
        rows = list(self.exported.rows.values())
        learned: ProbeLabels = "contrast" if variant.labels == "contrast" else "agreement"
        winners = [row.pseudo_label for row in rows]
        labels = rollout_labels([row.answers for row in rows], winners, ProbeConfig(labels=learned))
        if variant.labels == "shuffled":
            return permuted_labels(labels, self.owners, np.random.default_rng(self.seed))
        return labels

    def matrix(self, variant: Variant) -> Any:
        """What the variant's probe reads, [rollouts, neurons], or hidden states, dense."""
        if variant.positions == "hidden":
            return self.features.hidden
        key = variant.positions, variant.values
        if key not in self._matrices:
            signed = variant.values == "signed_z"
            column = READINGS.index(variant.positions + " signed" * signed)
            config = ProbeConfig(values="layer_z" if variant.values == "layer_z" else "contribution")
            ids, values = self.features.ids[:, column], self.features.values[:, column].astype(float)
            size = self.features.n_layers, self.features.n_layers * self.features.d_mlp
            self._matrices = {key: probe_matrix(ids, values, *size, config)}  # one at a time
        return self._matrices[key]


def trust_of(
    variant: Variant, task: Task, sources: Mapping[str, Source], labels: Mapping[str, Array], seed: int
) -> tuple[Array, int]:
    """Trust in each judged rollout, from probes that saw none of its kind or none of its export; and neurons used.

    Args:
        variant: The variant.
        task: Where it is fitted and judged.
        sources: Name of each export -> its rollouts.
        labels: Name of each export that is fitted on -> labels of its rollouts.
        seed: Seed of the solver.
    """
    judged = sources[task.judged]
    if task.judged not in task.fitted:
        features = _stacked([sources[name].matrix(variant) for name in task.fitted])
        suspect, used = _fitted(variant, features, np.concatenate([labels[name] for name in task.fitted]), judged, seed)
        return -suspect(judged.matrix(variant)), used
    matrix, known, trust, counts = judged.matrix(variant), labels[task.judged], np.empty(len(judged.owners)), []
    for kind in np.unique(judged.kinds):
        unseen = judged.kinds == kind
        suspect, used = _fitted(variant, matrix, np.where(unseen, -1, known), judged, seed)
        trust[unseen] = -suspect(matrix[np.flatnonzero(unseen)])
        counts.append(used)
    return trust, round(float(np.mean(counts)))


def _stacked(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sparse.csr_array(sparse.vstack(parts))


def _fitted(variant: Variant, matrix: Any, labels: Array, judged: Source, seed: int) -> tuple[Any, int]:
    """A function from features to the log odds of a suspect rollout, and the number of neurons it uses."""
    known = np.flatnonzero(labels >= 0)
    if variant.positions == "hidden":
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        dense = make_pipeline(
            StandardScaler(), LogisticRegression(C=HIDDEN_PENALTY, class_weight="balanced", max_iter=1000)
        ).fit(matrix[known], labels[known])
        return dense.decision_function, 0
    prepared = design(matrix, ProbeConfig().min_active_share)
    model = fit_l1(prepared.matrix[known], labels[known], INVERSE_PENALTY, seed)
    weights, intercept = model.coef_[0] / prepared.scale, float(model.intercept_[0])
    used = np.flatnonzero(weights)

    def log_odds(features: Any) -> Array:
        return np.asarray(features[:, prepared.columns[used]] @ weights[used] + intercept)

    return log_odds, len(used)
