"""Clusters of signatures, the neurons that mark them, and their comparison with other clusters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neurosig.hallucination.planted import PlantedConfig, plant
from neurosig.neurons.contributions import PAD
from neurosig.patterns.clusters import (
    ClusterConfig,
    choose_clustering,
    compare_clusterings,
    cosine_distances,
    jaccard_distances,
    k_medoids,
    marking_neurons,
    pattern_clusters,
    purity,
    typical_points,
)
from neurosig.runtime.errors import UserError


def euclidean(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def grouped_sets(n: int = 45, groups: int = 3, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Signatures of 20 ids: 8 shared by the group (100 * group + 0..7), 12 drawn from 300 others."""
    rng = np.random.default_rng(seed)
    group = rng.integers(groups, size=n)
    rows = [[*(100 * g + np.arange(8)), *(1000 + rng.choice(300, 12, replace=False))] for g in group]
    return torch.tensor(np.array(rows), dtype=torch.int32), group


# k-medoids


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 9), st.integers(1, 3), st.integers(0, 10_000))
def test_restarted_swaps_find_the_best_medoids_of_small_problems(n: int, k: int, seed: int) -> None:
    distances = euclidean(np.random.default_rng(seed).normal(size=(n, 2)))
    found = k_medoids(distances, k, restarts=20, seed=0)
    best = min(distances[list(chosen)].min(axis=0).sum() for chosen in itertools.combinations(range(n), k))
    assert found.inertia == pytest.approx(best)
    assert found.inertia == pytest.approx(distances[found.medoids[found.labels], np.arange(n)].sum())
    assert (found.labels[found.medoids] == np.arange(k)).all()


def test_no_single_swap_improves_the_result() -> None:
    distances = euclidean(np.random.default_rng(3).normal(size=(60, 3)))
    found = k_medoids(distances, 5, restarts=1, seed=0)
    for out, into in itertools.product(range(5), range(60)):
        swapped = found.medoids.copy()
        swapped[out] = into
        assert distances[swapped].min(axis=0).sum() >= found.inertia - 1e-9


def test_clusters_are_ordered_by_size_and_seeded() -> None:
    points = np.concatenate([np.zeros((4, 2)), np.full((9, 2), 5.0), np.full((6, 2), -7.0)])
    points += np.random.default_rng(0).normal(0, 0.1, points.shape)
    found = k_medoids(euclidean(points), 3, restarts=3, seed=0)
    assert found.labels.tolist() == [2] * 4 + [0] * 9 + [1] * 6
    again = k_medoids(euclidean(points), 3, restarts=3, seed=0)
    assert np.array_equal(again.medoids, found.medoids)


def test_copies_of_one_point_make_clusters_all_the_same() -> None:
    found = k_medoids(np.zeros((4, 4)), 3, restarts=2, seed=0)
    assert sorted(set(found.labels)) == [0, 1, 2] and len(set(found.medoids)) == 3
    assert found.inertia == 0.0


def test_the_number_of_clusters_has_the_best_silhouette() -> None:
    sets, group = grouped_sets(groups=4)
    clustering, silhouettes = choose_clustering(jaccard_distances(sets), ClusterConfig())
    assert silhouettes["k"].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert silhouettes["silhouette"].idxmax() == 2 and len(clustering.medoids) == 4
    assert purity(clustering.labels, group) == 1.0
    assert len(choose_clustering(jaccard_distances(sets), ClusterConfig(k=2))[0].medoids) == 2
    with pytest.raises(UserError, match="2 points for 2 clusters"):
        choose_clustering(np.zeros((2, 2)), ClusterConfig())
    with pytest.raises(UserError, match="5 points for 9 clusters"):
        choose_clustering(np.zeros((5, 5)), ClusterConfig(k=9))


def test_distances_by_hand() -> None:
    sets = torch.tensor([[1, 2, 3], [2, 3, PAD], [PAD, PAD, PAD]], dtype=torch.int32)
    np.testing.assert_allclose(jaccard_distances(sets), [[0, 1 / 3, 1], [1 / 3, 0, 1], [1, 1, 0]], rtol=1e-6)
    hidden = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    expected = [[0, 1 - 0.5**0.5, 2], [1 - 0.5**0.5, 0, 1 + 0.5**0.5], [2, 1 + 0.5**0.5, 0]]
    np.testing.assert_allclose(cosine_distances(hidden), expected, atol=1e-12)


# the sentences about clusters


def test_marking_neurons_by_hand() -> None:
    """Neuron 7 of layer 1 is in all of cluster 0 and one other; neuron 3 of layer 0 is everywhere."""
    sets = torch.tensor([[17, 3]] * 6 + [[17, 3]] + [[3, PAD]] * 7 + [[3, 25]] * 2, dtype=torch.int32)
    labels = np.array([0] * 6 + [1] * 10)
    table = marking_neurons(sets, labels, 10, ClusterConfig(max_fdr=0.05))
    assert table[["cluster", "layer", "index"]].to_numpy().tolist() == [[1, 1, 7]]
    row = table.iloc[0]
    assert (row["share_in"], row["share_rest"]) == (1.0, 0.1)
    assert row["lift"] == pytest.approx((6.5 / 7) / (1.5 / 11))
    assert row["p"] == pytest.approx(stats.fisher_exact([[6, 0], [1, 9]], alternative="greater").pvalue)
    # three neurons in two clusters: six tests, the best of them
    assert row["q"] == pytest.approx(6 * row["p"])
    everything = marking_neurons(sets, labels, 10, ClusterConfig(max_fdr=1.0))
    assert everything[["cluster", "layer", "index"]].to_numpy().tolist() == [[1, 1, 7], [2, 2, 5], [2, 0, 3]]
    assert (everything["lift"] > 1).all()


def test_planted_markers_come_first_and_noise_is_not_named() -> None:
    sets, group = grouped_sets()
    found = pattern_clusters(sets, 100, ClusterConfig(markers=8))
    assert len(found.clustering.medoids) == 3
    for cluster in range(3):
        true = int(np.bincount(group[found.clustering.labels == cluster]).argmax())
        markers = found.markers[found.markers["cluster"] == cluster + 1]
        assert markers["layer"].tolist() == [true] * 8 and sorted(markers["index"]) == list(range(8))
        assert markers["lift"].is_monotonic_decreasing
    shuffled = np.random.default_rng(0).permutation(found.clustering.labels)
    assert len(marking_neurons(sets, shuffled, 100, ClusterConfig(max_fdr=0.01))) == 0


def test_typical_questions_are_the_medoid_and_its_nearest() -> None:
    distances = euclidean(np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [11.4]]))
    found = k_medoids(distances, 2, restarts=5, seed=0)
    assert typical_points(distances, found, 3) == [[1, 0, 2], [4, 5, 3]]
    assert typical_points(distances, found, 1) == [[1], [4]]


def test_purity_and_agreement_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    kinds = ["x", "x", "y", "y", "y", "x"]
    assert purity(labels, np.array([0, 0, 1, 1, 1, 0])) == 4 / 6
    table = compare_clusterings({"a": labels, "b": 1 - labels, "c": np.arange(6)}, kinds, seed=0, resamples=50)
    assert table["ari_first"].tolist() == [1.0, 1.0, 0.0]
    assert table["ami_first"].iloc[1] == pytest.approx(1.0)
    assert table["purity"].tolist() == [4 / 6, 4 / 6, 1.0]
    assert (table["purity_low"] <= table["purity"]).all() and (table["purity"] <= table["purity_high"]).all()
    assert table["largest_kind"].tolist() == [0.5] * 3
    assert "purity" not in compare_clusterings({"a": labels}, seed=0)


def test_topics_are_recovered_from_real_like_sets_and_random_states_are_not() -> None:
    data = plant(PlantedConfig(n_questions=120, num_generations=1, n_topics=4, seed=1))
    sets = torch.from_numpy(data.ids)
    noise = torch.randn(120, 16, generator=torch.Generator().manual_seed(0))
    topics = [f"topic {topic}" for topic in data.topics]
    found = pattern_clusters(sets, 1536, ClusterConfig(), others={"hidden": cosine_distances(noise)}, kinds=topics)
    table = found.comparison.set_index("clustering")
    assert table.loc["neurons", "k"] == 4
    assert table.loc["neurons", "purity_low"] > 0.9 and table.loc["neurons", "ari_kinds"] > 0.9
    assert abs(table.loc["hidden", "ari_kinds"]) < 0.1 and abs(table.loc["hidden", "ari_first"]) < 0.1
    assert table.loc["hidden", "purity"] < 0.5


def test_options_out_of_range_are_named() -> None:
    for name, value in (("k", 1), ("max_k", 1), ("restarts", 0), ("markers", -1), ("max_fdr", 0.0), ("typical", 0)):
        with pytest.raises(UserError, match=f"cluster {name.replace('_', '-')}: expected"):
            ClusterConfig(**{name: value})  # type: ignore[arg-type]
