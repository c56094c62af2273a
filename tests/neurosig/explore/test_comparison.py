"""`neurosig.compare`: nothing in a run with itself, a planted change first, uniform p without one, what is refused."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy import sparse, stats

import neurosig
from neurosig.explore.comparison import sign_flip_p
from neurosig.explore.traces import Traces
from neurosig.models.load import LoadedModel, load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.sites import ffn_sites, w_out
from neurosig.runtime.errors import UserError
from tests.support.tiny import D_MLP, tiny_model, tiny_tokenizer

matplotlib.use("Agg")
TEXTS: list[Any] = [
    (f"Is {word} red?", f" No, {word} is blue.")
    for word in ("snow", "coal", "milk", "rust", "moss", "sand", "jade", "ruby")
]


def loaded() -> LoadedModel:
    return load_model((tiny_model("llama"), tiny_tokenizer()))


def deeper() -> LoadedModel:
    """The same architecture with one layer more."""
    model = tiny_model("llama")
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": model.config.num_hidden_layers + 1})
    return load_model((type(model)(config), tiny_tokenizer()))


@pytest.fixture(scope="module")
def base() -> Traces:
    return neurosig.trace(loaded(), TEXTS, progress=False)


def test_a_run_compared_with_itself_changes_nothing(base: Traces) -> None:
    found = neurosig.compare(base, base, permutations=99)
    table = found.to_frame()
    assert len(table) and (table["change"] == 0).all() and (table["p"] == 1).all() and (table["q"] == 1).all()
    assert found.to_frame(alpha=0.05).empty and (found.jaccard == 1).all()
    assert found.by_layer()["changed"].sum() == 0 and "0 of" in repr(found)


def test_a_planted_change_of_one_column_is_first(base: Traces) -> None:
    model = loaded()
    sites = ffn_sites(model.model)
    layer, ids = sites.n_layers - 1, base.sets.neuron_ids
    inside = ids[0][ids[0] // D_MLP == layer]
    neuron = int(inside[0]) % D_MLP
    with torch.no_grad():
        w_out(model.model, sites.layers[layer])[neuron] *= 8
    found = neurosig.compare(base, neurosig.trace(model, TEXTS, progress=False))
    first = found.to_frame().iloc[0]
    assert (first["layer"], first["neuron"]) == (layer, neuron) and first["q"] <= 0.05 and first["change"] > 0
    assert first["change"] == pytest.approx(first["after"] - first["before"])
    layers = found.by_layer()
    assert layers["changed"].iloc[:-1].sum() == 0 and layers["largest"].iloc[-1] == neuron
    assert found.plot().get_xlabel() == "layer"
    shown = found._repr_html_()
    assert "<style" not in shown and "<script" not in shown and "class=" not in shown


def test_p_is_uniform_without_a_change_and_q_guards_all_neurons() -> None:
    rng = np.random.default_rng(0)
    everyone = np.arange(24)
    p, q = zip(
        *(sign_flip_p(sparse.csr_array(rng.normal(size=(24, 40))), everyone, 399, s) for s in range(40)), strict=True
    )
    assert stats.kstest(np.concatenate([one[:1] for one in p]), "uniform").pvalue > 0.01
    assert np.mean(np.concatenate(p) <= 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean([one.min() <= 0.05 for one in q]) <= 0.15
    shifted = rng.normal(size=(24, 40))
    shifted[:, 7] += 2.0
    p_one, q_one = sign_flip_p(sparse.csr_array(shifted), everyone, 399, 0)
    assert q_one.argmin() == 7 and q_one[7] <= 0.01 and (q_one >= p_one).all()


def test_texts_of_a_group_flip_together() -> None:
    """Copies of a text are no further evidence."""
    differences = np.abs(np.random.default_rng(0).normal(size=(4, 3)))
    copied = sparse.csr_array(np.repeat(differences, 5, axis=0))
    p, _ = sign_flip_p(copied, np.repeat(np.arange(4), 5), 999, 0)
    assert (p >= 0.1).all()
    assert (sign_flip_p(copied, np.arange(20), 999, 0)[0] < 0.01).all()


def test_what_cannot_be_paired_is_refused(base: Traces) -> None:
    model = base.model
    for other, message in (
        (base[:3], "before has 8 texts, after 3"),
        (base[[1, 0, 2, 3, 4, 5, 6, 7]], "text 0 is 'Is snow red"),
        (neurosig.trace(model, TEXTS, positions="prompt", progress=False), "read at other tokens"),
        (
            neurosig.trace(model, TEXTS, config=TraceConfig(score="magnitude"), progress=False),
            "score is cett before and magnitude",
        ),
        (neurosig.trace(deeper(), TEXTS, progress=False), "compare models of the same layout"),
    ):
        with pytest.raises(UserError, match=message):
            neurosig.compare(base, other)
    with pytest.raises(UserError, match="one text has no null"):
        neurosig.compare(base[:1], base[:1])
