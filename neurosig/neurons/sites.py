"""Where the FFN neurons of each architecture live.

A neuron is one hidden unit of a feed-forward block. Its value is one column of the down projection's input;
its output direction is the matching slice of that projection's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neurosig.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class FFNSites:
    """The feed-forward modules of one model, in forward order.

    Attributes:
        layers: Dotted path of each layer's down projection; its input holds the neurons' values.
        acts: Dotted path of each layer's activation; its output is act(gate), or the value itself if ungated.
        blocks: Dotted path of each transformer block; its output, or the first item of it, is the residual stream.
        head: Dotted path of the language-model head.
        d_mlp: Neurons per layer.
        d_model: Width of the residual stream.
        gated: Whether a value is act(gate) * up; otherwise it is the activation's output itself.
    """

    layers: tuple[str, ...]
    acts: tuple[str, ...]
    blocks: tuple[str, ...]
    head: str
    d_mlp: int
    d_model: int
    gated: bool

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class _Layout:
    block: str
    down: str
    act: str
    gated: bool


_GATED = _Layout("model.layers.{}", "mlp.down_proj", "mlp.act_fn", gated=True)

_LAYOUTS: dict[str, _Layout] = {
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "gpt2": _Layout("transformer.h.{}", "mlp.c_proj", "mlp.act", gated=False),
    "gpt_neox": _Layout("gpt_neox.layers.{}", "mlp.dense_4h_to_h", "mlp.act", gated=False),
    "llama": _GATED,
    "mistral": _GATED,
    "olmo2": _GATED,
    "opt": _Layout("model.decoder.layers.{}", "fc2", "activation_fn", gated=False),
    "phi3": _Layout("model.layers.{}", "mlp.down_proj", "mlp.activation_fn", gated=True),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "smollm3": _GATED,
    "starcoder2": _Layout("model.layers.{}", "mlp.c_proj", "mlp.act", gated=False),
}


def ffn_sites(model: PreTrainedModel) -> FFNSites:
    """Locate the FFN neurons of a causal language model.

    OPT's FFN runs on flattened tokens: there the down projection and the activation see ``[batch * seq, d]``,
    elsewhere ``[batch, seq, d]``. Reshaping to the batch's own shape serves both.

    Raises:
        UserError: The model type is not supported; the model is a mixture of experts, whose neurons have no module;
            or it is wrapped or has no language-model head, so that its modules are not where the table says.
    """
    model_type = model.config.model_type
    layout = _LAYOUTS.get(model_type)
    if layout is None:
        raise UserError(
            f"model type {model_type!r}: its FFN neurons cannot be located{_why_not(model)}; "
            f"use a dense text model of type {', '.join(sorted(_LAYOUTS))}"
        )
    blocks = tuple(layout.block.format(layer) for layer in range(model.config.num_hidden_layers))
    layers = tuple(f"{block}.{layout.down}" for block in blocks)
    acts = tuple(f"{block}.{layout.act}" for block in blocks)
    for path in (*layers, *acts):
        _module_at(model, path)
    d_mlp, d_model = w_out(model, layers[0]).shape
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return FFNSites(layers, acts, blocks, head, d_mlp, d_model, layout.gated)


@torch.no_grad()
def w_out_norms(model: PreTrainedModel, sites: FFNSites) -> Float[Tensor, "n_layers d_mlp"]:
    """L2 norm of each neuron's output direction ``W_down[:, j]``, in fp32 on the CPU."""
    return torch.stack([w_out(model, path).float().norm(dim=1).cpu() for path in sites.layers])


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether LoRA layers are beside the model's weights."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def _why_not(model: PreTrainedModel) -> str:
    """The obstacle in a mixture of experts: all experts of a layer are one 3-D parameter."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.ndim == 3:
            return f", since its experts are no modules but slices of one parameter ({name})"
    return ""


def _module_at(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}): no module {path!r}; "
            "pass the causal language model itself, unwrapped"
        ) from error


def w_out(model: PreTrainedModel, path: str) -> Float[Tensor, "d_mlp d_model"]:
    """The down projection at ``path``, one row per neuron (``nn.Linear`` stores its transpose).

    Under an active LoRA adapter these are the effective weights, in float32.

    Raises:
        UserError: The weights are quantised.
    """
    module = _module_at(model, path)
    if hasattr(module, "base_layer"):
        adapted: Any = module
        weight = adapted.base_layer.weight.float()
        for name in adapted.active_adapters:
            weight = weight + adapted.get_delta_weight(name).float()
        return weight if isinstance(adapted.base_layer, Conv1D) else weight.T
    match module:
        case Conv1D():
            weight = module.weight
        case nn.Linear():
            weight = module.weight.T
        case _:
            raise UserError(f"{path} is a {type(module).__name__}; load the model unquantised")
    if not weight.is_floating_point():
        raise UserError(f"{path} has {weight.dtype} weights; load the model unquantised")
    return weight
