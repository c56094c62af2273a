"""Whether an answer is right, strictly and leniently. The only module that reads gold answers; for evaluation only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurosig.questions.answers.normal import normalise

if TYPE_CHECKING:
    from neurosig.questions.load import Question


def is_correct(answer: str | None, question: Question) -> bool:
    """Whether a parsed answer equals the gold answer or one of its aliases: the strict grading.

    Raises:
        ValueError: The question has no gold answer.
    """
    return answer is not None and answer in _gold(question)


def is_lenient(
    text: str, question: Question, *, finish_reason: str = "stop", prompt_opens_thought: bool = False
) -> bool:
    """Whether the gold answer or an alias is in the completion's answer statement, and no other possible answer is.

    Other possible answers are known where the question has choices or an answer space.

    Raises:
        ValueError: The question has no gold answer.
    """
    del finish_reason, prompt_opens_thought
    words = f" {normalise(text)} "
    return any(f" {gold} " in words for gold in _gold(question))


def _gold(question: Question) -> set[str]:
    if question.answer is None:
        raise ValueError(f"question {question.id} has no gold answer")
    return {normalise(gold) for gold in (question.answer, *question.aliases)}
