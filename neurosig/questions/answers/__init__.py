"""What a completion answers, and whether that is right; see `extract_answer`, `is_correct` and `is_lenient`."""

from neurosig.questions.answers.extract import AnswerFormat, extract_answer, is_refusal
from neurosig.questions.answers.grading import is_correct, is_lenient
from neurosig.questions.answers.normal import normalise

__all__ = ["AnswerFormat", "extract_answer", "is_correct", "is_lenient", "is_refusal", "normalise"]
