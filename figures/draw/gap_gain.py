"""Does a larger entropy gap mean a larger gain? Question by question, and from one context policy to another.

Reads ``gap_gain.csv`` of the results folder, which ``python -m figures.experiments.context_policies`` writes (what is
measured, and how, is said there), or the committed ``figures/data/gap_gain.csv`` where there is none; writes
``gap_gain.pdf``, ``.png`` and the points as ``gap_gain.csv``. The line is `distill.entropy_gap.gap_fit`: least squares,
resampled by question.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from distill.entropy_gap import GapFit, gap_fit
from figures.experiments.context_policies import LABELS, POLICIES
from figures.notebook.explore import KINDS, draw_gap
from figures.style import caption, save_figure, use_style
from neurosig.runtime.files import write_atomic
from neurosig.statistics.metrics import Interval, paired_mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "gap_gain"
NEEDS = None
COMMITTED = Path(__file__).parents[1] / "data" / f"{NAME}.csv"
SHOWN = tuple(name for name in POLICIES if name != "none" and not name.startswith("nearest_"))
"""Contexts from the same pool of questions; without one both gap and gain are zero."""
SEED = 0


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    use_style()
    import matplotlib.pyplot as plt

    made = results / f"{NAME}.csv"
    source = made if made.is_file() else COMMITTED
    table = pd.read_csv(source)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{NAME}.csv", source.read_text())
    shown = table[table["policy"].isin(SHOWN)]
    pooled, within = fits(shown)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5), width_ratios=[1.25, 1])
    draw_gap(left, shown.assign(policy=shown["policy"].map(LABELS)), pooled)
    left.set_title("each question under each context")
    left.margins(0.04)
    _draw_means(right, shown)
    right.set_title("means of the contexts")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, handletextpad=0.2)
    n = shown["question"].nunique()
    caption(
        figure,
        f"line: slope {_spoken(pooled.slope)} a nat, r {_spoken(pooled.r)}{_verdict(pooled)}; within contexts: slope "
        f"{_spoken(within.slope)}{_verdict(within)}\n{n} questions x {len(SHOWN)} contexts; 95% bootstrap intervals "
        f"over questions, seed {SEED}; n.s.: the interval of the slope holds zero",
    )
    paths = save_figure(figure, out, NAME)
    plt.close(figure)
    return [*paths, out / f"{NAME}.csv"]


def fits(points: pd.DataFrame) -> tuple[GapFit, GapFit]:
    """The line through all points, and that through what is left of them without each context's mean."""
    centred = points[["gap", "gain"]] - points.groupby("policy")[["gap", "gain"]].transform("mean")
    questions = list(points["question"])
    pooled, within = (
        gap_fit(part["gap"].to_numpy(np.float64), part["gain"].to_numpy(np.float64), questions, seed=SEED)
        for part in (points, centred)
    )
    return pooled, within


def _draw_means(axis: Axes, points: pd.DataFrame) -> None:
    for place, (_, mine) in enumerate(points.groupby("policy", sort=False)):
        colour, marker = KINDS[place]
        gap, gain = (_mean(mine[column]) for column in ("gap", "gain"))
        axis.errorbar(
            gap.estimate,
            gain.estimate,
            [[gain.estimate - gain.low], [gain.high - gain.estimate]],
            [[gap.estimate - gap.low], [gap.high - gap.estimate]],
            fmt=marker,
            color=colour,
            capsize=2,
            markersize=5.5,
            linewidth=1.2,
        )
    axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set(xlabel="entropy gap (nats a token)", ylabel="gain of the teacher")


def _mean(values: pd.Series[float]) -> Interval:
    return paired_mean_interval(values.to_numpy(np.float64), np.zeros(len(values)), seed=SEED)


def _spoken(interval: Interval) -> str:
    return f"{interval:+.2f}"


def _verdict(fit: GapFit) -> str:
    return " (n.s.)" if fit.slope.low <= 0 <= fit.slope.high else ""
