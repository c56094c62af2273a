"""Parts of pictures that the notebooks and the paper's figures share, and the colours that suit both.

On paper lines are black on white; in a notebook (`notebook_colours`) the background is transparent and lines and text
are of a grey that reads on white and on the dark theme's #111.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from figures.style import SERIES, Colour

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from neurosig.statistics.metrics import Interval
    from neurosig.statistics.regression import LineFit

P = ParamSpec("P")

TRUST = {
    "neuron": (Colour.OURS, "D"),
    "other": (Colour.GREEN, "^"),
    "output": (Colour.BASELINE, "o"),
    "control": (Colour.BLACK, "x"),
}
"""Kind of signal -> colour and marker."""
MID_GREY = "#7a7a7a"
"""Contrast 4.3 on white and 4.4 on #111."""
NOTEBOOK: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "text.color": MID_GREY,
    "axes.labelcolor": MID_GREY,
    "axes.edgecolor": MID_GREY,
    "xtick.color": MID_GREY,
    "ytick.color": MID_GREY,
    "grid.color": "#80808040",
    "legend.framealpha": 0,
}
_theme: Any = {}


def notebook_colours() -> None:
    """Draw on a transparent background in mid-grey from now on: the pictures of `figures.notebook.explore`, and what
    users draw themselves."""
    _theme.update(NOTEBOOK)
    matplotlib.rcParams.update(NOTEBOOK)


def themed(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the notebook's colours, if `notebook_colours` chose them, whatever was drawn in between."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_theme):
            figure = draw(*args, **kwargs)
        if _theme:
            for axis in figure.axes:  # matplotlib makes ticks only when it renders
                axis.tick_params(color=MID_GREY, labelcolor=MID_GREY, grid_color=NOTEBOOK["grid.color"])
        return figure

    return drawn


def ink() -> str:
    """Colour of lines without a meaning of their own."""
    return str(matplotlib.rcParams["text.color"])


def axes_for(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw on: the given ones, or those of a new figure."""
    if ax is not None:
        return ax
    made: Axes = Figure(figsize=size).subplots()
    return made


def figure_of(axis: Axes) -> Figure:
    """The figure that the axes are part of."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    return figure


def draw_similarity(axis: Axes, similarity: Float[np.ndarray, "n n"], labels: Sequence[str]) -> AxesImage:
    """Similarities without the diagonal; blocks of equal labels are framed."""
    off_diagonal = similarity.copy()
    np.fill_diagonal(off_diagonal, np.nan)
    image = axis.imshow(off_diagonal, cmap="cividis", interpolation="nearest")
    for low, high in itertools.pairwise(edges(labels)):
        corners = [low - 0.5, high - 0.5]
        axis.plot(
            [corners[i] for i in (0, 1, 1, 0, 0)], [corners[i] for i in (0, 0, 1, 1, 0)], color="white", linewidth=1.2
        )
    axis.grid(visible=False)
    return image


def draw_forest(axis: Axes, signals: Sequence[tuple[str, str, Interval]]) -> None:
    """AUROC of every (name, kind, AUROC) with its interval, best on top; each kind gets a handle for the legend."""
    ranked = sorted(signals, key=lambda signal: signal[2].estimate)
    for place, (_, kind, auroc) in enumerate(ranked):
        colour, marker = _look(kind)
        axis.hlines(place, auroc.low, auroc.high, color=colour, linewidth=1.4)
        axis.plot(auroc.estimate, place, marker, color=colour, markersize=5.5)
    present = {kind for _, kind, _ in ranked}
    for kind in (kind for kind in TRUST if kind in present):
        colour, marker = _look(kind)
        label = {"neuron": "reads neurons", "output": "reads outputs"}.get(kind, kind)
        axis.plot([], [], marker, color=colour, label=label)
    axis.axvline(0.5, color=ink(), linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(ranked)), [name.replace("_", " ") for name, _, _ in ranked])
    axis.grid(axis="y", visible=False)


def _look(kind: str) -> tuple[str, str]:
    colour, marker = TRUST[kind]
    return (ink() if colour == Colour.BLACK else colour), marker


def draw_gap(axis: Axes, table: pd.DataFrame, fit: LineFit) -> None:
    """Points of ``gap`` and ``gain``, one series per ``policy``, and the fitted line."""
    draw_series(axis, table["gap"].to_numpy(), table["gain"].to_numpy(), list(table["policy"]), alpha=0.75)
    ends = np.array([table["gap"].min(), table["gap"].max()])
    axis.plot(ends, fit.intercept + fit.slope.estimate * ends, color=ink(), linewidth=1.4)
    axis.axhline(0, color=Colour.ZERO, linewidth=0.8, zorder=0)
    axis.set(xlabel="entropy gap (nats per token)", ylabel="teacher's minus student's accuracy")


def edges(labels: Sequence[str]) -> list[int]:
    """Index of the start of each run of equal labels, and the end."""
    return [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]


def draw_series(
    axis: Axes, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], labels: Sequence[str], alpha: float = 0.9
) -> None:
    """A scatter plot with one colour and marker per label."""
    for place, label in enumerate(dict.fromkeys(labels)):
        colour, marker = SERIES[place % len(SERIES)]
        mask = np.array([other == label for other in labels])
        axis.scatter(
            x[mask], y[mask], color=colour, marker=marker, s=30, alpha=alpha, edgecolors="white", linewidths=0.5,
            label=label.replace("_", " "),
        )  # fmt: skip
