"""No figure is of an older state of the code unless its entry says so and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import figures.written_by as written_by
from distill.losses import Divergence, chunked_divergence
from figures.written_by import NUMBERS, WrittenByConfig, files_of, main, read
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, sha256_text
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.next_token import next_tokens, uniforms
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics import metrics
from tests.support.paths import FIGURE_DATA, TESTS

FIGURES = FIGURE_DATA.parent
NOT_MEASURED = {"README", "evidence_plan", "written_by", "paper_table3", "paper_table4", "inflow_table1", "__init__"}
"""Texts, the plan of tests, and what others have published."""
EXPECTED: tuple[int, dict[str, Any]] = (
    2,
    {
        "answers": "17f1310125c2ec40",
        "votes": ["africa", 3, [False, True, True, False, False, False], [True, True, True, True, False, False]],
        "metrics": [0.25875, 0.177505, 0.296563, -0.036556, 0.290825],
        "divergences": [13.728, 10.978, 2.152, -3.756],
        "tokens": [5, 2, 6, 6, 1, 1, 1, 1],
    },
)
"""Version of the numbers, and some numbers of every kind."""


def some_numbers() -> dict[str, Any]:
    """Answers, votes and grades, metrics, divergences and sampled tokens of fixed inputs."""
    records = map(json.loads, (TESTS / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    answers = [
        AnswerReader(record["format"]).extract(
            record["text"],
            record["finish_reason"],
            Question("q", "d", record["question"], record["choices"] and tuple(record["choices"])),
        )
        for record in records
    ]
    texts = ("West Africa", "It is in Africa.", "Africa", "Asia, not Africa", "Answer: Asia", "I do not know")
    place, reader = Question("q", "d", "In which continent is Egypt?", answer="Africa"), AnswerReader()
    group = [Rollout("q", index, text, (), "stop") for index, text in enumerate(texts)]
    reading = reader.read(group, place)
    grades = reader.grade(reading, group, place)
    votes, right = np.arange(40) % 8 + 1, (np.arange(40) * 7 % 11 / 10).clip(0, 1)
    interval = metrics.paired_mean_interval(right, right[::-1] ** 2, seed=0, resamples=200)
    measured = [metrics.ece(votes, 8, right), metrics.smooth_ece(votes, 8, right), metrics.brier(votes, 8, right)]
    wave = torch.arange(6 * 5).reshape(6, 5).float()
    hidden = wave.sin(), (1.3 * wave).cos()
    head, token_ids = torch.arange(9 * 5).reshape(9, 5).float().cos(), torch.arange(6)
    losses = [
        chunked_divergence(*hidden, head, head, Divergence(name), token_ids=token_ids).loss.item()  # type: ignore[arg-type]
        for name in ("forward_kl", "reverse_kl", "jsd", "sampled_token")
    ]
    config = SamplingConfig(num_generations=8, max_new_tokens=1, temperature=0.7, top_p=0.9)
    drawn, _ = next_tokens(
        (wave.sin() @ head.T)[:1].expand(8, -1), torch.tensor(uniforms("q", config, "s"))[:, 0], None, config
    )
    return {
        "answers": sha256_text(json.dumps(answers))[:16],
        "votes": [reading.vote.winner, reading.vote.count, list(grades.strict), list(grades.lenient)],
        "metrics": [round(float(value), 6) for value in (*measured, interval.low, interval.high)],
        "divergences": [round(value, 3) for value in losses],
        "tokens": drawn.tolist(),
    }


def test_numbers_of_fixed_inputs_are_those_of_this_version() -> None:
    """If not, the figures are of an older state: raise `NUMBERS`, and put what is computed now into `EXPECTED`."""
    version, expected = EXPECTED
    assert version == NUMBERS
    for name, now in some_numbers().items():
        assert now == (pytest.approx(expected[name], abs=1e-3) if name == "divergences" else expected[name]), name


def test_every_figure_has_an_entry_and_no_file_has_changed_since() -> None:
    record = read()
    names = {path.stem for path in (*FIGURE_DATA.iterdir(), *FIGURES.glob("*.png"), *FIGURES.glob("*.md"))}
    assert set(record) == {name for name in names | {"signal_report"} if name not in NOT_MEASURED}
    for name, entry in record.items():
        assert entry["files"] == {path.relative_to(FIGURES).as_posix(): sha256_file(path) for path in files_of(name)}, (
            f"{name} was written again: python -m figures.written_by {name} --command ..."
        )


def test_no_figure_is_of_an_older_state_unless_it_says_why() -> None:
    for name, entry in read().items():
        assert entry["command"] and entry["numbers"] <= NUMBERS
        assert (entry["numbers"] < NUMBERS) == bool(entry.get("reason")), f"{name}: make it again, or say why not"


def test_an_entry_is_written_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "figures" / "data"
    (data / "grid").mkdir(parents=True)
    for path in (data / "a.csv", data.parent / "a.png", data.parent / "a.py", data / "grid" / "rows.csv"):
        path.write_text(path.name)
    monkeypatch.setattr(written_by, "DATA", data)
    monkeypatch.setattr(written_by, "RECORD", data / "written_by.json")
    main(WrittenByConfig(names=("a",), command="make a"))
    main(WrittenByConfig(names=("grid",), command="make grid", numbers=1, reason="hours"))
    record = read()
    assert record["a"] == {
        "command": "make a",
        "numbers": NUMBERS,
        "files": {"a.png": sha256_text("a.png"), "data/a.csv": sha256_text("a.csv")},
    }
    assert record["grid"]["files"] == {"data/grid/rows.csv": sha256_text("rows.csv")}
    assert (record["grid"]["numbers"], record["grid"]["reason"]) == (1, "hours")
    for wrong, message in (
        ({"names": ("b",)}, "b: no such file"),
        ({"numbers": 1}, "--reason belongs to --numbers below 2"),
        ({"reason": "hours"}, "--reason belongs to"),
    ):
        with pytest.raises(UserError, match=message):
            main(WrittenByConfig(**{"names": ("a",), "command": "x", **wrong}))  # type: ignore[arg-type]
    assert read() == record
