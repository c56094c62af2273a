"""A score that cannot tell the questions apart selects none of them by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurosig.export import main as export
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.locate import HallucinationProbe
from neurosig.hallucination.probe import contribution_matrix, fit_probe
from neurosig.hallucination.scores import SCORES, QuestionSignals, fitted_probe, question_scores
from neurosig.manifest import Manifest, read_manifest
from neurosig.questions.reader import Reading
from neurosig.questions.vote import Vote, majority_vote
from neurosig.report.__main__ import ReportConfig
from neurosig.report.__main__ import main as report
from neurosig.sampling.rollouts import Rollout
from neurosig.selection.choose import Candidate, score_cut, selection_reasons
from neurosig.selection.config import SelectionConfig
from tests.support.flow import export_config, save_tiny, write_questions


def candidate(name: str, score: float | None) -> Candidate:
    return Candidate(name, name, "k", Vote("x", 6, ("x",), 8), score, 0, 0, torch.arange(4), torch.ones(2), 10)


def selected(scores: dict[str, float | None], **options: Any) -> set[str]:
    candidates = [candidate(name, score) for name, score in scores.items()]
    reasons, _ = selection_reasons(candidates, SelectionConfig(**options))
    return {c.question_id for c, reason in zip(candidates, reasons, strict=True) if reason == "selected"}


NAMES = [f"q{index:02d}" for index in range(40)]


@pytest.mark.parametrize("score", [0.5, None, 0.0])
@pytest.mark.parametrize("question_filter", ["neuron", "neuron_only"])
def test_a_score_that_is_the_same_for_all_cuts_nothing(score: float | None, question_filter: Any) -> None:
    assert selected(dict.fromkeys(NAMES, score), question_filter=question_filter) == set(NAMES)
    note = score_cut([candidate(name, score) for name in NAMES], SelectionConfig(question_filter=question_filter))[1]
    assert "so its cut is skipped" in note


def test_rounding_noise_is_no_information() -> None:
    noisy = {name: 0.5 + 1e-9 * index for index, name in enumerate(NAMES)}
    assert selected(noisy) == set(NAMES)


def test_a_score_without_information_passes_every_threshold() -> None:
    assert selected(dict.fromkeys(NAMES, None), question_filter="threshold", max_score=0.1) == set(NAMES)
    assert selected(dict.fromkeys(NAMES, 0.5), question_filter="threshold", max_score=0.1) == set()


def test_equal_scores_at_the_cut_are_drawn_and_counted() -> None:
    """Ten low, twenty equal, ten high: half of the forty are kept. Neither names nor order decide which."""
    scores: dict[str, float | None] = {name: (index // 10 + 1) // 2 / 10 for index, name in enumerate(NAMES)}
    low, equal, high = set(NAMES[:10]), set(NAMES[10:30]), set(NAMES[30:])
    first = selected(scores)
    assert low < first and len(first & equal) == 10 and not first & high
    assert first & equal not in ({*NAMES[10:20]}, {*NAMES[20:30]})
    assert selected(dict(reversed(scores.items()))) == first != selected(scores, seed=1)
    assert score_cut([candidate(*item) for item in scores.items()], SelectionConfig())[1] == (
        "20 questions tie at the cut, score 0.1: 10 of them are selected, drawn by the seed"
    )
    whole = {name: float(index // 20) for index, name in enumerate(NAMES)}
    assert score_cut([candidate(*item) for item in whole.items()], SelectionConfig()) == (set(NAMES[20:]), "")


def exported(folder: Path, text: Any, k: int, n: int = 8, **options: Any) -> Manifest:
    """An export of n questions whose k rollouts read ``text(question, rollout)``."""
    lines = [{"question_id": f"q{q}", "text": text(q, r)} for q in range(n) for r in range(k)]
    folder.mkdir(exist_ok=True)
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, questions = save_tiny(folder / "model"), write_questions(folder / "questions.jsonl", n)
    options = {"question_filter": "neuron", "context_policy": "none", "rollouts": folder / "r.jsonl", **options}
    export(export_config(folder, model, questions, **options))
    return read_manifest(folder / "manifest")


@pytest.mark.parametrize(
    ("text", "k", "n", "options"),
    [
        (lambda q, r: f"Answer: {q}", 1, 8, {}),
        (lambda q, r: "Answer: 7" if q % 2 else "I do not know this", 1, 8, {"probe_folds": 2, "min_vote_share": 0.0}),
        (lambda q, r: "Answer: seven" if q or r else "Answer: six", 4, 2, {}),
        (lambda q, r: "Answer: seven", 4, 8, {}),
        (lambda q, r: "Answer: seven", 4, 8, {"hallucination_score": "agreement"}),
        (lambda q, r: "Answer: seven", 4, 8, {"hallucination_score": "vote_share"}),
        (lambda q, r: "Answer: seven", 4, 8, {"hallucination_score": "length"}),
        (lambda q, r: f"Answer: {q}", 1, 8, {"hallucination_score": "knn_medoid"}),
        (lambda q, r: "Answer: seven", 4, 8, {"question_filter": "threshold", "max_score": 0.1}),
    ],
    ids=["one rollout", "one rollout, some unparsed", "two questions", "all alike", *["constant"] * 4, "threshold"],
)  # fmt: skip
def test_an_export_without_information_skips_the_cut_and_says_so(
    tmp_path: Path, text: Any, k: int, n: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = exported(tmp_path, text, k, n, **options)
    counts = manifest.header.counts
    assert counts["selected"] == sum(row.pseudo_label is not None for row in manifest.rows)
    assert "score" not in counts
    note = manifest.header.notes[-1]
    assert "cut is skipped" in note and note in caplog.text
    report(ReportConfig(manifest=manifest.folder, out=tmp_path / "report", quiet=True, permutations=0, resamples=100))
    assert "cut is skipped" in (tmp_path / "report" / "report.html").read_text()


def test_ties_at_the_cut_are_on_record(tmp_path: Path) -> None:
    """Votes of 4 and of 2 to 1 to 1 of 4: six questions of share 1, six of share 1/2."""
    words = ("one", "one", "two", "six")
    manifest = exported(
        tmp_path, lambda q, r: "Answer: one" if q % 2 else f"Answer: {words[r]}", 4, 12,
        hallucination_score="vote_share", keep_fraction=0.75,
    )  # fmt: skip
    assert manifest.header.counts["selected"] == 9
    assert manifest.header.notes == [
        "vote_share: 6 questions tie at the cut, score 0.5: 3 of them are selected, drawn by the seed"
    ]
    informed = exported(
        tmp_path / "other", lambda q, r: "Answer: one" if q % 2 else f"Answer: {words[r]}", 4, 12,
        hallucination_score="vote_share",
    )  # fmt: skip
    assert informed.header.counts["selected"] == 6 and informed.header.notes == []
    assert "notes" not in json.loads((informed.folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("values", "active", "reason"),
    [
        (np.ones((40, 4)), 4, "every neuron contributes the same to all rollouts"),
        (np.ones((40, 4)), 0, "no neuron is active in enough rollouts"),
        (np.random.default_rng(0).random((40, 4)), 4, "no neuron tells the two apart at this penalty"),
    ],
    ids=["constant", "no neuron", "noise"],
)
def test_contributions_that_say_nothing_are_named(values: Any, active: int, reason: str) -> None:
    ids = np.where(np.arange(4) < active, np.arange(4), -1) + np.zeros((40, 1), int)
    matrix = contribution_matrix(ids, values, 10)
    labels, questions = np.repeat(np.arange(20) % 2, 2), [f"q{index // 2}" for index in range(40)]
    result = fit_probe(matrix, labels, questions, ProbeConfig(folds=2, inverse_penalty=1e-3))
    assert result.shortage == reason and not result.informative
    assert result.scores.tolist() == [0.5] * 40
    if "penalty" not in reason:
        for config in (ProbeConfig(folds=2, inverse_penalty=None), ProbeConfig(folds=2)):
            with pytest.raises(ValueError, match=reason):
                HallucinationProbe(config).fit(matrix, labels, questions)


def test_a_question_without_active_neurons_spoils_no_score() -> None:
    """Every score of every question is finite, or the score is absent."""

    def reading(name: str, k: int) -> Reading:
        answers = ("x",) * k
        return Reading(answers, answers, majority_vote(answers, name))

    def signals(name: str, ids: list[list[int]]) -> QuestionSignals:
        group = [Rollout(name, index, "x", (5, 6), "stop") for index in range(2)]
        tensor = torch.tensor(ids, dtype=torch.int32)
        return QuestionSignals(group, reading(name, 2), tensor, tensor.float(), torch.ones(2, 3))

    traced = {"a": signals("a", [[1, 2], [2, 3]]), "b": signals("b", [[-1, -1], [-1, -1]])}
    probe = fitted_probe(traced, n_neurons=10, probe=ProbeConfig())
    scores = question_scores(list(traced.values()), probe, list(SCORES))
    assert "neuron_count" in scores.by_name
    assert all(np.isfinite(values).all() for values in scores.by_name.values())
    ragged = {
        **traced,
        "c": QuestionSignals([traced["a"].rollouts[0]], reading("c", 1), *(torch.ones(1, 2).int(),) * 3),
    }
    with pytest.raises(ValueError, match='question "c" has 1 rollouts, the first has 2'):
        fitted_probe(ragged, n_neurons=10, probe=ProbeConfig())
