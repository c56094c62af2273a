from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.compare import CompareConfig, main
from distill.evaluate import EvaluateConfig, _write
from distill.results import sampled_row, summarise
from neurosig.models.load import ModelInfo
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from tests.support.tiny import tiny_tokenizer

INFO = ModelInfo("made-up", None, {"w": "0"}, "0", "0", None, "float32", "sdpa")


class Loaded:
    """Only what the run record reads."""

    info = INFO
    tokenizer = tiny_tokenizer()


def question(index: int, domain: str = "geography") -> Question:
    return Question(
        f"{domain}{index:03d}", domain, f"What is the capital of land {index}?", answer="Paris", aliases=("Lutetia",)
    )


def group(item: Question, answers: list[str]) -> list[Rollout]:
    return [Rollout(item.id, i, answer, (5, 2), "stop", -0.5, 1.0) for i, answer in enumerate(answers)]


def config(out: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(model="made-up", questions=("x",), out=out, num_generations=4, **changes)


def evaluation(out: Path, right_of: dict[str, list[int]], k: int = 4, unread: bool = False, **changes: Any) -> Path:
    """An evaluation in which question i of a domain gets ``right_of[domain][i]`` right answers out of ``k``.

    ``unread``: in a wording of which the parser reads only the wrong ones.
    """
    out.mkdir(parents=True)
    rows, groups, questions = [], {}, []
    for domain, counts in right_of.items():
        for index, count in enumerate(counts):
            item = question(index, domain)
            questions.append(item)
            groups[item.id] = group(item, ["Paris."] * count + ["Rome."] * (k - count))
            rows.append(sampled_row(item, groups[item.id], AnswerReader()))
            if unread:
                rows[-1] |= {"n_correct": 0, "n_tied_right": 0, "unparsed": count}
    (out / ".rollouts.log").touch()
    loaded: Any = Loaded()
    _write(config(out, **changes), loaded, questions, groups, rows, summarise(rows, seed=0))
    return out


def test_a_row_counts_ties_aliases_and_what_cannot_be_parsed(tmp_path: Path) -> None:
    item = question(0)
    row = sampled_row(item, group(item, ["Paris.", "Lutetia.", "I'm sorry, I cannot.", "Rome."]), AnswerReader())
    assert (row["votes"], row["n_tied"], row["n_tied_right"]) == (1, 3, 2)
    assert (row["n_correct"], row["unparsed"], row["distinct"], row["k"]) == (2, 1, 3, 4)
    silent = sampled_row(item, group(item, [""] * 4), AnswerReader())
    assert (silent["votes"], silent["n_tied"], silent["winner"], silent["unparsed"]) == (0, 0, None, 4)


def test_a_summary_by_hand(tmp_path: Path) -> None:
    """Votes 4, 3, 2 (a tie), 0 of 4; right 4, 1, 2, 0."""
    questions = [question(index) for index in range(4)]
    answers = [["Paris."] * 4, ["Rome."] * 3 + ["Paris."], ["Paris."] * 2 + ["Rome."] * 2, [""] * 4]
    rows = [sampled_row(q, group(q, a), AnswerReader()) for q, a in zip(questions, answers, strict=True)]
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
    main(CompareConfig(base=base, trained=trained, control=control, out=tmp_path / "report", resamples=500))
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "report" / "table.md").read_text().strip()
    record = json.loads((tmp_path / "report" / "comparison.json").read_text())
    rows = {(row["scope"], row["run"]): row for row in record["rows"]}
    gain = rows["in-domain", "trained"]["avg_at_k_vs_base"]
    assert gain["estimate"] == pytest.approx(0.75 - 0.375)
    assert gain["low"] > 0 and rows["in-domain", "trained"]["avg_at_k_lenient_vs_base"] == gain
    assert "leniently (a gain under both gradings). Against" in text
    assert rows["in-domain", "trained"]["avg_at_k_vs_control"]["estimate"] == 0
    assert record["verdict"].count("(not distinguishable from zero under both gradings)") == 2
    assert rows["cross-domain", "trained"]["n"] == 10
    assert rows["cross-domain", "control"]["avg_at_k_vs_base"]["estimate"] == pytest.approx(-0.25)
    assert "| in-domain | control (T=0.1) | 40 | strict | 0.750 |" in text
    assert "part of a gain may be learned wording" not in text


def test_a_change_that_may_be_nothing_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 3] * 10})
    trained = evaluation(tmp_path / "trained", {"geography": [3, 1] * 10})
    main(CompareConfig(base=base, trained=trained, out=tmp_path / "report", resamples=500))
    assert "not distinguishable from zero under both gradings" in capsys.readouterr().out


def test_a_gain_that_only_one_grading_sees_is_not_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training teaches the wording that the parser takes: the model named Paris as often before."""
    base = evaluation(tmp_path / "base", {"geography": [2, 3] * 15}, unread=True)
    trained = evaluation(tmp_path / "trained", {"geography": [2, 3] * 15})
    main(CompareConfig(base=base, trained=trained, out=tmp_path / "report", resamples=300))
    text = capsys.readouterr().out
    assert "(strictly a gain, leniently not distinguishable from zero)" in text
    assert "Training changed the wording of the answers (parse rate in-domain by +0.625 [" in text
    assert "strict minus lenient Avg@4 in-domain by +0.625 [" in text and "part of a gain may be learned" in text
    row = json.loads((tmp_path / "report" / "comparison.json").read_text())["rows"][1]
    assert row["parse_rate_vs_base"]["low"] > 0.5 and row["strict_minus_lenient"]["estimate"] == 0
    assert row["avg_at_k_vs_base"]["low"] > 0.5 and row["avg_at_k_lenient_vs_base"]["estimate"] == 0
    assert "| in-domain | base | 0.375 |  | -0.625 |  |" in text


def test_evaluations_of_different_questions_are_not_compared(tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2, 3]})
    trained = evaluation(tmp_path / "trained", {"geography": [1, 2]})
    with pytest.raises(UserError, match="not the questions of"):
        main(CompareConfig(base=base, trained=trained, out=tmp_path / "report"))
    with pytest.raises(UserError, match="no finished evaluation"):
        main(CompareConfig(base=base, trained=tmp_path / "nowhere", out=tmp_path / "report"))


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Base: 1 of 4 right (the majority wrong, confidence 3/4) on half of the questions, 4 of 4 on the other half."""
    base = evaluation(tmp_path / "base", {"geography": [1, 4] * 10})
    trained = evaluation(tmp_path / "trained", {"geography": [4, 4] * 10})
    main(CompareConfig(base=base, trained=trained, out=tmp_path / "report", resamples=500))
    lines = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert lines[0] == "| scope | run | n | grading | Avg@4 | change | maj@4 | change | ECE | change |"
    for place, grading in enumerate(("strict", "lenient")):
        assert lines[2 + place] == f"| in-domain | base (T=0.8) | 20 | {grading} | 0.625 |  | 0.500 |  | 0.375 |  |"
        assert lines[4 + place].startswith(f"| in-domain | trained (T=0.8) | 20 | {grading} | 1.000 | +0.375 [")
        assert "| 1.000 | +0.500 [" in lines[4 + place] and "| 0.000 | -0.375 [" in lines[4 + place]
    head = "| scope | run | parse rate | change | strict minus lenient Avg@4 | change | cut off | change |"
    assert lines[9] == f"{head} tokens per answer | change |"
    assert lines[11] == "| in-domain | base | 1.000 |  | 0.000 |  | 0.000 |  | 2.000 |  |"
    assert lines[12].startswith("| in-domain | trained | 1.000 | +0.000 [")
    rows = json.loads((tmp_path / "report" / "comparison.json").read_text())["rows"]
    row = next(row for row in rows if row["run"] == "trained")
    assert row["maj_at_k_vs_base"]["low"] < 0.5 < row["maj_at_k_vs_base"]["high"]
    assert row["mean_confidence"] == 1


def test_a_loss_is_called_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = evaluation(tmp_path / "base", {"geography": [3, 4] * 10})
    trained = evaluation(tmp_path / "trained", {"geography": [1, 1] * 10})
    main(CompareConfig(base=base, trained=trained, control=base, out=tmp_path / "report", resamples=500))
    text = capsys.readouterr().out
    assert "training changes Avg@4 by -0.625 [" in text
    assert text.count("(a loss under both gradings)") == 3


def test_what_was_trained_on_decides_what_is_in_domain(tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2], "language": [2, 3], "chemistry": [1, 1]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text(json.dumps({"domains": ["chemistry", "language", "history"]}))
    main(CompareConfig(base=base, trained=base, train=tmp_path / "run", out=tmp_path / "report", resamples=100))
    record = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert record["domains"] == {"in-domain": ["language", "chemistry"], "cross-domain": ["geography"]}
    assert {(row["scope"], row["n"]) for row in record["rows"]} == {("in-domain", 4), ("cross-domain", 2)}
    (tmp_path / "run" / "train.json").write_text(json.dumps({"domains": ["history"]}))
    with pytest.raises(UserError, match=r"trained on history, but .* holds geography, language, chemistry"):
        main(CompareConfig(base=base, trained=base, train=tmp_path / "run", out=tmp_path / "report"))
    with pytest.raises(UserError, match="no finished training run"):
        main(CompareConfig(base=base, trained=base, train=tmp_path, out=tmp_path / "report"))


def test_different_numbers_of_samples_are_not_compared(tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2, 3]})
    trained = evaluation(tmp_path / "trained", {"geography": [1, 2, 3]}, k=8)
    with pytest.raises(UserError, match=r"trained: K=8 samples per question, \S+base has 4; ECEs of different K"):
        main(CompareConfig(base=base, trained=trained, out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("name", ["summary.json", "results.parquet"])
def test_an_evaluation_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    base = evaluation(tmp_path / "base", {"geography": [1, 2, 3]})
    trained = evaluation(tmp_path / "trained", {"geography": [1, 2, 3]})
    (trained / name).write_bytes(b"{")
    with pytest.raises(UserError, match=r"trained: cannot be read \("):
        main(CompareConfig(base=base, trained=trained, out=tmp_path / "report"))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["--base", "a", "--trained", "b", "--out", "report"]
    done = subprocess.run(
        [sys.executable, "-m", "distill.compare", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a: no finished evaluation (summary.json is missing); run distill.evaluate --out a\n"
    assert not (tmp_path / "report").exists()
