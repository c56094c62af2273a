from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.evaluate import EvaluateConfig, _row, _write, summarise
from distill.report import ReportConfig, main
from neurosig.errors import UserError
from neurosig.models import ModelInfo
from neurosig.questions import Question
from neurosig.rollouts import Rollout

INFO = ModelInfo("made-up", None, {"w": "0"}, "0", "0", None, "float32", "sdpa")


class Loaded:
    """Only what the run record reads."""

    info = INFO


def question(index: int, domain: str = "geography") -> Question:
    return Question(
        f"{domain}{index:03d}", domain, f"What is the capital of land {index}?", answer="Paris", aliases=("Lutetia",)
    )


def group(asked: Question, answers: list[str]) -> list[Rollout]:
    return [Rollout(asked.id, i, answer, (5, 2), "stop", -0.5, 1.0) for i, answer in enumerate(answers)]


def config(out: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(model="made-up", questions=("x",), out=out, num_generations=4, **changes)


def evaluation(out: Path, right_of: dict[str, list[int]], **changes: Any) -> Path:
    """An evaluation in which question i of a domain gets ``right_of[domain][i]`` right answers out of 4."""
    out.mkdir(parents=True)
    rows, groups = [], {}
    for domain, counts in right_of.items():
        for index, right in enumerate(counts):
            asked = question(index, domain)
            groups[asked.id] = group(asked, ["Paris."] * right + ["Rome."] * (4 - right))
            rows.append(_row(asked, groups[asked.id], config(out)))
    (out / ".rollouts.log").touch()
    _write(config(out, **changes), Loaded(), None, groups, rows, summarise(rows, seed=0))  # type: ignore[arg-type]
    return out


def test_a_row_counts_ties_aliases_and_what_cannot_be_parsed(tmp_path: Path) -> None:
    asked = question(0)
    row = _row(asked, group(asked, ["Paris.", "Lutetia.", "I'm sorry, I cannot.", "Rome."]), config(tmp_path))
    assert (row["votes"], row["winners"], row["right_winners"]) == (1, 3, 2)
    assert (row["n_correct"], row["unparsed"], row["distinct"], row["k"]) == (2, 1, 3, 4)
    silent = _row(asked, group(asked, [""] * 4), config(tmp_path))
    assert (silent["votes"], silent["winners"], silent["winner"], silent["unparsed"]) == (0, 0, None, 4)


def test_a_summary_by_hand(tmp_path: Path) -> None:
    """Votes 4, 3, 2 (a tie), 0 of 4; right 4, 1, 2, 0."""
    asked = [question(index) for index in range(4)]
    answers = [["Paris."] * 4, ["Rome."] * 3 + ["Paris."], ["Paris."] * 2 + ["Rome."] * 2, [""] * 4]
    rows = [_row(q, group(q, a), config(tmp_path)) for q, a in zip(asked, answers, strict=True)]
    (summary,) = summarise(rows, seed=0).values()
    assert summary["avg_at_k"]["estimate"] == pytest.approx((1 + 0.25 + 0.5 + 0) / 4)
    assert summary["maj_at_k"]["estimate"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert summary["pass_at_k"] == pytest.approx(3 / 4)
    assert summary["ece"]["estimate"] == pytest.approx((0 + 0.75 + 0 + 0) / 4)
    assert summary["mean_confidence"] == pytest.approx((1 + 0.75 + 0.5 + 0) / 4)
    assert summary["unparsed_rate"] == pytest.approx(1 / 4)
    assert summary["tie_rate"] == pytest.approx(1 / 4)


def test_a_gain_that_excludes_zero_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2] * 20, "language": [2] * 10})
    trained = evaluation(tmp_path / "trained", {"geography": [3, 3] * 20, "language": [2] * 10})
    control = evaluation(tmp_path / "control", {"geography": [3, 3] * 20, "language": [1] * 10}, temperature=0.1)
    main(ReportConfig(base=base, trained=trained, control=control, out=tmp_path / "report", resamples=500))
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "report" / "table.md").read_text().strip()
    record = json.loads((tmp_path / "report" / "comparison.json").read_text())
    rows = {(row["scope"], row["run"]): row for row in record["rows"]}
    gain = rows["in-domain", "trained"]["avg_at_k_vs_base"]
    assert gain["estimate"] == pytest.approx(0.75 - 0.375)
    assert gain["low"] > 0 and "the interval excludes zero" in text
    assert rows["in-domain", "trained"]["avg_at_k_vs_control"]["estimate"] == 0
    assert "not distinguishable from zero" in record["verdict"]
    assert rows["cross-domain", "trained"]["n"] == 10
    assert rows["cross-domain", "control"]["avg_at_k_vs_base"]["estimate"] == pytest.approx(-0.25)
    assert "| in-domain | control (T=0.1) | 40 | 0.750 |" in text


def test_a_change_that_may_be_nothing_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 3] * 10})
    trained = evaluation(tmp_path / "trained", {"geography": [3, 1] * 10})
    main(ReportConfig(base=base, trained=trained, out=tmp_path / "report", resamples=500))
    assert "the interval includes zero" in capsys.readouterr().out


def test_evaluations_of_different_questions_are_not_compared(tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2, 3]})
    trained = evaluation(tmp_path / "trained", {"geography": [1, 2]})
    with pytest.raises(UserError, match="not the questions of"):
        main(ReportConfig(base=base, trained=trained, out=tmp_path / "report"))
    with pytest.raises(UserError, match="no finished evaluation"):
        main(ReportConfig(base=base, trained=tmp_path / "nowhere", out=tmp_path / "report"))
