"""The notebooks' pictures hold the numbers they were given."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distill.entropy_gap import TokenEntropies
from figures.notebook import parts
from figures.notebook.calibration import (
    calibration_points,
    calibration_summary,
    calibration_table,
    probability_bins,
)
from figures.notebook.explore import (
    agreement_scatter,
    attribution_bars,
    auroc_forest,
    dose_curves,
    entropy_curves,
    outcome_strips,
    probe_reliability,
    reliability_diagrams,
    silhouettes,
    similarity_map,
)
from figures.notebook.runs import another_selection
from figures.style import use_style
from neurosig.report.signal_table import Signal, SignalRow
from neurosig.runtime.errors import UserError
from neurosig.statistics.metrics import Interval, ece
from tests.support.flow import make_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the domain colour, and evaluations of two methods in colour and shape, written by hand."""
    folder = tmp_path_factory.mktemp("run")
    make_manifest(folder)
    rng = np.random.default_rng(0)
    for method, temperature in (("base", 0.8), ("nopsd", 0.5)):
        place = folder / "eval" / method
        place.mkdir(parents=True)
        votes = rng.integers(1, 5, 30)
        rows = {
            "question_id": [f"q{i}" for i in range(30)],
            "domain": ["colour"] * 20 + ["shape"] * 10,
            "k": 4,
            "votes": votes,
        }
        n_tied = np.where(votes == 1, 2, 1)
        rows |= {"n_tied": n_tied, "n_tied_right": rng.integers(0, 2, 30)}
        pd.DataFrame(rows).to_parquet(place / "results.parquet")
        (place / "summary.json").write_text(json.dumps({"config": {"temperature": temperature}}))
    return folder


def test_every_evaluation_is_read_by_scope(run: Path) -> None:
    table = calibration_table(run)
    assert table.groupby(["method", "scope"]).size().to_dict() == {
        ("base", "cross-domain"): 10,
        ("base", "in-domain"): 20,
        ("nopsd", "cross-domain"): 10,
        ("nopsd", "in-domain"): 20,
    }
    raw = pd.read_parquet(run / "eval" / "nopsd" / "results.parquet")
    rows = table[table["method"] == "nopsd"]
    np.testing.assert_array_equal(rows["accuracy"], raw["n_tied_right"] / raw["n_tied"])
    assert set(rows["temperature"]) == {0.5}


def test_the_summary_is_that_of_the_metrics(run: Path) -> None:
    table = calibration_table(run)
    summary = calibration_summary(table, resamples=200)
    assert list(summary["scope"]) == ["in-domain", "in-domain", "cross-domain", "cross-domain"]
    for row in summary.itertuples():
        rows = table[(table["scope"] == row.scope) & (table["method"] == row.method)]
        assert row.ece == pytest.approx(ece(rows["votes"].to_numpy(), 4, rows["accuracy"].to_numpy()))
        assert row.ece_low <= row.ece <= row.ece_high and row.smooth_ece <= row.ece + 1e-9 and row.n == len(rows)


def test_the_reliability_diagrams_plot_the_accuracy_of_each_number_of_votes(run: Path) -> None:
    table = calibration_table(run)
    figure = reliability_diagrams(table, calibration_summary(table, resamples=200))
    assert len(figure.axes) == 4
    rows = table[(table["scope"] == "in-domain") & (table["method"] == "base")].groupby("votes")["accuracy"].mean()
    points = figure.axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(points, np.column_stack([rows.index / 4, rows]))


def test_each_point_has_the_interval_of_its_own_questions(run: Path) -> None:
    table = calibration_table(run)
    table = table[(table["scope"] == "in-domain") & (table["method"] == "base")]
    one = table[table["votes"] == table["votes"].mode()[0]]
    alone = one.head(1).assign(votes=0)
    points = calibration_points(pd.concat([one, alone]))
    assert list(points["n"]) == [1, len(one)] and points[["low", "high"]].isna().all(axis=1).tolist() == [True, False]
    values, rng = one["accuracy"].to_numpy(), np.random.default_rng(1)
    draws = values[rng.integers(0, len(values), (20_000, len(values)))].mean(axis=1)
    np.testing.assert_allclose(
        points.loc[1, ["low", "high"]].astype(float), np.quantile(draws, [0.025, 0.975]), atol=0.07
    )
    assert 0 <= points["low"][1] < points["accuracy"][1] < points["high"][1] <= 1
    drawn = reliability_diagrams(table, calibration_summary(table, resamples=200)).axes[0].collections[0].get_segments()
    every = calibration_points(table).dropna()
    np.testing.assert_allclose([bar[:, 1] for bar in drawn if len(bar)], every[["low", "high"]])


def test_a_probes_probabilities_are_compared_with_how_often_texts_are_positive() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0, 1, 4000)
    positive = rng.uniform(0, 1, 4000) < probabilities
    points = probability_bins(probabilities, positive, bins=8)
    assert points["n"].tolist() == [500] * 8 and (points["share"] - points["probability"]).abs().max() < 0.07
    assert ((points["low"] < points["probability"]) & (points["probability"] < points["high"])).sum() >= 7
    certain = probability_bins(np.array([0.1] * 9 + [0.9] * 8), np.array([False] * 9 + [True] * 8), bins=2)
    assert certain["share"].tolist() == [0, 1] and certain["n"].tolist() == [9, 8]
    np.testing.assert_allclose(certain[["low", "high"]], [[0, 0.2991], [0.6756, 1]], atol=1e-4)  # Wilson's, not 0 and 1
    alike = probability_bins(np.full(6, 0.5), np.array([True, False] * 3))  # of a probe that knows nothing
    assert alike[["probability", "share", "n"]].to_numpy().tolist() == [[0.5, 0.5, 6]]
    axis = probe_reliability(probabilities, positive, groups=np.arange(4000), event="wrong").axes[0]
    drawn = probability_bins(probabilities, positive)
    np.testing.assert_allclose(axis.lines[1].get_xydata(), drawn[["probability", "share"]])
    (bars,) = axis.containers[0].lines[2]
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], drawn[["low", "high"]])
    title = axis.get_title() or axis.get_title("left")
    assert title.startswith("AUROC 0.8") and "n=4000 texts" in title and axis.get_ylabel() == "share of 'wrong'"


def test_without_an_evaluation_there_is_nothing_to_draw(tmp_path: Path) -> None:
    make_manifest(tmp_path)
    with pytest.raises(UserError, match="no finished evaluation"):
        calibration_table(tmp_path)


def test_another_selection_keeps_rollouts_and_changes_contexts(run: Path) -> None:
    first = another_selection(run, context_policy="random")
    again = another_selection(run, context_policy="random")
    none = another_selection(run, context_policy="none")
    assert first.folder == again.folder and first.folder != none.folder
    assert first.rollouts == none.rollouts and all(not row.context for row in none.rows)
    assert any(row.context for row in first.rows)
    assert first.header.options["context_policy"] == "random"


def test_the_similarity_map_shows_its_matrix() -> None:
    similarity = np.random.default_rng(1).uniform(0, 1, (5, 5))
    figure = similarity_map(similarity, ["a_b", "a_b", "c", "c", "c"], title="t")
    shown = np.asarray(figure.axes[0].images[0].get_array(), dtype=float)
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_array_equal(shown[off], similarity[off])
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[~off].all()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a b", "c"]
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_a_logits_parts_are_a_bar_per_layer_and_sublayer() -> None:
    parts = ["embedding", "attention", "ffn", "attention", "ffn", "bias"]
    layers = pd.Series([None, 0, 0, 1, 1, None], dtype="Int64")
    table = pd.DataFrame({"part": parts, "layer": layers, "effect": [9.0, 1.0, -2.0, 3.0, 4.0, 9.0]})
    axis = attribution_bars(table).axes[0]
    heights = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in axis.containers}
    assert heights == {"attention": [1.0, 3.0], "ffn": [-2.0, 4.0]}


def test_scatters_plot_every_point() -> None:
    figure = agreement_scatter([0.25, 0.5, 1.0], [0.3, 0.6, 0.9], ["x", "y", "x"])
    points = np.concatenate([np.asarray(part.get_offsets()) for part in figure.axes[0].collections])
    np.testing.assert_array_equal(np.sort(points[:, 1]), [0.3, 0.6, 0.9])
    np.testing.assert_allclose(np.sort(points[:, 0]), [0.25, 0.5, 1.0], atol=0.013)


def test_every_question_is_in_the_row_of_its_outcome() -> None:
    table = pd.DataFrame(
        {
            "question_id": ["p", "q", "p", "q"],
            "context": ["a", "a", "b", "b"],
            "outcome_strict": ["fix", "break", "break", "break"],
            "entropy_gap": [0.5, 0.25, -0.25, 0.75],
            "belief_shift": [0.0, 0.1, 0.2, 0.3],
        }
    )
    gap, shift = outcome_strips(table).axes
    assert [tick.get_text() for tick in gap.get_yticklabels()] == ["fix (n=1)", "break (n=3)"]
    points = np.concatenate([np.asarray(gap.collections[place].get_offsets()) for place in (0, 1)])
    np.testing.assert_allclose(points[:, 0], table["entropy_gap"])
    np.testing.assert_array_equal(points[:, 1].round(), [1, 0, 0, 0])
    (mean,) = [
        line.get_xdata() for line in shift.lines if line.get_marker() == "|"
    ]  # fix has one question: no interval
    np.testing.assert_allclose(mean, [0.2])


def test_entropy_curves_average_over_questions_not_rollouts() -> None:
    found = [
        TokenEntropies(name, index, (1, 2), np.array([value, 0.0]), np.array([0.0, 0.0]))
        for name, values in {"a": [1.0, 1.0, 1.0], "b": [4.0], "c": [4.0]}.items()
        for index, value in enumerate(values)
    ]
    student, teacher = entropy_curves({"none": found}).axes[0].lines
    np.testing.assert_allclose(student.get_ydata(), [3.0, 0.0])
    np.testing.assert_allclose(teacher.get_ydata(), [0.0, 0.0])


def test_the_forest_is_sorted_by_auroc() -> None:
    def row(name: str, value: float) -> SignalRow:
        interval = Interval(value, value - 0.1, value + 0.1, 9, 100, 0)
        return SignalRow(Signal(name, np.zeros(9), "neuron"), interval, {}, None, None, 1.0, 1.0)

    axis = auroc_forest([row("low", 0.4), row("high", 0.9), row("mid", 0.6)], event="e", n=9).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["low", "mid", "high"]
    assert [float(line.get_xdata()[0]) for line in axis.lines[:3]] == [0.4, 0.6, 0.9]


def test_a_dose_curve_has_each_groups_change_and_interval() -> None:
    table = pd.DataFrame({"group": ["located", "layer"], "factor": [0.0, 0.0], "change": [0.5, 0.1]})
    table = table.assign(change_low=[0.2, 0.0], change_high=[0.9, 0.3], neurons=7, texts=12)
    axis = dose_curves(table).axes[0]
    assert [one.lines[0].get_ydata().tolist() for one in axis.containers] == [[0.5, 0.0], [0.1, 0.0]]  # times 1: none
    np.testing.assert_allclose(axis.containers[0].lines[2][0].get_segments()[0][:, 1], [0.2, 0.9])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "located by the probe",
        "random, same layers",
    ]
    assert axis.get_ylabel().replace("\n", "") == "change of the negative log-likelihood (nats per token)"
    assert "7 neurons per group, n=12 texts" in (axis.get_title(), axis.get_title("left"))  # by style


def test_the_chosen_number_of_clusters_is_marked() -> None:
    axis = silhouettes(pd.DataFrame({"k": [2, 3, 4], "silhouette": [0.1, 0.3, 0.2]}), 3).axes[0]
    np.testing.assert_array_equal(axis.lines[1].get_xydata(), [[3, 0.3]])


def test_pictures_are_drawn_on_given_axes() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert silhouettes(pd.DataFrame({"k": [2, 3], "silhouette": [0.1, 0.3]}), 3, ax=left) is figure
    assert agreement_scatter([0.25], [0.3], ["x"], ax=right) is figure
    assert left.get_ylabel() == "silhouette" and len(right.collections) == 1
    assert len(similarity_map(np.ones((2, 2)), ["a", "b"], title="t", ax=right).axes) == 3  # with its colour bar


def test_a_notebooks_picture_reads_on_white_and_on_black(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> np.ndarray:
        canvas = FigureCanvasAgg(silhouettes(pd.DataFrame({"k": [2, 3], "silhouette": [0.1, 0.3]}), 3))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    with matplotlib.rc_context():
        use_style()
        paper = draw()
        monkeypatch.setattr(parts, "_theme", {})
        parts.notebook_colours()
        use_style()  # as a figure of the paper, drawn in between, does
        picture = draw()
        monkeypatch.undo()
        np.testing.assert_array_equal(draw(), paper)
    assert (paper[..., 3] == 255).all() and (paper[0, 0] == 255).all()
    assert picture[0, 0, 3] == 0 and (picture[..., 3] == 0).mean() > 0.5
    grey = (np.ptp(picture[..., :3].astype(int), axis=-1) < 8) & (picture[..., 3] == 255)
    levels = picture[..., :3].mean(axis=-1)[grey]
    assert levels.min() > 90 and levels.max() < 160  # neither black nor white
