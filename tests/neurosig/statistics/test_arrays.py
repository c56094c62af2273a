"""Labels and scores in every form that people hold them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.lasso import entry_penalty, fit_l1
from neurosig.hallucination.locate import HallucinationProbe, stable_neurons
from neurosig.hallucination.probe import agreement_labels, contribution_matrix, fit_probe, too_few
from neurosig.patterns.clusters import purity
from neurosig.statistics.auroc import AnalysisConfig, auroc_interval, rarest_class, spearman_interval
from neurosig.statistics.metrics import avg_at_k, brier, ece, maj_at_k, paired_mean_interval, pass_at_k, signed_gap

N, K = 24, 2
RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(N) % 2, K)
OWNERS = np.repeat(np.arange(N), K)
IDS = np.stack([RNG.choice(40, 6, replace=False) for _ in range(N * K)])
VALUES = RNG.random((N * K, 6)) + LABELS[:, None]
MATRIX = contribution_matrix(IDS, VALUES, 40)
CONFIG = ProbeConfig(folds=2, pairs=2)
QUESTIONS = [f"q{owner}" for owner in OWNERS]

FORMS: dict[str, Callable[[Any], Any]] = {
    "list": lambda array: array.tolist(),
    "tuple": lambda array: tuple(array.tolist()),
    "bool array": lambda array: array.astype(bool) if set(np.unique(array)) <= {0, 1} else array,
    "list of bool": lambda array: array.astype(bool).tolist() if set(np.unique(array)) <= {0, 1} else array.tolist(),
    "torch tensor": lambda array: torch.tensor(array),
    "torch int8": lambda array: torch.tensor(array).to(torch.int8) if array.dtype.kind in "bi" else torch.tensor(array),
    "numpy int16": lambda array: array.astype(np.int16) if array.dtype.kind in "bi" else array,
    "whole floats": lambda array: array.astype(np.float64),
    "list of numpy int": lambda array: list(array),
    "pandas": lambda array: pd.Series(array),
}
VOTES, RIGHT = np.array([4, 3, 2, 1]), np.array([1, 1, 0, 0])
SCORES = np.array([0.9, 0.4, 0.6, 0.1])
CALLS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "auroc_interval": lambda form: auroc_interval(form(SCORES), form(RIGHT), form(np.arange(4)), AnalysisConfig()),
    "spearman_interval": lambda form: spearman_interval(
        form(SCORES), form(VOTES), form(np.arange(4)), AnalysisConfig()
    ),
    "rarest_class": lambda form: rarest_class(form(RIGHT), form(np.arange(4))),
    "ece": lambda form: ece(form(VOTES), 4, form(RIGHT)),
    "brier": lambda form: brier(form(VOTES), 4, form(RIGHT)),
    "signed_gap": lambda form: signed_gap(form(VOTES), 4, form(RIGHT)),
    "maj_at_k": lambda form: maj_at_k(form(RIGHT), form(np.ones(4, int))).tolist(),
    "pass_at_k": lambda form: pass_at_k(4, form(VOTES), 2).tolist(),
    "paired_mean_interval": lambda form: paired_mean_interval(form(SCORES), form(RIGHT), seed=0),
    "agreement_labels": lambda form: agreement_labels(form(SCORES), CONFIG).tolist(),
    "fit_probe": lambda form: fit_probe(MATRIX, form(LABELS), QUESTIONS, CONFIG).scores.tolist(),
    "too_few": lambda form: too_few(form(LABELS), form(OWNERS), ProbeConfig(folds=99)),
    "fit_l1": lambda form: fit_l1(MATRIX, form(LABELS), 1.0, 0).coef_.tolist(),
    "entry_penalty": lambda form: entry_penalty(MATRIX, form(LABELS)),
    "stable_neurons": lambda form: stable_neurons(MATRIX, form(LABELS), form(OWNERS), CONFIG).frequency.tolist(),
    "HallucinationProbe": lambda form: HallucinationProbe(CONFIG).fit(MATRIX, form(LABELS), QUESTIONS).neurons.to_csv(),
    "purity": lambda form: purity(form(LABELS), form(LABELS[::-1].copy())),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_form_of_the_same_numbers_gives_the_same(call: str, form: str) -> None:
    assert CALLS[call](FORMS[form]) == CALLS[call](np.asarray)


def test_correctness_of_several_samples_is_taken_as_rows() -> None:
    table = [[True, False], [1, 1], [0, 0]]
    for given in (table, np.array(table), torch.tensor([[1, 0], [1, 1], [0, 0]])):
        assert avg_at_k(given).tolist() == [0.5, 1.0, 0.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ([0, 1, 2, 1], "right: expected True and False, or 1 and 0, got 2"),
        ([0, 1, -1, 1], "right: expected True and False, or 1 and 0, got -1"),
        ([0.5, 1.0, 0.0, 1.0], "right: expected True and False, or 1 and 0, got 0.5"),
        (["yes", "no", "no", "no"], "right: expected True and False, or 1 and 0, got str"),
        ([None, True, False, True], "right: expected True and False, or 1 and 0, got object values such as None"),
        ([float("nan"), 1.0, 0.0, 1.0], "right: expected True and False, or 1 and 0, got nan"),
    ],
)
def test_what_is_no_label_is_named(right: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc_interval(SCORES, right, np.arange(4), AnalysisConfig())
    with pytest.raises(ValueError, match=r"votes: expected whole numbers, got 1\.5"):
        ece([1.5, 2.0], 4, [0, 1])  # type: ignore[arg-type]
