"""Parse completions into answers: letters, numbers and short free-form text.

Parsing never sees a gold answer: it reads the completion, the question's text and its choices. A completion without an
answer gives ``None``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from neurosig.questions.answers.normal import normalise

if TYPE_CHECKING:
    from neurosig.questions.load import Question

AnswerFormat = Literal["auto", "letter", "number", "short"]
MAX_ANSWER_WORDS = 6

_MARKER = re.compile(
    r"(?:\\boxed\{(?:\\(?:text|math)\w*\{)?([^{}]*)\}|####\s*(.+)|\banswer\b(?:\s+is)?\s*:\s*\**(.+))", re.IGNORECASE
)
_LETTER = (  # most reliable pattern first; the last match of a pattern counts
    re.compile(r"\banswer\b(?:\s+\w+){0,3}?(?:\s*[:=])?\s*\**\(?\b([A-Z])\b(?!')"),
    re.compile(r"^\W*([A-Z])(?:[).:,]|\s*$)"),
    re.compile(r"\b(?:choice|option)\b(?:\s+\w+){0,3}?(?:\s*[:=])?\s*\**\(?\b([A-Z])\b(?!')"),
)
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_NEXT_QUESTION = re.compile(r"(?:^|\n)[ \t]*Question:")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”*]*(?:\s|$)|\n")
_CLAUSE_END = re.compile(
    r"[,;:(]|\b(?:and|or)\b(?!\s+[A-Z])|\b(?:but|which|who|that|not|though|because|since|as|when|where|while|also)\b"
)
_PREDICATE = re.compile(r"\b(?:is|are|was|were|be|has|had|lies|means|becomes|called|belongs)\b", re.IGNORECASE)
# the next two lookbehinds start a match at a run's first character only: otherwise a long run takes quadratic time
_WORD = re.compile(r"(?<![\w$%+'\u2019.\-])[\w$%+'\u2019.\-]*\w[\w$%+'\u2019]*")
_QUOTED = re.compile(
    r"(?<![\"*\u201c\u00ab\u2018])[\"*\u201c\u00ab\u2018]+"
    r"([^\"*\u201c\u201d\u00ab\u00bb\u2018\u2019]+?)[.,]?[\"*\u201d\u00bb\u2019]+"
)
_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i (?:do not|don'?t) know|i can(?:not|'t)|as an ai|unable to)\b",
    re.IGNORECASE,
)
_FILLER = frozenset(
    """
    a an the of in on at to from by for with as its it this that there their one two
    is are was were be been being has have had do does can could will would may
    located situated found considered known called named referred represented spelled written defined given
    actually indeed typically often usually officially currently simply generally commonly
    continent continental country nation state city town place capital language word term name person people
    official chemical element symbol formula compound number atomic past tense plural singular form opposite verb noun
    """.split()  # noqa: SIM905 (a list of eighty strings reads worse)
)


def extract_answer(
    text: str,
    question: Question,
    answer_format: AnswerFormat = "auto",
    *,
    finish_reason: str = "stop",
    prompt_opens_thought: bool = False,
) -> str | None:
    """The answer of a completion, normalised for voting; ``None`` without one.

    Args:
        text: Decoded completion. Text before a closing ``</think>`` is ignored, and so is a further question that the
            model writes after its answer (``--template plain``).
        question: Its question; text and choices are used, the gold answer never.
        answer_format: ``auto`` is ``letter`` when the question has choices, else ``short``.
    """
    del finish_reason, prompt_opens_thought
    text = _NEXT_QUESTION.split(text.rpartition("</think>")[2].strip())[0].strip()
    if not text:
        return None
    if answer_format == "letter" or (answer_format == "auto" and question.choices):
        return _letter(text, question.choices or ())
    if answer_format == "number":
        return _number(text)
    return _short(text, question.question)


def is_refusal(text: str) -> bool:
    """Whether a completion declines to answer.

    By phrase: "I'm sorry", "I am sorry", "I don't know", "I do not know", "I can't", "I cannot", "as an AI" or "unable
    to", in any case.
    """
    return _REFUSAL.search(text) is not None


def _letter(text: str, choices: Sequence[str]) -> str | None:
    letters = string.ascii_uppercase[: len(choices) or 26]
    marked = _marked(text)
    tail = (marked or "").strip("*() .")
    candidates = [tail.upper()] if len(tail) == 1 else re.findall(r"^([A-Z])\b(?!')", tail)
    for pattern in _LETTER:
        candidates += pattern.findall(text)[-1:]
    for letter in candidates:
        if letter in letters:
            return normalise(letter)
    named = [
        letter for letter, choice in zip(letters, choices, strict=False) if normalise(choice) == normalise(tail or text)
    ]
    return normalise(named[0]) if len(named) == 1 else None


def _marked(text: str) -> str | None:
    """The text after the last explicit marker (boxed, ####, ``answer:``)."""
    matches = _MARKER.findall(text)
    return next((part for part in matches[-1] if part), None) if matches else None


def _number(text: str) -> str | None:
    marked = _marked(text)
    numbers = _NUMBER.findall((text if marked is None else marked).replace("\u2212", "-"))
    return normalise(numbers[-1 if marked is None else 0]) if numbers else None


def _short(text: str, question: str) -> str | None:
    """The words of the first sentence that are not in the question."""
    marked = _marked(text)
    if _REFUSAL.search(text if marked is None else marked):
        return None
    if marked is not None:
        return _accept(_SENTENCE_END.split(marked.strip())[0])
    sentence = _SENTENCE_END.split(text)[0]
    known = {normalise(word) for word in _WORD.findall(question)}
    predicate = _PREDICATE.search(sentence)
    subject, rest = (sentence[: predicate.start()], sentence[predicate.end() :]) if predicate else ("", sentence)
    for part in (rest, subject):
        quoted = [normalise(match) for match in _QUOTED.findall(part)]
        new = [match for match in quoted if match and match not in known]
        if new:
            return _accept(new[0])
        runs = _new_runs(next(filter(str.strip, _CLAUSE_END.split(part)), ""), known)
        if runs:
            return _accept(runs[-1])
    return _accept(rest) if predicate else None


def _new_runs(clause: str, known: set[str]) -> list[str]:
    """Runs of words that are not in the question; a capitalised neighbour joins its run (South America)."""
    runs: list[list[str]] = [[]]
    new: list[bool] = [False]
    for word in _WORD.findall(clause):
        plain, capital = normalise(word), word[:1].isupper() or word[:1].isdigit()
        is_new = bool(plain) and plain not in known and (plain not in _FILLER or (capital and bool(runs[-1])))
        if is_new or (capital and plain not in _FILLER):
            runs[-1].append(word)
            new[-1] |= is_new
        elif plain in {"of", "and", "the", "de", "la"} and runs[-1] and runs[-1][0][:1].isupper():
            runs[-1].append(word)
        else:
            runs.append([])
            new.append(False)
    joined = []
    for run, fresh in zip(runs, new, strict=True):
        while run and normalise(run[-1]) in {"of", "and", "the", "de", "la", ""}:
            run.pop()
        if run and fresh:
            joined.append(" ".join(run))
    return joined


def _accept(text: str) -> str | None:
    answer = normalise(text)
    return answer if 0 < len(answer.split()) <= MAX_ANSWER_WORDS else None
