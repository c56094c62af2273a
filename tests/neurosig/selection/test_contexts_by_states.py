"""Contexts and filters by hidden states at the answer, by hand, and contexts of large pools in blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from neurosig.hallucination.belief import AnswerState, certainty, jensen_shannon, mean_belief, votes_belief
from neurosig.questions.vote import Vote
from neurosig.runtime.errors import UserError
from neurosig.selection import contexts as module
from neurosig.selection.choose import Candidate, drop_nearest, selection_reasons
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import choose_contexts


def candidate(name: str, trajectory: list[float], sure: float = 1.0, **changes: Any) -> Candidate:
    vector = torch.tensor(trajectory)
    fields: dict[str, Any] = {
        "text_sha256": name, "kind": "k", "vote": Vote("x", 6, ("x",), 8), "score": None, "representative": 3,
        "shortest": 1, "signature": torch.tensor([0]), "hidden": torch.ones(2), "num_tokens": 10, "likeliest": 2,
        "state": AnswerState(vector, vector, sure),
    }  # fmt: skip
    return Candidate(question_id=name, **{**fields, **changes})


def chosen(candidates: list[Candidate], policy: str, m: int = 3, **options: Any) -> list[tuple[str, float]]:
    """The first question's demonstrations, best first."""
    config = SelectionConfig(context_policy=policy, num_demonstrations=m, **options)
    context = choose_contexts(candidates, [True] * len(candidates), config)[0]
    return [(item.question_id, item.similarity) for item in reversed(context)]


def test_trajectories_count_squared_and_by_certainty() -> None:
    """Cosines with a: b 1, c .6, d .8, e -1; certainties .3, 1, .5, 1."""
    pool = [
        candidate("a", [1.0, 0.0]),
        candidate("b", [2.0, 0.0], 0.3),
        candidate("c", [0.6, 0.8], 1.0),
        candidate("d", [0.8, 0.6], 0.5),
        candidate("e", [-1.0, 0.0], 1.0),
    ]
    assert chosen(pool, "trajectory", 4) == [("c", 0.36), ("d", 0.32), ("b", 0.3), ("e", 0.0)]
    assert chosen(pool, "final_layer", 4) == [("b", 1.0), ("d", 0.8), ("c", 0.6), ("e", -1.0)]


def test_mutual_takes_what_adds_information() -> None:
    """b is nearly d, which comes first; then c tells more, though it resembles a less. The last two centre the pool."""
    spread = [[1, 1, 0, 0], [1, 0, 0.01, 0], [0, 0.9, 0.5, 0], [1, 0.01, 0, 0]]
    rest = -np.sum(spread, axis=0) / 2
    apart = np.array([0, 0, 0, 10])
    vectors = np.array([*spread, rest + apart, rest - apart])
    pool = [candidate(name, vector.tolist()) for name, vector in zip("abcdef", vectors, strict=True)]
    assert [name for name, _ in chosen(pool, "final_layer", 3)] == ["d", "b", "c"]
    found = chosen(pool, "mutual", 2)
    assert [name for name, _ in found] == ["d", "c"]
    cosine = vectors[0] @ vectors[3] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[3])
    assert found[0][1] == pytest.approx(-0.5 * math.log(1 - cosine**2), abs=1e-6)


def test_gains_add_up_to_the_information_of_the_whole_context() -> None:
    """-1/2 log(1 - R^2) of the least-squares fit of the question's vector by those of its demonstrations."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 12))
    pool = [candidate(f"q{place}", row.tolist()) for place, row in enumerate(vectors)]
    found = chosen(pool, "mutual", 3)
    centred = vectors - vectors.mean(axis=0)
    others = centred[[int(name[1:]) for name, _ in found]].T
    fit, *_ = np.linalg.lstsq(others, centred[0], rcond=None)
    unexplained = np.sum((centred[0] - others @ fit) ** 2) / np.sum(centred[0] ** 2)
    assert sum(gain for _, gain in found) == pytest.approx(-0.5 * math.log(unexplained), abs=1e-4)


def test_own_solutions_and_what_they_need() -> None:
    pool = [candidate("a", [1.0]), candidate("b", [1.0], likeliest=None, representative=None, shortest=None)]
    for policy, rollout in (("majority_solution", 1), ("likeliest_solution", 2)):
        config = SelectionConfig(context_policy=policy)
        shown = choose_contexts(pool, [True, True], config)
        assert [(item.question_id, item.rollout_id) for item in shown[0]] == [("a", rollout)] and shown[1] == []
    without = [candidate("a", [1.0], likeliest=None)]
    with pytest.raises(UserError, match="likeliest_solution: the rollouts have no log-probabilities"):
        choose_contexts(without, [True], SelectionConfig(context_policy="likeliest_solution"))


def test_states_that_were_not_measured_are_missed_in_words() -> None:
    pool = [candidate("a", [1.0], state=None), candidate("b", [1.0])]
    for options in ({"context_policy": "trajectory"}, {"context_policy": "mutual"}):
        with pytest.raises(UserError, match='"a": no states at its answer'):
            choose_contexts(pool, [True, True], SelectionConfig(**options))
    with pytest.raises(UserError, match="redundancy compares states at the answer, which this export has not"):
        selection_reasons(pool, SelectionConfig(question_filter="redundancy"))


def test_redundancy_drops_one_of_the_nearest_two_again_and_again() -> None:
    """Angles 0, 5, 40, 90, 100 degrees: the 100 goes (10 apart comes after 5 apart, so 5 first), then 100, then 40."""
    angles = np.radians([0, 5, 40, 90, 100])
    states = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert drop_nearest(states, 5).tolist() == [True] * 5
    assert drop_nearest(states, 4).tolist() == [True, False, True, True, True]
    assert drop_nearest(states, 3).tolist() == [True, False, True, True, False]
    assert drop_nearest(states, 2).tolist() == [True, False, False, True, False]
    pool = [candidate(f"q{place}", row.tolist()) for place, row in enumerate(states)]
    reasons, _ = selection_reasons(pool, SelectionConfig(question_filter="redundancy", keep_fraction=0.6))
    assert reasons == ["selected", "rejected", "selected", "selected", "rejected"]


def test_redundancy_equals_the_naive_algorithm() -> None:
    states = torch.from_numpy(np.random.default_rng(1).normal(size=(60, 6)))
    unit = torch.nn.functional.normalize(states, dim=1)
    left = list(range(60))
    while len(left) > 12:
        cosine = unit[left] @ unit[left].T - 2 * torch.eye(len(left))
        left.pop(max(divmod(int(cosine.argmax()), len(left))))
    assert drop_nearest(states, 12).nonzero()[:, 0].tolist() == left


def test_beliefs_by_hand() -> None:
    assert votes_belief(["x", "x", None, "y"]) == {"x": 0.5, None: 0.25, "y": 0.25}
    assert mean_belief([{"x": 1.0}, {"x": 0.5, "y": 0.5}]) == {"x": 0.75, "y": 0.25}
    assert certainty({"x": 0.5, "y": 0.5}, 2) == 0.0 and certainty({"x": 1.0, "y": 0.0}, 2) == 1.0
    assert certainty({"x": 0.5, "y": 0.5}, 4) == pytest.approx(0.5) and certainty({"x": 1.0}, 1) == 1.0
    assert jensen_shannon({"x": 1.0}, {"x": 1.0}) == 0.0
    assert jensen_shannon({"x": 1.0}, {"y": 1.0}) == pytest.approx(math.log(2))
    middle = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert jensen_shannon({"x": 1.0}, {"x": 0.5, "y": 0.5}) == pytest.approx(middle)


def signatures(n: int, seed: int = 0) -> list[Candidate]:
    """Every fifth question is a copy in text of the one before."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(n):
        ids = torch.from_numpy(np.sort(rng.choice(60, 12, replace=False)).astype(np.int32))
        text = f"t{place - 1 if place % 5 == 4 else place}"
        winner = Vote(f"w{place % 3}", 6, (f"w{place % 3}",), 8)
        made.append(candidate(f"q{place:03d}", [1.0], signature=ids, text_sha256=text, vote=winner))
    return made


@pytest.mark.parametrize("same_label_excluded", [False, True])
@pytest.mark.parametrize("policy", ["nearest", "random", "random_within_kind"])
def test_blocks_give_the_same_contexts_as_all_pairs(
    policy: str, same_label_excluded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = signatures(50)
    config = SelectionConfig(context_policy=policy, num_demonstrations=4, same_label_excluded=same_label_excluded)
    keep = [place % 7 != 3 for place in range(50)]
    whole = choose_contexts(pool, keep, config)
    monkeypatch.setattr(module, "BLOCK", 3)
    assert choose_contexts(pool, keep, config) == whole
    by_id = {one.question_id: one for one in pool}
    for one, context, kept in zip(pool, whole, keep, strict=True):
        assert len(context) == (4 if kept else 0)
        for item in context:
            other = by_id[item.question_id]
            assert other.text_sha256 != one.text_sha256 and keep[pool.index(other)]
            assert not same_label_excluded or other.vote.winner != one.vote.winner
            assert item.similarity == pytest.approx(one.similarity(other), abs=1e-6)
        if policy == "nearest" and kept:
            rivals = [
                one.similarity(other) for place, other in enumerate(pool)
                if keep[place] and other.text_sha256 != one.text_sha256
                and not (same_label_excluded and other.vote.winner == one.vote.winner)
            ]  # fmt: skip
            best = sorted(rivals, reverse=True)[:4]
            assert [item.similarity for item in reversed(context)] == pytest.approx(best, abs=1e-6)
