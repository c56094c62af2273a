"""A small run of the whole method on the embedded SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.config import TrainConfig
from distill.evaluate import EvaluateConfig
from distill.evaluate import main as evaluate
from distill.train import main as train
from neurosig.export import ExportConfig
from neurosig.export import main as export
from neurosig.manifest import read_manifest

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real")
    export(
        ExportConfig(
            model="smollm2-135m",
            questions=("world-facts",),
            out=out / "manifest",
            limit=24,
            num_generations=4,
            question_filter="vote_only",
            quiet=True,
        )
    )
    return out


def test_the_model_answers_in_sentences_that_are_parsed(folder: Path) -> None:
    manifest = read_manifest(folder / "manifest")
    answers = [answer for row in manifest.rows for answer in row.answers]
    assert sum(answer is None for answer in answers) < 0.2 * len(answers)
    assert sum(rollout.finish_reason == "stop" for rollout in manifest.rollouts.values()) > 0.6 * len(answers)
    assert 4 <= len(manifest.selected) < 24


def test_its_context_teaches_and_an_adapter_comes_out(folder: Path) -> None:
    train(
        TrainConfig(
            manifest=folder / "manifest", out=folder / "run", steps=2, questions_per_step=4, warmup_steps=1, quiet=True
        )
    )
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["entropy_gap"] > 0 for step in metrics)
    assert all(0 < step["loss"] < 2 for step in metrics)
    evaluate(
        EvaluateConfig(
            model="smollm2-135m",
            adapter=folder / "run" / "adapter",
            questions=("world-facts", "language"),
            limit=(3,),
            num_generations=4,
            out=folder / "eval",
            quiet=True,
        )
    )
    domains = json.loads((folder / "eval" / "summary.json").read_text())["domains"]
    assert {name: block["n"] for name, block in domains.items()} == {"geography": 3, "language": 3}
