"""What a grid's intervals and claims rest on, in words made from its numbers: seeds, and measured coverage."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from figures.grid.rows import Grid
from neurosig.statistics.coverage import seed_interval_coverage

STUDIES, DRAWS = 500, 300
ASSUMED_SD = 0.01
"""Standard deviation of Avg@K between training seeds, for a grid that has one seed per run."""


def evaluation_text(evaluations: int) -> str:
    """How many draws of the rollouts the numbers average over."""
    return "one evaluation seed" if evaluations == 1 else f"{evaluations} evaluation seeds"


def coverage_text(grid: Grid) -> str:
    """The coverage of the grid's intervals of Avg@K, measured by simulation at its size; empty without training.

    Numbers of questions, K, numbers of seeds, the base's accuracy, and the spread between training seeds are the
    grid's; a grid without repeated seeds cannot show a spread, and one point is assumed.
    """
    sizes = sorted({_seeds(grid, run.method, run.source) for run in grid.answers if run.source})
    if not sizes:
        return ""
    measured = seed_sd(grid)
    between = ASSUMED_SD if measured is None else measured
    accuracy, spread = _base(grid)
    parts = []
    for seeds in sizes:
        covered = seed_interval_coverage(
            n=round(np.mean([len(ids) for ids in grid.ids.values()])),
            k=grid.k,
            seeds=seeds,
            seed_sd=round(between, 4),
            domains=len(grid.ids),
            accuracy=round(accuracy, 4),
            spread=round(spread, 4),
            replicates=STUDIES,
            resamples=DRAWS,
        )
        parts.append(f"{covered:.0%} with {seeds} training seed{'s' if seeds > 1 else ''}")
    source = "as assumed, for no run has a second one" if measured is None else "as measured here"
    return (
        f"Measured coverage of a 95% interval of a mean change in Avg@{grid.k}, in {STUDIES} simulated grids of this "
        f"size with a standard deviation of {100 * between:.1f} points between training seeds ({source}): "
        f"{', '.join(parts)}."
    )


def seed_sd(grid: Grid) -> float | None:
    """Standard deviation of Avg@K between training seeds, as a fraction, without what sampling alone makes.

    Pooled over methods, sources and targets with several seeds; ``None`` where there are none.
    """
    excess = []
    for method, source in dict.fromkeys((run.method, run.source) for run in grid.answers if run.source):
        runs = [run for run in grid.answers if (run.method, run.source) == (method, source)]
        for target in grid.ids if len(runs) > 1 else ():
            shares = [grid.answers[run][target].n_correct / grid.k for run in runs]
            noise = [_sampling_variance(share, grid.k).mean() / share.size for share in shares]
            excess.append(np.var([share.mean() for share in shares], ddof=1) - np.mean(noise))
    return float(np.sqrt(max(0.0, np.mean(excess)))) if excess else None


def _seeds(grid: Grid, method: str, source: str) -> int:
    return sum((run.method, run.source) == (method, source) for run in grid.answers)


def _base(grid: Grid) -> tuple[float, float]:
    """Mean and variance over questions of the base's chance of a right sample, the variance without sampling noise."""
    base = next(by_target for run, by_target in grid.answers.items() if not run.source)
    share = np.concatenate([answers.n_correct[:, 0] / grid.k for answers in base.values()])
    accuracy = float(np.clip(share.mean(), 0.02, 0.98))
    spread = share.var() - _sampling_variance(share, grid.k).mean()
    most = accuracy * (1 - accuracy)  # every chance is 0 or 1
    return accuracy, float(np.clip(spread, 0.05 * most, 0.95 * most))


def _sampling_variance(share: Float[np.ndarray, " *n"], k: int) -> Float[np.ndarray, " *n"]:
    """Estimated variance of each share of k samples, given its question's chance."""
    return share * (1 - share) / max(1, k - 1)
