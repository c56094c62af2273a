"""Features of prompts against plain hooks, one prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neurosig.neurons.sites import ffn_sites
from neurosig.runtime.errors import UserError
from neurosig.screening.config import PromptFeatures
from neurosig.screening.prompt_features import read_prompts
from tests.support.tiny import ARCHS, D_MLP, Arch, OtherArch, tiny_model

LENGTHS = (9, 14, 10, 31, 12, 9)
SHARED = 6


def prompts(shared: int = SHARED) -> dict[str, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(3, 300, (shared,), generator=generator).tolist()
    return {
        f"q{index}": (*first, *torch.randint(3, 300, (n - shared,), generator=generator).tolist())
        for index, n in enumerate(LENGTHS)
    }


def by_hooks(model: PreTrainedModel, asked: Mapping[str, tuple[int, ...]], which: str) -> dict[str, Tensor]:
    """What each layer's down projection reads, and what its block gives, at the last token of each prompt alone."""
    sites, seen = ffn_sites(model), dict[str, Tensor]()
    handles = []
    for layer, (down, block) in enumerate(zip(sites.layers, sites.blocks, strict=True)):

        def neurons(_module: object, inputs: tuple[Tensor], layer: int = layer) -> None:
            seen[f"neurons{layer}"] = inputs[0].reshape(-1, D_MLP)[-1]

        def residual(_module: object, _inputs: object, output: object, layer: int = layer) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, Tensor)
            seen[f"residual{layer}"] = tensor[0, -1]

        handles.append(model.get_submodule(down).register_forward_pre_hook(neurons))
        handles.append(model.get_submodule(block).register_forward_hook(residual))
    parts = ("neurons", "residual") if which == "both" else (which,)
    found = {}
    with torch.no_grad():
        for name, ids in asked.items():
            model(input_ids=torch.tensor([ids]))
            found[name] = torch.stack(
                [torch.cat([seen[f"{part}{layer}"] for part in parts]) for layer in range(sites.n_layers)]
            )
    for handle in handles:
        handle.remove()
    return found


def read(model: PreTrainedModel, asked: Mapping[str, tuple[int, ...]], **options: object) -> dict[str, Tensor]:
    settings: dict[str, object] = {"features": "both", "value": "gated", "batch_tokens": 40, **options}
    layers = settings.pop("layers", range(ffn_sites(model).n_layers))
    found: dict[str, Tensor] = {}
    for batch in read_prompts(model, asked, layers, **settings):  # type: ignore[arg-type]
        found |= dict(zip(batch.names, batch.features, strict=True))
    return found


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize("arch", [*ARCHS, "opt", "gemma2"])
def test_the_last_token_is_read_as_hooks_read_it(arch: Arch | OtherArch, shared: int) -> None:
    model, asked = tiny_model(arch), prompts(shared)
    wanted = by_hooks(model, asked, "both")
    found = read(model, asked)
    assert list(sorted(found)) == list(asked)
    for name in asked:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("features", ["neurons", "residual"])
def test_one_layer_alone_is_that_layer_and_no_later_one_runs(features: PromptFeatures) -> None:
    model, asked = tiny_model("llama"), prompts()
    wanted = by_hooks(model, asked, features)
    ran = []
    later = model.get_submodule(ffn_sites(model).blocks[1]).register_forward_hook(lambda *_: ran.append(1))
    found = read(model, {name: ids for name, ids in asked.items()}, features=features, layers=[0])
    later.remove()
    for name in asked:
        assert torch.allclose(found[name][0], wanted[name][0], rtol=1e-4, atol=1e-4)
    assert len(ran) <= 1  # the pass over the tokens that all prompts share


def test_batches_padding_and_what_is_done_change_nothing() -> None:
    model, asked = tiny_model("qwen3"), prompts()
    alone = {name: read(model, {name: ids}, batch_tokens=1)[name] for name, ids in asked.items()}
    for batch_tokens in (1, 40, 4096):
        found = read(model, asked, batch_tokens=batch_tokens)
        assert all(torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-5) for name in asked)
    whole, rest = read(model, asked), read(model, asked, done={"q3", "q1", "q4"})
    assert set(rest) < set(asked) and all(torch.equal(rest[name], whole[name]) for name in rest)


def test_values_that_are_not_finite_name_the_question() -> None:
    model, asked = tiny_model("qwen3"), prompts()
    with torch.no_grad():
        model.get_input_embeddings().weight[asked["q3"][-1]] = float("nan")
    with pytest.raises(UserError, match='question "q3": its prompt gives values that are not finite'):
        read(model, asked)
