"""The figures that are drawn from a run: what they plot is what the run says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from figures.__main__ import FiguresConfig, main
from figures.draw import (
    before_after,
    clusters,
    gap_gain,
    hallucination_score,
    overview,
    reliability,
    speed,
    training_curves,
)
from figures.experiments import context_policies
from neurosig.manifest import read_manifest
from neurosig.runtime.errors import UserError
from neurosig.statistics.regression import line_fit
from tests.support.exports import N

NAMES = (
    "clusters",
    "context_policies",
    "gap_gain",
    "hallucination_score",
    "overview",
    "reliability",
    "speed",
    "training_curves",
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clusters, hallucination_score, reliability):
        monkeypatch.setattr(module, "RESAMPLES", 100)


def caption_of(figure: Figure) -> str:
    return figure.get_supxlabel()


def test_the_sign_shows_the_scores_and_their_auroc(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    hallucination_score.draw(results, tmp_path)
    table = pd.read_csv(tmp_path / "hallucination_score.csv")
    scores = table[table["part"] == "score"]
    rows = {row.question_id: row for row in read_manifest(results / "manifest").rows}
    gold = {
        record["id"]: record["answer"]
        for record in map(json.loads, (results / "questions.jsonl").read_text().splitlines())
    }
    for row in scores.itertuples():
        assert row.value == pytest.approx(rows[row.name].scores["probe_score"], rel=1e-5)
        assert row.right == (rows[row.name].pseudo_label == gold[row.name])
    areas = table[table["part"] == "auroc"].set_index("name")
    assert areas.loc["probe_score", "value"] == pytest.approx(
        roc_auc_score(scores["right"], -scores["value"]), abs=1e-5
    )
    assert (areas["low"] <= areas["value"]).all() and (areas["value"] <= areas["high"]).all()
    left, right = drawn[0].axes
    points = {
        right.get_yticklabels()[int(line.get_ydata()[0])].get_text(): line.get_xdata()[0]
        for line in right.lines
        if len(line.get_xdata()) == 1
    }
    assert points == pytest.approx({name.replace("_", " "): area for name, area in areas["value"].items()})
    for patch, value in zip(left.patches, (1, 0), strict=True):
        vertices = patch.get_path().vertices
        heights, _ = np.histogram(
            scores[scores["right"] == value]["value"], np.linspace(0, 1, hallucination_score.BINS + 1)
        )
        assert vertices[:, 1].max() == pytest.approx(heights.max() / heights.sum())
    assert f"{N} questions" in caption_of(drawn[0]) and "95%" in caption_of(drawn[0])


def test_the_clusters_are_those_of_the_selected_questions(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    clusters.draw(results, tmp_path)
    table = pd.read_csv(tmp_path / "clusters.csv")
    points = table[table["part"] == "question"].sort_values("place")
    selected = {row.question_id: row.kind for row in read_manifest(results / "manifest").selected}
    assert dict(zip(points["name"], points["kind"], strict=True)) == selected
    agreement = table[table["part"] == "clustering"].set_index("name")
    assert agreement.loc["neurons", "value"] == pytest.approx(
        adjusted_rand_score(points["kind"], points["cluster"]), abs=1e-5
    )
    heat, plane, bars = drawn[0].axes[:3]
    image = np.ma.filled(heat.images[0].get_array().astype(float), np.nan)
    pairs = table[table["part"] == "pair"]
    assert len(pairs) == len(points) * (len(points) - 1) // 2
    for pair in pairs.itertuples():
        assert image[int(pair.place), int(pair.other)] == pytest.approx(pair.value)
        assert image[int(pair.other), int(pair.place)] == pytest.approx(pair.value)
    plotted = np.concatenate([np.asarray(part.get_offsets()) for part in plane.collections])
    np.testing.assert_allclose(np.sort(plotted[:, 0]), np.sort(points["x"]), rtol=1e-5)
    values = [line.get_ydata()[0] for line in bars.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(values, agreement["value"], rtol=1e-5)


def test_principal_coordinates_give_back_similarities_of_rank_two() -> None:
    places = np.random.default_rng(0).normal(size=(9, 2))
    places -= places.mean(axis=0)
    x, y = clusters.principal_coordinates(places @ places.T)
    np.testing.assert_allclose(np.outer(x, x) + np.outer(y, y), places @ places.T, atol=1e-9)
    assert x.std() >= y.std() and x[np.abs(x).argmax()] > 0 and y[np.abs(y).argmax()] > 0


def test_equal_signatures_share_a_place() -> None:
    sets = (np.random.default_rng(0).random((5, 60)) < 0.3)[[0, 0, 0, 0, 1, 1, 2, 2, 3, 4]]
    both, either = ((sets[:, None] & sets).sum(axis=-1), (sets[:, None] | sets).sum(axis=-1))
    assert len({*map(tuple, clusters.principal_coordinates(both / either).T)}) == 5


def test_reliability_is_that_of_the_evaluations(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    reliability.draw(results, tmp_path)
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert [title.split(" (")[0] for title in titles] == 2 * ["base", "control", "N-OPSD"]
    bins = pd.read_csv(tmp_path / "reliability.csv").query("part == 'bin'")
    raw = pd.read_parquet(results / "eval" / "nopsd" / "results.parquet").query("domain == 'shape'")
    expected = raw.groupby("votes")["n_tied_right"].mean()
    cross = drawn[0].axes[5].collections[-1].get_offsets()
    np.testing.assert_allclose(cross, np.column_stack([expected.index / 4, expected]))
    cross_bins = bins.query("scope == 'cross-domain' and method == 'N-OPSD'")
    np.testing.assert_allclose(cross, cross_bins[["confidence", "accuracy"]], rtol=1e-5)
    assert "K=4" in caption_of(drawn[0]) and "sampling seed 3" in caption_of(drawn[0])


def test_training_curves_are_the_logged_steps(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    training_curves.draw(results, tmp_path)
    log = pd.read_json(results / "nopsd" / "metrics.jsonl", lines=True)
    columns = [list(series) for _, _, series in training_curves.PANELS]
    for axis, names in zip(drawn[0].axes, columns, strict=True):
        for place, name in enumerate(names):
            steps, smooth, _ = axis.lines[3 * place : 3 * place + 3]
            np.testing.assert_array_equal(steps.get_xydata(), log[["step", name]])
            assert smooth.get_ydata()[3] == pytest.approx(log[name][1:6].mean())
            assert smooth.get_ydata()[0] == pytest.approx(log[name][:3].mean())
    assert f"{len(log)} steps" in caption_of(drawn[0]) and "seed 5" in caption_of(drawn[0])


def test_the_overview_follows_one_selected_question(results: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    overview.draw(results, tmp_path)
    manifest = read_manifest(results / "manifest")
    table = pd.read_csv(tmp_path / "overview.csv")
    question = table[table["part"] == "question"]["label"].iloc[0]
    row = next(row for row in manifest.selected if row.question == question)
    votes, trace, sign, plane = drawn[0].axes[:4]
    counts = Counter(answer or "(no answer)" for answer in row.answers)
    assert [bar.get_width() for bar in votes.patches] == [count for _, count in counts.most_common(5)]
    facts = table[table["part"] == "fact"].set_index("label")["value"]
    assert trace.images[0].get_array().sum() == facts["active"] and facts["selected"] == len(manifest.selected)
    kept = sum(bar.get_height() for bar in sign.containers[0])
    assert kept == len(manifest.selected) == sum(len(part.get_offsets()) for part in plane.collections)
    shown = " ".join(text.get_text() for axis in drawn[0].axes for text in axis.texts)
    context = manifest.rollouts[row.context[0].question_id, row.context[0].rollout_id].text
    assert question in shown and " ".join(context.split())[:8] in " ".join(table["label"].dropna())
    assert "gold answers none" in " ".join(shown.split())


def test_the_line_of_gap_and_gain_is_the_fit(tmp_path: Path, drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"policy": policy, "question": f"q{i}", "kind": "k", "same_kind": 1.0, "gap": rng.normal(), "student": 0.5}
        for policy in context_policies.POLICIES
        for i in range(12)
    ]
    points = pd.DataFrame(rows)
    points["gain"] = (0.3 * points["gap"] + rng.normal(0, 0.1, len(points))).round(6)
    points["teacher"] = points["student"] + points["gain"]
    points.to_csv(tmp_path / "gap_gain.csv", index=False)
    gap_gain.draw(tmp_path, tmp_path / "out")
    shown = points[points["policy"].isin(gap_gain.SHOWN)]
    fit = line_fit(shown["gap"].to_numpy(), shown["gain"].to_numpy(), list(shown["question"]))
    left, right = drawn[0].axes
    ends = np.array([shown["gap"].min(), shown["gap"].max()])
    np.testing.assert_allclose(left.lines[0].get_ydata(), fit.intercept + fit.slope.estimate * ends)
    assert sum(len(part.get_offsets()) for part in left.collections) == len(shown)
    means = [line.get_xydata()[0] for line in right.lines if len(line.get_xdata()) == 1]
    expected = shown.groupby("policy", sort=False)[["gap", "gain"]].mean().to_numpy()
    assert all(any(np.allclose(mean, row) for mean in means) for row in expected)
    assert f"slope {fit.slope.estimate:+.2f}" in caption_of(drawn[0]) and "12 questions" in caption_of(drawn[0])
    assert "per nat, r" in caption_of(drawn[0]) and "(n.s.)" not in caption_of(drawn[0])


def test_the_bars_of_speed_are_the_committed_seconds(tmp_path: Path, drawn: list[Figure]) -> None:
    speed.draw(tmp_path, tmp_path)
    table = pd.read_csv(speed.TABLE)
    axes = {axis.get_title(loc="left").split()[0]: axis for axis in drawn[0].axes}
    for panel, axis in (("tracing", axes["tracing"]), ("training", axes["one"])):
        bars = table[table["panel"] == panel]
        assert [bar.get_width() for bar in axis.patches] == list(bars["seconds"])
    trl = table[(table["panel"] == "training") & (table["setting"] == "2 questions x 8 rollouts")]["seconds"].to_numpy()
    texts = [text.get_text().strip() for text in axes["one"].texts]
    assert [f"{value / trl[0]:.2f}x" for value in trl] == texts[1:5]


def test_the_report_may_have_moved(results: Path, tmp_path: Path) -> None:
    path = before_after._evaluation(tmp_path / "old" / "eval" / "base", results)
    assert path == results / "eval" / "base" / "results.parquet"
    with pytest.raises(UserError, match="no finished evaluation; run `python -m distill"):
        before_after._evaluation(tmp_path / "old" / "eval" / "base", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_gives_the_same_bytes(name: str, results: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        main(FiguresConfig(names=(name,), results=results, out=tmp_path / out))
    for suffix in ("csv", "pdf", "png"):
        first, second = ((tmp_path / out / f"{name}.{suffix}").read_bytes() for out in ("a", "b"))
        assert first == second


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clusters", "manifest: no finished export; run `python -m neurosig.export --out"),
        ("hallucination_score", "manifest: no finished export; run `python -m neurosig.export --out"),
        ("reliability", "base: no finished evaluation; run `python -m distill.evaluate --out"),
        ("training_curves", "metrics.jsonl: no such file; run `python -m distill.train --out"),
    ],
)
def test_what_a_figure_lacks_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main(FiguresConfig(names=(name,), results=tmp_path))
    assert not (tmp_path / "figures").exists()
