"""The steps of `Probe.fit`, each by the functions of `neurosig.hallucination`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import sparse
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.kinds import signs_by_kind
from neurosig.hallucination.lasso import Design, design, fit_l1, fit_ridge
from neurosig.hallucination.locate import FittedProbe, build_probe, stable_neurons
from neurosig.hallucination.probe import (
    Fit,
    chosen_penalty,
    cross_fit,
    cross_fit_by_seed,
    inverse_penalties,
    no_contrast,
    regularisation_path,
)
from neurosig.hallucination.stability import Stability
from neurosig.runtime.errors import UserError
from neurosig.statistics.permutation import Permutation, permutation_p

Kind = Literal["l1", "dense"]
SHOWN_DENSE = 100
"""Neurons in the table of a dense probe, which gives every neuron a weight."""
HALVED_GROUPS = 20
"""Groups from which on stability selection halves the groups; fewer have too few different halves."""
FITS: dict[Kind, Fit] = {"l1": fit_l1, "dense": fit_ridge}


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is fitted: the texts' rows, and after them those of the same texts at other tokens, if any.

    Attributes:
        prepared: Scaled columns of all rows.
        labels: 1, 0 or -1 of each text.
        groups: Group of each text.
        prompts: Prompt of each text.
    """

    prepared: Design
    labels: Int[np.ndarray, " texts"]
    groups: Int[np.ndarray, " texts"]
    prompts: Int[np.ndarray, " texts"]

    @property
    def n(self) -> int:
        """Texts."""
        return len(self.labels)

    @property
    def own(self) -> Design:
        """The texts' rows alone."""
        return Design(self.prepared.matrix[: self.n], self.prepared.columns, self.prepared.scale)

    def all_labels(self, labels: Int[np.ndarray, " texts"]) -> Int[np.ndarray, " rows"]:
        """The labels of all rows: those of other tokens are negative where the text has a label."""
        return np.concatenate([labels, np.where(labels >= 0, 0, -1)])[: self.prepared.matrix.shape[0]]

    def repeated(self, index: Int[np.ndarray, " texts"]) -> Int[np.ndarray, " rows"]:
        """An index of texts for all rows."""
        return np.concatenate([index, index])[: self.prepared.matrix.shape[0]]


def prepare(
    matrix: sparse.csr_array,
    others: sparse.csr_array | None,
    labels: Int[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    prompts: Int[np.ndarray, " texts"],
    config: ProbeConfig,
) -> Rows:
    """Scale the columns of all rows.

    Raises:
        UserError: No neuron is active often enough, or none differs.
    """
    whole = matrix if others is None else sparse.csr_array(sparse.vstack([matrix, others]))
    rows = Rows(design(whole, config.min_active_share), labels, groups, prompts)
    if nothing := no_contrast(rows.prepared.matrix, rows.all_labels(labels)):
        raise UserError(f"probe: {nothing}; lower min_active_share or give other texts")
    return rows


def fitted_probe(rows: Rows, d_mlp: int, n_neurons: int, config: ProbeConfig, kind: Kind) -> FittedProbe:
    """`neurosig.hallucination.locate.HallucinationProbe.fit` with groups apart from the halves, and other tokens."""
    matrix, fit = rows.prepared.matrix, FITS[kind]
    labels, groups = rows.all_labels(rows.labels), rows.repeated(rows.groups)
    path = regularisation_path(matrix, labels, groups, config, fit)
    scores = cross_fit_by_seed(matrix, labels, groups, config, fit).mean(axis=0)[: rows.n]
    penalty = config.inverse_penalty or chosen_penalty(path, config)
    used = np.flatnonzero(labels >= 0)
    model = fit(matrix[used], labels[used], penalty, config.seed)
    weights = shown = model.coef_[0]
    if kind == "l1":
        halved = rows.repeated(halves(rows))
        stability = stable_neurons(matrix[used], labels[used], halved[used], config)
    else:
        stability = Stability(np.zeros(len(weights)), config.stable_frequency, 0.0, 0)
        least = np.sort(np.abs(weights))[-SHOWN_DENSE:][0]
        shown = np.where(np.abs(weights) >= least, weights, 0.0)
    size = n_neurons, d_mlp
    return build_probe(config, size, rows.own, rows.labels, scores, path, penalty, model, stability, shown)


def halves(rows: Rows) -> Int[np.ndarray, " texts"]:
    """What stability selection keeps together: the groups, or the prompts where groups are few."""
    return rows.groups if len(np.unique(rows.groups)) >= HALVED_GROUPS else rows.prompts


def mixed_groups(rows: Rows) -> bool:
    """Whether a group has both labels."""
    used = rows.labels >= 0
    pairs = np.unique(np.stack([rows.groups[used], rows.labels[used]]), axis=1)
    return pairs.shape[1] > len(np.unique(pairs[0]))


def permuted(rows: Rows, config: ProbeConfig, kind: Kind, n: int, within: bool) -> Permutation:
    """The cross-fitted AUROC with permuted labels, at a penalty that no label chose.

    That is the given one, or the path's middle: a fixed multiple of the penalty at which a neuron enters, which is
    found again for each permutation. One drawing of the folds.

    Raises:
        UserError: The labels cannot be permuted.
    """
    matrix, fit = rows.prepared.matrix, FITS[kind]
    texts = np.flatnonzero(rows.labels >= 0)

    def auroc(labels: Int[np.ndarray, " texts"]) -> float:
        every, groups = rows.all_labels(labels), rows.repeated(rows.groups)
        used = np.flatnonzero(every >= 0)
        penalties = inverse_penalties(matrix[used], every[used], config)
        fixed = replace(config, inverse_penalty=config.inverse_penalty or penalties[len(penalties) // 2])
        try:
            scores = cross_fit(matrix, every, groups, fixed, fit)
        except ValueError:  # a fold left one label only: this drawing tells nothing apart
            return 0.5
        return float(roc_auc_score(labels[texts], scores[texts]))

    every_row = np.arange(rows.n)
    if within:
        return permutation_p(auroc, rows.labels, n, config.seed, every_row, strata=rows.groups)
    return permutation_p(auroc, rows.labels, n, config.seed, rows.groups)


def group_signs(rows: Rows, neurons: pd.DataFrame, d_mlp: int) -> pd.DataFrame:
    """In how many groups each neuron's sign can be told, and in how many it is that of its weight, as two columns."""
    places = np.searchsorted(rows.prepared.columns, neurons["layer"] * d_mlp + neurons["index"])
    found = signs_by_kind(
        rows.own.matrix[:, places], neurons["weight"].to_numpy(), rows.labels, np.arange(rows.n), rows.groups
    )
    return pd.DataFrame({"groups": found.n_kinds, "groups_agreeing": found.n_agreeing})
