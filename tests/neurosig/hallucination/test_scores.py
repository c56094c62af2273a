"""Every hallucination score and signature, against numbers computed by hand."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from neurosig.hallucination.config import HallucinationScore, ProbeConfig
from neurosig.hallucination.scores import (
    QuestionSignals,
    agreement,
    agreement_majority,
    hallucination_scores,
    knn_medoid,
    length,
    neuron_count,
    random_score,
    self_certainty,
)
from neurosig.patterns.signatures import signature
from neurosig.questions.reader import Reading
from neurosig.questions.vote import majority_vote
from neurosig.sampling.rollouts import Rollout


def signal(
    answers: list[str | None], sets: list[list[int]], logprobs: list[float | None] | None = None, tokens: int = 3
) -> QuestionSignals:
    """One question; rollout i has ``tokens + i`` tokens before its end and certainty i."""
    rollouts = [
        Rollout("q", i, str(answer), (5,) * (tokens + i) + (2,), "stop", lp, None if lp is None else -lp, float(i))
        for i, (answer, lp) in enumerate(zip(answers, logprobs or [-1.0] * len(answers), strict=True))
    ]
    width = max(map(len, sets))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in sets], dtype=torch.int32)
    values = (ids >= 0).float()
    reading = Reading(tuple(answers), tuple(answers), majority_vote(answers, "q"))
    return QuestionSignals(rollouts, reading, ids, values, torch.zeros(len(sets), 2))


def test_scores_by_hand() -> None:
    """Two questions of two rollouts: one agrees with equal neurons, the other splits with disjoint ones."""
    questions = {
        "a": signal(["x", "x"], [[0, 1], [0, 1]], [-0.5, -1.5]),
        "b": signal(["x", "y"], [[0, 1], [2, 3]], [-1.0, -3.0]),
    }
    scores = hallucination_scores(questions, n_neurons=4, probe=ProbeConfig()).by_name
    assert set(scores) == set(get_args(HallucinationScore))
    assert scores["agreement"].tolist() == [0.0, 1.0]
    assert scores["vote_share"].tolist() == [0.0, 0.5]
    winner = ["x", "y"].index(questions["b"].vote.winner or "")
    assert scores["mean_logprob"].tolist() == [1.0, [1.0, 3.0][winner]]
    assert scores["entropy"].tolist() == scores["mean_logprob"].tolist()
    assert scores["length"].tolist() == [3.5, 3.0 + winner]
    assert scores["self_certainty"].tolist() == [-0.5, -float(winner)]
    assert scores["probe_score"].tolist() == [0.5, 0.5]
    assert scores["neuron_count"].tolist() == pytest.approx([-math.log(2) / 2, math.log(2) / 2])
    assert scores["random"].tolist() == [random_score("a", 0), random_score("b", 0)]


SETS = [[0, 1], [0, 1], [0, 2], [7, 8]]
"""Jaccard similarities: 1 between the first two, 1/3 of each with the third, 0 with the fourth."""


def test_agreement_of_the_majority_leaves_out_the_others() -> None:
    mixed = signal(["x", "x", "x", "y"], SETS)
    assert agreement(mixed) == pytest.approx(1 - (1 + 1 / 3 + 1 / 3) / 6)
    assert agreement_majority(mixed) == pytest.approx(1 - (1 + 1 / 3 + 1 / 3) / 3)
    assert agreement_majority(signal(["x", None], [[0], [0]])) == 1.0


def test_the_medoid_is_judged_by_its_nearest_rollouts() -> None:
    mixed = signal(["x", "x", "x", "y"], SETS)
    assert knn_medoid(mixed, neighbours=1) == 0.0
    assert knn_medoid(mixed, neighbours=2) == pytest.approx(1 - (1 + 1 / 3) / 2)
    assert knn_medoid(mixed) == pytest.approx(1 - (1 + 1 / 3 + 0) / 3)
    assert knn_medoid(signal(["x"], [[0, 1]])) == 0.0


def test_without_any_answer_the_majority_is_all_rollouts() -> None:
    mute = signal([None, None], [[0], [1]])
    assert mute.majority == [0, 1]
    assert length(mute) == 3.5
    assert self_certainty(mute) == -0.5


def test_neuron_count_is_free_of_length() -> None:
    """Counts that follow length exactly leave nothing; a question with twice its neurons stands out."""

    def grown(tokens: int, neurons: int) -> QuestionSignals:
        return signal(["x"], [list(range(neurons))], tokens=tokens)

    sizes = [(2, 20), (4, 40), (8, 80), (16, 160)]
    assert neuron_count([grown(*size) for size in sizes]) == pytest.approx(np.zeros(4), abs=1e-12)
    scores = neuron_count([grown(*size) for size in [*sizes, (4, 80)]])
    assert scores.argmax() == 4
    assert neuron_count([grown(4, 10), grown(4, 20)]) == pytest.approx([-math.log(2) / 2, math.log(2) / 2])


def test_scores_that_lack_what_they_need_are_absent() -> None:
    questions = {"a": signal(["x", "x"], [[0], [1]]), "b": signal(["x", "x"], [[0], [1]], [-1.0, None])}
    scores = hallucination_scores(questions, n_neurons=2, probe=ProbeConfig()).by_name
    assert set(get_args(HallucinationScore)) - set(scores) == {"mean_logprob", "entropy"}


def test_random_scores_follow_seed_and_id_and_are_uniform() -> None:
    assert random_score("a", 0) == random_score("a", 0) != random_score("a", 1)
    drawn = np.array([random_score(f"q{i}", 0) for i in range(2000)])
    assert abs(drawn.mean() - 0.5) < 0.03 and drawn.min() >= 0 and drawn.max() < 1
    assert np.histogram(drawn, bins=10, range=(0, 1))[0].min() > 140


def test_every_signature_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3], [2, 3, 4], [3, 9, -1], [5, 6, 7]], dtype=torch.int32)
    majority = [0, 1, 2]
    expected = {
        "representative": [2, 3, 4],
        "hidden_state": [2, 3, 4],
        "union": [1, 2, 3, 4, 9],
        "intersection": [3],
        "frequency": [2, 3],
    }
    for kind, neurons in expected.items():
        assert signature(ids, majority, 1, kind).tolist() == neurons, kind  # type: ignore[arg-type]
        assert signature(ids, [], None, kind).tolist() == []  # type: ignore[arg-type]
    assert signature(ids, [0, 1], 0, "frequency").tolist() == [1, 2, 3, 4]
    assert signature(ids, [2], 2, "representative").tolist() == [3, 9]
