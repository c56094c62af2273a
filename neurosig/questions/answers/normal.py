"""The comparable form of an answer."""

from __future__ import annotations

import re
import unicodedata

_ACCENT = re.compile("[\u0300-\u036f]")


def normalise(text: str) -> str:
    """Comparable form: compatibility characters, accents, case, articles, punctuation and number format dropped."""
    text = _ACCENT.sub("", unicodedata.normalize("NFKD", text)).casefold().replace("\u2212", "-")
    text = "".join(_comparable(char) for char in text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).replace(",", " ")
    text = re.sub(r"\.(?!\d)|(?<=[^\d\s$+-])\.|-(?!\$?\.?\d)|(?<=\w)-", " ", text)
    text = re.sub(r"^(?:(?:the|an|a) )+", "", " ".join(text.split()))
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
