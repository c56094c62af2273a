"""Recognise a model's feed-forward networks (FFNs) by what their modules do in one small forward pass.

In each transformer block the down projection is the linear layer into the residual stream that reads an activation's
output, alone or times the output of another linear layer (the up projection). Both are verified on the tensors of the
pass, as is that the values times the weight, plus the bias, are what the FFN gives. No list of architectures is needed;
`register_layout` is for what cannot be recognised.
"""

from __future__ import annotations

import contextlib
import copy
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neurosig.runtime.errors import UserError

TOKENS = 5
"""Length of the forward pass."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, as a share of the norm, that rounding explains (TF32 included); a wrong reading gives 0.5."""


class FFN(NamedTuple):
    """A block's feed-forward network; the paths begin at the block."""

    down: str
    act: str
    gated: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The transformer blocks' paths, and the feed-forward network in each."""

    blocks: tuple[str, ...]
    ffn: FFN


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module in a block. ``given``: its tensor arguments; all tensors have one row per token."""

    name: str
    module: Any
    given: tuple[Tensor, ...]
    output: Tensor


_REGISTERED: dict[str, tuple[str, FFN]] = {}


def register_layout(model_type: str, *, block: str, down: str, act: str, gated: bool) -> None:
    """Say where the FFN of a model type is, for one that neurosig does not recognise.

    It is verified on each model of this type: the down projection's input has to be the activation's output (if
    ``gated``, times another module's), and its output that input times its weight, plus its bias.

    Args:
        model_type: ``model_type`` of the model's configuration.
        block: Path of a transformer block with ``{}`` for its number, such as ``model.layers.{}``.
        down: Path of the down projection inside the block, such as ``mlp.down_proj``; its input holds the neurons.
        act: Path of the activation inside the block, such as ``mlp.act_fn``.
        gated: Whether a value is act(gate) * up; otherwise it is the activation's output itself.

    Raises:
        ValueError: A path is empty or malformed, ``block`` has not exactly one ``{}``, ``down`` is ``act``, or
            ``gated`` is no truth value.
    """
    for name, path in (("model_type", model_type), ("block", block), ("down", down), ("act", act)):
        if not isinstance(path, str) or not all(part and part == part.strip() for part in path.split(".")):
            raise ValueError(f"{name}={path!r}: give a name, or a path such as mlp.down_proj")
    if block.count("{}") != 1 or len(list(string.Formatter().parse(block.replace("{}", "")))) > 1:
        raise ValueError(f"block={block!r}: put {{}} once, where the block's number stands, as in model.layers.{{}}")
    if down == act or "{" in down + act:
        raise ValueError(f"down={down!r}, act={act!r}: give two paths inside the block")
    if not isinstance(gated, bool):
        raise ValueError(f"gated={gated!r}: give True or False")
    _REGISTERED[model_type] = block, FFN(down, act, gated)


def registered(model: PreTrainedModel) -> tuple[str, FFN] | None:
    """The block's path and its FFN as `register_layout` was told them for the model's type."""
    return _REGISTERED.get(model.config.model_type)


def find_layout(model: PreTrainedModel) -> Layout:
    """Find the FFN of each block and verify it on a forward pass of a few tokens; the model stays as it is.

    On the meta device, where tensors have no numbers, a copy of the first block is given random ones.

    Raises:
        UserError: No FFN can be verified, in every block the same; or the model is a mixture of experts or has no head.
    """
    kind, described = f"model type {model.config.model_type!r}", registered(model)
    if described is None:
        _refuse_experts(model, kind)
    blocks = _blocks(model, kind, described)
    found: set[FFN] = set()

    def judge(path: str, calls: Sequence[_Call]) -> None:
        linear = [call for call in calls if is_linear(call.module)]
        if not all(call.output.isfinite().all() for call in linear) or not any(call.output.any() for call in linear):
            return  # nothing can be said; the damaged layer is named when it is traced
        if described is None:
            ffns, tried = _recognised(blocks[path], calls, linear)
        else:
            ffns, tried = _as_described(calls, described[1])
        if len(ffns) != 1:
            what = "more than one feed-forward network" if ffns else "no feed-forward network"
            raise UserError(
                f"{kind}: {what} recognised in {path} (tried {'; '.join(tried)}); say with "
                "neurosig.register_layout where it is, or use another model"
            )
        found.update(ffns)

    if model.device.type == "meta":
        _run_first_alone(model, blocks, judge)
    else:
        with _evaluating(model), _watched(blocks, judge):
            ids = torch.arange(1, TOKENS + 1, device=model.device)
            model.base_model(input_ids=ids[None], use_cache=False)
    if len(found) != 1:
        why = "differ from one another" if found else "give zeros or values that are not finite"
        raise UserError(f"{kind}: its blocks {why}, so its neurons cannot be located; check the weights")
    (ffn,) = found
    modules = [dict(block.named_modules()) for block in blocks.values()]
    kinds = {tuple(type(inside.get(part)) for part in (ffn.down, ffn.act)) for inside in modules}
    if len(kinds) > 1:  # on the meta device, where one block was judged
        raise UserError(f"{kind}: its blocks differ from one another, so its neurons cannot be located")
    return Layout(tuple(blocks), ffn)


def _refuse_experts(model: PreTrainedModel, kind: str) -> None:
    """Refuse a mixture of experts by its parameters: all experts of a layer are one of three dimensions."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in f"{path} {type(module).__name__}".lower():
                raise UserError(
                    f"{kind}: its FFN neurons cannot be located, since its experts are no modules but slices of one "
                    f"parameter ({path}.{name}); use a dense text model"
                )


def _blocks(model: PreTrainedModel, kind: str, described: tuple[str, FFN] | None) -> dict[str, nn.Module]:
    """Path -> transformer block, in forward order."""
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{kind}: {type(model).__name__} has no language-model head; pass the causal language model itself"
        )
    modules = dict(model.named_modules())
    count = model.config.get_text_config().num_hidden_layers
    if described is not None:
        paths = [described[0].format(layer) for layer in range(count)]
    else:
        decoder = set(model.get_decoder().modules())
        lists = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList) and len(module) == count and module in decoder
        ]
        first = min(lists, key=lambda name: name.count("."), default=None)
        paths = [] if first is None else [f"{first}.{layer}" for layer in range(count)]
    missing = next((path for path in paths if path not in modules), None if paths else f"list of {count} blocks")
    if missing:
        raise UserError(
            f"{kind}: {type(model).__name__} has no {missing}; say with neurosig.register_layout where its "
            "transformer blocks are"
        )
    return {path: modules[path] for path in paths}


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _watched(blocks: Mapping[str, nn.Module], judge: Callable[[str, Sequence[_Call]], None]) -> Iterator[None]:
    """Give ``judge`` the calls of each block's modules when the block ends; one block's tensors are kept at a time."""
    calls: list[_Call] = []
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            given = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor) and tensor.ndim > 1]
            if isinstance(first, Tensor) and first.ndim > 1 and given:
                calls.append(_Call(name, module, tuple(map(_rows, given)), _rows(first)))

        return hook

    def ended(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            kept = calls.copy()
            calls.clear()
            judge(path, kept)

        return hook

    try:
        for path, block in blocks.items():
            parts = {name for name, module in block.named_modules() if hasattr(module, "base_layer")}
            for name, module in block.named_modules():
                if any(name.startswith(f"{part}.") for part in parts):  # of a layer with LoRA beside its weight
                    continue
                handles.append(module.register_forward_hook(keep(name), with_kwargs=True))
            handles.append(block.register_forward_hook(ended(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: Tensor) -> Tensor:
    """A copy with one row per token: a later operation may work in place."""
    return tensor.detach().clone().flatten(end_dim=-2)


def _recognised(block: nn.Module, calls: Sequence[_Call], linear: Sequence[_Call]) -> tuple[list[FFN], list[str]]:
    """The FFNs among these calls, and for each linear layer into the residual stream what speaks against it."""
    width = calls[-1].output.shape[-1]
    factors = [part for call in linear for part in _parts(call.output)]
    ffns, tried, others = [], [], []
    for down in linear:
        if down.output.shape[-1] != width:
            continue
        read = _read(down.given[0], calls, factors)
        if read is None:
            others.append(down.name)
        elif reason := _not_all(block, calls, down):
            tried.append(f"{down.name}: {reason}")
        else:
            tried.append(down.name)
            ffns.append(FFN(down.name, *read))
    if others:
        tried.append(f"{', '.join(others)}: input is no activation's output, alone or times a linear layer's")
    return ffns, tried or ["no linear layer gives the block's width"]


def _as_described(calls: Sequence[_Call], ffn: FFN) -> tuple[list[FFN], list[str]]:
    """The FFN that `register_layout` was told of, if it is one, or what speaks against it."""
    downs, acts = ([call for call in calls if call.name == path] for path in (ffn.down, ffn.act))
    if len(downs) != 1 or len(acts) != 1 or not is_linear(downs[0].module):
        return [], [f"{ffn.down} as a linear layer and {ffn.act} as an activation, each called once"]
    factors = [part for call in calls for part in _parts(call.output)] if ffn.gated else []
    read = _read(downs[0].given[0], acts, factors)
    if read != (ffn.act, ffn.gated):
        times = " times another module's" if ffn.gated else ""
        return [], [f"{ffn.down}: its input is not the output of {ffn.act}{times}"]
    reason = _projects_otherwise(downs[0])
    return ([], [f"{ffn.down}: {reason}"]) if reason else ([ffn], [])


def _read(values: Tensor, calls: Sequence[_Call], factors: Sequence[Tensor]) -> tuple[str, bool] | None:
    """The activation by which these values are made, and whether its output is multiplied; None if there is none."""
    alike = [factor for factor in factors if factor.shape == values.shape]
    for call in calls:
        if _same(call.output, values) and _pointwise(call):
            return call.name, False
    for call in calls:
        same = call.output.shape == values.shape and any(_same(call.output * factor, values) for factor in alike)
        if same and _pointwise(call):
            return call.name, True
    return None


def _parts(output: Tensor) -> tuple[Tensor, ...]:
    """What the up projection may be: a layer's output, or either half of a fused one."""
    return (output, *output.chunk(2, dim=-1)) if output.shape[-1] % 2 == 0 else (output,)


def _pointwise(call: _Call) -> bool:
    """Whether the called module is an activation: it changes each entry, by that entry alone."""
    given = call.given[0]
    if call.output.shape != given.shape or call.output.equal(given):
        return False
    half = given.shape[-1] // 2
    changed = torch.cat([given[:, :half], torch.zeros_like(given[:, half:])], dim=-1)
    try:
        return _same(call.module.forward(changed)[:, :half], call.output[:, :half])
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other arguments than activations do
        return False


def _not_all(block: nn.Module, calls: Sequence[_Call], down: _Call) -> str | None:
    """Why this projection's output is not the whole output of its FFN, None if it is.

    The FFN is the block's child around the projection. BLOOM's adds the residual stream, which it is given, itself.
    """
    if reason := _projects_otherwise(down):
        return reason
    around, _, inside = down.name.partition(".")
    if not inside:
        return None
    whole = [call for call in calls if call.name == around]
    if len(whole) != 1 or not any(
        _same(whole[0].output, added)
        for added in (down.output, *(down.output + x for x in whole[0].given if x.shape == down.output.shape))
    ):
        return f"{around} gives something else than its output"
    parent = block.get_submodule(down.name.rpartition(".")[0])
    if sum(type(module) is type(parent) for module in block.modules()) > 1:
        return f"the block has several {type(parent).__name__}"
    return None


def projection(module: Any) -> Shaped[Tensor, "d_in d_out"]:
    """By what a linear layer multiplies; with LoRA beside its weight the effective weight, in float32."""
    base = getattr(module, "base_layer", module)
    weight = base.weight
    if base is not module:
        weight = weight.float()
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).float()
    return weight if isinstance(base, Conv1D) else weight.T


def is_linear(module: nn.Module) -> bool:
    """Whether `projection` can read a module: a linear layer, also with LoRA beside its weight."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)


def _projects_otherwise(down: _Call) -> str | None:
    """Whether values times weight, plus bias, are another thing than the layer's output; quantised ones are let pass:
    `neurosig.neurons.sites.w_out` refuses them in its own words."""
    weight, bias = projection(down.module), down.module.bias
    if not weight.is_floating_point():
        return None
    exact = torch.promote_types(weight.dtype, torch.float32)
    expected = down.given[0].to(exact) @ weight.to(exact)
    expected = expected if bias is None else expected + bias.to(exact)
    return (
        None if _same(expected.to(down.output.dtype), down.output) else "its output is not its input times its weight"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of like shape agree to rounding; zeros, which agree with anything, do not."""
    largest = b.abs().max()
    if a.shape != b.shape or not 0 < largest < torch.inf:
        return False
    exact, tolerance = torch.promote_types(b.dtype, torch.float32), TOLERANCE[b.dtype]
    a, b = a.to(exact) / largest, b.to(exact) / largest  # a sum of squares would overflow first
    return bool((a - b).norm() <= tolerance * b.norm())


def _run_first_alone(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module], judge: Callable[[str, Sequence[_Call]], None]
) -> None:
    """Judge the first block in a copy of the decoder with random weights on the CPU, without the other blocks and the
    embeddings."""
    path = next(iter(blocks))
    decoder, around = model.get_decoder(), model.get_submodule(path.rpartition(".")[0])
    inside = next(name for name, module in decoder.named_modules() if module is around)
    twin = copy.deepcopy(decoder).eval()
    del twin.get_submodule(inside)[1:]
    embeddings = twin.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _watched({path: twin.get_submodule(inside)[0]}, judge):
        for module in twin.modules():
            if module is not embeddings:
                module.to_empty(device="cpu", recurse=False)
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        given = torch.randn(1, TOKENS, embeddings.weight.shape[1], generator=generator)
        twin(inputs_embeds=given.to(model.dtype), use_cache=False)
