"""Test neuron signals against what the organism was taught: patterns, made-up answers, teachers.

    python -m neurosig.organism.study --out runs/organism

Three questions, each with its controls; ``study.csv`` holds every number with its n, seed and 95 % bootstrap interval
over questions. 1. Do neuron signatures find the procedure a question asks for, better than hidden states or tokens?
2. Does a hallucination score tell made-up from trained facts? 3. Is a teacher that sees solved examples of the same
procedure, or the nearest by neurons, better than one that sees random ones?
"""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from neurosig.runtime.cli import CommonConfig, PhaseTimer, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import Shapes

if TYPE_CHECKING:
    from neurosig.exported import Exported
    from neurosig.statistics.metrics import Interval

logger = logging.getLogger(__name__)

RESULT = "study.csv"
COLUMNS = ("part", "name", "metric", "estimate", "low", "high", "n", "seed")
NEIGHBOURS = 5
"""Nearest questions whose procedure is counted."""
RESAMPLES = 2000
"""Bootstrap resamples of questions."""
DEMONSTRATIONS = 2
"""Solved examples the teacher sees."""

Row = dict[str, Any]


@dataclass(kw_only=True)
class StudyConfig(CommonConfig):
    """Measure neuron signals against what the organism was taught."""

    out: Annotated[Path, Shapes.PLACE]
    """Folder of the two manifests and study.csv."""
    model: str = "organism"
    """The packaged model, or a folder written by neurosig.organism.train."""
    limit: int | None = None
    """Use only the first N questions of each set."""
    num_generations: int = 8
    """K, rollouts per question."""
    temperature: float = 0.8
    """Sampling temperature."""
    seed: int = 0
    """Seed of rollouts, probe, clusters, random contexts and bootstrap."""
    resume: Annotated[bool, Shapes.PLACE] = False
    """Continue an interrupted study; leave a finished one alone."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier study in --out."""


def main(config: StudyConfig) -> None:
    """Run the study described by ``config``."""
    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.folder import command_folder

    owned = (RESULT, "procedures", "facts")
    with command_folder(config, finished=RESULT, owned=owned) as complete:
        if complete:
            logger.info("%s: already complete", config.out)
            return
        with PhaseTimer() as timer:
            with timer.phase("export"):
                procedures = _export(config, "procedures", "procedures:test")
                facts = _export(config, "facts", "organism-facts:all")
            with timer.phase("patterns"):
                rows, distances = pattern_rows(procedures, config.seed)
            with timer.phase("hallucination"):
                rows += hallucination_rows(facts, config.seed)
            with timer.phase("teachers"):
                rows += teacher_rows(procedures, distances, config)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(config.out / RESULT, table.getvalue())
    for row in rows:
        logger.info(
            "%-13s %-18s %-13s %.3f [%.3f, %.3f] n=%d",
            *(row[name] for name in ("part", "name", "metric", "estimate", "low", "high", "n")),
        )


def _export(config: StudyConfig, name: str, questions: str) -> Exported:
    """Sample and trace one set; those whose majority holds half of the answers may serve as solved examples."""
    from neurosig.export import PRESETS, ExportConfig
    from neurosig.export import main as export
    from neurosig.exported import Exported

    options: dict[str, Any] = {
        **PRESETS["organism"],
        "model": config.model,
        "questions": (questions,),
        "limit": config.limit,
        "num_generations": config.num_generations,
        "temperature": config.temperature,
        "seed": config.seed,
        "question_filter": "vote_only",
        "context_policy": "none",
    }
    export(ExportConfig(**options, out=config.out / name, resume=True, quiet=config.quiet))
    return Exported(config.out / name)


def pattern_rows(exported: Exported, seed: int) -> tuple[list[Row], dict[str, Float[np.ndarray, "n n"]]]:
    """How well each distance between representative rollouts finds the procedure; and the distances.

    ``purity`` and ``ari`` are of k-medoids with as many clusters as there are procedures (the intervals resample
    questions and keep the clusters), ``neighbours`` the share of the nearest `NEIGHBOURS` questions with the same
    procedure. ``ari_minus_neurons`` is the paired difference to the neurons' clusters, ``hand_ari`` compares with the
    two hands instead.
    """
    from neurosig.patterns.clusters import k_medoids

    representatives = exported.representatives
    kinds = np.unique([str(exported.rows[name].kind) for name in representatives], return_inverse=True)[1]
    hands = np.array([exported.rollouts[name][k].text.startswith("Answer") for name, k in representatives.items()])
    distances = _distances(exported)
    clusters = {
        name: k_medoids(distance, len(set(kinds)), restarts=5, seed=seed).labels for name, distance in distances.items()
    }
    rows: list[Row] = []
    for name, distance in distances.items():
        nearest = np.argsort(distance + np.diag([np.inf] * len(kinds)), axis=1, kind="stable")[:, :NEIGHBOURS]
        same = (kinds[nearest] == kinds[:, None]).mean(axis=1)
        intervals = _pattern_intervals(clusters[name], clusters["neurons"], kinds, hands, same, seed)
        for metric, interval in intervals.items():
            rows.append(_row("patterns", name, metric, interval))
    return rows, distances


def _pattern_intervals(
    found: Int[np.ndarray, " n"],
    by_neurons: Int[np.ndarray, " n"],
    kinds: Int[np.ndarray, " n"],
    hands: Bool[np.ndarray, " n"],
    same: Float[np.ndarray, " n"],
    seed: int,
) -> dict[str, Interval]:
    from sklearn.metrics import adjusted_rand_score

    from neurosig.patterns.clusters import purity
    from neurosig.statistics.metrics import bootstrap_interval

    statistics: dict[str, Callable[[Int[np.ndarray, " questions"]], float]] = {
        "purity": lambda q: purity(found[q], kinds[q]),
        "ari": lambda q: float(adjusted_rand_score(kinds[q], found[q])),
        "ari_minus_neurons": lambda q: float(
            adjusted_rand_score(kinds[q], found[q]) - adjusted_rand_score(kinds[q], by_neurons[q])
        ),
        "hand_ari": lambda q: float(adjusted_rand_score(hands[q], found[q])),
        "neighbours": lambda q: float(same[q].mean()),
    }
    return {
        metric: bootstrap_interval(statistic, len(found), seed=seed, resamples=RESAMPLES)
        for metric, statistic in statistics.items()
    }


def _distances(exported: Exported) -> dict[str, Float[np.ndarray, "n n"]]:
    """Distance of every pair of representative rollouts by neurons, hidden states (centred) and tokens."""
    from neurosig.patterns.clusters import cosine_distances, jaccard_distances

    representatives = exported.representatives
    places = [exported.place[item] for item in representatives.items()]
    hidden = exported.signals.hidden_states[places].float()
    completions = [exported.rollouts[name][k].completion_ids_without_eos for name, k in representatives.items()]
    return {
        "neurons": jaccard_distances(exported.signals.neuron_ids[places]),
        "hidden": cosine_distances(hidden - hidden.mean(dim=0)),
        "completion tokens": _overlap([set(ids) for ids in completions]),
        "completion bigrams": _overlap([set(pairwise(ids)) for ids in completions]),
        "question words": _overlap([set(exported.rows[name].question.split()) for name in representatives]),
    }


def _overlap(sets: Sequence[set[Any]]) -> Float[np.ndarray, "n n"]:
    return np.array([[1 - len(a & b) / max(1, len(a | b)) if a is not b else 0.0 for b in sets] for a in sets])


def hallucination_rows(exported: Exported, seed: int) -> list[Row]:
    """AUROC of every hallucination score for made-up (1) against trained (0) facts.

    ``auroc`` is over all facts; ``auroc_agreeing`` over those whose majority holds at least 7 of 8 answers, which
    vote share can hardly tell apart.
    """
    from neurosig.organism.tasks import was_trained
    from neurosig.statistics.auroc import AnalysisConfig, auroc_interval

    config = AnalysisConfig(seed=seed, resamples=RESAMPLES)
    questions = list(exported.rows.values())
    made_up = np.array([not was_trained(row.question_id) for row in questions])
    agreeing = np.array([row.vote is not None and row.vote.count / row.vote.n >= 7 / 8 for row in questions])
    rows = []
    for name in questions[0].scores:
        scores = np.array([row.scores[name] for row in questions])
        for metric, mask in (("auroc", np.ones_like(agreeing)), ("auroc_agreeing", agreeing)):
            if len(set(made_up[mask])) == 2:
                interval = auroc_interval(-scores[mask], ~made_up[mask], np.arange(mask.sum()), config)
                rows.append(_row("hallucination", name, metric, interval))
    return rows


def teacher_rows(
    exported: Exported, distances: Mapping[str, Float[np.ndarray, "n n"]], config: StudyConfig
) -> list[Row]:
    """Avg@K of the model on the same questions under different contexts, and its change against random ones.

    Contexts hold `DEMONSTRATIONS` representative rollouts of other questions whose majority holds half of the answers.
    ``same`` and ``other procedure`` are drawn with the truth at hand: the first is the best a pattern signal could do.
    ``same_share`` is the share of examples of the question's own procedure.
    """
    from neurosig.statistics.metrics import paired_mean_interval

    rows = [exported.rows[name] for name in exported.representatives]
    kinds = np.array([row.kind for row in rows])
    allowed = np.array([row.selected for row in rows])[None, :] & ~np.eye(len(rows), dtype=bool)
    if allowed.sum(axis=1).min() < DEMONSTRATIONS:
        raise UserError(f"{config.out}: too few selected questions for a context of {DEMONSTRATIONS}; raise --limit")
    same = kinds[:, None] == kinds[None, :]
    drawn = np.random.default_rng(config.seed).random(same.shape)
    preferences: dict[str, Float[np.ndarray, "n n"]] = {
        "random": drawn,
        "same procedure": drawn + same,
        "other procedure": drawn + ~same,
        "nearest neurons": -distances["neurons"],
        "nearest hidden": -distances["hidden"],
        "nearest bigrams": -distances["completion bigrams"],
    }
    contexts = {
        name: np.argsort(-np.where(allowed, preference, -np.inf), axis=1, kind="stable")[:, DEMONSTRATIONS - 1 :: -1]
        for name, preference in preferences.items()
    }
    accuracy = {"no context": _accuracy(exported, config, None)}
    for name, context in contexts.items():
        accuracy[name] = _accuracy(exported, config, context)
    found = []
    for name, right in accuracy.items():
        found.append(_row("teacher", name, "avg_at_k", _mean_interval(right, config.seed)))
        if name != "random":
            change = paired_mean_interval(right, accuracy["random"], seed=config.seed)
            found.append(_row("teacher", name, "minus_random", change))
        if name == "nearest neurons":
            change = paired_mean_interval(right, accuracy["nearest hidden"], seed=config.seed)
            found.append(_row("teacher", name, "minus_hidden", change))
        if name in contexts:
            share = np.take_along_axis(same, contexts[name], axis=1).mean(axis=1)
            found.append(_row("teacher", name, "same_share", _mean_interval(share, config.seed)))
    return found


def _mean_interval(values: Float[np.ndarray, " n"], seed: int) -> Interval:
    from neurosig.statistics.metrics import paired_mean_interval

    return paired_mean_interval(values, np.zeros(len(values)), seed=seed, resamples=RESAMPLES)


def _accuracy(
    exported: Exported, config: StudyConfig, context: Int[np.ndarray, "n m"] | None
) -> Float[np.ndarray, " n"]:
    """Share of right answers of each question when its prompt holds these solved examples, in this order."""
    from neurosig.models.load import load_model
    from neurosig.questions.load import load_questions
    from neurosig.questions.prompts import Demonstration, PromptBuilder, PromptConfig
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.sampler import Prompt, sample

    loaded = load_model(config.model)
    builder = PromptBuilder(loaded.tokenizer, PromptConfig(instruction=""))
    gold = {question.id: question for question in load_questions("procedures")}
    representatives = exported.representatives
    ids = list(representatives)
    solved = [Demonstration(gold[name], exported.rollouts[name][k].text) for name, k in representatives.items()]
    demonstrations = [[] if context is None else [solved[place] for place in context[i]] for i in range(len(ids))]
    prompts = [
        Prompt(name, builder.teacher(gold[name], shown)) for name, shown in zip(ids, demonstrations, strict=True)
    ]
    sampling = SamplingConfig(config.num_generations, config.temperature, max_new_tokens=96, seed=config.seed)
    right, reader = {}, exported.manifest.header.answer_reader()
    for group in sample(loaded, prompts, sampling, salt="teacher"):
        question = gold[group[0].question_id]
        right[question.id] = float(np.mean(reader.grade(reader.read(group, question), group, question).strict))
    return np.array([right[name] for name in ids])


def _row(part: str, name: str, metric: str, interval: Interval) -> Row:
    numbers = {key: round(getattr(interval, key), 4) for key in ("estimate", "low", "high")}
    return {"part": part, "name": name, "metric": metric, **numbers, "n": interval.n, "seed": interval.seed}


if __name__ == "__main__":
    sys.exit(run_command(StudyConfig, main, presets={}, prog="python -m neurosig.organism.study"))
