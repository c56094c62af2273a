"""From a completion to the text of its answer: thoughts, further questions, LaTeX, Markdown, JSON and XML marks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from neurosig.questions.thoughts import thought_of

MARK_OPEN, MARK_CLOSE = "\u27e6", "\u27e7"
"""Brackets around what the completion itself marks as its answer: boxed, ``<answer>``, JSON, ``####``."""
MOST_MARKS = 8

_TURN = re.compile(
    r"(?:^|\n)[ \t#*]*(?P<head>(?:question|q|problem|frage|问题|問題|質問|human|user)[ \t]*\d*[*]*[ \t]*[:\uff1a])",
    re.IGNORECASE,
)
_ECHO = re.compile(r"[^\n]*")
_TURN_ROLE = re.compile(r"human|user", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_TAGGED = re.compile(r"<(answer|final_answer|final)>([^<]*)</\1>", re.IGNORECASE)
_JSON = re.compile(
    r"""["'](?:final_?answer|answer|choice|answer_?letter)["']\s*:\s*(?:"([^"\n]*)"|'([^'\n]*)'|([^\s,"'{}\]]+))""",
    re.I,
)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb)|operatorname|mbox|emph|boldsymbol|bm|underline)\*?"
    r"\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|big|Big|bigl|bigr)\b|\\[!,;: ]|(?<!\\)~")
_DELIMITER = re.compile(r"\\[()\[\]]|\\\$|(?<!\\)\$")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+"
)
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z)\]])_\{?(\d{1,3})\}?")
_VULGAR = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e](?![\u00bc-\u00be\u2150-\u215e]))")
"""Between a number and the one-character fraction that it is mixed with."""
_BLANKS, _BLANK_LINES = re.compile(r"[^\S\n]+"), re.compile(r"\n[ \n]*\n")
_BOLD = re.compile(r"\*\*|__|`+")
_ITALIC = re.compile(r"(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])")


def answer_part(text: str, question: str, *, prompt_opens_thought: bool) -> str | None:
    """The completion without its thought and without the further turns that a model writes after its answer.

    Returns:
        ``None`` when the thought is not closed: nothing after it is an answer.
    """
    text = text.strip()
    thought = thought_of(text, prompt_opens_thought=prompt_opens_thought)
    return None if thought.opened is not None else _first_turn(text[thought.end :].strip(), question)


def _first_turn(text: str, question: str) -> str:
    """Text up to a further question; an echo of the present one does not end the answer."""
    start = 0
    for turn in _TURN.finditer(text):
        line = _ECHO.match(text, turn.end())
        echo = line[0].strip(" *") if line else ""
        if echo and (echo in question or question.startswith(echo) or echo.startswith(question)):
            start = turn.end() + len(line[0]) if line else start
        elif text[start : turn.start()].strip():
            return text[start : turn.start()].strip()
    return text[start:].strip()


def with_marks(text: str) -> str:
    """The text with every marked answer in `MARK_OPEN` and `MARK_CLOSE` and without LaTeX and Markdown marks."""
    text = _TAGGED.sub(rf"\n{MARK_OPEN}\2{MARK_CLOSE}\n", _boxes(text))
    text = _JSON.sub(lambda found: f"\n{MARK_OPEN}{found[1] or found[2] or found[3] or ''}{MARK_CLOSE}\n", text)
    text = _HASHES.sub(rf"\n{MARK_OPEN}\1{MARK_CLOSE}\n", text)
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = _SUBSCRIPT.sub(r"\1", unicodedata.normalize("NFKC", _VULGAR.sub(" ", text)))
    for _ in range(3):
        text = _WRAPPED.sub(r"\1", text)
    text = _DELIMITER.sub("", _SPACING.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", _BLANKS.sub(" ", text))


def without_emphasis(text: str) -> str:
    """The text without Markdown's bold, italic and code marks; a star between digits stays."""
    return _ITALIC.sub("", _BOLD.sub("", text))


def marked(text: str) -> Iterator[str]:
    """Contents of the last marks of `with_marks`, the last first."""
    return (part.partition(MARK_CLOSE)[0] for part in reversed(text.split(MARK_OPEN)[1:][-MOST_MARKS:]))


def unmarked(text: str) -> str:
    """The text of `with_marks` without its brackets."""
    return text.replace(MARK_OPEN, "").replace(MARK_CLOSE, "")


def _boxes(text: str) -> str:
    """Every closed ``\\boxed{...}`` as a mark; of nested ones the outer."""
    parts, place = [], 0
    while found := _BOX.search(text, place):
        end = _closing_brace(text, found.end())
        if end is None:
            break
        parts += [text[place : found.start()], MARK_OPEN, _BOX.sub("{", text[found.end() : end]), MARK_CLOSE]
        place = end + 1
    return "".join([*parts, text[place:]])


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return place
    return None
