"""Training runs and evaluations on the tiny model of `tests.support.flow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.config import TrainConfig
from distill.evaluate import EvaluateConfig
from tests.support.flow import save_tiny, write_questions
from tests.support.processes import TRAIN


def train_config(folder: Path, manifest: Path, out: str = "run", **changes: Any) -> TrainConfig:
    """A quick training run into ``folder / out``."""
    return TrainConfig(manifest=manifest, out=folder / out, **{**TRAIN, "quiet": True, **changes})


def evaluate_config(folder: Path, out: str = "eval", **changes: Any) -> EvaluateConfig:
    """A quick evaluation into ``folder / out``; model and questions are made where ``folder`` has none."""
    model, questions = folder / "model", folder / "questions.jsonl"
    if not model.exists():
        save_tiny(model)
    if not questions.exists():
        write_questions(questions)
    defaults: dict[str, Any] = {"num_generations": 4, "max_new_tokens": 4, "quiet": True}
    defaults |= {"questions": (str(questions),)}
    return EvaluateConfig(model=str(model), out=folder / out, **{**defaults, **changes})
