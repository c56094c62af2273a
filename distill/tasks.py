"""A manifest's tasks, one per selected question, in a seeded order, and the sampling they are answered with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from neurosig.manifest import Header, Manifest, QuestionRow, read_manifest
from neurosig.manifest.combined import Combined, combine
from neurosig.models.load import LoadedModel, load_model
from neurosig.models.run_folder import find_adapter
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import (
    PRIVILEGED_WORDING,
    Demonstration,
    PromptBuilder,
    check_same_stream,
    privileged_question,
)
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout, write_rollouts

if TYPE_CHECKING:
    from distill.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """A selected question: the prompts of student and teacher, and its rollouts' weight in the loss.

    A replayed prompt is not one of the manifest's questions: its teacher sees the same prompt, which keeps the student
    close to the model before training.
    """

    id: str
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    weight: float = 1.0
    replay: bool = False


def load_student(config: TrainConfig, manifest: Manifest, device: str | None) -> LoadedModel:
    """Load the manifest's model, or the one of ``--model``; under ``--full`` with the manifest's adapter merged.

    Raises:
        UserError: It did not make the manifest, and ``--allow-model-mismatch`` is off (else a warning); GRPO's KL
            reference would be the model without the manifest's adapter;
            ``--answer-parser`` is not the manifest's; or see `neurosig.models.load.load_model`.
    """
    header, start = manifest.header, manifest.header.adapter(config.adapter)
    if start is not None and not config.full and config.method in ("ttrl", "intuitor"):
        raise UserError(
            f"--method {config.method}: its KL reference is the model without an adapter, but {start} made the "
            "manifest; merge it (python -m distill.merge) and export again, or train with --full"
        )
    if config.answer_parser is not None:
        header.answer_reader(config.answer_parser)
    loaded = load_model(
        config.model or header.model["id"],
        dtype="float32" if config.full else config.dtype,  # under --full the master weights
        device=device,
        attn_implementation=config.attn_implementation,
        template=header.options["template"],
        adapter=start if config.full else None,
    )
    if start is not None and not config.full:  # `distill.student.make_student` continues it
        loaded = replace(loaded, info=replace(loaded.info, adapter=sha256_file(find_adapter(start).file)))
    for difference in header.differences(loaded.info):
        message = f"the manifest was made by {header.model['id']}, not by {loaded.info.id}: {difference}"
        if not config.allow_model_mismatch:
            raise UserError(f"{message}; give the right --model, export again, or use --allow-model-mismatch")
        logger.warning("%s", message)
    return loaded


def training_tasks(config: TrainConfig, manifest: Manifest, loaded: LoadedModel, *, max_new_tokens: int) -> list[Task]:
    """The manifest's tasks and those of ``--replay``; for OPSA the questions alone, by `question_prompts`.

    Raises:
        UserError: See `manifest_tasks`, `replay_tasks` and `question_prompts`.
    """
    if config.method == "opsa":
        weights = {row.question_id: row.weight for row in manifest.rows}
        prompts = question_prompts(manifest, loaded, config, max_new_tokens=max_new_tokens)
        return [Task(name, prompt, prompt, weights[name]) for name, prompt in prompts.items() if weights[name]]
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=max_new_tokens)
    if config.replay is not None:
        tasks += replay_tasks(
            config.replay,
            manifest.header,
            loaded,
            weight=config.replay_weight,
            max_new_tokens=max_new_tokens,
            fields=config.fields,
        )
    return tasks


def manifest_tasks(manifest: Manifest, loaded: LoadedModel, *, max_new_tokens: int) -> list[Task]:
    """Prompts of every selected question whose weight is not 0; none is ever truncated.

    Raises:
        UserError: See `trained_rows` and `check_same_stream`; or a prompt and its completion do not fit the model.
    """
    configs = manifest.header.prompt_config(), manifest.header.teacher_prompt_config()
    student, teacher = (PromptBuilder(loaded.tokenizer, config) for config in configs)
    check_same_stream(student, teacher)
    by_id = {row.question_id: row.as_question() for row in manifest.rows}
    wording = manifest.header.options.get("privileged_wording", PRIVILEGED_WORDING)
    tasks = []
    for row in trained_rows(manifest):
        context = [
            Demonstration(by_id[item.question_id], manifest.rollouts[item.question_id, item.rollout_id].text)
            for item in row.context
        ]
        question = by_id[row.question_id]
        shown = privileged_question(question, teacher.config, wording)
        tasks.append(Task(question.id, student.student(question), teacher.teacher(shown, context), row.weight))
    return check_prompts(tasks, loaded, max_new_tokens)


def question_prompts(
    manifest: Manifest, loaded: LoadedModel, config: TrainConfig, *, max_new_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Student prompts of the questions to train on, by id, in the manifest's order.

    Raises:
        UserError: There is none; or a selected question's prompt and completion exceed the model's positions (with
            ``--questions-of all`` it is left out).
    """
    builder = PromptBuilder(loaded.tokenizer, manifest.header.prompt_config())
    prompts = {}
    for row in manifest.rows if config.questions_of == "all" else trained_rows(manifest):
        prompt = builder.student(row.as_question())
        if len(prompt) + max_new_tokens <= loaded.max_length:
            prompts[row.question_id] = prompt
        elif row.selected:
            raise UserError(
                f'question "{row.question_id}": the student prompt of {len(prompt)} tokens and '
                f"{max_new_tokens} new tokens exceed the model's {loaded.max_length} positions; lower "
                "--max-new-tokens"
            )
    if not prompts:
        raise UserError(f"manifest {manifest.folder}: 0 of {len(manifest.rows)} questions selected")
    return prompts


def read_manifests(config: TrainConfig) -> Combined:
    """All questions of ``--manifest``.

    Raises:
        UserError: See `neurosig.manifest.read_manifest`, `neurosig.manifest.combined.combine` and
            `check_majority_context`.
    """
    manifests = [read_manifest(folder) for folder in config.manifests]
    for manifest in manifests if config.method == "u-opsd" else ():
        check_majority_context(manifest)
    given = [name for name in ("temperature", "max_new_tokens") if getattr(config, name) is not None]
    return combine(manifests, config.manifest_weights, free=given)


def trained_rows(manifest: Manifest) -> list[QuestionRow]:
    """The selected questions whose weight is not 0.

    Raises:
        UserError: There is none.
    """
    place, selected = f"manifest {manifest.folder}", manifest.selected
    if not selected:
        counts = ", ".join(f"{n} {reason}" for reason, n in manifest.header.counts.items() if reason != "questions")
        raise UserError(f"{place}: 0 of {len(manifest.rows)} questions selected ({counts})")
    if not any(row.weight for row in selected):
        raise UserError(
            f"{place}: all {len(selected)} selected questions have weight 0; export again with other weights"
        )
    return [row for row in selected if row.weight]


def replay_tasks(
    source: str, header: Header, loaded: LoadedModel, *, weight: float, max_new_tokens: int, fields: Sequence[str] = ()
) -> list[Task]:
    """General prompts, without the manifest's instruction line, that the student should keep answering as before.

    Raises:
        UserError: The source cannot be read, or a prompt and its completion exceed the model's positions.
    """
    wording = replace(header.prompt_config(), instruction="", choice_instruction="")
    builder = PromptBuilder(loaded.tokenizer, wording)
    prompts = {question.id: builder.student(question) for question in load_questions(source, fields=fields)}
    tasks = [Task(f"replay:{name}", prompt, prompt, weight, replay=True) for name, prompt in prompts.items()]
    return check_prompts(tasks, loaded, max_new_tokens)


def sampling_config(config: TrainConfig, manifest: Manifest) -> SamplingConfig:
    """How the student samples: as the manifest's rollouts were, unless an option says otherwise."""
    options = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    changes = {name: value for name, value in options.items() if value is not None}
    return manifest.header.sampling_config(num_generations=config.num_generations, seed=config.seed, **changes)


def check_prompts(tasks: Sequence[Task], loaded: LoadedModel, max_new_tokens: int) -> list[Task]:
    """The tasks, all of whose prompts leave room for the completion.

    Raises:
        UserError: One does not.
    """
    for task in tasks:
        for who, prompt in (("student", task.student_prompt), ("teacher", task.teacher_prompt)):
            if len(prompt) + max_new_tokens > loaded.max_length:
                raise UserError(
                    f'question "{task.id}": the {who} prompt of {len(prompt)} tokens and {max_new_tokens} new tokens '
                    f"exceed the {loaded.max_length} positions of {loaded.info.id}; lower --max-new-tokens or export "
                    "with fewer --num-demonstrations"
                )
    return list(tasks)


def check_majority_context(manifest: Manifest) -> None:
    """Check that the teacher sees each question's own shortest majority rollout, as U-OPSD needs.

    Raises:
        UserError: The manifest has other contexts.
    """
    policy = manifest.header.options.get("context_policy")
    if any(row.privileged_context is not None for row in manifest.selected):
        policy = "a privileged_context from the question file"
    if policy != "majority_solution":
        raise UserError(
            f"manifest {manifest.folder}: --method u-opsd shows each question its own majority solution, but the "
            f"contexts are {policy}; export again with --context-policy majority_solution"
        )


def is_in_loss(config: TrainConfig, rollout: Rollout, left_out: Collection[tuple[str, int]]) -> bool:
    """Whether a rollout is learned from: neither cut off, nor skipped whole, nor in ``left_out``."""
    return (
        (config.keep_truncated or rollout.finish_reason == "stop")
        and len(rollout.completion_ids) > config.skip_first
        and (rollout.question_id, rollout.rollout_id) not in left_out
    )


def keep_rollouts(
    config: TrainConfig,
    manifest: Manifest,
    step: int,
    rollouts: Sequence[Rollout],
    left_out: Collection[tuple[str, int]],
) -> None:
    """Write the rollouts of a step that ``--keep-rollouts`` names; a resumed run replaces its file with the same bytes.

    Replayed prompts have no answer. ``left_out`` has the (question id, rollout id) of rollouts that leave the loss,
    besides those that are cut off or skipped.
    """
    if not config.keep_rollouts or step % config.keep_rollouts:
        return
    rows, reader = {row.question_id: row for row in manifest.rows}, manifest.header.answer_reader()
    kept = []
    for rollout in rollouts:
        row = rows.get(rollout.question_id)
        answer = reader.extract(rollout.text, rollout.finish_reason, row.as_question()) if row is not None else None
        kept.append((rollout, answer, is_in_loss(config, rollout, left_out)))
    write_rollouts(config.out / "rollouts" / f"step-{step:06d}.parquet", step, kept)


def agreeing(manifest: Manifest, rollouts: Sequence[Rollout]) -> set[tuple[str, int]]:
    """(question id, rollout id) of the rollouts whose answer is their question's pseudo-label.

    Replayed prompts and rollouts without an answer never agree.
    """
    rows, reader = {row.question_id: row for row in manifest.rows}, manifest.header.answer_reader()
    return {
        (rollout.question_id, rollout.rollout_id)
        for rollout in rollouts
        if (row := rows.get(rollout.question_id)) is not None
        and reader.agrees(rollout, row.as_question(), row.answers, row.pseudo_label)
    }


def tasks_of_step(config: TrainConfig, tasks: Sequence[Task], step: int) -> dict[str, Task]:
    """Tasks of a step by id, by `questions_of_step`: the manifest's, then the replayed ones."""
    chosen = {}
    for replay, per_step in ((False, config.questions_per_step), (True, config.replay_per_step)):
        pool = [task for task in tasks if task.replay == replay]
        for index in questions_of_step(len(pool), step, per_step=per_step, seed=config.seed):
            chosen[pool[index].id] = pool[index]
    return chosen


def question_ids(config: TrainConfig, tasks: Sequence[Task], steps: int) -> list[list[str]]:
    """The questions of the manifest in each of the first ``steps`` steps."""
    batches = (tasks_of_step(config, tasks, step) for step in range(1, steps + 1))
    return [[name for name, task in batch.items() if not task.replay] for batch in batches]


def questions_of_step(n: int, step: int, *, per_step: int, seed: int) -> list[int]:
    """The ``min(per_step, n)`` distinct questions of a step, a function of the step alone.

    Epochs of seeded permutations are cut into steps. Where an epoch begins inside a step, what that step takes from the
    epoch before moves back in the new order. After any step, no question has been seen more than once more than
    another.
    """
    size = min(per_step, n)
    if size == n:
        return [*range(n)]
    if 2 * size > n + 1:  # too few questions to move back: deal out those that the step leaves out
        left_out = questions_of_step(n, step, per_step=n - size, seed=seed)
        return [index for index in range(n) if index not in left_out]

    def permutation(epoch: int) -> list[int]:
        return np.random.default_rng([seed, epoch]).permutation(n).tolist()

    def order(epoch: int) -> list[int]:
        before = epoch * n % size  # questions that the step over the epoch's start takes from the one before
        taken = permutation(epoch - 1)[n - before :] if before else []
        own, movable = permutation(epoch), n - size + 1  # the last ones stay, so that no order depends on another
        return sorted(own[:movable], key=taken.__contains__) + own[movable:]

    first = (step - 1) * size
    orders = {epoch: order(epoch) for epoch in {first // n, (first + size - 1) // n}}
    return [orders[place // n][place % n] for place in range(first, first + size)]
