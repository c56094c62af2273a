"""Neuron signals of the model organism, whose truth is known: patterns, made-up answers and teachers.

Reads ``study.csv`` of `neurosig.organism.study` in the results folder, or the committed ``figures/data/organism.csv``;
writes ``organism.pdf``, ``.png`` and the plotted numbers as ``organism.csv``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from figures.sources import made_or_committed
from figures.style import Colour, save_figure, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "organism"
NEEDS = None
NEURON = {"neurons", "probe_score", "agreement", "agreement_majority", "knn_medoid", "neuron_count", "nearest neurons"}
"""Rows that read neurons."""
PANELS = (
    ("patterns", {"ari": "clusters (ARI)", "neighbours": "5 nearest"}, "agreement with the procedures", 0.0),
    ("hallucination", {"auroc": "all facts", "auroc_agreeing": "7 of 8 agree"}, "AUROC, made-up or trained", 0.5),
    ("teacher", {"avg_at_k": "accuracy"}, "Avg@8 of the teacher", None),
)
"""Part of the study, its metrics and their labels, label of the axis, and the value at chance."""


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    table = pd.read_csv(made_or_committed(results / "study.csv", NAME))
    figure, axes = subplots(1, len(PANELS), size=(11, 3.6))
    for axis, (part, metrics, label, chance) in zip(axes, PANELS, strict=True):
        _draw_part(axis, table[table["part"] == part], metrics, chance)
        axis.set_xlabel(label)
    figure.supxlabel("lines: 95% bootstrap intervals over questions; blue: reads neurons", fontsize=8)
    return save_figure(figure, out, NAME, table.to_csv(index=False))


def _draw_part(axis: Axes, table: pd.DataFrame, metrics: dict[str, str], chance: float | None) -> None:
    names = list(dict.fromkeys(table["name"]))
    if chance is not None:
        axis.axvline(chance, color="black", linewidth=0.8, linestyle="--")
    for offset, (metric, label) in enumerate(metrics.items()):
        rows = table[table["metric"] == metric].set_index("name").reindex(names)
        y = [position + 0.18 * (2 * offset - len(metrics) + 1) for position in range(len(names))]
        colours = [Colour.OURS if name in NEURON else Colour.BASELINE for name in names]
        axis.hlines(y, rows["low"], rows["high"], colors=colours, linewidth=1.2)
        faces = colours if offset == 0 else "white"
        axis.scatter(rows["estimate"], y, c=faces, edgecolors=colours, zorder=3, s=26)
        axis.scatter([], [], c="black" if offset == 0 else "white", edgecolors="black", label=label, s=26)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    n = sorted(set(table["n"]))
    axis.set_title(f"{table['part'].iloc[0]} (n={n[-1]})")
    if len(metrics) > 1:
        axis.legend(loc="best", fontsize=7.5)
