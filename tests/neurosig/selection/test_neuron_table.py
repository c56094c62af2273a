"""``neurons.csv``: both roles, each number computed again another way, and tables of earlier schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from neurosig.export import main as export
from neurosig.exported import Exported
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.kinds import LEAST_QUESTIONS
from neurosig.hallucination.lasso import design
from neurosig.hallucination.locate import read_neurons
from neurosig.hallucination.probe import agreement_labels, contribution_matrix
from neurosig.hallucination.stability import selection_limit
from neurosig.intervene.interventions import choose_neurons
from neurosig.manifest import read_manifest
from neurosig.neurons.sites import FFNSites
from neurosig.report.patterns import patterns
from neurosig.runtime.errors import UserError
from neurosig.selection import neuron_table
from neurosig.selection.neuron_table import COLUMNS
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.exports import K, write_lines, write_world
from tests.support.flow import export_config, make_manifest
from tests.support.manifests import edit_header


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose probe has neurons, with two kinds of question."""
    folder = write_world(tmp_path_factory.mktemp("table"))
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    write_lines(folder / "questions.jsonl", [row | {"kind": "even" if i % 2 else "odd"} for i, row in enumerate(lines)])
    files: dict[str, Any] = {"rollouts": folder / "rollouts.jsonl", "num_generations": K, "probe_inverse_penalty": 3.0}
    export(export_config(folder, folder / "model", folder / "questions.jsonl", **files))
    return folder


@pytest.fixture(scope="module")
def exported(world: Path) -> Exported:
    return Exported(world / "manifest")


def test_one_schema_holds_both_roles(world: Path, exported: Exported) -> None:
    table = pd.read_csv(world / "manifest" / "neurons.csv")
    assert tuple(table.columns) == COLUMNS and list(table["role"].unique()) == ["hallucination", "pattern"]
    assert not table.duplicated(["role", "layer", "index"]).any()
    assert table[table["role"] == "hallucination"][["cluster", "lift", "q"]].isna().all(axis=None)
    assert table[table["role"] == "pattern"][["weight", "stability", "kinds", "kinds_agreeing"]].isna().all(axis=None)
    assert read_manifest(world / "manifest").header.files["neurons.csv"].rows == len(table)
    sets = exported.signals.neuron_ids
    for row in table.itertuples():
        flat = row.layer * exported.signals.d_mlp + row.index
        assert row.active_share == pytest.approx((sets == flat).any(dim=1).float().mean().item(), abs=1e-6)
    assert len(exported.neurons) + len(exported.pattern_neurons) == len(table)
    assert list(exported.neurons) == ["layer", "index", *COLUMNS[3:8]]
    assert list(exported.pattern_neurons) == ["layer", "index", "active_share", "cluster", "lift", "q"]
    verify(VerifyConfig(folder=world / "manifest"))


def test_stability_and_signs_are_those_of_the_labels(exported: Exported) -> None:
    """Signs by scikit-learn's AUROC, kind by kind; the frequency is one of 2 x PAIRS halves, and some differ."""
    rows, signals, neurons = list(exported.rows.values()), exported.signals, exported.neurons
    shares = np.array([row.vote.count / row.vote.n for row in rows if row.vote is not None])
    labels = agreement_labels(shares, ProbeConfig())
    matrix = contribution_matrix(signals.neuron_ids.numpy(), signals.contributions.float().numpy(), signals.n_neurons)
    scaled = design(matrix, ProbeConfig().min_active_share)
    assert (neurons["weight"].abs().diff().dropna() <= 1e-6).all()  # heaviest first
    for neuron in neurons.itertuples():
        column = np.searchsorted(scaled.columns, neuron.layer * signals.d_mlp + neuron.index)
        means = scaled.matrix[:, [column]].toarray().reshape(len(rows), K).mean(axis=1)
        n_kinds = n_agreeing = 0
        for kind in ("even", "odd"):
            members = [i for i, row in enumerate(rows) if row.kind == kind and labels[i] >= 0]
            if min(np.bincount(labels[members], minlength=2)) >= LEAST_QUESTIONS and np.ptp(means[members]) > 0:
                n_kinds += 1
                n_agreeing += np.sign(roc_auc_score(labels[members], means[members]) - 0.5) == np.sign(neuron.weight)
        assert (neuron.kinds, neuron.kinds_agreeing) == (n_kinds, n_agreeing)
    halves = neurons["stability"] * 2 * neuron_table.PAIRS
    assert np.allclose(halves, halves.round(), atol=1e-3) and neurons["stability"].nunique() > 1
    assert neurons["stability"].sum() <= selection_limit(1.0, len(scaled.columns), 0.75)
    assert neurons["kinds"].max() == 2 and 0 < (neurons["kinds_agreeing"] / neurons["kinds"]).mean() <= 1


def test_pattern_neurons_are_the_markers_of_the_reports_clusters(exported: Exported) -> None:
    found = patterns(exported, seed=0)
    assert not isinstance(found, str)
    markers = found.found.markers
    written = exported.pattern_neurons
    assert len(written) == len(markers.drop_duplicates(["layer", "index"])) > 0
    best = markers.groupby(["layer", "index"])["lift"].max()
    for neuron in written.itertuples():
        assert neuron.lift == pytest.approx(best[neuron.layer, neuron.index], rel=1e-5)
        row = markers.query(f"layer == {neuron.layer} and index == {neuron.index} and cluster == {neuron.cluster}")
        assert row["q"].item() == pytest.approx(neuron.q, rel=1e-5)


def test_a_sample_or_too_few_are_noted(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_table, "MOST_SIGNATURES", 12)
    monkeypatch.setattr(neuron_table, "MOST_QUESTIONS", 20)
    files: dict[str, Any] = {"rollouts": world / "rollouts.jsonl", "num_generations": K, "probe_inverse_penalty": 3.0}
    export(export_config(tmp_path, world / "model", world / "questions.jsonl", **files))
    stability, clusters = read_manifest(tmp_path / "manifest").header.notes
    assert stability.startswith("neurons.csv: stability from 20 of ")
    assert clusters == "neurons.csv: pattern neurons from clusters of 12 of 40 signatures"
    few = make_manifest(tmp_path / "few", keep_truncated=False)
    assert Exported(few).pattern_neurons.empty
    assert read_manifest(few).header.notes[0].startswith("neurons.csv: no pattern neurons, ")


def test_a_manifest_of_an_earlier_schema_is_read(tmp_path: Path) -> None:
    folder = make_manifest(tmp_path)
    (folder / "neurons.csv").write_text("layer,index,weight,active_share\n1,3,0.5,0.25\n0,2,-0.25,1\n")
    edit_header(folder, lambda header: header.update(schema_version="1.3"))
    exported = Exported(folder)
    assert exported.neurons.to_dict("list") == {
        "layer": [1, 0], "index": [3, 2], "weight": [0.5, -0.25], "active_share": [0.25, 1.0]
    }  # fmt: skip
    assert exported.pattern_neurons.empty and {"layer", "index", "cluster"} <= set(exported.pattern_neurons)


def test_an_intervention_takes_the_hallucination_rows(tmp_path: Path) -> None:
    path = tmp_path / "neurons.csv"
    path.write_text(
        "role,layer,index,active_share,weight,stability,kinds,kinds_agreeing,cluster,lift,q\n"
        "pattern,0,1,0.5,,,,,1,9.5,0.01\nhallucination,1,3,0.5,0.5,0.9,3,3,,,\nhallucination,0,1,0.5,-1,0.1,3,2,,,\n"
    )
    sites = FFNSites(("0", "1"), ("0", "1"), ("0", "1"), "head", d_mlp=8, d_model=4, gated=True)
    assert choose_neurons(path, sites, "positive") == ([11], [1, 11])
    assert read_neurons(path, "pattern").to_dict("records")[0]["cluster"] == 1
    path.write_text(path.read_text().replace("hallucination,1,3", "hallucination,7,3"))
    with pytest.raises(UserError, match=r"neurons\.csv:3: neuron 3 of layer 7 is outside the model"):
        choose_neurons(path, sites, "all")
    path.write_text("role,layer,index,active_share,lift\npattern,0,1,0.5,2\n")
    with pytest.raises(UserError, match="expected the columns layer, index and cluster"):
        read_neurons(path, "pattern")
