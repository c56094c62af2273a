"""Which questions to learn from: those whose majority answer the neurons trust (reconstruction)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from neurosig.manifest import Reason
from neurosig.questions.vote import Vote
from neurosig.selection.config import SelectionConfig


@dataclass(frozen=True, slots=True)
class Candidate:
    """A traced question, as selection uses it.

    Attributes:
        question_id: Its id.
        text_sha256: Hash of its text; questions with the same hash are never demonstrations of each other.
        kind: Its kind or, without one, its domain.
        vote: Majority vote.
        score: Hallucination score, higher is less trustworthy.
        representative: Index of the majority rollout with the lowest hallucination score; ``None`` without a vote.
        shortest: Index of the shortest majority rollout.
        signature: Neurons of its signature.
        hidden: Mean hidden state of the representative.
        num_tokens: Tokens of its prompt and representative: its cost as a demonstration.
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


def selection_reasons(candidates: Sequence[Candidate], config: SelectionConfig) -> list[Reason]:
    """For each candidate ``selected`` or the reason why it is not."""
    if config.question_filter == "all":
        return ["selected"] * len(candidates)
    reasons: list[Reason] = [_vote_reason(candidate.vote, config) for candidate in candidates]
    if config.question_filter == "vote_only":
        return reasons
    passed = [index for index, reason in enumerate(reasons) if reason == "selected"]
    if config.question_filter == "threshold":
        rejected = [index for index in passed if candidates[index].score > config.max_score]
    else:
        ranked = sorted(passed, key=lambda index: (candidates[index].score, candidates[index].question_id))
        rejected = ranked[math.ceil(config.keep_fraction * len(passed)) :]
    for index in rejected:
        reasons[index] = "hallucination"
    return reasons


def _vote_reason(vote: Vote, config: SelectionConfig) -> Reason:
    if vote.winner is None:
        return "no_parse"
    if config.question_filter == "neuron_only":
        return "selected"
    if vote.n_tied > 1:
        return "tie"
    return "selected" if vote.share >= config.min_vote_share else "low_agreement"
