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
from dataclasses import replace
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
    from neurosig.hallucination.scores import QuestionSignals, Scores
    from neurosig.manifest import QuestionRow
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.contributions import ActiveSets
    from neurosig.neurons.sites import FFNSites
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.questions.reader import AnswerReader
    from neurosig.runtime.ranks import Ranks
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt

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
    from neurosig.neurons.positions import read_positions
    from neurosig.neurons.signals_file import load_shards
    from neurosig.neurons.sites import ffn_sites
    from neurosig.questions.load import load_questions, without_answers
    from neurosig.questions.prompts import PromptBuilder, check_same_stream
    from neurosig.runtime.extras import EXTRAS, check_installed
    from neurosig.runtime.files import read_once
    from neurosig.selection.reuse import reused
    from neurosig.selection.rows import manifest_rows

    with ranks.together():
        ranks.check(config)
        check_installed("neurosig.export", *EXTRAS["signals"])
        config.server_config(config.model)  # refuse options out of range before the model loads
        config.check_answer_parser()
        read = load_questions(config.questions, split=config.split, limit=config.limit, fields=config.fields)
        questions = without_answers(read)
        groups_of_folds = fold_groups(questions, config.probe_groups)
        with timer.phase("load model"):
            device = ranks.device or config.device
            loaded = load_as_trained(config, device)
        builder, teacher = (
            PromptBuilder(loaded.tokenizer, wording)
            for wording in (config.prompt_config(), config.teacher_prompt_config())
        )
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
    with ranks.together():
        if not ranks.main:
            return
        if config.reuse is None:
            sets = load_shards(shards)
        else:
            with read_once(config.rollouts) as rollouts_sha256:
                dataset = _dataset_sha256(questions)
                groups, sets = reused(config.reuse, config, loaded, questions, dataset, rollouts_sha256, reader)
            read_at, lacking = read_positions(config.positions, groups, questions, reader, loaded.tokenizer)
        sites = ffn_sites(loaded.model)
        config = _with_k(config, len(next(iter(groups.values()))))
        config = replace(config, set_size=config.trace_config().sized(sites.n_layers, sites.d_mlp).set_size)
        with timer.phase("score and select"):
            signals = _signals(reader, questions, groups, read_at, sets)
            scores = _scores(config, signals, sites, groups_of_folds)
            rows, note = manifest_rows(
                questions,
                signals,
                scores,
                ranked_by=config.hallucination_score,
                selection=config.part(SelectionConfig),
                prompt_tokens={name: len(prompt.token_ids) for name, prompt in prompts.items()},
            )
        with timer.phase("write"):
            lengths = _write(
                config, loaded, reader, questions, rows, groups, sets, scores, sites, [lacking, note], rollouts_sha256
            )
        shutil.rmtree(work)
        _report(config, rows, groups, lengths)


def _with_k(config: ExportConfig, k: int) -> ExportConfig:
    """The options, with the K that ``--rollouts`` holds."""
    if k != config.num_generations:
        logger.info(
            "K=%d, as %s holds; --num-generations %d does not apply", k, config.rollouts, config.num_generations
        )
    return replace(config, num_generations=k)


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
    from neurosig.neurons.positions import traced_at
    from neurosig.neurons.signals_file import trace_to_shards
    from neurosig.neurons.tracer import NeuronTracer

    with ranks.together():
        tracer = NeuronTracer(loaded.model, config.trace_config())
    weights, about_next = f"{loaded.info.weights}{loaded.info.adapter or ''}", config.contribution == "unembed"
    flat = [
        traced_at(prompts[name].token_ids, rollout.completion_ids_without_eos, indices, about_next=about_next)
        for name, group in groups.items()
        for rollout, indices in zip(group, read_at[name], strict=True)
    ]
    with progress(total=len(flat), desc="trace", quiet=config.quiet or not ranks.main) as bar:

        def advance(rollouts: int, tokens: int) -> None:
            bar.update(rollouts)
            timer.add_tokens("trace", tokens)

        return trace_to_shards(tracer, flat, work, weights, advance=advance, ranks=ranks)


def _signals(
    reader: AnswerReader,
    questions: Sequence[Question],
    groups: Mapping[str, Sequence[Rollout]],
    read_at: Mapping[str, Sequence[Sequence[int]]],
    sets: ActiveSets,
) -> dict[str, QuestionSignals]:
    from neurosig.hallucination.scores import QuestionSignals

    by_id = {question.id: question for question in questions}
    signals, start = {}, 0
    for name, group in groups.items():
        stop = start + len(group)
        ids, values, hidden = (tensor[start:stop] for tensor in sets)
        n_traced = sum(map(len, read_at[name]))
        signals[name] = QuestionSignals(group, reader.read(group, by_id[name]), ids, values, hidden, n_traced)
        start = stop
    return signals


def _scores(
    config: ExportConfig,
    signals: Mapping[str, QuestionSignals],
    sites: FFNSites,
    fold_groups: Mapping[str, str] | None,
) -> Scores:
    from neurosig.hallucination.scores import hallucination_scores

    probe = config.probe_config()
    size = {"n_neurons": sites.n_layers * sites.d_mlp, "n_layers": sites.n_layers}
    scores = hallucination_scores(signals, **size, probe=probe, seed=config.seed, fold_groups=fold_groups)
    if config.hallucination_score not in scores.by_name:
        raise UserError(
            f"--hallucination-score {config.hallucination_score}: the rollouts of {config.rollouts or config.base_url} "
            f"have no such score; use one of {', '.join(scores.by_name)}"
        )
    return scores


def _write(
    config: ExportConfig,
    loaded: LoadedModel,
    reader: AnswerReader,
    questions: Sequence[Question],
    rows: Sequence[QuestionRow],
    groups: Mapping[str, Sequence[Rollout]],
    sets: ActiveSets,
    scores: Scores,
    sites: FFNSites,
    notes: Sequence[str],
    rollouts_sha256: str | None,
) -> dict[str, float]:
    """Write the manifest; returns the lengths of its completions."""
    import neurosig
    from neurosig.manifest import write_manifest
    from neurosig.neurons.signals_file import signals_file
    from neurosig.sampling.lengths import completion_lengths
    from neurosig.selection.rows import neurons_csv

    left_out = option_names(ExportConfig, Shapes.PLACE, Shapes.RESOURCES)
    info = loaded.info.as_dict()
    tokenizer = {"sha256": info.pop("tokenizer_sha256"), "chat_template_sha256": info.pop("chat_template_sha256")}
    rollouts = [rollout for group in groups.values() for rollout in group]
    lengths = completion_lengths(rollouts, prompt_opens_thought=reader.prompt_opens_thought)
    external = None if rollouts_sha256 is None else {"rollouts_sha256": rollouts_sha256}
    header: dict[str, Any] = {
        "tool": {"name": "neurosig", "version": neurosig.__version__},
        "model": info,
        "tokenizer": tokenizer,
        "dataset": {"sources": list(config.questions), "sha256": _dataset_sha256(questions), "rows": len(questions)},
        "sampling": external or config.sampling_config().as_dict(),
        "options": {key: value for key, value in config_record(config).items() if key not in left_out},
        "answers": reader.record(),
        "lengths": lengths,
    }
    notes = [note for note in notes if note]
    for note in notes:
        logger.warning("%s", note)
    if own := sum(row.privileged_context is not None for row in rows):
        notes.append(f"{own} of {len(rows)} questions bring the privileged_context that their teacher sees")
        logger.info("%s", notes[-1])
    if notes:
        header["notes"] = notes
    write_manifest(
        config.out,
        rows,
        rollouts,
        signals=signals_file(sets, scores.rollout_probe, scores.probe.by_seed, sites),
        neurons_csv=neurons_csv(sets.neuron_ids, scores.probe, sites.d_mlp),
        header=header,
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
    warn_of_truncation(str(config.out), lengths)
    if not reasons["selected"]:
        first = next(iter(groups.values()))[0]
        logger.warning(
            'no question was selected, so there is nothing to distil; the first rollout reads "%s"',
            printable(first.text)[:120],
        )


if __name__ == "__main__":
    sys.exit(run_command(ExportConfig, main, presets=PRESETS, prog="python -m neurosig.export"))
