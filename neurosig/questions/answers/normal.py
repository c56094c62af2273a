"""The comparable form of an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_ACCENT = re.compile("[\u0300-\u036f]")
_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = rf"(?:{'|'.join((*_TENS, *reversed(_UNITS), *_MULTIPLES))})"
WRITTEN_NUMBER = re.compile(rf"(?<![\w-]){_WORD}(?:(?:\s+and)?[\s-]+{_WORD})*(?![\w-])", re.IGNORECASE)
"""A number in English words, such as "forty-two" or "one hundred and five"."""


def normalise(text: str) -> str:
    """Comparable form: compatibility characters, accents, case, articles, punctuation and number format dropped."""
    text = _ACCENT.sub("", unicodedata.normalize("NFKD", text)).casefold().replace("\u2212", "-")
    text = "".join(_comparable(char) for char in text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).replace(",", " ")
    text = re.sub(r"\.(?!\d)|(?<=[^\d\s$+-])\.|-(?!\$?\.?\d)|(?<=\w)-", " ", text)
    text = re.sub(r"^(?:(?:the|an|a) )+", "", " ".join(text.split()))
    if WRITTEN_NUMBER.fullmatch(text) and (value := written_number(text)) is not None:
        return value
    if ratio := re.fullmatch(r"(-?\d{1,9})/(\d{1,9})", text):
        return decimal(Fraction(int(ratio[1]), int(ratio[2]))) if int(ratio[2]) else text
    number = re.fullmatch(r"(?:\$?([-+]?)|([-+])\$)(\d*)(?:\.(\d+))?", text)
    if number is None or not (number[3] or number[4]):
        return unicodedata.normalize("NFC", text)
    sign, whole, fraction = number[1] or number[2] or "", number[3].lstrip("0") or "0", (number[4] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if sign == "-" and value != "0" else value


def _comparable(char: str) -> str:
    """Keep letters, combining marks and the punctuation of numbers and names; digits become ASCII, the rest a space."""
    if char in ".,+%$/-_" or unicodedata.category(char)[0] in "LM":
        return char
    return str(unicodedata.decimal(char, char if char.isnumeric() else " "))


def decimal(value: Fraction) -> str:
    """A number as digits where they end ("0.75", "-3"), else as a fraction in lowest terms ("1/3")."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    if not places:
        return str(value.numerator)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def written_number(words: str) -> str | None:
    """The digits of a number in English words; ``None`` for words that form none, such as "two three"."""
    total = group = 0
    room = 1000  # the next word of a group is smaller: a unit after tens, nothing after a unit
    for word in re.split(r"(?:\s+and)?[\s-]+", words.casefold().strip()):
        if word == "hundred" and group < 10:
            group, room = max(group, 1) * 100, 100
        elif word in _MULTIPLES and word != "hundred":
            total, group, room = total + max(group, 1) * _MULTIPLES[word], 0, 1000
        elif _WORDS.get(word, room) < room:
            group += _WORDS[word]
            room = 10 if _WORDS[word] >= 20 else 1
        else:
            return None
    return str(total + group)


def contained(words: str, text: str) -> Iterator[int]:
    """Where normalised ``words`` occur as whole words in a normalised text with a space at both ends."""
    place = text.find(f" {words} ")
    while place >= 0:
        yield place + 1
        place = text.find(f" {words} ", place + 1)
