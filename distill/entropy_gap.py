"""The entropy gap: how much the context lowers the teacher's entropy, token by token, and whether it predicts its gain.

The paper's fourth finding relates the gap to what distillation gains. Here the gap is the student's minus the teacher's
next-token entropy on the student's own completions, and the gain is what the context adds to the teacher's accuracy:
both are measured without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from distill.losses import Divergence, chunked_divergence
from distill.tasks import manifest_tasks
from neurosig.manifest import Manifest
from neurosig.models.completion_hidden import completion_hidden, head_weight, logit_softcap
from neurosig.models.load import LoadedModel
from neurosig.questions.load import Question
from neurosig.runtime.errors import UserError
from neurosig.sampling.sampler import Prompt, sample

ROWS = 32
"""Completions per forward pass."""


@dataclass(frozen=True, slots=True)
class TokenEntropies:
    """Next-token entropies along one completion, in nats, at temperature 1.

    Attributes:
        question_id: The question it answers.
        rollout_id: Its index among the question's rollouts.
        completion_ids: Its tokens, the end of sequence included.
        student: Entropy of the student's prediction of each token.
        teacher: The same of the teacher's, which sees the context.
    """

    question_id: str
    rollout_id: int
    completion_ids: tuple[int, ...]
    student: Float[np.ndarray, " tokens"]
    teacher: Float[np.ndarray, " tokens"]

    @property
    def gap(self) -> float:
        """Mean over the tokens of the student's entropy minus the teacher's."""
        return float((self.student - self.teacher).mean())


@torch.no_grad()
def token_entropies(manifest: Manifest, loaded: LoadedModel, *, rollouts: int | None = None) -> list[TokenEntropies]:
    """Entropies of student and teacher on the manifest's own rollouts of its selected questions.

    Args:
        manifest: Its contexts are the teacher's.
        loaded: The model of both.
        rollouts: Use the first N of each question; all by default.

    Raises:
        UserError: Nothing is selected, or a prompt does not fit the model.
    """
    model = loaded.model
    head = head_weight(model)
    divergence = Divergence(softcap=logit_softcap(model))
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=manifest.header.options["max_new_tokens"])
    answers = {row.question_id: len(row.answers) for row in manifest.rows}
    pairs = [
        (task, manifest.rollouts[task.id, index])
        for task in tasks
        for index in range(min(rollouts or answers[task.id], answers[task.id]))
    ]
    entropies = []
    for start in range(0, len(pairs), ROWS):
        batch = pairs[start : start + ROWS]
        completions = [rollout.completion_ids for _, rollout in batch]
        teacher_hidden = completion_hidden(model, [task.teacher_prompt for task, _ in batch], completions)
        student_hidden = completion_hidden(model, [task.student_prompt for task, _ in batch], completions)
        output = chunked_divergence(student_hidden, teacher_hidden, head, head, divergence)
        lengths = [len(ids) for ids in completions]
        sides = (values.cpu().split(lengths) for values in (output.student_entropy, output.teacher_entropy))
        for (task, rollout), *parts in zip(batch, *sides, strict=True):
            student, teacher = (part.double().numpy() for part in parts)
            entropies.append(TokenEntropies(task.id, rollout.rollout_id, rollout.completion_ids, student, teacher))
    return entropies


def fresh_accuracy(
    manifest: Manifest,
    loaded: LoadedModel,
    gold: Mapping[str, Question],
    *,
    teacher: bool,
    num_generations: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Share of right answers to each selected question that has a gold answer, in samples of their own.

    The manifest's rollouts flatter the student, because its questions were selected for their agreement; student and
    teacher are compared on new samples, drawn as the manifest's were and with the same random numbers for both.

    Args:
        manifest: Its selected questions are sampled.
        loaded: The model.
        gold: Questions with gold answers, by id.
        teacher: Whether the prompt holds the context.
        num_generations: Samples per question; by default as many as the manifest's.
        seed: Seed of these samples.

    Raises:
        UserError: No selected question has a gold answer.
    """
    options = manifest.header.options
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=options["max_new_tokens"])
    tasks = [task for task in tasks if task.id in gold]
    if not tasks:
        raise UserError(f"manifest {manifest.folder}: no selected question has a gold answer to measure a gain by")
    k = num_generations or manifest.k
    sampling = manifest.header.sampling_config(num_generations=k, seed=seed)
    prompts = [Prompt(task.id, task.teacher_prompt if teacher else task.student_prompt) for task in tasks]
    right, reader = {}, manifest.header.answer_reader()
    for group in sample(loaded, prompts, sampling, salt="entropy gap"):
        question = gold[group[0].question_id]
        right[question.id] = float(np.mean(reader.grade(reader.read(group, question), group, question).strict))
    return {task.id: right[task.id] for task in tasks}
