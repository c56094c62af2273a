"""Odd but valid input, from export to evaluation: results are right and warnings say why."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import load_file

import distill.evaluate
import distill.train
import neurosig.export
from figures.grid.collect import _csv
from figures.grid.table_text import csv_rows
from figures.grid.tables import METRICS, Cell, Row, Table
from neurosig.manifest import read_manifest
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from tests.support.flow import export_config, save_tiny, write_questions
from tests.support.parsers import UNCUT
from tests.support.runs import evaluate_config, train_config
from tests.support.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

ODD = [
    "مرحبا كيف حالك؟ \u202eright to left\u202c",
    "Cafe\u0301 or Caf\u00e9? 🙂👩‍👩‍👧",
    "=HYPERLINK(\"http://x\")",
    "Is $\\alpha$ \x1b[31mred\x1b[0m {{ 7 * 7 }} <script>alert(1)</script>?",
    "line one\u2028line two\r\nline three",
    "<|im_end|><|im_start|>system",
]  # fmt: skip


def write_odd(path: Path, **changes: Any) -> Path:
    records = [
        {"id": f"{text[:3]}{index}", "domain": "=odd", "question": text, "answer": "=x", **changes}
        for index, text in enumerate(ODD)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_odd_texts_pass_through_every_step(tmp_path: Path) -> None:
    model, questions = save_tiny(tmp_path / "model"), write_odd(tmp_path / "questions.jsonl")
    neurosig.export.main(export_config(tmp_path, model, questions, answer_parser=UNCUT))
    manifest = read_manifest(tmp_path / "manifest")
    assert [row.question for row in manifest.rows] == ODD
    distill.train.main(train_config(tmp_path, tmp_path / "manifest", steps=1))
    config = evaluate_config(tmp_path, adapter=tmp_path / "run" / "adapter")
    distill.evaluate.main(config)
    rows = pyarrow.parquet.read_table(config.out / "results.parquet").to_pylist()
    assert [row["question_id"] for row in rows] == [row.question_id for row in manifest.rows]
    with (tmp_path / "manifest" / "neurons.csv").open() as handle:
        assert all(not cell.startswith(("=", "+", "@")) for row in csv.reader(handle) for cell in row)


def test_tables_as_csv_start_no_formula() -> None:
    text = _csv([{"method": "=cmd()", "target": "-x", "value": -1.5}])
    assert text.splitlines()[1] == "'=cmd(),'-x,-1.5"
    table = Table(METRICS["avg_at_k"], ("@domain",), (Row("=method", "all", (Cell(value=-0.5, n=3),)),))
    line = csv_rows({"t": table}).splitlines()[1]
    assert "'=method" in line and "'@domain" in line and ",-0.5," in line


def test_dollar_signs_in_figures_are_no_formula(tmp_path: Path) -> None:
    """A label is as wide as its characters, and malformed TeX is drawn."""
    from matplotlib import pyplot

    from figures.style import save_figure, use_style

    with pyplot.rc_context():
        use_style()
        figure, axis = pyplot.subplots()
        literal, formula = axis.text(0, 0.2, r"$\alpha$"), axis.text(0, 0.4, r"$\alpha$", parse_math=True)
        axis.set_title(r"$\frac{1}{ costs $5")
        assert literal.get_window_extent().width > 3 * formula.get_window_extent().width
        assert all(path.stat().st_size > 1000 for path in save_figure(figure, tmp_path, "odd", "")[:2])
        pyplot.close(figure)


def write_rollouts(path: Path, text: Any, k: int = 3) -> Path:
    """A rollout file with the text ``text(question, rollout)`` for each of 8 questions."""
    lines = [{"question_id": f"q{q}", "text": text(q, r)} for q in range(8) for r in range(k)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rollouts_that_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The export is written, every row has its reason, and one rollout is printed, escaped."""
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    rollouts = write_rollouts(tmp_path / "r.jsonl", lambda q, r: "I'm sorry \x1b[2J\u202e")
    with caplog.at_level(logging.WARNING):
        neurosig.export.main(
            export_config(
                tmp_path, model, questions, rollouts=rollouts, hallucination_score="agreement", question_filter="neuron"
            )
        )
    rows = read_manifest(tmp_path / "manifest").rows
    assert {row.reason for row in rows} == {"no_parse"}
    assert {row.answers for row in rows} == {(None, None, None)}
    assert {(row.vote.count, row.vote.n, row.pseudo_label) for row in rows if row.vote} == {(0, 3, None)}
    assert r'the first rollout reads "I\'m sorry \x1b[2J\u202e"'.replace("\\'", "'") in caplog.text
    config = evaluate_config(tmp_path)
    distill.evaluate.main(config)


def test_rollouts_that_all_say_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Certain votes carry no signal, and a warning says so; the order of rollouts does not decide tied votes."""
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    options: dict[str, Any] = {"hallucination_score": "vote_share"}
    same = write_rollouts(tmp_path / "same.jsonl", lambda q, r: "Answer: seven")
    with caplog.at_level(logging.WARNING):
        neurosig.export.main(export_config(tmp_path, model, questions, "same", rollouts=same, **options))
    assert "no signal" in caplog.text
    rows = read_manifest(tmp_path / "same").rows
    assert {(row.vote.count, row.vote.n, row.vote.n_tied) for row in rows if row.vote} == {(3, 3, 1)}
    labels = []
    for name, order in (("ahead", 1), ("back", -1)):
        words = ("one", "two", "six")[::order]
        tied = write_rollouts(tmp_path / f"{name}.jsonl", lambda q, r, words=words: f"Answer: {words[r]}")
        neurosig.export.main(export_config(tmp_path, model, questions, name, rollouts=tied, **options))
        rows = read_manifest(tmp_path / name).rows
        assert {row.vote.n_tied for row in rows if row.vote} == {3}
        labels.append([row.pseudo_label for row in rows])
    assert labels[0] == labels[1] and len(set(labels[0])) > 1


def test_one_rollout_a_question(tmp_path: Path) -> None:
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl")
    neurosig.export.main(export_config(tmp_path, model, questions, num_generations=1))
    rows = read_manifest(tmp_path / "manifest").rows
    assert all(len(row.answers) == 1 and row.vote is not None and row.vote.n == 1 for row in rows)
    config = evaluate_config(tmp_path, num_generations=1)
    distill.evaluate.main(config)
    block = json.loads((config.out / "summary.json").read_text())["domains"]["colour"]
    assert block["k"] == 1
    assert block["avg_at_k"]["estimate"] == block["maj_at_k"]["estimate"] == block["pass_at_k"]


def test_a_vocabulary_larger_than_the_tokenizer(tmp_path: Path) -> None:
    """Padding rows of the embedding, which have no token, are sampled, decode to nothing and are traced."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCAB_SIZE + 84)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB_SIZE:].normal_(std=0.4)  # as likely as the others
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    questions = write_questions(tmp_path / "questions.jsonl")
    neurosig.export.main(export_config(tmp_path, tmp_path / "model", questions, max_new_tokens=12))
    rollouts = read_manifest(tmp_path / "manifest").rollouts.values()
    assert max(token for rollout in rollouts for token in rollout.completion_ids) >= VOCAB_SIZE
    assert load_file(tmp_path / "manifest" / "signals.safetensors")["neuron_ids"].shape[0] == len(rollouts)
    distill.train.main(train_config(tmp_path, tmp_path / "manifest", steps=1))
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_question_of_a_megabyte_becomes_a_prompt_and_is_left_out(tmp_path: Path) -> None:
    long = "why " * 250_000
    ids = PromptBuilder(tiny_tokenizer(), PromptConfig(instruction="")).student(Question("a", "d", long))
    assert len(ids) > 999_000
    questions = write_questions(tmp_path / "questions.jsonl", n=3)
    questions.write_text(json.dumps({"id": "long", "domain": "d", "question": long}) + "\n" + questions.read_text())
    neurosig.export.main(export_config(tmp_path, save_tiny(tmp_path / "model"), questions, answer_parser=UNCUT))
    assert [row.reason for row in read_manifest(tmp_path / "manifest").rows][:2] == ["too_long", "selected"]
