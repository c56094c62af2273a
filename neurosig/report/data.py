"""From a manifest folder to what its report shows: signals, calibration, layers, neurons and examples.

Everything but the gold answers is in the manifest. They are read again from the question files, for these numbers only.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from scipy import stats

from neurosig.manifest import NEURONS, SIGNALS, Manifest, QuestionRow
from neurosig.questions.answers import is_correct
from neurosig.questions.load import Question, load_questions
from neurosig.report.signal_table import Signal, SignalKind
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics.auroc import token_overlap

OUTPUT_LEVEL = frozenset({"vote_share", "mean_logprob", "entropy", "self_certainty", "length", "token_overlap"})
CONTROLS = frozenset({"random"})


@dataclass(frozen=True, slots=True)
class Level:
    """What is analysed at one level: n questions, or n rollouts.

    Attributes:
        signals: All signals, higher is more trustworthy.
        right: Whether the majority, or the rollout, is right; ``None`` without gold answers.
        owners: Index of each row's question, from 0 without gaps.
        confounders: What the signals are correlated with: ``length`` in tokens, ``vote_share``, ``token_overlap``.
    """

    signals: tuple[Signal, ...]
    right: Bool[np.ndarray, " n"] | None
    owners: Int[np.ndarray, " n"]
    confounders: Mapping[str, Float[np.ndarray, " n"]]


@dataclass(frozen=True, slots=True)
class Bin:
    """Majorities with one number of votes: their share of the votes, how many, how many right, Wilson interval."""

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
class Traced:
    """What the report reads of ``signals.safetensors``, in the order of the rollouts; see
    `neurosig.neurons.signals_file`.
    """

    ids: Int[np.ndarray, "n size"]
    values: Float[np.ndarray, "n size"]
    hidden: Float[np.ndarray, "n d_model"]
    probe: Float[np.ndarray, " n"]
    n_layers: int
    d_mlp: int


@dataclass(frozen=True, slots=True)
class Said:
    """A rollout as an example shows it."""

    text: str
    answer: str | None
    right: bool | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A solved question in an example's context, and why it is there."""

    question: str
    text: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its rollouts and, if it is clean, its context in prompt order."""

    row: QuestionRow
    score: float
    gold: str | None
    right: bool | None
    rollouts: tuple[Said, ...]
    context: tuple[Shown, ...]


def voted(manifest: Manifest) -> list[QuestionRow]:
    """The questions that were sampled and traced: all but those too long."""
    return [row for row in manifest.rows if row.vote is not None]


def rollouts_of(manifest: Manifest, rows: Sequence[QuestionRow]) -> list[list[Rollout]]:
    """The K rollouts of each question."""
    return [[manifest.rollouts[row.id, index] for index in range(len(row.answers))] for row in rows]


def join_gold(
    manifest: Manifest, sources: Sequence[str], *, required: bool = False
) -> tuple[dict[str, Question], str | None]:
    """Questions with gold answers by id, and why some or all are missing (``None`` when none is).

    Args:
        manifest: The manifest.
        sources: Question files or bundled sets; see `neurosig.questions.load.load_questions`.
        required: Raise when they cannot be read.

    Raises:
        UserError: ``required``, and a source is missing or malformed.
    """
    try:
        found = {q.id: q for q in load_questions(sources, split=str(manifest.header.options.get("split", "all")))}
    except UserError as error:
        if required:
            raise
        return {}, f"{error}; name the question files with --questions"
    rows = voted(manifest)
    gold = {}
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        match = found.get(row.id)
        if match is None:
            lacking["not in the question files"].append(f'"{row.id}"')
        elif match.text_sha256 != row.text_sha256:
            lacking["there with another text"].append(f'"{row.id}" on line {match.line}')
        elif match.answer is None:
            lacking["there without an answer"].append(f'"{row.id}" on line {match.line}')
        else:
            gold[row.id] = match
    if not lacking:
        return gold, None
    parts = ", ".join(f"{len(which)} {what} (the first is {which[0]})" for what, which in lacking.items())
    return gold, f"of {len(rows)} questions {parts} ({', '.join(sources)})"


def read_traced(manifest: Manifest) -> Traced:
    """The traced signals of a manifest.

    Raises:
        UserError: The file is damaged, lacks a tensor, or has another number of rollouts.
    """
    path = manifest.folder / SIGNALS
    try:
        with safe_open(path, framework="numpy") as stored:
            sites = json.loads((stored.metadata() or {})["sites"])
            traced = Traced(
                stored.get_tensor("ids"),
                stored.get_tensor("values").astype(np.float32),
                stored.get_tensor("hidden").astype(np.float32),
                stored.get_tensor("probe"),
                sites["n_layers"],
                sites["d_mlp"],
            )
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not what neurosig.export writes ({error}); export again") from error
    if len(traced.ids) != len(manifest.rollouts):
        raise UserError(f"{path}: {len(traced.ids)} rows for {len(manifest.rollouts)} rollouts; export again")
    return traced


def read_neurons(folder: Path) -> list[dict[str, float]]:
    """The probe's neurons, heaviest first, with every column that ``neurons.csv`` has."""
    with (folder / NEURONS).open(newline="", encoding="utf-8") as handle:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(handle)]


def question_level(manifest: Manifest, gold: Mapping[str, Question]) -> Level:
    """Every hallucination score of the manifest, turned into trust, and text overlap; right: the majority is.

    With any gold answers only the questions that have one are used.
    """
    rows = [row for row in voted(manifest) if not gold or row.id in gold]
    groups = rollouts_of(manifest, rows)
    length = np.array([np.mean([len(rollout.body_ids) for rollout in group]) for group in groups])
    overlap = np.array([token_overlap([rollout.body_ids for rollout in group]).mean() for group in groups])
    trust = {name: -np.array([row.scores[name] for row in rows]) for name in rows[0].scores}
    trust = {"length": -length, **trust, "token_overlap": overlap}
    right = np.array([is_correct(row.pseudo_label, gold[row.id]) for row in rows]) if gold else None
    vote = np.array([row.vote.count / row.vote.n for row in rows if row.vote is not None])
    confounders = {"length": length, "vote_share": vote, "token_overlap": overlap}
    return Level(_signals(trust), right, np.arange(len(rows)), confounders)


def rollout_level(manifest: Manifest, traced: Traced, gold: Mapping[str, Question]) -> Level:
    """Signals of single rollouts; right: the rollout is. ``vote_share`` is that of the rollout's own answer."""
    rows = [row for row in voted(manifest) if not gold or row.id in gold]
    groups = rollouts_of(manifest, rows)
    flat = [rollout for group in groups for rollout in group]
    votes = [Counter[str | None](answer for answer in row.answers if answer is not None) for row in rows]
    share = np.array(
        [count[answer] / len(row.answers) for row, count in zip(rows, votes, strict=True) for answer in row.answers]
    )
    length = np.array([float(len(rollout.body_ids)) for rollout in flat])
    overlap = np.concatenate([token_overlap([rollout.body_ids for rollout in group]) for group in groups])
    place = {key: index for index, key in enumerate(manifest.rollouts)}
    probe = traced.probe[[place[rollout.question_id, rollout.rollout_id] for rollout in flat]]
    trust = {"probe": -probe.astype(np.float64), "vote_share": share}
    for name, sign in (("mean_logprob", 1), ("mean_entropy", -1), ("mean_self_certainty", 1)):
        values = [getattr(rollout, name) for rollout in flat]
        if None not in values:
            trust[name if name == "mean_logprob" else name.removeprefix("mean_")] = sign * np.array(values, np.float64)
    trust |= {"length": -length, "token_overlap": overlap}
    right = None
    if gold:
        right = np.array([is_correct(answer, gold[row.id]) for row in rows for answer in row.answers])
    owners = np.repeat(np.arange(len(rows)), [len(group) for group in groups])
    return Level(_signals(trust), right, owners, {"length": length, "vote_share": share, "token_overlap": overlap})


def reliability(manifest: Manifest, gold: Mapping[str, Question]) -> list[Bin]:
    """How often a majority of each size is right."""
    found: dict[tuple[int, int], list[bool]] = {}
    for row in voted(manifest):
        if row.vote is not None and row.id in gold:
            found.setdefault((row.vote.count, row.vote.n), []).append(is_correct(row.pseudo_label, gold[row.id]))
    bins = []
    for (count, k), right in sorted(found.items()):
        interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        bins.append(Bin(count / k, len(right), sum(right), float(interval.low), float(interval.high)))
    return bins


def layer_profile(manifest: Manifest, traced: Traced, neurons: Sequence[Mapping[str, float]]) -> list[Layer]:
    """Probe neurons and contributions of each layer; agreeing and split questions as the probe was told."""
    rows = voted(manifest)
    owner_of = {row.id: index for index, row in enumerate(rows)}
    owners = np.array([owner_of[question_id] for question_id, _ in manifest.rollouts])
    flat, size = traced.ids.ravel(), len(rows) * traced.n_layers
    cells = np.repeat(owners, traced.ids.shape[1]) * traced.n_layers + flat // traced.d_mlp
    kept = flat >= 0
    counts = np.bincount(cells[kept], minlength=size).reshape(len(rows), traced.n_layers)
    totals = np.bincount(cells[kept], traced.values.ravel()[kept], minlength=size).reshape(counts.shape)
    means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
    shares = np.array([row.vote.count / row.vote.n for row in rows if row.vote is not None])
    agree = shares >= manifest.header.options["probe_agree_share"]
    split = shares < manifest.header.options["probe_split_share"]
    signs = Counter((int(neuron["layer"]), neuron["weight"] > 0) for neuron in neurons)
    return [
        Layer(
            layer,
            signs[layer, True],
            signs[layer, False],
            float(totals[:, layer].sum() / max(1, counts[:, layer].sum())),
            _standardised_difference(means[split, layer], means[agree, layer]),
        )
        for layer in range(traced.n_layers)
    ]


def examples(
    manifest: Manifest, gold: Mapping[str, Question], count: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The cleanest selected questions and the most suspect of all, by the score that the clean filter ranked by."""
    score = str(manifest.header.options["hallucination_score"])
    ranked = sorted(voted(manifest), key=lambda row: (row.scores[score], row.id))
    clean = [row for row in ranked if row.selected][:count]
    suspect = [row for row in reversed(ranked) if row not in clean][:count]
    by_id = {row.id: row for row in manifest.rows}
    return (
        tuple(_example(manifest, by_id, gold, row, row.scores[score]) for row in clean),
        tuple(_example(manifest, by_id, gold, row, row.scores[score]) for row in suspect),
    )


def _example(
    manifest: Manifest,
    by_id: Mapping[str, QuestionRow],
    gold: Mapping[str, Question],
    row: QuestionRow,
    score: float,
) -> Example:
    question = gold.get(row.id)

    def judged(answer: str | None) -> bool | None:
        return None if question is None else is_correct(answer, question)

    said = tuple(
        Said(rollout.text, answer, judged(answer))
        for rollout, answer in zip(rollouts_of(manifest, [row])[0], row.answers, strict=True)
    )
    context = tuple(
        Shown(
            by_id[item.question_id].question,
            manifest.rollouts[item.question_id, item.rollout_id].text,
            item.similarity,
        )
        for item in row.context
    )
    answer = None if question is None else question.answer
    return Example(row, score, answer, judged(row.pseudo_label), said, context)


def _signals(trust: Mapping[str, Float[np.ndarray, " n"]]) -> tuple[Signal, ...]:
    """Signals in the order of their kinds: neurons, outputs, controls."""

    def kind(name: str) -> SignalKind:
        return "output" if name in OUTPUT_LEVEL else "control" if name in CONTROLS else "neuron"

    order: list[SignalKind] = ["neuron", "output", "control"]
    found = [Signal(name, values, kind(name)) for name, values in trust.items()]
    return tuple(sorted(found, key=lambda signal: order.index(signal.kind)))


def _standardised_difference(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float | None:
    """Cohen's d: difference of the means over the pooled standard deviation."""
    if min(len(a), len(b)) < 2:
        return None
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    return float((a.mean() - b.mean()) / pooled) if pooled > 0 else 0.0
