"""The stop rules by hand, and runs that they stop: a collapsed one, and one whose development split falls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import distill.metrics_log
from distill.config import TrainConfig
from distill.metrics_log import distinct_3
from distill.stopping import Development, collapse
from distill.train import main
from neurosig.models.load import load_model
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import write_atomic
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.sampler import Prompt, sample
from neurosig.verify.__main__ import Found, check_training
from tests.support.flow import WORDS, interrupted_at, make_manifest
from tests.support.parsers import UNCUT
from tests.support.runs import result_bytes


def test_distinct_trigrams_by_hand() -> None:
    assert distinct_3([[1, 2, 3, 1, 2, 3], [5, 6, 7]]) == 4 / 5  # 123 231 312 123, and 567
    assert distinct_3([[1, 2, 3], [1, 2, 3]]) == 1.0
    assert distinct_3([[1, 2], []]) == 1.0


def steps(**series: list[Any]) -> list[dict[str, Any]]:
    n = len(next(iter(series.values())))
    whole = {"mean_length": [10.0] * n, "student_entropy": [1.0] * n, "distinct_3": [0.9] * n} | series
    whole.setdefault("teacher_entropy", [1.0] * n)
    return [{name: values[index] for name, values in whole.items()} for index in range(n)]


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ({"mean_length": [10, 10, 12, 17]}, None),
        ({"mean_length": [10, 10, 14, 17]}, "the mean length went from 10.0 to 15.5 tokens"),
        ({"mean_length": [9, 9, 6, 5]}, "the mean length went from 9.0 to 5.5 tokens"),
        ({"mean_length": [10, 10, 14]}, None),
        ({"student_entropy": [1.2, 0.8, 0.6, 0.4]}, None),
        ({"student_entropy": [1.2, 0.8, 0.5, 0.4]}, "the student's entropy is 0.450 nats, the teacher's 1.000"),
        ({"student_entropy": [1.2, 0.8, 0.5, 0.4], "teacher_entropy": [0.6, 0.4, 0.3, 0.2]}, None),
        (
            {"student_entropy": [0.4, 0.4, 0.4, 0.4], "teacher_entropy": [0.7, 0.7, 0.9, 0.9]},
            "the student's entropy is 0.400 nats, the teacher's 0.900",
        ),
        ({"student_entropy": [1.0, None, 1.0, 0.3]}, None),
        (
            {"student_entropy": [1.0, None, 1.0, 0.3, None, 0.3], "mean_length": [9, 99, 9, 9, 99, 9]},
            "the student's entropy is 0.300 nats, the teacher's 1.000",
        ),
        ({"student_entropy": [1.2, 0.8, 5.0, 9.0]}, None),
        ({"student_entropy": [0.9, 0.7, 0.5, 0.4], "teacher_entropy": [None] * 4}, None),
        (
            {"student_entropy": [0.9, 0.7, 0.4, 0.3], "teacher_entropy": [None] * 4},
            "the student's entropy is 0.350 nats, in its first steps 0.800",
        ),
        ({"distinct_3": [0.8, 0.8, 0.4, 0.3]}, "the share of distinct trigrams fell from 0.80 to 0.35"),
    ],
)
def test_windows_are_compared(series: dict[str, list[Any]], reason: str | None) -> None:
    assert collapse(steps(**series), window=2) == reason


def run(tmp_path: Path, out: str, **changes: Any) -> dict[str, Any]:
    manifest = tmp_path / "manifest"
    if not manifest.exists():
        make_manifest(tmp_path)
    options: dict[str, Any] = {"steps": 8, "questions_per_step": 3, "learning_rate": 1e-2, "lora_r": 4, "quiet": True}
    options |= {"keep_truncated": True, "save_steps": 1, "keep_checkpoints": 9, "collapse_window": 2, **changes}
    main(TrainConfig(manifest=manifest, out=tmp_path / out, **options))
    return json.loads((tmp_path / out / "train.json").read_text())


def test_a_collapsed_run_stops_and_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trigrams are made to look repeated from step 4 on: the windows of steps 1-2 and 4-5 differ first."""
    seen: list[int] = []
    monkeypatch.setattr(distill.metrics_log, "distinct_3", lambda ids: 0.9 if seen.append(1) or len(seen) < 4 else 0.1)
    record = run(tmp_path, "stopped")
    assert record["stopped"] == {
        "step": 5,
        "reason": "the share of distinct trigrams fell from 0.90 to 0.10",
        "weights_of_step": 3,
    }
    assert (record["last"]["step"], record["updates"], record["budget"]["steps"]) == (3, 3, 5)
    final = load_file(tmp_path / "stopped" / "adapter" / "adapter_model.safetensors")
    third = load_file(tmp_path / "stopped" / "checkpoints" / "step-000003" / "weights.safetensors")
    fourth = load_file(tmp_path / "stopped" / "checkpoints" / "step-000004" / "weights.safetensors")
    assert not (tmp_path / "stopped" / "checkpoints" / "step-000005").exists()
    name = next(name for name in third if "lora_B" in name)
    stored = next(tensor for key, tensor in final.items() if key.endswith(name.replace(".default", "")))
    assert stored.equal(third[name]) and not stored.equal(fourth[name])
    seen.clear()
    assert run(tmp_path, "on", stop_on_collapse=False)["stopped"] is None
    seen.clear()
    with pytest.raises(UserError, match=r"step 5: training collapsed \(.*\) before the first checkpoint; lower"):
        run(tmp_path, "early", save_steps=8)


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    record = run(tmp_path, "healthy", learning_rate=1e-5)
    assert record["stopped"] is None and record["last"]["step"] == 8
    assert 0 < record["last"]["distinct_3"] <= 1


# the development split: measured before training and at every save

INSTRUCTION = "Answer in one short sentence."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, and dev.jsonl: questions whose gold answer is what the untrained model says, sampling greedily."""
    folder = tmp_path_factory.mktemp("development")
    make_manifest(folder, answer_parser=UNCUT)
    loaded = load_model(folder / "model")
    builder = PromptBuilder(loaded.tokenizer, PromptConfig(None, INSTRUCTION, "", None))
    texts = [f"{start} {word}?" for start in ("What is", "Who likes") for word in WORDS]
    questions = [Question(id=f"d{i}", domain="dev", question=text) for i, text in enumerate(texts)]
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    rollouts = {
        group[0].question_id: group[0]
        for group in sample(loaded, prompts, SamplingConfig(num_generations=1, temperature=0.0, max_new_tokens=4))
    }
    reader = AnswerReader(answer_parser=UNCUT)
    answers = {q: reader.extract(rollouts[q.id].text, rollouts[q.id].finish_reason, q) for q in questions}
    records = [{"id": q.id, "question": q.question, "answer": answer} for q, answer in answers.items() if answer]
    assert len(records) >= 4
    (folder / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run_watched(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 6, "questions_per_step": 3, "lora_r": 4, "learning_rate": 5e-4}
    options |= {"warmup_steps": 0, "keep_truncated": True, "save_steps": 1, "quiet": True, "temperature": 0.0}
    options |= {"dev_questions": str(folder / "dev.jsonl"), "dev_generations": 1, "stop_on_collapse": False}
    main(TrainConfig(manifest=folder / "manifest", out=out, **{**options, **changes}))
    return json.loads((out / "train.json").read_text())


def measured(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "development.jsonl").read_text().splitlines()]


def test_a_falling_majority_stops_the_run(folder: Path, tmp_path: Path) -> None:
    stopped = run_watched(folder, tmp_path / "run", steps=20, keep_step="last")["stopped"]
    values = measured(tmp_path / "run")
    assert values[0]["step"] == 0 and values[0]["maj_at_k"] == 1.0
    assert values[-1]["step"] == stopped["step"] > 1
    assert stopped["weights_of_step"] == stopped["step"] - 1
    n, now = len(values[0]["by_question"]), values[-1]["maj_at_k"]
    assert stopped["reason"] == f"maj@1 on {n} development questions fell from 1.000 to {now:.3f}"


def test_a_run_that_holds_its_majority_goes_on(folder: Path, tmp_path: Path) -> None:
    assert run_watched(folder, tmp_path / "run", learning_rate=1e-9, steps=3, save_steps=2)["stopped"] is None
    assert [(entry["step"], entry["maj_at_k"]) for entry in measured(tmp_path / "run")] == [
        (0, 1.0),
        (2, 1.0),
        (3, 1.0),
    ]


def test_a_killed_run_measures_again_and_stops_at_the_same_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_watched(folder, tmp_path / "whole", steps=20)["stopped"]
    measure = Development.measure

    def killed(self: Development, step: int) -> None:
        measure(self, step)
        if step == whole["step"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Development, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run_watched(folder, tmp_path / "killed", steps=20)
    monkeypatch.undo()
    assert run_watched(folder, tmp_path / "killed", steps=20, resume=True)["stopped"] == whole
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert result_bytes(tmp_path / "killed" / file) == result_bytes(tmp_path / "whole" / file)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """maj@K that the development split is made to have after a step; elsewhere, what is measured."""
    values: dict[int, float] = {}
    measure = Development.measure

    def at_will(self: Development, step: int) -> None:
        measure(self, step)
        if step in values:
            self._measured[-1]["maj_at_k"] = values[step]
            write_atomic(self._path, "".join(json.dumps(entry) + "\n" for entry in self._measured))

    monkeypatch.setattr(Development, "measure", at_will)
    return values


def steps_kept(out: Path) -> list[str]:
    return sorted(path.name[-1] for path in (out / "checkpoints").glob("step-*"))


def assert_weights(out: Path, step: int) -> None:
    """The adapter is the checkpoint of that step, as are the record and the card."""
    final = load_file(out / "adapter" / "adapter_model.safetensors")
    stored = load_file(out / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")
    for name, tensor in stored.items():
        assert next(own for key, own in final.items() if key.endswith(name.replace(".default", ""))).equal(tensor)
    record = json.loads((out / "train.json").read_text())
    assert record["kept"]["step"] == record["last"]["step"] == record["updates"] == step
    card = (out / "adapter" / "README.md").read_text()
    assert f"The weights are those of step {step}: {record['kept']['reason']}." in card
    assert {text for text, problem in check_training(out, Found()) if problem} == set()


@pytest.mark.parametrize(
    ("values", "best"),
    [({1: 0.2, 2: 0.9, 3: 0.5, 4: 0.3, 5: 0.4, 6: 0.4}, 2), ({1: 0.9, 2: 0.2, 3: 0.9, 4: 0.1, 5: 0.3, 6: 0.1}, 3)],
    ids=["one", "the later of two"],
)
def test_the_best_step_on_the_development_split_is_kept(
    folder: Path, tmp_path: Path, scripted: dict[int, float], values: dict[int, float], best: int
) -> None:
    """Its checkpoint outlives newer ones, and a run killed after it comes to the same result."""
    scripted |= values
    options: dict[str, Any] = {"learning_rate": 1e-6, "keep_checkpoints": 1}
    record = run_watched(folder, tmp_path / "run", **options)
    assert record["stopped"] is None and steps_kept(tmp_path / "run") == [str(best), "6"]
    n = len(measured(tmp_path / "run")[0]["by_question"])
    reason = f"the best maj@1 on {n} development questions, 0.900 (1.000 before training)"
    assert record["kept"] == {"step": best, "reason": reason} and record["budget"]["steps"] == 6
    assert_weights(tmp_path / "run", best)
    with interrupted_at(5), pytest.raises(KeyboardInterrupt):
        run_watched(folder, tmp_path / "killed", **options)
    run_watched(folder, tmp_path / "killed", **options, resume=True)
    assert_weights(tmp_path / "killed", best)
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors", "development.jsonl"):
        assert result_bytes(tmp_path / "killed" / file) == result_bytes(tmp_path / "run" / file)


def test_the_last_step_is_kept_when_asked_for(folder: Path, tmp_path: Path, scripted: dict[int, float]) -> None:
    scripted |= {1: 0.9, 2: 0.5, 3: 0.4}
    options: dict[str, Any] = {"learning_rate": 1e-6, "keep_checkpoints": 1, "steps": 3}
    record = run_watched(folder, tmp_path / "run", **options, keep_step="last")
    assert record["kept"] == {"step": 3, "reason": "the last step"} and steps_kept(tmp_path / "run") == ["3"]
    assert_weights(tmp_path / "run", 3)


def test_a_stopped_run_keeps_its_best_step_before_the_stop(folder: Path, tmp_path: Path) -> None:
    """Untouched measurements: maj@1 falls from 1 as training goes on."""
    record = run_watched(folder, tmp_path / "run", steps=20, keep_checkpoints=1)
    stopped, values = record["stopped"], measured(tmp_path / "run")
    saved = {entry["step"]: entry["maj_at_k"] for entry in values if 0 < entry["step"] < stopped["step"]}
    best = max(saved, key=lambda step: (saved[step], step))
    assert stopped["weights_of_step"] == record["kept"]["step"] == best
    assert_weights(tmp_path / "run", best)


def test_a_longer_run_finds_the_best_step_of_the_shorter_one(
    folder: Path, tmp_path: Path, scripted: dict[int, float]
) -> None:
    """The shorter run ends between two saves with a better step, which the longer one does not have."""
    scripted |= {2: 0.8, 4: 0.5, 5: 0.9, 6: 0.1, 8: 0.3}
    options: dict[str, Any] = {"learning_rate": 1e-6, "keep_checkpoints": 1, "save_steps": 2}
    assert run_watched(folder, tmp_path / "run", **options, steps=5)["kept"]["step"] == 5
    assert run_watched(folder, tmp_path / "run", **options, steps=8, resume=True)["kept"]["step"] == 2
    assert_weights(tmp_path / "run", 2)


def test_a_damaged_best_checkpoint_is_named(folder: Path, tmp_path: Path, scripted: dict[int, float]) -> None:
    scripted |= {1: 0.9, 2: 0.5, 3: 0.4}
    options: dict[str, Any] = {"learning_rate": 1e-6, "steps": 3}
    run_watched(folder, tmp_path / "run", **options)
    (tmp_path / "run" / "train.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-000001" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000001: damaged \(sha256 differs\); remove it and --resume"):
        run_watched(folder, tmp_path / "run", **options, resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")
    assert run_watched(folder, tmp_path / "run", **options, resume=True)["kept"]["step"] == 2


def test_questions_without_gold_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"id": "x", "question": "Why?"}\n{"id": "y", "question": "Who?"}\n')
    with pytest.raises(UserError, match='question "x" has no answer'):
        run_watched(folder, tmp_path / "run", dev_questions=str(unlabelled))
