"""Hallucination signs: how far a question's majority answer can be trusted. Higher is worse.

Each score is one small function from rollouts and active sets to one number a question. The neuron scores stand
beside output-level baselines, which need no neurons at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.answers import Vote
from neurosig.patterns import flat_ids, mean_pairwise_jaccard
from neurosig.probing import ProbeConfig, ProbeResult, agreement_labels, contribution_matrix, fit_probe
from neurosig.rollouts import Rollout

HallucinationScore = Literal["probe", "agreement", "vote_share", "mean_logprob", "entropy"]


@dataclass(frozen=True, slots=True)
class QuestionSignals:
    """What is known of one question once its rollouts are traced.

    Attributes:
        rollouts: Its K rollouts.
        answers: Their parsed answers, ``None`` where there is none.
        vote: The majority vote over ``answers``.
        ids: Active set of each rollout, [K, n_layers, k].
        values: Contributions of those neurons, same shape.
    """

    rollouts: Sequence[Rollout]
    answers: Sequence[str | None]
    vote: Vote
    ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Every hallucination score of every question, and the probe behind one of them.

    Attributes:
        by_name: Score name -> one value a question; absent when the rollouts lack what it needs.
        rollout_probe: Cross-fitted probe score of each rollout, grouped by question.
        probe: The probe that was fitted.
    """

    by_name: Mapping[str, Float[np.ndarray, " questions"]]
    rollout_probe: Float[np.ndarray, "questions k"]
    probe: ProbeResult


def hallucination_scores(
    questions: Mapping[str, QuestionSignals], *, n_layers: int, d_mlp: int, probe: ProbeConfig
) -> Scores:
    """All scores of all questions, in the order of ``questions``.

    ``probe`` is the mean cross-fitted probe score over the rollouts that gave the majority answer (over all
    rollouts when none could be parsed).
    """
    signals = list(questions.values())
    ids = torch.cat([flat_ids(signal.ids, d_mlp) for signal in signals]).numpy()
    values = torch.cat([signal.values.flatten(1) for signal in signals]).float().numpy()
    k = len(signals[0].rollouts)
    shares = np.array([signal.vote.share for signal in signals])
    labels = np.repeat(agreement_labels(shares, probe), k)
    owners = [question_id for question_id in questions for _ in range(k)]
    fitted = fit_probe(contribution_matrix(ids, values, n_layers * d_mlp), labels, owners, probe)
    rollout_probe = fitted.scores.reshape(len(signals), k)

    by_name = {"probe": np.array([_over_majority(s, row) for s, row in zip(signals, rollout_probe, strict=True)])}
    for name, score in _SCORES.items():
        column = [score(signal, d_mlp) for signal in signals]
        if not any(value is None for value in column):
            by_name[name] = np.array(column, dtype=np.float64)
    return Scores(by_name, rollout_probe, fitted)


def agreement(signal: QuestionSignals, d_mlp: int) -> float:
    """One minus the mean pairwise Jaccard similarity of the K active sets (neuron agreement, NAD)."""
    return 1.0 - mean_pairwise_jaccard(flat_ids(signal.ids, d_mlp))


def vote_share(signal: QuestionSignals, d_mlp: int) -> float:
    """One minus the majority's share of all K answers: the output-level baseline (self-consistency)."""
    return 1.0 - signal.vote.share


def mean_logprob(signal: QuestionSignals, d_mlp: int) -> float | None:
    """Minus the mean token log-probability of the majority's rollouts, in nats; output-level baseline."""
    return _mean_over_majority(signal, [rollout.mean_logprob for rollout in signal.rollouts], sign=-1.0)


def entropy(signal: QuestionSignals, d_mlp: int) -> float | None:
    """Mean next-token entropy over the majority's rollouts, in nats; output-level baseline."""
    return _mean_over_majority(signal, [rollout.mean_entropy for rollout in signal.rollouts], sign=1.0)


def _over_majority(signal: QuestionSignals, per_rollout: Float[np.ndarray, " k"]) -> float:
    majority = [answer == signal.vote.winner for answer in signal.answers]
    return float(per_rollout[majority].mean())


def _mean_over_majority(signal: QuestionSignals, per_rollout: Sequence[float | None], sign: float) -> float | None:
    if any(value is None for value in per_rollout):
        return None
    return sign * _over_majority(signal, np.array(per_rollout, dtype=np.float64))


_SCORES: Mapping[str, Callable[[QuestionSignals, int], float | None]] = {
    "agreement": agreement,
    "vote_share": vote_share,
    "mean_logprob": mean_logprob,
    "entropy": entropy,
}
assert {"probe", *_SCORES} == set(get_args(HallucinationScore))
