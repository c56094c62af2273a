"""Which solved demonstrations the teacher sees for each question (reconstruction)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neurosig.hallucination.belief import AnswerState
from neurosig.manifest import DemonstrationRecord
from neurosig.neurons.contributions import PAD
from neurosig.patterns.similarity import largest, nearest_sets
from neurosig.registry import find
from neurosig.runtime.errors import UserError
from neurosig.selection.choose import Candidate, called
from neurosig.selection.config import SelectionConfig

BLOCK = 128
"""Questions whose values for the whole pool are held at once."""
EXACT_SETS = 20_000
"""Pools up to this size are searched exactly, larger ones by usearch where it is installed."""

Ranked = Sequence[Sequence[DemonstrationRecord]]
"""For each student its demonstrations, best first."""


@dataclass(frozen=True)
class ContextInputs:
    """What the function of a context policy gets.

    Attributes:
        students: The questions that need a context.
        pool: The questions whose representative may be a demonstration, in input order.
        config: The options of selection.
    """

    students: Sequence[Candidate]
    pool: Sequence[Candidate]
    config: SelectionConfig

    def rank(
        self,
        values_of: Callable[[Sequence[Candidate]], Float[Tensor, "block pool"]],
        similarity: Callable[[Candidate, Candidate], float] | None = None,
    ) -> list[list[DemonstrationRecord]]:
        """The pool's best demonstrations for every student; of equal ones the earlier question's.

        No question demonstrates itself or its copy in text, nor with ``same_label_excluded`` one of the same
        pseudo-label. Memory is that of one block of students.

        Args:
            values_of: Students -> the value of each question of the pool for each of them, higher is better.
            similarity: What the manifest records of student and demonstration; default: the value.

        Raises:
            UserError: A value is not a number.
        """
        ranked: list[list[DemonstrationRecord]] = []
        for start in range(0, len(self.students), BLOCK):
            block = self.students[start : start + BLOCK]
            forbidden = self._forbidden(range(start, start + len(block)))
            allowed = values_of(block).float().masked_fill(forbidden, -torch.inf)
            if allowed.isnan().any():
                raise UserError(f"--context-policy {self.config.context_policy}: a value that is not a number")
            order, values = largest(allowed, self.config.num_demonstrations)
            for student, columns, found in zip(block, order.tolist(), values.tolist(), strict=True):
                ranked.append(
                    [
                        shown(
                            self.pool[column], value if similarity is None else similarity(student, self.pool[column])
                        )
                        for column, value in zip(columns, found, strict=True)
                        if value > -torch.inf
                    ]
                )
        return ranked

    def nearest_sets(self) -> list[list[DemonstrationRecord]]:
        """`rank` by the Jaccard similarity of signatures (`neurosig.patterns.similarity.nearest_sets`)."""
        texts, labels = self._texts, self._labels
        exact = len(self.pool) <= EXACT_SETS or find_spec("usearch") is None
        sets = _padded(self.pool)
        # nearest_sets leaves out one group; the rarer reason to leave out takes further candidates
        groups, others = (labels, texts) if labels is not None else (texts, None)
        more = 0 if others is None else int(others[1].unique(return_counts=True)[1].max())
        same = len(self.students) == len(self.pool) and all(map(_is, self.students, self.pool))
        found = nearest_sets(
            sets,
            min(self.config.num_demonstrations + more, max(1, len(self.pool))),
            queries=None if same else _padded(self.students),
            query_groups=None if same else groups[0],
            groups=groups[1],
            backend="exact" if exact else "usearch",
        )
        ranked = []
        for row, (columns, values) in enumerate(zip(found.indices.tolist(), found.similarity.tolist(), strict=True)):
            allowed = [
                shown(self.pool[column], value)
                for column, value in zip(columns, values, strict=True)
                if column != PAD and (others is None or int(others[0][row]) != int(others[1][column]))
            ]
            ranked.append(allowed[: self.config.num_demonstrations])
        return ranked

    @cached_property
    def _texts(self) -> tuple[Int[Tensor, " students"], Int[Tensor, " pool"]]:
        return _codes(*([one.text_sha256 for one in side] for side in (self.students, self.pool)))

    @cached_property
    def _labels(self) -> tuple[Int[Tensor, " students"], Int[Tensor, " pool"]] | None:
        if not self.config.same_label_excluded:
            return None
        return _codes(*([str(one.vote.winner) for one in side] for side in (self.students, self.pool)))

    def _forbidden(self, rows: range) -> Bool[Tensor, "block pool"]:
        own = slice(rows.start, rows.stop)
        same = self._texts[0][own, None] == self._texts[1]
        return same if self._labels is None else same | (self._labels[0][own, None] == self._labels[1])


def choose_contexts(
    candidates: Sequence[Candidate], students: Sequence[bool], config: SelectionConfig
) -> list[list[DemonstrationRecord]]:
    """The teacher's context of each student in prompt order; empty for the others and for ``none``.

    Args:
        candidates: The traced questions.
        students: Which of them need a context; the representatives of the same ones are the pool.
        config: Policy, number and budget of demonstrations.

    Raises:
        UserError: A user's function fails or shows a question that is not in the pool; or a policy needs what the
            export has not measured.
    """
    chosen = [place for place, keep in enumerate(students) if keep]
    contexts: list[list[DemonstrationRecord]] = [[] for _ in candidates]
    asked = [candidates[place] for place in chosen]
    inputs = ContextInputs(asked, [one for one in asked if one.representative is not None], config)
    if not inputs.pool:
        return contexts
    found, pool = find("context", config.context_policy), {one.question_id: one for one in inputs.pool}
    for place, ranked in zip(chosen, called(found, "contexts", len(asked), inputs), strict=True):
        if stranger := next((one.question_id for one in ranked if one.question_id not in pool), None):
            raise UserError(f'{found.name}: a demonstration of "{stranger}", which is not in the pool')
        allowed = _within_budget(ranked, pool, config)
        contexts[place] = allowed if config.context_policy == "nearest_first" else allowed[::-1]
    return contexts


def shown(candidate: Candidate, similarity: float, rollout_id: int | None = None) -> DemonstrationRecord:
    """The demonstration that shows a question's representative, or another of its rollouts."""
    place = candidate.representative if rollout_id is None else rollout_id
    assert place is not None
    return DemonstrationRecord(question_id=candidate.question_id, rollout_id=place, similarity=round(similarity, 6))


def nearest(inputs: ContextInputs) -> Ranked:
    """The most similar signatures by Jaccard; with the signature ``hidden_state`` by the cosine of mean states."""
    if inputs.config.signature != "hidden_state":
        return inputs.nearest_sets()
    return inputs.rank(_cosine(inputs, lambda one: one.hidden))


def random(inputs: ContextInputs) -> Ranked:
    """Drawn from the pool: the control for similarity."""
    return inputs.rank(_drawn(inputs), _recorded(inputs))


def random_within_kind(inputs: ContextInputs) -> Ranked:
    """Drawn from the questions of the same kind, then from the others: the control for topic."""
    drawn = _drawn(inputs)

    def values_of(block: Sequence[Candidate]) -> Float[Tensor, "block pool"]:
        left, right = _codes([one.kind for one in block], [one.kind for one in inputs.pool])
        return drawn(block) + (left[:, None] == right).float()

    return inputs.rank(values_of, _recorded(inputs))


def trajectory(inputs: ContextInputs) -> Ranked:
    """The largest ``certainty of the source x max(0, cosine of the trajectories) squared`` (INFLOW, equations 2 to 5).

    Its information, ``-1/2 log(1 - that)``, ranks alike.
    """
    certain = torch.tensor([_state(one).certainty for one in inputs.pool])
    cosine = _cosine(inputs, lambda one: _state(one).trajectory)
    return inputs.rank(lambda block: certain * cosine(block).clamp_min(0) ** 2)


def final_layer(inputs: ContextInputs) -> Ranked:
    """The largest cosine of the final-layer states at the answer (FULL and REDUNDANCY in INFLOW's appendix D)."""
    return inputs.rank(_cosine(inputs, lambda one: _state(one).final))


def mutual(inputs: ContextInputs) -> Ranked:
    """Chosen one by one for the most conditional information about the question (MUTUAL in INFLOW's appendix D).

    The estimator, which the source does not state, is that of a Gaussian pair: ``-1/2 log(1 - r^2)``, r the cosine of
    the two centred trajectories after both are freed of those chosen before (partial correlation), so that the gains
    add up to the information of the whole context. The recorded similarity is the gain.
    """
    pool = torch.stack([_state(one).trajectory.double() for one in inputs.pool])
    centre, ranked = pool.mean(dim=0), []
    for row, student in enumerate(inputs.students):
        own, left = _state(student).trajectory.double() - centre, pool - centre
        allowed = ~inputs._forbidden(range(row, row + 1))[0]
        chosen: list[DemonstrationRecord] = []
        for _ in range(min(inputs.config.num_demonstrations, int(allowed.sum()))):
            cosine = torch.nn.functional.cosine_similarity(left, own[None], dim=1).nan_to_num()
            squared = (cosine**2).clamp_max(1 - 1e-12).masked_fill(~allowed, -1.0)
            best = int(squared.argmax())
            chosen.append(shown(inputs.pool[best], float(-0.5 * torch.log1p(-squared[best]))))
            allowed[best] = False
            axis = torch.nn.functional.normalize(left[best], dim=0)
            own, left = own - (own @ axis) * axis, left - (left @ axis)[:, None] * axis
        ranked.append(chosen)
    return ranked


def majority_solution(inputs: ContextInputs) -> Ranked:
    """The question's own shortest majority rollout (U-OPSD, arXiv 2608.06296)."""
    return [[] if one.shortest is None else [shown(one, 1.0, one.shortest)] for one in inputs.students]


def likeliest_solution(inputs: ContextInputs) -> Ranked:
    """The question's own majority rollout with the highest mean log-probability (CANON, arXiv 2607.13643).

    Raises:
        UserError: The rollouts have no log-probabilities.
    """
    if any(one.likeliest is None and one.representative is not None for one in inputs.students):
        raise UserError(
            "--context-policy likeliest_solution: the rollouts have no log-probabilities; use another policy"
        )
    return [[] if one.likeliest is None else [shown(one, 1.0, one.likeliest)] for one in inputs.students]


def none(inputs: ContextInputs) -> Ranked:
    """No context: the teacher sees what the student sees."""
    return [[] for _ in inputs.students]


OWN_SOLUTION = ("majority_solution", "likeliest_solution")
"""Policies under which a question's own rollout is its context."""
CONTEXTS: Mapping[str, Callable[[ContextInputs], Ranked]] = {
    "nearest": nearest,
    "nearest_first": nearest,
    "random": random,
    "random_within_kind": random_within_kind,
    "trajectory": trajectory,
    "final_layer": final_layer,
    "mutual": mutual,
    "majority_solution": majority_solution,
    "likeliest_solution": likeliest_solution,
    "none": none,
}
"""Demonstrations of each student, best first; what exceeds the budget is dropped and the best comes last in the prompt
(``nearest_first``: first)."""


def _within_budget(
    ranked: Sequence[DemonstrationRecord], by_id: Mapping[str, Candidate], config: SelectionConfig
) -> list[DemonstrationRecord]:
    """The best-ranked demonstrations that fit the token budget together; the question's own solution always does."""
    tokens = [by_id[one.question_id].num_tokens for one in ranked]
    fits = np.cumsum(tokens) <= config.max_context_tokens
    free = config.context_policy in OWN_SOLUTION
    return [one for one, fit in zip(ranked, fits, strict=True) if fit or free]


def _cosine(
    inputs: ContextInputs, vector_of: Callable[[Candidate], Tensor]
) -> Callable[[Sequence[Candidate]], Float[Tensor, "block pool"]]:
    def unit(side: Sequence[Candidate]) -> Float[Tensor, "n d"]:
        return torch.nn.functional.normalize(torch.stack([vector_of(one).float() for one in side]), dim=-1)

    columns = unit(inputs.pool).T
    return lambda block: unit(block) @ columns


def _drawn(inputs: ContextInputs) -> Callable[[Sequence[Candidate]], Float[Tensor, "block pool"]]:
    generator, n = np.random.default_rng(inputs.config.seed), len(inputs.pool)
    return lambda block: torch.from_numpy(generator.random((len(block), n), dtype=np.float32))


def _recorded(inputs: ContextInputs) -> Callable[[Candidate, Candidate], float]:
    """The similarity that ``nearest`` would record."""
    if inputs.config.signature != "hidden_state":
        return Candidate.similarity
    return lambda a, b: float(torch.nn.functional.cosine_similarity(a.hidden.float(), b.hidden.float(), dim=0))


def _state(candidate: Candidate) -> AnswerState:
    if candidate.state is None:
        raise UserError(f'question "{candidate.question_id}": no states at its answer, which the policy compares')
    return candidate.state


def _padded(side: Sequence[Candidate]) -> Int[Tensor, "n size"]:
    return torch.nn.utils.rnn.pad_sequence([one.signature for one in side], batch_first=True, padding_value=PAD)


def _is(a: object, b: object) -> bool:
    return a is b


def _codes(rows: Sequence[str], columns: Sequence[str]) -> tuple[Int[Tensor, " rows"], Int[Tensor, " columns"]]:
    codes = {text: code for code, text in enumerate(dict.fromkeys([*rows, *columns]))}
    return tuple(torch.tensor([codes[text] for text in texts], dtype=torch.long) for texts in (rows, columns))  # type: ignore[return-value]
