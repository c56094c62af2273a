"""Beliefs: distributions over a question's possible answers, how certain they are, and how far a context moves them.

Source: INFLOW (equations 1 to 9, appendix A.2); the belief of several rollouts is the mean of theirs (reconstruction).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Belief = Mapping[str | None, float]
"""Candidate -> probability; ``None`` stands for all completions without an answer."""


@dataclass(frozen=True, slots=True)
class AnswerState:
    """A rollout's hidden states at its answer, and what its question's answer distribution is there.

    Attributes:
        trajectory: The states of all layers at the answer's first token, each scaled to norm 1, flattened and
            projected by a fixed sign matrix (`neurosig.neurons.answer_states`).
        final: The last layer's state, after the final norm.
        certainty: One minus the belief's entropy as a share of the largest; 1 where one answer has all mass.
    """

    trajectory: Float[Tensor, " projected"]
    final: Float[Tensor, " d_model"]
    certainty: float


def votes_belief(answers: Sequence[str | None]) -> dict[str | None, float]:
    """The share of the completions that vote for each candidate: mass over meanings."""
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


def mean_belief(beliefs: Sequence[Belief]) -> dict[str | None, float]:
    """The mean of several distributions, at least one."""
    names = dict.fromkeys(name for belief in beliefs for name in belief)
    return {name: sum(belief.get(name, 0.0) for belief in beliefs) / len(beliefs) for name in names}


def certainty(belief: Belief, n_answers: int) -> float:
    """``1 - H / log n``, 0 for a uniform distribution over ``n_answers``; 1 where there is one answer only.

    Source: INFLOW, equation 3.
    """
    if n_answers < 2:
        return 1.0
    entropy = -sum(p * math.log(p) for p in belief.values() if p > 0)
    return min(1.0, max(0.0, 1.0 - entropy / math.log(n_answers)))


def jensen_shannon(before: Belief, after: Belief) -> float:
    """Jensen-Shannon divergence of two distributions, in nats: 0 for equal ones, log 2 for disjoint ones.

    Source: INFLOW, equation 9.
    """
    middle = mean_belief([before, after])
    return sum(
        0.5 * p * math.log(p / middle[name]) for belief in (before, after) for name, p in belief.items() if p > 0
    )
