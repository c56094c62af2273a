"""Neuron features of a manifest's rollouts in every reading of the signal search, from one forward pass.

Positions: those of ``--positions`` (`neurosig.stages.positions`), found as an export finds them. Values: the mean CETT
of the neurons for which it is largest in each layer, as an export keeps it, and ``signed``: the mean of CETT with the
sign of the neuron's value, as a z-score over its layer's neurons, of those farthest from the layer's mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from figures.experiments.search_plan import POSITIONS
from neurosig.exported import Exported
from neurosig.models.load import LoadedModel, load_model
from neurosig.models.prefix import run_prompts
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import cett, masked_mean, neurons_per_layer
from neurosig.neurons.nnsight_reader import FFNEnvoy
from neurosig.neurons.sites import ffn_sites, w_out_norms
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.cli import progress
from neurosig.runtime.files import write_atomic
from neurosig.stages.positions import read_positions

READINGS = (*POSITIONS, *(f"{positions} signed" for positions in POSITIONS))
QUESTIONS_AT_ONCE = 24


@dataclass(frozen=True, slots=True)
class Features:
    """One manifest's rollouts in question order: active neurons and their values in every reading, and hidden states.

    Attributes:
        ids: Flat neuron ids, the same number from each layer, largest first.
        values: Their values, in float16.
        hidden: Residual stream two thirds up the layers, mean over the answer.
        lacking: Position -> share of the rollouts that have none and are read at their answers.
        n_layers: Layers of the model.
        d_mlp: Neurons per layer.
    """

    ids: Int[np.ndarray, "n readings size"]
    values: Float[np.ndarray, "n readings size"]
    hidden: Float[np.ndarray, "n d_model"]
    lacking: Mapping[str, float]
    n_layers: int
    d_mlp: int


def features_of(exported: Exported, cache: Path, *, quiet: bool = False) -> Features:
    """Trace the manifest's rollouts, or read the features that an earlier run wrote to ``cache``."""
    from safetensors import safe_open
    from safetensors.numpy import save

    path = cache / f"features-{exported.manifest.header.content_sha256[:16]}.safetensors"
    if not path.is_file():
        features = _trace(exported, quiet)
        tensors = {name: getattr(features, name) for name in ("ids", "values", "hidden")}
        numbers = {name: getattr(features, name) for name in ("lacking", "n_layers", "d_mlp")}
        write_atomic(path, save(tensors, metadata={"features": json.dumps(numbers)}))
    with safe_open(path, framework="numpy") as stored:
        numbers = json.loads(stored.metadata()["features"])
        return Features(*(stored.get_tensor(name) for name in ("ids", "values", "hidden")), **numbers)


def _trace(exported: Exported, quiet: bool) -> Features:
    header = exported.manifest.header
    options = header.options
    where: Any = {"dtype": options["dtype"], "template": options["template"], "adapter": header.adapter()}
    loaded = load_model(str(header.model["id"]), **where)
    builder = PromptBuilder(loaded.tokenizer, header.prompt_config())
    questions = [row.as_question() for row in exported.rows.values()]
    groups = list(exported.rollouts.values())
    prompts = [builder.student(question) for question in questions]
    completions = [[rollout.completion_ids_without_eos for rollout in group] for group in groups]
    n_rollouts = sum(map(len, groups))
    read_at, lacking = {}, {}
    for positions in POSITIONS:
        by_id, note = read_positions(positions, exported.rollouts, questions, header.answer_reader(), loaded.tokenizer)
        read_at[positions] = list(by_id.values())
        lacking[positions] = int(note.split(": ")[1].split()[0]) / n_rollouts if note else 0.0
    tracer = _Tracer(loaded)
    order = sorted(range(len(groups)), key=lambda index: max(map(len, completions[index])))
    parts: list[Any] = [None] * len(groups)
    with progress(total=len(groups), desc="trace", quiet=quiet) as bar:
        for start in range(0, len(order), QUESTIONS_AT_ONCE):
            batch = order[start : start + QUESTIONS_AT_ONCE]
            traced = tracer.trace(
                [prompts[index] for index in batch],
                [completions[index] for index in batch],
                [[at[index] for index in batch] for at in read_at.values()],
            )
            k = len(groups[0])
            for place, index in enumerate(batch):
                parts[index] = [tensor[place * k : (place + 1) * k] for tensor in traced]
            bar.update(len(batch))
    ids, values, hidden = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Features(ids, values, hidden, lacking, tracer.sites.n_layers, tracer.sites.d_mlp)


class _Tracer:
    """Runs completions once, each after its prompt's last token, and reduces every reading."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.sites = ffn_sites(loaded.model)
        self.envoy = FFNEnvoy(loaded.model, self.sites)
        self.norms = w_out_norms(loaded.model, self.sites)
        self.share = neurons_per_layer(self.sites.n_layers, self.sites.d_mlp, TraceConfig().set_size)

    @torch.no_grad()
    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        read_at: Sequence[Sequence[Sequence[Sequence[int]]]],
    ) -> list[Tensor]:
        """``ids`` and ``values`` [n, readings, size] and ``hidden`` [n, d_model] of all completions, in order.

        ``read_at`` has, for each of `POSITIONS`, question by question, each completion's indices.
        """
        prefix = run_prompts(self.model, [prompt[:-1] for prompt in prompts])
        owners = torch.tensor([owner for owner, group in enumerate(completions) for _ in group])
        rows = [[prompt[-1], *ids] for prompt, group in zip(prompts, completions, strict=True) for ids in group]
        width = max(map(len, rows))
        masks = torch.zeros(len(rows), len(POSITIONS), width, dtype=torch.bool)
        for column, by_question in enumerate(read_at):
            for row, indices in enumerate(indices for group in by_question for indices in group):
                masks[row, column, [index + 1 for index in indices]] = True  # the prompt's end is index -1
        layers, hidden = self.envoy.read(
            prefix.rows(owners).inputs(rows),
            partial(self._reduce, masks=masks),
            lambda hidden: masked_mean(hidden.float(), masks[:, 0]),
            lambda layers, hidden: (layers, hidden),
            value="gated",
            with_output=True,
            hidden_layer=self.sites.n_layers * 2 // 3,
        )
        ids, values = (torch.cat(column, dim=-1) for column in zip(*layers, strict=True))
        return [ids, values.half(), hidden]

    def _reduce(
        self,
        layer: int,
        value: Tensor,
        ffn_out: Tensor,
        w_out: Tensor,
        head: Tensor,
        *,
        masks: Bool[Tensor, "n positions seq"],
    ) -> tuple[Int[Tensor, "n readings share"], Float[Tensor, "n readings share"]]:
        """Each reading's neurons of one layer."""
        weights = masks / masks.sum(dim=-1, keepdim=True)
        score = cett(value, self.norms[layer], ffn_out).masked_fill(~masks.any(dim=1)[..., None], 0)
        plain = torch.einsum("nps,nsd->npd", weights, score)
        signed = torch.einsum("nps,nsd->npd", weights, score * value.sign())
        signed = (signed - signed.mean(dim=-1, keepdim=True)) / signed.std(dim=-1, keepdim=True)
        both = torch.cat([plain, signed], dim=1)
        top = both.abs().topk(self.share, dim=-1).indices
        return (top + layer * self.sites.d_mlp).int(), both.gather(-1, top)
