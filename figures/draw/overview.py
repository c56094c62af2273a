"""The method at a glance, drawn from a run: sample and vote, trace, score and pattern, manifest, teacher, distillation.

Reads ``manifest`` and, for the last panel, ``nopsd/metrics.jsonl`` of a results folder, or the committed
``figures/data/overview.csv`` where there is no export; writes ``overview.pdf``, ``.png`` and the drawn numbers and
texts as ``overview.csv``. All of them are the run's: the figure follows one question through all steps.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.sources import made_or_committed
from figures.style import Colour, save_figure, use_style
from neurosig.runtime.files import csv_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neurosig.manifest import Manifest, QuestionRow

NAME = "overview"
NEEDS = None
NEURON_BINS = 48
SMALL, TITLE = 7.5, 8.5
ANSWER, LEFT = 12, -0.62
"""Longest answer that fits, in characters, and the left edge of the first panel, in widths of its axes."""
TOP, BOTTOM = (0.615, 0.275), (0.085, 0.345)
"""Lower edge and height of the two rows of panels, as shares of the figure."""


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    header = results / "manifest" / "manifest.json"
    source = made_or_committed(header, NAME)
    text = numbers(results).to_csv(index=False, float_format="%.6g") if source == header else source.read_text()
    table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values={"x": "", "y": "", "value": ""})
    parts = {str(name): rows for name, rows in table.groupby("part", sort=False)}
    facts = dict(zip(parts["fact"]["label"], parts["fact"]["value"].astype(int).tolist(), strict=True))
    use_style()
    figure = Figure(figsize=(7, 4.8))
    figure.set_layout_engine("none")
    _draw_votes(_panel(figure, 0.1, TOP, 0.14, "1  Sample, vote", LEFT), parts, facts)
    _draw_trace(_panel(figure, 0.335, TOP, 0.16, "2  Trace"), parts, facts)
    _draw_score(_panel(figure, 0.56, TOP, 0.165, "3  Hallucination score"), parts, facts)
    _draw_pattern(_panel(figure, 0.79, TOP, 0.19, "4  Reasoning pattern"), parts)
    _draw_manifest(_panel(figure, 0.015, BOTTOM, 0.21, "5  Manifest"), parts, facts)
    _draw_prompts(_panel(figure, 0.28, BOTTOM, 0.405, "6  Teacher with context, student without"), parts)
    _draw_distillation(_panel(figure, 0.805, BOTTOM, 0.175, "7  Distil"), parts)
    _draw_arrows(figure)
    figure.text(0.015, 0.02, parts["run"]["label"].iloc[0], fontsize=SMALL, color=Colour.TEXT)
    return save_figure(figure, out, NAME, text)


# Numbers and texts


def numbers(results: Path) -> pd.DataFrame:
    """The numbers and texts of the figure from a run: columns ``part``, ``label``, ``x``, ``y``, ``value``."""
    from figures.draw.clusters import principal_coordinates
    from neurosig.exported import Exported
    from neurosig.patterns.similarity import jaccard

    exported = Exported(results / "manifest")
    manifest, signals = exported.manifest, exported.signals
    example = _example(manifest)
    places = {
        row.question_id: exported.place[row.question_id, exported.representatives[row.question_id]]
        for row in manifest.selected
    }
    ids = signals.neuron_ids[places[example.question_id]].numpy()
    facts = {
        "questions": len(exported.rows),
        "rollouts": len(manifest.rollouts),
        "samples": len(example.answers),
        "selected": len(manifest.selected),
        "active": int((ids >= 0).sum()),
        "neurons": signals.n_neurons,
    }
    table: list[dict[str, Any]] = [{"part": "fact", "label": name, "value": value} for name, value in facts.items()]
    table.append({"part": "question", "label": example.question})
    header = manifest.header
    run = f"{header.model['id']}, {', '.join(header.dataset['sources'])}, K={facts['samples']}"
    run += f", seed {header.options['seed']}; every number, text and point is this run's"
    table.append({"part": "run", "label": run})
    counts = Counter(answer or "(no answer)" for answer in example.answers)
    table += [{"part": "answer", "label": name, "value": count} for name, count in counts.most_common()]
    layer, neuron = np.divmod(ids[ids >= 0], signals.d_mlp)
    cells = Counter(zip(layer.tolist(), (neuron * NEURON_BINS // signals.d_mlp).tolist(), strict=True))
    table += [{"part": "trace", "x": bin_, "y": at, "value": count} for (at, bin_), count in sorted(cells.items())]
    table += [
        {"part": "score", "label": "kept" if row.selected else "left out", "value": row.scores["probe_score"]}
        for row in exported.rows.values()
    ]
    sets = signals.neuron_ids[list(places.values())]
    context = {item.question_id for item in example.context}
    for row, x, y in zip(manifest.selected, *principal_coordinates(jaccard(sets, sets).double().numpy()), strict=True):
        role = (
            "example"
            if row.question_id == example.question_id
            else "context"
            if row.question_id in context
            else "other"
        )
        table.append({"part": "map", "label": role, "x": x, "y": y})
    for item in example.context:
        solution = manifest.rollouts[item.question_id, item.rollout_id].text.strip()
        table.append({"part": "context", "label": exported.rows[item.question_id].question, "value": item.similarity})
        table.append({"part": "solution", "label": solution})
    log = results / "nopsd" / "metrics.jsonl"
    if log.is_file():
        steps = pd.read_json(log, lines=True).dropna(subset="divergence")
        table += [
            {"part": "divergence", "x": step, "value": value}
            for step, value in zip(steps["step"], steps["divergence"], strict=True)
        ]
    frame = pd.DataFrame(table, columns=["part", "label", "x", "y", "value"])
    frame["label"] = frame["label"].map(_plain, na_action="ignore")
    return frame


def _plain(text: str) -> object:
    """Model text in one line, without unprintable characters, safe in a spreadsheet."""
    return csv_cell(" ".join("".join(c for c in text if c.isprintable() or c.isspace()).split()))


def _example(manifest: Manifest) -> QuestionRow:
    """The selected question to follow: one with short answers; of these the most different answers, then the first."""
    return min(
        manifest.selected,
        key=lambda row: (max(ANSWER, *(len(answer or "") for answer in row.answers)), -len(set(row.answers)), row.line),
    )


# Panels


def _panel(figure: Figure, left: float, row: tuple[float, float], width: float, title: str, start: float = 0) -> Axes:
    axis = figure.add_axes((left, row[0], width, row[1]))
    axis.grid(visible=False)
    axis.tick_params(labelsize=SMALL, length=2, pad=1.5)
    axis.set_title(title, fontsize=TITLE, pad=17 if row is TOP else 7, x=start)
    return axis


def _note(axis: Axes, text: str) -> None:
    """A line below a panel's title."""
    axis.text(0, 1.03, text, fontsize=SMALL, color=Colour.TEXT, transform=axis.transAxes, va="bottom")


def _draw_votes(axis: Axes, parts: dict[str, pd.DataFrame], facts: dict[str, int]) -> None:
    votes = parts["answer"].head(5)
    for place, value in enumerate(votes["value"].astype(float)):
        style = {"color": Colour.OURS} if place == 0 else {"color": "white", "edgecolor": "black", "linewidth": 0.7}
        axis.barh(place, value, height=0.7, **style)
        axis.text(value + 0.15, place, f"{value:.0f}", fontsize=SMALL, va="center")
    axis.set_yticks(range(len(votes)), [textwrap.shorten(name, 12, placeholder="…") for name in votes["label"]])
    axis.set(ylim=(len(votes) - 0.4, -0.6), xlim=(0, 1.2 * float(votes["value"].max())), xticks=[])
    axis.spines["bottom"].set_visible(False)
    axis.set_xlabel(f"votes of {facts['samples']} rollouts", fontsize=SMALL, labelpad=3)
    question = textwrap.shorten(str(parts["question"]["label"].iloc[0]), 38, placeholder=" …")
    axis.text(LEFT, 1.03, question, fontsize=SMALL, color=Colour.TEXT, transform=axis.transAxes, va="bottom")


def _draw_trace(axis: Axes, parts: dict[str, pd.DataFrame], facts: dict[str, int]) -> None:
    cells = parts["trace"]
    layers = int(cells["y"].max()) + 1
    image = np.zeros((layers, NEURON_BINS))
    image[cells["y"].astype(int), cells["x"].astype(int)] = cells["value"]
    axis.imshow(image, cmap="Blues", aspect="auto", origin="lower", interpolation="nearest", vmax=image.max() * 0.8)
    axis.set_xlabel("FFN neurons", fontsize=SMALL, labelpad=3)
    axis.set_ylabel("layer", fontsize=SMALL, labelpad=1)
    axis.set(xticks=[], yticks=[0, layers - 1], yticklabels=["1", str(layers)])
    _note(axis, f"{facts['active']:,} of {facts['neurons']:,} active")


def _draw_score(axis: Axes, parts: dict[str, pd.DataFrame], facts: dict[str, int]) -> None:
    scores = parts["score"]
    values = [scores[scores["label"] == label]["value"].to_numpy(np.float64) for label in ("kept", "left out")]
    axis.hist(
        values,
        np.linspace(0, 1, 17).tolist(),
        stacked=True,
        color=[Colour.OURS, "white"],
        edgecolor="black",
        linewidth=0.5,
    )
    axis.set(xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], xlim=(0, 1), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("probe's score of a question", fontsize=SMALL, labelpad=3)
    _note(axis, f"keeps {facts['selected']} of {facts['questions']} (blue)")


def _draw_pattern(axis: Axes, parts: dict[str, pd.DataFrame]) -> None:
    points = parts["map"]
    example = points[points["label"] == "example"].iloc[0]
    for row in points[points["label"] == "context"].itertuples():
        axis.plot([example.x, row.x], [example.y, row.y], color=Colour.TEXT, linewidth=0.9, zorder=2)
    for role, colour, marker, size in (
        ("other", Colour.BACKGROUND, "o", 9),
        ("context", Colour.CONTROL, "s", 26),
        ("example", Colour.OURS, "D", 30),
    ):
        members = points[points["label"] == role]
        axis.scatter(members["x"], members["y"], s=size, color=colour, marker=marker, edgecolors="black",
                     linewidths=0 if role == "other" else 0.6, zorder=2 if role == "other" else 3)  # fmt: skip
    axis.margins(0.08)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel("map of active sets (Jaccard)", fontsize=SMALL, labelpad=3)
    _note(axis, f"{len(parts['context'])} nearest: its context")


def _draw_manifest(axis: Axes, parts: dict[str, pd.DataFrame], facts: dict[str, int]) -> None:
    _sheet(axis)
    lines = (
        ("questions", f"{facts['questions']:,}"),
        ("rollouts", f"{facts['rollouts']:,}"),
        ("selected", f"{facts['selected']:,}"),
        ("pseudo-label", textwrap.shorten(str(parts["answer"]["label"].iloc[0]), 11, placeholder="…")),
        ("context", " ".join(f"{value:.2f}" for value in parts["context"]["value"])),
        ("gold answers", "none"),
    )
    for place, (name, value) in enumerate(lines):
        axis.text(0.06, 0.86 - 0.15 * place, name, fontsize=SMALL, color=Colour.TEXT, va="center")
        axis.text(0.94, 0.86 - 0.15 * place, value, fontsize=SMALL, ha="right", va="center", family="monospace")


def _draw_prompts(axis: Axes, parts: dict[str, pd.DataFrame]) -> None:
    from matplotlib.patches import FancyBboxPatch

    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_axis_off()
    question = str(parts["question"]["label"].iloc[0])
    context = []
    for demonstration, solution in zip(parts["context"]["label"], parts["solution"]["label"], strict=True):
        context += [(demonstration, Colour.CONTROL, "s"), (solution, Colour.CONTROL, "")]
    for who, low, high, lines in (
        ("teacher", 0.36, 1.0, [*context, (question, Colour.OURS, "D")]),
        ("student", 0.0, 0.23, [(question, Colour.OURS, "D")]),
    ):
        axis.add_patch(
            FancyBboxPatch(
                (0.01, low + 0.01), 0.98, high - low - 0.02, boxstyle="round,pad=0,rounding_size=0.03",
                facecolor=Colour.PAPER, edgecolor="black", linewidth=0.8, mutation_aspect=1.5,
            )
        )  # fmt: skip
        axis.text(0.035, high - 0.035, who, fontsize=SMALL, fontweight="bold", va="top")
        for place, (text, colour, marker) in enumerate(reversed(lines)):
            y = low + 0.07 + 0.095 * place
            if marker:
                axis.plot(0.055, y, marker, color=colour, markersize=4.5, markeredgecolor="black", markeredgewidth=0.5)
            axis.text(0.09, y, textwrap.shorten(text, 46, placeholder=" …"), fontsize=SMALL, va="center")
    axis.text(
        0.5, 0.295, "the same model; the teacher is frozen", fontsize=SMALL, color=Colour.TEXT, ha="center", va="center"
    )


def _draw_distillation(axis: Axes, parts: dict[str, pd.DataFrame]) -> None:
    axis.set_xlabel("training step", fontsize=SMALL, labelpad=3)
    axis.set_ylabel("KL (nats per token)", fontsize=SMALL, labelpad=2)
    if "divergence" not in parts:
        axis.text(0.5, 0.5, "not trained yet", fontsize=SMALL, ha="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
        return
    steps = parts["divergence"]
    axis.plot(steps["x"], steps["value"], "-o", color=Colour.OURS, markersize=2.5, linewidth=1, clip_on=False)
    axis.set(ylim=(0, None), xlim=(0, float(steps["x"].max())))
    axis.locator_params(nbins=4)


def _sheet(axis: Axes) -> None:
    """A page with a folded corner."""
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_axis_off()
    axis.fill([0, 0.88, 1, 1, 0], [1, 1, 0.92, 0, 0], facecolor=Colour.PAPER, edgecolor="black", linewidth=0.8)
    axis.plot([0.88, 0.88, 1], [1, 0.92, 0.92], color="black", linewidth=0.8)


def _draw_arrows(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    middle, row = TOP[0] + 0.5 * TOP[1], BOTTOM[0] + 0.5 * BOTTOM[1]
    turn = BOTTOM[0] + BOTTOM[1] + 0.085
    for start, end in (
        ((0.252, middle), (0.292, middle)),
        ((0.505, middle), (0.55, middle)),
        ((0.735, middle), (0.78, middle)),
        ((0.235, row), (0.275, row)),
        ((0.69, row), (0.735, row)),
        ((0.12, turn), (0.12, BOTTOM[0] + BOTTOM[1] + 0.05)),
    ):
        figure.add_artist(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="black", linewidth=1.1))
    figure.add_artist(Line2D([0.12, 0.885, 0.885], [turn, turn, turn + 0.03], color="black", linewidth=1.1))
