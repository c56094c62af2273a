"""Bootstrap over questions: every interval of the project resamples with these draws.

The draws depend on the seed and on the number of questions alone, so any two statistics of the same questions are
paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays

CELLS_AT_ONCE = 4_000_000
"""Resamples times questions in memory at a time."""


def question_draws(
    n: int, resamples: int, *, seed: int | Sequence[int], block: int | None = None
) -> Iterator[Int[np.ndarray, "draws questions"]]:
    """The questions of each bootstrap draw, drawn with replacement, one block of draws at a time.

    Args:
        n: Questions.
        resamples: Draws in all.
        seed: Seed of the draws; several numbers make one seed.
        block: Draws at a time; the draws do not depend on it.

    Raises:
        UserError: Fewer than two questions, or no resample.
    """
    if n < 2:
        raise UserError(f"resampling over questions: {n} question{'' if n == 1 else 's'}; at least 2 are needed")
    if resamples < 1:
        raise UserError(f"resampling over questions: resamples is {resamples}; it must be at least 1")
    rng = np.random.default_rng(seed)
    block = max(1, CELLS_AT_ONCE // n) if block is None else block
    for start in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - start), n))


def question_counts(
    n: int, resamples: int, *, seed: int | Sequence[int], block: int | None = None
) -> Iterator[Int[np.ndarray, "draws questions"]]:
    """`question_draws` as counts: how often each draw holds each question.

    Raises:
        UserError: See `question_draws`.
    """
    for drawn in question_draws(n, resamples, seed=seed, block=block):
        rows = len(drawn)
        offset = n * np.arange(rows)[:, None]
        yield np.bincount((drawn + offset).ravel(), minlength=rows * n).reshape(rows, n)


def resample_weights(n: int, resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "draws n"]:
    """Weight of each of ``n`` units in each draw with replacement; the weights of a draw sum to 1."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


@takes_arrays
def percentile_ends(draws: Float[np.ndarray, " draws"], level: float = 0.95) -> tuple[float, float]:
    """Ends of the percentile interval of bootstrap draws, as `scipy.stats.bootstrap` computes them.

    Raises:
        UserError: ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise UserError(f"resampling over questions: level is {level}; it must lie between 0 and 1")
    tail = (1 - level) / 2
    low, high = stats.quantile(draws, np.array([tail, 1 - tail]))
    return float(low), float(high)
