"""Sentences of a completion, and what follows its explicit announcements of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

ANSWER_WORD = r"(?:\b(?:answer|antwort|réponse|reponse|respuesta|resposta|risposta|svar|ответ)\b|答案|答え|正解|回答|解答|정답|\b답)"
_IS = (
    r"(?:[:=]|\b(?:is|was|are|would\s+be|should\s+be|must\s+be|ist|lautet|est|es|è|é)\b(?:\s+(?:therefore|thus|clearly|simply|"
    r"indeed|actually|probably|likely|most\s+likely))?\s*:?|是|为|為|は|은|는)"
)
_QUALIFIER = r"(?:\s+(?:to|of|for)(?:\s+\w+){1,6}|\s+here|\s+therefore)?"
_ANNOUNCED = re.compile(rf"{ANSWER_WORD}{_QUALIFIER}\s*{_IS}[ \t]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’*)\]]*(?:\s|$)|[。！？]|\n")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Z]|St|Mt|Dr|Mr|Mrs|Ms|Prof|Jr|Sr|No|vs|approx|e\.g|i\.e|ca|U\.S|U\.K|D\.C)\.$"
)
MOST_TAILS, LONGEST_TAIL = 8, 500
"""Announcements that are read, the last ones, and characters of each."""


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that have a letter or digit."""
    parts, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        before = text[max(start, end.start() - 12) : end.start()]
        if _ABBREVIATION.search(before) and text[end.end() : end.end() + 1].strip() and "\n" not in end[0]:
            continue
        parts.append(text[start : end.end()].strip())
        start = end.end()
    parts.append(text[start:].strip())
    return [part for part in parts if any(char.isalnum() for char in part)]


def answer_tails(text: str) -> Iterator[str]:
    """What follows each announcement ("Answer: ...", "the answer is ..."), the last first: the rest of its line, or the
    next line where nothing follows."""
    for found in reversed(list(_ANNOUNCED.finditer(text))[-MOST_TAILS:]):
        tail = text[found.end() : found.end() + LONGEST_TAIL].lstrip().split("\n", 1)[0].strip()
        if tail:
            yield tail
