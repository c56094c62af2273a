"""From a completion to an answer, from K answers to a vote.

Letters, numbers and short free-form text. Parsing never sees a gold answer: it reads the completion, the question's
text and its choices. What cannot be parsed is ``None``, which never wins a vote and stays in its denominator.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from neurosig.questions import Question

AnswerFormat = Literal["auto", "letter", "number", "short"]
MAX_ANSWER_WORDS = 6

_MARKER = re.compile(r"(?:\\boxed\{([^{}]*)\}|####\s*(.+)|\banswer\b(?:\s+is)?\s*:\s*\**(.+))", re.IGNORECASE)
_LETTER_SAID = re.compile(
    r"\b(?:answer|choice|option)\b(?:\s+\w+){0,3}?\s*[:=]?\s*\**\(?([A-Z])\b(?![a-z'])|^\W*\(?([A-Z])(?:[).:,]|\s*$)"
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”*]*(?:\s|$)|\n")
_CLAUSE_END = re.compile(
    r"[,;:(]|\b(?:and|or)\b(?!\s+[A-Z])|\b(?:but|which|who|that|not|though|because|since|as|when|where|while|also)\b"
)
_PREDICATE = re.compile(r"\b(?:is|are|was|were|be|has|had|lies|means|becomes|called|belongs)\b", re.IGNORECASE)
_WORD = re.compile(r"[\w$%+'\u2019.\-]*\w[\w$%+'\u2019]*")
_QUOTED = re.compile(
    r"[\"*\u201c\u00ab\u2018]+([^\"*\u201c\u201d\u00ab\u00bb\u2018\u2019]+?)[.,]?[\"*\u201d\u00bb\u2019]+"
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


@dataclass(frozen=True, slots=True)
class Vote:
    """A majority vote over K answers.

    Attributes:
        winner: The winning candidate, ``None`` when no answer could be parsed.
        count: Its votes.
        tied: All candidates with that many votes, sorted; more than one means a tie.
        n: K, non-answers included.
    """

    winner: str | None
    count: int
    tied: tuple[str, ...]
    n: int

    @property
    def share(self) -> float:
        """Confidence: votes of the winner over all K samples."""
        return self.count / self.n


def extract_answer(text: str, question: Question, answer_format: AnswerFormat = "auto") -> str | None:
    """The answer a completion gives, normalised for voting; ``None`` when it gives none.

    Args:
        text: Decoded completion. Text before a closing ``</think>`` is ignored.
        question: The question it answers; its text and choices are used, its gold answer never.
        answer_format: ``auto`` is ``letter`` when the question has choices, else ``short``.
    """
    text = text.rpartition("</think>")[2].strip()
    if not text:
        return None
    if answer_format == "letter" or (answer_format == "auto" and question.choices):
        return _letter(text, question.choices or ())
    if answer_format == "number":
        return _number(text)
    return _short(text, question.question)


def majority_vote(answers: Sequence[str | None], question_id: str) -> Vote:
    """Vote over K answers.

    Ties are decided by a hash of (question id, candidate), so the order of the answers does not matter.

    Raises:
        ValueError: There are no answers to vote over.
    """
    if not answers:
        raise ValueError("a vote needs at least one answer")
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0, (), len(answers))
    most = max(counts.values())
    tied = tuple(sorted(candidate for candidate, count in counts.items() if count == most))
    winner = min(tied, key=lambda candidate: hashlib.sha256(f"{question_id}\x00{candidate}".encode()).digest())
    return Vote(winner, most, tied, len(answers))


def is_correct(answer: str | None, question: Question) -> bool:
    """Whether a parsed answer equals the gold answer or one of its aliases. For evaluation only.

    Raises:
        ValueError: The question carries no gold answer.
    """
    if question.answer is None:
        raise ValueError(f"question {question.id} has no gold answer")
    return answer is not None and answer in {normalise(gold) for gold in (question.answer, *question.aliases)}


def normalise(text: str) -> str:
    """Comparable form: compatibility characters, accents, case, articles, punctuation and number format dropped."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in text if not unicodedata.combining(char)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"[^\w\s.+%$/-]|(?<!\d)\.|\.(?!\d)", " ", text).replace("-", " " if text[:1] != "-" else "-")
    text = re.sub(r"^(?:(?:the|an|a)\s+)+", "", " ".join(text.split()))
    number = re.fullmatch(r"\$?([-+]?\d+)(?:\.0+)?", text)
    return str(int(number[1])) if number else text


def _letter(text: str, choices: Sequence[str]) -> str | None:
    letters = string.ascii_uppercase[: len(choices) or 26]
    marked = _MARKER.findall(text)
    tail = next((part for part in marked[-1] if part), "").strip("*() .") if marked else ""
    for said in ([tail[:1]] if re.match(r"[A-Z]\b", tail) else []) + [a or b for a, b in _LETTER_SAID.findall(text)][
        -1:
    ]:
        if said in letters:
            return normalise(said)
    named = [
        letter for letter, choice in zip(letters, choices, strict=False) if normalise(choice) == normalise(tail or text)
    ]
    return normalise(named[0]) if len(named) == 1 else None


def _number(text: str) -> str | None:
    marked = [part for groups in _MARKER.findall(text) for part in groups if part]
    numbers = _NUMBER.findall(marked[-1] if marked else text)
    return normalise(numbers[0 if marked else -1]) if numbers else None


def _short(text: str, question: str) -> str | None:
    """The part of the first sentence that the question did not already say."""
    if _REFUSAL.search(text):
        return None
    marked = next((part for groups in _MARKER.findall(text) for part in groups if part), None)
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
    """Runs of words that the question does not say; a capitalised neighbour belongs to its run (South America)."""
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
