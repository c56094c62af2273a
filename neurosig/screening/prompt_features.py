"""What a model holds at the last token of a prompt, before it has answered: neuron values and residual stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from neurosig.models.prefix import Prefix, pad, run_prompts
from neurosig.neurons.config import NeuronValue
from neurosig.neurons.nnsight_reader import FFNEnvoy
from neurosig.neurons.sites import ffn_sites
from neurosig.neurons.tracer import pack_rows
from neurosig.runtime.errors import UserError
from neurosig.screening.config import PromptFeatures


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Some of the prompts, as they were read together.

    Attributes:
        names: Their question ids.
        features: Of each prompt and layer.
        tokens: Tokens of these prompts, those that all prompts share included.
    """

    names: list[str]
    features: Float[Tensor, "batch layers width"]
    tokens: int


def read_prompts(
    model: PreTrainedModel,
    prompts: Mapping[str, tuple[int, ...]],
    layers: Sequence[int],
    *,
    features: PromptFeatures,
    value: NeuronValue,
    batch_tokens: int,
    done: Collection[str] = (),
) -> Iterator[PromptBatch]:
    """Read the last token of each prompt, batch by batch, the longest prompts first.

    The tokens with which all prompts begin run once, and no layer after the last of ``layers`` runs. Nothing is kept
    of a batch but its features.

    Args:
        model: A causal language model in eval mode.
        prompts: Question id -> token ids of its prompt.
        layers: Indices of the layers to read, ascending.
        features: See `neurosig.screening.config.ScreenProbeConfig`.
        value: See `neurosig.neurons.config.TraceConfig`.
        batch_tokens: Prompt tokens per batch, padding included.
        done: Questions to leave out; a batch with another question runs whole, so that the others' last bits stay.

    Raises:
        UserError: The architecture is not supported (`neurosig.neurons.sites.ffn_sites`), or features of a prompt are
            not finite.
    """
    envoy = FFNEnvoy(model, ffn_sites(model))
    names, rows = list(prompts), list(prompts.values())
    shared = _shared(rows)
    with torch.no_grad():
        prefix = run_prompts(model, [rows[0][:shared]]) if shared else None
    for batch in pack_rows(list(map(len, rows)), batch_tokens):
        if all(names[index] in done for index in batch):
            continue
        inputs, last = _inputs(prefix, [rows[index][shared:] for index in batch], model.device)
        with torch.no_grad():
            keep = partial(_last_token, last=last, features=features)
            found = torch.stack(envoy.read_layers(inputs, layers, keep, value=value), dim=1)
        if not (finite := found.isfinite().all(dim=(1, 2))).all():
            name = names[batch[int((~finite).nonzero()[0])]]
            raise UserError(
                f'question "{name}": its prompt gives values that are not finite; load the model in float32'
            )
        yield PromptBatch([names[index] for index in batch], found, sum(len(rows[index]) for index in batch))


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """Tokens with which all rows begin, at least one less than the shortest has."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
    return min(sum(1 for _ in alike), min(map(len, rows)) - 1)


def _inputs(
    prefix: Prefix | None, rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Any], Int[Tensor, " batch"]]:
    """Arguments of the forward pass over ``rows`` after ``prefix``, if any, and the place of each row's last token."""
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    if prefix is not None:
        return prefix.rows(torch.zeros_like(last)).inputs(rows), last
    ids, mask = pad(rows, side="right", device=device)
    return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}, last


def _last_token(
    neurons: Float[Tensor, "*positions d_mlp"],
    residual: Float[Tensor, "batch seq d_model"],
    *,
    last: Int[Tensor, " batch"],
    features: PromptFeatures,
) -> Float[Tensor, "batch width"]:
    """One layer's features at the places ``last``, in fp32 on the CPU; OPT's neurons come with flat positions."""
    neurons = neurons.reshape(*residual.shape[:2], -1)
    kept = {"neurons": [neurons], "residual": [residual], "both": [neurons, residual]}[features]
    return (
        torch.cat([part[torch.arange(len(last), device=part.device), last.to(part.device)] for part in kept], dim=-1)
        .float()
        .cpu()
    )
