"""Activations of traces under TransformerLens' names, for those who think in them; computed when asked for.

Names (L a layer): ``blocks.L.mlp.hook_post`` (neuron values, act(gate) * up in a gated FFN), ``blocks.L.hook_mlp_out``
and ``blocks.L.hook_attn_out`` (what FFN and attention add to the residual stream), ``blocks.L.hook_resid_pre`` and
``blocks.L.hook_resid_post`` (the stream before and after the block).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.explore.forward import read_neurons
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.explore.traces import Traces

HOOKS = ("mlp.hook_post", "hook_mlp_out", "hook_attn_out", "hook_resid_pre", "hook_resid_post")
_NAME = re.compile(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, HOOKS))})")


class TraceCache(Mapping[str, Float[Tensor, "n seq d"]]):
    """Name -> activation of all texts ``[texts, tokens, d]``, padded on the right with zeros, in the model's dtype.

    Every token is there, the first included. Nothing is kept: each access runs the texts once.
    """

    def __init__(self, run: Traces) -> None:
        self._run = run

    def __getitem__(self, name: str) -> Float[Tensor, "n seq d"]:
        found = _NAME.fullmatch(name)
        if found is None or int(found[1]) >= self._run.sites.n_layers:
            near = difflib.get_close_matches(str(name), list(self), n=3, cutoff=0.3)
            raise UserError(f"cache: no {name!r}; the nearest names are {', '.join(near or list(self)[:3])}")
        layer, hook = int(found[1]), found[2]
        rows = [self._read(index, layer, hook) for index in range(len(self._run))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def __iter__(self) -> Iterator[str]:
        return (f"blocks.{layer}.{hook}" for layer in range(self._run.sites.n_layers) for hook in HOOKS)

    def __len__(self) -> int:
        return self._run.sites.n_layers * len(HOOKS)

    def __repr__(self) -> str:
        return f"TraceCache({len(self)} names, {next(iter(self))} to {list(self)[-1]})"

    def _read(self, index: int, layer: int, hook: str) -> Float[Tensor, "seq d"]:
        run, at = self._run, range(len(self._run.texts[index].ids))
        if hook == "mlp.hook_post":

            def keep(number: int, value: Tensor, made: Tensor, act: Tensor) -> Tensor | None:
                return value.cpu() if number == layer else None

            value: Tensor = run.within(index, lambda model, ids: read_neurons(model, run.sites, ids, at, keep)).kept[
                layer
            ]
            return value
        stream = run.stream(index, at)
        if hook == "hook_resid_pre":
            return (stream.embedding if layer == 0 else stream.residual[layer - 1]).cpu()
        part = {"hook_mlp_out": stream.ffn, "hook_attn_out": stream.attention, "hook_resid_post": stream.residual}
        return part[hook][layer].cpu()
