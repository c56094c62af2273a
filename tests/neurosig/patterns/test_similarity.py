"""Active sets and how alike they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosig.hallucination.planted import PlantedConfig, plant
from neurosig.neurons.contributions import PAD
from neurosig.patterns.similarity import jaccard, largest, mean_pairwise_jaccard, nearest_sets
from neurosig.runtime.errors import UserError


def padded(sets: list[list[int]], width: int | None = None) -> torch.Tensor:
    width = max((len(s) for s in sets), default=0) if width is None else width
    return torch.tensor([[*s, *[PAD] * (width - len(s))] for s in sets], dtype=torch.int32).view(len(sets), width)


def test_jaccard_by_hand() -> None:
    sets = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9], [3, 2, 1, 0]])
    expected = torch.tensor([[1, 2 / 6, 0, 1], [2 / 6, 1, 0, 2 / 6], [0, 0, 1, 0], [1, 2 / 6, 0, 1]])
    torch.testing.assert_close(jaccard(sets, sets), expected)
    for block in (1, 3):
        torch.testing.assert_close(jaccard(sets, sets, block=block), expected)
    torch.testing.assert_close(jaccard(sets[:1], sets[1:]), expected[:1, 1:])


def test_ragged_sets_of_different_widths_by_hand() -> None:
    a = padded([[5, 1, 9], [7], []])
    b = padded([[1, 5], [9, 5, 1, 7, 2], []])
    expected = torch.tensor([[2 / 3, 3 / 5, 0], [0, 1 / 5, 0], [0, 0, 0]])
    assert torch.equal(jaccard(a, b), expected)
    assert torch.equal(jaccard(b, a, block=1), expected.T)


def test_pads_are_no_neuron_that_two_sets_share() -> None:
    assert jaccard(padded([[1]], width=9), padded([[2]], width=9)).item() == 0.0
    assert jaccard(padded([[1]], width=9), padded([[1]], width=2)).item() == 1.0
    assert jaccard(padded([[], []], width=0), padded([[], []], width=3)).tolist() == [[0, 0], [0, 0]]


ragged = st.lists(st.lists(st.integers(0, 40), unique=True, max_size=12), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(ragged, ragged, st.integers(1, 4))
def test_jaccard_is_the_correctly_rounded_quotient(a: list[list[int]], b: list[list[int]], block: int) -> None:
    expected = [[len({*x} & {*y}) / max(len({*x} | {*y}), 1) for y in b] for x in a]
    assert torch.equal(jaccard(padded(a), padded(b), block=block), torch.tensor(expected))


def test_mean_pairwise_jaccard_by_hand() -> None:
    sets = [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8]]
    assert mean_pairwise_jaccard(padded(sets)) == pytest.approx((2 / 6 + 0 + 0) / 3)
    assert mean_pairwise_jaccard(padded([[1, 2], [], [2, 1]])) == pytest.approx((0 + 1 + 0) / 3)
    assert mean_pairwise_jaccard(padded([[], []])) == 0.0
    assert mean_pairwise_jaccard(padded(sets[:1])) == 1.0
    large = torch.from_numpy(np.stack([np.random.default_rng(0).permutation(3000)[:1000] for _ in range(8)]))
    by_set = [len({*x.tolist()} & {*y.tolist()}) for i, x in enumerate(large) for y in large[:i]]
    assert mean_pairwise_jaccard(large) == pytest.approx(np.mean([n / (2000 - n) for n in by_set]), rel=1e-7)


def rank_neighbours(similarity: torch.Tensor, forbidden: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The full matrix sorted: what `largest` and `nearest_sets` have to find."""
    values, order = similarity.masked_fill(forbidden, -torch.inf).sort(dim=1, descending=True, stable=True)
    return order[:, :m].masked_fill(values[:, :m] == -torch.inf, PAD), values[:, :m]


def test_the_largest_are_ranked_with_ties_by_order_and_without_the_forbidden() -> None:
    order, values = largest(torch.tensor([[0.5, -torch.inf, 0.5, 0.1]]), 4)
    assert order.tolist() == [[0, 2, 3, PAD]]
    assert values[0, 3] == -torch.inf
    few = torch.randint(4, (50, 30), generator=torch.Generator().manual_seed(0)).float()
    forbidden = few == 3
    found, wanted = largest(few.masked_fill(forbidden, -torch.inf), 12), rank_neighbours(few, forbidden, 12)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@settings(deadline=None, max_examples=80)
@given(ragged, ragged, st.integers(1, 9), st.integers(1, 4), st.data())
def test_nearest_sets_equal_the_ranked_full_matrix(
    a: list[list[int]], b: list[list[int]], m: int, block: int, data: st.DataObject
) -> None:
    """Small sets of few neurons: many ties, empty sets, sets of one group."""
    queries, sets = padded(a), padded(b)
    of_queries, of_sets = (
        torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for n in (len(a), len(b))
    )
    forbidden = of_queries[:, None] == of_sets
    order, values = rank_neighbours(jaccard(queries, sets), forbidden, m)
    found = nearest_sets(sets, m, queries=queries, groups=of_sets, query_groups=of_queries, block=block)
    assert torch.equal(found.similarity, values)
    assert torch.equal(found.indices, order)
    order, values = rank_neighbours(jaccard(queries, sets), torch.zeros_like(forbidden), m)
    free = nearest_sets(sets, m, queries=queries, block=block)
    assert torch.equal(free.indices, order) and torch.equal(free.similarity, values)


@pytest.fixture(scope="module")
def real_like() -> torch.Tensor:
    """600 sets of 1,020 ids, with frequent and rare neurons."""
    return torch.from_numpy(plant(PlantedConfig(n_questions=150)).ids)


def test_large_sets_have_the_neighbours_of_the_full_matrix(real_like: torch.Tensor) -> None:
    order, values = rank_neighbours(jaccard(real_like, real_like), torch.eye(len(real_like)).bool(), 10)
    found = nearest_sets(real_like, 10)
    assert torch.equal(found.indices, order) and torch.equal(found.similarity, values)
    questions = torch.arange(len(real_like)) // 4
    of_others = nearest_sets(real_like, 10, groups=questions, block=100)
    assert (questions[of_others.indices] != questions[:, None]).all()
    assert (questions[found.indices] == questions[:, None]).any()


def test_usearch_finds_nearly_all_with_exact_similarities(real_like: torch.Tensor) -> None:
    pytest.importorskip("usearch")
    questions = torch.arange(len(real_like)) // 4
    exact = nearest_sets(real_like, 10, groups=questions)
    approximate = nearest_sets(real_like, 10, groups=questions, backend="usearch", block=599)
    recall = (approximate.indices[:, :, None] == exact.indices[:, None]).any(1).double().mean()
    assert recall > 0.9
    assert (questions[approximate.indices] != questions[:, None]).all()
    rows, columns = 7, approximate.indices[7]
    torch.testing.assert_close(
        approximate.similarity[rows], jaccard(real_like[[rows]], real_like[columns])[0], rtol=0, atol=0
    )
    queries = real_like[::7]
    crossed, expected = (nearest_sets(real_like[:300], 5, queries=queries, backend=b) for b in ("usearch", "exact"))  # type: ignore[arg-type]
    assert (crossed.similarity >= expected.similarity[:, -1:]).double().mean() > 0.9
    alone = nearest_sets(padded([[1, 2], [9]]), 1, queries=padded([[9, 4, 5]]), backend="usearch")
    assert alone.indices.tolist() == [[1]] and alone.similarity.item() == pytest.approx(1 / 3)
    few = nearest_sets(padded([[1, 2], [1], []]), 5, backend="usearch")
    assert few.indices.tolist() == [[1, 2, PAD], [0, 2, PAD], [0, 1, PAD]]
    assert few.similarity[0].tolist() == [0.5, 0.0, -torch.inf]


def test_no_sets_have_no_neighbours() -> None:
    for backend in ("exact", "usearch"):
        assert nearest_sets(padded([]), 3, queries=padded([[1]]), backend=backend).indices.shape == (1, 0)
        assert nearest_sets(padded([[1]]), 3, queries=padded([]), backend=backend).similarity.shape == (0, 1)
        assert nearest_sets(padded([[1]]), 3, backend=backend).indices.tolist() == [[PAD]]


def test_neighbours_with_bad_options_are_refused() -> None:
    sets = padded([[1], [2]])
    with pytest.raises(UserError, match="m is 0"):
        nearest_sets(sets, 0)
    with pytest.raises(UserError, match="groups on one side only"):
        nearest_sets(sets, 1, queries=sets, groups=torch.tensor([0, 1]))
