"""Question files for the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neurosig.questions.load import Question, load_questions
from neurosig.runtime.errors import UserError

GOOD = {"id": "a", "domain": "d", "question": "What is it?", "choices": None, "answer": "it"}


def write(path: Path, *records: dict[str, Any]) -> Path:
    """A JSONL file of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one(path: Path, record: dict[str, Any], **options: Any) -> Question:
    """The question that one record becomes."""
    (question,) = load_questions(write(path / "set.jsonl", record), **options)
    return question


def fails(source: Any, **options: Any) -> str:
    """The one-line error of loading a source."""
    with pytest.raises(UserError) as caught:
        load_questions(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
