"""Records of released sets whose fields need more than other names, in the shape that `formats` reads.

Most sets need nothing from here: MMLU, ARC, OpenBookQA, CommonsenseQA and GSM8K from the hub, and all that have a
question, its choices and its answer under names that `formats` knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from neurosig.questions.columns import (
    Record,
    got,
    optional_text,
    required_text,
    structured,
    text_list,
    text_or_number,
)
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_text

GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def as_read(record: Record, line: int, stem: str) -> Record | None:
    """The record with the fields that `formats` reads; None for an open-ended item.

    Args:
        record: One parsed record.
        line: Its 1-based line, part of the id that is made for an item of SciKnowEval.
        stem: The domain where the record names none.
    """
    if "answerKey" in record and ("details" in record or "type" in record):
        return sciknoweval(record, line, stem)
    if "question_id" in record and "options" in record:
        return mmlu_pro(record)
    if "Question" in record and all(name in record for name in GPQA):
        return gpqa(record)
    if isinstance(inside := record.get("question"), Mapping):
        return {**record, "choices": inside.get("choices"), "question": inside.get("stem")}
    return record


def sciknoweval(record: Record, line: int, stem: str) -> Record | None:
    """SciKnowEval as released: choices {text, label}, answerKey, answer, type, details, prompt."""
    details = record["details"] if isinstance(record.get("details"), dict) else {}
    domain = (optional_text(record, "domain") or stem).lower()
    task = optional_text(details, "task")
    places = (domain, details.get("level"), task, details.get("subtask"), line)
    made_id = "-".join(dict.fromkeys(slug(str(part)) for part in places if part))
    shape: dict[str, Any] = {
        "id": made_id if record.get("id") is None else record["id"],
        "domain": domain,
        "kind": task,
        "question": record.get("question"),
        "type": record.get("type"),
    }
    choices = structured(record.get("choices"))
    if choices and (not isinstance(choices, dict) or choices.get("text")):
        return {**shape, "choices": choices, "answerKey": record["answerKey"]}
    if record.get("type") not in ("true_or_false", "filling"):
        return None
    prompt = record.get("prompt")
    instruction = optional_text(prompt if isinstance(prompt, dict) else {"default": prompt}, "default")
    return {**shape, "answer": required_text(record, "answer"), "instruction": instruction}


def mmlu_pro(record: Record) -> Record:
    """MMLU-Pro as released: question_id, options ("N/A" dropped), answer, answer_index, category."""
    options = text_list(record, "options") or ()
    answer = optional_text(record, "answer")
    kept = [index for index, option in enumerate(options) if option.strip() != "N/A"]
    if answer is not None:
        index = ascii_uppercase.find(answer) if len(answer) == 1 else -1
        if index not in kept:
            raise UserError(f'field "answer": not a letter of one of the {len(kept)} options, {got(answer)}')
        if record.get("answer_index", index) != index:
            other = got(record["answer_index"])
            raise UserError(f'field "answer_index": contradicts answer {answer}, {other}')
        answer = ascii_uppercase[kept.index(index)]
    number = text_or_number(record, "question_id")
    return {
        "id": None if number is None else f"mmlu_pro-{number}",
        "domain": "mmlu_pro",
        "kind": record.get("category"),
        "question": record.get("question"),
        "choices": [options[index] for index in kept],
        "answer": answer,
    }


def gpqa(record: Record) -> Record:
    """GPQA as released: the right answer and three wrong ones in columns of their own.

    They become choices in an order that depends on the question's text alone, so that no letter is right more often
    than by chance.
    """
    question = required_text(record, "Question")
    order = sorted(range(len(GPQA)), key=lambda place: sha256_text(f"{question.strip()}\0{place}"))
    choices = [(text_or_number(record, GPQA[place]) or "").strip() for place in order]
    return {
        "id": record.get("Record ID"),
        "kind": record.get("Subdomain") or record.get("High-level domain"),
        "question": question,
        "choices": choices,
        "answer": ascii_uppercase[order.index(0)],
    }


def slug(text: str) -> str:
    """``text`` with everything but letters, digits, "_" and "." as one hyphen."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")
