"""The pure functions, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from neurosig.contributions import active_set, cett, magnitude, masked_mean, neurons_per_layer


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
    mask = torch.tensor([[True, False], [False, False]])
    assert masked_mean(x, mask).isnan().all()


def test_active_set_is_sorted_with_ties_by_lower_index() -> None:
    mean = torch.tensor([[0.5, 2.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 9.0]])
    ids, values = active_set(mean, 3)
    assert ids.tolist() == [[1, 3, 2], [4, 0, 1]]
    assert values.tolist() == [[2.0, 2.0, 1.0], [9.0, 1.0, 1.0]]


def test_active_set_of_many_equal_values_is_the_first_k() -> None:
    """Wide enough that an unstable sort or topk returns other indices."""
    mean = torch.ones(2, 5000)
    mean[1, 4321] = 2.0
    ids, _ = active_set(mean, 40)
    assert ids.tolist() == [list(range(40)), [4321, *range(39)]]


def test_active_set_keeps_no_more_memory_than_it_shows() -> None:
    """A slice would keep the whole sorted row alive."""
    for batch in (1, 3):
        for x in active_set(torch.rand(batch, 1000), 4):
            assert x.untyped_storage().nbytes() == batch * 4 * x.element_size()


@pytest.mark.parametrize(
    ("n_layers", "d_mlp", "set_size", "k"),
    [(30, 1536, 1000, 34), (36, 9728, 1000, 28), (40, 9728, 1000, 25), (2, 64, 1000, 64), (4, 64, 1, 1)],
)
def test_neurons_per_layer(n_layers: int, d_mlp: int, set_size: int, k: int) -> None:
    assert neurons_per_layer(n_layers, d_mlp, set_size) == k
