"""What the probe's folds keep together, and how often they are drawn."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from neurosig.export import ExportConfig
from neurosig.export import main as export
from neurosig.exported import Exported
from neurosig.hallucination.config import FOLD_SEEDS, ProbeConfig
from neurosig.hallucination.groups import COLUMNS
from neurosig.hallucination.probe import contribution_matrix, fit_probe
from neurosig.manifest import read_manifest
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError
from tests.support.exports import K, write_lines, write_world
from tests.support.flow import export_config


def of_a_kind(kinds: int = 3, questions: int = 40, k: int = 2) -> Any:
    """Contributions in which each kind of question has a guessing neuron of its own, which is noise in the others."""
    rng = np.random.default_rng(0)
    ids, values, labels, names, groups = [], [], [], [], []
    for kind in range(kinds):
        for question in range(questions):
            guessed = question % 2
            for _ in range(k):
                ids.append(list(range(12)))
                row = rng.uniform(0, 1, 12)
                row[kind] = guessed + rng.normal(0, 0.2)
                values.append(row)
                labels.append(guessed)
                names.append(f"q{kind}-{question}")
                groups.append(f"kind {kind}")
    return contribution_matrix(np.array(ids), np.array(values), 12), np.array(labels), names, groups


def test_neurons_of_a_kind_do_not_tell_guessing_in_another() -> None:
    matrix, labels, names, kinds = of_a_kind()
    by_question = fit_probe(matrix, labels, names, ProbeConfig()).scores
    by_kind = fit_probe(matrix, labels, kinds, ProbeConfig(groups="kind")).scores
    assert roc_auc_score(labels, by_question) > 0.75
    assert roc_auc_score(labels, by_kind) < 0.6


def test_fewer_groups_than_folds_give_one_fold_each(caplog: pytest.LogCaptureFixture) -> None:
    matrix, labels, _, kinds = of_a_kind()
    caplog.set_level("INFO", logger="neurosig")
    seen = fit_probe(matrix, labels, kinds, ProbeConfig(folds=5, groups="kind")).scores
    assert "probe: 3 values of kind, so as many folds" in caplog.text
    assert np.array_equal(fit_probe(matrix, labels, kinds, ProbeConfig(folds=3, groups="kind")).scores, seen)


def test_a_fold_that_leaves_one_side_only_is_no_signal(caplog: pytest.LogCaptureFixture) -> None:
    """Only the first kind has guessed questions: without it there is nothing to learn."""
    matrix, labels, _, kinds = of_a_kind()
    result = fit_probe(matrix, labels * (np.array(kinds) == "kind 0"), kinds, ProbeConfig(groups="kind"))
    assert not result.informative and set(result.scores) == {0.5}
    assert "questions whose rollouts agree have 3 and questions whose rollouts split 1; both are needed" in caplog.text


def test_fold_seeds_are_averaged() -> None:
    matrix, labels, names, _ = of_a_kind()
    assert ProbeConfig().fold_seeds == FOLD_SEEDS == 3
    several = fit_probe(matrix, labels, names, ProbeConfig())
    alone = [fit_probe(matrix, labels, names, ProbeConfig(seed=seed, fold_seeds=1)).scores for seed in range(3)]
    np.testing.assert_allclose(several.by_seed, alone, atol=1e-6)
    np.testing.assert_allclose(several.scores, several.by_seed.mean(axis=0))
    assert several.by_seed.std(axis=0).max() > 1e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`write_world` with two kinds of question."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    write_lines(folder / "questions.jsonl", [row | {"kind": "even" if i % 2 else "odd"} for i, row in enumerate(lines)])
    return folder


def config(world: Path, out: str, **changes: Any) -> ExportConfig:
    files: dict[str, Any] = {"rollouts": world / "rollouts.jsonl", "num_generations": K, **changes}
    return export_config(world, world / "model", world / "questions.jsonl", out, **files)


def test_the_export_records_its_folds_and_the_report_compares_them(world: Path) -> None:
    export(config(world, "question"))
    export(config(world, "kind", probe_groups="kind", reuse=world / "question"))
    scores = {}
    for name in ("question", "kind"):
        options = read_manifest(world / name).header.options
        assert (options["probe_groups"], options["probe_fold_seeds"]) == (name, FOLD_SEEDS)
        stored = load_file(world / name / "signals.safetensors")
        scores[name] = stored["probe_scores"]
        assert stored["probe_by_seed"].shape == (len(scores[name]), FOLD_SEEDS)
        np.testing.assert_allclose(stored["probe_by_seed"].mean(axis=1), scores[name], atol=1e-6)
        assert np.array_equal(Exported(world / name).signals.probe_by_seed.numpy(), stored["probe_by_seed"])
    assert not np.allclose(scores["question"], scores["kind"])

    report(ReportConfig(manifest=world / "question", out=world / "report", resamples=100, permutations=9, quiet=True))
    with (world / "report" / "folds.csv").open() as handle:
        rows = {row["groups"]: row for row in csv.DictReader(handle)}
    assert (rows["kind"]["n_groups"], rows["kind"]["folds"]) == ("2", "2")
    manifest = read_manifest(world / "question")
    gold = [row.pseudo_label == f"gold{index}" for index, row in enumerate(manifest.rows)]
    for name, row in rows.items():
        trust = [-line.scores["probe_score"] for line in read_manifest(world / name).rows]
        assert float(row["right"]) == pytest.approx(roc_auc_score(gold, trust), abs=0.005), name
    assert float(rows["question"]["side_low"]) < float(rows["question"]["side_high"])
    page = (world / "report" / "report.html").read_text()
    assert "where folds leave out a kind (2 in 2 folds)" in page and f"over {FOLD_SEEDS} fold seeds" in page


@pytest.mark.parametrize("column", ["entity", "answer", ""])
def test_an_unknown_column_is_named_with_those_there_are(world: Path, column: str) -> None:
    with pytest.raises(UserError, match=f"--probe-groups {column}: no such column .* have {', '.join(COLUMNS)}"):
        export(config(world, "unknown", probe_groups=column))
    assert not (world / "unknown" / "manifest.json").exists()


def test_one_group_is_exit_code_2_in_export_and_a_sentence_in_the_report(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(world / "model"), "--questions", str(world / "questions.jsonl"), "--out", str(world / "one")]
    argv += ["--probe-groups", "domain", "--rollouts", str(world / "rollouts.jsonl")]
    assert run_command(ExportConfig, export, presets={}, prog="export", argv=argv) == 2
    error = capsys.readouterr().err
    assert 'all 40 questions have the same domain, "made up", so no fold can leave one out' in error

    lines = (world / "questions.jsonl").read_text().replace(', "kind": "odd"', "").replace(', "kind": "even"', "")
    (world / "plain.jsonl").write_text(lines)
    plain = config(world, "plain")
    plain.questions = (str(world / "plain.jsonl"),)
    export(plain)
    report(
        ReportConfig(manifest=world / "plain", out=world / "plain report", resamples=100, permutations=0, quiet=True)
    )
    assert "Folds by kind were left out: all 40 questions have the same kind" in capsys.readouterr().out


def test_fold_seeds_below_one_are_refused(world: Path) -> None:
    with pytest.raises(UserError, match="probe-fold-seeds: expected at least 1, got 0"):
        export(config(world, "none", probe_fold_seeds=0))
