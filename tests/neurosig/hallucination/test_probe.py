"""The probe: from active sets to located neurons, and what they are compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.controls import random_neuron_auroc
from neurosig.hallucination.lasso import design, entry_penalty, fit_l1
from neurosig.hallucination.locate import FittedProbe, HallucinationProbe, read_neurons, write_neurons
from neurosig.hallucination.probe import chosen_penalty, contribution_matrix, cross_fit, fit_probe, regularisation_path
from neurosig.hallucination.stability import expected_false_discoveries, selection_limit, stability_selection
from neurosig.neurons.contributions import PAD
from neurosig.runtime.errors import UserError

N_NEURONS, D_MLP = 300, 100


def contributions(
    n: int = 60, k: int = 4, size: int = 60, seed: int = 0
) -> tuple[sparse.csr_array, Any, list[str], Any]:
    """Neurons 3, 107 and 211 depend on the label, the last one negatively; neuron 299 is active once."""
    rng = np.random.default_rng(seed)
    guessed = np.repeat(rng.permutation(n) % 2, k)
    ids, values = [], []
    for label in guessed:
        others = rng.choice(np.setdiff1d(np.arange(290), [3, 107, 211]), size - 3, replace=False)
        ids.append([3, 107, 211, *others])
        signal = 1 + np.array([0.5, 0.4, -0.5]) * label + rng.normal(0, 0.25, 3)
        values.append([*signal.clip(0.01), *rng.uniform(0.1, 1, size - 3)])
    ids[0][-1] = 299
    matrix = contribution_matrix(np.array(ids), np.array(values, dtype=np.float32), N_NEURONS)
    return matrix, guessed, [f"q{question}" for question in range(n) for _ in range(k)], np.repeat(np.arange(n), k)


# the matrix and its columns


def test_ragged_sets_become_a_matrix_without_their_pads() -> None:
    ids = np.array([[4, 1, 0], [2, PAD, PAD], [PAD, PAD, PAD]], dtype=np.int32)
    values = np.array([[0.5, 0.25, -1.0], [3.0, 0.0, 9.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    matrix = contribution_matrix(ids, values, 5)
    assert matrix.toarray().tolist() == [[-1.0, 0.25, 0, 0, 0.5], [0, 0, 3.0, 0, 0], [0] * 5]
    assert matrix.nnz == 4 and matrix.has_canonical_format
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32


def test_columns_are_screened_by_activity_and_scaled_to_one() -> None:
    matrix = sparse.csr_array(np.array([[0, -4.0, 1, 0], [0, 2, 0, 0], [0, 1, 0, 3], [0, 0, 0, 6]]))
    prepared = design(matrix, 0.5)
    assert prepared.columns.tolist() == [1, 3] and prepared.scale.tolist() == [4, 6]
    assert prepared.matrix.toarray().tolist() == [[-1, 0], [0.5, 0], [0.25, 0.5], [0, 1]]
    assert design(matrix, 0.0).columns.tolist() == [1, 2, 3]


# the path


def test_the_first_neuron_enters_where_the_path_starts() -> None:
    matrix, labels, _, _ = contributions()
    prepared = design(matrix, 0.02)
    start = entry_penalty(prepared.matrix, labels)
    assert np.count_nonzero(fit_l1(prepared.matrix, labels, 0.98 * start, 0).coef_) == 0
    assert np.count_nonzero(fit_l1(prepared.matrix, labels, 1.1 * start, 0).coef_) >= 1


def test_the_path_is_cross_validated_by_question() -> None:
    """Each row of the table, computed again from its definition; unlabelled rollouts change nothing."""
    matrix, labels, _, groups = contributions()
    prepared, config = design(matrix, 0.02), ProbeConfig(inverse_penalty=None)
    path = regularisation_path(prepared.matrix, labels, groups, config)
    assert len(path) == config.path_steps and path["inverse_penalty"].is_monotonic_increasing
    assert path["neurons"].iloc[0] <= 1 < path["neurons"].iloc[-1]
    assert path["auroc_mean"].max() > 0.9
    from sklearn.model_selection import StratifiedGroupKFold

    row, aurocs = path.iloc[4], []
    for seen, unseen in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(groups, labels, groups):
        assert set(groups[seen]).isdisjoint(groups[unseen])
        oracle = LogisticRegression(
            l1_ratio=1.0, C=row["inverse_penalty"], solver="liblinear", class_weight="balanced", random_state=0
        ).fit(prepared.matrix[seen], labels[seen])
        aurocs.append(roc_auc_score(labels[unseen], oracle.decision_function(prepared.matrix[unseen])))
    assert row["auroc_mean"] == pytest.approx(np.mean(aurocs), abs=1e-3)
    assert row["auroc_sd"] == pytest.approx(np.std(aurocs, ddof=1), abs=1e-3)

    more = sparse.vstack([prepared.matrix, prepared.matrix[:40]]).tocsr()
    again = regularisation_path(
        more, np.append(labels, np.full(40, -1)), np.append(groups, np.arange(1000, 1040)), config
    )
    pd.testing.assert_frame_equal(again, path)


def test_the_penalty_is_the_sparsest_within_a_standard_error_or_the_best() -> None:
    path = pd.DataFrame(
        {
            "inverse_penalty": [0.1, 0.2, 0.4, 0.8],
            "auroc_mean": [0.5, 0.79, 0.8, 0.81],
            "auroc_sd": [0.0, 0.1, 0.1, 0.01],
            "log_loss_mean": [0.69, 0.52, 0.5, 0.6],
            "log_loss_sd": [0.0, 0.01, 0.1, 0.2],
        }
    )

    def chosen(**options: Any) -> float:
        return chosen_penalty(path, ProbeConfig(inverse_penalty=None, **options))

    assert chosen() == 0.2  # .52 <= .50 + .1 / sqrt(5)
    assert chosen(one_standard_error=False) == 0.4
    assert chosen(choose_by="auroc") == 0.8  # .80 < .81 - .01 / sqrt(5)
    assert chosen(folds=100) == 0.4  # .52 > .50 + .1 / 10


def test_the_penalty_is_chosen_without_the_question_that_is_scored() -> None:
    """Scores of a fold, computed by hand from the other folds alone."""
    matrix, labels, _, groups = contributions()
    prepared = design(matrix, 0.02)
    config = ProbeConfig(inverse_penalty=None, folds=3, path_steps=4)
    scores = cross_fit(prepared.matrix, labels, groups, config)
    flipped = labels.copy()
    first = groups == 7
    flipped[first] = 1 - flipped[first]
    from sklearn.model_selection import StratifiedGroupKFold

    folds = list(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(labels, labels, groups))
    seen, unseen = next((seen, unseen) for seen, unseen in folds if 7 in groups[unseen])
    part = prepared.matrix[seen]
    path = regularisation_path(part, labels[seen], groups[seen], config)
    model = fit_l1(part, labels[seen], chosen_penalty(path, config), 0)
    np.testing.assert_array_equal(scores[unseen], model.predict_proba(prepared.matrix[unseen])[:, 1])


# stability selection


def test_the_false_discovery_bound_by_hand() -> None:
    assert expected_false_discoveries(50.0, 5000, 0.75) == pytest.approx(2500 / (0.5 * 5000))
    assert selection_limit(1.0, 5000, 0.75) == 50
    assert selection_limit(1.0, 4999, 0.75) == 49
    assert selection_limit(1e-9, 10, 0.6) == 1


def test_frequencies_count_the_halves_that_selected_a_neuron() -> None:
    """One perfect neuron among noise: every half finds it, and a limit of one selects nothing else."""
    matrix, labels, _, groups = contributions()
    perfect = sparse.hstack([sparse.csr_array(labels[:, None].astype(float)), design(matrix, 0.02).matrix]).tocsr()
    options: dict[str, Any] = {"inverse_penalty": 1.0, "pairs": 10, "threshold": 0.75, "seed": 0}
    alone = stability_selection(perfect, labels, groups, limit=1, **options)
    assert alone.frequency[0] == 1.0 and alone.frequency[1:].sum() == 0.0
    assert alone.selected_per_half == 1.0 and alone.stable.tolist() == [True] + [False] * (len(alone.frequency) - 1)
    assert alone.expected_false == pytest.approx(1 / (0.5 * len(alone.frequency)))
    several = stability_selection(perfect, labels, groups, limit=5, **options)
    assert several.frequency.sum() == pytest.approx(several.selected_per_half) and several.selected_per_half <= 5
    assert np.array_equal(several.frequency * 20, np.round(several.frequency * 20))


def test_a_neuron_of_one_question_is_in_half_of_the_halves_at_most() -> None:
    """Its rollouts stay together: it can be selected in one half of each pair only, however well it predicts."""
    _, labels, _, groups = contributions()
    own = sparse.csr_array((groups[:, None] == np.arange(60)).astype(float))
    found = stability_selection(own, labels, groups, limit=60, inverse_penalty=100.0, pairs=10, threshold=0.75, seed=0)
    assert found.frequency.tolist() == [0.5] * 60


def test_halves_hold_equally_many_questions_of_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    from neurosig.hallucination import stability

    matrix, labels, _, groups = contributions(n=31)
    seen: list[tuple[int, int]] = []

    def spy(rows: sparse.csr_array, known: Any, inverse_penalty: float, seed: int) -> LogisticRegression:
        seen.append((int((known == 0).sum()), int((known == 1).sum())))
        return fit_l1(rows, known, inverse_penalty, seed)

    monkeypatch.setattr(stability, "fit_l1", spy)
    stability_selection(
        design(matrix, 0.02).matrix, labels, groups, limit=5, inverse_penalty=1.0, pairs=3, threshold=0.75, seed=0
    )
    assert seen == [(8 * 4, 7 * 4)] * 6  # 16 and 15 questions: one of the 15 sits out


# HallucinationProbe


@pytest.fixture(scope="module")
def fitted() -> FittedProbe:
    matrix, labels, owners, _ = contributions()
    return HallucinationProbe(ProbeConfig(inverse_penalty=None, pairs=15)).fit(matrix, labels, owners, d_mlp=D_MLP)


def test_the_table_names_the_neurons_by_layer_and_index(fitted: FittedProbe) -> None:
    matrix, labels, _, _ = contributions()
    stable = fitted.neurons[fitted.neurons["stable"]]
    assert set(zip(stable["layer"], stable["index"], strict=True)) == {(0, 3), (1, 7), (2, 11)}
    sign = dict(zip(stable["layer"], np.sign(stable["weight"]), strict=True))
    assert sign == {0: 1, 1: 1, 2: -1}
    assert (fitted.neurons["weight"] != 0).sum() == len(fitted.columns)
    assert (fitted.neurons["layer"] * D_MLP + fitted.neurons["index"] != 299).all()
    for row in fitted.neurons.itertuples():
        alone = matrix[:, [row.layer * D_MLP + row.index]].toarray().ravel()
        assert row.auroc_alone == pytest.approx(roc_auc_score(labels, alone))
        assert row.active_share == pytest.approx((alone != 0).mean())
    assert fitted.neurons["selection_frequency"].is_monotonic_decreasing
    assert fitted.stability.expected_false <= 1.0


def test_scores_are_cross_fitted_and_the_same_as_fit_probe_gives(fitted: FittedProbe) -> None:
    matrix, labels, owners, _ = contributions()
    assert fitted.auroc == roc_auc_score(labels, fitted.scores) > 0.9
    fixed = dataclasses.replace(fitted.config, inverse_penalty=0.3)
    result = fit_probe(matrix, labels, owners, fixed)
    probe = HallucinationProbe(dataclasses.replace(fixed, pairs=1)).fit(matrix, labels, owners)
    np.testing.assert_array_equal(probe.scores, result.scores)
    assert sorted(result.neurons) == probe.columns.tolist()
    assert probe.inverse_penalty == 0.3 and probe.d_mlp == N_NEURONS


def test_scoring_is_sklearns_probability(fitted: FittedProbe) -> None:
    matrix, labels, _, _ = contributions()
    prepared = design(matrix, fitted.config.min_active_share)
    model = fit_l1(prepared.matrix, labels, fitted.inverse_penalty, 0)
    np.testing.assert_allclose(fitted.score(matrix), model.predict_proba(prepared.matrix)[:, 1], rtol=1e-12)
    with pytest.raises(UserError, match="contributions of 4 neurons, fitted on 300"):
        fitted.score(sparse.csr_array((2, 4)))


def test_a_saved_probe_scores_identically(fitted: FittedProbe, tmp_path: Path) -> None:
    fresh, _, _, _ = contributions(seed=1)
    fitted.save(tmp_path / "probe.safetensors")
    loaded = FittedProbe.load(tmp_path / "probe.safetensors")
    np.testing.assert_array_equal(loaded.score(fresh), fitted.score(fresh))
    pd.testing.assert_frame_equal(loaded.neurons, fitted.neurons)
    pd.testing.assert_frame_equal(loaded.path, fitted.path)
    assert loaded.config == fitted.config and loaded.auroc == fitted.auroc
    assert loaded.stability.expected_false == fitted.stability.expected_false
    np.testing.assert_array_equal(loaded.stability.frequency, fitted.stability.frequency)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "probe.safetensors").read_bytes()


def test_what_is_no_saved_probe_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no such file"):
        FittedProbe.load(tmp_path / "absent")
    (tmp_path / "text").write_text("not a tensor")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="not a saved probe"):
            FittedProbe.load(tmp_path / name)


def test_the_table_survives_csv(fitted: FittedProbe, tmp_path: Path) -> None:
    write_neurons(tmp_path / "neurons.csv", fitted.neurons)
    pd.testing.assert_frame_equal(read_neurons(tmp_path / "neurons.csv"), fitted.neurons, rtol=1e-14)
    for text in ("layer,weight\n1,2\n", "layer,index,weight\n1,x,2\n", ""):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match="expected the columns layer, index and weight"):
            read_neurons(tmp_path / "bad.csv")


def test_too_few_questions_or_neurons_are_refused() -> None:
    matrix, labels, owners, _ = contributions(n=18)
    with pytest.raises(UserError, match="of 18 questions, the rollouts of 9 agree and of 9 split; at least 10 of each"):
        HallucinationProbe().fit(matrix, labels, owners)
    with pytest.raises(UserError, match="no neuron is active in enough rollouts"):
        HallucinationProbe(ProbeConfig(min_active_share=1.0)).fit(matrix[:, 20:100], labels, owners)


def test_options_out_of_range_are_named() -> None:
    for name, value in (
        ("min_active_share", 1.1),
        ("path_steps", 1),
        ("path_span", 1.0),
        ("pairs", 0),
        ("stable_frequency", 0.5),
        ("max_false", 0.0),
    ):
        with pytest.raises(UserError, match=f"probe-{name.replace('_', '-')}: expected"):
            ProbeConfig(**{name: value})  # type: ignore[arg-type]


# controls


def test_random_neurons_know_nothing_and_the_located_ones_are_left_out(fitted: FittedProbe) -> None:
    matrix, labels, owners, _ = contributions()
    located = np.array([3, 107, 211])
    config = ProbeConfig(inverse_penalty=None, path_steps=4)
    control = random_neuron_auroc(matrix, labels, owners, 20, config, exclude=located, draws=4)
    assert control.low <= control.auroc <= control.high and len(control.draws) == 4
    assert 0.3 < control.auroc < 0.65 < 0.9 < fitted.auroc
    others = np.setdiff1d(np.arange(N_NEURONS), located)
    only = random_neuron_auroc(matrix, labels, owners, 3, config, exclude=others, draws=2)
    assert only.draws.min() > 0.9  # the three that carry the label are all there is to draw
    again = random_neuron_auroc(matrix, labels, owners, 20, config, exclude=located, draws=4)
    np.testing.assert_array_equal(again.draws, control.draws)
    with pytest.raises(UserError, match="random neurons: 4 of 3 to draw from"):
        random_neuron_auroc(matrix, labels, owners, 4, config, exclude=others)
