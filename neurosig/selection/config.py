"""Options of selection; the flags of ``neurosig.export`` take their defaults from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from neurosig.patterns import Signature
from neurosig.registry import ContextPolicy, Open, QuestionFilter
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

QuestionWeight = Literal["uniform", "vote_share"]


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """Options of the question filter and the teacher's context; the manifest records all of them.

    Attributes:
        question_filter: ``neuron`` requires ``min_vote_share`` and selects, of the remaining questions, the
            ``keep_fraction`` with the lowest scores; ``vote_only`` and ``neuron_only`` use one of the two conditions;
            ``threshold`` requires ``min_vote_share`` and a score of at most ``max_score``; ``redundancy`` keeps the
            ``keep_fraction`` of unlike questions; ``all`` selects every question. All but ``all`` need a
            representative: a rollout of the majority that was not cut off. A function is called as `FILTERS` are.
        min_vote_share: Least share of the K answers that the winner needs.
        keep_fraction: Share of the questions to select by score.
        keep_scores: Which scores are kept: the lowest, as of hallucination, or the highest, as of ``belief_shift``.
        max_score: Largest score that ``threshold`` selects; with ``keep_scores`` highest the smallest.
        signature: What similarity compares; see `neurosig.patterns.signatures.signature`.
        context_policy: ``nearest`` puts the most similar demonstration last; ``random_within_kind`` draws among
            questions of the same kind, the control for matching by topic alone; ``trajectory``, ``final_layer`` and
            ``mutual`` compare hidden states at the answer (INFLOW and its baselines); ``majority_solution`` shows the
            question's own shortest majority rollout (U-OPSD), ``likeliest_solution`` the one with the highest mean
            log-probability (CANON). A function is called as `neurosig.selection.contexts.CONTEXTS` are.
        num_demonstrations: Demonstrations per context.
        max_context_tokens: Tokens per context; the least similar demonstrations are dropped to stay within them.
        same_label_excluded: No demonstration has the question's own pseudo-label, so that none gives the answer away.
        demonstration_thoughts: Demonstrations show the thought, which then counts in ``max_context_tokens``.
        keep_truncated: Rollouts that were cut off may be representatives and demonstrations.
        question_weight: A selected question's weight in the loss: 1, or the winner's share of the K answers.
        seed: Seed of the random policies.

    Raises:
        UserError: A value out of range.
    """

    question_filter: Annotated[QuestionFilter | str, Open("filter")] = "neuron"
    min_vote_share: float = 0.5
    keep_fraction: float = 0.5
    keep_scores: Literal["lowest", "highest"] = "lowest"
    max_score: float = 0.5
    signature: Signature = "representative"
    context_policy: Annotated[ContextPolicy | str, Open("context")] = "nearest"
    num_demonstrations: int = 2
    max_context_tokens: int = 2048
    same_label_excluded: bool = False
    demonstration_thoughts: bool = False
    keep_truncated: bool = False
    question_weight: QuestionWeight = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        check_config(self)
        for name, valid, expected in (
            ("min_vote_share", 0 <= self.min_vote_share <= 1, "0 to 1"),
            ("keep_fraction", 0 < self.keep_fraction <= 1, "above 0 and at most 1"),
            ("num_demonstrations", self.num_demonstrations >= 1, "at least 1 (or --context-policy none)"),
            ("max_context_tokens", self.max_context_tokens >= 1, "at least 1 (or --context-policy none)"),
        ):
            if not valid:
                raise UserError(f"{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")
