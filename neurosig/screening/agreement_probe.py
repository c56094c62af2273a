"""A ridge regression from the last token of a prompt to the vote share that the model's answers will have.

It is fitted on the vote shares of a finished export and reads no gold answer. Layer and penalty are chosen by
cross-validation, and every question of the export gets a prediction from a regression that never saw its vote share,
not even to choose these two. Reconstruction: the paper (arXiv 2607.02460) has no such step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import KernelCenterer, StandardScaler

from neurosig.runtime.cli import progress
from neurosig.runtime.errors import UserError
from neurosig.screening.config import ScreenProbeConfig
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.auroc import AnalysisConfig, auroc_interval, spearman_interval
from neurosig.statistics.metrics import Interval, paired_mean_interval

logger = logging.getLogger(__name__)

PENALTIES = np.logspace(-1.5, 1.5, 7)
"""L2 penalties per feature that cross-validation compares, on features of variance 1."""
MIN_QUESTIONS = 20
MIN_GROUPS = 3
"""Fewest groups of which a fold and the folds inside it can leave one out."""
AGREEING = 0.5
"""Vote share from which on a question passes the export's filter by default."""
BINS = 10

Splits = Sequence[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]
"""Places of the questions that a fold is fitted on, and of those that it leaves out."""


@dataclass(frozen=True, slots=True)
class AgreementProbe:
    """The probe fitted on all questions of a pilot.

    Attributes:
        layer: The layer that it reads, an index into the layers given.
        penalty: Its L2 penalty per feature.
        model: Scikit-learn's pipeline from features of that layer to the expected vote share.
        cross_fitted: Expected vote share of each question, from folds that did not see the question or its group.
    """

    layer: int
    penalty: float
    model: Pipeline
    cross_fitted: Float[np.ndarray, " questions"]

    def expected(self, features: Float[np.ndarray, "questions width"]) -> Float[np.ndarray, " questions"]:
        """Expected vote share by the features of ``layer``; outside 0 to 1 where the regression goes there."""
        return np.asarray(self.model.predict(features), dtype=np.float64)


@takes_arrays
def fit_probe(
    features: Float[np.ndarray, "questions layers width"],
    shares: Float[np.ndarray, " questions"],
    groups: Int[np.ndarray, " questions"],
    config: ScreenProbeConfig,
    *,
    quiet: bool = False,
) -> AgreementProbe:
    """Choose layer and penalty, and fit the probe.

    Features are scaled to variance 1 over all questions, which looks at no vote share. A fold's layer and penalty are
    chosen by folds inside it.

    Args:
        features: Of every layer.
        shares: Vote share of each question, 0 to 1.
        groups: Index of each question's group, which no fold divides.
        config: Folds and their seed.
        quiet: Show no progress bar.

    Raises:
        UserError: Too few questions or groups, or vote shares that are all equal.
    """
    check_pilot(shares, groups, config)
    outer, n_layers = _splits(groups, config), features.shape[1]
    inner = [_splits(groups[seen], config) for seen, _ in outer]
    held_out = np.empty((n_layers, len(PENALTIES), len(shares)))
    errors = np.empty((len(outer), n_layers, len(PENALTIES)))
    for layer in progress(range(n_layers), desc="fit", quiet=quiet):
        kernel = _kernel(features[:, layer])
        held_out[layer] = _held_out(kernel, shares, outer)
        for fold, (seen, _) in enumerate(outer):
            predicted = _held_out(kernel[np.ix_(seen, seen)], shares[seen], inner[fold])
            errors[fold, layer] = ((predicted - shares[seen]) ** 2).mean(axis=-1)
    cross_fitted = np.empty(len(shares))
    for fold, (_, unseen) in enumerate(outer):
        cross_fitted[unseen] = held_out[*_best(errors[fold]), unseen]
    layer, place = _best(((held_out - shares) ** 2).mean(axis=-1))
    penalty = float(PENALTIES[place])
    model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * features.shape[2]))
    return AgreementProbe(layer, penalty, model.fit(features[:, layer], shares), cross_fitted)


def check_pilot(
    shares: Float[np.ndarray, " questions"], groups: Int[np.ndarray, " questions"], config: ScreenProbeConfig
) -> None:
    """Refuse a pilot that no probe can be fitted on.

    Raises:
        UserError: Too few questions or groups, or vote shares that are all equal.
    """
    n_groups = len(np.unique(groups))
    if len(shares) < MIN_QUESTIONS:
        raise UserError(
            f"{len(shares)} questions with rollouts are too few for a probe; export at least {MIN_QUESTIONS}"
        )
    if n_groups < MIN_GROUPS:
        raise UserError(
            f"--groups {config.groups}: its questions have {n_groups} values of it; cross-fitting needs at least "
            f"{MIN_GROUPS}, so use another column, or question"
        )
    if np.ptp(shares) == 0:
        raise UserError(
            f"every question has the same vote share, {shares[0]:g}, so there is nothing to predict; export other "
            "questions, or more rollouts per question"
        )


def measured(probe: AgreementProbe, shares: Float[np.ndarray, " questions"], *, seed: int) -> dict[str, Any]:
    """How well the cross-fitted predictions agree with the vote shares: the measures of ``screen.json``.

    Returns:
        ``r2``; ``spearman``, and ``auroc`` for "the vote share is at least one half" (``None`` where all or none are),
        each with its 95% bootstrap interval over questions; ``calibration``, equal numbers of questions by their
        prediction: mean ``expected``, ``observed`` with its interval, and ``n``.
    """
    expected, owners = probe.cross_fitted, np.arange(len(shares))
    analysis = AnalysisConfig(seed=seed)
    agreeing = shares >= AGREEING
    auroc = auroc_interval(expected, agreeing, owners, analysis) if 0 < agreeing.sum() < len(shares) else None
    return {
        "r2": float(1 - ((expected - shares) ** 2).sum() / ((shares - shares.mean()) ** 2).sum()),
        "spearman": _ends(spearman_interval(expected, shares, owners, analysis)),
        "auroc": None if auroc is None else _ends(auroc),
        "calibration": [
            {
                "expected": float(expected[rows].mean()),
                "observed": _ends(paired_mean_interval(shares[rows], np.zeros(len(rows)), seed=seed)),
                "n": len(rows),
            }
            for rows in np.array_split(np.argsort(expected, kind="stable"), min(BINS, len(shares) // 4))
        ],
    }


def _ends(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _splits(groups: Int[np.ndarray, " questions"], config: ScreenProbeConfig) -> Splits:
    folds = GroupKFold(min(config.folds, len(np.unique(groups))), shuffle=True, random_state=config.seed)
    return list(folds.split(groups, groups=groups))


def _kernel(features: Float[np.ndarray, "questions width"]) -> Float[np.ndarray, "questions questions"]:
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    return scaled @ scaled.T / scaled.shape[1]


def _held_out(
    kernel: Float[np.ndarray, "questions questions"], shares: Float[np.ndarray, " questions"], splits: Splits
) -> Float[np.ndarray, "penalties questions"]:
    """Prediction of each question at every penalty, by a regression on the questions outside its fold."""
    predicted = np.empty((len(PENALTIES), len(shares)))
    for seen, unseen in splits:
        mean = shares[seen].mean()
        targets = np.tile(shares[seen, None] - mean, len(PENALTIES))
        model = make_pipeline(KernelCenterer(), KernelRidge(alpha=PENALTIES, kernel="precomputed"))
        fitted = model.fit(kernel[np.ix_(seen, seen)], targets)
        predicted[:, unseen] = fitted.predict(kernel[np.ix_(unseen, seen)]).T + mean
    return predicted


def _best(errors: Float[np.ndarray, "layers penalties"]) -> tuple[int, int]:
    """Layer and place of the penalty with the smallest error."""
    layer, place = np.unravel_index(np.argmin(errors), errors.shape)
    return int(layer), int(place)
