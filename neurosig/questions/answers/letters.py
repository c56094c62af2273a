"""The letter that a completion chooses, or the choice whose text it gives.

Statements are read from the most to the least explicit; the last of the most explicit ones counts. A statement that
names several letters is no answer, and a mention that is denied ("not A", "B is wrong") never counts. The one phrase
read as its benchmark reads it is MMLU-Pro's "the answer is (A)": the first letter after it counts
(TIGER-AI-Lab/MMLU-Pro, `evaluate_from_api.py`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from neurosig.questions.answers.markup import marked, unmarked, without_emphasis
from neurosig.questions.answers.normal import contained, normalise
from neurosig.questions.answers.sentences import ANSWER_WORD, answer_tails, sentences

_WORD = "[A-Za-zÀ-ɏ0-9_]"  # no \w: a letter may follow Chinese or Japanese without a space
_LETTER = rf"(?<!{_WORD})[\s\"'“‘(\[{{<]{{0,6}}(?<!{_WORD})(?P<letter>[A-Za-z])(?!{_WORD})(?!['’]\w)(?!-\w)"
_LINK = (
    r"(?:is|was|be|would|should|must|will|could|to|this|that|the|question|problem|correct|right|best|most|likely|"
    r"probably|definitely|clearly|therefore|thus|hence|indeed|actually|simply|here|given|above|below|options?|choices?|"
    r"letter|answer|final|my|our|of|in|case|I|we|think|believe|choose|select|as|follows|only|from|among|"
    r"ist|lautet|die|der|das|buchstabe|est|la|le|lettre|es|é|è|letra|lettera|correcte|correcta|"
    r"correta|richtige|richtig|вариант)"
)
_HEAD = (
    rf"(?:{ANSWER_WORD}|\b(?:correct|right|best|final|proper|appropriate|richtige|korrekte|bonne|correcta)\s+"
    r"(?:options?|choice|letter|one|response|selection|statement|auswahl|option|opción))"
)
_EXPLICIT = (
    re.compile(rf"{_HEAD}(?:[\s,]+{_LINK}\b){{0,8}}\s*[:=]*\s*(?:option|choice|选项|選項)?{_LETTER}", re.IGNORECASE),
    re.compile(
        rf"{_LETTER}[)\].:\"']*\s+(?:is|would\s+be|must\s+be|ist|est|es)\s+(?:(?:therefore|thus|clearly|the|most|best|"
        r"likely|only|definitely|probably|la|le|die)\s+)*(?:correct|right|best|answer|true|richtig|bonne|correcte?|correcta)\b",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?:答案|正解|答え|回答|解答|正确选项|正確選項|应选|應選|所以选|故选|选择|選択|选|選|정답|답)"
        rf"(?:应该|應該|应|應|是|为|為|は|选|選|项|項|选项|選項|은|는|\s|[:：])*{_LETTER}"
    ),
    re.compile(
        rf"{_LETTER}[)\]]*\s*(?:选项|選項|项|項)?\s*(?:が|は|是|이|가|은|는)?\s*(?:最も)?(?:正しい|正解|正确|正確|对的|對的|맞|정답)"
    ),
)
_ASKED = re.compile(r"[)\]\"']*\s*[?？]\s*\S")
"""After a letter that the completion itself asks about, and goes on."""
_RIGHT_TEXT = re.compile(
    r"\b(?:is|was|would be|must be)\s+(?:the\s+)?(?:right|correct|best)(?:\s+(?:answer|choice|option|one))?\b",
    re.IGNORECASE,
)
_WEAK = re.compile(
    r"\b(?:options?|choice|letter|choose|choosing|chose|pick|picking|select|selecting|with|leaves|leaving|remains|it\s+is|"
    rf"it's|must\s+be|would\s+be|be|is|to)\s*:?\s*(?:option|choice|letter)?{_LETTER}",
    re.IGNORECASE,
)
_LEAD = re.compile(rf"^\W*{_LETTER}(?:\s*[).:\]}}\"'>]+|\s+[-–—]\s|\s*$)")
_AND = re.compile(
    r"[)\]}\"'>.]*\s*(?P<sign>,|/|&|;|\band\b|\bor\b|\bund\b|\boder\b|\bet\b|\bou\b|\by\b|和|或|、|と)\s*(?:both\s+|either\s+)?"
    rf"(?:option\s*|choice\s*|or\s+|and\s+)?{_LETTER}",
    re.IGNORECASE,
)
_BARE = re.compile(_LETTER)
_DENIED = re.compile(
    r"(?:\bnot|n't|n’t|\bcannot|\bnever|\bneither|\bnor|\bexcept|\brul(?:e|es|ed|ing)\s+out|\beliminat\w+|\bexclud\w+|\breject\w*|"
    r"\bnicht|\bpas|不是|并非)\s+(?:be\s+|is\s+)?(?:the\s+)?(?:answer\s+|option\s+|choice\s+|correct\s+)*\W*$",
    re.IGNORECASE,
)
_DISCUSSED = re.compile(
    r"[)\].:\"']*\s*(?:(?:is|was|are|does|do|did|has|have|says?|states?|describes?|refers?|represents?|suggests?|can|could|may|"
    r"might|would|will|seems?|isn't|isn’t|doesn't|doesn’t|cannot|can't|since|mentions?|involves?|implies)\b|不)",
    re.IGNORECASE,
)
_AFTER_WORD = re.compile(
    r"\s+(?:is|are|because|since|as|due|and|or|for|which|with|but|based|given|so|not|here|therefore|und|et)\b"
)
_DENIAL_WORDS = re.compile(r"\b(?:not|never|neither|nor|except|unlike|isn t|wasn t|nicht|kein\w*|pas)\b")  # normalised
_DENIED_AFTER = re.compile(  # normalised
    r" (?:(?:is|are|was|would be) (?:wrong|incorrect|false)"
    r"|(?:\w+ not|cannot|(?:isn|aren|wasn|can|couldn|wouldn) t)(?: be)?(?: the)? (?:correct|right|best|true|answer))\b"
)
_PRESENTING = frozenset(
    """
    thus so therefore hence then and but or not it is be must would should will i am i'd i'm we choose pick take say
    guess think go going with the that this my leaves leaving only final finally answer option choice letter definitely
    probably maybe clearly sure ich wähle je choisis elijo
    """.split()  # noqa: SIM905 (a list of sixty strings reads worse)
)
"""Words that may surround the one letter of a concluding sentence."""
_CONCLUDES = re.compile(
    r"\W*(?:so|thus|therefore|hence|overall|finally|in conclusion|also|daher|donc|因此|所以)\b", re.IGNORECASE
)
_FIVE_SHOT = re.compile(r"\banswer is \((?P<letter>[A-Z])\)")
_FIVE_SHOT_END = re.compile(
    r"\banswer is \([A-Z]\)[.\s]*?\n\s*\n\s*(?!wait|however|but|actually|correction|hmm|no\b"
    r"|let me|let's (?:re|double|check|verif)|on second|upon|sorry|i made|i apolog|therefore|thus|so\b)",
    re.IGNORECASE,
)
"""MMLU-Pro's phrase at the end of a paragraph: after it, a model that was shown solved examples writes further ones."""
MOST_STATEMENTS, LONGEST_SENTENCE = 50, 500
"""Statements that are read, the last ones, and characters of a sentence without one."""
CHOICE_SENTENCES = 3
"""Longer completions mention choices on the way, so only their last sentence may name the answer by its text."""


def letter_answer(text: str, choices: Sequence[str], *, complete: bool) -> str | None:
    """The lower-case letter of the choice that a completion gives.

    Args:
        text: The completion after `neurosig.questions.answers.markup.with_marks`.
        choices: Texts of the choices; () allows A to Z.
        complete: The completion was not cut off; of a cut-off one only explicit statements count.
    """
    letters = string.ascii_uppercase[: len(choices) or 26]
    for content in marked(text):
        found = _marked_letters(without_emphasis(content), letters, choices)
        if found:
            return _single(found)
    plain = without_emphasis(unmarked(text)).strip()
    if end := _FIVE_SHOT_END.search(plain):
        plain = plain[: end.end()].strip()
    for found in (_explicit(plain, letters), _lead(plain, letters), _tail_choice(plain, choices)):
        if found:
            return _single(found)
    if not complete:
        return None
    return _single(_weak(plain, letters) or _choice_text(plain, choices) or _bare(plain, letters))


def stated_letters(statement: str, letters: str) -> set[str]:
    """All letters that a statement has as choices, denied ones left out."""
    found = (_stated(match, letters) for match in _BARE.finditer(statement) if match["letter"].isupper())
    return {letter for some in found for letter in some}


def _single(found: set[str]) -> str | None:
    return next(iter(found)).lower() if len(found) == 1 else None


def _stated(found: re.Match[str], letters: str) -> set[str]:
    """The letters of one statement; empty for an article, a pronoun, a letter beyond the choices or a denied one."""
    letter, rest = found["letter"].upper(), found.string[found.end("letter") :][:80]
    before = found.string[max(0, found.start("letter") - 40) : found.start("letter")]
    if letter not in letters or _DENIED.search(before) or not _is_letter(found["letter"], rest):
        return set()
    also = _AND.match(rest)
    if also is None or not _is_letter(also["letter"], rest[also.end("letter") :]):
        return {letter}
    listed = also["sign"] in ",;" and _DISCUSSED.match(rest[also.end("letter") :])
    other = also["letter"].upper()
    return {letter} if listed or other not in letters else {letter, other}


def _is_letter(letter: str, rest: str) -> bool:
    """Whether ``letter`` before ``rest`` names a choice, and is no article, pronoun or variable."""
    if not rest or not rest[0].isspace() or not rest.strip():
        return True
    if letter in "AI":
        return rest[0] == "\n" or not re.match(r"\s+\w", rest) or _AFTER_WORD.match(rest) is not None
    return letter.isupper() or re.match(r"\s*(?:\n|[^\w\s])", rest) is not None


def _marked_letters(content: str, letters: str, choices: Sequence[str]) -> set[str]:
    lead = re.match(rf"\W*(?:(?:option|choice|answer|letter)\b\W*)?{_LETTER}", content, re.IGNORECASE)
    found = _stated(lead, letters) if lead else set()
    whole = found and lead is not None and not re.match(r"\s+\w", content[lead.end() :])
    return found if whole or len(found) > 1 else named_choices(content, choices) or found


def _explicit(text: str, letters: str) -> set[str]:
    """The last explicit statement ("the answer is C", "C is correct")."""
    matches = [found for pattern in _EXPLICIT for found in pattern.finditer(text)]
    matches += [found for found in _FIVE_SHOT.finditer(text) if found["letter"] in letters]
    matches.sort(key=lambda found: (found.start("letter"), found.re is _FIVE_SHOT))
    for found in reversed(matches[-MOST_STATEMENTS:]):
        if _ASKED.match(text[found.end("letter") :][:20]):
            continue
        if stated := {found["letter"]} if found.re is _FIVE_SHOT else _stated(found, letters):
            return stated
    return set()


def _lead(text: str, letters: str) -> set[str]:
    """The letter that begins the first line or the last; no answer when several lines list the choices."""
    lines = [line for line in text.split("\n") if line.strip()]
    leads = [(place, found) for place, line in enumerate(lines) if (found := _LEAD.match(line))]
    leads = [(place, found) for place, found in leads if not _is_pronoun(found, text) and _is_capital_or_bare(found)]
    if len({found["letter"] for _, found in leads}) > 1:
        leads = [item for item in leads if item[0] == 0 and len(leads) == 2 and _BARE.fullmatch(lines[0].strip())]
    for place, found in leads:
        if place in (0, len(lines) - 1) and (stated := _stated(found, letters)):
            return stated
    return set()


def _is_pronoun(found: re.Match[str], text: str) -> bool:
    """An I without a closing bracket or colon: "I", "I. do not know"."""
    return found["letter"] == "I" and not re.match(r"\s*[)\]:>]", found.string[found.end("letter") :])


def _is_capital_or_bare(found: re.Match[str]) -> bool:
    """A lower-case letter leads with a bracket, or alone on its line: "c)", "(c)", "c"."""
    after = found.string[found.end("letter") :].lstrip()
    return found["letter"].isupper() or after[:1] == ")" or not after.strip(".*\"' ")


def _weak(text: str, letters: str) -> set[str]:
    """The last mention as an option ("it is C", "I take option B") that is not merely discussed."""
    for found in reversed(list(_WEAK.finditer(text))[-MOST_STATEMENTS:]):
        if not _DISCUSSED.match(text[found.end("letter") :][:40]) and (stated := _stated(found, letters)):
            return stated
    return set()


def _bare(text: str, letters: str) -> set[str]:
    """The only letter of the last sentence, if the rest merely presents it ("Thus, C", "Not A, but C", "C, not A")."""
    last = next(iter(reversed(sentences(text))), "")[-LONGEST_SENTENCE:]
    found = [match for match in _BARE.finditer(last) if match["letter"].isupper() and not _is_pronoun(match, last)]
    stated = {letter for match in found for letter in _stated(match, letters)}
    others = set(re.findall(r"[^\W\d_]+(?:'\w+)?", _BARE.sub(" ", last).lower()))
    return stated if len(stated) == 1 and others <= _PRESENTING else set()


def _tail_choice(text: str, choices: Sequence[str]) -> set[str]:
    """The choice whose text follows the last ``answer:`` or "the answer is", or the only one before "is correct"."""
    parts = list(answer_tails(text))
    for found in reversed(list(_RIGHT_TEXT.finditer(text))[-MOST_STATEMENTS:]):
        clause = re.split(r"[.;:\n]", text[max(0, found.start() - LONGEST_SENTENCE) : found.start()])[-1]
        parts.append(clause)
    named = (named_choices(part, choices) for part in parts)
    return next(filter(None, named), set())


def _choice_text(text: str, choices: Sequence[str]) -> set[str]:
    """The only choice that the completion names, or that its conclusion does."""
    parts = sentences(text)
    named = named_choices(text, choices) if len(parts) <= CHOICE_SENTENCES else set()
    if len(named) == 1 or not parts:
        return named
    concludes = _CONCLUDES.match(parts[-1]) and parts[-1][-1:] in ".!。"
    return named_choices(parts[-1], choices) if concludes else set()


def named_choices(text: str, choices: Sequence[str]) -> set[str]:
    """Letters of the choices whose texts occur as whole words and are not denied; of nested texts the longest."""
    plain = f" {normalise(text)} "
    texts = [normalise(choice) for choice in choices]
    places = {index: list(contained(choice, plain)) for index, choice in enumerate(texts) if choice}
    named = set()
    for index, starts in places.items():
        longer = [
            (start, start + len(texts[other]))
            for other, found in places.items()
            if len(texts[other]) > len(texts[index])
            for start in found
        ]
        free = [s for s in starts if not any(low <= s and s + len(texts[index]) <= high for low, high in longer)]
        length = len(texts[index])
        if any(
            not _DENIAL_WORDS.search(plain[max(0, start - 20) : start])
            and not _DENIED_AFTER.match(plain, start + length)
            for start in free
        ):
            named.add(string.ascii_uppercase[index])
    return named
