"""Thinking models in training, evaluation and comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import distill.config
import distill.evaluate
import neurosig.export
import neurosig.intervene.__main__
from distill.compare import CompareConfig
from distill.compare import main as compare
from distill.evaluate import EvaluateConfig
from distill.evaluate import main as evaluate
from distill.tasks import manifest_tasks
from neurosig.export import main as export
from neurosig.manifest import Manifest, read_manifest
from neurosig.models.load import load_model
from neurosig.runtime.errors import UserError
from neurosig.verify.recomputed import aggregates, difference
from tests.support.flow import export_config, write_questions
from tests.support.runs import train
from tests.support.thinking import DROPS, KEEPS, OPENS, write_world


def manifest_of(folder: Path, out: str = "manifest", **options: Any) -> Manifest:
    export(export_config(folder, folder / "model", folder / "questions.jsonl", out, **options))
    return read_manifest(folder / out)


@pytest.mark.parametrize("template", [KEEPS, DROPS, OPENS])
@pytest.mark.parametrize("thoughts", [False, True])
def test_the_teacher_sees_what_the_manifest_says(tmp_path: Path, template: str, thoughts: bool) -> None:
    """The text of each demonstration, with its thought or only the answer after it; the student sees neither."""
    given = write_world(tmp_path, template, opens=template == OPENS)
    manifest = manifest_of(tmp_path, **given, demonstration_thoughts=thoughts, num_demonstrations=1)
    loaded = load_model(tmp_path / "model")
    tasks = {task.id: task for task in manifest_tasks(manifest, loaded, max_new_tokens=8)}
    assert len(tasks) == 5
    for row in manifest.selected:
        student, teacher = (
            loaded.tokenizer.decode(list(ids))
            for ids in (tasks[row.question_id].student_prompt, tasks[row.question_id].teacher_prompt)
        )
        (item,) = row.context
        text = manifest.rollouts[item.question_id, item.rollout_id].text.strip()
        thought, _, answer = text.partition("</think>")
        shown = f"<think>\n{text.removeprefix('<think>').lstrip()}" if thoughts else answer.strip()
        assert f"<|im_start|>assistant\n{shown}<|im_end|>\n" in teacher
        assert thought.removeprefix("<think>").strip() not in student and "Answer: yes" not in student
        assert student.endswith("<think>\n" if template == OPENS else "assistant\n")


def test_an_unclosed_thought_is_counted_in_training_and_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The template opens it in the prompt; a random model never closes it. The evaluation thinks as the student did."""
    given = write_world(tmp_path, OPENS, opens=True)
    manifest = manifest_of(tmp_path, **given, student_thinking=True)
    caplog.clear()
    with caplog.at_level("INFO", logger="neurosig"):
        (step, _), _ = train(tmp_path, manifest.folder, steps=2, max_new_tokens=6, keep_truncated=True)
    assert step["unclosed_rate"] == 1.0 and step["mean_answer_length"] == 0.0
    assert step["mean_thought_length"] == step["mean_length"] > 0 and step["truncated_rate"] == 1 - step["eos_rate"]
    assert step["loss"] > 0
    warnings = [record for record in caplog.records if "cut off at --max-new-tokens" in record.getMessage()]
    assert [record.getMessage().partition(":")[0] for record in warnings] == ["step 1"]  # once per run

    options: Any = {"model": str(tmp_path / "model"), "questions": (str(tmp_path / "questions.jsonl"),)}
    options |= {"max_new_tokens": 6, "num_generations": 2, "quiet": True}
    for name, own in (("base", {"eval_thinking": True}), ("trained", {"adapter": tmp_path / "run" / "adapter"})):
        evaluate(EvaluateConfig(out=tmp_path / name, **options, **own))
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert summary["config"]["eval_thinking"] is True
    (block,) = summary["domains"].values()
    assert (block["unclosed_rate"], block["mean_answer_length"], block["unparsed_rate"]) == (1.0, 0.0, 1.0)
    assert block["mean_thought_length"] == block["mean_length"]
    assert difference(aggregates(rows_of(tmp_path / "trained"), seed=0), block) == ""
    compare(CompareConfig(base=tmp_path / "base", trained=tmp_path / "trained", out=tmp_path / "report", resamples=50))
    table = (tmp_path / "report" / "table.md").read_text()
    assert (
        "| cut off | change | tokens per answer | change | unclosed thoughts | change | tokens per thought |" in table
    )
    write_questions(tmp_path / "questions.jsonl", choices=["yes", "no"], answer="A")
    with pytest.raises(UserError, match="--eval-thinking False"):
        evaluate(EvaluateConfig(out=tmp_path / "scored", scoring="loglikelihood", **options))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()


def test_the_thinking_preset_samples_as_the_models_card_says() -> None:
    """In every command that samples; training takes temperature and limit from the manifest."""
    name = "qwen3-4b-thinking"
    for module, mode in (
        (neurosig.export, "student_thinking"),
        (distill.evaluate, "eval_thinking"),
        (neurosig.intervene.__main__, "eval_thinking"),
    ):
        preset = module.PRESETS[name]
        assert (preset["temperature"], preset["top_p"], preset["top_k"], preset[mode]) == (0.6, 0.95, 20, True)
        assert preset["max_new_tokens"] >= 4096 and module.PRESETS["qwen3-4b"][mode] is False
    assert distill.config.PRESETS[name]["gradient_checkpointing"] and name in distill.config.BASIS
