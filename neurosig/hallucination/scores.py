"""Scores: one number per question. Of the hallucination scores higher is less trustworthy.

Each score is one small function of the questions' rollouts and active sets; output-level baselines need no neurons,
and those of `neurosig.hallucination.context_scores` also see what the context does to the teacher.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.hallucination import context_scores
from neurosig.hallucination.belief import Belief
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.context_scores import TeacherSignals
from neurosig.hallucination.probe import ProbeResult, fit_probe, probe_matrix, rollout_labels
from neurosig.manifest import DemonstrationRecord
from neurosig.patterns.similarity import jaccard, mean_pairwise_jaccard
from neurosig.questions.reader import Reading
from neurosig.questions.vote import Vote
from neurosig.registry import Registered, find
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

MEDOID_NEIGHBOURS = 3


@dataclass(frozen=True, slots=True)
class QuestionSignals:
    """One question with its traced rollouts.

    Attributes:
        rollouts: Its K rollouts.
        reading: Their answers and majority vote.
        ids: Active set of each rollout (`neurosig.neurons.contributions.ActiveSets`), [K, size].
        values: Contributions of those neurons, [K, size].
        hidden: Mean hidden state of each rollout, [K, d_model].
        n_traced: Traced tokens of all its rollouts; default: all of their tokens.
        belief: Its distribution over the possible answers without a context, where an option needs it.
        context: Its demonstrations, once they are chosen.
        teacher: What the teacher answers with that context, with ``--teacher-rollouts``.
    """

    rollouts: Sequence[Rollout]
    reading: Reading
    ids: Tensor
    values: Tensor
    hidden: Tensor
    n_traced: int | None = None
    belief: Belief | None = None
    context: Sequence[DemonstrationRecord] = ()
    teacher: TeacherSignals | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens behind the active sets."""
        n = sum(len(rollout.completion_ids_without_eos) for rollout in self.rollouts)
        return n if self.n_traced is None else self.n_traced

    @property
    def answers(self) -> Sequence[str | None]:
        """The candidate that each rollout votes for, ``None`` where there is none."""
        return self.reading.answers

    @property
    def vote(self) -> Vote:
        return self.reading.vote

    @property
    def majority(self) -> list[int]:
        """Rollouts that gave the majority answer; all of them when no answer could be parsed."""
        return [index for index, answer in enumerate(self.answers) if answer == self.vote.winner]


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What the function of a score gets; it returns one number per question, ``None`` where it knows none.

    Attributes:
        questions: The questions with their rollouts, in input order.
        rollout_probe: Cross-fitted probe score of each rollout.
        seed: The export's seed.
    """

    questions: Sequence[QuestionSignals]
    rollout_probe: Float[np.ndarray, "questions k"]
    seed: int


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of every question, and the probe behind one of them.

    Attributes:
        by_name: Score name -> one value per question; not finite where the question has none.
        rollout_probe: Cross-fitted probe score of each rollout, grouped by question.
        probe: The probe that was fitted.
    """

    by_name: Mapping[str, Float[np.ndarray, " questions"]]
    rollout_probe: Float[np.ndarray, "questions k"]
    probe: ProbeResult


def fitted_probe(
    questions: Mapping[str, QuestionSignals],
    *,
    n_neurons: int,
    probe: ProbeConfig,
    n_layers: int = 1,
    fold_groups: Mapping[str, str] | None = None,
) -> ProbeResult:
    """The annotation-free probe on the questions' rollouts, cross-fitted.

    Args:
        questions: Question id -> its signals.
        n_neurons: Neurons of the model, over all layers.
        probe: Options of the probe.
        n_layers: Its layers, for the probe's ``layer_z``.
        fold_groups: Question id -> the group that no fold of the probe splits; default: each question is its own.

    Raises:
        ValueError: Questions have different numbers of rollouts.
    """
    signals = list(questions.values())
    ids = torch.cat([signal.ids for signal in signals]).numpy()
    values = torch.cat([signal.values for signal in signals]).float().numpy()
    k = len(signals[0].rollouts)
    odd = next((name for name, signal in questions.items() if len(signal.rollouts) != k), None)
    if odd is not None:
        raise ValueError(
            f'question "{odd}" has {len(questions[odd].rollouts)} rollouts, the first has {k}; give K of each'
        )
    labels = rollout_labels([signal.answers for signal in signals], [signal.vote.winner for signal in signals], probe)
    kept = [(fold_groups or {}).get(question_id, question_id) for question_id in questions for _ in range(k)]
    return fit_probe(probe_matrix(ids, values, n_layers, n_neurons, probe), labels, kept, probe)


def question_scores(
    questions: Sequence[QuestionSignals], probe: ProbeResult, names: Sequence[str], *, seed: int = 0
) -> Scores:
    """These scores of all questions.

    One of ours is left out where it knows no question's number: the rollouts lack a statistic, or no context was
    chosen.

    Args:
        questions: All with the same number of rollouts.
        probe: See `fitted_probe`.
        names: Names of scores.
        seed: The export's seed.

    Raises:
        UserError: A user's function fails, or returns another number of values.
    """
    inputs = ScoreInputs(questions, probe.scores.reshape(len(questions), -1), seed)
    by_name = {}
    for name in names:
        column = _column(find("score", name), inputs)
        if np.isfinite(column).any():
            by_name[name] = column
        partial = name in BEFORE_CONTEXTS and not np.isfinite(column).all()
        if partial and by_name.pop(name, None) is not None:
            logger.warning("score %s: not finite for some questions, so it is left out", name)
    return Scores(by_name, inputs.rollout_probe, probe)


def _column(found: Registered, inputs: ScoreInputs) -> Float[np.ndarray, " questions"]:
    try:
        values = np.array([np.nan if value is None else float(value) for value in found.function(inputs)])
    except UserError:
        raise
    except Exception as error:
        if found.sha256 is None:
            raise
        raise UserError(f"{found.name}: {type(error).__name__}: {error}") from error
    if len(values) != len(inputs.questions):
        raise UserError(
            f"{found.name}: {len(values)} scores for {len(inputs.questions)} questions; return one for each"
        )
    return values


def each(score: Callable[[QuestionSignals], float | None]) -> Callable[[ScoreInputs], list[float | None]]:
    """A score of all questions from one that looks at a single question."""
    return lambda inputs: [score(signal) for signal in inputs.questions]


def probe_score(inputs: ScoreInputs) -> list[float]:
    """Mean cross-fitted probe score over the majority's rollouts (reconstruction)."""
    return [row[signal.majority].mean() for signal, row in zip(inputs.questions, inputs.rollout_probe, strict=True)]


def agreement(signal: QuestionSignals) -> float:
    """One minus the mean pairwise Jaccard similarity of the K active sets (neuron agreement, NAD)."""
    return 1.0 - mean_pairwise_jaccard(signal.ids)


def agreement_majority(signal: QuestionSignals) -> float:
    """`agreement` over the majority's rollouts only; 1 when the majority is a single rollout (reconstruction)."""
    majority = signal.majority
    return 1.0 - mean_pairwise_jaccard(signal.ids[majority]) if len(majority) > 1 else 1.0


def knn_medoid(signal: QuestionSignals, neighbours: int = MEDOID_NEIGHBOURS) -> float:
    """One minus the mean Jaccard similarity of the medoid rollout to its nearest rollouts; 0 for a single rollout.

    The medoid is the rollout most similar to all others. Source: after the k-nearest-neighbour selection of NAD.
    """
    similarity = jaccard(signal.ids, signal.ids)
    if len(similarity) == 1:
        return 0.0
    row = similarity[similarity.sum(dim=1).argmax()].sort(descending=True).values
    return 1.0 - float(row[1 : neighbours + 1].mean())  # the first is the medoid itself


def neuron_count(inputs: ScoreInputs) -> Float[np.ndarray, " questions"]:
    """Distinct neurons in the union of a question's K active sets, with length regressed out.

    The count grows with the number of tokens, so the score is the residual of a least-squares line of log count on
    log traced tokens over all questions. Source: the "neuron consensus" of the author's code, length-controlled.
    """
    signals = inputs.questions
    counts = np.log([max(1, int((signal.ids.unique() >= 0).sum())) for signal in signals])
    tokens = np.log([signal.n_tokens for signal in signals])
    centred = tokens - tokens.mean()
    spread = (centred**2).sum()
    slope = (centred * counts).sum() / spread if spread else 0.0
    return np.asarray(counts - counts.mean() - slope * centred)


def vote_share(signal: QuestionSignals) -> float:
    """One minus the majority's share of all K answers: the output-level baseline (self-consistency)."""
    return 1.0 - signal.vote.share


def mean_logprob(signal: QuestionSignals) -> float | None:
    """Minus the mean token log-probability of the majority's rollouts, in nats; output-level baseline."""
    return _over_majority(signal, lambda rollout: rollout.mean_logprob, sign=-1.0)


def entropy(signal: QuestionSignals) -> float | None:
    """Mean next-token entropy over the majority's rollouts, in nats; output-level baseline."""
    return _over_majority(signal, lambda rollout: rollout.mean_entropy)


def self_certainty(signal: QuestionSignals) -> float | None:
    """Minus the mean self-certainty of the majority's rollouts, in nats (Intuitor); output-level baseline."""
    return _over_majority(signal, lambda rollout: rollout.mean_self_certainty, sign=-1.0)


def length(signal: QuestionSignals) -> float | None:
    """Mean completion tokens of the majority's rollouts; output-level baseline."""
    return _over_majority(signal, lambda rollout: float(len(rollout.completion_ids_without_eos)))


def random(inputs: ScoreInputs) -> list[float]:
    """A uniform number from the seed and the question's id: the uninformed control."""
    names = [signal.rollouts[0].question_id for signal in inputs.questions]
    digests = [hashlib.sha256(f"{inputs.seed}\x00random\x00{name}".encode()).digest() for name in names]
    return [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]


def _over_majority(
    signal: QuestionSignals, value_of: Callable[[Rollout], float | None], sign: float = 1.0
) -> float | None:
    values = [value_of(signal.rollouts[index]) for index in signal.majority]
    known = [value for value in values if value is not None]
    return sign * float(np.mean(known)) if len(known) == len(values) else None


SCORES: Mapping[str, Callable[[ScoreInputs], Sequence[float | None] | Float[np.ndarray, " questions"]]] = {
    "probe_score": probe_score,
    "agreement": each(agreement),
    "agreement_majority": each(agreement_majority),
    "knn_medoid": each(knn_medoid),
    "neuron_count": neuron_count,
    "vote_share": each(vote_share),
    "mean_logprob": each(mean_logprob),
    "entropy": each(entropy),
    "self_certainty": each(self_certainty),
    "length": each(length),
    "random": random,
    **{name: each(score) for name, score in context_scores.SCORES.items()},
}
BEFORE_CONTEXTS = tuple(name for name in SCORES if name not in context_scores.SCORES)
"""Our scores that need no context."""
