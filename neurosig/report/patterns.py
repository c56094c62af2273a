"""The report's section on reasoning patterns: clusters of questions that rely on the same neurons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from neurosig.exported import Exported
from neurosig.manifest import QuestionRow
from neurosig.neurons.config import neuron_name
from neurosig.neurons.contributions import PAD
from neurosig.patterns.clusters import (
    ClusterConfig,
    PatternClusters,
    cosine_distances,
    jaccard_distances,
    pattern_clusters,
)
from neurosig.statistics.metrics import format_interval

SHOWN_MARKERS = 5


@dataclass(frozen=True, slots=True)
class Cluster:
    """One cluster as the page shows it: size, most frequent kinds, typical questions, marking neurons."""

    size: int
    kinds: str
    typical: tuple[str, ...]
    markers: str


@dataclass(frozen=True, slots=True, eq=False)
class Patterns:
    """Clusters of the questions' representative rollouts.

    Attributes:
        found: The clusters.
        clusters: The clusters as the page shows them.
        rows: The questions.
        places: Row of each question's representative in the export's signals.
    """

    found: PatternClusters
    clusters: tuple[Cluster, ...]
    rows: tuple[QuestionRow, ...]
    places: Int[np.ndarray, " n"]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def comparison(self) -> list[dict[Hashable, Any]]:
        return self.found.comparison.to_dict("records")

    @property
    def sentence(self) -> str:
        """The finding in words, made from the numbers."""
        silhouette = self.found.silhouettes.set_index("k")["silhouette"]
        k = len(self.clusters)
        text = f"{self.n} questions, each by its representative rollout: {k} clusters, silhouette {silhouette[k]:.2f}."
        rows = {row["clustering"]: row for row in self.comparison}
        if "purity" in rows["neurons"]:
            purities = ", ".join(
                f"{name} {format_interval(row['purity'], row['purity_low'], row['purity_high'], '.2f')}"
                for name, row in rows.items()
            )
            single = rows["neurons"]["largest_kind"]
            text += f" Purity against the kinds of question: {purities}; a single cluster would have {single:.2f}."
        return text


def patterns(exported: Exported, *, seed: int, selected_only: bool = False) -> Patterns | str:
    """Clusters of the questions with a majority answer, or of the selected among them; or why there are none."""
    representatives = {
        name: rollout_id
        for name, rollout_id in exported.representatives.items()
        if exported.rows[name].selected or not selected_only
    }
    rows = [exported.rows[name] for name in representatives]
    if len(rows) < 3:
        return f"{len(rows)} questions have a majority answer; patterns need three."
    places = np.array([exported.place[item] for item in representatives.items()])
    completions = [exported.manifest.rollouts[item].completion_ids_without_eos for item in representatives.items()]
    kinds = [row.kind or row.domain for row in rows]
    signals = exported.signals
    found = pattern_clusters(
        signals.neuron_ids[places],
        signals.d_mlp,
        ClusterConfig(seed=seed),
        others={
            "hidden states": cosine_distances(signals.hidden_states[places].float()),
            "tokens": jaccard_distances(_token_sets(completions)),
        },
        kinds=kinds if len(set(kinds)) > 1 else None,
    )
    clusters = []
    for label, typical in enumerate(found.typical):
        members = np.flatnonzero(found.clustering.labels == label)
        counts = Counter(kinds[index] for index in members).most_common(3)
        markers = found.markers[found.markers["cluster"] == label + 1].head(SHOWN_MARKERS)
        clusters.append(
            Cluster(
                len(members),
                ", ".join(f"{kind} ({count})" for kind, count in counts),
                tuple(rows[index].question for index in typical),
                ", ".join(
                    f"{neuron_name(layer, index)} (lift {lift:.1f})"
                    for layer, index, lift in zip(markers["layer"], markers["index"], markers["lift"], strict=True)
                )
                or "none",
            )
        )
    return Patterns(found, tuple(clusters), tuple(rows), places)


def _token_sets(rollouts: list[tuple[int, ...]]) -> Int[torch.Tensor, "n size"]:
    sets = [torch.tensor(sorted(set(ids)), dtype=torch.int32) for ids in rollouts]
    return torch.nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=PAD)
