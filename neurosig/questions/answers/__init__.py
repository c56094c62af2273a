"""What a completion answers, and whether that is right; see `extract_answer`, `is_correct` and `is_lenient`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurosig.questions.answers.extract import AnswerFormat, extract_answer, is_refusal
    from neurosig.questions.answers.grading import is_correct, is_lenient
    from neurosig.questions.answers.normal import normalise

__all__ = ["AnswerFormat", "extract_answer", "is_correct", "is_lenient", "is_refusal", "normalise"]

_HOME = {
    "AnswerFormat": "extract",
    "extract_answer": "extract",
    "is_refusal": "extract",
    "is_correct": "grading",
    "is_lenient": "grading",
    "normalise": "normal",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'neurosig.questions.answers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neurosig.questions.answers.{_HOME[name]}"), name)
    globals()[name] = value
    return value
