"""Neuron signals where the truth is known: patterns, made-up answers and teachers of the model organism.

Reads ``study.csv`` of `neurosig.organism.study` in the results folder, or the committed ``figures/data/organism.csv``
where there is none; writes ``organism.pdf``, ``.png`` and the plotted numbers as ``organism.csv``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from figures.style import save_figure, use_style
from neurosig.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "organism"
NEEDS = None
NEEDS = None
COMMITTED = Path(__file__).parents[1] / "data" / f"{NAME}.csv"
NEURON = {"neurons", "probe", "agreement", "agreement_majority", "knn_medoid", "neuron_count", "nearest neurons"}
"""Rows that read neurons; drawn in the colour of the method."""
PANELS = (
    ("patterns", {"ari": "clusters (ARI)", "neighbours": "5 nearest"}, "agreement with the procedures", 0.0),
    ("hallucination", {"auroc": "all facts", "auroc_agreeing": "7 of 8 agree"}, "AUROC, made-up or trained", 0.5),
    ("teacher", {"avg_at_k": "accuracy"}, "Avg@8 of the teacher", None),
)
"""Part of the study, its metrics and their labels, the axis, and where chance lies."""


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    use_style()
    import matplotlib.pyplot as plt

    study = results / "study.csv"
    table = pd.read_csv(study if study.is_file() else COMMITTED)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{NAME}.csv", table.to_csv(index=False))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.6))
    for axis, (part, metrics, label, chance) in zip(axes, PANELS, strict=True):
        _draw_part(axis, table[table["part"] == part], metrics, chance)
        axis.set_xlabel(label)
    figure.supxlabel("lines: 95% bootstrap intervals over questions; blue: reads neurons", fontsize=8)
    paths = save_figure(figure, out, NAME)
    plt.close(figure)
    return [*paths, out / f"{NAME}.csv"]


def _draw_part(axis: Axes, table: pd.DataFrame, metrics: dict[str, str], chance: float | None) -> None:
    names = list(dict.fromkeys(table["name"]))
    if chance is not None:
        axis.axvline(chance, color="black", linewidth=0.8, linestyle="--")
    for offset, (metric, label) in enumerate(metrics.items()):
        mine = table[table["metric"] == metric].set_index("name").reindex(names)
        y = [position + 0.18 * (2 * offset - len(metrics) + 1) for position in range(len(names))]
        colours = ["#0072B2" if name in NEURON else "#7f7f7f" for name in names]
        axis.hlines(y, mine["low"], mine["high"], colors=colours, linewidth=1.2)
        faces = colours if offset == 0 else "white"
        axis.scatter(mine["estimate"], y, c=faces, edgecolors=colours, zorder=3, s=26)
        axis.scatter([], [], c="black" if offset == 0 else "white", edgecolors="black", label=label, s=26)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    n = sorted(set(table["n"]))
    axis.set_title(f"{table['part'].iloc[0]} (n={n[-1]})")
    if len(metrics) > 1:
        axis.legend(loc="best", fontsize=7.5)
