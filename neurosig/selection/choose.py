"""Which questions to learn from: those whose majority answer can be trusted, by votes and scores (reconstruction)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.hallucination.belief import AnswerState
from neurosig.manifest import Reason
from neurosig.patterns.similarity import jaccard
from neurosig.questions.vote import Vote
from neurosig.registry import Registered, find
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text
from neurosig.selection.config import SelectionConfig

VOTE_CONDITION = ("neuron", "vote_only", "threshold")
"""Filters that also ask for a share of the votes."""
NEAREST_ROWS = 512
"""Rows whose cosines are computed at once."""
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
        likeliest: Index of the majority rollout with the highest mean log-probability, of those that may represent.
        state: Hidden states and belief at its representative's answer, where an option needs them.
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
    likeliest: int | None = None
    state: AnswerState | None = None

    def similarity(self, other: Candidate) -> float:
        """Jaccard similarity of two signatures."""
        return float(jaccard(self.signature[None], other.signature[None]))


Decided = Sequence[Reason | bool]
"""For each candidate ``selected`` or the reason against it; of a user's filter also True and False."""


def selection_reasons(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[list[Reason], str]:
    """For each candidate ``selected`` or the reason against it, and what the score could not decide (`score_cut`).

    Raises:
        UserError: A user's filter fails, or returns another number of decisions.
    """
    found = find("filter", config.question_filter)
    if found.sha256 is None:
        reasons, note = found.function(candidates, config)
        return list(reasons), note
    decided = called(found, "decisions", len(candidates), candidates, config)
    return [_reason_of(found.name, one) for one in decided], ""


def called(found: Registered, what: str, n: int, *arguments: Any) -> Sequence[Any]:
    """What a user's function returns, one entry for each of ``n`` questions.

    Raises:
        UserError: It fails, or returns another number of ``what``.
    """
    try:
        returned = list(found.function(*arguments))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{found.name}: {type(error).__name__}: {error}") from error
    if len(returned) != n:
        raise UserError(f"{found.name}: {len(returned)} {what} for {n} questions; return one for each")
    return returned


def _reason_of(name: str, decision: object) -> Reason:
    if decision in get_args(Reason):
        return cast(Reason, decision)
    if isinstance(decision, bool | np.bool_):
        return "selected" if decision else "rejected"
    raise UserError(f"{name}: decided {decision!r}; return True, False or one of {', '.join(get_args(Reason))}")


def before_contexts(candidates: Sequence[Candidate], config: SelectionConfig) -> list[Reason]:
    """``selected`` for the candidates that can still be selected when only votes and rollouts are known."""
    if config.question_filter == "all":
        return ["selected"] * len(candidates)
    return [_reason(candidate, config) for candidate in candidates]


def by_vote(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[list[Reason], str]:
    """The vote condition alone; for ``all``, none."""
    return before_contexts(candidates, config), ""


def by_score(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[list[Reason], str]:
    """The vote condition, unless the filter is without one, then the score's cut."""
    reasons = before_contexts(candidates, config)
    rejected, undecided = score_cut(
        [one for one, why in zip(candidates, reasons, strict=True) if why == "selected"], config
    )
    return [
        "score" if one.question_id in rejected else why for one, why in zip(candidates, reasons, strict=True)
    ], undecided


def not_redundant(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[list[Reason], str]:
    """Drop the question most similar to a kept one, again and again, until ``keep_fraction`` are left.

    Similarity is the cosine of the final-layer states at the answer; of the two nearest the later one is dropped. Time
    is quadratic in the questions, memory linear. Source: REDUNDANCY, INFLOW's reading of DEITA (appendix D).

    Raises:
        UserError: There are no such states.
    """
    reasons = before_contexts(candidates, config)
    places = [place for place, reason in enumerate(reasons) if reason == "selected"]
    kept = drop_nearest(_states(candidates, places, "final"), math.ceil(config.keep_fraction * len(places)))
    return [
        "rejected" if why == "selected" and not bool(kept[places.index(place)]) else why
        for place, why in enumerate(reasons)
    ], ""


def drop_nearest(states: Float[Tensor, "n d"], keep: int) -> Bool[Tensor, " n"]:
    """Which rows stay when the row with the largest cosine to another is dropped until ``keep`` are left."""
    unit = torch.nn.functional.normalize(states.double(), dim=1)
    kept = torch.ones(len(unit), dtype=torch.bool)
    best, nearest = torch.full((len(unit),), -torch.inf, dtype=torch.double), torch.zeros(len(unit), dtype=torch.long)

    def refresh(rows: Tensor) -> None:
        for block in rows.split(NEAREST_ROWS):
            cosine = unit[block] @ unit.T
            cosine[:, ~kept] = -torch.inf
            cosine[torch.arange(len(block)), block] = -torch.inf
            best[block], nearest[block] = cosine.max(dim=1)

    refresh(torch.arange(len(unit)))
    for _ in range(len(unit) - keep):
        one = int(best.argmax())
        dropped = max(one, int(nearest[one]))
        kept[dropped], best[dropped] = False, -torch.inf
        refresh((kept & (nearest == dropped)).nonzero()[:, 0])
    return kept


def _states(candidates: Sequence[Candidate], places: Sequence[int], field: str) -> Float[Tensor, "n d"]:
    states = [candidates[place].state for place in places]
    found = [getattr(state, field) for state in states if state is not None]
    if len(found) < len(states):
        raise UserError("the filter redundancy compares states at the answer, which this export has not measured")
    return torch.stack(found) if found else torch.empty(0, 1)


FILTERS: Mapping[str, Callable[[Sequence[Candidate], SelectionConfig], tuple[Sequence[Reason], str]]] = {
    "neuron": by_score,
    "vote_only": by_vote,
    "neuron_only": by_score,
    "threshold": by_score,
    "redundancy": not_redundant,
    "all": by_vote,
}
"""Which candidates are selected; a user's function returns a `Decided` without the note."""


def score_cut(candidates: Sequence[Candidate], config: SelectionConfig) -> tuple[set[str], str]:
    """Which questions the score rejects, and what its cut could not decide (empty if it decided everything).

    The lowest scores are kept, or with ``keep_scores`` the highest. They count to the 6 decimals that the manifest
    holds. A score without information rejects nothing, nor does one
    that is the same for every question. Of questions that tie at the cut, a hash of seed and id decides, so that
    neither names nor their order do.

    Args:
        candidates: The questions that passed the vote.
        config: How much to keep.
    """
    scores = {candidate.question_id: candidate.score for candidate in candidates}
    sign = 1 if config.keep_scores == "lowest" else -1
    known = {name: sign * round(score, DECIMALS) for name, score in scores.items() if score is not None}
    if len(known) < len(scores):
        return set(), f"the score holds no information, so its cut is skipped: {len(scores)} questions pass it"
    if config.question_filter == "threshold":
        return {name for name, score in known.items() if score > sign * config.max_score}, ""
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
        at = f"{len(tied)} questions tie at the cut, score {sign * limit:g}"
        note = f"{at}: {selected} of them are selected, drawn by the seed"
    return set(ranked[kept:]), note


def _reason(candidate: Candidate, config: SelectionConfig) -> Reason:
    vote = candidate.vote
    if vote.winner is None:
        return "no_parse"
    if config.question_filter in VOTE_CONDITION:
        if vote.n_tied > 1:
            return "tie"
        if vote.share < config.min_vote_share:
            return "low_agreement"
    return "cut_off" if candidate.representative is None else "selected"
