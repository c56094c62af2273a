"""Chemical symbols and formulas: answers that are known by their form."""

from __future__ import annotations

import re

from neurosig.questions.answers.question_form import ADVERB, OPEN, WORD, QuestionForm

_SYMBOL, _FORMULA = r"[A-Z][A-Za-z0-9]{0,5}", r"(?=[^\s,;]*(?:\d|[A-Z][^\s,;]*[A-Z]))[A-Z(\[][A-Za-z0-9()\[\]+\-·^]*"
SHAPES = {"symbol": re.compile(_SYMBOL), "formula": re.compile(_FORMULA)}
"""Forms of what some nouns ask for; these are also found in brackets, or as the only such word."""
SHAPE_NEXT = {
    noun: re.compile(rf"^\s*(?:{ADVERB}\s+|chemical\s+|the\s+)*[{OPEN}'(]*({shape})(?![\w-])")
    for noun, shape in (("symbol", _SYMBOL), ("formula", _FORMULA))
}
_BRACKETED = re.compile(r"(?<!\w)\(([^\s()]{1,12}(?:\([^\s()]{1,8}\)[^\s()]{0,8})*)\)")
_ROMAN = re.compile(r"[IVX]+")
LONGEST_SYMBOL = 10
COMPOSED = re.compile(r"\b(?:(?:largely|mainly|primarily)\s+)?(?:composed|consists?|made|contains?|combination)\b")
"""What a thing is made of is not what it is called."""


def by_shape(sentence: str, form: QuestionForm) -> str:
    """The only word in brackets, or in the sentence, of the form that the noun asks for."""
    if COMPOSED.search(sentence):
        return ""
    shape = SHAPES[form.noun]
    found = [text for text in _BRACKETED.findall(sentence) if shape.fullmatch(text) and not _ROMAN.fullmatch(text)]
    if not found and form.noun == "formula":
        found = [word for word in WORD.findall(sentence) if shape.fullmatch(word) and any(map(str.isdigit, word))]
    new = dict.fromkeys(text for text in found if form.is_new(text))
    return next(iter(new)) if len(new) == 1 else ""
