"""The signals file of an export, ``signals.safetensors``: written in shards while tracing runs, then as one file.

Its tensors have one row per rollout, in the order of ``rollouts.jsonl``; `Signals` lists them. Reading it needs neither
transformers nor nnsight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from neurosig.neurons.contributions import ActiveSets, concat_sets
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text, write_atomic
from neurosig.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from neurosig.neurons.sites import FFNSites
    from neurosig.neurons.tracer import NeuronTracer

CHUNK = 512
"""Rollouts per shard."""
Traced = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Signals:
    """``signals.safetensors`` in memory.

    Contributions and hidden states are float16, or float32 where a value exceeds 65,504.

    Attributes:
        neuron_ids: Active set of each rollout as flat ids ``layer * d_mlp + index``, ascending; shorter sets end in -1.
        contributions: Mean contribution of each of these neurons; 0 where the id is -1.
        hidden_states: Mean hidden state of each rollout.
        probe_scores: Cross-fitted probe score of each rollout; higher points to hallucination.
        probe_by_seed: The same of each drawing of the folds, of which ``probe_scores`` is the mean; an export without
            this record drew them once.
        n_layers: Layers of the model.
        d_mlp: FFN neurons per layer.
    """

    neuron_ids: Int32[Tensor, "n size"]
    contributions: Float[Tensor, "n size"]
    hidden_states: Float[Tensor, "n d_model"]
    probe_scores: Float32[Tensor, " n"]
    probe_by_seed: Float32[Tensor, "n seeds"]
    n_layers: int
    d_mlp: int

    @property
    def n_neurons(self) -> int:
        """FFN neurons of the model."""
        return self.n_layers * self.d_mlp


def trace_to_shards(
    tracer: NeuronTracer,
    rollouts: Sequence[Traced],
    folder: Path,
    weights: str,
    *,
    advance: Callable[[int, int], object] = lambda rollouts, tokens: None,
    ranks: Ranks = ALONE,
) -> list[Path]:
    """Trace rollouts and write each chunk as soon as it is done.

    A shard of an interrupted run is kept if its rollouts, model and trace options are the same. Memory does not grow
    with the number of rollouts. Several processes take turns: every shard is traced by one of them, as in one process.

    Args:
        tracer: The tracer.
        rollouts: Prompt ids, completion ids, and the indices of the completion tokens that count.
        folder: An existing folder.
        weights: Fingerprint of the model's weights.
        advance: Called after each shard with its number of rollouts and of traced completion tokens (0 if it was kept).
        ranks: The processes, of which each returns all shards, when all are written.
    """
    shards = [folder / f"signals-{start:08d}.safetensors" for start in range(0, len(rollouts), CHUNK)]
    with ranks.together():
        _trace_own(tracer, rollouts, shards, weights, advance, ranks)
    return shards


def _trace_own(
    tracer: NeuronTracer,
    rollouts: Sequence[Traced],
    shards: Sequence[Path],
    weights: str,
    advance: Callable[[int, int], object],
    ranks: Ranks,
) -> None:
    for number in range(ranks.rank, len(shards), ranks.world):
        start, shard = number * CHUNK, shards[number]
        part = rollouts[start : start + CHUNK]
        key = sha256_text(repr((weights, tracer.key, part)))
        kept = _has_key(shard, key)
        if not kept:
            prompts, completions, positions = zip(*part, strict=True)
            masks = [
                [k in counted for k in range(len(ids))] for ids, counted in zip(completions, positions, strict=True)
            ]
            sets = tracer.trace(prompts, completions, token_masks=masks)
            tensors = {
                "neuron_ids": sets.neuron_ids,
                "contributions": _compact(sets.contributions),
                "hidden_states": _compact(sets.hidden_states),
            }
            write_atomic(shard, save(tensors, metadata={"key": key}))
        advance(len(part), 0 if kept else sum(len(counted) for *_, counted in part))


def load_shards(shards: Sequence[Path]) -> ActiveSets:
    """The rollouts of all shards, in order."""
    parts = []
    for shard in shards:
        with safe_open(shard, framework="pt") as stored:
            parts.append(ActiveSets(*(stored.get_tensor(name) for name in ActiveSets._fields)))
    return concat_sets(parts)


def signals_file(
    sets: ActiveSets,
    rollout_probe: Float[np.ndarray, "questions k"],
    by_seed: Float[np.ndarray, "seeds rollouts"],
    sites: FFNSites,
) -> bytes:
    """The bytes of ``signals.safetensors``."""
    scores = {"probe_scores": rollout_probe.ravel(), "probe_by_seed": by_seed.T}
    tensors = {name: tensor.contiguous() for name, tensor in sets._asdict().items()}
    tensors |= {name: torch.from_numpy(np.ascontiguousarray(values, np.float32)) for name, values in scores.items()}
    shape = json.dumps({"n_layers": sites.n_layers, "d_mlp": sites.d_mlp})
    return save(tensors, metadata={"sites": shape})  # one entry: safetensors writes several in random order


def read_signals(path: str | Path) -> Signals:
    """Read ``signals.safetensors``.

    Raises:
        UserError: The file is missing or damaged, lacks a tensor, holds a value that is not finite, or names a neuron
            outside the model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"signals {path}: no such file")
    try:
        with safe_open(path, framework="pt") as stored:
            shape = json.loads((stored.metadata() or {})["sites"])
            tensors = {
                name: stored.get_tensor(name)
                for name in ("neuron_ids", "contributions", "hidden_states", "probe_scores")
            }
            by_seed = "probe_by_seed"
            tensors[by_seed] = (
                stored.get_tensor(by_seed) if by_seed in stored.keys() else tensors["probe_scores"][:, None]  # noqa: SIM118
            )
        signals = Signals(**tensors, **shape)
        if len(signals.neuron_ids) and int(signals.neuron_ids.max()) >= signals.n_neurons:
            raise ValueError(f"active sets name neuron {int(signals.neuron_ids.max())} of {signals.n_neurons}")
        infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if infinite:
            raise ValueError(f"{infinite[0]} holds values that are not finite")
        return signals
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"signals {path}: not what neurosig.export writes ({error}); export again") from error


def _compact(tensor: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The tensor in float16 where that holds its largest value, else in float32."""
    half = tensor.half()
    return half if half.isfinite().all() else tensor.float()


def _has_key(shard: Path, key: str) -> bool:
    if not shard.exists():
        return False
    with safe_open(shard, framework="pt") as stored:
        return (stored.metadata() or {}).get("key") == key
