"""Question files in the shapes in which public sets are released, with invented contents."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NUMBERS = range(4)
"""Each file has as many questions."""
OPTIONS = [["moss", "slate", "amber", "chalk"], ["rain", "hail", "fog", "dew"], ["oak", "elm", "ash", "fir"],
           ["two", "six", "nine", "ten"]]  # fmt: skip


class Released(NamedTuple):
    """A file, the ``--fields`` it needs, and what its first question becomes."""

    path: Path
    fields: tuple[str, ...]
    question: str
    choices: tuple[str, ...] | None
    answer: str | None


def ask(number: int) -> str:
    return f"Which of these did the miller of Varn sell in week {number}?"


def labelled(number: int, labels: Sequence[str] = "ABCD") -> dict[str, list[str]]:
    return {"text": OPTIONS[number], "label": [*labels]}


def lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*records[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(record) for record in records]), path)
    return path


def multiple_choice(folder: Path) -> dict[str, Released]:
    """Multiple-choice sets; the third choice of the first question is right."""

    def file(path: Path, *fields: str, choices: Sequence[str] = OPTIONS[0], answer: str | None = "C") -> Released:
        return Released(path, fields, ask(0), tuple(choices), answer)

    sciknoweval = [
        {"prompt": {"default": "Pick one."}, "question": ask(n), "choices": labelled(n), "answerKey": "C",
         "answer": "", "type": "mcq-4-choices", "domain": "Chemistry", "details": {"level": "L1", "task": "trade"}}
        for n in NUMBERS
    ]  # fmt: skip
    mmlu_pro = [
        {"question_id": 70 + n, "question": ask(n), "options": OPTIONS[n], "answer": "C", "answer_index": 2,
         "cot_content": "", "category": "business", "src": "invented"}
        for n in NUMBERS
    ]  # fmt: skip
    mmlu = [{"question": ask(n), "subject": "trade", "choices": OPTIONS[n], "answer": 2} for n in NUMBERS]
    gpqa = [
        {"Record ID": f"rec{n}", "Question": ask(n) + "\n", "Correct Answer": OPTIONS[n][2],
         "Incorrect Answer 1": OPTIONS[n][0], "Incorrect Answer 2": OPTIONS[n][1] + "\n",
         "Incorrect Answer 3": OPTIONS[n][3], "Explanation": f"In week {n} there was none of the others.",
         "High-level domain": "Trade", "Subdomain": "Mills"}
        for n in NUMBERS
    ]  # fmt: skip
    openbookqa = [{"id": f"7-{n}", "question_stem": ask(n), "choices": labelled(n), "answerKey": "C"} for n in NUMBERS]
    commonsenseqa = [
        {"id": f"c{n}", "question": ask(n), "question_concept": "miller", "choices": labelled(n), "answerKey": ""}
        for n in NUMBERS
    ]
    arc = [{"id": f"M_{n}", "question": ask(n), "choices": labelled(n, "1234"), "answerKey": "3"} for n in NUMBERS]
    nested = [
        {"id": f"N_{n}", "answerKey": "C", "question": {"stem": ask(n), "choices": [
            {"text": text, "label": letter} for text, letter in zip(OPTIONS[n], "ABCD", strict=True)]}}
        for n in NUMBERS
    ]  # fmt: skip
    own = [
        {"nr": n, "item": {"stem": ask(n)}, **{f"option {k}": text for k, text in zip("abcd", OPTIONS[n], strict=True)},
         "key": OPTIONS[n][2]}
        for n in NUMBERS
    ]  # fmt: skip
    return {
        "SciKnowEval": file(lines(folder / "sciknoweval.jsonl", sciknoweval)),
        "MMLU-Pro": file(parquet(folder / "mmlu_pro.parquet", mmlu_pro)),
        "MMLU": file(parquet(folder / "mmlu.parquet", mmlu)),
        "GPQA": file(table(folder / "gpqa.csv", gpqa), "privileged_context=Explanation",
                     choices=("chalk", "slate", "moss", "amber"), answer="D"),
        "OpenBookQA": file(lines(folder / "openbookqa.jsonl", openbookqa)),
        "CommonsenseQA": file(parquet(folder / "commonsenseqa.parquet", commonsenseqa), answer=None),
        "ARC": file(parquet(folder / "arc.parquet", arc)),
        "ARC by AllenAI": file(lines(folder / "ARC-Challenge-Test.jsonl", nested)),
        "columns of other names": file(
            lines(folder / "own.jsonl", own), "question=item.stem", "id=nr", "answer=key",
            "choices=option a,option b,option c,option d",
        ),
    }  # fmt: skip


def free_form(folder: Path) -> dict[str, Released]:
    """Sets without choices."""
    sums = [{"question": f"What is {n} + 7?", "answer": f"{n} + 7 = <<{n}+7={n + 7}>>{n + 7}\n#### {n + 7}"}
            for n in NUMBERS]  # fmt: skip
    prompts = [{"prompt": f"{ask(n)} Reply with one word.", "answer": OPTIONS[n][2]} for n in NUMBERS]
    chats = [
        {"messages": [{"role": "system", "content": "You keep a mill's books."}, {"role": "user", "content": "Ready?"},
                      {"role": "assistant", "content": "Yes."}, {"role": "user", "content": ask(n)}]}
        for n in NUMBERS
    ]  # fmt: skip
    (folder / "chats.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in chats).encode()))
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    return {
        "GSM8K": Released(lines(folder / "gsm8k.jsonl", sums), (), "What is 0 + 7?", None, "7"),
        "prompts": Released(folder / "prompts.json", (), prompts[0]["prompt"], None, OPTIONS[0][2]),
        "messages": Released(folder / "chats.jsonl.gz", (), ask(0), None, None),
    }


def write_released(folder: Path) -> dict[str, Released]:
    """Twelve files, by the name of their shape."""
    return multiple_choice(folder) | free_form(folder)
