"""The figure of the signal search: every variant in the search, the best ones in the confirmation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from figures.style import Colour, save_figure, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "mean over the tasks"
GRADINGS = {"strict": ("o", -0.17), "lenient": ("s", 0.17)}
"""Grading -> marker and offset."""
COLOURS = {"default": Colour.BLACK, "tried": Colour.OURS, "control": Colour.CONTROL, "output": Colour.BASELINE}


def draw_table(path: Path, out: Path, name: str) -> list[Path]:
    """Draw the table that `figures.experiments.signal_search` wrote."""
    table = pd.read_csv(path)
    events = list(dict.fromkeys(table["event"]))
    figure, axes = subplots(1, 3, size=(15, 9), squeeze=False)
    search = table[(table["stage"] == "search") & (table["task"] == MEAN)]
    names = list(dict.fromkeys(search.sort_values("role", key=lambda role: role.map(list(COLOURS).index))["variant"]))
    for axis, event in zip(axes[0], events, strict=False):
        _draw(axis, search[search["event"] == event], names, "variant", "auroc")
        default = search[(search["event"] == event) & (search["role"] == "default")]["auroc"]
        axis.axvline(default.mean(), color="black", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"search: AUROC for '{event}'\n{MEAN}")
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    confirmed = table[(table["stage"] == "confirmation") & (table["role"] == "tried") & (table["event"] == events[0])]
    confirmed = confirmed.assign(
        label=confirmed["variant"] + "\n" + confirmed["task"] + " (" + confirmed["reach"] + ")"
    )
    labels = list(dict.fromkeys(confirmed.sort_values("variant", kind="stable")["label"]))
    _draw(axes[0][2], confirmed, labels, "label", "over_default")
    axes[0][2].axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes[0][2].set_xlabel(f"confirmation: AUROC for '{events[0]}'\nminus the default's")
    for grading, (marker, _) in GRADINGS.items():
        axes[0][0].scatter([], [], color="black", marker=marker, label=grading)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return save_figure(figure, out, name, table.to_csv(index=False, float_format="%.4g"))


def _draw(axis: Axes, table: pd.DataFrame, names: list[str], column: str, value: str) -> None:
    for grading, (marker, offset) in GRADINGS.items():
        rows = table[table["grading"] == grading].set_index(column)
        rows = rows.loc[[name for name in names if name in rows.index]]
        y = [names.index(name) + offset for name in rows.index]
        colours = [COLOURS[role] for role in rows["role"]]
        axis.hlines(y, rows[f"{value}_low"], rows[f"{value}_high"], colors=colours, linewidth=1.0)
        axis.scatter(rows[value], y, color=colours, marker=marker, s=14, zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
