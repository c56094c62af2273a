"""Which questions to learn from: those whose majority answer the neurons trust (reconstruction)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from neurosig.manifest import Reason
from neurosig.questions.vote import Vote
from neurosig.runtime.files import sha256_text
from neurosig.selection.config import SelectionConfig

DECIMALS = 6
"""Decimals of a score in the manifest; selection compares no more of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A traced question, as selection uses it.

    Attributes:
        question_id: Its id.
        text_sha256: Hash of its text; questions with the same hash are never demonstrations of each other.
        kind: Its kind or, without one, its domain.
        vote: Majority vote.
        score: Hallucination score, higher is less trustworthy; ``None`` where it holds no information.
        representative: Index of the majority rollout with the lowest hallucination score, of those that may be one;
            ``None`` without a vote, or where every one was cut off.
        shortest: Index of the one among them whose demonstration is the shortest.
        signature: Neurons of its signature.
        hidden: Mean hidden state of the representative.
        num_tokens: Tokens of its prompt and of what its representative shows: its cost as a demonstration.
    """

    question_id: str
    text_sha256: str
    kind: str
    vote: Vote
    score: float | None
    representative: int | None
    shortest: int | None
    signature: Int[Tensor, " neurons"]
    hidden: Float[Tensor, " d_model"]
    num_tokens: int


def selection_reasons(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[list[Reason], str]:
    """For each candidate ``selected`` or the reason against it, and what the score could not decide (`score_cut`)."""
    if config.question_filter == "all":
        return ["selected"] * len(candidates), ""
    reasons: list[Reason] = [_reason(candidate, config) for candidate in candidates]
    if config.question_filter == "vote_only":
        return reasons, ""
    passed = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if reason == "selected"]
    rejected, undecided = score_cut(passed, config)
    reasons = [
        "hallucination" if candidate.question_id in rejected else reason
        for candidate, reason in zip(candidates, reasons, strict=True)
    ]
    return reasons, undecided


def score_cut(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[set[str], str]:
    """Which questions the score rejects, and what its cut could not decide (empty if it decided everything).

    Scores count to the 6 decimals that the manifest holds. A score without information rejects nothing, nor does one
    that is the same for every question. Of questions that tie at the cut, a hash of seed and id decides, so that
    neither names nor their order do.

    Args:
        candidates: The questions that passed the vote.
        config: How much to keep.
    """
    scores = {candidate.question_id: candidate.score for candidate in candidates}
    known = {name: round(score, DECIMALS) for name, score in scores.items() if score is not None}
    if len(known) < len(scores):
        return set(), f"the score holds no information, so its cut is skipped: {len(scores)} questions pass it"
    if config.question_filter == "threshold":
        return {name for name, score in known.items() if score > config.max_score}, ""
    kept = math.ceil(config.keep_fraction * len(known))
    if kept == len(known):
        return set(), ""
    if len(set(known.values())) == 1:
        return set(), f"all {len(known)} questions have the same score, so its cut is skipped"
    ranked = sorted(known, key=lambda name: (known[name], sha256_text(f"{config.seed}\x00cut\x00{name}")))
    limit, note = known[ranked[kept - 1]], ""
    if known[ranked[kept]] == limit:
        tied = [place for place, name in enumerate(ranked) if known[name] == limit]
        selected = sum(place < kept for place in tied)
        note = (
            f"{len(tied)} questions tie at the cut, score {limit:g}: {selected} of them are selected, drawn by the seed"
        )
    return set(ranked[kept:]), note


def _reason(candidate: Candidate, config: SelectionConfig) -> Reason:
    vote = candidate.vote
    if vote.winner is None:
        return "no_parse"
    if config.question_filter != "neuron_only":
        if vote.n_tied > 1:
            return "tie"
        if vote.share < config.min_vote_share:
            return "low_agreement"
    return "cut_off" if candidate.representative is None else "selected"
