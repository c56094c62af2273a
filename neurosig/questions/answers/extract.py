"""Parse completions into answers: letters, numbers and short free-form text.

Parsing never sees a gold answer: it reads the completion, the question's text, its choices and its answer space. A
completion without an answer gives ``None``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neurosig.questions import thoughts
from neurosig.questions.answers.letters import letter_answer
from neurosig.questions.answers.markup import answer_part, with_marks
from neurosig.questions.answers.numbers import number_answer
from neurosig.questions.answers.short_text import is_refusal, short_answer
from neurosig.questions.answers.spaces import members
from neurosig.runtime.files import sha256_text
from neurosig.runtime.shapes import check_choice

if TYPE_CHECKING:
    from neurosig.questions.load import Question

__all__ = ["AnswerFormat", "extract_answer", "is_refusal", "parser_sha256"]

AnswerFormat = Literal["auto", "letter", "number", "short"]


def extract_answer(
    text: str,
    question: Question,
    answer_format: AnswerFormat = "auto",
    *,
    finish_reason: str = "stop",
    prompt_opens_thought: bool = False,
) -> str | None:
    """The answer of a completion, normalised for voting; ``None`` without one.

    A thought that is not closed gives no answer, and neither does a text that names several choices or denies its only
    one. A further question that the model writes after its answer is ignored.

    Args:
        text: Decoded completion.
        question: Its question; text, choices and answer space are used, the gold answer never.
        answer_format: ``auto`` is ``letter`` when the question has choices, else ``short``.
        finish_reason: ``length`` for a completion cut off at the token limit; then only what is stated in full counts.
        prompt_opens_thought: The prompt ends inside a thought, which the completion continues.

    Raises:
        ValueError: The answer format is unknown.
    """
    answer_format = resolved(answer_format, question)
    part = answer_part(text, question.question, prompt_opens_thought=prompt_opens_thought)
    if not part:
        return None
    marked, complete = with_marks(part), finish_reason != "length"
    if answer_format == "letter":
        return letter_answer(marked, question.choices or (), complete=complete)
    if answer_format == "number":
        return number_answer(marked, complete=complete)
    return short_answer(marked, question.question, members(question), complete=complete)


def resolved(answer_format: AnswerFormat, question: Question) -> Literal["letter", "number", "short"]:
    """The format that ``auto`` means for a question.

    Raises:
        ValueError: The answer format is unknown.
    """
    check_choice("answer_format", answer_format, AnswerFormat)
    if answer_format == "auto":
        return "letter" if question.choices else "short"
    return answer_format


@cache
def parser_sha256() -> str:
    """Hash of the parser's source files: completions that another version read are not compared with this one's."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(thoughts.__file__)]
    return sha256_text("".join(path.read_text(encoding="utf-8") for path in sources))
