"""Which feed-forward networks are recognised, on what evidence, and what is said of the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import neurosig
from neurosig.neurons import layouts
from neurosig.neurons.layouts import find_layout, register_layout
from neurosig.neurons.sites import ffn_sites
from neurosig.runtime.errors import UserError
from tests.support.architectures import ARCHITECTURES, GROUPED, SHARED, model_of
from tests.support.tiny import D_MLP, D_MODEL, VOCAB_SIZE, tiny_model

IDS = torch.arange(5, 17).view(2, 6)
LLAMA = {"block": "model.layers.{}", "down": "mlp.down_proj", "act": "mlp.act_fn", "gated": True}


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    yield
    layouts._REGISTERED.clear()


class Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Normed(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        value = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.layer_norm(value, value.shape[-1:]))


class WithoutModule(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Routed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class WrongWeight(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(-1))


def changed(mlp: type[LlamaMLP] | type[Two] | None = None, down: type[nn.Linear] | None = None) -> PreTrainedModel:
    """A Llama whose feed-forward networks compute something else."""
    model = tiny_model("llama")
    for layer, other in zip(model.model.layers, tiny_model("llama", seed=1).model.layers, strict=True):
        if down is not None:
            layer.mlp.down_proj.__class__ = down
        if mlp is not None and issubclass(mlp, Two):
            layer.mlp = mlp(layer.mlp, other.mlp)
        elif mlp is not None:
            layer.mlp.__class__ = mlp
    return model


def seen(model: PreTrainedModel, path: str) -> tuple[Tensor, Tensor]:
    calls: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_meta_device_shows_the_same_sites(name: str) -> None:
    """Where tensors have no numbers a copy of the first block gets random ones."""
    one = ARCHITECTURES[name]
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(AutoConfig.for_model(one.model_type, **one.config)).eval()
    devices = {name: parameter.device.type for name, parameter in hollow.named_parameters()}
    assert ffn_sites(hollow) == ffn_sites(model_of(name)) and "meta" in devices.values()
    assert {name: parameter.device.type for name, parameter in hollow.named_parameters()} == devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "phi3", "gemma3", "apertus", "opt"])
def test_rounding_hides_no_network(name: str, dtype: torch.dtype) -> None:
    model = model_of(name)
    expected = ffn_sites(model)
    assert ffn_sites(model_of(name).to(dtype)) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "qwen3_5_text"])
def test_nothing_else_passes_for_a_network(name: str) -> None:
    """As initialised, with norms that do nothing but scale, and values as wide as the residual stream and the heads."""
    one = ARCHITECTURES[name]
    width = {"n_inner": D_MODEL} if name == "gpt2" else {"intermediate_size": D_MODEL}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(one.model_type, **one.config | width)).eval()
    sites, expected = ffn_sites(model), ffn_sites(model_of(name))
    assert (sites.layers, sites.acts, sites.gated) == (expected.layers, expected.acts, expected.gated)
    assert sites.d_mlp == D_MODEL


def test_the_model_stays_as_it_was() -> None:
    """To the bit: outputs, modes, hooks, gradients and the random generator; and a second look costs no pass."""
    model = tiny_model("opt")
    before = model(IDS).logits
    model.train()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = ffn_sites(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.eval()(IDS).logits, before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert ffn_sites(model) is first and not calls


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mlp": Scaled}, r"mlp\.down_proj: mlp gives something else than its output"),
        (
            {"mlp": Normed},
            r"self_attn\.o_proj, mlp\.down_proj: input is no activation's output, alone or times a linear",
        ),
        ({"mlp": WithoutModule}, r"mlp\.down_proj: input is no activation's output"),
        ({"mlp": Two}, r"mlp\.first\.down_proj: mlp gives something else than its output; mlp\.second\.down_proj: "),
        ({"mlp": Routed}, r"mlp\.first\.down_proj: the block has several LlamaMLP"),
        ({"down": WrongWeight}, r"mlp\.down_proj: its output is not its input times its weight"),
    ],
)
def test_what_cannot_be_verified_is_refused(model: dict[str, Any], message: str) -> None:
    """In one sentence, which names what was tried and what to do."""
    with pytest.raises(UserError, match=message) as caught:
        ffn_sites(changed(**model))
    text = str(caught.value)
    assert text.startswith("model type 'llama': no feed-forward network recognised in model.layers.0 (tried ")
    assert text.endswith("say with neurosig.register_layout where it is, or use another model") and "\n" not in text


@pytest.mark.parametrize("model_type", ["bitnet", "mamba"])
def test_other_architectures_are_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **(GROUPED if model_type == "bitnet" else SHARED))
    with pytest.raises(UserError, match=f"'{model_type}': no feed-forward network recognised .*register_layout"):
        ffn_sites(AutoModelForCausalLM.from_config(config).eval())


def test_a_described_network_is_read() -> None:
    """What the recognition refuses, for its output is scaled afterwards."""
    model = changed(mlp=Scaled)
    neurosig.register_layout("llama", **LLAMA)
    sites = ffn_sites(model)
    assert sites == ffn_sites(tiny_model("llama"))
    value, output = seen(model, sites.layers[1])
    torch.testing.assert_close(value @ model.get_submodule(sites.layers[1]).weight.T, output)


def test_a_description_is_of_one_of_several_networks() -> None:
    model = changed(mlp=Two)
    register_layout("llama", **LLAMA | {"down": "mlp.second.down_proj", "act": "mlp.second.act_fn"})
    sites = ffn_sites(model)
    assert sites.layers == ("model.layers.0.mlp.second.down_proj", "model.layers.1.mlp.second.down_proj")
    assert (sites.d_mlp, sites.d_model, sites.gated) == (D_MLP, D_MODEL, True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gated": False}, r"mlp\.down_proj: its input is not the output of mlp\.act_fn\)"),
        ({"down": "self_attn.o_proj"}, r"self_attn\.o_proj: its input is not the output of mlp\.act_fn times another"),
        ({"down": "mlp"}, "tried mlp as a linear layer and mlp.act_fn as an activation, each called once"),
        ({"act": "mlp.gelu"}, "tried mlp.down_proj as a linear layer and mlp.gelu as an activation, each called once"),
        ({"act": "input_layernorm"}, r"mlp\.down_proj: its input is not the output of input_layernorm"),
        (
            {"block": "model.blocks.{}"},
            "LlamaForCausalLM has no model.blocks.0; say with neurosig.register_layout where",
        ),
    ],
)
def test_a_wrong_description_is_found_out(wrong: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    assert ffn_sites(model)  # recognised; a description comes first all the same
    register_layout("llama", **LLAMA | wrong)
    with pytest.raises(UserError, match=message):
        ffn_sites(model)


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"block": "model.layers"}, "put {} once"),
        ({"block": "model.{}.layers.{}"}, "put {} once"),
        ({"block": "model.layers.{0}"}, "put {} once"),
        ({"block": ""}, "block='': give a name, or a path"),
        ({"down": "mlp..down_proj"}, "down='mlp..down_proj': give a name, or a path"),
        ({"act": "mlp.down_proj"}, "give two paths inside the block"),
        ({"down": "model.layers.{}.mlp.down_proj"}, "give two paths inside the block"),
        ({"gated": "yes"}, "gated='yes': give True or False"),
        ({"model_type": " "}, "model_type=' ': give a name"),
    ],
)
def test_nonsense_is_a_value_error(nonsense: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model_type": "llama", **LLAMA, **nonsense}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(register_layout)(**arguments)  # without the type checks of the tests, which would come first
    assert not layouts._REGISTERED


def test_a_damaged_layer_leaves_the_others_to_go_by() -> None:
    """It is named where it is traced; a model without a sound one is refused."""
    model = tiny_model("qwen3")
    expected = find_layout(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(UserError, match="its blocks give zeros or values that are not finite"):
        find_layout(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 0.5
    assert find_layout(model) == expected


def test_blocks_that_differ_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = nn.Identity()
    model.model.layers[1].mlp.down_proj = nn.Linear(D_MODEL, D_MODEL)
    model.model.layers[1].mlp.up_proj = nn.Linear(D_MODEL, D_MODEL)
    with pytest.raises(UserError, match="its layers have FFNs of several widths"):
        ffn_sites(model)
    shared = tiny_model("llama")
    shared.model.layers[1].mlp.act_fn = shared.model.layers[0].mlp.act_fn
    with pytest.raises(UserError, match="its layers share one activation module"):
        ffn_sites(shared)
    assert VOCAB_SIZE > layouts.TOKENS
