"""Reasoning-pattern clusters: questions that rely on the same neurons, the neurons that mark them, and how they
compare with clusters of hidden states or texts.

Signatures are clustered by k-medoids on Jaccard distances, so that each cluster is represented by a real question, and
the number of clusters is the one with the best silhouette (reconstruction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, pairwise, silhouette_score
from torch import Tensor

from neurosig.neurons.contributions import PAD
from neurosig.patterns.similarity import jaccard
from neurosig.runtime.errors import UserError
from neurosig.statistics.arrays import takes_arrays
from neurosig.statistics.metrics import bootstrap_interval


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Options of clustering.

    Attributes:
        k: Number of clusters; None chooses it by silhouette.
        max_k: Largest number tried; the smallest is 2.
        restarts: Seeded starts of k-medoids; the tightest clustering is kept.
        seed: Seed of the starts and of bootstraps.
        markers: Marking neurons named for each cluster, at most.
        max_fdr: Share of false ones to expect among them at most (Benjamini-Hochberg over neurons and clusters).
        typical: Typical questions named for each cluster.
    """

    k: int | None = None
    max_k: int = 8
    restarts: int = 5
    seed: int = 0
    markers: int = 20
    max_fdr: float = 0.05
    typical: int = 5

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("k", self.k is None or self.k >= 2, "at least 2"),
            ("max_k", self.max_k >= 2, "at least 2"),
            ("restarts", self.restarts >= 1, "at least 1"),
            ("markers", self.markers >= 0, "0 or more"),
            ("max_fdr", 0 < self.max_fdr <= 1, "above 0 and at most 1"),
            ("typical", self.typical >= 1, "at least 1"),
        ):
            if not valid:
                raise UserError(f"cluster {name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, eq=False)
class Medoids:
    """A k-medoids clustering.

    Attributes:
        labels: Cluster of each point, 0 to k - 1, largest cluster first, equally large ones by their first point.
        medoids: The medoid of each cluster, a point.
        inertia: Sum of the points' distances to their medoids.
    """

    labels: Int[np.ndarray, " n"]
    medoids: Int[np.ndarray, " k"]
    inertia: float


@dataclass(frozen=True, slots=True, eq=False)
class PatternClusters:
    """Clusters of signatures with their markers and comparisons.

    Attributes:
        clustering: Their labels and medoids.
        silhouettes: One row per number of clusters tried: ``k``, ``silhouette``.
        markers: `marking_neurons` of every cluster.
        typical: For each cluster its medoid and the questions nearest to it, nearest first.
        comparison: `compare_clusterings` with the other distances and the kinds.
        labels: Name -> labels of every clustering compared; ``neurons`` first.
    """

    clustering: Medoids
    silhouettes: pd.DataFrame
    markers: pd.DataFrame
    typical: list[list[int]]
    comparison: pd.DataFrame
    labels: Mapping[str, Int[np.ndarray, " n"]]


def pattern_clusters(
    sets: Int[Tensor, "n size"],
    d_mlp: int,
    config: ClusterConfig,
    *,
    others: Mapping[str, Float[np.ndarray, "n n"]] | None = None,
    kinds: Sequence[str] | None = None,
) -> PatternClusters:
    """Cluster signatures, one per question, and describe the clusters.

    Args:
        sets: Flat neuron ids of each signature; `PAD` where sets differ in size.
        d_mlp: Neurons per layer.
        config: Options.
        others: Name -> other distances between the same questions, to cluster into as many clusters and compare:
            `cosine_distances` of hidden states, `jaccard_distances` of token sets.
        kinds: What kind of question each is, to compare with; never used to cluster.

    Raises:
        UserError: There are fewer than three signatures, or no more than clusters wanted.
    """
    distances = jaccard_distances(sets)
    clustering, silhouettes = choose_clustering(distances, config)
    k = len(clustering.medoids)
    rivals = {
        name: k_medoids(other, k, restarts=config.restarts, seed=config.seed) for name, other in (others or {}).items()
    }
    labels = {"neurons": clustering.labels, **{name: rival.labels for name, rival in rivals.items()}}
    return PatternClusters(
        clustering,
        silhouettes,
        marking_neurons(sets, clustering.labels, d_mlp, config),
        typical_points(distances, clustering, config.typical),
        compare_clusterings(labels, kinds, seed=config.seed),
        labels,
    )


def jaccard_distances(sets: Int[Tensor, "n size"]) -> Float[np.ndarray, "n n"]:
    """One minus the Jaccard similarity of every pair; 0 between a set and itself, also where it is empty."""
    distances = 1.0 - jaccard(sets, sets).double().numpy()
    np.fill_diagonal(distances, 0.0)
    return distances


def cosine_distances(hidden: Float[Tensor, "n d_model"]) -> Float[np.ndarray, "n n"]:
    """One minus the cosine similarity of every pair of hidden states."""
    return pairwise.cosine_distances(hidden.double().numpy())


@takes_arrays
def choose_clustering(distances: Float[np.ndarray, "n n"], config: ClusterConfig) -> tuple[Medoids, pd.DataFrame]:
    """`k_medoids` with the number of clusters of the best silhouette, the smallest on ties; and all silhouettes.

    Raises:
        UserError: There are fewer than three points, or no more than clusters wanted.
    """
    n = len(distances)
    tried = range(2, min(config.max_k, n - 1) + 1) if config.k is None else [config.k]
    if n < 3 or tried[0] >= n:
        raise UserError(
            f"clusters: {n} points for {config.k or 2} clusters; give more points or ask for fewer clusters"
        )
    found = [k_medoids(distances, k, restarts=config.restarts, seed=config.seed) for k in tried]
    scores = [float(silhouette_score(distances, one.labels, metric="precomputed")) for one in found]
    return found[int(np.argmax(scores))], pd.DataFrame({"k": list(tried), "silhouette": scores})


@takes_arrays
def k_medoids(distances: Float[np.ndarray, "n n"], k: int, *, restarts: int, seed: int) -> Medoids:
    """Partition around medoids: the best of several seeded starts, each improved by best swaps until none helps.

    Starts are drawn as in k-means++ (a point in proportion to its distance from the medoids so far). The gain of
    every swap of a medoid for a point comes from one pass over the distances (FastPAM1, Schubert & Rousseeuw 2021).
    Equal gains go to the lower medoid and point. Memory and time per swap are quadratic in the points.

    Args:
        distances: Symmetric, 0 on the diagonal.
        k: Clusters.
        restarts: Starts.
        seed: Seed of the starts.
    """
    rng = np.random.default_rng(seed)
    runs = [_swap(distances, _start(distances, k, rng)) for _ in range(restarts)]
    inertia, medoids = min(runs, key=lambda run: run[0])
    labels = distances[medoids].argmin(axis=0)
    labels[medoids] = np.arange(k)  # also where two medoids are the same set
    lowest = np.array([np.argmax(labels == cluster) for cluster in range(k)])
    order = np.lexsort((lowest, -np.bincount(labels)))
    return Medoids(np.argsort(order)[labels], medoids[order], inertia)


@takes_arrays
def marking_neurons(
    sets: Int[Tensor, "n size"], labels: Int[np.ndarray, " n"], d_mlp: int, config: ClusterConfig
) -> pd.DataFrame:
    """The neurons that are active in a cluster's signatures more often than in the rest, highest lift first.

    Columns: ``cluster`` (from 1, the largest), ``layer``, ``index``, ``lift`` (share of the cluster's signatures that
    hold the neuron over its share of the others, half a count added to each), ``share_in``, ``share_rest``, ``p``
    (Fisher's exact test, one-sided) and ``q`` (Benjamini-Hochberg over all neurons and clusters, at most ``max_fdr``).
    The clusters were formed from these neurons: p and q rank and screen neurons, they are no evidence that the clusters
    are real.
    """
    ids = sets.numpy()
    rows, columns = np.nonzero(ids != PAD)
    neurons, position = np.unique(ids[rows, columns], return_inverse=True)
    n, k = len(ids), int(labels.max()) + 1
    inside = np.zeros((k, len(neurons)), dtype=np.int64)
    np.add.at(inside, (labels[rows], position), 1)
    sizes, total = np.bincount(labels)[:, None], inside.sum(axis=0)
    outside = total - inside
    p = stats.hypergeom.sf(inside - 1, n, total, sizes)
    q = stats.false_discovery_control(p, axis=None).reshape(p.shape)
    lift = ((inside + 0.5) / (sizes + 1)) / ((outside + 0.5) / (n - sizes + 1))
    frames = []
    for cluster in range(k):
        found = np.flatnonzero((q[cluster] <= config.max_fdr) & (lift[cluster] > 1))
        best = found[np.lexsort((neurons[found], -lift[cluster, found]))][: config.markers]
        frames.append(
            pd.DataFrame(
                {
                    "cluster": cluster + 1,
                    "layer": neurons[best] // d_mlp,
                    "index": neurons[best] % d_mlp,
                    "lift": lift[cluster, best],
                    "share_in": inside[cluster, best] / sizes[cluster],
                    "share_rest": outside[cluster, best] / (n - sizes[cluster]),
                    "p": p[cluster, best],
                    "q": q[cluster, best],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@takes_arrays
def typical_points(distances: Float[np.ndarray, "n n"], clustering: Medoids, m: int) -> list[list[int]]:
    """For each cluster its medoid and its ``m - 1`` points nearest to it, nearest first."""
    typical = []
    for cluster, medoid in enumerate(clustering.medoids):
        members = np.flatnonzero((clustering.labels == cluster) & (np.arange(len(distances)) != medoid))
        nearest = members[np.argsort(distances[medoid, members], kind="stable")]
        typical.append([int(medoid), *nearest[: m - 1].tolist()])
    return typical


@takes_arrays
def purity(labels: Int[np.ndarray, " n"], kinds: Int[np.ndarray, " n"]) -> float:
    """Share of the points that are of their cluster's most frequent kind."""
    counts = np.zeros((int(labels.max()) + 1, int(kinds.max()) + 1), dtype=np.int64)
    np.add.at(counts, (labels, kinds), 1)
    return float(counts.max(axis=1).sum() / len(labels))


def compare_clusterings(
    clusterings: Mapping[str, Int[np.ndarray, " n"]],
    kinds: Sequence[str] | None = None,
    *,
    seed: int,
    resamples: int = 1000,
) -> pd.DataFrame:
    """How far each clustering agrees with the first one, and with the kinds.

    Columns: ``clustering``, ``k``, ``n``, ``ari_first`` and ``ami_first`` (adjusted Rand index and adjusted mutual
    information with the first clustering), and with kinds ``purity`` with its 95% bootstrap interval over questions
    (``purity_low``, ``purity_high``; the clusters stay as they are), ``largest_kind`` (the purity of one single
    cluster), ``ari_kinds`` and ``ami_kinds``.
    """
    first = next(iter(clusterings.values()))
    codes = None if kinds is None else np.unique(np.asarray(kinds), return_inverse=True)[1]
    table = []
    for name, labels in clusterings.items():
        row: dict[str, object] = {
            "clustering": name,
            "k": len(np.unique(labels)),
            "n": len(labels),
            "ari_first": adjusted_rand_score(first, labels),
            "ami_first": adjusted_mutual_info_score(first, labels),
        }
        if codes is not None:
            interval = bootstrap_interval(
                lambda points, labels=labels: purity(labels[points], codes[points]),  # type: ignore[misc]
                len(labels),
                seed=seed,
                resamples=resamples,
            )
            row |= {
                "purity": interval.estimate,
                "purity_low": interval.low,
                "purity_high": interval.high,
                "largest_kind": np.bincount(codes).max() / len(codes),
                "ari_kinds": adjusted_rand_score(codes, labels),
                "ami_kinds": adjusted_mutual_info_score(codes, labels),
            }
        table.append(row)
    return pd.DataFrame(table)


def _start(distances: Float[np.ndarray, "n n"], k: int, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    medoids = [int(rng.integers(len(distances)))]
    while len(medoids) < k:
        nearest = distances[medoids].min(axis=0)
        nearest[medoids] = 0.0
        if nearest.sum() > 0:
            medoids.append(int(rng.choice(len(distances), p=nearest / nearest.sum())))
        else:  # only copies of the medoids are left
            medoids.append(int(np.setdiff1d(np.arange(len(distances)), medoids)[0]))
    return np.array(medoids)


def _swap(distances: Float[np.ndarray, "n n"], medoids: Int[np.ndarray, " k"]) -> tuple[float, Int[np.ndarray, " k"]]:
    """Apply the best swap until none lowers the inertia; returns it and the medoids."""
    medoids, k, n = medoids.copy(), len(medoids), len(distances)
    while True:
        to_medoids = np.vstack([distances[medoids], np.full((1, n), np.inf)])
        nearest = to_medoids[:k].argmin(axis=0)
        first, second = np.partition(to_medoids, 1, axis=0)[:2]
        # what a new medoid gains from all points, and what it then costs to give up each old one
        gain = np.minimum(distances - first[:, None], 0.0)
        given_up = np.minimum(distances, second[:, None]) - first[:, None] - gain
        change = gain.sum(axis=0) + (np.arange(k)[:, None] == nearest).astype(float) @ given_up
        change[:, medoids] = np.inf
        out, into = np.unravel_index(change.argmin(), change.shape)
        if not change[out, into] < -1e-9:
            return float(first.sum()), medoids
        medoids[out] = into
