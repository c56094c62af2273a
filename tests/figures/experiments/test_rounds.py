"""Rounds of export, training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from figures.experiments.rounds import RoundsConfig, main
from neurosig.manifest import read_manifest
from tests.support.flow import save_tiny, write_questions
from tests.support.processes import TRAIN


@pytest.mark.slow
def test_each_round_continues_the_one_before_and_a_second_call_resumes(tmp_path: Path) -> None:
    model, questions = str(save_tiny(tmp_path / "model")), [str(write_questions(tmp_path / "questions.jsonl"))]
    sampled: dict[str, Any] = {"model": model, "questions": questions, "num_generations": 3, "max_new_tokens": 4}
    export = {**sampled, "temperature": 1.0, "set_size": 16, "question_filter": "all", "context_policy": "none"}
    options: dict[str, Any] = {"export": export, "evaluate": sampled, "train": {**TRAIN, "steps": 2}}
    config = RoundsConfig(out=tmp_path / "rounds", rounds=1, resamples=100, quiet=True, **options)
    main(config)
    first = (tmp_path / "rounds" / "round-1" / "run" / "train.json").stat().st_mtime_ns
    config.rounds = 2
    main(config)
    assert (tmp_path / "rounds" / "round-1" / "run" / "train.json").stat().st_mtime_ns == first
    records = [json.loads((tmp_path / "rounds" / f"round-{n}" / "run" / "train.json").read_text()) for n in (1, 2)]
    start = records[0]["weights"]["adapter_model.safetensors"]
    assert [record["model"]["adapter"] for record in records] == [None, start]
    assert read_manifest(tmp_path / "rounds" / "round-2" / "manifest").header.model["adapter"] == start
    table = pd.read_csv(tmp_path / "rounds" / "rounds.csv")
    assert table["round"].tolist() == [0, 1, 2] and (table["n"] == 8).all()
    assert table["avg_at_k_over_base"].notna().tolist() == [False, True, True]
