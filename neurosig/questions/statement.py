"""Where a completion states its answer: the statement's characters, and those of the answer's words in it.

The parser (`neurosig.questions.answers`) reads a rewritten text, so the place is found again in the completion's own:
the sentence in which the same parser, given that sentence alone, reads the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from string import ascii_lowercase
from typing import NamedTuple

from neurosig.questions.answers.extract import resolved
from neurosig.questions.answers.markup import MARK_OPEN, answer_part, with_marks
from neurosig.questions.answers.normal import normalise
from neurosig.questions.answers.sentences import answer_tails, sentences
from neurosig.questions.answers.spaces import canonical
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.questions.thoughts import thought_of

_WORD = re.compile(r"[-+]?\w+[+%]?")
MOST_WORDS, LONGEST_RUN = 200, 12
"""Words of a statement in which the answer is looked for, and of one answer."""


class AnswerPlace(NamedTuple):
    """Where a text states its answer; every span is ``(start, end)`` in characters, the end not included.

    Attributes:
        statement: The sentence that states it.
        words: The answer itself in that sentence; ``None`` where it is in other words, as a choice's letter may be.
    """

    statement: tuple[int, int]
    words: tuple[int, int] | None


def answer_place(text: str, answer: str | None, question: Question, reader: AnswerReader) -> AnswerPlace | None:
    """Where a completion states the answer that was read in it; ``None`` where that cannot be told.

    A marked or announced answer ("Answer: ...") comes before other sentences, the last one first; of the others the
    first counts in short answers, the last in letters and numbers, as in the parser.

    Args:
        text: The completion with its thought, if any; what is inside the thought is no statement.
        answer: What ``reader`` read in it, ``None`` without an answer.
        question: Its question; the gold answer is not used.
        reader: How it was parsed.
    """
    part = answer_part(text, question.question, prompt_opens_thought=reader.prompt_opens_thought)
    if not part or answer is None:
        return None
    begin = text.find(part, thought_of(text, prompt_opens_thought=reader.prompt_opens_thought).end)
    spans = list(_sentences(part))
    announced = [span for span in spans if _announces(part[slice(*span)])]
    others = [span for span in spans if span not in announced]
    in_order = resolved(reader.answer_format, question) == "short"
    ordered = [*reversed(announced), *(others if in_order else reversed(others))]
    found = next((span for span in ordered if _reads(part[slice(*span)], answer, question, reader)), None)
    words_in = partial(answer_words, answer=answer, question=question, first=True, most=MOST_WORDS)
    found = found or next((span for span in ordered if words_in(part[slice(*span)])), None)
    if found is None:
        return None
    words = words_in(part[slice(*found)])
    first = begin + found[0]
    return AnswerPlace((first, begin + found[1]), words and (first + words[0], first + words[1]))


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    end = 0
    for sentence in sentences(text):
        start = text.index(sentence, end)
        end = start + len(sentence)
        yield start, end


def _announces(sentence: str) -> bool:
    return MARK_OPEN in with_marks(sentence) or any(answer_tails(sentence.replace("**", "")))


def _reads(sentence: str, answer: str, question: Question, reader: AnswerReader) -> bool:
    return reader.extract(sentence, "stop", question) == answer


def answer_words(
    text: str, answer: str, question: Question, *, first: bool = False, most: int | None = None
) -> tuple[int, int] | None:
    """Where a parsed answer last is in a text, ``(start, end)`` in characters; ``None`` if it is not there.

    That is the shortest run of words that is a name of the answer, or with choices its letter, a capital before a small
    one.

    Args:
        text: A completion, or a part of it.
        answer: What the parser read in it.
        question: The question; with choices the answer is a letter.
        first: The first place instead.
        most: Look only at the first ``most`` words.
    """
    order = 0 if first else -1
    if question.choices:
        letters = (answer.upper(), answer) if answer in ascii_lowercase else ()
        found = ([*re.finditer(rf"(?<![^\W_]){letter}(?![^\W_])", text)] for letter in letters)
        return next((matches[order].span() for matches in found if matches), None)
    wanted = canonical(answer, question)
    words = [found.span() for found in _WORD.finditer(text)][:most]
    for last in range(len(words)) if first else reversed(range(len(words))):
        for begin in range(last, max(-1, last - LONGEST_RUN), -1):
            start, end = words[begin][0], words[last][1]
            if canonical(normalise(text[start:end]), question) == wanted:
                return start, end
    return None
