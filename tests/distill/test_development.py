"""The development split: measured before training and at every save, and a reason to stop when it falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.config import TrainConfig
from distill.development import Development
from distill.train import main
from neurosig.models.load import load_model
from neurosig.questions.answers import extract_answer
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample
from tests.support.flow import WORDS, make_manifest

INSTRUCTION = "Answer in one short sentence."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, and dev.jsonl: questions whose gold answer is what the untrained model says, sampling greedily."""
    folder = tmp_path_factory.mktemp("development")
    make_manifest(folder)
    loaded = load_model(folder / "model")
    builder = PromptBuilder(loaded.tokenizer, PromptConfig(None, INSTRUCTION, "", None))
    questions = [Question(id=f"d{i}", domain="dev", question=f"What is {word}?") for i, word in enumerate(WORDS)]
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    said = {
        group[0].question_id: group[0].text
        for group in sample(loaded, prompts, SamplingConfig(num_generations=1, temperature=0.0, max_new_tokens=4))
    }
    answers = {question: extract_answer(said[question.id], question) for question in questions}
    records = [{"id": q.id, "question": q.question, "answer": answer} for q, answer in answers.items() if answer]
    assert len(records) >= 4
    (folder / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 6, "questions_per_step": 3, "lora_r": 4, "learning_rate": 5e-4}
    options |= {"warmup_steps": 0, "keep_truncated": True, "save_steps": 1, "quiet": True, "temperature": 0.0}
    options |= {"dev_questions": str(folder / "dev.jsonl"), "dev_generations": 1, "stop_on_collapse": False}
    main(TrainConfig(manifest=folder / "manifest", out=out, **{**options, **changes}))
    return json.loads((out / "train.json").read_text())


def measured(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "development.jsonl").read_text().splitlines()]


def test_a_falling_majority_stops_the_run(folder: Path, tmp_path: Path) -> None:
    stopped = run(folder, tmp_path / "run", steps=20)["stopped"]
    values = measured(tmp_path / "run")
    assert values[0]["step"] == 0 and values[0]["maj_at_k"] == 1.0
    assert values[-1]["step"] == stopped["step"] > 1
    assert stopped["weights_of_step"] == stopped["step"] - 1
    n, now = len(values[0]["by_question"]), values[-1]["maj_at_k"]
    assert stopped["reason"] == f"maj@1 on {n} development questions fell from 1.000 to {now:.3f}"


def test_a_run_that_holds_its_majority_goes_on(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "run", learning_rate=1e-9, steps=3, save_steps=2)["stopped"] is None
    assert [(entry["step"], entry["maj_at_k"]) for entry in measured(tmp_path / "run")] == [
        (0, 1.0),
        (2, 1.0),
        (3, 1.0),
    ]


def test_a_killed_run_measures_again_and_stops_at_the_same_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, tmp_path / "whole", steps=20)["stopped"]
    measure = Development.measure

    def killed(self: Development, step: int) -> None:
        measure(self, step)
        if step == whole["step"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Development, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "killed", steps=20)
    monkeypatch.undo()
    assert run(folder, tmp_path / "killed", steps=20, resume=True)["stopped"] == whole
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_questions_without_gold_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"id": "x", "question": "Why?"}\n{"id": "y", "question": "Who?"}\n')
    with pytest.raises(UserError, match='question "x" has no answer'):
        run(folder, tmp_path / "run", dev_questions=str(unlabelled))
