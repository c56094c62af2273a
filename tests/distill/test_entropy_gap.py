"""The entropy gap: per-token entropies of student and teacher, and gains on fresh samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.entropy_gap import fresh_accuracy, token_entropies
from distill.tasks import manifest_tasks
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.questions.load import Question, load_questions
from neurosig.runtime.errors import UserError
from tests.support.flow import make_manifest


def test_entropies_are_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    manifest = read_manifest(make_manifest(tmp_path))
    loaded = load_model(tmp_path / "model")
    found = token_entropies(manifest, loaded, rollouts=2)
    tasks = {task.id: task for task in manifest_tasks(manifest, loaded, max_new_tokens=4)}
    assert [(one.question_id, one.rollout_id) for one in found] == [(name, k) for name in tasks for k in (0, 1)]
    for one in found:
        for prompt, entropies in (
            (tasks[one.question_id].student_prompt, one.student),
            (tasks[one.question_id].teacher_prompt, one.teacher),
        ):
            with torch.no_grad():
                logits = loaded.model(torch.tensor([[*prompt, *one.completion_ids]])).logits[0]
            log_p = logits[len(prompt) - 1 : -1].double().log_softmax(dim=-1)
            expected = -(log_p.exp() * log_p).sum(dim=-1).numpy()
            np.testing.assert_allclose(entropies, expected, rtol=1e-4, atol=1e-5)
    assert any(abs(one.gap) > 1e-3 for one in found)


def test_without_a_context_there_is_no_gap(tmp_path: Path) -> None:
    manifest = read_manifest(make_manifest(tmp_path, context_policy="none"))
    for one in token_entropies(manifest, load_model(tmp_path / "model")):
        np.testing.assert_allclose(one.student, one.teacher, atol=1e-5)
        assert one.gap == pytest.approx(0, abs=1e-5)


def test_student_and_teacher_get_the_same_random_numbers(tmp_path: Path) -> None:
    """Without a context their samples are the same, so their accuracies are too; a context changes the samples."""
    loaded_gold = {}
    manifest = read_manifest(make_manifest(tmp_path, context_policy="none"))
    loaded = load_model(tmp_path / "model")
    for question in load_questions(str(tmp_path / "questions.jsonl")):
        text = manifest.rollouts[question.id, 0].text
        loaded_gold[question.id] = Question(question.id, "colour", question.question, None, answer=text or "x")
    both = [fresh_accuracy(manifest, loaded, loaded_gold, teacher=who, num_generations=4) for who in (True, False)]
    assert both[0] == both[1] and list(both[0]) == [row.question_id for row in manifest.selected]
    with pytest.raises(UserError, match="no selected question has a gold answer"):
        fresh_accuracy(manifest, loaded, {}, teacher=True)
