"""Training curves: divergence, entropies of teacher and student, length of the samples, norm of the gradient.

Reads ``nopsd/metrics.jsonl`` and ``train.json`` of a results folder (`distill.train`); writes ``training_curves.pdf``,
``.png`` and the plotted numbers as ``training_curves.csv``. Points are steps, each on other questions; lines are
centred means of five steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from figures.style import Colour, caption, save_figure, subplots
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "training_curves"
NEEDS = Path("nopsd/metrics.jsonl")
PANELS: tuple[tuple[str, str, dict[str, tuple[str, str, str, str]]], ...] = (
    ("divergence of student from teacher", "nats per token", {"divergence": ("divergence", Colour.OURS, "D", "-")}),
    (
        "entropy and its gap",
        "nats per token",
        {
            "student_entropy": ("student", Colour.BASELINE, "o", "--"),
            "teacher_entropy": ("teacher", Colour.OURS, "D", "-"),
            "entropy_gap": ("gap", Colour.CONTROL, "s", ":"),
        },
    ),
    ("length of the student's rollouts", "tokens, mean", {"mean_length": ("length", Colour.OURS, "D", "-")}),
    ("norm of the gradient", "before clipping", {"grad_norm": ("norm", Colour.OURS, "D", "-")}),
)
"""Title, axis label, and column -> label, colour, marker and line."""
WINDOW = 5


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: There is no training run.
    """
    path = results / NEEDS
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `python -m distill.train --out {path.parent}` first")
    columns = ["step", *(column for _, _, series in PANELS for column in series), "rollouts_in_loss"]
    table = pd.read_json(path, lines=True)[columns].astype(float)  # null where every rollout was masked
    if not table["divergence"].notna().any():
        raise UserError(f"{path}: every rollout of every step was masked, so there is nothing to draw")
    figure, axes = subplots(2, 2, size=(7, 4.4), sharex=True)
    for axis, (title, label, series) in zip(axes.flat, PANELS, strict=True):
        for column, style in series.items():
            _draw_series(axis, table["step"], table[column], *style)
        lowest, highest = table[list(series)].min().min(), table[list(series)].max().max()
        axis.set(ylabel=label, ylim=(1.6 * min(0.0, lowest), (1.25 if len(series) > 1 else 1.06) * highest))
        axis.set_title(title)
        if len(series) > 1:
            axis.legend(fontsize=8, ncols=len(series), loc="upper right")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    config = json.loads((path.parent / "train.json").read_text())["config"]
    caption(
        figure,
        f"one run of {len(table)} steps, {config['questions_per_step']} questions x {config['num_generations']} "
        f"rollouts per step, seed {config['seed']}; points: single steps, each on other questions, so no "
        f"interval;\nlines: centred means of {WINDOW} steps, fewer at the ends",
    )
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def _draw_series(
    axis: Axes, steps: pd.Series[int], values: pd.Series[float], label: str, colour: str, marker: str, line: str
) -> None:
    smooth = values.rolling(WINDOW, center=True, min_periods=1).mean()
    axis.plot(steps, values, marker, color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0, clip_on=False)
    axis.plot(steps, smooth, line, color=colour, linewidth=1.6)
    axis.plot([], [], line, marker=marker, color=colour, markersize=3.5, linewidth=1.6, label=label)
