"""From a probe's log odds to probabilities that match rates, fitted on scores of texts that the probe did not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import special
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from neurosig.runtime.shapes import check_config

Method = Literal["sigmoid", "isotonic"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A rising map from log odds to probabilities.

    Attributes:
        method: ``sigmoid`` (Platt scaling) has a slope and an intercept, ``isotonic`` steps.
        x: The slope; or the log odds of the steps, ascending.
        y: The intercept; or the probabilities there, linear in between.
    """

    method: Method
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        check_config(self)

    def __call__(self, log_odds: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
        """Probabilities of the positive class."""
        if self.method == "sigmoid":
            return np.asarray(special.expit(self.x[0] * log_odds + self.y[0]))
        return np.interp(log_odds, self.x, self.y)


def fit_calibration(
    log_odds: Float[np.ndarray, " texts"], labels: Int[np.ndarray, " texts"], method: Method
) -> Calibration:
    """Fit on cross-fitted log odds of labelled texts.

    The targets of ``sigmoid`` are Platt's, a little inside 0 and 1, so that separable scores give finite odds.

    Where the cross-fitted scores do not rise with the label, every probability is the share of positive labels: a
    falling map would turn the probe round.
    """
    if method == "isotonic":
        model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(log_odds, labels)
        return Calibration(method, tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))
    positive = int(labels.sum())
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    line = LogisticRegression(C=np.inf, max_iter=1000).fit(
        np.tile(log_odds, 2)[:, None],
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope, intercept = float(line.coef_[0, 0]), float(line.intercept_[0])
    if slope <= 0:
        slope, intercept = 0.0, float(special.logit(labels.mean()))
    return Calibration(method, (slope,), (intercept,))
