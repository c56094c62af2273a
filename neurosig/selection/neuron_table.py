"""``neurons.csv`` of a manifest: the hallucination neurons and the reasoning-pattern neurons of an export.

One row per neuron and role. ``hallucination``: the neurons to which the export's probe gives a weight, heaviest first,
with their stability and with the kinds of question in which they have the weight's sign. ``pattern``: the neurons that
mark a cluster of the questions' signatures (`neurosig.patterns.clusters`), highest lift first. The columns of the other
role are blank.

The stability costs two L1 fits per pair of halves: with `PAIRS` pairs 2 to 4 s on one core for 1,900 rollouts of a
135M-parameter model, whose sampling takes three minutes. Clustering is quadratic in the signatures, 6 s for
`MOST_SIGNATURES`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.kinds import signs_by_kind
from neurosig.hallucination.lasso import design
from neurosig.hallucination.locate import stable_neurons
from neurosig.hallucination.probe import probe_matrix, rollout_labels
from neurosig.hallucination.scores import Scores
from neurosig.manifest import QuestionRow
from neurosig.neurons.contributions import PAD, ActiveSets
from neurosig.patterns.clusters import ClusterConfig, choose_clustering, jaccard_distances, marking_neurons
from neurosig.patterns.signatures import representative
from neurosig.sampling.rollouts import Rollout

logger = logging.getLogger(__name__)

COLUMNS = (
    *("role", "layer", "index", "active_share", "weight", "stability", "kinds", "kinds_agreeing"),
    *("cluster", "lift", "q"),
)
"""``stability``: share of the halves of the questions that select the neuron; ``kinds``: kinds of question in which the
sign of its association with guessing can be told; ``kinds_agreeing``: those in which it is the weight's; ``cluster``: 1
is the largest; ``lift`` and ``q``: see `neurosig.patterns.clusters.marking_neurons`."""
PAIRS = 25
"""Pairs of halves behind ``stability``; `neurosig.locate` and the report draw 50."""
MOST_QUESTIONS = 2000
"""Labelled questions that stability selection uses at most."""
MOST_SIGNATURES = 1000
"""Signatures that are clustered at most."""
FEWEST_SIGNATURES = 3


def neurons_csv(
    rows: Sequence[QuestionRow],
    groups: Mapping[str, Sequence[Rollout]],
    sets: ActiveSets,
    scores: Scores,
    probe: ProbeConfig,
    *,
    n_neurons: int,
    d_mlp: int,
    keep_truncated: bool,
) -> tuple[str, list[str]]:
    """The text of ``neurons.csv``, and what the manifest's header notes about it.

    Args:
        rows: The manifest's rows.
        groups: Question id -> its rollouts, for the questions with rollouts.
        sets: Active sets of these rollouts, in the same order.
        scores: The probe, and its score of each rollout.
        probe: The probe's options; its seed draws halves, clusters and samples.
        n_neurons: Neurons of the model, over all layers.
        d_mlp: Neurons per layer.
        keep_truncated: Whether a rollout that was cut off can represent its question.
    """
    traced = [row for row in rows if row.vote is not None]
    hallucination, sampled = _hallucination(traced, groups, sets, scores, probe, (n_neurons // d_mlp, n_neurons))
    chosen = [
        start + index
        for row, start, own in zip(traced, _starts(groups), scores.rollout_probe, strict=True)
        if (index := _representative(row, groups[row.question_id], own.tolist(), keep_truncated)) is not None
    ]
    pattern, clustered = _pattern(sets.neuron_ids[chosen], d_mlp, probe.seed)
    table = pd.concat([hallucination, pattern], ignore_index=True)
    flat = table.pop("neuron").to_numpy(np.int64)
    table["layer"], table["index"] = flat // d_mlp, flat % d_mlp
    active = np.bincount(sets.neuron_ids[sets.neuron_ids != PAD].numpy(), minlength=n_neurons) / len(sets.neuron_ids)
    table["active_share"] = active[flat]
    integers = dict.fromkeys(("kinds", "kinds_agreeing", "cluster"), "Int64")
    text = table.astype(integers)[list(COLUMNS)].to_csv(index=False, float_format="%.6g")
    notes = [note for note in (sampled, clustered) if note]
    for note in notes:
        logger.info("%s", note)
    return text, notes


def _hallucination(
    rows: Sequence[QuestionRow],
    groups: Mapping[str, Sequence[Rollout]],
    sets: ActiveSets,
    scores: Scores,
    probe: ProbeConfig,
    size: tuple[int, int],
) -> tuple[pd.DataFrame, str]:
    """The probe's neurons, and a note where not all questions were used for the stability."""
    neurons, weights = scores.probe.neurons, scores.probe.weights
    table = pd.DataFrame({"role": "hallucination", "neuron": neurons, "weight": weights})
    if not len(neurons):
        return table.assign(stability=np.nan, kinds=0, kinds_agreeing=0), ""
    owners = np.repeat(np.arange(len(rows)), [len(groups[row.question_id]) for row in rows])
    labels = rollout_labels([row.answers for row in rows], [row.pseudo_label for row in rows], probe)
    kinds = np.unique([row.kind or row.domain for row in rows], return_inverse=True)[1][owners]
    matrix = probe_matrix(sets.neuron_ids.numpy(), sets.contributions.float().numpy(), *size, probe)
    prepared = design(matrix, probe.min_active_share)
    known = np.flatnonzero(labels >= 0)
    used, note = np.unique(owners[known]), ""
    if len(used) > MOST_QUESTIONS:
        note = f"neurons.csv: stability from {MOST_QUESTIONS} of {len(used)} questions that agree or split"
        used = np.random.default_rng(probe.seed).choice(used, MOST_QUESTIONS, replace=False)
        known = known[np.isin(owners[known], used)]
    stability = stable_neurons(
        prepared.matrix[known], labels[known], owners[known], replace(probe, pairs=min(PAIRS, probe.pairs))
    )
    place = np.searchsorted(prepared.columns, neurons)
    signs = signs_by_kind(prepared.matrix[:, place], weights, labels, owners, kinds)
    found = {"stability": stability.frequency[place], "kinds": signs.n_kinds, "kinds_agreeing": signs.n_agreeing}
    return table.assign(**found), note


def _pattern(sets: Int[Tensor, "n size"], d_mlp: int, seed: int) -> tuple[pd.DataFrame, str]:
    """The marking neurons of the clusters, each under the cluster of its highest lift, and a note."""
    empty = pd.DataFrame({"role": [], "neuron": [], "cluster": [], "lift": [], "q": []})
    n = len(sets)
    if n < FEWEST_SIGNATURES or not bool((sets != PAD).any()):
        return empty, f"neurons.csv: no pattern neurons, {n} signatures are too few to cluster"
    note = ""
    if n > MOST_SIGNATURES:
        note = f"neurons.csv: pattern neurons from clusters of {MOST_SIGNATURES} of {n} signatures"
        sets = sets[np.sort(np.random.default_rng(seed).choice(n, MOST_SIGNATURES, replace=False))]
    config = ClusterConfig(seed=seed)
    clustering, _ = choose_clustering(jaccard_distances(sets), config)
    found = marking_neurons(sets, clustering.labels, d_mlp, config)
    found = found.sort_values("lift", ascending=False, kind="stable").drop_duplicates(["layer", "index"])
    found = found.sort_values("cluster", kind="stable")
    return found.assign(role="pattern", neuron=found["layer"] * d_mlp + found["index"])[list(empty.columns)], note


def _representative(
    row: QuestionRow, group: Sequence[Rollout], probe_scores: Sequence[float], keep_truncated: bool
) -> int | None:
    usable = [keep_truncated or rollout.finish_reason == "stop" for rollout in group]
    return representative(row.answers, row.pseudo_label, probe_scores, usable)


def _starts(groups: Mapping[str, Sequence[Rollout]]) -> Iterator[int]:
    """Row of each question's first rollout."""
    start = 0
    for group in groups.values():
        yield start
        start += len(group)
