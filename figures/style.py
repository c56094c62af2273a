"""One look for every figure: colour-blind safe, readable in greyscale, the same bytes on every run."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from neurosig.runtime.files import write_atomic


class Colour:
    """The palette: hues of Okabe & Ito (2008), named by meaning, and greys. Markers, lines or hatches repeat them."""

    OURS = "#0072B2"
    """N-OPSD with this project's probe, neuron signals, located neurons."""
    VARIANT = "#56B4E9"
    """N-OPSD as published, variants of ours."""
    CONTROL = "#E69F00"
    """Controls: the best temperature, random neurons, neurons or contexts of the same kind."""
    BASELINE = "#7f7f7f"
    """The untrained model, output signals, other methods."""
    CONTRADICTED = "#D55E00"
    GREEN = "#009E73"
    PURPLE = "#CC79A7"
    """Green and purple: further series."""
    WINE, OLIVE, TEAL, INDIGO = "#882255", "#999933", "#44AA99", "#332288"
    """Further methods; hues of Tol's muted scheme."""
    BLACK = "#000000"
    TEXT = "#333333"
    NOTE = "#555555"
    OTHER_METHOD = "#595959"
    BACKGROUND = "#b0b0b0"
    """Marks and bars that are only there for comparison."""
    ZERO = "#bbbbbb"
    BANDS = ("#eeeeee", "#d9d9d9")
    PAPER = "#f7f7f7"
    GRID = "#e6e6e6"


METHODS: Mapping[str, tuple[str, str]] = {
    "base": (Colour.BASELINE, "o"),
    "control": (Colour.CONTROL, "s"),
    "lmsi": (Colour.WINE, "o"),
    "ttrl": (Colour.PURPLE, "s"),
    "intuitor": (Colour.OLIVE, "^"),
    "u-opsd": (Colour.TEAL, "v"),
    "opsa": (Colour.BLACK, "P"),
    "canon": (Colour.INDIGO, "v"),
    "full": (Colour.OTHER_METHOD, "s"),
    "redundancy": (Colour.OTHER_METHOD, "v"),
    "consistency": (Colour.OTHER_METHOD, "^"),
    "mutual": (Colour.OTHER_METHOD, "P"),
    "inflow": (Colour.GREEN, "^"),
    "nopsd": (Colour.VARIANT, "D"),
    "probe": (Colour.OURS, "D"),
    "vote-only": (Colour.CONTROL, "o"),
    "probe-kind": (Colour.CONTROL, "^"),
    "probe-random": (Colour.CONTROL, "v"),
    "vote-only-random": (Colour.CONTROL, "P"),
}
"""Method of the grid -> its colour and marker in every figure; controls share a colour."""
RUNS: Mapping[str, tuple[str, str, str]] = {
    "base": ("base", *METHODS["base"]),
    "control": ("base, best temperature", *METHODS["control"]),
    "trained": ("N-OPSD", *METHODS["probe"]),
}
"""Run -> label, colour and marker."""
SERIES = (
    (Colour.OURS, "o"),
    (Colour.CONTROL, "s"),
    (Colour.GREEN, "^"),
    (Colour.PURPLE, "D"),
    (Colour.BASELINE, "v"),
    (Colour.VARIANT, "P"),
    (Colour.CONTRADICTED, "X"),
)
"""Colour and marker of each of several series without a meaning of their own, such as kinds of question."""


def use_style() -> None:
    """Set matplotlib up for a paper: small sans-serif type, thin frames, model text never read as a formula."""
    matplotlib.rcParams.update(
        {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "white"),
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "black"),
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": Colour.GRID,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,
            "svg.hashsalt": "neurosig",
            "text.parse_math": False,
        }
    )


def subplots(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **layout: Any) -> tuple[Figure, Any]:
    """A figure in the project's style and its panels, as `matplotlib.pyplot.subplots` returns them.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        size: Width and height in inches.
        **layout: Options of `matplotlib.figure.Figure.subplots`, such as ``width_ratios``.
    """
    use_style()
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, **layout)


def caption(figure: Figure, text: str) -> None:
    """Small print below the panels, in lines that fit: how many questions, which seeds, which interval."""
    lines = caption_lines(text, figure.get_size_inches()[0])
    figure.supxlabel("\n".join(lines), fontsize=7.5, color=Colour.TEXT)


def caption_lines(text: str, width: float) -> list[str]:
    """The lines of a caption below a figure of this width in inches."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, int(18 * width))]


def save_figure(figure: Figure, folder: Path, name: str, numbers: str) -> list[Path]:
    """Write ``name.pdf`` and ``name.png`` atomically and without dates, and the plotted numbers as ``name.csv``.

    Returns:
        Their paths, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (
        ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
        ("png", {"Software": None}),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
        write_atomic(folder / f"{name}.{suffix}", buffer.getvalue())
        paths.append(folder / f"{name}.{suffix}")
    write_atomic(folder / f"{name}.csv", numbers)
    return [*paths, folder / f"{name}.csv"]
