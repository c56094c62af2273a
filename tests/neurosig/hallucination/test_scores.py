"""Every hallucination score and signature, against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.scores import (
    BEFORE_CONTEXTS,
    SCORES,
    QuestionSignals,
    ScoreInputs,
    agreement,
    agreement_majority,
    fitted_probe,
    knn_medoid,
    length,
    neuron_count,
    question_scores,
    random,
    self_certainty,
)
from neurosig.patterns.signatures import signature
from neurosig.questions.reader import Reading
from neurosig.questions.vote import majority_vote
from neurosig.sampling.rollouts import Rollout


def signal(
    answers: list[str | None], sets: list[list[int]], logprobs: list[float | None] | None = None, tokens: int = 3,
    name: str = "q",
) -> QuestionSignals:  # fmt: skip
    """One question; rollout i has ``tokens + i`` tokens before its end and certainty i."""
    rollouts = [
        Rollout(name, i, str(answer), (5,) * (tokens + i) + (2,), "stop", lp, None if lp is None else -lp, float(i))
        for i, (answer, lp) in enumerate(zip(answers, logprobs or [-1.0] * len(answers), strict=True))
    ]
    width = max(map(len, sets))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in sets], dtype=torch.int32)
    values = (ids >= 0).float()
    reading = Reading(tuple(answers), tuple(answers), majority_vote(answers, "q"))
    return QuestionSignals(rollouts, reading, ids, values, torch.zeros(len(sets), 2))


def scores_of(questions: dict[str, QuestionSignals], n_neurons: int) -> Any:
    probe = fitted_probe(questions, n_neurons=n_neurons, probe=ProbeConfig())
    return question_scores(list(questions.values()), probe, list(SCORES)).by_name


def counted(signals: list[QuestionSignals]) -> Any:
    return neuron_count(ScoreInputs(signals, np.zeros((len(signals), 1)), 0))


def drawn(names: list[str], seed: int) -> list[float]:
    return random(ScoreInputs([signal(["x"], [[0]], name=name) for name in names], np.zeros((len(names), 1)), seed))


def test_scores_by_hand() -> None:
    """Two questions of two rollouts: one agrees with equal neurons, the other splits with disjoint ones."""
    questions = {
        "a": signal(["x", "x"], [[0, 1], [0, 1]], [-0.5, -1.5], name="a"),
        "b": signal(["x", "y"], [[0, 1], [2, 3]], [-1.0, -3.0], name="b"),
    }
    scores = scores_of(questions, 4)
    assert set(scores) == set(BEFORE_CONTEXTS)
    assert scores["agreement"].tolist() == [0.0, 1.0]
    assert scores["vote_share"].tolist() == [0.0, 0.5]
    winner = ["x", "y"].index(questions["b"].vote.winner or "")
    assert scores["mean_logprob"].tolist() == [1.0, [1.0, 3.0][winner]]
    assert scores["entropy"].tolist() == scores["mean_logprob"].tolist()
    assert scores["length"].tolist() == [3.5, 3.0 + winner]
    assert scores["self_certainty"].tolist() == [-0.5, -float(winner)]
    assert scores["probe_score"].tolist() == [0.5, 0.5]
    assert scores["neuron_count"].tolist() == pytest.approx([-math.log(2) / 2, math.log(2) / 2])
    assert scores["random"].tolist() == drawn(["a", "b"], 0)


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
    assert counted([grown(*size) for size in sizes]) == pytest.approx(np.zeros(4), abs=1e-12)
    scores = counted([grown(*size) for size in [*sizes, (4, 80)]])
    assert scores.argmax() == 4
    assert counted([grown(4, 10), grown(4, 20)]) == pytest.approx([-math.log(2) / 2, math.log(2) / 2])


def test_scores_that_lack_what_they_need_are_absent() -> None:
    questions = {"a": signal(["x", "x"], [[0], [1]]), "b": signal(["x", "x"], [[0], [1]], [-1.0, None])}
    scores = scores_of(questions, 2)
    assert set(BEFORE_CONTEXTS) - set(scores) == {"mean_logprob", "entropy"}


def test_random_scores_follow_seed_and_id_and_are_uniform() -> None:
    assert drawn(["a"], 0) == drawn(["a"], 0) != drawn(["a"], 1)
    values = np.array(drawn([f"q{i}" for i in range(2000)], 0))
    assert abs(values.mean() - 0.5) < 0.03 and values.min() >= 0 and values.max() < 1
    assert np.histogram(values, bins=10, range=(0, 1))[0].min() > 140


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
