"""Reasoning patterns: the selected questions' neuron signatures, clustered, compared with the kinds of question.

Reads ``manifest`` of a results folder (`neurosig.export`); writes ``clusters.pdf``, ``.png`` and the plotted numbers as
``clusters.csv``. Signatures are the active sets of representative rollouts, compared by Jaccard similarity; clusters
are k-medoids with the number of the best silhouette (`neurosig.patterns.clusters`). Kinds are never used to cluster.
The map shows the two leading principal coordinates of the similarities.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from figures.notebook.parts import draw_similarity
from figures.sources import finished_export
from figures.style import SERIES, Colour, caption, save_figure, subplots
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import csv_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "clusters"
NEEDS = Path("manifest/manifest.json")
RESAMPLES, SEED = 1000, 0


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``.

    Raises:
        UserError: There is no finished export, or fewer than three questions are selected.
    """
    table = numbers(finished_export(results / "manifest"))
    points = table[table["part"] == "question"].sort_values("place")
    figure, (heat, plane, agreement) = subplots(1, 3, size=(7, 3.1), width_ratios=[1.2, 1.15, 0.75])
    _draw_heat(heat, points, table[table["part"] == "pair"])
    _draw_plane(plane, points)
    _draw_agreement(agreement, table[table["part"] == "clustering"])
    handles, labels = plane.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, handletextpad=0.2)
    caption(
        figure,
        f"{len(points)} selected questions, each by its representative rollout; {points['cluster'].nunique()} clusters "
        f"(best silhouette, seed {SEED}),\nframed on the left; lines: 95% bootstrap intervals over questions, clusters "
        "as they are; kinds were not used to cluster",
    )
    return save_figure(figure, out, NAME, table.to_csv(index=False, float_format="%.6g"))


def numbers(folder: Path) -> pd.DataFrame:
    """The numbers of the figure from an export.

    ``part`` is ``question`` (``name``, ``kind``, ``cluster`` from 1, coordinates ``x`` and ``y``, and its ``place`` in
    the heat map: by cluster, then kind), ``pair`` (the similarity of places ``place`` and ``other`` as ``value``) or
    ``clustering`` (``name``, adjusted Rand index against the kinds as ``value``, ``low``, ``high``).

    Raises:
        UserError: Fewer than three questions are selected.
    """
    from sklearn.metrics import adjusted_rand_score

    from neurosig.exported import Exported
    from neurosig.patterns.similarity import jaccard
    from neurosig.report.patterns import patterns
    from neurosig.statistics.metrics import bootstrap_interval

    exported = Exported(folder)
    result = patterns(exported, seed=SEED, selected_only=True)
    if isinstance(result, str):
        raise UserError(f"{folder}: too few selected questions to cluster: {result}")
    kinds = np.array([row.kind or row.domain for row in result.rows])
    clusters = result.found.clustering.labels
    order = np.lexsort((kinds, clusters))
    sets = exported.signals.neuron_ids[result.places[order]]
    similarity = jaccard(sets, sets).double().numpy()
    x, y = principal_coordinates(similarity)
    questions = [
        {
            "part": "question",
            "name": result.rows[row].question_id,
            "kind": kinds[row],
            "cluster": int(clusters[row]) + 1,
        }
        | {"place": place, "x": x[place], "y": y[place]}
        for place, row in enumerate(order)
    ]
    pairs = [
        {"part": "pair", "place": place, "other": other, "value": similarity[place, other]}
        for place in range(len(order))
        for other in range(place)
    ]
    codes = np.unique(kinds, return_inverse=True)[1]
    agreement = []
    for name, labels in result.found.labels.items():
        ari = bootstrap_interval(
            lambda q, labels=labels: float(adjusted_rand_score(codes[q], labels[q])),  # type: ignore[misc]
            len(codes),
            seed=SEED,
            resamples=RESAMPLES,
        )
        agreement.append(
            {"part": "clustering", "name": name, "value": ari.estimate, "low": ari.low, "high": ari.high, "n": ari.n}
        )
    integers = {name: "Int64" for name in ("cluster", "place", "other", "n")}
    table = pd.DataFrame([*agreement, *questions, *pairs]).astype(integers)
    table[["name", "kind"]] = table[["name", "kind"]].map(csv_cell)
    return table


def principal_coordinates(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "2 n"]:
    """The two leading coordinates of the centred similarities; the farthest point is positive on each.

    Questions with equal similarities have equal coordinates, so that the figure's bytes do not depend on last bits.
    """
    centring = np.eye(len(similarity)) - 1 / len(similarity)
    values, vectors = np.linalg.eigh(centring @ similarity @ centring)
    coordinates = (vectors[:, -2:] * np.sqrt(values[-2:].clip(0))).T[::-1]
    farthest = np.abs(coordinates).argmax(axis=1)
    return np.round(coordinates * np.sign(coordinates[np.arange(2), farthest])[:, None], 9)


def _draw_heat(axis: Axes, points: pd.DataFrame, pairs: pd.DataFrame) -> None:
    n = len(points)
    similarity = np.ones((n, n))
    place, other = (pairs[column].to_numpy(np.int64) for column in ("place", "other"))
    similarity[place, other] = similarity[other, place] = pairs["value"]
    image = draw_similarity(axis, similarity, [str(cluster) for cluster in points["cluster"]])
    for kind, (colour, marker) in _styles(points).items():
        places = points[points["kind"] == kind]["place"].to_numpy(np.int64)
        axis.scatter(np.full(len(places), -2.6), places, s=7, color=colour, marker=marker, linewidths=0, clip_on=False)
    axis.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title("similarity")
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((0, -0.09, 1, 0.045)), orientation="horizontal")
    bar.set_label("Jaccard similarity of two questions", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)


def _draw_plane(axis: Axes, points: pd.DataFrame) -> None:
    for kind, (colour, marker) in _styles(points).items():
        members = points[points["kind"] == kind]
        label = f"{kind.replace('_', ' ')} ({len(members)})"
        axis.scatter(
            members["x"], members["y"], s=22, color=colour, marker=marker, linewidths=0, alpha=0.85, label=label
        )
    for cluster, members in points.groupby("cluster"):
        axis.annotate(
            str(cluster),
            (float(members["x"].mean()), float(members["y"].max())),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": "black", "linewidth": 0.8},
        )
    axis.margins(0.08)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.16 * (high - low))  # room for the numbers
    axis.set_xlabel("1st principal coordinate", fontsize=8)
    axis.set_ylabel("2nd principal coordinate", fontsize=8)
    axis.tick_params(labelsize=7.5)
    axis.set_title("map (numbers: clusters)")


def _draw_agreement(axis: Axes, table: pd.DataFrame) -> None:
    for place, row in enumerate(table.to_dict("records")):
        colour, marker = (Colour.OURS, "D") if row["name"] == "neurons" else (Colour.BASELINE, "o")
        axis.vlines(place, row["low"], row["high"], color=colour, linewidth=1.4)
        axis.plot(place, row["value"], marker, color=colour, markersize=5.5)
    axis.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(table)), [name.replace(" ", "\n") for name in table["name"]], fontsize=7.5)
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.set_ylim(min(-0.05, 1.1 * float(table["low"].min())), 1.05)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.set_ylabel("ARI, clusters against kinds", fontsize=8)
    axis.grid(axis="x", visible=False)
    axis.set_title("agreement")


def _styles(points: pd.DataFrame) -> dict[str, tuple[str, str]]:
    kinds = sorted(set(points["kind"]))
    return {kind: SERIES[place % len(SERIES)] for place, kind in enumerate(kinds)}
