"""Another model of the same tokenizer as the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.train import main
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest, save_tiny
from tests.support.runs import train, train_config

OPTIONS: dict[str, Any] = {"steps": 15, "learning_rate": 0.02, "questions_per_step": 8, "save_steps": 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_manifest(folder, context_policy="none")
    save_tiny(folder / "teacher", seed=1)
    save_tiny(folder / "llama", "llama", seed=2)
    return folder


def test_the_student_approaches_the_other_model(folder: Path) -> None:
    """Without a context the model itself teaches nothing; another one does, and is followed."""
    options = {**OPTIONS, "keep_truncated": True, "max_new_tokens": 8, "lora_r": 8, "stop_on_collapse": False}
    metrics, _ = train(folder, folder / "manifest", teacher_model=str(folder / "teacher"), **options)
    assert metrics[0]["divergence"] > 0.05
    assert metrics[-1]["divergence"] < 0.6 * metrics[0]["divergence"]
    teacher, base = load_model(folder / "teacher"), load_model(folder / "model")
    student = load_model(folder / "model", adapter=folder / "run")
    record = json.loads((folder / "run" / "train.json").read_text())
    assert record["teacher"]["weights"] == teacher.info.weights and record["model"]["weights"] == base.info.weights
    assert "The teacher was" in (folder / "run" / "adapter" / "README.md").read_text()
    ids = torch.tensor([base.tokenizer("Is red nice?")["input_ids"]])
    with torch.no_grad():
        wanted, before, after = (
            torch.log_softmax(one.model(ids).logits[:, -1], -1) for one in (teacher, base, student)
        )
    kl = [float((wanted.exp() * (wanted - one)).sum()) for one in (before, after)]
    assert kl[1] < kl[0]


def test_a_teacher_of_another_architecture_and_width(folder: Path) -> None:
    metrics, _ = train(folder, folder / "manifest", "llama-taught", teacher_model=str(folder / "llama"), steps=1)
    assert metrics[0]["divergence"] > 0.01


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teacher_model": "organism"}, "--teacher-model organism: cannot teach .*, its tokenizer has other tokens"),
        ({"teacher_model": "x", "teacher": "ema"}, "--teacher-model is a frozen teacher; leave out --teacher"),
        ({"teacher_model": "/nowhere/x"}, "model /nowhere/x: no such file or folder"),
    ],
)
def test_what_cannot_teach_is_one_sentence(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        main(train_config(folder, folder / "manifest", "refused", **options))
    assert not (folder / "refused").exists()
