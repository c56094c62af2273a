"""Hallucination scores: one number per question, higher is less trustworthy.

Each score is one small function of a question's rollouts and active sets. Output-level baselines need no neurons.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.hallucination.config import HallucinationScore, ProbeConfig
from neurosig.hallucination.probe import ProbeResult, fit_probe, probe_matrix, rollout_labels
from neurosig.patterns.similarity import jaccard, mean_pairwise_jaccard
from neurosig.questions.reader import Reading
from neurosig.questions.vote import Vote
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
    """

    rollouts: Sequence[Rollout]
    reading: Reading
    ids: Tensor
    values: Tensor
    hidden: Tensor
    n_traced: int | None = None

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
class Scores:
    """Every hallucination score of every question, and the probe behind one of them.

    Attributes:
        by_name: Score name -> one finite value per question; absent when the rollouts lack a statistic that it needs.
        rollout_probe: Cross-fitted probe score of each rollout, grouped by question.
        probe: The probe that was fitted.
    """

    by_name: Mapping[str, Float[np.ndarray, " questions"]]
    rollout_probe: Float[np.ndarray, "questions k"]
    probe: ProbeResult


def hallucination_scores(
    questions: Mapping[str, QuestionSignals],
    *,
    n_neurons: int,
    probe: ProbeConfig,
    n_layers: int = 1,
    seed: int = 0,
    fold_groups: Mapping[str, str] | None = None,
) -> Scores:
    """All scores of all questions, in the order of ``questions``.

    ``probe_score`` is the mean cross-fitted probe score over the majority's rollouts; ``random`` a control drawn from
    ``seed`` and the question's id.

    Args:
        questions: Question id -> its signals.
        n_neurons: Neurons of the model, over all layers.
        probe: Options of the probe.
        n_layers: Its layers, for the probe's ``layer_z``.
        seed: Seed of ``random``.
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
    fitted = fit_probe(probe_matrix(ids, values, n_layers, n_neurons, probe), labels, kept, probe)
    rollout_probe = fitted.scores.reshape(len(signals), k)

    by_name = {
        "probe_score": np.array(
            [row[signal.majority].mean() for signal, row in zip(signals, rollout_probe, strict=True)]
        ),
        "neuron_count": neuron_count(signals),
        "random": np.array([random_score(question_id, seed) for question_id in questions]),
    }
    for name, score in _SCORES.items():
        column = [score(signal) for signal in signals]
        if not any(value is None for value in column):
            by_name[name] = np.array(column, dtype=np.float64)
    for name in [name for name, column in by_name.items() if not np.isfinite(column).all()]:
        logger.warning("score %s: not finite for some questions, so it is left out", name)
        del by_name[name]
    return Scores(by_name, rollout_probe, fitted)


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


def neuron_count(signals: Sequence[QuestionSignals]) -> Float[np.ndarray, " questions"]:
    """Distinct neurons in the union of a question's K active sets, with length regressed out.

    The count grows with the number of tokens, so the score is the residual of a least-squares line of log count on
    log traced tokens over all questions. Source: the "neuron consensus" of the author's code, length-controlled.
    """
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


def random_score(question_id: str, seed: int) -> float:
    """A uniform number from the seed and the question's id: the uninformed control."""
    digest = hashlib.sha256(f"{seed}\x00random\x00{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _over_majority(
    signal: QuestionSignals, value_of: Callable[[Rollout], float | None], sign: float = 1.0
) -> float | None:
    values = [value_of(signal.rollouts[index]) for index in signal.majority]
    known = [value for value in values if value is not None]
    return sign * float(np.mean(known)) if len(known) == len(values) else None


_SCORES: Mapping[str, Callable[[QuestionSignals], float | None]] = {
    "agreement": agreement,
    "agreement_majority": agreement_majority,
    "knn_medoid": knn_medoid,
    "vote_share": vote_share,
    "mean_logprob": mean_logprob,
    "entropy": entropy,
    "self_certainty": self_certainty,
    "length": length,
}
assert {"probe_score", "neuron_count", "random", *_SCORES} == set(get_args(HallucinationScore))
