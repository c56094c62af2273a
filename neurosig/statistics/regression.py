"""A least-squares line through points of questions, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.metrics import Interval, bootstrap_interval


@dataclass(frozen=True, slots=True)
class LineFit:
    """A least-squares line of y on x with 95% bootstrap intervals over questions.

    Attributes:
        slope: Change of y per unit of x.
        intercept: y at x = 0.
        r: Pearson correlation; 0 where one side does not vary.
    """

    slope: Interval
    intercept: float
    r: Interval


@takes_arrays
def line_fit(
    x: Float[np.ndarray, " points"],
    y: Float[np.ndarray, " points"],
    questions: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> LineFit:
    """Fit y on x; a question with several points is resampled with all of them.

    Raises:
        UserError: The arrays differ in length, or there are fewer than two questions.
    """
    if not len(x) == len(y) == len(questions):
        raise UserError(f"line fit: {len(x)} x, {len(y)} y, {len(questions)} questions; give one per point")
    owners = np.unique(np.asarray(questions), return_inverse=True)[1]
    n = int(owners.max()) + 1 if len(owners) else 0

    def weights(chosen: Int[np.ndarray, " questions"]) -> Float[np.ndarray, " points"]:
        return np.bincount(chosen, minlength=n)[owners].astype(np.float64)

    def interval(part: int) -> Interval:
        return bootstrap_interval(lambda q: _line(x, y, weights(q))[part], n, seed=seed, resamples=resamples)

    return LineFit(interval(0), _line(x, y, np.ones(len(x)))[1], interval(2))


def _line(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], weight: Float[np.ndarray, " points"]
) -> tuple[float, float, float]:
    """Slope, intercept and correlation of a weighted least-squares line; a flat one where x does not vary."""
    weight = weight / weight.sum()
    x_mean, y_mean = weight @ x, weight @ y
    dx, dy = x - x_mean, y - y_mean
    xx, yy, xy = weight @ dx**2, weight @ dy**2, weight @ (dx * dy)
    slope = xy / xx if xx > 0 else 0.0
    r = xy / np.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0
    return float(slope), float(y_mean - slope * x_mean), float(r)
