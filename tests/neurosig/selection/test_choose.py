"""Clean filter, contexts, signatures and the probe."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.probe import agreement_labels, contribution_matrix, fit_probe
from neurosig.patterns.signatures import representative
from neurosig.patterns.similarity import jaccard, mean_pairwise_jaccard
from neurosig.questions.vote import Vote, majority_vote
from neurosig.runtime.errors import UserError
from neurosig.selection.choose import Candidate, selection_reasons
from neurosig.selection.config import SelectionConfig
from neurosig.selection.contexts import choose_contexts

# patterns


def test_jaccard_by_hand() -> None:
    sets = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9], [3, 2, 1, 0]])
    expected = torch.tensor([[1, 2 / 6, 0, 1], [2 / 6, 1, 0, 2 / 6], [0, 0, 1, 0], [1, 2 / 6, 0, 1]])
    torch.testing.assert_close(jaccard(sets, sets), expected)
    for block in (1, 3):
        torch.testing.assert_close(jaccard(sets, sets, block=block), expected)
    torch.testing.assert_close(jaccard(sets[:1], sets[1:]), expected[:1, 1:])
    assert mean_pairwise_jaccard(sets[:3]) == pytest.approx((2 / 6 + 0 + 0) / 3)
    assert mean_pairwise_jaccard(sets[:1]) == 1.0


# probe


def planted(n_questions: int = 60, k: int = 4, n_neurons: int = 200, size: int = 40, seed: int = 0) -> Any:
    """Contributions in which neurons 3 and 7 are strong when a question is guessed, neuron 11 when it is known."""
    rng = np.random.default_rng(seed)
    guessed = np.arange(n_questions) % 2 == 0
    ids, values = [], []
    for question in range(n_questions):
        for _ in range(k):
            others = rng.choice(np.arange(20, n_neurons), size - 3, replace=False)
            ids.append([3, 7, 11, *others])
            signal = np.array([1.0, 0.8, 0.2]) if guessed[question] else np.array([0.2, 0.1, 1.0])
            values.append([*(signal + rng.normal(0, 0.15, 3)).clip(0.01), *rng.uniform(0, 1, size - 3)])
    matrix = contribution_matrix(np.array(ids), np.array(values, dtype=np.float32), n_neurons)
    owners = [f"q{question}" for question in range(n_questions) for _ in range(k)]
    return matrix, np.repeat(guessed.astype(int), k), owners


def test_the_matrix_holds_each_contribution_at_its_neuron() -> None:
    matrix = contribution_matrix(np.array([[4, 1], [0, 2]]), np.array([[0.5, 0.25], [1.0, 2.0]], dtype=np.float32), 6)
    assert matrix.toarray().tolist() == [[0, 0.25, 0, 0, 0.5, 0], [1, 0, 2, 0, 0, 0]]


def test_planted_neurons_are_located_with_their_sign() -> None:
    matrix, labels, owners = planted()
    result = fit_probe(matrix, labels, owners, ProbeConfig())
    assert set(result.neurons[:3]) == {3, 7, 11}
    weight = dict(zip(result.neurons.tolist(), result.weights.tolist(), strict=True))
    assert weight[3] > 0 and weight[7] > 0 > weight[11]
    assert roc_auc_score(labels, result.scores) > 0.95


def test_no_question_is_scored_by_a_probe_that_saw_it() -> None:
    """A neuron of its own for each question: memorising gives AUROC 1, cross-fitting gives chance."""
    n, k = 40, 4
    ids = np.repeat(np.arange(n), k)[:, None]
    labels = np.repeat(np.random.default_rng(0).permutation(n) % 2, k)
    matrix = contribution_matrix(ids, np.ones((n * k, 1), dtype=np.float32), n)
    owners = [f"q{index}" for index in range(n) for _ in range(k)]
    result = fit_probe(matrix, labels, owners, ProbeConfig(inverse_penalty=100.0))
    assert roc_auc_score(labels, result.scores) < 0.6
    assert len(result.neurons) > n / 2


def test_unlabelled_rollouts_are_scored_but_teach_nothing() -> None:
    matrix, labels, owners = planted()
    hidden = labels.copy()
    hidden[:40] = -1
    result = fit_probe(matrix, hidden, owners, ProbeConfig())
    assert roc_auc_score(labels[:40], result.scores[:40]) > 0.9
    poisoned = np.where(hidden == -1, -1, labels)
    assert np.array_equal(fit_probe(matrix, poisoned, owners, ProbeConfig()).scores, result.scores)


def test_labels_come_from_the_vote_share_alone() -> None:
    shares = np.array([1.0, 0.75, 0.74, 0.5, 0.49, 0.0])
    assert agreement_labels(shares, ProbeConfig()).tolist() == [0, 0, -1, -1, 1, 1]


def test_without_both_kinds_of_question_there_is_no_signal(caplog: pytest.LogCaptureFixture) -> None:
    matrix, labels, owners = planted()
    result = fit_probe(matrix, np.zeros_like(labels), owners, ProbeConfig())
    assert not result.informative and len(result.neurons) == 0
    assert set(result.scores) == {0.5}
    assert "no signal: of 60 questions, the rollouts of 60 agree and of 0 split" in caplog.text


# selection


def test_options_out_of_range_are_named() -> None:
    for config, options, message in (
        (SelectionConfig, {"keep_fraction": 0.0}, "keep-fraction: expected above 0 and at most 1, got 0.0"),
        (SelectionConfig, {"min_vote_share": float("nan")}, "min-vote-share: expected 0 to 1, got nan"),
        (SelectionConfig, {"num_demonstrations": 0}, "num-demonstrations: expected at least 1"),
        (SelectionConfig, {"max_context_tokens": 0}, "max-context-tokens: expected at least 1"),
        (ProbeConfig, {"folds": 1}, "probe-folds: expected at least 2, got 1"),
        (ProbeConfig, {"agree_share": 0.4}, "probe-split-share: expected 0 to --probe-agree-share, got 0.5"),
        (ProbeConfig, {"inverse_penalty": 0.0}, "probe-inverse-penalty: expected above 0, got 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            config(**options)


def candidate(
    name: str, count: int = 6, score: float = 0.1, kind: str = "k", tied: int = 1, **changes: Any
) -> Candidate:
    fields: dict[str, Any] = {
        "question_id": name,
        "text_sha256": name,
        "kind": kind,
        "vote": Vote("x" if count else None, count, tuple("xyz"[: tied if count else 0]), 8),
        "score": score,
        "representative": 0 if count else None,
        "shortest": 1 if count else None,
        "signature": torch.arange(4, dtype=torch.int32) + 10 * ord(name[0]),
        "hidden": torch.tensor([1.0, 0.0]),
        "num_tokens": 10,
    }
    return Candidate(**{**fields, **changes})


def test_every_question_filter() -> None:
    candidates = [
        candidate("a", score=0.1),
        candidate("b", score=0.3),
        candidate("c", score=0.2),
        candidate("d", score=0.9),
        candidate("e", count=3),
        candidate("f", count=4, tied=2),
        candidate("g", count=0),
    ]
    vote = ["low_agreement", "tie", "no_parse"]
    expected = {
        "neuron": ["selected", "score", "selected", "score", *vote],
        "vote_only": ["selected"] * 4 + vote,
        "neuron_only": [
            "selected",
            "score",
            "selected",
            "score",
            "selected",
            "score",
            "no_parse",
        ],
        "threshold": ["selected", "selected", "selected", "score", *vote],
        "all": ["selected"] * 7,
    }
    candidates[5] = candidate("f", count=4, tied=2, score=0.5)
    for name, reasons in expected.items():
        assert selection_reasons(candidates, SelectionConfig(question_filter=name))[0] == reasons, name  # type: ignore[arg-type]


def sets(*overlaps: int) -> list[Candidate]:
    """Question a, and others that share 4, 3, 2, ... neurons with it."""
    others = [torch.cat([torch.arange(n), 100 * (i + 1) + torch.arange(8 - n)]) for i, n in enumerate(overlaps)]
    return [candidate("abcdefgh"[i], signature=s.int()) for i, s in enumerate([torch.arange(8), *others])]


def test_the_nearest_question_comes_last() -> None:
    candidates = sets(2, 6, 4)
    clean = [True] * 4
    chosen = choose_contexts(candidates, clean, SelectionConfig(num_demonstrations=2))[0]
    assert [(shown.question_id, shown.similarity) for shown in chosen] == [
        ("d", round(4 / 12, 6)),
        ("c", round(6 / 10, 6)),
    ]
    first = choose_contexts(candidates, clean, SelectionConfig(context_policy="nearest_first", num_demonstrations=2))[0]
    assert first == chosen[::-1]


def test_a_question_its_twin_and_the_unclean_are_never_context() -> None:
    candidates = sets(7, 6, 5, 4)
    candidates[1] = candidate("b", signature=candidates[1].signature, text_sha256="a")
    candidates[3] = candidate("d", count=0, signature=candidates[3].signature)
    contexts = choose_contexts(candidates, [True, True, False, True, True], SelectionConfig(num_demonstrations=4))
    assert [shown.question_id for shown in contexts[0]] == ["e"]
    assert contexts[2] == []


def test_equally_near_questions_come_in_input_order() -> None:
    candidates = sets(4, 4, 4, 4)
    for order in ([0, 1, 2, 3, 4], [0, 4, 2, 1, 3]):
        chosen = choose_contexts([candidates[i] for i in order], [True] * 5, SelectionConfig(num_demonstrations=3))[0]
        assert [shown.question_id for shown in chosen] == ["abcde"[i] for i in (order[3], order[2], order[1])]


def test_a_context_is_as_long_as_the_pool_allows() -> None:
    contexts = choose_contexts(sets(2, 6), [True] * 3, SelectionConfig(num_demonstrations=9))
    assert [[shown.question_id for shown in context] for context in contexts] == [["b", "c"], ["c", "a"], ["b", "a"]]
    assert choose_contexts(sets(2), [True, False], SelectionConfig()) == [[], []]
    assert choose_contexts(sets(2), [False, False], SelectionConfig()) == [[], []]


def test_within_kind_goes_beyond_it_only_when_it_must() -> None:
    candidates = [candidate(name, kind="xxyyyy"[i]) for i, name in enumerate("abcdef")]
    config = SelectionConfig(context_policy="random_within_kind", num_demonstrations=2)
    for seed in range(5):
        contexts = choose_contexts(candidates, [True] * 6, dataclasses.replace(config, seed=seed))
        assert contexts[0][-1].question_id == "b" and contexts[0][0].question_id in "cdef"
        assert {shown.question_id for shown in contexts[2]} < set("def")


def test_random_contexts_are_seeded_and_may_keep_to_the_kind() -> None:
    candidates = [candidate(name, kind="xy"[i % 2]) for i, name in enumerate("abcdefgh")]
    clean = [True] * 8

    def ids(**options: Any) -> list[list[str]]:
        contexts = choose_contexts(candidates, clean, SelectionConfig(**options))
        return [[shown.question_id for shown in context] for context in contexts]

    assert ids(context_policy="random") == ids(context_policy="random")
    assert ids(context_policy="random") != ids(context_policy="random", seed=1)
    kinds = dict(zip("abcdefgh", "xyxyxyxy", strict=True))
    for name, context in zip("abcdefgh", ids(context_policy="random_within_kind"), strict=True):
        assert {kinds[shown] for shown in context} == {kinds[name]}
        assert name not in context
    assert any(
        {kinds[s] for s in c} != {kinds[n]} for n, c in zip("abcdefgh", ids(context_policy="random"), strict=True)
    )
    assert ids(context_policy="none") == [[]] * 8


def test_the_representative_is_the_cleanest_majority_rollout() -> None:
    answers = ["x", None, "x", "y", "x"]
    assert representative(answers, majority_vote(answers, "q").winner, [0.4, 0.0, 0.2, 0.0, 0.2]) == 2
    assert representative([None], None, [0.1]) is None


def test_signatures_of_different_sizes_are_compared_by_their_own_union() -> None:
    candidates = sets(4, 4)
    candidates[2] = candidate("c", signature=torch.arange(4, dtype=torch.int32))
    (chosen,) = choose_contexts(candidates, [True] * 3, SelectionConfig(num_demonstrations=1))[0]
    assert (chosen.question_id, chosen.similarity) == ("c", 0.5)  # 4 shared of 8, against 4 of 12


def test_hidden_states_are_compared_by_angle() -> None:
    directions = {"a": [1.0, 0.0], "b": [0.0, 5.0], "c": [3.0, 3.0], "d": [-9.0, 0.0]}
    candidates = [candidate(name, hidden=torch.tensor(vector)) for name, vector in directions.items()]
    config = SelectionConfig(signature="hidden_state", num_demonstrations=3)
    context = choose_contexts(candidates, [True] * 4, config)[0]
    assert [(shown.question_id, shown.similarity) for shown in context] == [
        ("d", -1.0),
        ("b", 0.0),
        ("c", pytest.approx(0.5**0.5, abs=1e-6)),
    ]


def test_a_budget_drops_the_least_similar_examples() -> None:
    candidates = sets(6, 4, 2)
    candidates[2] = dataclasses.replace(candidates[2], num_tokens=30)
    for budget, expected in ((9, []), (10, ["b"]), (39, ["b"]), (40, ["c", "b"]), (50, ["d", "c", "b"])):
        config = SelectionConfig(num_demonstrations=3, max_context_tokens=budget)
        assert [shown.question_id for shown in choose_contexts(candidates, [True] * 4, config)[0]] == expected


def test_examples_with_the_same_label_can_be_left_out() -> None:
    candidates = sets(6, 4)
    candidates[1] = dataclasses.replace(candidates[1], vote=Vote("y", 6, ("y",), 8))
    for excluded, expected in ((False, ["c", "b"]), (True, ["b"])):
        context = choose_contexts(candidates, [True] * 3, SelectionConfig(same_label_excluded=excluded))[0]
        assert [shown.question_id for shown in context] == expected


def test_the_majority_solution_is_the_questions_own_shortest() -> None:
    candidates = [candidate("a", shortest=3), candidate("b", shortest=1), candidate("c", count=0)]
    contexts = choose_contexts(candidates, [True, False, True], SelectionConfig(context_policy="majority_solution"))
    assert [[(shown.question_id, shown.rollout_id) for shown in context] for context in contexts] == [
        [("a", 3)],
        [],
        [],
    ]
