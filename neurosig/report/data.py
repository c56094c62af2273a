"""The numbers of the report, from an export: signals, calibration, layers and examples.

Gold answers are not in the export; callers read them from the question files (`neurosig.exported.join_gold`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from neurosig.exported import Exported
from neurosig.manifest import QuestionRow
from neurosig.questions.answers import is_correct
from neurosig.questions.load import Question
from neurosig.registry import ContextScore
from neurosig.report.signal_table import Signal, SignalKind
from neurosig.statistics.auroc import token_overlap

NEURON_LEVEL = frozenset(
    {"probe_score", "agreement", "agreement_majority", "knn_medoid", "neuron_count", "teacher_set_size"}
)
OUTPUT_LEVEL = frozenset({"vote_share", "mean_logprob", "entropy", "self_certainty", "length", "token_overlap"})
CONTROLS = frozenset({"random"})


@dataclass(frozen=True, slots=True)
class LevelData:
    """Signals and labels at one level: of n questions, or of n rollouts.

    Attributes:
        signals: All signals, higher is more trustworthy.
        right: Whether the majority, or the rollout, is right; ``None`` without gold answers.
        owners: Index of each row's question, from 0 without gaps.
        confounders: Correlated with every signal: ``length`` in tokens, ``vote_share``, ``token_overlap``.
    """

    signals: tuple[Signal, ...]
    right: Bool[np.ndarray, " n"] | None
    owners: Int[np.ndarray, " n"]
    confounders: Mapping[str, Float[np.ndarray, " n"]]


@dataclass(frozen=True, slots=True)
class Bin:
    """Questions whose majority has the same number of votes.

    Attributes:
        confidence: The majority's share of the K answers.
        n: Number of these questions.
        right: Number of right majorities.
        low: Lower end of the 95% Wilson interval of the accuracy.
        high: Its upper end.
    """

    confidence: float
    n: int
    right: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's part in the probe and in the active sets.

    Attributes:
        layer: Its index.
        to_hallucination: Probe neurons with a positive weight.
        to_trust: Probe neurons with a negative weight.
        contribution: Mean contribution of its active neurons.
        difference: Mean contribution on split questions minus that on agreeing ones, in standard deviations over
            questions; ``None`` where one side has fewer than two questions.
    """

    layer: int
    to_hallucination: int
    to_trust: int
    contribution: float
    difference: float | None


@dataclass(frozen=True, slots=True)
class RolloutExample:
    """A rollout of an example."""

    text: str
    answer: str | None
    right: bool | None


@dataclass(frozen=True, slots=True)
class DemonstrationExample:
    """A demonstration in an example's context, and how similar its question is."""

    question: str
    text: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its rollouts and, if it is selected, its demonstrations in prompt order."""

    row: QuestionRow
    score: float
    gold: str | None
    right: bool | None
    rollouts: tuple[RolloutExample, ...]
    context: tuple[DemonstrationExample, ...]


def question_level(exported: Exported, gold: Mapping[str, Question]) -> LevelData:
    """Signals per question: minus each hallucination score of the manifest, minus length, and text overlap.

    The label is whether the majority answer is right. With any gold answers, only questions that have one are used.
    """
    rows = [row for row in exported.rows.values() if not gold or row.question_id in gold]
    groups = [exported.rollouts[row.question_id] for row in rows]
    length = np.array([np.mean([len(rollout.completion_ids_without_eos) for rollout in group]) for group in groups])
    overlap = np.array(
        [token_overlap([rollout.completion_ids_without_eos for rollout in group]).mean() for group in groups]
    )
    names = [name for name in rows[0].scores if name not in get_args(ContextScore)]  # `effects` judges those
    by_name = {
        name: -np.array([row.scores[name] for row in rows]) for name in names if all(name in row.scores for row in rows)
    }
    by_name = {"length": -length, **by_name, "token_overlap": overlap}
    right = np.array([is_correct(row.pseudo_label, gold[row.question_id]) for row in rows]) if gold else None
    vote = np.array([row.vote.count / row.vote.n for row in rows if row.vote is not None])
    confounders = {"length": length, "vote_share": vote, "token_overlap": overlap}
    return LevelData(_signals(by_name), right, np.arange(len(rows)), confounders)


def rollout_level(exported: Exported, gold: Mapping[str, Question]) -> LevelData:
    """Signals per rollout; the label is whether it is right, ``vote_share`` is that of the rollout's own answer."""
    rows = [row for row in exported.rows.values() if not gold or row.question_id in gold]
    groups = [exported.rollouts[row.question_id] for row in rows]
    flat = [rollout for group in groups for rollout in group]
    votes = [Counter[str | None](answer for answer in row.answers if answer is not None) for row in rows]
    share = np.array(
        [count[answer] / len(row.answers) for row, count in zip(rows, votes, strict=True) for answer in row.answers]
    )
    length = np.array([float(len(rollout.completion_ids_without_eos)) for rollout in flat])
    overlap = np.concatenate(
        [token_overlap([rollout.completion_ids_without_eos for rollout in group]) for group in groups]
    )
    places = [exported.place[rollout.question_id, rollout.rollout_id] for rollout in flat]
    by_name = {"probe_score": -exported.signals.probe_scores[places].double().numpy(), "vote_share": share}
    for name, sign in (("mean_logprob", 1), ("mean_entropy", -1), ("mean_self_certainty", 1)):
        values = [getattr(rollout, name) for rollout in flat]
        if None not in values:
            by_name[name if name == "mean_logprob" else name.removeprefix("mean_")] = sign * np.array(
                values, np.float64
            )
    by_name |= {"length": -length, "token_overlap": overlap}
    right = None
    if gold:
        right = np.array([is_correct(answer, gold[row.question_id]) for row in rows for answer in row.answers])
    owners = np.repeat(np.arange(len(rows)), [len(group) for group in groups])
    return LevelData(
        _signals(by_name), right, owners, {"length": length, "vote_share": share, "token_overlap": overlap}
    )


def reliability(exported: Exported, gold: Mapping[str, Question]) -> list[Bin]:
    """Accuracy of the majorities with each number of votes."""
    by_votes: dict[tuple[int, int], list[bool]] = {}
    for row in exported.rows.values():
        if row.vote is not None and row.question_id in gold:
            by_votes.setdefault((row.vote.count, row.vote.n), []).append(
                is_correct(row.pseudo_label, gold[row.question_id])
            )
    bins = []
    for (count, k), right in sorted(by_votes.items()):
        interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        bins.append(Bin(count / k, len(right), sum(right), float(interval.low), float(interval.high)))
    return bins


def layer_profile(exported: Exported) -> list[Layer]:
    """Probe neurons and contributions of each layer, for agreeing and split questions as the probe defines them."""
    signals, neurons, options = exported.signals, exported.neurons, exported.manifest.header.options
    index_of = {name: index for index, name in enumerate(exported.rows)}
    owners = np.array([index_of[question_id] for question_id, _ in exported.place])
    flat, size = signals.neuron_ids.numpy().ravel(), len(index_of) * signals.n_layers
    cells = np.repeat(owners, signals.neuron_ids.shape[1]) * signals.n_layers + flat // signals.d_mlp
    kept = flat >= 0
    counts = np.bincount(cells[kept], minlength=size).reshape(len(index_of), signals.n_layers)
    totals = np.bincount(cells[kept], signals.contributions.float().numpy().ravel()[kept], minlength=size)
    totals = totals.reshape(counts.shape)
    means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
    shares = np.array([row.vote.count / row.vote.n for row in exported.rows.values() if row.vote is not None])
    agree, split = shares >= options["probe_agree_share"], shares < options["probe_split_share"]
    signs = Counter(zip(neurons["layer"].tolist(), (neurons["weight"] > 0).tolist(), strict=True))
    return [
        Layer(
            layer,
            signs[layer, True],
            signs[layer, False],
            float(totals[:, layer].sum() / max(1, counts[:, layer].sum())),
            _standardised_difference(means[split, layer], means[agree, layer]),
        )
        for layer in range(signals.n_layers)
    ]


def examples(
    exported: Exported, gold: Mapping[str, Question], count: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The selected questions that the ranking score puts first, and the questions that it puts last."""
    options = exported.manifest.header.options
    score, sign = str(options["hallucination_score"]), -1 if options.get("keep_scores") == "highest" else 1
    scored = [row for row in exported.rows.values() if score in row.scores]
    ranked = sorted(scored, key=lambda row: (sign * row.scores[score], row.question_id))
    selected_rows = [row for row in ranked if row.selected][:count]
    suspect = [row for row in reversed(ranked) if row not in selected_rows][:count]
    return (
        tuple(_example(exported, gold, row, row.scores[score]) for row in selected_rows),
        tuple(_example(exported, gold, row, row.scores[score]) for row in suspect),
    )


def _example(exported: Exported, gold: Mapping[str, Question], row: QuestionRow, score: float) -> Example:
    question = gold.get(row.question_id)

    def is_right(answer: str | None) -> bool | None:
        return None if question is None else is_correct(answer, question)

    rollouts = tuple(
        RolloutExample(rollout.text, answer, is_right(answer))
        for rollout, answer in zip(exported.rollouts[row.question_id], row.answers, strict=True)
    )
    context = tuple(
        DemonstrationExample(
            exported.rows[item.question_id].question,
            exported.rollouts[item.question_id][item.rollout_id].text,
            item.similarity,
        )
        for item in row.context
    )
    answer = None if question is None else question.answer
    return Example(row, score, answer, is_right(row.pseudo_label), rollouts, context)


def _signals(by_name: Mapping[str, Float[np.ndarray, " n"]]) -> tuple[Signal, ...]:
    """Signals in the order of their kinds."""
    known: Mapping[SignalKind, frozenset[str]] = {"neuron": NEURON_LEVEL, "output": OUTPUT_LEVEL, "control": CONTROLS}
    kinds = {name: kind for kind, names in known.items() for name in names}
    found = [Signal(name, values, kinds.get(name, "other"), name == "probe_score") for name, values in by_name.items()]
    return tuple(sorted(found, key=lambda signal: get_args(SignalKind).index(signal.kind)))


def _standardised_difference(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float | None:
    """Cohen's d: difference of the means over the pooled standard deviation."""
    if min(len(a), len(b)) < 2:
        return None
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    return float((a.mean() - b.mean()) / pooled) if pooled > 0 else 0.0
