"""Which solved demonstrations the teacher sees for each selected question (reconstruction)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neurosig.manifest import DemonstrationRecord
from neurosig.neurons.contributions import PAD
from neurosig.patterns.similarity import jaccard, rank_neighbours
from neurosig.selection.choose import Candidate
from neurosig.selection.config import SelectionConfig


def choose_contexts(
    candidates: Sequence[Candidate], selected: Sequence[bool], config: SelectionConfig
) -> list[list[DemonstrationRecord]]:
    """The teacher's context of each selected question in prompt order; empty for the others and for ``none``."""
    if config.context_policy == "none":
        return [[] for _ in candidates]
    if config.context_policy == "majority_solution":
        return [_own_solution(candidate) if keep else [] for candidate, keep in zip(candidates, selected, strict=True)]
    pool = [index for index, keep in enumerate(selected) if keep and candidates[index].representative is not None]
    students = [index for index, keep in enumerate(selected) if keep]
    contexts: list[list[DemonstrationRecord]] = [[] for _ in candidates]
    if not pool or not students:
        return contexts
    similarity = _similarity(candidates, students, pool, config)
    forbidden = _forbidden(candidates, students, pool, config)
    preference = _preference(similarity, candidates, students, pool, config)
    order, values = rank_neighbours(preference, forbidden, config.num_demonstrations)
    for row, student in enumerate(students):
        allowed = order[row][values[row] > -torch.inf].tolist()
        allowed = _within_budget(allowed, [candidates[pool[column]].num_tokens for column in allowed], config)
        demonstrations = [
            _demonstration(candidates[pool[column]], candidates[pool[column]].representative, float(value))
            for column, value in zip(allowed, similarity[row, allowed], strict=True)
        ]
        contexts[student] = demonstrations if config.context_policy == "nearest_first" else demonstrations[::-1]
    return contexts


def _own_solution(candidate: Candidate) -> list[DemonstrationRecord]:
    return [] if candidate.shortest is None else [_demonstration(candidate, candidate.shortest, 1.0)]


def _within_budget(ranked: list[int], tokens: list[int], config: SelectionConfig) -> list[int]:
    """The best-ranked demonstrations that fit the token budget together."""
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
    """Excludes the question itself and its duplicates in text and, with ``same_label_excluded``, its pseudo-label."""
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
    """Values by which the policy ranks the pool, higher first."""
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


def _demonstration(candidate: Candidate, rollout_id: int | None, similarity: float) -> DemonstrationRecord:
    assert rollout_id is not None
    return DemonstrationRecord(
        question_id=candidate.question_id, rollout_id=rollout_id, similarity=round(similarity, 6)
    )
