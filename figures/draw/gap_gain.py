"""Does a larger entropy gap mean a larger gain? Question by question, and from one context policy to another.

Reads ``gap_gain.csv`` of the results folder, which ``python -m figures.experiments.context_policies`` measures and
writes, or the committed ``figures/data/gap_gain.csv``; writes ``gap_gain.pdf``, ``.png`` and the points as
``gap_gain.csv``. The line is `neurosig.statistics.regression.line_fit`: least squares, resampled by
question.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from figures.experiments.context_policies import LABELS, POLICIES
from figures.notebook.parts import draw_gap
from figures.sources import made_or_committed
from figures.style import SERIES, Colour, caption, save_figure, subplots
from neurosig.statistics.metrics import Interval, paired_mean_interval
from neurosig.statistics.regression import LineFit, line_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "gap_gain"
NEEDS = None
SHOWN = tuple(name for name in POLICIES if name != "none" and not name.startswith("nearest_"))
"""Policies that take contexts from the same pool of questions; without a context both gap and gain are zero."""
SEED = 0


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    source = made_or_committed(results / f"{NAME}.csv", NAME)
    table = pd.read_csv(source)
    points = table[table["policy"].isin(SHOWN)]
    pooled, within = fits(points)
    figure, (left, right) = subplots(1, 2, size=(7, 3.5), width_ratios=[1.25, 1])
    draw_gap(left, points.assign(policy=points["policy"].map(LABELS)), pooled)
    left.set_title("each question under each context")
    left.margins(0.04)
    _draw_means(right, points)
    right.set_title("means of the contexts")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, handletextpad=0.2)
    n = points["question"].nunique()
    caption(
        figure,
        f"line: slope {pooled.slope:+.2f} per nat, r {pooled.r:+.2f}{_verdict(pooled)}; within contexts: slope "
        f"{within.slope:+.2f}{_verdict(within)}\n{n} questions x {len(SHOWN)} contexts; 95% bootstrap intervals "
        f"over questions, seed {SEED}; n.s.: the interval of the slope contains zero",
    )
    return save_figure(figure, out, NAME, source.read_text())


def fits(points: pd.DataFrame) -> tuple[LineFit, LineFit]:
    """The line through all points, and the line through the points after subtracting the mean of each context."""
    centred = points[["gap", "gain"]] - points.groupby("policy")[["gap", "gain"]].transform("mean")
    questions = list(points["question"])
    pooled, within = (
        line_fit(part["gap"].to_numpy(np.float64), part["gain"].to_numpy(np.float64), questions, seed=SEED)
        for part in (points, centred)
    )
    return pooled, within


def _draw_means(axis: Axes, points: pd.DataFrame) -> None:
    for place, (_, policy) in enumerate(points.groupby("policy", sort=False)):
        colour, marker = SERIES[place]
        gap, gain = (_mean(policy[column]) for column in ("gap", "gain"))
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
    axis.axhline(0, color=Colour.ZERO, linewidth=0.8, zorder=0)
    axis.set(xlabel="entropy gap (nats per token)", ylabel="gain of the teacher")


def _mean(values: pd.Series[float]) -> Interval:
    return paired_mean_interval(values.to_numpy(np.float64), np.zeros(len(values)), seed=SEED)


def _verdict(fit: LineFit) -> str:
    return " (n.s.)" if fit.slope.low <= 0 <= fit.slope.high else ""
