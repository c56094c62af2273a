"""One forward pass of one text with plain hooks: what each sublayer adds to the residual stream, and neuron values.

Modules are found by what they do in the pass, not by their names, and the parts are checked to add up: a model that
adds something else to its residual stream is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from neurosig.neurons.layouts import is_linear
from neurosig.neurons.sites import FFNSites
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Largest error of a sum, as a share of its norm, that rounding explains."""
PROBE = 100.0
"""Size of the vectors by which a norm's gain is measured: its epsilon vanishes beside their square."""


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """A LayerNorm or RMSNorm as it acted at some positions: with its scale frozen it is linear.

    Its output is ``scale * gain * (x - mean(x)) + bias``, without the mean in an RMSNorm.

    Attributes:
        gain: By what it multiplies each dimension (in Gemma 1 + weight).
        bias: What it adds; zeros without a bias.
        centred: Whether it subtracts the mean.
        scale: One over the size of its input at each position.
    """

    gain: Float64[Tensor, " d_model"]
    bias: Float64[Tensor, " d_model"]
    centred: bool
    scale: Float64[Tensor, " token"]

    def before(self, direction: Float64[Tensor, "token d_model"]) -> Float64[Tensor, "token d_model"]:
        """The direction of the norm's input along which it moves its output along ``direction``."""
        moved = self.gain * direction
        if self.centred:
            moved = moved - moved.mean(dim=-1, keepdim=True)
        return self.scale[:, None] * moved


@dataclass(frozen=True, slots=True)
class Stream:
    """What a forward pass adds to the residual stream at some positions, in forward order and in the model's dtype.

    Attributes:
        embedding: The stream before the first block.
        attention: What each block's attention adds, after its post-norm if it has one.
        ffn: What each block's FFN adds, after its post-norm if it has one.
        residual: The stream after each block.
        hidden: After the final norm, what the head reads.
        final_norm: The final norm; None in a model without.
        post_norms: The norm after each FFN (Gemma 2 and 3, OLMo 2); None without.
        kept: What ``keep`` made of each layer.
    """

    embedding: Float[Tensor, "token d_model"]
    attention: Float[Tensor, "layer token d_model"]
    ffn: Float[Tensor, "layer token d_model"]
    residual: Float[Tensor, "layer token d_model"]
    hidden: Float[Tensor, "token d_model"]
    final_norm: FrozenNorm | None
    post_norms: tuple[FrozenNorm | None, ...]
    kept: list[Any]


Keep = Callable[[int, Tensor, Tensor, Tensor], Any]
"""``(layer, down projection's input, its output, the activation's output)``, ``[token, d]`` each -> what is kept."""


class _Calls:
    """First input and output of modules in the order of their calls, at some positions of a single sequence."""

    def __init__(self, length: int, at: Sequence[int]) -> None:
        self._length, self._at = length, list(at)
        self.order: list[nn.Module] = []
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    def rows(self, value: Any) -> Tensor | None:
        """``[token, d]`` at the positions; None for what is no tensor with a row per token."""
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, Tensor) or value.numel() % self._length or value.ndim < 2:
            return None
        return value.detach().reshape(self._length, -1)[self._at]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = self.rows(args[0] if args else kwargs.get("hidden_states"))
        made = self.rows(output)
        if made is not None:
            self.order.append(module)
            self.outputs[module] = made
            if given is not None:
                self.inputs[module] = given


@contextlib.contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_modules(
    model: PreTrainedModel, paths: Sequence[str], ids: Sequence[int], at: Sequence[int]
) -> Float[Tensor, "module token d"]:
    """Each module's output, or the first item of it, at positions of one sequence; the modules are of one width.

    Raises:
        UserError: A module does not run, or gives no tensor with one row per token.
    """
    calls = _Calls(len(ids), at)
    modules = [model.get_submodule(path) for path in paths]
    with _hooked(modules, calls):
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=len(ids))
    for module, path in zip(modules, paths, strict=True):
        if module not in calls.outputs or not calls.outputs[module].is_floating_point():
            raise UserError(f"sites={path!r}: the module does not run, or gives no tensor with one row per token")
    return torch.stack([calls.outputs[module] for module in modules])


class NeuronRead(NamedTuple):
    """What ``keep`` made of each layer, and the stream after the final norm at all positions, ``[1, seq, d_model]``."""

    kept: list[Any]
    hidden: Tensor


@torch.no_grad()
def read_neurons(
    model: PreTrainedModel, sites: FFNSites, ids: Sequence[int], at: Sequence[int], keep: Keep
) -> NeuronRead:
    """Run one sequence whole, without the head, and reduce each layer's neurons at the positions ``at`` as it runs."""
    downs, acts = ([model.get_submodule(path) for path in paths] for paths in (sites.layers, sites.acts))
    calls, kept = _Calls(len(ids), at), list[Any]()

    def on_down(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = len(kept)
        value, made, act = calls.rows(args[0]), calls.rows(output), calls.outputs.pop(acts[layer])
        assert value is not None and made is not None
        kept.append(keep(layer, value, made, act))

    with _hooked(acts, calls), _hooked(downs, on_down):
        last = model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return NeuronRead(kept, last.last_hidden_state)


@torch.no_grad()
def read_stream(
    model: PreTrainedModel, sites: FFNSites, ids: Sequence[int], at: Sequence[int], keep: Keep | None = None
) -> Stream:
    """Run one sequence whole and read its residual stream at the positions ``at``, before the head.

    Args:
        model: A causal language model in eval mode.
        sites: Where its neurons are.
        ids: Token ids.
        at: Indices into them.
        keep: Reduces the neurons of a layer as soon as it has run; nothing of them is kept without.

    Raises:
        UserError: What the blocks add to the residual stream cannot be told apart.
    """
    blocks = [model.get_submodule(path) for path in sites.blocks]
    around = [module for module in model.get_decoder().children() if not isinstance(module, nn.ModuleList)]
    calls = _Calls(len(ids), at)
    with _hooked([*blocks, *(child for block in blocks for child in block.children()), *around], calls):
        read = read_neurons(model, sites, ids, at, lambda *given: (given[2], keep and keep(*given)))
    hidden = calls.rows(read.hidden)
    assert hidden is not None
    attention, ffn, post_norms = [], [], []
    for layer, block in enumerate(blocks):
        added, own, norm = _parts(model, sites, layer, calls, read.kept[layer][0])
        before = calls.inputs[blocks[0]] if layer == 0 else calls.outputs[blocks[layer - 1]]
        _check_sum(model, calls.outputs[block], (before, added, own), f"block {layer}")
        attention.append(added)
        ffn.append(own)
        post_norms.append(norm)
    residual = torch.stack([calls.outputs[block] for block in blocks])
    return Stream(
        calls.inputs[blocks[0]],
        torch.stack(attention),
        torch.stack(ffn),
        residual,
        hidden,
        _final_norm(model, around, calls, residual[-1], hidden),
        tuple(post_norms),
        [kept for _, kept in read.kept],
    )


def _parts(
    model: PreTrainedModel, sites: FFNSites, layer: int, calls: _Calls, ffn_output: Tensor
) -> tuple[Tensor, Tensor, FrozenNorm | None]:
    """What attention and FFN of a block add to the stream, and the norm between the FFN and the stream."""
    block = model.get_submodule(sites.blocks[layer])
    children = dict(block.named_children())
    ffn = children[sites.layers[layer].removeprefix(f"{sites.blocks[layer]}.").partition(".")[0]]
    mixers = [
        child
        for child in children.values()
        if child is not ffn and not is_linear(child) and any(is_linear(module) for module in child.modules())
    ]
    if len(mixers) != 1 or mixers[0] not in calls.outputs:
        raise UserError(
            f"model type {model.config.model_type!r}: {sites.blocks[layer]} has {len(mixers)} sublayers beside its "
            "FFN, expected one, its attention; what each adds to the residual stream cannot be told apart"
        )
    after = [child for child in calls.order if child in set(children.values()) and child not in (ffn, *mixers)]
    attention, _ = _chained(calls, after, calls.outputs[mixers[0]])
    own, norm = _chained(calls, after, ffn_output)
    if norm is None:
        return attention, own, None
    return attention, own, frozen_norm(norm, ffn_output, own, f"{sites.blocks[layer]}: the norm after the FFN")


def _chained(calls: _Calls, after: Sequence[nn.Module], made: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What modules that take a sublayer's output make of it, and the last of them that changes it."""
    changed = None
    for module in after:
        given = calls.inputs.get(module)
        if given is not None and given.shape == made.shape and torch.equal(given, made):
            output = calls.outputs[module]
            changed = changed if torch.equal(output, made) else module
            made = output
    return made, changed


def _check_sum(model: PreTrainedModel, whole: Tensor, parts: Sequence[Tensor], place: str) -> None:
    error = sum(part.double() for part in parts) - whole.double()
    sizes = torch.stack([part.double().norm(dim=-1) for part in (whole, *parts)]).amax(dim=0)
    if not (error.norm(dim=-1) <= ROUNDING[whole.dtype] * sizes).all():
        raise UserError(
            f"model type {model.config.model_type!r}: {place} adds something else to the residual stream than the "
            "outputs of its attention and its FFN, so their direct effects cannot be told apart"
        )


def _final_norm(
    model: PreTrainedModel, around: Sequence[nn.Module], calls: _Calls, stream: Tensor, hidden: Tensor
) -> FrozenNorm | None:
    if stream.shape == hidden.shape and torch.equal(stream, hidden):
        return None
    found = [
        module
        for module in around
        if module in calls.inputs and torch.equal(calls.outputs[module], hidden) and not is_linear(module)
    ]
    if not found or calls.inputs[found[0]].shape != stream.shape or not torch.equal(calls.inputs[found[0]], stream):
        raise UserError(
            f"model type {model.config.model_type!r}: between its last block and its head is something else than one "
            "norm, so direct effects on its logits cannot be told"
        )
    return frozen_norm(found[0], stream, hidden, "the final norm")


def frozen_norm(
    module: nn.Module, given: Float[Tensor, "token d_model"], made: Float[Tensor, "token d_model"], place: str
) -> FrozenNorm:
    """A norm as it acted on ``given``, measured on vectors of known size rather than read from its parameters.

    Args:
        module: A LayerNorm or RMSNorm of any implementation.
        given: Its inputs.
        made: Its outputs.
        place: What it is, for the message.

    Raises:
        UserError: It is neither.
    """
    probe = torch.full_like(given[:1], PROBE)
    probe[:, 1::2] *= -1
    plus, minus, moved = (module(x).double()[0] for x in (probe, -probe, probe + PROBE))
    centred = bool((moved - plus).norm() < 0.3 * plus.norm())  # an RMSNorm's output moves by 0.76
    unit, x = _centred(probe[0].double(), centred), _centred(given.double(), centred)
    bias = (plus + minus) / 2
    gain = (plus - minus) / 2 / (unit / unit.square().mean().sqrt())
    acted, moving = made.double() - bias, gain * x
    scale = (acted * moving).sum(-1) / moving.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    error = (scale[:, None] * moving - acted).norm(dim=-1)
    if not (error <= ROUNDING[given.dtype] * made.double().norm(dim=-1)).all():
        raise UserError(f"{place}, a {type(module).__name__}, is neither a LayerNorm nor an RMSNorm; it is not folded")
    return FrozenNorm(gain, bias, centred, scale)


def _centred(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True) if centred else x
