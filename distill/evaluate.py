"""Measure a model on labelled questions: accuracy and calibration of K samples per question.

    python -m distill.evaluate --model smollm2-135m --questions world-facts --out runs/demo/eval/base
    python -m distill.evaluate --model smollm2-135m --adapter runs/demo/nopsd/adapter --questions world-facts ...

Confidence is the majority's share of all K samples; a sample without an answer is wrong, never wins and stays in the
denominator. ``results.parquet`` has one row per question, ``summary.json`` the aggregates per domain.

Greedy decoding is ``--temperature 0 --num-generations 1``. ``--scoring loglikelihood`` samples nothing: it compares the
log-probabilities of the choices, or of the members of an answer space (`neurosig.sampling.choice_scoring`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from neurosig.models.trained import as_trained, count_trained_on, load_as_trained, trained_folders, trained_from
from neurosig.options import ORGANISM, QWEN3_4B, QWEN3_4B_THINKING, EvalOptions, RolloutOptions
from neurosig.runtime.cli import PhaseTimer, config_record, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import run_in_folder
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import Shapes
from neurosig.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.runtime.ranks import Ranks
    from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

RESULTS, SUMMARY, ROLLOUTS, LOG = "results.parquet", "summary.json", "rollouts.jsonl", ".rollouts.log"


@dataclass(kw_only=True)
class EvaluateConfig(RolloutOptions, EvalOptions):
    """Sample K answers per question and compare them with the gold answers.

    Writes results.parquet (one row per question), rollouts.jsonl and summary.json (one block per domain). For greedy
    decoding give --temperature 0 --num-generations 1.
    """

    model: Annotated[str, Shapes.MODEL, Section.QUESTIONS]
    """Hub id, folder, GGUF file, or a bundled model: smollm2-135m, organism."""
    adapter: Annotated[Path | None, Shapes.MODEL] = None
    """Folder of a distill.train run, its adapter/ or one of its checkpoints/step-N, evaluated with the prompts and
    answer format of its training."""
    questions: Annotated[tuple[str, ...], Shapes.ROLLOUTS]
    """Bundled set (optionally :train, :dev, :test), file, folder or hf:ORG/NAME[/SET]; several are allowed."""
    split: Annotated[Literal["train", "dev", "test", "all"], Shapes.ROLLOUTS] = "test"
    """Split of the bundled sets that name none."""
    limit: Annotated[tuple[int, ...], Shapes.ROLLOUTS] = ()
    """Use only the first N questions: one number for all sources, or one per source."""
    scoring: Annotated[Literal["sampling", "loglikelihood"], Shapes.ROLLOUTS, Section.SCORING] = "sampling"
    """sampling: K answers and their vote; loglikelihood: the likeliest choice, or for a free-form question the
    likeliest member of its answer space by the mean log-probability per token of its first name. The softmax over the
    choices is the confidence; sampling options then have no effect."""
    choice_form: Annotated[Literal["letter", "text"], Shapes.ROLLOUTS] = "letter"
    """Text that loglikelihood scores. letter: the reply "Answer: A", summed over its tokens (`acc` of
    lm-evaluation-harness on lettered tasks); text: the choice itself, mean per token (`acc_norm` divides by
    characters)."""
    mutual_info: Annotated[bool, Shapes.ROLLOUTS] = False
    """Rank the replies that loglikelihood scores also by their log-probability minus that without the question
    (`acc_mutual_info` of lm-evaluation-harness, PMI-DC), which removes the advantage of common answers. Both accuracies
    are reported."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the results."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue an interrupted evaluation; leave a finished one with the same options unchanged."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier evaluation in --out."""

    def without_effect(self) -> Sequence[str]:
        if self.scoring == "sampling":
            return ("choice_form",)
        return [field.name for field in fields(SamplingConfig) if field.name != "seed"]


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {"model": "smollm2-135m"},
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", **QWEN3_4B, "eval_thinking": False},
    "qwen3-4b-thinking": {"model": "Qwen/Qwen3-4B", **QWEN3_4B_THINKING, "eval_thinking": True},
    "organism": {**ORGANISM, "questions": ("procedures",), "limit": (120,)},
}


def main(config: EvaluateConfig) -> None:
    """Run the evaluation described by ``config``, with the prompts and answer format of the adapter's training.

    Processes that a launcher started share the questions.
    """
    from neurosig.runtime.ranks import Ranks

    ranks = Ranks.launched(config.device)
    with ranks.together():
        config = as_trained(config, trained_folders(config.model, config.adapter))
    owned, work = (RESULTS, SUMMARY, ROLLOUTS, f"{LOG}*"), partial(_evaluate, ranks=ranks)
    run_in_folder(config, work, finished=SUMMARY, owned=owned, temporary=LOG, ranks=ranks)
    ranks.close()


def _evaluate(config: EvaluateConfig, timer: PhaseTimer, ranks: Ranks) -> None:
    from neurosig.sampling.lengths import lengths_text, warn_of_truncation

    scored = config.scoring == "loglikelihood"
    with ranks.together():
        ranks.check(config)
        config.server_config(config.model)  # options out of range are refused before the model loads
        config.check_answer_parser()
        if scored and config.sampler != "transformers":
            raise UserError(
                "--scoring loglikelihood scores the choices with the local model; leave out --sampler openai"
            )
        questions = _questions(config)
        with timer.phase("load"):
            loaded = load_as_trained(config, ranks.device or config.device)
    with timer.phase("score" if scored else "sample"):
        groups = _rollouts(config, loaded, questions, timer, ranks)
    with ranks.together():
        if not ranks.main:
            return
        with timer.phase("score"):
            rows, summary = _judged(config, loaded, questions, groups)
        _write(config, loaded, questions, groups, rows, summary)
    for domain, block in summary.items():
        if scored:
            values = f"accuracy {block['accuracy']['estimate']:.3f} (chance {block['chance']:.3f})"
            if config.mutual_info:
                values += f", without the prior {block['accuracy_mutual_info']['estimate']:.3f}"
        else:
            k, avg, maj = block["k"], block["avg_at_k"]["estimate"], block["maj_at_k"]["estimate"]
            values = f"Avg@{k} {avg:.3f}, maj@{k} {maj:.3f}"
        logger.info("%s: %s, ECE %.3f (n=%d)", domain, values, block["ece"]["estimate"], block["n"])
        if not scored:
            logger.info("%s: %s", domain, lengths_text(block))
            warn_of_truncation(domain, block)


def _judged(
    config: EvaluateConfig, loaded: LoadedModel, questions: Sequence[Question], groups: Mapping[str, Sequence[Rollout]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each question, and the aggregates of each domain."""
    from distill.results import choice_row, sampled_row, summarise, summarise_choices
    from neurosig.questions.gold import warn_of_unreachable_gold

    if config.scoring == "loglikelihood":
        row_options: Any = {"form": config.choice_form, "mutual_info": config.mutual_info}
        rows = [choice_row(question, groups[question.id], **row_options) for question in questions]
        summary = summarise_choices(rows, seed=config.seed)
    else:
        reader = config.answer_reader(loaded)
        warn_of_unreachable_gold(questions, reader)
        rows = [sampled_row(question, groups[question.id], reader) for question in questions]
        summary = summarise(rows, seed=config.seed)
    for domain, known in count_trained_on(trained_folders(config.model, config.adapter), questions).items():
        summary[domain]["trained_on"] = known
        if known:
            logger.warning("%s: %d of %d questions were trained on", domain, known, summary[domain]["n"])
    return rows, summary


def _questions(config: EvaluateConfig) -> list[Question]:
    from neurosig.questions.load import load_questions

    limits: list[int | None] = [*(config.limit or [None])]
    if len(limits) == 1:
        limits *= len(config.questions)
    if len(limits) != len(config.questions):
        raise UserError(
            f"--limit: {len(limits)} numbers for {len(config.questions)} --questions; give one, or one per source"
        )
    by_source = [
        load_questions(source, split=config.split, limit=limit, fields=config.fields)
        for source, limit in zip(config.questions, limits, strict=True)
    ]
    questions = [question for group in by_source for question in group]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f'id "{question.id}" is in two of the --questions sources; name each set once')
        seen.add(question.id)
        if question.answer is None:
            raise UserError(
                f'question "{question.id}" (line {question.line}) has no answer; evaluation needs gold answers'
            )
        if config.scoring == "loglikelihood" and question.choices is None:
            from neurosig.sampling.choice_scoring import check_answer_space

            check_answer_space(question)
    return questions


def _rollouts(
    config: EvaluateConfig,
    loaded: LoadedModel,
    questions: Sequence[Question],
    timer: PhaseTimer,
    ranks: Ranks,
) -> dict[str, list[Rollout]]:
    """The K answers of each question, or its scored choices."""
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.sampling.choice_scoring import score_choices
    from neurosig.sampling.dealing import sampled_together
    from neurosig.sampling.sampler import Prompt

    builder, scored = PromptBuilder(loaded.tokenizer, config.prompt_config()), config.scoring == "loglikelihood"
    choices = {name: getattr(config, name) for name in ("scoring", "choice_form", "mutual_info")}
    key = {
        "model": loaded.info.as_dict(),
        **config.prompt_config().as_dict(),
        **(choices if scored else config.sampling_config().as_dict()),
        "questions": [question.text_sha256 for question in questions],
        **config.server_record(loaded.info.id),
    }
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    if scored and builder.opens_thought:
        raise UserError(
            "--scoring loglikelihood scores the reply right after the prompt, which ends inside a thought; give "
            "--eval-thinking False, or --scoring sampling"
        )
    by_id = {question.id: question for question in questions}
    priors = {question.id: builder.without_question(question) for question in questions} if config.mutual_info else {}

    def draw(done: Collection[str]) -> Iterator[list[Rollout]]:
        if not scored:
            return config.draw(loaded, questions, prompts, salt="evaluate", done=done)
        form, rows = config.choice_form, config.batch_rows
        return score_choices(loaded, prompts, by_id, form, priors=priors, batch_rows=rows, done=done)

    block = -(-len(prompts) // (2 * ranks.world)) if scored else config.questions_at_once()
    shown: Any = {"desc": "evaluate", "quiet": config.quiet, "timer": None if scored else timer}
    return sampled_together(ranks, config.out / LOG, key, prompts, block, draw, **shown)


def _write(
    config: EvaluateConfig,
    loaded: LoadedModel,
    questions: Sequence[Question],
    groups: Mapping[str, Sequence[Rollout]],
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    from neurosig.questions.load import questions_sha256
    from neurosig.runtime.provenance import run_record

    record = {
        "domains": summary,
        "questions_sha256": questions_sha256(questions),
        "model": loaded.info.as_dict(),
        "trained_from": trained_from(config.model),
        "adapter_sha256": loaded.info.adapter,
        "config": config_record(config),
        "answers": config.answer_reader(loaded).record(),
        "run": run_record(),
    }
    write_evaluation(config.out, rows, groups, record)
    (config.out / LOG).unlink()


def write_evaluation(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[Rollout]],
    record: Mapping[str, Any],
) -> None:
    """Write the files of an evaluation into ``out``, ``summary.json`` with ``record`` last."""
    from neurosig.runtime.files import write_atomic, write_parquet

    write_parquet(out / RESULTS, rows)
    lines = [rollout.to_json() + "\n" for row in rows for rollout in groups[row["question_id"]]]
    write_atomic(out / ROLLOUTS, "".join(lines))
    write_atomic(out / SUMMARY, json.dumps(record, indent=1) + "\n")


def read_sampled(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    """Summary and rows of a finished evaluation that has votes, and the hashes of both files.

    Raises:
        UserError: There is none, it cannot be read, or it scored choices by log-likelihood.
    """
    import pyarrow
    import pyarrow.parquet

    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder}: no finished evaluation ({SUMMARY} is missing); run distill.evaluate --out {folder}")
    try:
        data = {name: (folder / name).read_bytes() for name in (SUMMARY, RESULTS)}
        summary = json.loads(data[SUMMARY])
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data[RESULTS])).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{folder}: cannot be read ({error}); evaluate again with --overwrite") from error
    if summary["config"]["scoring"] != "sampling":
        raise UserError(f"{folder}: scored by log-likelihood, without votes; evaluate with --scoring sampling")
    if "question_id" not in rows[0] or "lenient" not in rows[0]:
        raise UserError(
            f"{folder}: results with the columns of an earlier version; grade its kept rollouts again with python -m "
            f"distill.rescore {folder}, or evaluate again with --overwrite"
        )
    return summary, rows, {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}


if __name__ == "__main__":
    sys.exit(run_command(EvaluateConfig, main, presets=PRESETS, prog="python -m distill.evaluate"))
