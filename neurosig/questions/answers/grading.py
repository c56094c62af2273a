"""Whether an answer is right, strictly and leniently. Reads gold answers; for evaluation only."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

from neurosig.questions.answers.extract import AnswerFormat, extract_answer, resolved
from neurosig.questions.answers.letters import named_choices, stated_letters
from neurosig.questions.answers.markup import answer_part, marked, unmarked, with_marks, without_emphasis
from neurosig.questions.answers.normal import normalise
from neurosig.questions.answers.numbers import number_answer, numbers_in
from neurosig.questions.answers.sentences import sentences
from neurosig.questions.answers.short_text import found_members, statements
from neurosig.questions.answers.spaces import canonical, members

if TYPE_CHECKING:
    from neurosig.questions.load import Question


def is_correct(answer: str | None, question: Question) -> bool:
    """Whether a parsed answer equals the gold answer or one of its aliases: the strict grading.

    Names of one member of the answer space are equal.

    Raises:
        ValueError: The question has no gold answer.
    """
    return answer is not None and canonical(answer, question) in _gold(question)


def is_lenient(
    text: str,
    question: Question,
    answer_format: AnswerFormat = "auto",
    *,
    finish_reason: str = "stop",
    prompt_opens_thought: bool = False,
) -> bool:
    """Whether the gold answer or an alias is in a completion's answer statement, and no other possible answer is.

    The statement is what the completion marks or announces as its answer, else its first sentence that could state
    one; of a letter, also the last. Words of the question do not count. Other possible answers are known where the
    question has choices or an answer space. What is strictly right counts.

    Args:
        text: See `neurosig.questions.answers.extract.extract_answer`, as for the other arguments.

    Raises:
        ValueError: The question has no gold answer.
    """
    gold = _gold(question)
    answer = extract_answer(
        text, question, answer_format, finish_reason=finish_reason, prompt_opens_thought=prompt_opens_thought
    )
    if answer is not None and canonical(answer, question) in gold:
        return True
    part = answer_part(text, question.question, prompt_opens_thought=prompt_opens_thought)
    if not part:
        return False
    kind, plain = resolved(answer_format, question), with_marks(part)
    if kind == "letter":
        return any(_letters_in(statement, question) == gold for statement in _letter_statements(plain))
    statement = next((statement for statement, _ in statements(plain)), "")
    if kind == "number":
        return bool(gold & set(numbers_in(without_emphasis(statement or plain))))
    found = {*found_members(statement, question.question, members(question))}
    if found:
        return bool(found & gold) and len(found) == 1
    stated, known = f" {normalise(statement)} ", f" {normalise(question.question)} "
    return any(f" {answer} " in stated and f" {answer} " not in known for answer in gold)


def _gold(question: Question) -> set[str]:
    if question.answer is None:
        raise ValueError(f"question {question.id} has no gold answer")
    return {canonical(form, question) for gold in (question.answer, *question.aliases) for form in _forms(gold)}


def _forms(gold: str) -> Iterator[str]:
    """A gold answer normalised, and, if it is LaTeX, as the parser of numbers reads it."""
    yield normalise(gold)
    if "\\" in gold and (number := number_answer(with_marks(rf"\boxed{{{gold}}}"), complete=True)):
        yield number


def _letter_statements(text: str) -> Iterator[str]:
    yield from marked(text)
    parts = sentences(without_emphasis(unmarked(text)))
    yield from (*parts[-1:], *parts[:1])


def _letters_in(statement: str, question: Question) -> set[str]:
    """Lower-case letters of the choices that a statement has by letter or by text."""
    letters = string.ascii_uppercase[: len(question.choices or ()) or 26]
    found = stated_letters(statement, letters) | named_choices(statement, question.choices or ())
    return {letter.lower() for letter in found if re.fullmatch("[A-Z]", letter)}
