"""Does the model use the neurons that a probe keeps? Scale them, and as many matched others, and see what changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from neurosig.explore.hooks import hooks
from neurosig.explore.traces import Traces
from neurosig.intervene.dose_response import Cell, dose_response
from neurosig.intervene.interventions import (
    NeuronSet,
    activity_matched,
    completion_nll,
    layer_matched,
    mean_over_sets,
    strongest,
)
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt

COLUMNS = ("group", "factor", "neurons", "texts", "nats", "change", "change_low", "change_high")
DIFFERENCE = ("difference", "difference_low", "difference_high")


def causal_table(
    run: Traces,
    located: Sequence[int],
    excluded: Sequence[int],
    factors: Sequence[float],
    draws: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """See `neurosig.explore.probes.probe.Probe.causal_check`.

    Args:
        run: Texts and the model that reads them.
        located: Flat ids of the neurons to scale.
        excluded: Flat ids that no control may hold.
        factors: By what values are multiplied.
        draws: Random controls of each kind.
        seed: Seed of the controls and of the bootstrap.
        progress: Show a bar.
    """
    sets = _sets(run, located, excluded, draws, seed)
    cells = [Cell(None, 1.0, {"nll": _nats(run)})]
    planned = [(neurons, factor) for factor in factors for neurons in sets]
    for neurons, factor in tqdm(planned, desc="scale", unit="set", disable=not progress, leave=False):
        with hooks(run.model, [divmod(neuron, run.sites.d_mlp) for neuron in neurons.ids], scale=factor):
            cells.append(Cell(neurons, factor, {"nll": _nats(run)}))
    rows: list[dict[str, Any]] = dose_response(cells, seed=seed, measures=("nll",))
    table = pd.DataFrame([row for row in rows if row["factor"] != 1])
    table = table.rename(columns={"n": "texts", "value": "nats"}).assign(neurons=len(located))
    return table.reindex(columns=[*COLUMNS, *DIFFERENCE])


def _sets(run: Traces, located: Sequence[int], excluded: Sequence[int], draws: int, seed: int) -> list[NeuronSet]:
    rng, sites = np.random.default_rng(seed), run.sites
    contributions = mean_over_sets(run.sets.neuron_ids, run.sets.contributions, sites.n_layers * sites.d_mlp)
    sets = [NeuronSet("located", 0, tuple(sorted(located)))]
    for draw in range(draws):
        sets.append(NeuronSet("layer", draw, tuple(layer_matched(located, excluded, sites, rng))))
        matched = activity_matched(located, excluded, contributions, sites, rng)
        sets.append(NeuronSet("activity", draw, tuple(matched)))
    sets.append(NeuronSet("strongest", 0, tuple(strongest(located, excluded, contributions, sites))))
    return sets


def _nats(run: Traces) -> Float[np.ndarray, " texts"]:
    """Nats per token of each completion after its prompt; of a prompt alone, of its tokens after the first."""
    prompts, groups = [], {}
    for index, text in enumerate(run.texts):
        start = len(text.prompt_ids) if text.completion_ids else 1
        name = str(index)
        prompts.append(Prompt(name, text.ids[:start]))
        groups[name] = [Rollout(name, 0, "", text.ids[start:], "length")]
    nats = completion_nll(run.model, prompts, groups)
    return np.array([nats[str(index)] for index in range(len(run))])
