"""Gold answers in the form of a completion, and those that no completion can give."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neurosig.questions.answers.extract import extract_answer
from neurosig.questions.answers.grading import is_correct
from neurosig.runtime.cli import printable

if TYPE_CHECKING:
    from neurosig.questions.load import Question
    from neurosig.questions.reader import AnswerReader

log = logging.getLogger(__name__)

_MARKED = re.compile(r"####|\\boxed\{")


def is_completion(gold: str) -> bool:
    """Whether a gold answer is a worked solution with a marked result: ``3 + 4 = 7 #### 7``, ``\\boxed{7}``."""
    return _MARKED.search(gold) is not None


def parse_gold(gold: str, question: Question) -> str:
    """A gold answer that `is_completion`, or of a question with choices, parsed as a completion; any other, or one in
    which the parser finds nothing, as is."""
    answer = extract_answer(gold, question) if is_completion(gold) or question.choices else None
    if answer is None:
        return gold
    return answer.upper() if question.choices else answer


def warn_of_unreachable_gold(questions: Sequence[Question], reader: AnswerReader) -> None:
    """Warn of the gold answers that `unreachable_gold` names, with their number and the first."""
    lost = unreachable_gold(questions, reader)
    if lost:
        log.warning(
            "%d of %d gold answers are in no form that the parser returns, so every answer to them counts as wrong; "
            'the first is "%s" of question "%s": shorten it, add aliases, or give another --answer-format',
            *(len(lost), len(questions), printable(lost[0].answer or "")[:60], lost[0].id),
        )


def unreachable_gold(questions: Iterable[Question], reader: AnswerReader) -> list[Question]:
    """The questions none of whose gold answers the parser finds in a completion that states it.

    A parser of the user's own is not judged: only its author knows which completions it reads.

    Raises:
        ValueError: A question has no gold answer.
    """
    if reader.answer_parser is not None:
        return []
    plain = replace(reader, prompt_opens_thought=False)
    return [
        question
        for question in questions
        if not any(
            is_correct(plain.extract(text, "stop", question), question)
            for gold in (question.answer or "", *question.aliases)
            for text in (gold, f"Answer: {gold}")
        )
    ]
