"""`neurosig.Probe`: planted neurons, labels of any type, groups, calibration, transfer, what is saved and refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

import neurosig
from neurosig import Probe, load_probe
from neurosig.explore.traces import Traces
from neurosig.hallucination.planted import PlantedConfig, PlantedData, plant
from neurosig.models.load import LoadedModel, load_model
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from tests.support.tiny import Arch, tiny_model, tiny_tokenizer

matplotlib.use("Agg")
QUICK: dict[str, Any] = {"inverse_penalty": 1.0, "permutations": 0, "pairs": 3}


def planted(seed: int = 0, **options: Any) -> PlantedData:
    size: dict[str, Any] = {"n_layers": 6, "d_mlp": 80, "set_size": 120, "n_planted": 6, "num_generations": 1}
    return plant(PlantedConfig(**size | {"seed": seed} | options))


@pytest.fixture(scope="module")
def data() -> PlantedData:
    return planted(effect=2.0)


@pytest.fixture(scope="module")
def probe(data: PlantedData) -> Probe:
    return Probe(inverse_penalty=1.0, permutations=19, pairs=20).fit(data.contributions(), data.labels)


def loaded(arch: Arch = "llama", seed: int = 0) -> LoadedModel:
    return load_model((tiny_model(arch, seed), tiny_tokenizer()))


WORDS = [f"{first}{second}" for first in "abcde" for second in "klmno"]
TEXTS = [f"I like {word}" for word in WORDS] + [f"we saw {word} 99" for word in WORDS]
LABELS = [True] * len(WORDS) + [False] * len(WORDS)


@pytest.fixture(scope="module")
def run() -> Traces:
    return neurosig.trace(loaded(), TEXTS, progress=False)


def test_it_finds_planted_neurons(probe: Probe, data: PlantedData) -> None:
    ids = probe.neurons["neuron"].to_numpy()  # a matrix is one layer
    assert set(ids[probe.neurons["stable"]]) <= set(data.planted) and probe.neurons["stable"].sum() >= 4
    assert probe.auroc > 0.9 and probe.auroc == probe.auroc_ and probe.p_ == pytest.approx(1 / 20)
    assert 0.9 < probe.auroc_interval_.low <= probe.auroc <= probe.auroc_interval_.high
    assert probe.permute_ == "between" and "permuted between groups" in repr(probe)
    assert probe.plot_path().get_ylabel() == "held-out AUROC"


def test_labels_without_meaning_have_no_small_p() -> None:
    data = planted()
    labels = np.random.default_rng(1).integers(2, size=len(data.labels))
    probe = Probe(inverse_penalty=1.0, permutations=19, pairs=5).fit(data.contributions(), labels)
    assert probe.p_ is not None and probe.p_ > 0.05 and 0.35 < probe.auroc < 0.65


def test_probabilities_match_rates() -> None:
    """On new texts, of which few are positive; a balanced fit's own probabilities would be far above the rate."""
    for method in ("sigmoid", "isotonic"):
        data = planted(effect=0.7, n_questions=1000, guessed_share=0.2, n_layers=6, d_mlp=40, set_size=60)
        matrix = data.contributions()
        probe = Probe(**{**QUICK, "calibration": method, "inverse_penalty": 0.3}).fit(matrix[:600], data.labels[:600])
        chances, labels = probe.score(matrix[600:]), data.labels[600:]
        assert chances.mean() == pytest.approx(labels.mean(), abs=0.04)
        for rows in np.array_split(np.argsort(chances), 2):
            assert chances[rows].mean() == pytest.approx(labels[rows].mean(), abs=0.1)
        assert (probe.predict_proba(matrix).sum(axis=1) == pytest.approx(1)) and np.ptp(chances) > 0.3


@pytest.mark.parametrize("kind", ["l1", "dense"])
def test_labels_of_any_type_give_the_same_probe(kind: str, data: PlantedData) -> None:
    matrix, bits = data.contributions()[:60], data.labels[:60]
    columns: list[tuple[Any, Any]] = [
        (bits.tolist(), 1),
        (bits == 1, True),
        (torch.tensor(bits), 1),
        (pd.Series(np.where(bits == 1, "wrong", "right"), index=range(900, 900 + len(bits))), "wrong"),
        (pd.array(bits, dtype="Int64"), 1),
        (bits.astype(np.float32), 1.0),
    ]
    columns = columns if kind == "l1" else columns[2:4]
    fitted = [Probe(kind=kind, **QUICK).fit(matrix, column) for column, _ in columns]  # type: ignore[arg-type]
    for one, (_, positive) in zip(fitted, columns, strict=True):
        assert one.classes_[1] == positive and (one.scores_ == fitted[0].scores_).all()
        assert one.predict(matrix)[0] in one.classes_
    turned = Probe(positive="right", **QUICK).fit(matrix, columns[1 if kind == "dense" else 3][0])
    assert turned.classes_.tolist() == ["wrong", "right"] and "right (positive" in repr(turned)


def test_unlabelled_texts_are_scored_but_not_fitted(data: PlantedData) -> None:
    matrix, some = data.contributions(), [*data.labels[:150].tolist(), None, np.nan, *[pd.NA] * 48]
    probe = Probe(**QUICK).fit(matrix, some)
    assert (probe.labels_ == -1).sum() == 50 and len(probe.scores_) == 200
    assert probe.score(matrix, some) == probe.score(matrix[:150], some[:150])


def test_it_is_an_estimator(probe: Probe, data: PlantedData) -> None:
    again = clone(probe.set_params(seed=0))
    assert again.get_params() == probe.get_params() and not hasattr(again, "classes_")
    assert "not fitted" in repr(again) and "not fitted" in again._repr_html_()
    scores = cross_val_score(Probe(**QUICK), data.contributions(), data.labels, cv=2)
    assert scores.mean() > 0.85


def test_folds_never_split_a_group_and_permutations_stay_within() -> None:
    """A neuron that marks the kind predicts the label between kinds, and nothing within one."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(["a", "b", "c", "d"], 50)
    labels = rng.random(200) < np.where(np.isin(kinds, ["a", "b"]), 0.85, 0.15)
    marks = np.stack([(kinds == kind) * (1 + 0.05 * rng.random(200)) for kind in "abcd"], axis=1)
    matrix = sparse.csr_array(np.concatenate([marks, rng.random((200, 30))], axis=1))
    free = Probe(inverse_penalty=1.0, permutations=19, pairs=5).fit(matrix, labels)
    by_kind = Probe(inverse_penalty=1.0, permutations=19, pairs=5).fit(matrix, labels, groups=pd.Series(kinds))
    assert free.auroc > 0.75 > 0.6 > by_kind.auroc
    assert free.p_ == pytest.approx(0.05) and by_kind.permute_ == "within" and "groups" in by_kind.neurons
    assert by_kind.p_ is not None and by_kind.p_ > 0.05


def test_other_tokens_are_negatives_of_the_fit_alone(run: Traces) -> None:
    """Three against one: a neuron that only marks answers gets no weight from the labels of answers."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    answers, others = rng.random((2, 200, 20)) * 0.2
    answers[:, 0] += labels
    others[:, 0] += labels  # not about the answer: wrong texts have it at every token
    answers[:, 1] += labels
    plain = Probe(**QUICK).fit(answers, labels)
    three = Probe(**QUICK).fit(answers, labels, others=others)
    weight = [one.neurons.set_index("neuron")["weight"].reindex([0, 1]).fillna(0) for one in (plain, three)]
    assert weight[1][0] < 0.5 * weight[1][1] and weight[0][0] > 0.8 * weight[0][1] and len(three.scores_) == 200
    with pytest.raises(UserError, match="others: text 0 is another one"):
        Probe(**QUICK).fit(run, LABELS, others=run[list(range(len(run)))[::-1]])


def test_save_load_and_transfer(run: Traces, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["x" if i % 2 else "y" for i in range(len(run))]
    probe = Probe(**QUICK).fit(run, LABELS, groups=kinds)
    folder = probe.save(tmp_path / "probe")
    again = load_probe(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["probe.json", "probe.safetensors"]
    assert (again.score(run) == probe.score(run)).all() and repr(again) == repr(probe)
    pd.testing.assert_frame_equal(again.neurons, probe.neurons)
    assert not caplog.records

    other = neurosig.trace(loaded(seed=1), TEXTS, progress=False)
    with caplog.at_level(logging.WARNING):
        assert again.score(other).shape == (len(run),)
    assert caplog.text.count("it was fitted on live (weights") == 1 and "and scores live (weights" in caplog.text
    with pytest.raises(UserError, match=r"the run has 3 layers of 32, the probe was fitted on \d+ layers? of 64"):
        again.score(np.zeros((4, 3, 32)))

    record = json.loads((folder / "probe.json").read_text())
    arrays = (folder / "probe.safetensors").read_bytes()
    for name, content in (
        ("probe.json", "{"),
        ("probe.json", "[1]"),
        ("probe.json", json.dumps({**record, "format": "other"})),
        ("probe.json", json.dumps({**record, "params": {"colour": 1}})),
        ("probe.json", json.dumps({**record, "classes": None, "signs": {"groups": [1]}, "layout": []})),
        ("probe.safetensors", arrays[:-4].decode("latin1")),
        ("probe.safetensors", (arrays[:-1] + bytes([arrays[-1] ^ 1])).decode("latin1")),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged, dirs_exist_ok=True)
        (damaged / name).write_bytes(content.encode("latin1"))
        with pytest.raises(UserError, match="probe"):
            load_probe(damaged)
    with pytest.raises(UserError, match=r"no probe\.json"):
        load_probe(tmp_path)


def test_causal_check_finds_the_neurons_that_matter(run: Traces) -> None:
    probe = Probe(**QUICK).fit(run, LABELS)
    table = probe.causal_check(run[:4], factors=(0.0, 5.0), draws=1, progress=False)
    assert table.groupby("group").size().to_dict() == dict.fromkeys(["located", "layer", "activity", "strongest"], 2)
    assert ((table["change_low"] <= table["change"]) & (table["change"] <= table["change_high"])).all()
    assert table.query("group == 'located'")["change"].abs().min() > 0 and (table["texts"] == 4).all()
    same = probe.causal_check(run[:4], factors=(1.0 + 1e-12,), draws=1, progress=False)
    assert same["change"].abs().max() < 1e-5
    with pytest.raises(UserError, match="give a run"):
        Probe(**QUICK).fit(np.eye(50)[:, :5] + np.arange(50)[:, None], [0, 1] * 25).causal_check()


def test_labels_without_annotation_come_from_the_rollouts_agreement() -> None:
    prompts = [Prompt(f"q{i}", (*b"where is it", i)) for i in range(24)]
    given = []
    for i, prompt in enumerate(prompts):
        answers = ["red", "red", "red", "red"] if i % 2 else ["red", "blue", "green", "pink"]
        for k, answer in enumerate(answers):
            ids = tuple(f"Answer: {answer}".encode())
            given.append((prompt, Rollout(prompt.question_id, k, f"Answer: {answer}", (*ids, 0), "stop")))
    run = neurosig.trace(loaded(), given, progress=False)
    probe = Probe(**QUICK).fit(run)
    assert probe.classes_.tolist() == ["agree", "split"]
    assert probe.labels_.tolist() == [int(i % 2 == 0) for i in range(24) for _ in range(4)]


def test_what_is_refused(data: PlantedData, run: Traces) -> None:
    matrix, labels = data.contributions(), data.labels.tolist()
    one_group = ["a"] * 200
    for options, given, groups, message in (
        ({}, labels[:-1], None, "labels: 199 for 200 texts"),
        ({}, [1] * 200, None, "all 200 are 1; give two different values"),
        ({}, [None] * 200, None, "no text is labelled"),
        ({}, [0, 1, 2, 2] * 50, None, "3 different values, 0, 1, 2"),
        ({}, ["a", 1] * 100, None, "different types"),
        ({}, [b"a", b"b"] * 100, None, "booleans, numbers or texts"),
        ({"positive": "b"}, labels, None, "positive='b': the labels are 0 and 1"),
        ({}, labels, one_group, "all 200 texts are in group 'a'"),
        ({}, labels, [None, *one_group[1:]], "groups: text 0 has none"),
        ({}, [1] * 199 + [0], None, "1 texts have the label 0 and 199 the label 1"),
        ({}, labels, np.where(data.labels == 1, "p", "q"), "1 groups have the label 0"),
        ({"kind": "l3"}, labels, None, "kind"),
        ({"folds": 1}, labels, None, "at least 2"),
        ({}, None, None, "without labels a probe learns from the agreement"),
    ):
        with pytest.raises(UserError, match=message):
            Probe(**QUICK).set_params(**options).fit(matrix, given, groups=groups)
    with pytest.raises(UserError, match="or a matrix"):
        Probe().fit("text", labels)
    with pytest.raises(UserError, match="text 1 has a contribution that is not finite"):
        Probe().fit([[1.0, 2.0], [np.nan, 1.0]], [0, 1])


def test_html_is_escaped_and_needs_no_stylesheet(data: PlantedData) -> None:
    names = np.where(data.labels == 1, "<script>x</script>", "no")
    shown = Probe(positive="<script>x</script>", **QUICK).fit(data.contributions(), names)._repr_mimebundle_()
    assert "<script" not in shown["text/html"] and "&lt;script&gt;" in shown["text/html"]
    assert "<style" not in shown["text/html"] and shown["text/plain"].startswith("Probe, l1")
