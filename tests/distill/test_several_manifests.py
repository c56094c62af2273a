"""Training on the questions of several manifests at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.train import main
from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.manifest.combined import combine
from neurosig.runtime.errors import UserError
from neurosig.verify.__main__ import VerifyConfig
from neurosig.verify.__main__ import main as verify
from tests.support.flow import export_config, make_manifest, save_tiny, write_questions
from tests.support.runs import metrics_of, train_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 8 questions and one of other rollouts of 6 of them."""
    folder = tmp_path_factory.mktemp("several")
    make_manifest(folder, "a")
    questions = write_questions(folder / "some.jsonl", n=6)
    export(export_config(folder, folder / "model", questions, "b", seed=4))
    return folder


def test_ids_are_told_apart_and_contexts_stay_within_their_manifest(folder: Path) -> None:
    a, b = read_manifest(folder / "a"), read_manifest(folder / "b")
    both = combine([a, b], (1.0, 2.0))
    names = [row.question_id for row in both.rows]
    assert names == [*(f"1:q{i}" for i in range(6)), *(f"q{i}" for i in range(6, 8)), *(f"2:q{i}" for i in range(6))]
    for row in both.rows:
        number = both.part_of[row.question_id]
        original = next(one for one in (a, b)[number - 1].rows if one.question_id == row.question_id.split(":")[-1])
        assert row.weight == original.weight * number
        for item, before in zip(row.context, original.context, strict=True):
            shown = both.rollouts[item.question_id, item.rollout_id]
            assert shown.text == (a, b)[number - 1].rollouts[before.question_id, before.rollout_id].text
            assert both.part_of[item.question_id] == number
    assert len(both.rollouts) == len(a.rollouts) + len(b.rollouts)
    assert {both.header.content_sha256, combine([b, a]).header.content_sha256}.isdisjoint(
        {a.header.content_sha256, combine([a, b]).header.content_sha256}
    )
    alone = combine([a])
    assert (alone.rows, alone.header) == (a.rows, a.header)


def test_a_run_names_each_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The questions of all are trained on, counted by manifest in the metrics; the verification finds each."""
    config = train_config(folder, folder / "a", steps=3, questions_per_step=5)
    config.manifest, config.manifest_weights = (folder / "a", folder / "b"), (1.0, 3.0)
    main(config)
    record = json.loads((folder / "run" / "train.json").read_text())
    selected = [len(read_manifest(folder / name).selected) for name in ("a", "b")]
    hashes = [read_manifest(folder / name).header.content_sha256 for name in ("a", "b")]
    assert [(one["sha256"], one["weight"], one["selected"]) for one in record["manifests"]] == [
        (hashes[0], 1.0, selected[0]),
        (hashes[1], 3.0, selected[1]),
    ]
    assert record["questions_selected"] == sum(selected) > 8
    steps = metrics_of(folder / "run")
    counted = [(step["questions_of_manifest_1"], step["questions_of_manifest_2"]) for step in steps]
    assert all(sum(pair) == 5 for pair in counted) and sum(pair[1] for pair in counted) >= 3
    assert len((folder / "run" / "adapter" / "trained_on.txt").read_text().split()) == 8  # b's questions are among them
    verify(VerifyConfig(folder=folder))
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("ok    run: trained on the manifest and the model that made it") == 2
    config.resume = True
    main(config)
    config.manifest_weights = (1.0, 1.0)
    with pytest.raises(UserError, match="manifest_weights"):
        main(config)


def test_what_does_not_belong_together_is_named(folder: Path, tmp_path: Path) -> None:
    a, b = read_manifest(folder / "a"), read_manifest(folder / "b")
    with pytest.raises(UserError, match="--manifest-weights: expected 2 numbers above 0, one per --manifest"):
        combine([a, b], (1.0,))
    with pytest.raises(UserError, match=r"has the content of .*; name each manifest once"):
        combine([a, a])
    export(export_config(folder, folder / "model", folder / "some.jsonl", "hot", temperature=0.5, system="Be brief."))
    save_tiny(tmp_path / "model", seed=1)
    export(export_config(tmp_path, tmp_path / "model", folder / "some.jsonl", "other"))
    with pytest.raises(
        UserError, match=r"these differ: system \(none there, Be brief. here\), temperature \(1.0 there"
    ):
        combine([a, read_manifest(folder / "hot")])
    with pytest.raises(UserError, match=r"these differ: weights\.model\.safetensors"):
        combine([a, read_manifest(tmp_path / "other")])
