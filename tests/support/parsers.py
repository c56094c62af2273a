"""Parsers that tests name with ``--answer-parser``."""

from __future__ import annotations

from neurosig.questions.answers import AnswerFormat, extract_answer
from neurosig.questions.load import Question

UNCUT = "tests.support.parsers:uncut"


def uncut(text: str, question: Question, answer_format: AnswerFormat, **_: object) -> str | None:
    """The answer as if no completion was cut off; those of a tiny model never end by themselves."""
    return extract_answer(text, question, answer_format)


def agreeing(text: str, question: Question, answer_format: AnswerFormat, **_: object) -> str | None:
    """One answer for all: rollouts of random weights have no text of their own to agree on."""
    return "yes"
