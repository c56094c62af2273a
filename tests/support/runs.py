"""Training runs and evaluations on the tiny model of `tests.support.flow`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.config import TrainConfig
from distill.evaluate import EvaluateConfig
from distill.train import main
from neurosig.runtime.cli import untimed
from tests.support.flow import WORDS, save_tiny, write_questions
from tests.support.processes import TRAIN

BASELINE: dict[str, Any] = {"method": "ttrl", "steps": 2, "num_generations": 4}


def train_config(folder: Path, manifest: Path, out: str = "run", **changes: Any) -> TrainConfig:
    """A quick training run into ``folder / out``."""
    return TrainConfig(manifest=manifest, out=folder / out, **{**TRAIN, "quiet": True, **changes})


def train(tmp_path: Path, manifest: Path, out: str = "run", **changes: Any) -> tuple[list[dict[str, float]], bytes]:
    """Metrics of each step, and the adapter's bytes."""
    main(train_config(tmp_path, manifest, out, **changes))
    return metrics_of(tmp_path / out), (tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes()


def baseline_config(tmp_path: Path, manifest: Path, out: str = "run", **changes: Any) -> TrainConfig:
    return train_config(tmp_path, manifest, out, **{**BASELINE, **changes})


def train_baseline(tmp_path: Path, manifest: Path, out: str = "run", **changes: Any) -> list[dict[str, float]]:
    """Metrics of each step."""
    main(baseline_config(tmp_path, manifest, out, **changes))
    return metrics_of(tmp_path / out)


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The metrics of each step, without times and memory."""
    return [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result_bytes(path: Path) -> bytes:
    """A file of a run that an equal run would also write: metrics.jsonl counts without times and memory."""
    if path.name == "metrics.jsonl":
        return "".join(json.dumps(step) + "\n" for step in metrics_of(path.parent)).encode()
    return path.read_bytes()


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


def write_choices(path: Path, n: int = 8) -> Path:
    """``n`` questions of 2 to 5 choices in two domains."""
    records = [
        {
            **{"id": f"q{index}", "domain": ("colour", "tone")[index % 2], "kind": f"k{index % 3}"},
            **{"question": f"Which is like {word}?", "choices": list(WORDS[: 2 + index % 4]), "answer": "A"},
        }
        for index, word in enumerate(WORDS[:n])
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
