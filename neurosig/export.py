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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from neurosig.hallucination.config import FOLD_SEEDS, INVERSE_PENALTY, HallucinationScore, ProbeConfig
from neurosig.neurons.config import ActiveSet, Contribution, NeuronValue, TraceConfig
from neurosig.options import ORGANISM, QWEN3_4B, RolloutOptions
from neurosig.patterns import Signature
from neurosig.runtime.cli import PhaseTimer, config_record, printable, progress, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import run_in_folder
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import Shapes, option_names
from neurosig.selection.config import ContextPolicy, QuestionFilter, QuestionWeight, SelectionConfig

if TYPE_CHECKING:
    from neurosig.hallucination.scores import QuestionSignals, Scores
    from neurosig.manifest import QuestionRow
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.contributions import ActiveSets
    from neurosig.neurons.sites import FFNSites
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.questions.reader import AnswerReader
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt

logger = logging.getLogger(__name__)

WORK = ".work"
TRACE, PROBE, SELECTION = TraceConfig(), ProbeConfig(), SelectionConfig()  # the options' defaults


@dataclass(kw_only=True)
class ExportConfig(RolloutOptions):
    """Write a selection manifest from unlabelled questions.

    Samples K rollouts per question, traces the neurons behind them, selects the questions whose majority answer these
    neurons trust, and gives each a few-shot context of questions that reason alike.
    """

    model: Annotated[str, Shapes.MODEL, Section.QUESTIONS]
    """Hub id, folder, GGUF file, or a bundled model: smollm2-135m, organism."""
    questions: Annotated[tuple[str, ...], Shapes.ROLLOUTS]
    """Bundled set (world-facts, geography, language, chemistry, procedures, organism-facts; optionally :train, :dev,
    :test), file, folder or hf:ORG/NAME; several are allowed."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the manifest."""
    rollouts: Annotated[Path | None, Shapes.ROLLOUTS] = None
    """JSONL of rollouts that replace sampling: question_id, text, optional completion_ids and finish_reason. K is the
    number that the file holds of every question; lines of other questions are left out."""
    reuse: Annotated[Path | None, Shapes.PLACE] = None
    """Finished export with the same questions, sampling and tracing; only scoring and selection are done again."""
    split: Annotated[Literal["train", "dev", "test", "all"], Shapes.ROLLOUTS] = "train"
    """Split of the bundled sets that name none."""
    limit: Annotated[int | None, Shapes.ROLLOUTS] = None
    """Use only the first N questions."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue an interrupted export; leave a complete one unchanged."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier export in --out."""

    neuron_value: Annotated[NeuronValue, Shapes.TRACES, Section.NEURONS] = TRACE.value
    """A neuron's value: act(gate)*up, or act(gate) alone."""
    contribution: Annotated[Contribution, Shapes.TRACES] = TRACE.score
    """A neuron's score at a token: cett, its output's norm as a share of the FFN output's; magnitude, that norm alone;
    unembed, what it adds to the next token's logit."""
    active_set: Annotated[ActiveSet, Shapes.TRACES] = TRACE.active
    """Which neurons are kept: layer_mean, the largest mean scores of each layer; global, those of all layers;
    per_token, the union of each token's largest; entries, those of each layer's largest (token, neuron) scores."""
    set_size: Annotated[int, Shapes.TRACES] = TRACE.set_size
    """Neurons per active set; per_token: neurons per token; entries: entries per layer."""
    positive_only: Annotated[bool, Shapes.TRACES] = TRACE.positive_only
    """Leave out neurons whose mean score is not above 0; for the signed unembed."""
    hallucination_score: Annotated[HallucinationScore, Shapes.SELECTION, Section.SCORE] = "probe_score"
    """Score that --question-filter ranks by; the manifest holds all of them. vote_share to random are baselines without
    neurons."""
    probe_agree_share: Annotated[float, Shapes.SELECTION] = PROBE.agree_share
    """The probe learns a question as known when the winner has at least this share of the K answers, 0 to 1; 1 asks for
    unanimity, which a weak model rarely reaches."""
    probe_split_share: Annotated[float, Shapes.SELECTION] = PROBE.split_share
    """The probe learns a question as guessed when the winner has less than this share, 0 to --probe-agree-share."""
    probe_inverse_penalty: Annotated[float, Shapes.SELECTION] = INVERSE_PENALTY
    """C of the L1 probe, above 0; a smaller one keeps fewer neurons."""
    probe_folds: Annotated[int, Shapes.SELECTION] = PROBE.folds
    """Cross-fitting folds of the probe, at least 2."""
    probe_groups: Annotated[str, Shapes.SELECTION] = PROBE.groups
    """What the probe's folds keep together. question: a question is scored by a probe that saw others of its kind;
    kind, domain or another column of the questions: by a probe that saw none with the same value, so that a score
    cannot come from what tells the kinds apart. Fewer values than --probe-folds give one fold each."""
    probe_fold_seeds: Annotated[int, Shapes.SELECTION] = FOLD_SEEDS
    """Times that the probe's folds are drawn, at least 1; the scores are the mean, and neurosig.report shows how far
    the drawings differ."""

    question_filter: Annotated[QuestionFilter, Shapes.SELECTION, Section.SELECTION] = SELECTION.question_filter
    """Questions to train on. neuron: --min-vote-share, then the --keep-fraction with the lowest scores; vote_only and
    neuron_only: one of these two conditions; threshold: --min-vote-share and --max-score; all: every question."""
    min_vote_share: Annotated[float, Shapes.SELECTION] = SELECTION.min_vote_share
    """Least share of the K answers that the winner needs, 0 to 1."""
    keep_fraction: Annotated[float, Shapes.SELECTION] = SELECTION.keep_fraction
    """Share of the questions to select by score, above 0 and at most 1."""
    max_score: Annotated[float, Shapes.SELECTION] = SELECTION.max_score
    """Largest score that --question-filter threshold selects."""
    signature: Annotated[Signature, Shapes.SELECTION] = SELECTION.signature
    """What similarity compares: representative, the active set of the most trusted majority rollout; union,
    intersection and frequency, neurons in any, all or half of these rollouts; hidden_state, the embedding baseline."""
    context_policy: Annotated[ContextPolicy, Shapes.SELECTION] = SELECTION.context_policy
    """How the teacher's demonstrations are chosen: nearest, the most similar questions, the best last; nearest_first,
    the best first; random; random_within_kind, the control for topic; majority_solution, the question's own
    shortest majority rollout (U-OPSD); none."""
    num_demonstrations: Annotated[int, Shapes.SELECTION] = SELECTION.num_demonstrations
    """Demonstrations per context, at least 1."""
    max_context_tokens: Annotated[int, Shapes.SELECTION] = SELECTION.max_context_tokens
    """Tokens per context; the least similar demonstrations are dropped to stay within them."""
    same_label_excluded: Annotated[bool, Shapes.SELECTION] = SELECTION.same_label_excluded
    """Exclude demonstrations with the question's own pseudo-label, so that none gives the answer away."""
    question_weight: Annotated[QuestionWeight, Shapes.SELECTION] = SELECTION.question_weight
    """A question's weight in the loss: 1, or the winner's share of the K answers."""

    batch_tokens: Annotated[int, Shapes.RESOURCES, Section.RESOURCES] = TRACE.batch_tokens
    """Tokens per traced batch, padding included; memory and speed only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trace_config()
        self.probe_config()
        self.part(SelectionConfig)

    def trace_config(self) -> TraceConfig:
        """How rollouts are traced."""
        measured = self.neuron_value, self.contribution, self.active_set
        return TraceConfig(*measured, self.set_size, self.positive_only, self.batch_tokens)

    def probe_config(self) -> ProbeConfig:
        """How the probe is fitted."""
        shares = self.probe_agree_share, self.probe_split_share
        return ProbeConfig(
            *shares,
            self.probe_inverse_penalty,
            folds=self.probe_folds,
            groups=self.probe_groups,
            fold_seeds=self.probe_fold_seeds,
            seed=self.seed,
        )


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {"model": "smollm2-135m"},
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", **QWEN3_4B},
    "neufs": {"neuron_value": "act", "contribution": "unembed", "active_set": "entries", "set_size": 2000},
    "organism": {**ORGANISM, "questions": ("procedures",), "limit": 160, "set_size": 250, "keep_fraction": 0.9},
}


def main(config: ExportConfig) -> None:
    """Run the export described by ``config``."""
    from neurosig.manifest import FILES, HEADER

    run_in_folder(config, _export, finished=HEADER, owned=(HEADER, *FILES, WORK), temporary=WORK)


def _export(config: ExportConfig, timer: PhaseTimer) -> None:
    from neurosig.hallucination.groups import fold_groups
    from neurosig.models.load import load_model
    from neurosig.neurons.sites import ffn_sites
    from neurosig.questions.load import load_questions, without_answers
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.runtime.files import read_once
    from neurosig.selection.reuse import reused
    from neurosig.selection.rows import manifest_rows

    config.server_config(config.model)  # refuse options out of range before the model loads
    config.check_answer_parser()
    questions = without_answers(load_questions(config.questions, split=config.split, limit=config.limit))
    groups_of_folds = fold_groups(questions, config.probe_groups)
    with timer.phase("load model"):
        loaded = load_model(config.model, dtype=config.dtype, device=config.device, template=config.template)
    builder = PromptBuilder(loaded.tokenizer, config.prompt_config())
    prompts = _prompts(questions, builder, loaded, config)
    work = config.out / WORK
    work.mkdir(exist_ok=True)
    if config.reuse is not None:
        with read_once(config.rollouts) as rollouts_sha256:
            groups, sets = reused(config.reuse, config, loaded, questions, _dataset_sha256(questions), rollouts_sha256)
    else:
        with timer.phase("sample"), read_once(config.rollouts) as rollouts_sha256:
            groups = _rollouts(config, loaded, questions, prompts, work, timer)
        with timer.phase("trace"):
            sets = _trace(config, loaded, prompts, groups, work, timer)
    config = _with_k(config, len(next(iter(groups.values()))))
    sites = ffn_sites(loaded.model)
    with timer.phase("score and select"):
        reader = config.answer_reader(loaded)
        signals = _signals(reader, questions, groups, sets)
        scores = _scores(config, signals, sites.n_layers * sites.d_mlp, groups_of_folds)
        rows, note = manifest_rows(
            questions,
            signals,
            scores,
            ranked_by=config.hallucination_score,
            selection=config.part(SelectionConfig),
            prompt_tokens={name: len(prompt.token_ids) for name, prompt in prompts.items()},
        )
    with timer.phase("write"):
        _write(config, loaded, reader, questions, rows, groups, sets, scores, sites, note, rollouts_sha256)
    shutil.rmtree(work)
    _report(config, rows, groups)


def _with_k(config: ExportConfig, k: int) -> ExportConfig:
    """The options, with the K that ``--rollouts`` holds."""
    if k != config.num_generations:
        logger.info(
            "K=%d, as %s holds; --num-generations %d does not apply", k, config.rollouts, config.num_generations
        )
    return replace(config, num_generations=k)


def _prompts(
    questions: Sequence[Question], builder: PromptBuilder, loaded: LoadedModel, config: ExportConfig
) -> dict[str, Prompt]:
    """Student prompts of the questions whose prompt and full completion fit the model's positions."""
    from neurosig.sampling.sampler import Prompt

    prompts = {question.id: Prompt(question.id, builder.student(question)) for question in questions}
    room = loaded.max_length - config.max_new_tokens
    fitting = {name: prompt for name, prompt in prompts.items() if len(prompt.token_ids) <= room}
    if not fitting:
        shortest = min(len(prompt.token_ids) for prompt in prompts.values())
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
) -> dict[str, list[Rollout]]:
    """Rollouts of every prompt in question order, sampled, resumed or read from a file."""
    from neurosig.sampling.rollouts import RolloutLog, check_fit, read_external_rollouts

    if config.rollouts is not None:

        def encode(text: str) -> list[int]:
            return list(loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

        def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
            return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

        vocabulary = loaded.model.get_input_embeddings().get_parameter("weight").shape[0]
        groups = read_external_rollouts(
            config.rollouts, encode, decode, loaded.eos_token_ids, vocabulary, prompts.keys()
        )
        lengths = {name: len(prompt.token_ids) for name, prompt in prompts.items()}
        check_fit(config.rollouts, groups, lengths, loaded.max_length)
        return {name: groups[name] for name in prompts}

    log = RolloutLog(
        work / "rollouts.log",
        {
            "model": loaded.info.as_dict(),
            "questions": _dataset_sha256(questions),
            **config.prompt_config().as_dict(),
            **config.sampling_config().as_dict(),
            **config.server_record(loaded.info.id),
        },
    )
    drawn = config.draw(loaded, questions, list(prompts.values()), done=set(log.groups))
    groups = log.extend(drawn, total=len(prompts), desc="sample", quiet=config.quiet, timer=timer)
    return {name: groups[name] for name in prompts}


def _trace(
    config: ExportConfig,
    loaded: LoadedModel,
    prompts: Mapping[str, Prompt],
    groups: Mapping[str, Sequence[Rollout]],
    work: Path,
    timer: PhaseTimer,
) -> ActiveSets:
    """Active sets of all rollouts in the order of ``groups``; finished shards are kept in ``work``."""
    from neurosig.neurons.signals_file import load_shards, trace_to_shards
    from neurosig.neurons.tracer import NeuronTracer

    tracer = NeuronTracer(loaded.model, config.trace_config())
    flat = [(prompts[name].token_ids, r.completion_ids_without_eos) for name, group in groups.items() for r in group]
    with progress(total=len(flat), desc="trace", quiet=config.quiet) as bar:

        def advance(rollouts: int, tokens: int) -> None:
            bar.update(rollouts)
            timer.add_tokens("trace", tokens)

        shards = trace_to_shards(tracer, flat, work, str(loaded.info.weights), advance=advance)
    return load_shards(shards)


def _signals(
    reader: AnswerReader,
    questions: Sequence[Question],
    groups: Mapping[str, Sequence[Rollout]],
    sets: ActiveSets,
) -> dict[str, QuestionSignals]:
    from neurosig.hallucination.scores import QuestionSignals

    by_id = {question.id: question for question in questions}
    signals, start = {}, 0
    for name, group in groups.items():
        stop = start + len(group)
        traced = (tensor[start:stop] for tensor in sets)
        signals[name] = QuestionSignals(group, reader.read(group, by_id[name]), *traced)
        start = stop
    return signals


def _scores(
    config: ExportConfig,
    signals: Mapping[str, QuestionSignals],
    n_neurons: int,
    fold_groups: Mapping[str, str] | None,
) -> Scores:
    from neurosig.hallucination.scores import hallucination_scores

    probe = config.probe_config()
    scores = hallucination_scores(signals, n_neurons=n_neurons, probe=probe, seed=config.seed, fold_groups=fold_groups)
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
    note: str,
    rollouts_sha256: str | None,
) -> None:
    import neurosig
    from neurosig.manifest import write_manifest
    from neurosig.neurons.signals_file import signals_file
    from neurosig.selection.rows import neurons_csv

    left_out = option_names(ExportConfig, Shapes.PLACE, Shapes.RESOURCES)
    info = loaded.info.as_dict()
    tokenizer = {"sha256": info.pop("tokenizer_sha256"), "chat_template_sha256": info.pop("chat_template_sha256")}
    external = None if rollouts_sha256 is None else {"rollouts_sha256": rollouts_sha256}
    header: dict[str, object] = {
        "tool": {"name": "neurosig", "version": neurosig.__version__},
        "model": info,
        "tokenizer": tokenizer,
        "dataset": {"sources": list(config.questions), "sha256": _dataset_sha256(questions), "rows": len(questions)},
        "sampling": external or config.sampling_config().as_dict(),
        "options": {key: value for key, value in config_record(config).items() if key not in left_out},
        "answers": reader.record(),
    }
    if note:
        logger.warning("%s", note)
        header["notes"] = [note]
    write_manifest(
        config.out,
        rows,
        [rollout for group in groups.values() for rollout in group],
        signals=signals_file(sets, scores.rollout_probe, scores.probe.by_seed, sites),
        neurons_csv=neurons_csv(sets.neuron_ids, scores.probe, sites.d_mlp),
        header=header,
    )


def _dataset_sha256(questions: Sequence[Question]) -> str:
    from neurosig.runtime.files import sha256_text

    return sha256_text("".join(f"{question.id}\x00{question.text_sha256}\n" for question in questions))


def _report(config: ExportConfig, rows: Sequence[QuestionRow], groups: Mapping[str, Sequence[Rollout]]) -> None:
    reasons = Counter(row.reason for row in rows)
    logger.info("%s: %s", config.out, ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
    if not reasons["selected"]:
        first = next(iter(groups.values()))[0]
        logger.warning(
            'no question was selected, so there is nothing to distil; the first rollout reads "%s"',
            printable(first.text)[:120],
        )


if __name__ == "__main__":
    sys.exit(run_command(ExportConfig, main, presets=PRESETS, prog="python -m neurosig.export"))
