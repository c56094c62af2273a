"""What the probe learns and what it reads of a neuron: labels and values by hand, and the same in export and report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from neurosig.exported import Exported
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.probe import contribution_matrix, fit_probe, probe_matrix, rollout_labels
from neurosig.report.refits import Refits
from tests.support.exports import write_lines
from tests.support.flow import make_manifest, save_tiny

ANSWERS = [
    ["a", "a", "a", "b"],  # a clear majority and one outside it
    ["a", "a", "a", "a"],  # nothing outside
    ["a", "a", "b", "b"],  # a tie
    ["a", "a", None, "b"],  # half of all answers
    ["a", "b", "c", "d"],
    [None, None, None, None],
]
WINNERS = ["a", "a", "a", "a", "b", None]


def test_contrast_labels_rollouts_within_a_question() -> None:
    labels = rollout_labels(ANSWERS, WINNERS, ProbeConfig(labels="contrast")).reshape(6, 4).tolist()
    assert labels == [[0, 0, 0, 1], [-1] * 4, [-1] * 4, [0, 0, -1, 1], [-1] * 4, [-1] * 4]
    higher = rollout_labels(ANSWERS, WINNERS, ProbeConfig(labels="contrast", split_share=0.6)).reshape(6, 4)
    assert higher[0].tolist() == [0, 0, 0, 1] and (higher[3] == -1).all()


def test_agreement_labels_whole_questions() -> None:
    labels = rollout_labels(ANSWERS, WINNERS, ProbeConfig()).reshape(6, 4)
    assert labels.tolist() == [[0] * 4, [0] * 4, [-1] * 4, [-1] * 4, [1] * 4, [1] * 4]
    for one in ("agreement", "contrast"):  # one rollout always agrees with itself
        assert rollout_labels([["a"]], ["a"], ProbeConfig(labels=one)).tolist() == [-1]  # type: ignore[arg-type]


def test_layer_z_is_in_standard_deviations_of_the_layer() -> None:
    """Two layers of four neurons; in the second rollout the first layer is ten times as loud."""
    ids = np.array([[0, 2, 5, -1], [0, 2, 5, 6]])
    values = np.array([[1.0, 3.0, -2.0, 7.0], [10.0, 30.0, 1.0, 1.0]])
    matrix = probe_matrix(ids, values, 2, 8, ProbeConfig(values="layer_z")).toarray()
    first = np.array([1, 0, 3, 0]) / np.std([1, 0, 3, 0])
    np.testing.assert_allclose(matrix[:, :4], [first, first])
    np.testing.assert_allclose(matrix[0, 4:], np.array([0, -2, 0, 0]) / np.std([0, -2, 0, 0]))
    np.testing.assert_allclose(matrix[1, 4:], np.array([0, 1, 1, 0]) / np.std([0, 1, 1, 0]))
    plain = probe_matrix(ids, values, 2, 8, ProbeConfig()).toarray()
    assert np.array_equal(plain, contribution_matrix(ids, values, 8).toarray())


def test_too_few_questions_to_contrast_are_named(caplog: pytest.LogCaptureFixture) -> None:
    config = ProbeConfig(labels="contrast")
    labels = rollout_labels(ANSWERS, WINNERS, config)
    matrix = contribution_matrix(np.arange(24)[:, None] % 5, np.ones((24, 1)), 5)
    result = fit_probe(matrix, labels, [f"q{row // 4}" for row in range(24)], config)
    assert not result.informative
    assert "of 6 questions, 2 have a clear majority and rollouts outside it; at least 5 are needed" in caplog.text


def test_export_and_report_fit_the_same_probe(tmp_path: Path) -> None:
    """Rollouts outside the majority have words of their own, so that the contrast can be learned."""
    save_tiny(tmp_path / "model")
    questions = [{"id": f"q{index:02d}", "question": f"Is number {index} nice?"} for index in range(24)]
    write_lines(tmp_path / "questions.jsonl", questions)
    texts = ["The answer is yes.", "The answer is yes.", "The answer is yes. Sure!", "Hm, hm: the answer is nay."]
    lines = [{"question_id": question["id"], "text": text} for question in questions for text in texts]
    given = {"rollouts": write_lines(tmp_path / "rollouts.jsonl", lines)}
    own = Exported(make_manifest(tmp_path, **given, probe_labels="contrast", probe_values="layer_z"))
    options = json.loads((tmp_path / "manifest" / "manifest.json").read_text())["options"]
    assert (options["probe_labels"], options["probe_values"]) == ("contrast", "layer_z")
    scores = own.signals.probe_scores.unflatten(0, (24, 4))
    assert (scores[:, 3] > scores[:, :3].max(dim=1).values).all()
    refits = Refits(own)
    assert refits.labels.reshape(24, 4).tolist() == [[0, 0, 0, 1]] * 24
    config = refits.config
    assert (config.labels, config.values) == ("contrast", "layer_z")
    signals = own.signals
    matrix = probe_matrix(
        signals.neuron_ids.numpy(), signals.contributions.float().numpy(), signals.n_layers, signals.n_neurons, config
    )
    names = [name for name, _ in own.place]
    again = fit_probe(matrix, refits.labels, names, config)
    np.testing.assert_allclose(again.scores, signals.probe_scores.numpy(), atol=1e-3)
