"""Where the neurons are, checked against the modules of real architectures built from a config."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHS, D_MLP, D_MODEL, Arch, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

from neurosig.errors import UserError
from neurosig.sites import ffn_sites, w_out_norms

FIRST_LAYER = {
    "qwen3": ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.act_fn"),
    "llama": ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.act_fn"),
    "gemma3": ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.act_fn"),
    "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.act"),
    "gpt_neox": ("gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.0.mlp.act"),
}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("arch", ARCHS)
def test_sites_of_each_architecture(arch: Arch) -> None:
    model = tiny_model(arch)
    sites = ffn_sites(model)
    assert (sites.layers[0], sites.acts[0]) == FIRST_LAYER[arch]
    assert sites.n_layers == len(sites.acts) == model.config.num_hidden_layers
    assert (sites.d_mlp, sites.d_model) == (D_MLP, D_MODEL)
    assert sites.gated == (arch in ("qwen3", "llama", "gemma3"))
    assert [path.split(".")[2] for path in sites.layers] == [str(layer) for layer in range(sites.n_layers)]


@pytest.mark.parametrize(
    "config_class", [Gemma2Config, MistralConfig, Olmo2Config, Phi3Config, Qwen2Config, SmolLM3Config]
)
@torch.no_grad()
def test_value_at_the_down_projection_of_the_other_gated_types(config_class: type[PreTrainedConfig]) -> None:
    """The down projection reads act(gate) * up, the activation gives act(gate); in phi3's fused FFN too."""
    model = AutoModelForCausalLM.from_config(config_class(**SMALL)).eval()
    sites = ffn_sites(model)
    assert sites.gated and (sites.n_layers, sites.d_mlp, sites.d_model) == (2, 24, 16)

    seen = {}
    down, act = model.get_submodule(sites.layers[1]), model.get_submodule(sites.acts[1])
    mlp = model.get_submodule(sites.layers[1].rpartition(".")[0])
    mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    down.register_forward_pre_hook(lambda _, args: seen.update(value=args[0]))
    act.register_forward_hook(lambda _, args, out: seen.update(act=out))
    model(torch.arange(2, 9)[None])

    if config_class is Phi3Config:
        gate, up = (seen["x"] @ mlp.gate_up_proj.weight.T).split(24, dim=-1)
    else:
        gate, up = seen["x"] @ mlp.gate_proj.weight.T, seen["x"] @ mlp.up_proj.weight.T
    torch.testing.assert_close(seen["act"], act(gate))
    torch.testing.assert_close(seen["value"], act(gate) * up)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_w_out_norm_is_what_one_neuron_adds(arch: Arch) -> None:
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


def test_unsupported_types_name_the_supported_ones() -> None:
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    moe = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    for model in (opt, moe):
        with pytest.raises(UserError, match=rf"'{model.config.model_type}'.*gemma3_text.*gpt2.*llama.*qwen3"):
            ffn_sites(model)


def test_a_model_without_its_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"LlamaModel .*no module 'model.layers.0.mlp.down_proj'"):
        ffn_sites(LlamaModel(tiny_model("llama").config))


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    sites = ffn_sites(model)
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj has torch.int8 weights"):
        w_out_norms(model, sites)
