"""Scores that see a question's context, or what the teacher answers with it; each of one question, ``None`` without.

Their direction is their own: ``--keep-scores`` says whether the lowest or the highest are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from neurosig.hallucination.belief import Belief, jensen_shannon
from neurosig.neurons.contributions import PAD
from neurosig.questions.reader import Reading
from neurosig.sampling.rollouts import Rollout

if TYPE_CHECKING:
    from neurosig.hallucination.scores import QuestionSignals


@dataclass(frozen=True, slots=True)
class TeacherSignals:
    """What the teacher answers to a question with its context.

    Attributes:
        rollouts: Its M completions.
        reading: Their answers and majority vote.
        ids: Active set of each of them.
        belief: Its distribution over the possible answers, the mean of the M.
        entropy_gap: Mean over the student's rollouts of the student's next-token entropy minus the teacher's on the
            same tokens, in nats.
    """

    rollouts: Sequence[Rollout]
    reading: Reading
    ids: Int[Tensor, "m size"]
    belief: Belief
    entropy_gap: float


def belief_shift(signal: QuestionSignals) -> float | None:
    """Jensen-Shannon divergence of the answer distributions without and with the context, in nats (INFLOW, eq. 9)."""
    if signal.teacher is None or signal.belief is None:
        return None
    return jensen_shannon(signal.belief, signal.teacher.belief)


def entropy_gap(signal: QuestionSignals) -> float | None:
    """The student's minus the teacher's next-token entropy on the student's rollouts, in nats."""
    return None if signal.teacher is None else signal.teacher.entropy_gap


def teacher_agreement(signal: QuestionSignals) -> float | None:
    """Share of the teacher's M answers that the most frequent one has (CONSISTENCY in INFLOW's appendix D)."""
    return None if signal.teacher is None else signal.teacher.reading.vote.share


def teacher_set_size(signal: QuestionSignals) -> float | None:
    """Mean number of neurons in the active sets of the teacher's M completions (NEURON in INFLOW's appendix D)."""
    if signal.teacher is None:
        return None
    return float((signal.teacher.ids != PAD).sum(dim=1).double().mean())


def context_information(signal: QuestionSignals) -> float | None:
    """Sum of the similarities of the question's demonstrations; under ``mutual``, what they tell about it in nats."""
    return sum(shown.similarity for shown in signal.context) if signal.context else None


SCORES: Mapping[str, Callable[[QuestionSignals], float | None]] = {
    "belief_shift": belief_shift,
    "entropy_gap": entropy_gap,
    "teacher_agreement": teacher_agreement,
    "teacher_set_size": teacher_set_size,
    "context_information": context_information,
}
