"""A manifest's tasks, one per selected question, in a seeded order, and the sampling they are answered with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neurosig.manifest import Header, Manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.questions.answers import extract_answer
from neurosig.questions.load import load_questions
from neurosig.questions.prompts import Demonstration, PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout

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
    """Load the manifest's model, or the one of ``--model``, and check it against the manifest.

    Raises:
        UserError: See `neurosig.models.load.load_model` and `check_model`.
    """
    loaded = load_model(
        config.model or manifest.header.model["id"],
        dtype=config.dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        template=manifest.header.options["template"],
    )
    check_model(manifest.header, loaded, allow_mismatch=config.allow_model_mismatch)
    return loaded


def check_model(header: Header, loaded: LoadedModel, *, allow_mismatch: bool) -> None:
    """Check that the model made the manifest: same weights, tokenizer and chat template.

    Raises:
        UserError: It did not, and ``allow_mismatch`` is off (else a warning).
    """
    info = loaded.info
    for what, made, here in (
        ("weights", header.model["weights"], info.weights),
        ("tokenizer", header.tokenizer["sha256"], info.tokenizer_sha256),
        ("chat template", header.tokenizer["chat_template_sha256"], info.chat_template_sha256),
    ):
        if made == here:
            continue
        message = (
            f"the manifest was made by {header.model['id']}, not by {info.id}: "
            f"{what} {_short(made)} against {_short(here)}"
        )
        if not allow_mismatch:
            raise UserError(f"{message}; give the right --model, export again, or use --allow-model-mismatch")
        logger.warning("%s", message)


def _short(digest: Mapping[str, str] | str | None) -> str:
    return str(next(iter(digest.values()), None) if isinstance(digest, Mapping) else digest)[:12]


def training_tasks(config: TrainConfig, manifest: Manifest, loaded: LoadedModel, *, max_new_tokens: int) -> list[Task]:
    """The manifest's tasks and those of ``--replay``.

    Raises:
        UserError: See `manifest_tasks` and `replay_tasks`.
    """
    tasks = manifest_tasks(manifest, loaded, max_new_tokens=max_new_tokens)
    if config.replay is not None:
        tasks += replay_tasks(
            config.replay, manifest.header, loaded, weight=config.replay_weight, max_new_tokens=max_new_tokens
        )
    return tasks


def manifest_tasks(manifest: Manifest, loaded: LoadedModel, *, max_new_tokens: int) -> list[Task]:
    """Prompts of every selected question; none is ever truncated.

    Raises:
        UserError: Nothing is selected, or a prompt and its completion exceed the model's positions.
    """
    builder = prompt_builder(manifest.header, loaded)
    selected = manifest.selected
    if not selected:
        counts = ", ".join(f"{n} {reason}" for reason, n in manifest.header.counts.items() if reason != "questions")
        raise UserError(f"manifest {manifest.folder}: 0 of {len(manifest.rows)} questions selected ({counts})")
    by_id = {row.question_id: row.as_question() for row in manifest.rows}
    tasks = []
    for row in selected:
        context = [
            Demonstration(by_id[item.question_id], manifest.rollouts[item.question_id, item.rollout_id].text)
            for item in row.context
        ]
        task = Task(
            row.question_id,
            builder.student(by_id[row.question_id]),
            builder.teacher(by_id[row.question_id], context),
            row.weight,
        )
        _check_length(task, loaded, max_new_tokens)
        tasks.append(task)
    return tasks


def replay_tasks(source: str, header: Header, loaded: LoadedModel, *, weight: float, max_new_tokens: int) -> list[Task]:
    """General prompts, without the manifest's instruction line, that the student should keep answering as before.

    Raises:
        UserError: The source cannot be read, or a prompt and its completion exceed the model's positions.
    """
    builder = PromptBuilder(
        loaded.tokenizer, PromptConfig(header.options["system"], "", "", header.options["enable_thinking"])
    )
    tasks = []
    for question in load_questions(source):
        prompt = builder.student(question)
        task = Task(f"replay:{question.id}", prompt, prompt, weight, replay=True)
        _check_length(task, loaded, max_new_tokens)
        tasks.append(task)
    return tasks


def sampling_config(config: TrainConfig, manifest: Manifest) -> SamplingConfig:
    """How the student samples: as the manifest's rollouts were, unless an option says otherwise."""
    options = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    changes = {name: value for name, value in options.items() if value is not None}
    return manifest_sampling(manifest.header, num_generations=config.num_generations, seed=config.seed, **changes)


def manifest_sampling(header: Header, *, num_generations: int, seed: int, **changes: Any) -> SamplingConfig:
    """The manifest's sampling options with another K and seed, and with ``changes``."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    options = {name: header.options[name] for name in names} | changes
    return SamplingConfig(num_generations=num_generations, seed=seed, **options)


def prompt_builder(header: Header, loaded: LoadedModel) -> PromptBuilder:
    """Prompts worded as the manifest's."""
    options = header.options
    wording = PromptConfig(
        options["system"], options["instruction"], options["choice_instruction"], options["enable_thinking"]
    )
    return PromptBuilder(loaded.tokenizer, wording)


def _check_length(task: Task, loaded: LoadedModel, max_new_tokens: int) -> None:
    for who, prompt in (("student", task.student_prompt), ("teacher", task.teacher_prompt)):
        if len(prompt) + max_new_tokens > loaded.max_length:
            raise UserError(
                f'question "{task.id}": the {who} prompt of {len(prompt)} tokens and {max_new_tokens} new tokens '
                f"exceed the model's {loaded.max_length} positions; lower --max-new-tokens or export with fewer "
                "--num-demonstrations"
            )


def check_majority_context(manifest: Manifest) -> None:
    """Check that the teacher sees each question's own shortest majority rollout, as U-OPSD needs.

    Raises:
        UserError: The manifest has other contexts.
    """
    policy = manifest.header.options.get("context_policy")
    if policy != "majority_solution":
        raise UserError(
            f"manifest {manifest.folder}: --method u-opsd shows each question its own majority solution, but the "
            f"contexts are {policy}; export again with --context-policy majority_solution"
        )


def agreeing(manifest: Manifest, rollouts: Sequence[Rollout]) -> set[tuple[str, int]]:
    """(question id, rollout id) of the rollouts whose answer is their question's pseudo-label.

    Replayed prompts and rollouts without an answer never agree.
    """
    rows = {row.question_id: row for row in manifest.rows}
    answer_format = manifest.header.options["answer_format"]
    return {
        (rollout.question_id, rollout.rollout_id)
        for rollout in rollouts
        if (row := rows.get(rollout.question_id)) is not None
        and row.pseudo_label is not None
        and extract_answer(rollout.text, row.as_question(), answer_format) == row.pseudo_label
    }


def tasks_of_step(config: TrainConfig, tasks: Sequence[Task], step: int) -> dict[str, Task]:
    """Tasks of a step by id, by `questions_of_step`: the manifest's, then the replayed ones."""
    chosen = {}
    for replay, per_step in ((False, config.questions_per_step), (True, config.replay_per_step)):
        pool = [task for task in tasks if task.replay == replay]
        for index in questions_of_step(len(pool), step, per_step=per_step, seed=config.seed):
            chosen[pool[index].id] = pool[index]
    return chosen


def questions_of_step(n: int, step: int, *, per_step: int, seed: int) -> list[int]:
    """Questions of a step: epochs of seeded permutations, cut into steps; a function of the step alone."""
    first = (step - 1) * per_step
    chosen: list[int] = []
    for position in range(first, first + min(per_step, n)):
        order = np.random.default_rng([seed, position // n]).permutation(n)
        if (index := int(order[position % n])) not in chosen:
            chosen.append(index)
    return chosen
