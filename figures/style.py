"""One look for every figure: colour-blind safe, readable in greyscale, the same bytes on every run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS: Mapping[str, tuple[str, str, str]] = {
    "base": ("base", "#7f7f7f", "o"),
    "control": ("base, best temperature", "#E69F00", "s"),
    "trained": ("N-OPSD", "#0072B2", "D"),
}
"""Run -> label, colour (Okabe & Ito 2008) and marker: the marker tells the runs apart without colour."""


def use_style() -> None:
    """Set matplotlib up for a paper: no display, small sans-serif type, thin frames, no timestamps."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,
            "svg.hashsalt": "neurosig",
            "text.parse_math": False,  # model text may hold dollar signs
        }
    )


def caption(figure: Figure, text: str) -> None:
    """A figure's small print below its panels: how many, which seeds, which interval."""
    figure.supxlabel(text, fontsize=7.5, color="#333333")


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.pdf`` and ``name.png`` whole, without dates; returns their paths."""
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
    return paths


def finished_export(folder: Path) -> Path:
    """``folder``, if an export was finished there.

    Raises:
        UserError: There is none.
    """
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no finished export; run `python -m neurosig.export --out {folder}` first")
    return folder
