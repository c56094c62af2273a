"""The notebooks' pictures: one function each, from the numbers to a figure that the notebook shows.

They share the style of the paper's figures (`figures.style`), on a transparent background, and state their n and
interval. Each draws on the axes given as ``ax``, else on a new figure, which it returns.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from figures.draw.dose_response import GROUPS
from figures.notebook.calibration import calibration_points, probability_bins
from figures.notebook.parts import (
    axes_for,
    draw_forest,
    draw_series,
    draw_similarity,
    edges,
    figure_of,
    ink,
    notebook_colours,
    themed,
)
from figures.style import Colour, use_style
from neurosig.statistics import metrics
from neurosig.statistics.auroc import AnalysisConfig, auroc_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from distill.entropy_gap import TokenEntropies
    from neurosig.explore.probes.probe import Probe
    from neurosig.report.signal_table import SignalRow


def notebook_style() -> None:
    """Set the style of the project's figures, show them inline, hide progress bars; call it first in a notebook."""
    from IPython import get_ipython
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    use_style()
    notebook_colours()
    shell = get_ipython()
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")
        shell.run_line_magic("config", "InlineBackend.figure_format = 'retina'")


# Neurons


@themed
def attribution_bars(parts: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Direct effect of each layer's attention and FFN on one token's logit, as `Traces.attribution` returns it."""
    axis = axes_for(ax, (8.0, 2.8))
    table = parts.dropna().pivot(index="layer", columns="part", values="effect")
    for place, (part, colour) in enumerate({"attention": Colour.CONTROL, "ffn": Colour.OURS}.items()):
        axis.bar(table.index.to_numpy(int) + 0.4 * place - 0.2, table[part], 0.4, color=colour, label=part)
    axis.axhline(0, color=ink(), linewidth=0.8)
    axis.set(xlabel="layer", ylabel="direct effect on the logit")
    axis.grid(axis="x", visible=False)
    axis.legend(fontsize=8)
    return figure_of(axis)


@themed
def similarity_map(
    similarity: Float[np.ndarray, "n n"],
    labels: Sequence[str],
    *,
    title: str,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Similarity of questions in the given order; blocks of equal labels are framed and named on the left.

    The colours always run from 0 to 1."""
    n = len(similarity)
    axis = axes_for(ax, (6.2, 5.2))
    image = draw_similarity(axis, similarity, labels)
    image.set_clim(0, 1)  # so that two maps can be compared
    ends = edges(labels)
    if names is None:
        axis.set_yticks([(low + high - 1) / 2 for low, high in itertools.pairwise(ends)])
        axis.set_yticklabels([labels[low].replace("_", " ") for low in ends[:-1]])
    else:
        axis.set_yticks(range(n), names, fontsize=7)
    axis.set_xticks([])
    axis.set_xlabel(f"the same {n} questions")
    axis.set_title(title)
    axis.figure.colorbar(image, ax=axis, label="Jaccard similarity of active sets", shrink=0.85)
    return figure_of(axis)


@themed
def agreement_scatter(
    share: Sequence[float],
    agreement: Sequence[float],
    kinds: Sequence[str],
    *,
    seed: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Agreement of a question's active sets against that of its answers; shares are jittered to separate equal ones."""
    axis = axes_for(ax, (5.4, 3.4))
    jitter = np.random.default_rng(seed).uniform(-0.012, 0.012, len(share))
    draw_series(axis, np.asarray(share) + jitter, np.asarray(agreement), kinds)
    axis.set(xlabel="majority's share of the answers", ylabel="mean Jaccard of active sets")
    axis.set_title(f"Agreement of neurons and of answers (n={len(share)} questions)")
    axis.legend(fontsize=8)
    return figure_of(axis)


@themed
def probe_path(fitted: Probe, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Size and cross-validated AUROC of the probe along its penalty, and the frequencies of stability selection."""
    size, quality, stable = Figure(figsize=(9.4, 3.2)).subplots(1, 3) if ax is None else ax
    path, probe = fitted.path_, fitted.fitted_
    chosen = probe.inverse_penalty
    size.plot(path["inverse_penalty"], path["neurons"], "-D", color=Colour.OURS, markersize=4)
    size.set(ylabel="neurons with a weight", ylim=(0, None))
    size.set_title("Size along the path")
    quality.errorbar(
        path["inverse_penalty"],
        path["auroc_mean"],
        yerr=path["auroc_sd"],
        fmt="-o",
        color=Colour.OURS,
        capsize=2,
        markersize=4,
    )
    quality.axhline(0.5, color=ink(), linewidth=0.8, linestyle="--")
    quality.set(ylabel="AUROC on unseen questions")
    quality.set_title(f"Bars: sd over {probe.config.folds} folds")
    for axis in (size, quality):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("inverse penalty C")
        axis.axvline(chosen, color=Colour.CONTROL, linewidth=1.2, linestyle=":", label="chosen")
    size.legend(fontsize=8)
    frequency = np.sort(probe.stability.frequency)[::-1][:60]
    stable.plot(range(1, len(frequency) + 1), frequency, ".-", color=Colour.OURS, linewidth=1, markersize=4)
    stable.axhline(probe.stability.threshold, color=ink(), linewidth=0.8, linestyle="--")
    stable.text(len(frequency), probe.stability.threshold + 0.015, "stable from here", ha="right", fontsize=8)
    stable.set(xlabel="neuron, most often selected first", ylabel="share of halves that select it", ylim=(0, 1.02))
    stable.set_title(f"Stability, {2 * probe.stability.pairs} halves")
    return figure_of(stable)


@themed
def dose_curves(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Change of the texts' negative log-likelihood when each group of neurons is scaled, in nats per token, with its
    95% interval over texts and draws, as `Probe.causal_check` returns it."""
    axis = axes_for(ax, (6.4, 3.4))
    for place, (group, measured) in enumerate(table.groupby("group", sort=False)):
        label, colour, marker, line = GROUPS[str(group)]
        colour = ink() if colour == Colour.BLACK else colour
        unscaled = pd.DataFrame({"factor": [1.0], "change": [0.0]})
        rows = pd.concat([measured, unscaled]).sort_values("factor")
        x = rows["factor"] + 0.04 * place  # next to each other
        ends = [rows["change"] - rows["change_low"], rows["change_high"] - rows["change"]]
        axis.errorbar(x, rows["change"], yerr=ends, fmt=marker + line, color=colour, capsize=2, label=label)
    axis.axhline(0, color=ink(), linewidth=0.8, linestyle="--")
    axis.set(xlabel="the neurons' values are multiplied by", xticks=sorted({*table["factor"], 1.0}))
    axis.set_ylabel("change of the negative log-\nlikelihood (nats per token)")
    axis.set_title(f"{table['neurons'].iloc[0]} neurons per group, n={table['texts'].iloc[0]} texts")
    axis.legend(fontsize=8)
    return figure_of(axis)


@themed
def auroc_forest(rows: Sequence[SignalRow], *, event: str, n: int, ax: Axes | None = None) -> Figure:
    """AUROC of every signal with its 95% interval over questions, best on top."""
    known = [(row.signal.name, row.signal.kind, row.auroc) for row in rows if row.auroc is not None]
    axis = axes_for(ax, (5.8, 0.9 + 0.27 * len(known)))
    draw_forest(axis, known)
    axis.set(xlabel=f"AUROC for '{event}' (95% interval, n={n} questions)")
    if ax is None:
        axis.figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    else:
        axis.legend(fontsize=8)
    return figure_of(axis)


@themed
def silhouettes(table: pd.DataFrame, k: int, *, ax: Axes | None = None) -> Figure:
    """Silhouette of each number of clusters; the chosen number is marked."""
    axis = axes_for(ax, (4.4, 2.7))
    axis.plot(table["k"], table["silhouette"], "-o", color=Colour.OURS, markersize=4.5)
    best = table.set_index("k")["silhouette"][k]
    axis.plot([k], [best], "D", color=Colour.CONTROL, markersize=8, label=f"chosen: {k}")
    axis.set(xlabel="clusters", ylabel="silhouette", xticks=list(table["k"]))
    axis.set_title("How many patterns")
    axis.legend(fontsize=8)
    return figure_of(axis)


# Entropies


@themed
def entropy_curves(
    entropies: Mapping[str, Sequence[TokenEntropies]], *, longest: int = 16, ax: Sequence[Axes] | None = None
) -> Figure:
    """Mean entropy of student and teacher at each token, one panel per context; bands: 95% interval over questions."""
    size = (2.1 * len(entropies) + 0.6, 3.0)
    axes = np.atleast_1d(Figure(figsize=size).subplots(1, len(entropies), sharey=True) if ax is None else np.array(ax))
    for axis, (name, rollouts) in zip(axes, entropies.items(), strict=True):
        for who, colour, line in (("student", Colour.BASELINE, "--"), ("teacher", Colour.OURS, "-")):
            mean, low, high = _by_position(rollouts, who, longest)
            axis.plot(range(1, len(mean) + 1), mean, line, color=colour, label=who)
            axis.fill_between(range(1, len(mean) + 1), low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel="token", ylim=(0, None))
        axis.set_title(name.replace("_", " "))
    axes[0].set_ylabel("next-token entropy (nats)")
    axes[0].legend(fontsize=8)
    n = len({one.question_id for rollouts in entropies.values() for one in rollouts})
    figure = figure_of(axes[0])
    figure.supxlabel(
        f"n={n} questions; bands: 95% interval of the mean over the questions of at least this length", fontsize=8
    )
    return figure


@themed
def outcome_strips(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Entropy gap and belief shift of every question and context, a row per outcome (fix, break, right, wrong).

    The bar of a row is its mean with a 95% bootstrap interval over questions; a row of one question has none.

    Args:
        table: Columns ``question_id``, ``context``, ``outcome_strict``, ``entropy_gap`` and ``belief_shift``.
        ax: Two axes to draw on; default: a figure of their own.
    """
    axes = Figure(figsize=(8.4, 3.0)).subplots(1, 2, sharey=True) if ax is None else ax
    rows = [name for name in ("fix", "break", "right", "wrong") if (table["outcome_strict"] == name).any()]
    rng = np.random.default_rng(0)
    heights = {name: len(rows) - 1 - place for place, name in enumerate(rows)}
    y = table["outcome_strict"].map(heights).to_numpy(np.float64) + rng.uniform(-0.16, 0.16, len(table))
    units = {"entropy_gap": "nats per token", "belief_shift": "nats"}
    for axis, (name, unit) in zip(axes, units.items(), strict=True):
        draw_series(axis, table[name].to_numpy(), y, list(table["context"]), alpha=0.75)
        for outcome, height in heights.items():
            means = table[table["outcome_strict"] == outcome].groupby("question_id")[name].mean().to_numpy()
            if len(means) > 1:
                found = metrics.paired_mean_interval(means, np.zeros(len(means)), seed=0)
                axis.hlines(height - 0.32, found.low, found.high, color=ink(), linewidth=1.4)
                axis.plot(found.estimate, height - 0.32, "|", color=ink(), markersize=9)
        axis.axvline(0, color=Colour.ZERO, linewidth=0.8, zorder=0)
        axis.set(xlabel=f"{name.replace('_', ' ')} ({unit})")
    counts = table["outcome_strict"].value_counts()
    axes[0].set_yticks(list(heights.values()), [f"{name} (n={counts[name]})" for name in rows])
    axes[1].legend(fontsize=8, title="context", title_fontsize=8)
    return figure_of(axes[0])


# Calibration


@themed
def probe_reliability(
    probabilities: Float[np.ndarray, " texts"],
    positive: Sequence[bool] | Bool[np.ndarray, " texts"],
    *,
    groups: Sequence[Any],
    event: str,
    ax: Axes | None = None,
) -> Figure:
    """Share of positive texts at each probability that a probe gives, and the probe's AUROC on these texts.

    Args:
        probabilities: Of the positive class, from texts that the probe was not fitted on.
        positive: Which texts are positive.
        groups: What the AUROC's 95% bootstrap interval draws, one value per text, such as its question.
        event: What the positive class is called.
        ax: Axes to draw on; default: a figure of their own.
    """
    axis, truth = axes_for(ax, (4.2, 3.6)), np.asarray(positive, dtype=bool)
    points = probability_bins(probabilities, truth)
    owners = pd.factorize(np.asarray(groups))[0]
    auroc = auroc_interval(probabilities, truth, owners, AnalysisConfig())
    axis.plot([0, 1], [0, 1], color=ink(), linewidth=0.8, linestyle="--", label="perfectly calibrated")
    ends = [points["share"] - points["low"], points["high"] - points["share"]]
    axis.errorbar(points["probability"], points["share"], yerr=ends, fmt="D", color=Colour.OURS, capsize=2)
    axis.set(xlabel=f"probability of {event!r}, mean of the bin", ylabel=f"share of {event!r}")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    sizes = f"{points['n'].min()} to {points['n'].max()}" if points["n"].nunique() > 1 else f"{points['n'].iloc[0]}"
    axis.set_title(
        f"AUROC {metrics.format_interval(auroc.estimate, auroc.low, auroc.high, '.2f')}, n={len(truth)} texts\n"
        f"bars: 95% interval of bins of {sizes} texts",
        fontsize=9,
    )
    axis.legend(fontsize=8)
    return figure_of(axis)


@themed
def reliability_diagrams(questions: pd.DataFrame, summary: pd.DataFrame, *, ax: Any = None) -> Figure:
    """Accuracy of the majority at each confidence, one row per scope, one column per method; area: questions.

    Bars: 95% bootstrap interval over the point's questions; a point of one question has none.

    ``ax`` is an array of axes of that shape; default: a figure of its own."""
    scopes, methods = list(dict.fromkeys(summary["scope"])), list(dict.fromkeys(summary["method"]))
    size = (2.2 * len(methods) + 0.4, 2.5 * len(scopes))
    made: Any = {"squeeze": False, "sharex": True, "sharey": True}
    axes = Figure(figsize=size).subplots(len(scopes), len(methods), **made) if ax is None else np.atleast_2d(ax)
    points = calibration_points(questions)
    for row, scope in enumerate(scopes):
        for column, method in enumerate(methods):
            axis = axes[row, column]
            cell = points[(points["scope"] == scope) & (points["method"] == method)]
            axis.plot([0, 1], [0, 1], color=ink(), linewidth=0.8, linestyle="--")
            axis.vlines(cell["confidence"], cell["low"], cell["high"], color=Colour.CONTROL, linewidth=1.6)
            axis.scatter(
                cell["confidence"],
                cell["accuracy"],
                s=14 + 130 * cell["n"] / points["n"].max(),
                color=Colour.OURS,
                edgecolors="white",
                zorder=3,
            )
            values = summary[(summary["scope"] == scope) & (summary["method"] == method)].iloc[0]
            axis.set_title(f"{method} (T={values['temperature']:g}), {scope}", fontsize=8.5)
            axis.text(
                0.03,
                0.97,
                f"ECE {metrics.format_interval(values['ece'], values['ece_low'], values['ece_high'], '.3f')}\n"
                f"smooth ECE {values['smooth_ece']:.3f}\nfloor {values['ece_floor']:.3f}, n={values['n']}",
                transform=axis.transAxes,
                va="top",
                fontsize=7.5,
            )
            axis.set(xlim=(-0.05, 1.08), ylim=(-0.05, 1.4), yticks=[0, 0.5, 1], xticks=[0, 0.5, 1])
    for axis in axes[-1]:
        axis.set_xlabel("majority's share of votes")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy of the majority")
    return figure_of(axes[0, 0])


def _by_position(
    rollouts: Sequence[TokenEntropies], who: str, longest: int
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Mean over questions at each position and its normal 95% interval, up to the last position of three questions."""
    by_question: dict[str, list[Float[np.ndarray, " tokens"]]] = {}
    for one in rollouts:
        by_question.setdefault(one.question_id, []).append(getattr(one, who))
    rows = []
    for position in range(longest):
        means = [
            np.mean([tokens[position] for tokens in group if len(tokens) > position])
            for group in by_question.values()
            if any(len(tokens) > position for tokens in group)
        ]
        if len(means) < 3:
            break
        half = 1.96 * float(np.std(means, ddof=1)) / len(means) ** 0.5
        mean = float(np.mean(means))
        rows.append((mean, max(0.0, mean - half), mean + half))
    means_of, low, high = np.array(rows).reshape(-1, 3).T
    return means_of, low, high
