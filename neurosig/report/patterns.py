"""The report's part on reasoning patterns: clusters of questions that rely on the same neurons, and what marks them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from neurosig.manifest import Manifest, QuestionRow
from neurosig.neurons.contributions import PAD
from neurosig.patterns.clusters import (
    ClusterConfig,
    PatternClusters,
    cosine_distances,
    jaccard_distances,
    pattern_clusters,
)
from neurosig.report.data import Traced, voted

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
        clusters: What the page shows of them.
        rows: The questions.
        places: Row of each question's representative in the traced signals.
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
            said = ", ".join(
                f"{name} {row['purity']:.2f} [{row['purity_low']:.2f}, {row['purity_high']:.2f}]"
                for name, row in rows.items()
            )
            single = rows["neurons"]["largest_kind"]
            text += f" Purity against the kinds of question: {said}; a single cluster would have {single:.2f}."
        return text


def patterns(manifest: Manifest, traced: Traced, *, seed: int) -> Patterns | str:
    """Cluster every question with a majority answer; or say why that cannot be done."""
    rows = [row for row in voted(manifest) if row.pseudo_label is not None]
    if len(rows) < 3:
        return f"{len(rows)} questions have a majority answer; patterns need three."
    chosen = representatives(manifest, rows, traced)
    keys = list(manifest.rollouts)
    kinds = [row.kind or row.domain for row in rows]
    found = pattern_clusters(
        torch.from_numpy(traced.ids[chosen]),
        traced.d_mlp,
        ClusterConfig(seed=seed),
        others={
            "hidden states": cosine_distances(torch.from_numpy(traced.hidden[chosen])),
            "tokens": jaccard_distances(_token_sets([manifest.rollouts[keys[index]].body_ids for index in chosen])),
        },
        kinds=kinds if len(set(kinds)) > 1 else None,
    )
    clusters = []
    for label, typical in enumerate(found.typical):
        members = np.flatnonzero(found.clustering.labels == label)
        counts = Counter(kinds[index] for index in members).most_common(3)
        markers = found.markers[found.markers["cluster"] == label].head(SHOWN_MARKERS)
        clusters.append(
            Cluster(
                len(members),
                ", ".join(f"{kind} ({count})" for kind, count in counts),
                tuple(rows[index].question for index in typical),
                ", ".join(f"{m.layer}.{m.index} (lift {m.lift:.1f})" for m in markers.itertuples()) or "none",
            )
        )
    return Patterns(found, tuple(clusters), tuple(rows), chosen)


def representatives(manifest: Manifest, rows: Sequence[QuestionRow], traced: Traced) -> Int[np.ndarray, " n"]:
    """Row in the traced signals of each question's representative, as in `neurosig.selection.choose.representative`.

    Args:
        manifest: The manifest.
        rows: Questions with a majority answer.
        traced: The manifest's signals.
    """
    place = {key: index for index, key in enumerate(manifest.rollouts)}
    chosen = []
    for row in rows:
        majority = [place[row.id, index] for index, answer in enumerate(row.answers) if answer == row.pseudo_label]
        chosen.append(min(majority, key=lambda index: traced.probe[index]))
    return np.array(chosen)


def _token_sets(rollouts: list[tuple[int, ...]]) -> Int[torch.Tensor, "n size"]:
    sets = [torch.tensor(sorted(set(ids)), dtype=torch.int32) for ids in rollouts]
    return torch.nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=PAD)
