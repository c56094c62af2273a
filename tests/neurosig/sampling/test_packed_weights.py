"""Packed weights: the same products, for the weights as they are at the time, and nothing outside the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurosig.sampling.packed_weights import PackedWeights
from tests.support.tiny import ARCHS, Arch, tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_logits_are_those_of_plain_weights(arch: Arch) -> None:
    model = tiny_model(arch)
    plain = model(IDS).logits
    with PackedWeights(model.modules(), rows=2):
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
    assert model(IDS).logits.equal(plain)


@torch.inference_mode()
def test_products_come_from_the_packed_copies_and_hooks_still_run() -> None:
    """A weight changed after packing is not seen until it is packed anew."""
    model = tiny_model("llama")
    projection = model.model.layers[0].mlp.down_proj
    seen: list[torch.Tensor] = []
    projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    packed, before = PackedWeights(model.modules(), rows=2), model(IDS).logits
    projection.weight.mul_(2.0)
    with packed:
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    with PackedWeights(model.modules(), rows=2):
        after = model(IDS).logits
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(model(IDS).logits, after, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4


@torch.inference_mode()
def test_a_model_in_another_dtype_is_left_alone() -> None:
    model = tiny_model("qwen3").bfloat16()
    plain = model(IDS).logits
    with PackedWeights(model.modules(), rows=2):
        assert model(IDS).logits.equal(plain)


@torch.inference_mode()
def test_nothing_is_intercepted_where_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interception per operation is a quarter of the time of decoding on a GPU."""
    calls: list[Any] = []
    intercept = PackedWeights.__torch_function__

    def counting(self: PackedWeights, func: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(func)
        return intercept(self, func, *args, **kwargs)

    monkeypatch.setattr(PackedWeights, "__torch_function__", counting)
    for model, packs in ((tiny_model("qwen3"), True), (tiny_model("qwen3").bfloat16(), False)):
        calls.clear()
        with PackedWeights(model.modules(), rows=2):
            model(IDS)
        assert bool(calls) == packs
