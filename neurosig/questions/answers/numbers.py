"""The number that a completion gives: thousands in all scripts, fractions, powers, percentages, words, LaTeX.

Numbers that plain arithmetic cannot read, such as roots, need the extra ``math`` (math-verify); without it a completion
that marks one gives no answer rather than a part of it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction

from neurosig.questions.answers.markup import marked, unmarked, without_emphasis
from neurosig.questions.answers.normal import WRITTEN_NUMBER, decimal, normalise, written_number
from neurosig.questions.answers.sentences import answer_tails, sentences

_SPACE = "\u00a0\u2009\u202f\u2007 "
_GROUPED = (
    rf"(?:\d{{1,3}}(?:[,'’{_SPACE}]\d{{3}})+(?!\d)"  # 1,000 1'000 1 000
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"  # 12,34,567
    r"|\d{1,3}(?:\.\d{3}){2,}(?![.\d])|\d+)"  # 1.000.000
)
_DECIMAL_COMMA = r"(?<!\d,)(?:\d{1,3}(?:\.\d{3})+|\d+),\d{1,2}(?![\d,])"  # 1.234,50 3,5
_PLAIN = rf"(?:{_DECIMAL_COMMA}|{_GROUPED}(?:\.\d+)?|(?<![\d.])\.\d+)"
_NUMBER = re.compile(
    rf"(?<![A-Za-z_])(?P<sign>(?<![\w)\]])[-+])?(?P<whole>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d{{1,4}})(?!\w))?"
    r"(?:\s*\^\s*[({]?(?P<power>[-+]?\d{1,4})[)}]?)?"
    r"(?:\s*(?:[*x×·]|\\times|\\cdot)\s*10\s*\^\s*[({]?(?P<ten>[-+]?\d{1,4})[)}]?)?"
    rf"(?:\s*/\s*(?P<divisor>-?{_PLAIN})(?![\d/]))?"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion|trillion|[十百千万萬亿億兆])(?![A-Za-z]))?"
)
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "十": 1, "百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8, "兆": 12,
}  # fmt: skip
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_MIXED = re.compile(r"(?<![\d/.,])(\d{1,6})\s+(\d{1,6})/(\d{1,6})(?![\d/])")
_LEADING_MINUS = re.compile(r"^\s*-\s+(?=[\d.])")
"""A minus sign where no list can begin."""
_SPACED_MINUS = re.compile(r"(?<=[=≈({:])\s*-\s+(?=[\d.])")
_MINUS_WORD = r"(?<![\d)\]}])(?<![\d)\]}]\s)(?<!\b[A-Za-z]\s)\b(?:minus|negative)\s+"
_WRITTEN_MINUS = re.compile(rf"{_MINUS_WORD}(?=[$€£]?[\d.])", re.IGNORECASE)
_WRITTEN = re.compile(rf"(?P<minus>{_MINUS_WORD})?(?P<words>{WRITTEN_NUMBER.pattern})", re.IGNORECASE)
_DASH = re.compile(r"(?<![\w)\]])[–—](?=\d)")
_EQUALS = re.compile(r"=|\\approx|≈|\\to|\\rightarrow|→")
_ASIDE = re.compile(
    r"\b(?:out\s+of|instead\s+of|rather\s+than|compared\s+(?:to|with)|after|before|per|than|of|in|within|for|every|each|over|"
    r"during|by|at)\s+(?:the\s+|a\s+|an\s+)?(?:\w+\s+)?\W{0,3}$",
    re.IGNORECASE,
)
_UNREAD = re.compile(r"\\(?!times|cdot|frac|dfrac|tfrac|cfrac|div|approx|to|rightarrow|pm|%|\$|#)[A-Za-z]+|[∞√π]")
_BRACKETS = re.compile(r"\([^()]*\)")
_EMPHASISED = re.compile(r"\*\*([^*\n]+)\*\*")
MAX_DIGITS, MAX_EXPONENT = 60, 60
"""Of numbers that are computed with; longer ones count as they are written."""
LONGEST_EXPRESSION = 120
_TOWER = re.compile(r"\^[^^]*\^|\^\s*\{?\d{4}|!")  # powers of powers, large powers and factorials take for ever


def number_answer(text: str, *, complete: bool) -> str | None:
    """The number that a completion gives, as `neurosig.questions.answers.normal.decimal` writes it.

    The last mark counts (``\\boxed``, ``####``, ``answer:``), else the last sentence with a number: in an equation the
    value after the last equals sign, and rather the emphasised number than one in an aside ("out of 72").

    Args:
        text: The completion after `neurosig.questions.answers.markup.with_marks`.
        complete: The completion was not cut off; of a cut-off one only marked numbers count, unless they end it.
    """
    for content in (_LEADING_MINUS.sub("-", part) for part in marked(text)):
        if _UNREAD.search(content) or number_in(content) is not None:
            return _expression(content) if _UNREAD.search(content) else number_in(content)
    plain = unmarked(text)
    for tail in answer_tails(without_emphasis(plain)):
        found = number_in(_LEADING_MINUS.sub("-", sentences(tail)[0] if sentences(tail) else tail), first=True)
        if found is not None:
            ends = not complete and plain.rstrip().endswith(tail) and tail[-1:].isdigit()
            return None if ends else found
    if not complete:
        return None
    for sentence in reversed(sentences(plain)):
        emphasised = [part for part in _EMPHASISED.findall(sentence) if number_in(part) is not None]
        found = number_in(emphasised[-1] if emphasised else without_emphasis(sentence))
        if found is not None:
            return found
    return None


def numbers_in(text: str) -> list[str]:
    """All numbers of a text, in order, as `decimal` writes them."""
    return [value for found in _matches(_digits(text)) if (value := _value(found)) is not None]


def number_in(text: str, *, first: bool = False, asides: bool = True) -> str | None:
    """The value that a sentence or an expression states, as `number_answer` says.

    Args:
        text: One sentence or expression.
        first: Of several equals take the first; default: the last.
        asides: Take a number in brackets where there is no other.
    """
    right = _EQUALS.split(_digits(text))
    part, is_equation = right[-1], len(right) > 1
    if is_equation and not _matches(part):
        part = next((side for side in reversed(right) if _matches(side)), "")
    outside = _BRACKETS.sub(" ", part)
    found = _matches(outside) or (_matches(part) if asides else [])
    main = [match for match in found if not _ASIDE.search(match.string[max(0, match.start() - 40) : match.start()])]
    chosen = main or found
    if chosen:
        return _value(chosen[0 if first or is_equation else -1])
    words = list(_WRITTEN.finditer(text))
    return _written(words[0 if first else -1]) if words else None


def _written(found: re.Match[str]) -> str | None:
    value = written_number(found["words"])
    return f"-{value}" if found["minus"] and value not in (None, "0") else value


def _matches(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(text))


def _digits(text: str) -> str:
    """ASCII digits, minus signs, and fractions as a/b."""
    text = _FRACTION.sub(_ratio, text.replace("{,}", ","))
    text = (
        text.replace("\u2212", "-")
        .replace("\u2044", "/")
        .replace("\\div", "/")
        .replace("÷", "/")
        .replace("\u066c", ",")
    )
    text = text.replace("\u066b", ".").replace("\uff0c", ",")
    text = "".join(str(unicodedata.decimal(char, char)) for char in text)
    text = _WRITTEN_MINUS.sub("-", _SPACED_MINUS.sub("-", text))
    return _MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", _DASH.sub("-", text))


def _ratio(found: re.Match[str]) -> str:
    """A LaTeX fraction as a/b, apart from a number before it, but not from its sign."""
    before = found.string[: found.start()][-1:]
    return f"{' ' if before.isalnum() else ''}{found[1] or found[2]}/{found[3] or found[4]} "


def _value(found: re.Match[str]) -> str | None:
    """The canonical text of a number; ``None`` for one too large to write out, or with divisor 0."""
    whole, sign = found["whole"], -1 if found["sign"] == "-" else 1
    exponents = [int(found[name] or 0) for name in ("exponent", "power", "ten")]
    if len(whole) > MAX_DIGITS or any(abs(exponent) > MAX_EXPONENT for exponent in exponents):
        is_plain = found.group() in (whole, f"{found['sign']}{whole}")
        return normalise(found.group()) if is_plain else None
    exponent, power, ten = exponents
    value = _fraction(whole)
    if (power < 0 and not value) or (found["divisor"] and not _fraction(found["divisor"])):
        return None
    value = sign * value ** (power if found["power"] else 1) * Fraction(10) ** (exponent + ten)
    value /= _fraction(found["divisor"]) if found["divisor"] else 1
    return decimal(value * 10 ** _SCALES.get((found["scale"] or "").lower(), 0))


def _fraction(text: str) -> Fraction:
    """The value of digits with separators; a comma before one or two last digits is a decimal comma."""
    plain = re.sub(rf"['’{_SPACE}]", "", text)
    if re.fullmatch(r"-?(?:\d{1,3}(?:\.\d{3})+,\d+|\d+,\d{1,2}|\d{1,3}(?:\.\d{3}){2,})", plain):
        plain = plain.replace(".", "").replace(",", ".")
    return Fraction(plain.replace(",", ""))


def _expression(content: str) -> str | None:
    """An expression that only a computer algebra system reads, in that system's own form; ``None`` without one."""
    if len(content) > LONGEST_EXPRESSION or _TOWER.search(content):
        return None
    try:
        from math_verify import LatexExtractionConfig, parse
        from sympy import sympify
    except ImportError:
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that parsing has no time limit; see _TOWER
    parsed = parse(f"${content}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    value = str(sympify(str(parsed[0]))) if parsed and not isinstance(parsed[0], str) else None
    return value if value is None else normalise(value) if value.isdigit() else value.replace(" ", "")
