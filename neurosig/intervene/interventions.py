"""Scale located neurons while a model generates: the causal check of what a probe can only suggest.

A neuron is scaled by multiplying its column of the down projection's input, in the prompt and in every decoding step;
by linearity that is the same as scaling its column ``W_down[:, j]``. Amplifying or silencing neurons is the test of
H-Neurons (arXiv 2512.01797); the controls, matched by layer and by how much a neuron contributes, are a
reconstruction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neurosig.models.prefix import pad
from neurosig.neurons.config import neuron_name
from neurosig.neurons.contributions import PAD
from neurosig.neurons.signals_file import Signals
from neurosig.neurons.sites import FFNSites
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.nnsight_reader import NeuronScaler

Sign = Literal["positive", "negative", "all"]
Group = Literal["located", "layer", "activity", "strongest"]

NEAREST = 10
"""An activity-matched control is one of this many neurons of the layer with the most similar contribution."""
LOGITS_AT_ONCE = 2**27
"""Logits in memory while completions are scored (0.5 GB in float32)."""


@dataclass(frozen=True, slots=True)
class NeuronSet:
    """Neurons that are scaled together.

    Attributes:
        group: ``located`` by the probe, or what they are compared with: ``layer`` and ``activity`` are random draws of
            the same number from the same layers, ``strongest`` are the layers' largest contributors.
        draw: Number of the random draw; 0 where nothing is drawn.
        ids: Flat ids ``layer * d_mlp + index``, ascending.
    """

    group: Group
    draw: int
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        check_choice("group", self.group, Group)

    @property
    def name(self) -> str:
        return f"{self.group}-{self.draw}" if self.group in ("layer", "activity") else self.group


def choose_neurons(path: str | Path, sites: FFNSites, sign: Sign) -> tuple[list[int], list[int]]:
    """Flat ids of a table of neurons: those whose weight has the wanted sign, and all of them.

    A positive weight points to guessing, a negative one to knowing; ``all`` takes neurons of weight 0 too.

    Raises:
        UserError: The table cannot be read (`neurosig.hallucination.locate.read_neurons`), or holds a neuron
            twice, one outside the model, or none of that sign.
    """
    from neurosig.hallucination.locate import read_neurons

    check_choice("sign", sign, Sign)
    table = read_neurons(path)
    layer, index, weight = (table[name].to_numpy() for name in ("layer", "index", "weight"))
    outside = np.flatnonzero((layer < 0) | (layer >= sites.n_layers) | (index < 0) | (index >= sites.d_mlp))
    if len(outside):
        first = outside[0]
        raise UserError(
            f"{path}:{table.index[first] + 2}: neuron {index[first]} of layer {layer[first]} is outside the model "
            f"({sites.n_layers} layers of {sites.d_mlp}); give the model that its neurons were located in"
        )
    ids = layer * sites.d_mlp + index
    if len(np.unique(ids)) < len(ids):
        twice = np.flatnonzero(np.bincount(ids) > 1)[0]
        raise UserError(f"{path}: neuron {neuron_name(*divmod(twice, sites.d_mlp))} appears twice")
    wanted = {"positive": weight > 0, "negative": weight < 0, "all": np.full(len(weight), True)}[sign]
    if not wanted.any():
        raise UserError(f"{path}: no neuron{'' if sign == 'all' else f' with a {sign} weight'}; the probe found none")
    return sorted(ids[wanted].tolist()), sorted(ids.tolist())


def mean_contributions(signals: Signals) -> Float[np.ndarray, " n_neurons"]:
    """`mean_over_sets` of an export's rollouts."""
    return mean_over_sets(signals.neuron_ids, signals.contributions, signals.n_neurons)


def mean_over_sets(
    neuron_ids: Int[Tensor, "n size"], contributions: Float[Tensor, "n size"], n_neurons: int
) -> Float[np.ndarray, " n_neurons"]:
    """Each neuron's mean absolute contribution over active sets; a set without it counts as 0."""
    ids, values = neuron_ids.numpy(), np.abs(contributions.numpy().astype(np.float64))
    active = ids != PAD
    return np.bincount(ids[active], weights=values[active], minlength=n_neurons) / len(ids)


def layer_matched(
    located: Sequence[int], excluded: Collection[int], sites: FFNSites, rng: np.random.Generator
) -> list[int]:
    """Random neurons, as many in each layer as ``located`` has, none of them in ``excluded``."""
    drawn: list[int] = []
    for in_layer, free in _by_layer(located, excluded, sites):
        drawn += rng.choice(free, len(in_layer), replace=False).tolist()
    return sorted(drawn)


def activity_matched(
    located: Sequence[int],
    excluded: Collection[int],
    contributions: Float[np.ndarray, " n_neurons"],
    sites: FFNSites,
    rng: np.random.Generator,
) -> list[int]:
    """For each located neuron a random one of the `NEAREST` of its layer whose mean contribution is most similar.

    Most neurons of a layer are silent on most inputs, and scaling them changes nothing; compared with layer-matched
    neurons alone, any active set looks special. The busiest neurons are matched first.
    """
    drawn = []
    for in_layer, free in _by_layer(located, excluded, sites):
        for neuron in sorted(in_layer, key=lambda neuron: (-contributions[neuron], neuron)):
            distance = np.abs(contributions[free] - contributions[neuron])
            place = rng.choice(np.argsort(distance, kind="stable")[:NEAREST])
            drawn.append(int(free[place]))
            free = np.delete(free, place)
    return sorted(drawn)


def strongest(
    located: Sequence[int],
    excluded: Collection[int],
    contributions: Float[np.ndarray, " n_neurons"],
    sites: FFNSites,
) -> list[int]:
    """The neurons with the largest mean contribution, as many in each layer as ``located`` has.

    They are unrelated to hallucination and show whether scaling so few neurons can move the model at all.
    """
    chosen: list[int] = []
    for in_layer, free in _by_layer(located, excluded, sites):
        chosen += free[np.argsort(-contributions[free], kind="stable")[: len(in_layer)]].tolist()
    return sorted(chosen)


def scale_neurons(loaded: LoadedModel, scaler: NeuronScaler, ids: Sequence[int], factor: float) -> LoadedModel:
    """``loaded`` with the neurons ``ids`` multiplied by ``factor`` at every position; the model itself stays as it is.

    Use it where a `LoadedModel` decodes or scores: `neurosig.sampling.sampler.sample`, `completion_nll`.
    """
    columns: dict[int, list[int]] = {}
    for neuron in ids:
        columns.setdefault(neuron // scaler.sites.d_mlp, []).append(neuron % scaler.sites.d_mlp)
    stand_in: Any = scaler.scaled(columns, factor)
    return replace(loaded, model=stand_in)


@torch.inference_mode()
def completion_nll(
    loaded: LoadedModel, prompts: Sequence[Prompt], groups: Mapping[str, Sequence[Rollout]]
) -> dict[str, float]:
    """Negative log-likelihood of given completions, teacher-forced, in nats per token; one mean per question.

    Args:
        loaded: The model, scaled or not.
        prompts: One prompt per question.
        groups: The completions of each question, equally many; their closing token counts.
    """
    k = len(groups[prompts[0].question_id])
    longest = max(len(rollout.completion_ids) for group in groups.values() for rollout in group)
    questions = max(1, LOGITS_AT_ONCE // (k * longest * loaded.model.config.get_text_config().vocab_size))
    ordered = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    means: dict[str, float] = {}
    for start in range(0, len(ordered), questions):
        batch = ordered[start : start + questions]
        completions = [rollout.completion_ids for prompt in batch for rollout in groups[prompt.question_id]]
        nats, tokens = _score_batch(loaded, batch, completions, k)
        for row, prompt in enumerate(batch):
            own = slice(row * k, (row + 1) * k)
            means[prompt.question_id] = float(nats[own].sum() / tokens[own].sum())
    return means


def _score_batch(
    loaded: LoadedModel, prompts: Sequence[Prompt], completions: Sequence[tuple[int, ...]], k: int
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Nats and tokens of each completion; the prompt is computed once per question."""
    from transformers import DynamicCache

    model, device = loaded.model, loaded.model.device
    ids, prompt_mask = pad([prompt.token_ids for prompt in prompts], side="left", device=device)
    cache = DynamicCache(config=model.config)
    first = model(
        input_ids=ids,
        attention_mask=prompt_mask.long(),
        position_ids=(prompt_mask.long().cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    cache.batch_repeat_interleave(k)
    prompt_mask = prompt_mask.repeat_interleave(k, dim=0)
    ids, mask = pad(completions, side="right", device=device)
    rest = model(
        input_ids=ids,
        attention_mask=torch.cat([prompt_mask, mask], dim=1).long(),
        position_ids=prompt_mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    logits = torch.cat([first.repeat_interleave(k, dim=0), rest[:, :-1]], dim=1)
    nats = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    return torch.where(mask, nats.view_as(ids), 0).sum(-1).cpu(), mask.sum(-1).float().cpu()


def _by_layer(
    located: Sequence[int], excluded: Collection[int], sites: FFNSites
) -> Iterator[tuple[list[int], Int[np.ndarray, " free"]]]:
    """Yield, layer by layer, the located neurons and all neurons that are not excluded.

    Raises:
        UserError: A layer has fewer free neurons than located ones.
    """
    by_layer: dict[int, list[int]] = {}
    for neuron in sorted(located):
        by_layer.setdefault(neuron // sites.d_mlp, []).append(neuron)
    for layer, in_layer in by_layer.items():
        ids = np.arange(layer * sites.d_mlp, (layer + 1) * sites.d_mlp)
        free = np.setdiff1d(ids, list(excluded))
        if len(free) < len(in_layer):
            raise UserError(
                f"layer {layer}: {len(in_layer)} neurons are scaled but only {len(free)} others are left for a control "
                "of equal size; scale fewer"
            )
        yield in_layer, free
