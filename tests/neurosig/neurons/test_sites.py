"""Where the neurons are, checked against the modules of real architectures built from a config."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel

from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.runtime.errors import UserError
from tests.support.tiny import ALL_ARCHS, D_MLP, D_MODEL, MIXTURES, Arch, MixtureArch, OtherArch, tiny_model

LLAMA = ("model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.act_fn")
FIRST_LAYER = dict.fromkeys(ALL_ARCHS, LLAMA) | {
    "gpt2": ("transformer.h.0", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.act"),
    "gpt_neox": ("gpt_neox.layers.0", "gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.0.mlp.act"),
    "opt": ("model.decoder.layers.0", "model.decoder.layers.0.fc2", "model.decoder.layers.0.activation_fn"),
    "phi3": ("model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.activation_fn"),
    "starcoder2": ("model.layers.0", "model.layers.0.mlp.c_proj", "model.layers.0.mlp.act"),
}
UNGATED = ("gpt2", "gpt_neox", "opt", "starcoder2")
IDS = torch.arange(5, 17).view(2, 6)


def seen_in(model: PreTrainedModel, *paths: str) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and first output of each module as the model reads ``IDS``."""
    seen = {}
    handles = []
    for path in paths:

        def keep(module: nn.Module, args: tuple, kwargs: dict, out: object, path: str = path) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[path] = (x, out[0] if isinstance(out, tuple) else out)

        handles.append(model.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_sites_of_each_architecture(arch: Arch | OtherArch) -> None:
    model = tiny_model(arch)
    sites = ffn_sites(model)
    assert (sites.blocks[0], sites.layers[0], sites.acts[0]) == FIRST_LAYER[arch]
    assert sites.n_layers == len(sites.acts) == len(sites.blocks) == model.config.num_hidden_layers
    assert (sites.d_mlp, sites.d_model) == (D_MLP, D_MODEL)
    assert sites.gated == (arch not in UNGATED)
    for layer, block in enumerate(sites.blocks):
        assert block.endswith(f".{layer}")
        assert sites.layers[layer].startswith(f"{block}.") and sites.acts[layer].startswith(f"{block}.")
    assert len({id(model.get_submodule(act)) for act in sites.acts}) == sites.n_layers  # no layer shares another's


@pytest.mark.parametrize("arch", ALL_ARCHS)
@torch.no_grad()
def test_a_value_is_the_gated_activation(arch: Arch | OtherArch) -> None:
    """The down projection reads act(gate) * up, or act(x) where there is no gate; the block's input says what x is."""
    model = tiny_model(arch)
    sites = ffn_sites(model)
    down, act = sites.layers[1], sites.acts[1]
    mlp = model.get_submodule(down.rpartition(".")[0])
    names = [name for name, _ in mlp.named_children()]
    up_name = next(name for name in ("gate_up_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1") if name in names)
    up_path = f"{down.rpartition('.')[0]}.{up_name}"
    seen = seen_in(model, up_path, down, act)
    value = seen[down][0]
    assert value.shape == ((12, D_MLP) if arch == "opt" else (2, 6, D_MLP))
    activation = model.get_submodule(act)
    if not sites.gated:
        torch.testing.assert_close(value, activation(seen[up_path][1]), rtol=0, atol=0)
        torch.testing.assert_close(value, seen[act][1], rtol=0, atol=0)
        return
    if arch == "phi3":
        gate, up = seen[up_path][1].split(D_MLP, dim=-1)
    else:
        gate, up = mlp.gate_proj(seen[up_path][0]), seen[up_path][1]
    torch.testing.assert_close(seen[act][1], activation(gate), rtol=0, atol=0)
    torch.testing.assert_close(value, activation(gate) * up, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_blocks_carry_the_residual_stream(arch: Arch | OtherArch) -> None:
    """Each block's output is the next one's input: [batch, seq, d_model], a tensor or the first item of a tuple."""
    model = tiny_model(arch)
    sites = ffn_sites(model)
    seen = seen_in(model, *sites.blocks)
    for block, following in zip(sites.blocks, sites.blocks[1:], strict=False):
        assert seen[block][1].shape == (2, 6, D_MODEL)
        assert torch.equal(seen[block][1], seen[following][0])
    hidden = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[sites.blocks[0]][1], hidden[1], rtol=0, atol=0)


@pytest.mark.parametrize("arch", ALL_ARCHS)
@torch.no_grad()
def test_w_out_norm_is_what_one_neuron_adds(arch: Arch | OtherArch) -> None:
    """One-hot values show each output direction, whatever the layout of the weight."""
    model = tiny_model(arch)
    sites = ffn_sites(model)
    norms = w_out_norms(model, sites)
    assert norms.shape == (sites.n_layers, D_MLP)
    for layer, path in enumerate(sites.layers):
        down = model.get_submodule(path)
        directions = down(torch.eye(D_MLP)) - down(torch.zeros(D_MLP))
        torch.testing.assert_close(norms[layer], directions.square().sum(dim=1).sqrt())


def test_w_out_norms_of_a_half_precision_model_are_fp32() -> None:
    model = tiny_model("llama").bfloat16()
    norms = w_out_norms(model, ffn_sites(model))
    assert norms.dtype == torch.float32
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    torch.testing.assert_close(norms[1, 5], weight[:, 5].norm())


@pytest.mark.parametrize("arch", MIXTURES)
def test_a_mixture_of_experts_says_that_its_experts_have_no_module(arch: MixtureArch) -> None:
    message = rf"'{arch}'.*experts are no modules but slices of one parameter \(model\.layers\.0\.mlp\.experts\."
    with pytest.raises(UserError, match=message):
        ffn_sites(tiny_model(arch))


def test_a_model_without_its_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"LlamaModel has no language-model head"):
        ffn_sites(LlamaModel(tiny_model("llama").config))


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    sites = ffn_sites(model)
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj has torch.int8 weights"):
        w_out_norms(model, sites)
