"""Export a selection manifest: the questions and contexts that distillation learns from.

    python -m neurosig.export --model smollm2-135m --questions world-facts --out runs/demo/manifest

Sample K rollouts per question, trace their FFN neurons, score each question for hallucination, select the trustworthy
ones and give each a context of demonstrations: solved questions that reason alike. Gold answers are dropped as soon as
the questions are read. The steps follow Neuron-OPSD (arXiv 2607.02460); the options of tracing, scoring and selection
are a reconstruction, and the manifest records every one of them.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.export_config import PRESETS, ExportConfig
from neurosig.models.trained import as_trained, load_as_trained, trained_folders
from neurosig.runtime.cli import PhaseTimer, config_record, printable, progress, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import run_in_folder
from neurosig.runtime.shapes import Shapes, option_names
from neurosig.selection.config import SelectionConfig

if TYPE_CHECKING:
    from neurosig.hallucination.scores import Scores
    from neurosig.manifest import DemonstrationRecord, QuestionRow
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.runtime.ranks import Ranks
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt
    from neurosig.stages.first import FirstStage
    from neurosig.stages.second import TeacherRun

__all__ = ["PRESETS", "ExportConfig", "main"]

logger = logging.getLogger(__name__)

WORK = ".work"


def main(config: ExportConfig) -> None:
    """Run the export described by ``config``; processes that a launcher started share sampling and tracing.

    A trained model is asked, and its answers are read, as in its training.
    """
    from neurosig.manifest import FILES, HEADER
    from neurosig.runtime.ranks import Ranks

    ranks = Ranks.launched(config.device)
    with ranks.together():
        config = as_trained(config, trained_folders(config.model, config.adapter))
    export = partial(_export, ranks=ranks)
    run_in_folder(config, export, finished=HEADER, owned=(HEADER, *FILES, WORK), temporary=WORK, ranks=ranks)
    ranks.close()


def _export(config: ExportConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    from neurosig.hallucination.groups import fold_groups
    from neurosig.hallucination.scores import question_scores
    from neurosig.neurons.signals_file import load_shards
    from neurosig.questions.load import load_questions, without_answers
    from neurosig.questions.prompts import PromptBuilder, check_same_stream
    from neurosig.runtime.extras import EXTRAS, check_installed
    from neurosig.runtime.files import read_once
    from neurosig.selection.reuse import reused
    from neurosig.selection.rows import manifest_rows
    from neurosig.stages.first import first_stage
    from neurosig.stages.positions import read_positions
    from neurosig.stages.second import sample_teacher

    with ranks.together():
        ranks.check(config)
        check_installed("neurosig.export", *EXTRAS["signals"])
        config.server_config(config.model)  # refuse options out of range before the model loads
        config.check_answer_parser()
        config.functions()
        read = load_questions(config.questions, split=config.split, limit=config.limit, fields=config.fields)
        questions = without_answers(read)
        groups_of_folds = fold_groups(questions, config.probe_groups)
        with timer.phase("load model"):
            loaded = load_as_trained(config, ranks.device or config.device)
        wordings = config.prompt_config(), config.teacher_prompt_config()
        builder, teacher = (PromptBuilder(loaded.tokenizer, wording) for wording in wordings)
        check_same_stream(builder, teacher)
        reader = config.answer_reader(loaded)
        prompts = _prompts(questions, builder, teacher, loaded, config)
        work = config.out / WORK
        work.mkdir(exist_ok=True)
    if config.reuse is None:
        with timer.phase("sample"):
            groups, rollouts_sha256 = _rollouts(config, loaded, questions, prompts, work, timer, ranks)
        with timer.phase("trace"):
            read_at, lacking = read_positions(config.positions, groups, questions, reader, loaded.tokenizer)
            shards = _trace(config, loaded, prompts, groups, read_at, work, timer, ranks)
    first: FirstStage | None = None
    contexts: dict[str, list[DemonstrationRecord]] | None = None
    run: TeacherRun | None = None
    with ranks.together():
        if ranks.main:
            if config.reuse is None:
                traced = groups, load_shards(shards)
            else:
                with read_once(config.rollouts) as rollouts_sha256:
                    dataset = _dataset_sha256(questions)
                    traced = reused(config.reuse, config, loaded, questions, dataset, rollouts_sha256, reader)
                read_at, lacking = read_positions(config.positions, traced[0], questions, reader, loaded.tokenizer)
            first = first_stage(config, loaded, reader, questions, groups_of_folds, prompts, traced, read_at, timer)
            config = first.config
            if config.sees_contexts:
                contexts = first.contexts()
                first = first.with_contexts(contexts)
    if config.teacher_rollouts:
        run = sample_teacher(config, loaded, reader, questions, first, contexts, work, timer, ranks)
    with ranks.together():
        if first is None:
            return
        if run is not None:
            with timer.phase("measure the teacher"):
                first = first.with_teacher(loaded, prompts, run)
        with timer.phase("score and select"):
            scores = question_scores(list(first.signals.values()), first.probe, _scores(config), seed=config.seed)
            _check_score(config, scores)
            rows, note = manifest_rows(
                questions,
                first.signals,
                scores,
                first.candidates,
                ranked_by=config.hallucination_score,
                selection=config.part(SelectionConfig),
                contexts=contexts,
            )
        with timer.phase("write"):
            notes = [lacking, run.note if run else "", note]
            lengths = _write(config, loaded, first, questions, rows, scores, notes, rollouts_sha256, run)
        shutil.rmtree(work)
        _report(config, rows, first.groups, lengths)


def _scores(config: ExportConfig) -> tuple[str, ...]:
    """Names of the scores that the manifest holds: ours, and those of the options."""
    from neurosig.hallucination.scores import SCORES

    return tuple(dict.fromkeys((*SCORES, config.hallucination_score, *config.more_scores)))


def _check_score(config: ExportConfig, scores: Scores) -> None:
    if config.hallucination_score not in scores.by_name:
        why = f"the rollouts of {config.rollouts or config.base_url} have no such score"
        why = why if config.rollouts or config.base_url else "no question has such a score"
        raise UserError(
            f"--hallucination-score {config.hallucination_score}: {why}; use one of {', '.join(scores.by_name)}"
        )


def _prompts(
    questions: Sequence[Question],
    builder: PromptBuilder,
    teacher: PromptBuilder,
    loaded: LoadedModel,
    config: ExportConfig,
) -> dict[str, Prompt]:
    """Student prompts of the questions that fit the model's positions with a full completion.

    So must the teacher's prompt of a question that has its own privileged context.
    """
    from neurosig.questions.prompts import privileged_question
    from neurosig.sampling.sampler import Prompt

    prompts = {question.id: Prompt(question.id, builder.student(question)) for question in questions}
    lengths = {name: len(prompt.token_ids) for name, prompt in prompts.items()}
    for question in questions:
        if question.privileged_context is not None:
            seen = privileged_question(question, builder.config, config.privileged_wording)
            lengths[question.id] = max(lengths[question.id], len(teacher.teacher(seen, ())))
    room = loaded.max_length - config.max_new_tokens
    fitting = {name: prompt for name, prompt in prompts.items() if lengths[name] <= room}
    if not fitting:
        shortest = min(lengths.values())
        raise UserError(
            f"every question is too long: the shortest prompt has {shortest} tokens, the model's {loaded.max_length} "
            f"positions less --max-new-tokens leave {room}"
        )
    if len(fitting) < len(prompts):
        logger.warning("%d of %d questions are too long and are left out", len(prompts) - len(fitting), len(prompts))
    return fitting


def _rollouts(
    config: ExportConfig,
    loaded: LoadedModel,
    questions: Sequence[Question],
    prompts: Mapping[str, Prompt],
    work: Path,
    timer: PhaseTimer,
    ranks: Ranks,
) -> tuple[dict[str, list[Rollout]], str | None]:
    """Rollouts of every prompt in question order, sampled, resumed or read from a file; the SHA-256 of that file."""
    from neurosig.sampling.dealing import sampled_together

    if config.rollouts is not None:
        return ranks.on_main(lambda: _external_rollouts(config, loaded, prompts))
    key = {
        "model": loaded.info.as_dict(),
        "questions": _dataset_sha256(questions),
        **config.prompt_config().as_dict(),
        **config.sampling_config().as_dict(),
        **config.server_record(loaded.info.id),
    }
    todo = list(prompts.values())

    def draw(done: Collection[str]) -> Iterator[list[Rollout]]:
        return config.draw(loaded, questions, todo, done=done)

    groups = sampled_together(
        ranks, work / "rollouts.log", key, todo, config.questions_at_once(), draw,
        desc="sample", quiet=config.quiet, timer=timer,
    )  # fmt: skip
    return {name: groups[name] for name in prompts}, None


def _external_rollouts(
    config: ExportConfig, loaded: LoadedModel, prompts: Mapping[str, Prompt]
) -> tuple[dict[str, list[Rollout]], str | None]:
    from neurosig.runtime.files import read_once
    from neurosig.sampling.rollouts import check_fit, read_external_rollouts

    assert config.rollouts is not None

    def encode(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    vocabulary = loaded.model.get_input_embeddings().get_parameter("weight").shape[0]
    with read_once(config.rollouts) as sha256:
        groups = read_external_rollouts(
            config.rollouts, encode, decode, loaded.eos_token_ids, vocabulary, prompts.keys()
        )
    check_fit(
        config.rollouts,
        groups,
        {name: len(prompt.token_ids) for name, prompt in prompts.items()},
        loaded.max_length,
    )
    return {name: groups[name] for name in prompts}, sha256


def _trace(
    config: ExportConfig,
    loaded: LoadedModel,
    prompts: Mapping[str, Prompt],
    groups: Mapping[str, Sequence[Rollout]],
    read_at: Mapping[str, Sequence[Sequence[int]]],
    work: Path,
    timer: PhaseTimer,
    ranks: Ranks,
) -> list[Path]:
    """Trace all rollouts in the order of ``groups``, in shards that are kept in ``work``."""
    from neurosig.neurons.signals_file import trace_to_shards
    from neurosig.neurons.tracer import NeuronTracer
    from neurosig.stages.positions import all_traced_at

    with ranks.together():
        tracer = NeuronTracer(loaded.model, config.trace_config())
    weights = f"{loaded.info.weights}{loaded.info.adapter or ''}"
    flat = all_traced_at(prompts, groups, read_at, about_next=tracer.about_next)
    with progress(total=len(flat), desc="trace", quiet=config.quiet or not ranks.main) as bar:

        def advance(rollouts: int, tokens: int) -> None:
            bar.update(rollouts)
            timer.add_tokens("trace", tokens)

        return trace_to_shards(tracer, flat, work, weights, advance=advance, ranks=ranks)


def _write(
    config: ExportConfig,
    loaded: LoadedModel,
    first: FirstStage,
    questions: Sequence[Question],
    rows: Sequence[QuestionRow],
    scores: Scores,
    notes: Sequence[str],
    rollouts_sha256: str | None,
    run: TeacherRun | None,
) -> dict[str, float]:
    """Write the manifest; returns the lengths of its completions."""
    import neurosig
    from neurosig.manifest import write_manifest
    from neurosig.neurons.signals_file import signals_file
    from neurosig.sampling.lengths import completion_lengths
    from neurosig.selection.neuron_table import neurons_csv

    left_out = option_names(ExportConfig, Shapes.PLACE, Shapes.RESOURCES)
    info = loaded.info.as_dict()
    tokenizer = {"sha256": info.pop("tokenizer_sha256"), "chat_template_sha256": info.pop("chat_template_sha256")}
    rollouts = [rollout for group in first.groups.values() for rollout in group]
    lengths = completion_lengths(rollouts, prompt_opens_thought=first.reader.prompt_opens_thought)
    external = None if rollouts_sha256 is None else {"rollouts_sha256": rollouts_sha256}
    header: dict[str, Any] = {
        "tool": {"name": "neurosig", "version": neurosig.__version__},
        "model": info,
        "tokenizer": tokenizer,
        "dataset": {"sources": list(config.questions), "sha256": _dataset_sha256(questions), "rows": len(questions)},
        "sampling": external or config.sampling_config().as_dict(),
        "options": {key: value for key, value in config_record(config).items() if key not in left_out},
        "answers": first.reader.record(),
        "lengths": lengths,
    }
    if functions := config.functions():
        header["functions"] = functions
    notes = [note for note in notes if note]
    for note in notes:
        logger.warning("%s", note)
    if own := sum(row.privileged_context is not None for row in rows):
        notes.append(f"{own} of {len(rows)} questions bring the privileged_context that their teacher sees")
        logger.info("%s", notes[-1])
    neurons, remarks = neurons_csv(
        rows, first.groups, first.sets, scores, config.probe_config(),
        n_neurons=first.sites.n_layers * first.sites.d_mlp, d_mlp=first.sites.d_mlp,
        keep_truncated=config.keep_truncated,
    )  # fmt: skip
    if notes := [*remarks, *notes]:
        header["notes"] = notes
    write_manifest(
        config.out,
        rows,
        rollouts,
        signals=signals_file(first.sets, scores.rollout_probe, scores.probe.by_seed, first.sites),
        neurons_csv=neurons,
        header=header,
        teacher_rollouts=[] if run is None else [one for group in run.groups.values() for one in group],
    )
    return lengths


def _dataset_sha256(questions: Sequence[Question]) -> str:
    from neurosig.runtime.files import sha256_text

    parts = []
    for question in questions:
        own = question.privileged_context
        privileged = "" if own is None else f"\x00{sha256_text(own)}"
        parts.append(f"{question.id}\x00{question.text_sha256}{privileged}\n")
    return sha256_text("".join(parts))


def _report(
    config: ExportConfig,
    rows: Sequence[QuestionRow],
    groups: Mapping[str, Sequence[Rollout]],
    lengths: Mapping[str, float],
) -> None:
    from neurosig.sampling.lengths import lengths_text, warn_of_truncation

    reasons = Counter(row.reason for row in rows)
    logger.info("%s: %s", config.out, ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
    logger.info("%s: %s", config.out, lengths_text(lengths))
    if config.reuse is None:  # the export that sampled them has said it
        warn_of_truncation(str(config.out), lengths)
    if not reasons["selected"]:
        first = next(iter(groups.values()))[0]
        logger.warning(
            'no question was selected, so there is nothing to distil; the first rollout reads "%s"',
            printable(first.text)[:120],
        )


if __name__ == "__main__":
    sys.exit(run_command(ExportConfig, main, presets=PRESETS, prog="python -m neurosig.export"))
