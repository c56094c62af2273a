"""Where the FFN neurons of each architecture live.

A neuron is one hidden unit of a feed-forward block. Its value is one column of the down projection's input;
its output direction is the matching slice of that projection's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from neurosig.neurons.layouts import find_layout, is_linear, projection, registered
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


_KNOWN: WeakKeyDictionary[PreTrainedModel, tuple[object, FFNSites]] = WeakKeyDictionary()


def ffn_sites(model: PreTrainedModel) -> FFNSites:
    """Locate and verify the FFN neurons of a causal language model, once per model: see `neurosig.neurons.layouts`.

    The down projection and the activation may see flattened tokens, ``[batch * seq, d]``, or ``[batch, seq, d]``:
    reshaping to the batch's own shape serves both.

    Raises:
        UserError: No FFN can be verified; the layers are of several widths or share an activation; the weights are
            quantised; or the model is a mixture of experts, whose neurons have no module, or has no head.
    """
    described, known = registered(model), _KNOWN.get(model)
    if known is not None and known[0] == described:
        return known[1]
    layout = find_layout(model)
    layers, acts = (tuple(f"{block}.{path}" for block in layout.blocks) for path in (layout.ffn.down, layout.ffn.act))
    shapes = {tuple(w_out(model, path).shape) for path in layers}
    if len(shapes) > 1 or len({model.get_submodule(path) for path in acts}) < len(acts):
        why = "have FFNs of several widths" if len(shapes) > 1 else "share one activation module"
        raise UserError(f"model type {model.config.model_type!r}: its layers {why}, which is not supported")
    ((d_mlp, d_model),) = shapes
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    sites = FFNSites(layers, acts, layout.blocks, head, d_mlp, d_model, layout.ffn.gated)
    _KNOWN[model] = described, sites
    return sites


@torch.no_grad()
def w_out_norms(model: PreTrainedModel, sites: FFNSites) -> Float[Tensor, "n_layers d_mlp"]:
    """L2 norm of each neuron's output direction ``W_down[:, j]``, in fp32 on the CPU."""
    return torch.stack([w_out(model, path).float().norm(dim=1).cpu() for path in sites.layers])


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether LoRA layers are beside the model's weights."""
    return any(hasattr(module, "base_layer") for module in model.modules())


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
    if not is_linear(module):
        raise UserError(f"{path} is a {type(module).__name__}; load the model unquantised")
    weight = projection(module)
    if not weight.is_floating_point():
        raise UserError(f"{path} has {weight.dtype} weights; load the model unquantised")
    return weight
