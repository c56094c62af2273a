"""The second stage of an export: what the teacher answers with each question's context, and what that does to it.

For the questions that votes and rollouts leave, the contexts are chosen first; then the teacher samples M completions
with its context, which are traced as the student's are. Scores that read them see what a context does before anything
is trained on it (`neurosig.hallucination.context_scores`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from neurosig.hallucination.belief import AnswerState, Belief, certainty, mean_belief, votes_belief
from neurosig.hallucination.context_scores import TeacherSignals
from neurosig.hallucination.scores import QuestionSignals
from neurosig.models.completion_hidden import completion_entropies
from neurosig.models.prefix import Prefix, run_prompts
from neurosig.neurons.answer_states import AnswerStates, answer_states, possible_answers
from neurosig.neurons.signals_file import load_shards, trace_to_shards
from neurosig.neurons.tracer import NeuronTracer, pack_rows
from neurosig.questions.prompts import Demonstration, Message, PromptBuilder, privileged_question
from neurosig.questions.vote import merge_answers
from neurosig.runtime.cli import PhaseTimer, progress
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from neurosig.runtime.ranks import Ranks
from neurosig.sampling.dealing import sampled_together
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.stages.positions import all_traced_at, read_positions

if TYPE_CHECKING:
    from neurosig.export_config import ExportConfig
    from neurosig.manifest import DemonstrationRecord
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.contributions import ActiveSets
    from neurosig.questions.load import Question
    from neurosig.questions.reader import AnswerReader
    from neurosig.stages.first import FirstStage

FOLDER = "teacher"
"""Folder of its unfinished work, in the export's."""


@dataclass(frozen=True, slots=True)
class TeacherRun:
    """Prompts, completions and active sets of the teacher.

    Attributes:
        prompts: Question id -> the teacher's prompt.
        groups: Question id -> its M completions.
        sets: Active sets of all of them, in this order.
        note: See `neurosig.stages.positions.read_positions`.
    """

    prompts: Mapping[str, Prompt]
    groups: Mapping[str, Sequence[Rollout]]
    sets: ActiveSets
    note: str


def sample_teacher(
    config: ExportConfig,
    loaded: LoadedModel,
    reader: AnswerReader,
    questions: Sequence[Question],
    first: FirstStage | None,
    contexts: Mapping[str, Sequence[DemonstrationRecord]] | None,
    work: Path,
    timer: PhaseTimer,
    ranks: Ranks,
) -> TeacherRun:
    """Sample and trace the teacher's completions, resumed from ``work`` after an interruption.

    Args:
        config: The export's options.
        loaded: The model.
        reader: How answers are parsed.
        questions: The export's questions.
        first: The first stage, whose rollouts the demonstrations show; on the main process only.
        contexts: Question id -> demonstrations, of the questions to ask; likewise.
        work: The export's folder of unfinished work.
        timer: Its phases ``sample`` and ``trace``.
        ranks: The processes, all of which must call this.

    Raises:
        UserError: A prompt leaves no room for a completion.
    """
    prompts, messages = ranks.on_main(lambda: _teacher_prompts(config, loaded, first, contexts))
    folder = work / FOLDER
    with ranks.together():
        folder.mkdir(exist_ok=True)
    thinking = config.student_thinking if config.teacher_thinking is None else config.teacher_thinking
    asked = replace(config, num_generations=config.teacher_rollouts, student_thinking=thinking)
    key = {
        "model": loaded.info.as_dict(),
        "prompts": sha256_text("".join(f"{name}\0{prompt.token_ids}\n" for name, prompt in prompts.items())),
        **asked.sampling_config().as_dict(),
        **config.server_record(loaded.info.id),
    }

    def draw(done: Collection[str]) -> Iterator[list[Rollout]]:
        todo = list(prompts.values())
        return asked.draw(loaded, [], todo, done=done, salt="teacher", messages=messages)

    with timer.phase("sample"):
        groups = sampled_together(
            ranks, folder / "rollouts.log", key, list(prompts.values()), asked.questions_at_once(), draw,
            desc="sample the teacher", quiet=config.quiet, timer=timer,
        )  # fmt: skip
        groups = {name: groups[name] for name in prompts}
    with timer.phase("trace"):
        tracer = NeuronTracer(loaded.model, config.trace_config())
        read_at, note = read_positions(config.positions, groups, questions, reader, loaded.tokenizer)
        flat = all_traced_at(prompts, groups, read_at, about_next=tracer.about_next)
        weights = f"{loaded.info.weights}{loaded.info.adapter or ''}"
        with progress(total=len(flat), desc="trace the teacher", quiet=config.quiet or not ranks.main) as bar:
            shards = trace_to_shards(tracer, flat, folder, weights, advance=lambda n, _: bar.update(n), ranks=ranks)
    return TeacherRun(prompts, groups, load_shards(shards), note and f"the teacher's {note}")


def _teacher_prompts(
    config: ExportConfig,
    loaded: LoadedModel,
    first: FirstStage | None,
    contexts: Mapping[str, Sequence[DemonstrationRecord]] | None,
) -> tuple[dict[str, Prompt], dict[str, Sequence[Message]]]:
    assert first is not None and contexts is not None  # as on the main process
    if not contexts:
        raise UserError(
            f"none of {len(first.questions)} questions has a context, so that --teacher-rollouts "
            f"{config.teacher_rollouts} has nothing to show the teacher; look at the rollouts with --teacher-rollouts 0"
        )
    questions, rollouts = first.questions, first.groups
    builder = PromptBuilder(loaded.tokenizer, config.teacher_prompt_config())
    messages: dict[str, Sequence[Message]] = {}
    for name, context in contexts.items():
        shown = privileged_question(questions[name], builder.config, config.privileged_wording)
        texts = [(questions[one.question_id], rollouts[one.question_id][one.rollout_id].text) for one in context]
        messages[name] = builder.messages(shown, [Demonstration(*pair) for pair in texts])
    prompts = {name: Prompt(name, builder.encode(chat)) for name, chat in messages.items()}
    for name, prompt in prompts.items():
        if len(prompt.token_ids) + config.max_new_tokens > loaded.max_length:
            raise UserError(
                f'question "{name}": the teacher prompt of {len(prompt.token_ids)} tokens and {config.max_new_tokens} '
                f"new tokens exceed the model's {loaded.max_length} positions; lower --max-context-tokens"
            )
    return prompts, messages


@torch.inference_mode()
def with_teacher(
    config: ExportConfig,
    loaded: LoadedModel,
    reader: AnswerReader,
    questions: Mapping[str, Question],
    signals: Mapping[str, QuestionSignals],
    prompts: Mapping[str, Prompt],
    run: TeacherRun,
) -> tuple[dict[str, QuestionSignals], dict[str, AnswerState]]:
    """The questions' signals with what the teacher did, and the state of each teacher's most frequent answer."""
    enriched, states = dict(signals), {}
    start = 0
    with progress(total=len(run.groups), desc="measure the teacher", quiet=config.quiet) as bar:
        for name, group in run.groups.items():
            signal, question = signals[name], questions[name]
            teacher = reader.read(group, question)
            ids = run.sets.neuron_ids[start : start + len(group)]
            start += len(group)
            student, shown = (
                (prompt, run_prompts(loaded.model, [prompt.token_ids])) for prompt in (prompts[name], run.prompts[name])
            )
            own = states_of(config, loaded, question, signal.rollouts, signal.reading.raw_answers, *student)
            after = states_of(config, loaded, question, group, teacher.raw_answers, *shown)
            raw = (*signal.reading.raw_answers, *teacher.raw_answers)
            merged = merge_answers(raw, question, config.vote_merge)
            k = len(signal.rollouts)
            gap = entropy_gap(config, loaded, signal.rollouts, student, shown)
            enriched[name] = replace(
                signal,
                belief=_belief(own.beliefs, merged[:k]),
                teacher=TeacherSignals(group, teacher, ids, _belief(after.beliefs, merged[k:]), gap),
            )
            modal = [place for place, answer in enumerate(teacher.answers) if answer == teacher.vote.winner]
            states[name] = AnswerState(after.trajectory[modal[0]], after.final[modal[0]], 1.0)
            bar.update()
    return enriched, states


def representative_states(
    config: ExportConfig,
    loaded: LoadedModel,
    questions: Mapping[str, Question],
    signals: Mapping[str, QuestionSignals],
    representatives: Mapping[str, int],
    prompts: Mapping[str, Prompt],
) -> dict[str, AnswerState]:
    """The state of each question at the answer of its representative, or of its first rollout without one, with the
    certainty of its belief there.

    Without possible answers or one of them at that place, the certainty is that of the votes.
    """
    names = list(representatives)
    chosen = [signals[name].rollouts[representatives[name]] for name in names]
    raw = [signals[name].reading.raw_answers[representatives[name]] for name in names]
    tokens = [prompts[name].token_ids for name in names]
    found = answer_states(
        loaded, tokens, chosen, raw, [questions[name] for name in names],
        temperature=config.temperature, batch_tokens=config.batch_tokens,
    )  # fmt: skip
    states = {}
    for row, name in enumerate(names):
        belief: Belief | None = found.beliefs[row]
        possible = len(possible_answers(questions[name])) if belief is not None else len(signals[name].rollouts)
        belief = votes_belief(signals[name].answers) if belief is None else belief
        states[name] = AnswerState(found.trajectory[row], found.final[row], certainty(belief, possible))
    return states


def states_of(
    config: ExportConfig,
    loaded: LoadedModel,
    question: Question,
    rollouts: Sequence[Rollout],
    raw_answers: Sequence[str | None],
    prompt: Prompt,
    prefix: Prefix,
) -> AnswerStates:
    """`answer_states` of one question's completions after one prompt, which was run to ``prefix``."""
    n = len(rollouts)
    return answer_states(
        loaded, [prompt.token_ids] * n, rollouts, raw_answers, [question] * n,
        temperature=config.temperature, batch_tokens=config.batch_tokens, prefix=prefix,
    )  # fmt: skip


def entropy_gap(
    config: ExportConfig,
    loaded: LoadedModel,
    rollouts: Sequence[Rollout],
    student: tuple[Prompt, Prefix],
    teacher: tuple[Prompt, Prefix],
) -> float:
    """Mean over the rollouts of the student's next-token entropy minus the teacher's on the same tokens, in nats per
    token; each has its prompt and what running it gave."""
    completions = [rollout.completion_ids for rollout in rollouts]
    lengths = [len(teacher[0].token_ids) + len(ids) for ids in completions]
    gaps = []
    for batch in pack_rows(lengths, max(config.batch_tokens, max(lengths))):
        part = [completions[index] for index in batch]
        before, after = (
            completion_entropies(loaded.model, [prompt.token_ids] * len(part), part, prefix)
            for prompt, prefix in (student, teacher)
        )
        gaps += [a - b for a, b in zip(before, after, strict=True)]
    return float(np.mean(gaps))


def _belief(beliefs: Sequence[Belief | None], answers: Sequence[str | None]) -> Belief:
    """The mean over completions of the belief at their answer, or where that is unknown of all mass on the answer."""
    return mean_belief(
        [{answer: 1.0} if belief is None else belief for belief, answer in zip(beliefs, answers, strict=True)]
    )
