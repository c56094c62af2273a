"""The pure functions, against numbers computed by hand."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import (
    ACTIVE_SETS,
    CONTRIBUTIONS,
    PAD,
    cett,
    entries_over_layers,
    largest,
    largest_entries,
    largest_per_token,
    magnitude,
    masked_mean,
    neurons_per_layer,
    pack_sets,
    token_entries,
    unembed,
)
from neurosig.neurons.reduction import reduce_layer
from neurosig.runtime.errors import UserError


def test_cett_by_hand() -> None:
    """One position; three neurons with output directions (3, 4), (0, 2), (-1, 0) and values 1, -2, 4."""
    w_down = torch.tensor([[3.0, 0.0, -1.0], [4.0, 2.0, 0.0]])
    value = torch.tensor([[[1.0, -2.0, 4.0]]])
    ffn_out = value @ w_down.T
    assert ffn_out.tolist() == [[[-1.0, 0.0]]]
    norms = torch.tensor([5.0, 2.0, 1.0])
    assert magnitude(value, norms).tolist() == [[[5.0, 4.0, 4.0]]]
    assert cett(value, norms, ffn_out).tolist() == [[[5.0, 4.0, 4.0]]]  # ||(-1, 0)|| = 1
    assert cett(value, norms, 2 * ffn_out).tolist() == [[[2.5, 2.0, 2.0]]]


def test_cett_divides_each_position_by_its_own_norm() -> None:
    value = torch.ones(1, 2, 1)
    ffn_out = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    assert cett(value, torch.tensor([20.0]), ffn_out).flatten().tolist() == [4.0, 2.0]


def test_scores_leave_their_arguments_alone() -> None:
    value, norms, ffn_out = -torch.ones(1, 1, 2), torch.tensor([2.0, 3.0]), torch.full((1, 1, 2), 5.0)
    copies = value.clone(), norms.clone(), ffn_out.clone()
    cett(value, norms, ffn_out)
    assert all(torch.equal(x, copy) for x, copy in zip((value, norms, ffn_out), copies, strict=True))


def test_scores_of_half_precision_values_are_fp32() -> None:
    value = torch.full((1, 1, 1), 3.0, dtype=torch.bfloat16)
    score = cett(value, torch.tensor([1.001]), torch.tensor([[[1.0]]], dtype=torch.bfloat16))
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(3.003, rel=1e-6)  # bfloat16 would round 1.001 to 1


def test_masked_mean_by_hand() -> None:
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]], [[5.0, 50.0], [7.0, 70.0], [100.0, 1000.0]]])
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert masked_mean(x, mask).tolist() == [[4.0, 40.0], [6.0, 60.0]]


def test_masked_mean_of_nothing_is_nan_and_hides_no_nan() -> None:
    x = torch.tensor([[[1.0], [math.nan]], [[1.0], [2.0]]])
    assert masked_mean(x, torch.tensor([[True, True], [False, False]])).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_masked_positions_hold_changes_no_mean_and_no_gradient(bad: float) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    plain = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    spoilt = plain.detach().clone()
    spoilt[~mask] = bad
    spoilt.requires_grad_()
    means = [masked_mean(x, mask) for x in (plain, spoilt)]
    assert means[0].equal(means[1])
    for x, mean in zip((plain, spoilt), means, strict=True):
        mean.square().sum().backward()
        assert x.grad is not None
    assert plain.grad is not None and spoilt.grad is not None and plain.grad.equal(spoilt.grad)


@pytest.mark.parametrize("active", ["layer_mean", "global", "per_token", "entries"])
def test_what_masked_positions_hold_changes_no_active_set(active: str) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    generator = torch.Generator().manual_seed(0)
    value, out = (torch.randn(2, 3, width, generator=generator) for width in (8, 4))
    head, w_out = torch.randn(5, 4, generator=generator), torch.randn(8, 4, generator=generator)
    options: dict[str, Any] = {"mask": mask, "norms": None, "next_ids": None}
    options["contribution"] = CONTRIBUTIONS["cett"], ("value", "w_out_norm", "ffn_out")
    options["active"] = ACTIVE_SETS[active], tuple(inspect.signature(ACTIVE_SETS[active]).parameters)
    options |= {"set_size": 3, "share": 2, "positive_only": True}
    plain = reduce_layer(0, value, out, w_out, head, **options)
    for bad in (math.nan, math.inf):
        value[~mask], out[~mask] = bad, 0.0
        spoilt = reduce_layer(0, value, out, w_out, head, **options)
        assert all(one is other is None or one.equal(other) for one, other in zip(plain, spoilt, strict=True))


def test_unembed_by_hand() -> None:
    """Output directions (3, 4), (0, 2), (-1, 0); the next tokens' head rows are (1, 0), then (0, 10)."""
    w_out = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    value = torch.tensor([[[1.0, -2.0, 4.0], [1.0, -2.0, 4.0]]])
    following = torch.tensor([[[1.0, 0.0], [0.0, 10.0]]])
    assert unembed(value, w_out, following).tolist() == [[[3.0, 0.0, -4.0], [40.0, -40.0, 0.0]]]


def test_two_cuts_by_hand() -> None:
    """Two layers of three neurons, two tokens: the best of each layer and token, then the best entries of all."""
    mask = torch.tensor([[True, True, False]])
    first = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 6.0, 0.0], [9.0, 9.0, 9.0]]])
    second = torch.tensor([[[0.5, 0.2, 0.1], [-3.0, -2.0, -1.0], [9.0, 9.0, 9.0]]])

    def cut(set_size: int, positive_only: bool = True) -> list[list[int]]:
        found = [token_entries(score, mask, 1, set_size, positive_only) for score in (first, second)]
        members = torch.cat([member for member, _ in found], dim=1)
        return ids_of(entries_over_layers(members, torch.zeros(1, 6), [kept for _, kept in found], set_size))

    assert cut(9) == [[0, 1, 3]]  # 5 and 6 of the first layer; of the second .5 alone is above 0
    assert cut(9, positive_only=False) == [[0, 1, 3, 5]]
    assert cut(2) == [[0, 1]]
    assert cut(1) == [[1]]


def test_a_neuron_counts_once_however_many_entries_it_holds() -> None:
    """The size of the set tells how concentrated the contributions are."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    one = torch.tensor([[[1.0, 0.0, 0.0]] * 4])
    spread = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    for score, size in ((one, 1), (spread, 3)):
        member, kept = token_entries(score, mask, 1, 4, True)
        assert entries_over_layers(member, score.mean(1), [kept], 4).sum() == size


def ids_of(member: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in member]


def test_largest_breaks_ties_by_lower_index() -> None:
    mean = torch.tensor([[0.5, 2.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 9.0]])
    assert ids_of(largest(mean, 3)) == [[1, 2, 3], [0, 1, 4]]
    assert ids_of(largest(mean, 9)) == [[0, 1, 2, 3, 4]] * 2


def test_largest_of_many_equal_values_is_the_first_k() -> None:
    """Wide enough that an unstable sort or topk returns other indices."""
    mean = torch.ones(2, 5000)
    mean[1, 4321] = 2.0
    assert ids_of(largest(mean, 40)) == [list(range(40)), [*range(39), 4321]]


SCORE = torch.tensor([[[9.0, 1.0, 2.0, 3.0], [4.0, 8.0, 0.0, 7.0], [0.0, 0.0, 99.0, 98.0]]])
"""One rollout of three positions and four neurons; the last position is padding in the tests below."""
MASK = torch.tensor([[True, True, False]])


def test_per_token_is_the_union_of_each_positions_largest() -> None:
    assert ids_of(largest_per_token(SCORE, MASK, 1)) == [[0, 1]]
    assert ids_of(largest_per_token(SCORE, MASK, 2)) == [[0, 1, 3]]
    assert ids_of(largest_per_token(SCORE, MASK, 99)) == [[0, 1, 2, 3]]


def test_entries_are_counted_over_all_positions_together() -> None:
    """Entries in order: 9 (neuron 0), 8 (1), 7 (3), 4 (0 again), 3 (3), 2 (2)."""
    for entries, expected in (
        (1, [0]),
        (2, [0, 1]),
        (4, [0, 1, 3]),
        (5, [0, 1, 3]),
        (6, [0, 1, 2, 3]),
        (99, [0, 1, 2, 3]),
    ):
        assert ids_of(largest_entries(SCORE, MASK, entries)) == [expected]


def test_sets_are_packed_in_ascending_order_and_padded() -> None:
    member = torch.tensor([[True, False, True, True], [False, False, True, False], [False] * 4])
    mean = torch.tensor([[3.0, 9.0, 1.0, 2.0], [9.0, 9.0, 5.0, 9.0], [1.0] * 4])
    ids, values = pack_sets(member, mean)
    assert ids.tolist() == [[0, 2, 3], [2, PAD, PAD], [PAD, PAD, PAD]]
    assert values.tolist() == [[3.0, 1.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert ids.dtype == torch.int32


@pytest.mark.parametrize(
    ("n_layers", "d_mlp", "set_size", "k"),
    [
        *[(30, 1536, 1000, 34), (36, 9728, 1000, 28), (40, 9728, 1000, 25), (2, 64, 1000, 64), (4, 64, 1, 1)],
        *[
            (30, 1536, 0.0217, 34),
            (36, 9728, 0.0217, 212),
            (5, 576, 0.0868, 50),
            (2, 64, 0.999, 64),
            (4, 64, 0.001, 1),
            (1, 100, 0.07, 7),
        ],
    ],
)
def test_neurons_per_layer(n_layers: int, d_mlp: int, set_size: int | float, k: int) -> None:
    assert neurons_per_layer(n_layers, d_mlp, set_size) == k


@pytest.mark.parametrize(
    ("active", "set_size", "smollm2", "qwen3_4b"),
    [
        ("layer_mean", 0.0217, 1020, 7632),
        ("per_token", 0.0217, 1020, 7632),
        ("global", 0.0217, 1000, 7600),
        ("entries", 0.0217, 1000, 7600),
        ("layer_mean", 1000, 1020, 1008),
        ("global", 1000, 1000, 1000),
        ("global", 0.000001, 1, 1),
    ],
)
def test_a_share_gives_each_model_its_number(active: Any, set_size: int | float, smollm2: int, qwen3_4b: int) -> None:
    """The default gives the embedded model the sets that 1,000 neurons gave it; a number is what it was."""
    config = TraceConfig(active=active, set_size=set_size)
    assert TraceConfig().set_size == 0.0217
    for n_layers, d_mlp, size in ((30, 1536, smollm2), (36, 9728, qwen3_4b)):
        sized = config.sized(n_layers, d_mlp)
        assert sized == replace(config, set_size=size) == sized.sized(n_layers, d_mlp)


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_set_size_is_a_number_or_a_share(size: int | float) -> None:
    with pytest.raises(
        UserError, match=rf"TraceConfig\.set_size is {size}; it must be at least 1, a whole number of neur"
    ):
        TraceConfig(set_size=size)
