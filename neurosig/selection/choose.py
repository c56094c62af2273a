"""Which questions to learn from, and which solved examples the teacher sees for each.

The clean filter keeps questions whose majority answer the neurons trust; the context policy then picks, for each of
them, trajectories of other clean questions that reason alike (reconstruction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.manifest import Reason
from neurosig.neurons.contributions import PAD
from neurosig.patterns.signatures import Signature
from neurosig.patterns.similarity import jaccard, rank_neighbours
from neurosig.questions.answers import Vote
from neurosig.runtime.errors import UserError

CleanFilter = Literal["neuron", "vote_only", "neuron_only", "threshold", "all"]
QuestionWeight = Literal["uniform", "vote_share"]
ContextPolicy = Literal["nearest", "nearest_first", "random", "random_within_kind", "majority_solution", "none"]


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """Options of the clean filter and the teacher's context; all are recorded in the manifest.

    Attributes:
        clean_filter: ``neuron`` needs ``min_vote_share`` and keeps the cleanest ``keep_fraction`` of what is left
            by hallucination score; ``vote_only`` and ``neuron_only`` use one of the two conditions; ``threshold``
            needs ``min_vote_share`` and a score of at most ``max_score``; ``all`` keeps every question.
        min_vote_share: Least share of the K answers that the majority holds.
        keep_fraction: Share of the questions kept by the score.
        max_score: Largest score kept by ``threshold``.
        signature: What similarity compares; see `neurosig.patterns.signatures.signature`.
        context_policy: ``nearest`` shows the most similar last; ``random_within_kind`` draws among questions of
            the same kind, the control for matching by topic alone; ``majority_solution`` shows the question's own
            shortest majority rollout (U-OPSD).
        num_demonstrations: Solved examples a context holds.
        max_context_tokens: The least similar examples are dropped until a context has at most this many tokens.
        same_label_excluded: No example has the question's own pseudo-label, so that none can hand it the answer.
        question_weight: A selected question's weight in the loss: 1, or its majority's share of the K answers.
        seed: Seed of the random policies.
    """

    clean_filter: CleanFilter = "neuron"
    min_vote_share: float = 0.5
    keep_fraction: float = 0.5
    max_score: float = 0.5
    signature: Signature = "representative"
    context_policy: ContextPolicy = "nearest"
    num_demonstrations: int = 2
    max_context_tokens: int = 2048
    same_label_excluded: bool = False
    question_weight: QuestionWeight = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("min_vote_share", 0 <= self.min_vote_share <= 1, "0 to 1"),
            ("keep_fraction", 0 < self.keep_fraction <= 1, "above 0 and at most 1"),
            ("num_demonstrations", self.num_demonstrations >= 1, "at least 1 (or --context-policy none)"),
            ("max_context_tokens", self.max_context_tokens >= 1, "at least 1 (or --context-policy none)"),
        ):
            if not valid:
                raise UserError(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A traced question as selection sees it.

    Attributes:
        question_id: Its id.
        text_sha256: Hash of its text; near-duplicates share it and never serve each other.
        kind: Its kind or, without one, its domain.
        vote: Majority vote.
        score: Hallucination score, higher is worse.
        representative: Index of the majority rollout with the lowest hallucination score; ``None`` without a vote.
        shortest: Index of the shortest majority rollout.
        signature: Neurons of the pattern signature.
        hidden: Mean hidden state of the representative.
        num_tokens: Tokens of its prompt and representative: what it costs as an example.
    """

    question_id: str
    text_sha256: str
    kind: str
    vote: Vote
    score: float
    representative: int | None
    shortest: int | None
    signature: Int[Tensor, " neurons"]
    hidden: Float[Tensor, " d_model"]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """One solved example of a context: whose rollout, and how similar."""

    question_id: str
    rollout_id: int
    similarity: float


def clean_reasons(candidates: Sequence[Candidate], config: SelectionConfig) -> list[Reason]:
    """``selected``, or why a question is not clean, for each candidate."""
    if config.clean_filter == "all":
        return ["selected"] * len(candidates)
    reasons: list[Reason] = [_vote_reason(candidate.vote, config) for candidate in candidates]
    if config.clean_filter == "vote_only":
        return reasons
    passed = [index for index, reason in enumerate(reasons) if reason == "selected"]
    if config.clean_filter == "threshold":
        dirty = [index for index in passed if candidates[index].score > config.max_score]
    else:
        ranked = sorted(passed, key=lambda index: (candidates[index].score, candidates[index].question_id))
        dirty = ranked[math.ceil(config.keep_fraction * len(passed)) :]
    for index in dirty:
        reasons[index] = "hallucination"
    return reasons


def choose_contexts(
    candidates: Sequence[Candidate], clean: Sequence[bool], config: SelectionConfig
) -> list[list[Demonstrated]]:
    """The teacher's context of each clean question, in prompt order; empty for the others and for ``none``."""
    if config.context_policy == "none":
        return [[] for _ in candidates]
    if config.context_policy == "majority_solution":
        return [_own_solution(candidate) if keep else [] for candidate, keep in zip(candidates, clean, strict=True)]
    pool = [index for index, keep in enumerate(clean) if keep and candidates[index].representative is not None]
    students = [index for index, keep in enumerate(clean) if keep]
    contexts: list[list[Demonstrated]] = [[] for _ in candidates]
    if not pool or not students:
        return contexts
    similarity = _similarity(candidates, students, pool, config)
    forbidden = _forbidden(candidates, students, pool, config)
    preference = _preference(similarity, candidates, students, pool, config)
    order, values = rank_neighbours(preference, forbidden, config.num_demonstrations)
    for row, student in enumerate(students):
        allowed = order[row][values[row] > -torch.inf].tolist()
        allowed = _within_budget(allowed, [candidates[pool[column]].num_tokens for column in allowed], config)
        shown = [_demonstrated(candidates[pool[column]], float(similarity[row, column])) for column in allowed]
        contexts[student] = shown if config.context_policy == "nearest_first" else shown[::-1]
    return contexts


def _vote_reason(vote: Vote, config: SelectionConfig) -> Reason:
    if vote.winner is None:
        return "no_parse"
    if config.clean_filter == "neuron_only":
        return "selected"
    if len(vote.tied) > 1:
        return "tie"
    return "selected" if vote.share >= config.min_vote_share else "low_agreement"


def _own_solution(candidate: Candidate) -> list[Demonstrated]:
    return [] if candidate.shortest is None else [Demonstrated(candidate.question_id, candidate.shortest, 1.0)]


def _within_budget(ranked: list[int], tokens: list[int], config: SelectionConfig) -> list[int]:
    """The best-ranked examples, as many as fit the budget together."""
    total = np.cumsum(tokens)
    return [column for column, used in zip(ranked, total, strict=True) if used <= config.max_context_tokens]


def _similarity(
    candidates: Sequence[Candidate], students: list[int], pool: list[int], config: SelectionConfig
) -> Float[Tensor, "students pool"]:
    if config.signature == "hidden_state":
        rows, columns = (
            torch.nn.functional.normalize(torch.stack([candidates[index].hidden.float() for index in side]), dim=-1)
            for side in (students, pool)
        )
        return rows @ columns.T
    rows, columns = (
        torch.nn.utils.rnn.pad_sequence(
            [candidates[index].signature for index in side], batch_first=True, padding_value=PAD
        )
        for side in (students, pool)
    )
    return jaccard(rows, columns)


def _forbidden(
    candidates: Sequence[Candidate], students: list[int], pool: list[int], config: SelectionConfig
) -> Bool[Tensor, "students pool"]:
    """The question itself and its duplicates in text are never its own context; with the option, nor its label."""
    same = _equal([candidates[i].text_sha256 for i in students], [candidates[i].text_sha256 for i in pool])
    if config.same_label_excluded:
        same |= _equal(*([str(candidates[i].vote.winner) for i in side] for side in (students, pool)))
    return same


def _preference(
    similarity: Float[Tensor, "students pool"],
    candidates: Sequence[Candidate],
    students: list[int],
    pool: list[int],
    config: SelectionConfig,
) -> Float[Tensor, "students pool"]:
    """What the policy ranks by, higher first."""
    if config.context_policy in ("nearest", "nearest_first"):
        return similarity
    drawn = torch.from_numpy(np.random.default_rng(config.seed).random(similarity.shape, dtype=np.float32))
    if config.context_policy == "random":
        return drawn
    return drawn + _equal([candidates[i].kind for i in students], [candidates[i].kind for i in pool]).float()


def _equal(rows: Sequence[str], columns: Sequence[str]) -> Bool[Tensor, "rows columns"]:
    codes = {text: code for code, text in enumerate(dict.fromkeys([*rows, *columns]))}
    left, right = (torch.tensor([codes[text] for text in texts]) for texts in (rows, columns))
    return left[:, None] == right


def _demonstrated(candidate: Candidate, similarity: float) -> Demonstrated:
    assert candidate.representative is not None
    return Demonstrated(candidate.question_id, candidate.representative, round(similarity, 6))
