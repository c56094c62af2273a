"""What a results folder says of itself is checked, and every kind of tampering is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import distill.compare
import distill.evaluate
import distill.train
import neurosig.verify.recomputed
from figures.grid.collect import collect
from neurosig.runtime.errors import UserError
from neurosig.verify.__main__ import VerifyConfig, main
from tests.support.flow import make_manifest
from tests.support.manifests import edit_header, edit_row
from tests.support.runs import evaluate_config, train_config


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` leaves it, small, and a grid of one cell."""
    world = tmp_path_factory.mktemp("world")
    folder = world / "demo"
    manifest = make_manifest(world, "demo/manifest")
    distill.train.main(train_config(folder, manifest, "nopsd"))
    for out, adapter in (("base", None), ("nopsd", folder / "nopsd" / "adapter")):
        distill.evaluate.main(evaluate_config(world, f"demo/eval/{out}", adapter=adapter))
    distill.compare.main(
        distill.compare.CompareConfig(
            base=folder / "eval" / "base", trained=folder / "eval" / "nopsd", out=folder / "report", resamples=100
        )
    )
    shutil.copytree(folder / "eval" / "base", folder / "grid" / "cells" / "base" / "eval" / "colour")
    (folder / "grid" / "grid.json").write_text("{}")
    collect(folder / "grid", ["colour"])
    return folder


def checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Lines of the checks that failed, and all others."""
    capsys.readouterr()
    failed = False
    try:
        main(VerifyConfig(folder=folder))
    except UserError as error:
        assert "checks failed, the first is" in str(error)
        failed = True
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines if line.startswith("FAIL")]
    assert failed == bool(bad)
    return bad, [line for line in lines if line not in bad]


def test_a_healthy_folder_passes(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = checked(results, capsys)
    assert not bad
    assert not [line for line in good if not line.startswith("ok")]
    for what in (
        "manifest: 4 files as hashed, 8 questions and their contexts",
        "manifest: answers and votes follow from the rollouts",
        "manifest: no gold answer in it",
        "nopsd: weights in adapter/ as hashed",
        "nopsd: 4 steps of metrics",
        "nopsd: checkpoint step-000004 as hashed",
        "nopsd: trained on the manifest and the model that made it",
        "eval/base: 8 rows follow from the rollouts and the gold answers",
        "eval/nopsd: aggregates of colour follow from the rows",
        "eval/nopsd: made by the adapter in the folder",
        "report: trained, in-domain: Avg@K, maj@K and ECE follow from the rows",
        "grid: base on colour as its cell says",
    ):
        assert f"ok    {what}" in good, "\n".join(good)


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


def fields(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return edit


def rows(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        table = pyarrow.parquet.read_table(folder / name)
        found = table.to_pylist()
        change(found)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found, schema=table.schema), folder / name)

    return edit


def text(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def another_adapter(folder: Path) -> None:
    """As after a training run that was made again with other options and so is right in itself."""
    weights = folder / "nopsd" / "adapter" / "adapter_model.safetensors"
    flip("nopsd/adapter/adapter_model.safetensors")(folder)
    for name in ("nopsd/train.json", "nopsd/adapter/train.json"):
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        fields(name, lambda record, digest=digest: record.update(weights={weights.name: digest}))(folder)
    fields("eval/nopsd/summary.json", lambda record: record["config"].update(adapter=str(weights.parent)))(folder)


def lone(folder: Path, name: str, change: dict[str, Any]) -> None:
    """As where the recorded place is gone, so that only what is in the folder can be the other half of a pair."""
    fields(name, lambda record: record["config"].update(change))(folder)


def manifest_of_other_questions(folder: Path) -> None:
    edit_header(folder / "manifest", lambda header: header["options"].update(seed=9))
    for name in ("nopsd/train.json", "nopsd/adapter/train.json"):
        lone(folder, name, {"manifest": "gone"})


def adapter_of_another_run(folder: Path) -> None:
    another_adapter(folder)
    lone(folder, "eval/nopsd/summary.json", {"adapter": "gone"})


def evaluated_again(folder: Path) -> None:
    """An evaluation with the same rows, made anew: only its hashes tell."""
    fields("eval/base/summary.json", lambda record: record["run"].update(python="3.99"))(folder)


def compared_another(folder: Path) -> None:
    other = {"summary.json": "0" * 64, "results.parquet": "0" * 64}
    fields("report/comparison.json", lambda record: record["sha256"].update(base=other))(folder)
    fields("report/comparison.json", lambda record: record["folders"].update(base="gone"))(folder)


def neurons(line: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / "manifest" / "neurons.csv").write_text(f"layer,index,weight,active_share\n1,2,0.5,0.1\n{line}\n")
        edit_header(folder / "manifest", lambda header: header["files"]["neurons.csv"].update(rows=2))

    return edit


def answered(row: dict[str, Any]) -> None:
    row["answers"][0] = "made up"


PARTS = {
    "nopsd": ["nopsd"],
    "eval/nopsd": ["nopsd", "eval/nopsd"],
    "eval/base": ["eval/base"],
    "report": ["eval/base", "eval/nopsd", "nopsd", "report"],
    "grid": ["grid"],
}


def another_manifest(folder: Path) -> None:
    edit_header(folder / "manifest", lambda header: header["options"].update(seed=9))
    for name in ("nopsd/train.json", "nopsd/adapter/train.json"):
        fields(name, lambda record: record["config"].update(manifest=str(folder / "manifest")))(folder)


SAID = {"text": "Answer: x", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("tamper", "failure"),
    [
        (flip("nopsd/adapter/adapter_model.safetensors"), "nopsd: weights in adapter/ as hashed"),
        (another_adapter, "eval/nopsd: made by the adapter in the folder"),
        (flip("nopsd/checkpoints/step-000004/weights.safetensors"), "nopsd: checkpoint step-000004 as hashed"),
        (
            fields("nopsd/train.json", lambda record: record["last"].update(loss=0.0)),
            "nopsd: the record next to the weights is the same",
        ),
        (text("nopsd/metrics.jsonl", lambda lines: lines.replace('"step": 3', '"step": 4')), "nopsd: 4 steps of"),
        (flip("manifest/signals.safetensors"), "signals.safetensors: sha256 differs from manifest.json"),
        (
            lambda folder: edit_row(folder / "manifest", 3, lambda row: row["context"][0].update(question_id="q2")),
            "$.context[0]: a question is its own context",
        ),
        (
            lambda folder: edit_row(folder / "manifest", 3, lambda row: row.update(SAID), "rollouts.jsonl"),
            'question "q0": its answers are not those of its rollouts',
        ),
        (lambda folder: edit_row(folder / "manifest", 3, answered), 'question "q2": its answers are not those'),
        (
            lambda folder: edit_row(folder / "manifest", 3, lambda row: row["vote"].update(count=3)),
            'question "q2": its vote is not that of its answers',
        ),
        (
            lambda folder: edit_header(folder / "manifest", lambda header: header["counts"].update(questions=9)),
            "manifest: counts by reason",
        ),
        (
            lambda folder: edit_header(folder / "manifest", lambda header: header["dataset"].update(answer="Paris")),
            "manifest: no gold answer in it",
        ),
        (neurons("2,0,1.0,0.1"), "neurons.csv:3: no neuron L2/0"),
        (neurons("1,2,1.0,0.1"), "neurons.csv:3: neuron L1/2 appears twice"),
        (neurons("1,3,nan,0.1"), "neurons.csv:3: neuron L1/3 appears twice or has no finite weight"),
        (
            fields("manifest/run.json", lambda record: record["libraries"].update(torch=None)),
            "the record lacks libraries.torch",
        ),
        (
            another_manifest,
            "nopsd: trained on the manifest in the folder",
        ),
        (
            manifest_of_other_questions,
            "nopsd: trained on the manifest in the folder: its manifest has SHA-256",
        ),
        (adapter_of_another_run, "eval/nopsd: made by the adapter in the folder: its adapter has SHA-256"),
        (
            fields("eval/nopsd/summary.json", lambda record: record["config"].update(instruction="Guess.")),
            "eval/nopsd: asked as the adapter was trained: instruction (Answer in one short sentence. in training, Gue",
        ),
        (evaluated_again, "report: base: the evaluation that was compared: summary.json changed after the comparison"),
        (
            compared_another,
            "report: base: the evaluation that was compared: its evaluation has SHA-256 000000000000, here are",
        ),
        (
            fields("eval/base/summary.json", lambda record: record["domains"]["colour"]["ece"].update(low=0.0123)),
            "eval/base: aggregates of colour follow from the rows: ece.low is 0.0123, not",
        ),
        (
            fields("eval/base/summary.json", lambda record: record["domains"]["colour"].update(brier=0.5)),
            "eval/base: aggregates of colour follow from the rows: brier is 0.5, not",
        ),
        (
            rows("eval/base/results.parquet", lambda found: found[2].update(n_correct=4)),
            'eval/base: 8 rows follow from the rollouts and the gold answers: question "q2": n_correct is 4, not 0',
        ),
        (
            rows("eval/base/results.parquet", lambda found: found[2].update(votes=found[2]["votes"] + 1)),
            'eval/base: 8 rows follow from the rollouts and the gold answers: question "q2": votes is',
        ),
        (
            text("eval/base/rollouts.jsonl", lambda lines: lines.replace('"text": "', '"text": "Answer: x. ', 1)),
            "eval/base: 8 rows follow from the rollouts and the gold answers",
        ),
        (
            text("eval/base/rollouts.jsonl", lambda lines: lines.partition("\n")[2]),
            'eval/base: 8 rows follow from the rollouts and the gold answers: question "q0": 4 answers of 3 rollouts',
        ),
        (
            fields("report/comparison.json", lambda record: record["rows"][1]["avg_at_k"].update(estimate=0.9)),
            "report: trained, in-domain: Avg@K, maj@K and ECE follow from the rows: avg_at_k.estimate is 0.9",
        ),
        (
            text("grid/results.csv", lambda lines: lines.replace("base,,colour,0,8", "base,,colour,0,9")),
            "grid: base on colour as its cell says: n is 9.0, not 8",
        ),
        (lambda folder: (folder / "nopsd" / "train.json").write_text("{"), "nopsd: readable"),
    ],
)
def test_tampering_is_named(
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tamper: Callable[[Path], object],
    failure: str,
) -> None:
    """Of the folder, what the check needs: the rest is the same for all."""
    parts = PARTS.get(failure.partition(":")[0], ["manifest"])
    for part in ["manifest", *parts]:
        shutil.copytree(results / part, tmp_path / "demo" / part, dirs_exist_ok=True)
    if "aggregates" not in failure:  # their intervals take long, and are checked elsewhere
        monkeypatch.setattr(neurosig.verify.recomputed, "aggregates", lambda rows, seed: {})
    tamper(tmp_path / "demo")
    bad, _ = checked(tmp_path / "demo", capsys)
    assert any(failure in line for line in bad), bad


def test_what_is_not_there_is_skipped_and_an_empty_folder_is_refused(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results / "nopsd", tmp_path / "alone" / "nopsd")
    fields("nopsd/train.json", lambda record: record["config"].update(manifest="nowhere"))(tmp_path / "alone")
    shutil.copy(tmp_path / "alone" / "nopsd" / "train.json", tmp_path / "alone" / "nopsd" / "adapter" / "train.json")
    bad, good = checked(tmp_path / "alone", capsys)
    assert not bad
    assert [line for line in good if line.startswith("skip")] == [
        "skip  nopsd: trained on the manifest in the folder: skipped: its manifest is not here"
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no manifest, training run, evaluation or grid in it"):
        main(VerifyConfig(folder=tmp_path / "empty"))
    with pytest.raises(UserError, match="gone: no such folder"):
        main(VerifyConfig(folder=tmp_path / "gone"))
