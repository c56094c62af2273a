"""The rollouts of training in ``rollouts/``: what they hold, for every method, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest

from distill.train import main
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from tests.support.flow import interrupted_at, make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import metrics_of, train, train_baseline, train_config


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("export"), answer_parser=UNCUT)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "rollouts").iterdir())}


def test_they_are_what_the_metrics_counted(tmp_path: Path, manifest: Path) -> None:
    """Also with replayed prompts, which have no answer, and where the loss leaves some out."""
    replay = tmp_path / "general.jsonl"
    replay.write_text('{"id": "g", "question": "Sing."}\n')
    options: dict[str, Any] = {
        "keep_truncated": False,
        "num_generations": 12,
        "max_new_tokens": 30,
        "skip_first": 1,
        "replay": str(replay),
    }
    train(tmp_path, manifest, **options, loss_on="disagreeing")
    table = pd.read_parquet(tmp_path / "run" / "rollouts")
    columns = "step question_id rollout_id text completion_ids finish_reason mean_logprob answer in_loss"
    assert list(table.columns) == columns.split()
    reader, rows = (
        read_manifest(manifest).header.answer_reader(),
        {r.question_id: r for r in read_manifest(manifest).rows},
    )
    tokenizer = load_model(manifest.parent / "model").tokenizer
    for step, metrics in zip(range(1, 5), metrics_of(tmp_path / "run"), strict=True):
        own = table[table["step"] == step]
        assert len(own) == metrics["rollouts"] == 4 * 12 and not own.duplicated(["question_id", "rollout_id"]).any()
        assert own["in_loss"].sum() == metrics["rollouts_in_loss"]
        assert own["completion_ids"].map(len).sum() == metrics["generated_tokens"]
        assert (own["finish_reason"] == "stop").mean() == pytest.approx(metrics["eos_rate"])
    assert 0 < table["in_loss"].sum() < len(table) and (table["mean_logprob"] < 0).all()
    for row in table.itertuples():
        ids = row.completion_ids[:-1] if row.finish_reason == "stop" else row.completion_ids
        assert tokenizer.decode(list(ids), skip_special_tokens=True) == row.text
        question = rows.get(row.question_id)
        read = question and reader.extract(row.text, row.finish_reason, question.as_question())
        assert (read or None) == (None if pd.isna(row.answer) else row.answer)
    assert table["answer"].notna().any() and set(table["question_id"]) > {"replay:g"}
    (path, *_) = (tmp_path / "run" / "rollouts").iterdir()
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(3).compression == "ZSTD"


@pytest.mark.parametrize("method", ["nopsd", "ttrl"])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, manifest: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "num_generations": 2, "steps": 5, "save_steps": 2}
    main(train_config(tmp_path, manifest, "straight", **options))
    main(train_config(tmp_path, manifest, "broken", **options))
    (tmp_path / "broken" / "train.json").unlink()
    (tmp_path / "broken" / "checkpoints" / "step-000005" / "state.json").unlink()
    (tmp_path / "broken" / "rollouts" / "step-000003.parquet").unlink()  # of a step that is done: stays lost
    (tmp_path / "broken" / "rollouts" / ".step-000005.parquet.tmp").write_bytes(b"half")
    main(train_config(tmp_path, manifest, "broken", **options, resume=True))
    whole = files(tmp_path / "straight")
    assert list(whole) == [f"step-{step:06d}.parquet" for step in range(1, 6)]
    assert files(tmp_path / "broken") == {name: data for name, data in whole.items() if "3" not in name}


def test_every_nth_step_or_none_and_never_anothers(tmp_path: Path, manifest: Path) -> None:
    train(tmp_path, manifest, "all")
    train(tmp_path, manifest, "half", keep_rollouts=2)
    assert files(tmp_path / "half") == {n: d for n, d in files(tmp_path / "all").items() if n[10] in "24"}
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        train(tmp_path, manifest, "changed")
    assert train(tmp_path, manifest, "changed", keep_rollouts=0, resume=True) == train(tmp_path, manifest, "again")
    main(train_config(tmp_path, manifest, "all", keep_rollouts=0, overwrite=True))
    assert not (tmp_path / "all" / "rollouts").exists()


def test_votes_beyond_the_loss_are_kept_and_marked(tmp_path: Path, manifest: Path) -> None:
    [row] = train_baseline(tmp_path, manifest, steps=1, num_generations=2, vote_generations=5)
    table = pd.read_parquet(tmp_path / "run" / "rollouts")
    assert len(table) == row["rollouts"] == 15 and table["in_loss"].sum() == row["rollouts_in_loss"] == 6
    assert set(table[table["in_loss"]]["rollout_id"]) == {0, 1}
    assert json.loads((tmp_path / "run" / "train.json").read_text())["budget"]["rollouts"] == 15
