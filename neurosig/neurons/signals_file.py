"""Traced rollouts on disk: shards while tracing runs, one file in the finished manifest.

Tensors of ``signals.safetensors``, rows in the order of ``rollouts.jsonl``: ``ids`` and ``values`` are the active sets
(`neurosig.neurons.tracer.ActiveSets`), ``hidden`` the mean hidden states, ``probe`` the cross-fitted probe score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from neurosig.neurons.sites import FFNSites
from neurosig.neurons.tracer import ActiveSets, NeuronTracer, concat_sets
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text, write_atomic

CHUNK = 512
"""Rollouts traced between two saves."""


@dataclass(frozen=True, slots=True)
class Signals:
    """``signals.safetensors`` in memory; a neuron's flat id is ``layer * d_mlp + index``."""

    ids: Int32[Tensor, "n size"]
    values: Float16[Tensor, "n size"]
    hidden: Float16[Tensor, "n d_model"]
    probe: Float32[Tensor, " n"]
    n_layers: int
    d_mlp: int


def trace_to_shards(
    tracer: NeuronTracer,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int]]],
    folder: Path,
    weights: str,
    *,
    advance: Callable[[int, int], object] = lambda rollouts, tokens: None,
) -> list[Path]:
    """Trace (prompt ids, completion ids) pairs and write each chunk as soon as it is done.

    A shard that an earlier run left is kept when it holds these rollouts under this model and configuration. Memory
    does not grow with the number of rollouts.

    Args:
        tracer: The tracer.
        rollouts: Pairs of prompt and completion ids.
        folder: An existing folder.
        weights: Fingerprint of the model's weights.
        advance: Called at each shard with its rollouts and the completion tokens traced for it, 0 if it was kept.
    """
    shards = []
    for start in range(0, len(rollouts), CHUNK):
        part = rollouts[start : start + CHUNK]
        key = sha256_text(repr((weights, tracer.config, part)))
        shard = folder / f"signals-{start:08d}.safetensors"
        held = _holds(shard, key)
        if not held:
            sets = tracer.trace(*zip(*part, strict=True))
            tensors = {"ids": sets.ids, "values": sets.values.half(), "hidden": sets.hidden.half()}
            write_atomic(shard, save(tensors, metadata={"key": key}))
        shards.append(shard)
        advance(len(part), 0 if held else sum(len(completion) for _, completion in part))
    return shards


def load_shards(shards: Sequence[Path]) -> ActiveSets:
    """The rollouts of all shards, in order."""
    parts = []
    for shard in shards:
        with safe_open(shard, framework="pt") as stored:
            parts.append(ActiveSets(*(stored.get_tensor(name) for name in ActiveSets._fields)))
    return concat_sets(parts)


def signals_file(sets: ActiveSets, rollout_probe: Float[np.ndarray, "questions k"], sites: FFNSites) -> bytes:
    """The bytes of ``signals.safetensors``."""
    probe = torch.from_numpy(rollout_probe.ravel().astype(np.float32))
    tensors = {**{name: tensor.contiguous() for name, tensor in sets._asdict().items()}, "probe": probe}
    shape = json.dumps({"n_layers": sites.n_layers, "d_mlp": sites.d_mlp})
    return save(tensors, metadata={"sites": shape})  # one entry: safetensors writes several in random order


def read_signals(path: str | Path) -> Signals:
    """Read ``signals.safetensors``.

    Raises:
        UserError: The file is missing, damaged, or lacks one of its tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"signals {path}: no such file")
    try:
        with safe_open(path, framework="pt") as stored:
            shape = json.loads((stored.metadata() or {})["sites"])
            tensors = {name: stored.get_tensor(name) for name in ("ids", "values", "hidden", "probe")}
            return Signals(**tensors, **shape)
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"signals {path}: not what neurosig.export writes ({error}); export again") from error


def _holds(shard: Path, key: str) -> bool:
    if not shard.exists():
        return False
    with safe_open(shard, framework="pt") as stored:
        return (stored.metadata() or {}).get("key") == key
