"""The words of a sentence that answer a question: those that stand where its answer stands and are not in the question.

Rules for English sentences of the forms "The capital of X is Y", "Y is the capital of X", "X has the symbol Y"; other
languages with spaces go the same way as far as their verbs of being are known. Source: reconstruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from neurosig.questions.answers.normal import normalise

MAX_ANSWER_WORDS = 6

_ADVERB = (
    r"(?:indeed|actually|typically|often|usually|simply|officially|currently|generally|commonly|also|probably|likely|just|now"
    r"|predominantly|primarily|mostly|mainly)"
)
_CLAUSE_END = re.compile(
    r"[,;:]|(?<!\w)\(|\s[-–—]\s|\b(?:and|or)\b(?!\s+[A-Z])"
    r"|\b(?:but|which|who|that|not|though|because|since|as|when|where|while|also)\b"
)
_PREDICATE = re.compile(
    r"(?<!that )(?<!which )(?<!who )\b(?:is|are|was|were|be|has|had|lies|means|becomes|belongs)\b", re.IGNORECASE
)
_OTHER_PREDICATE = re.compile(
    r"\b(?:called|ist|sind|war|heißt|lautet|est|sont|était|s'appelle|es|son|fue|è|sono|é|são|är|er)\b", re.IGNORECASE
)
# the next two lookbehinds start a match at a run's first character only: otherwise a long run takes quadratic time
WORD = re.compile(r"(?<![\w$%+'\u2019.\-])[\w$%+'\u2019.\-]*\w[\w$%+'\u2019]*(?:\([\w+\-]{1,8}\)\w*)*")
_OPEN, _CLOSE = '"*\u201c\u00ab\u2018\u300c', '"*\u201d\u00bb\u2019\u300d'
QUOTED = re.compile(rf"(?<![{_OPEN}])[{_OPEN}]+([^{_OPEN}{_CLOSE}]+?)[.,]?[{_CLOSE}]+")
_QUOTED_NEXT = re.compile(
    rf"^\s*(?:(?:{_ADVERB}|the|word)\s+)*[{_OPEN}']+([^{_OPEN}{_CLOSE}]+?)[.,]?[{_CLOSE}']+(?!\w)", re.IGNORECASE
)
_ASKED = re.compile(
    r"\bname\s+of\s+(?:the|this|an?)\s+(\w+)|^(?:what|which)\s+(?:is|are|was|were)\s+the\s+(?:\w+\s+){0,2}?(\w+)\s+(?:of|for|in)\b"
    r"|^(?:what|which)\s+(?:\w+\s+)??(\w+)\s+(?:has|is|was|did|do|does|are|have|can)\b|\bwhich\s+(\w+)\s*\?",
    re.IGNORECASE,
)
_LINK = re.compile(
    rf"^(?:\s*(?:(?:is|was|are|of|as|being|called|named|known\s+as|(?:denoted|represented)\s+(?:as|by)|written\s+as|(?:located|situated)\s+[io]n|the|"
    rf"{_ADVERB})\b|[:=]))+\s*",
    re.IGNORECASE,
)
_INDEFINITE = re.compile(rf"^\W*(?:{_ADVERB}\s+)*(?:a|an|one|part|not)\b", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"^\W*(?:i|i'm|i\u2019m|i'd|we|you|this|that|these|please|feel|while|although|if|when|in|to|from|at|on)\b",
    re.IGNORECASE,
)
"""Words that begin a remark or an aside, and no answer."""
_CONTRACTED = re.compile(r"\b(it|that|this|he|she|there|what)['\u2019]s\b", re.IGNORECASE)
_LABEL = re.compile(r"^\W*(?:A|sentence|response|reply|output|noun|verb)\s*:\s*", re.IGNORECASE)
_WH = re.compile(r"\b(?:which|what)\b", re.IGNORECASE)
_FORMULA = re.compile(r"(?=.*[A-Z])(?=.*[\d()])[A-Z(\[][A-Za-z0-9()\[\]+\-·]*")
_NAMING = re.compile(
    r"\b(?:named|called|(?:known|denoted|referred\s+to|abbreviated)\s+(?:as|by))\s+(?:as\s+)?(?!after|in\b|by\b|for\b|with\b)",
    re.IGNORECASE,
)
_SHAPES = {
    "symbol": re.compile(r"[A-Z][A-Za-z0-9]{0,5}"),
    "formula": re.compile(r"(?=.*\d|.*[A-Z].*[A-Z])[A-Z(\[][A-Za-z0-9()\[\]+\-·]*"),
}
"""Forms of what some nouns ask for; it is also found in brackets, or as the only such word."""
_BRACKETED = re.compile(r"\(([^\s()]{1,12}(?:\([^\s()]{1,8}\)[^\s()]{0,8})*)\)")
_JOINERS = frozenset({"of", "and", "the", "de", "la", "del", "du", "des"})
_FUNCTION = frozenset(
    """
    a an the of in on at to from by for with as its it this that there their one two
    is are was were be been being has have had do does did can could will would may which what who
    der die das den dem des ein eine von im le les un une el los il lo
    """.split()  # noqa: SIM905 (a list of sixty strings reads worse)
)
FILLER = _FUNCTION | frozenset(
    """
    located situated found considered known called named referred represented denoted abbreviated spelled written defined
    given used wrote discovered invented painted composed founded built made
    actually indeed typically often usually officially currently simply generally commonly also likely probably
    continent continental country nation state city town place capital language word term name person people
    official chemical element symbol formula compound number atomic past tense plural singular form opposite verb noun
    """.split()  # noqa: SIM905
)
"""Words that fill sentences and are no answer by themselves."""


def new_words(sentence: str, question: str, *, explicit: bool, known_space: bool) -> str:
    """The run of words that answers, or "" without one.

    Args:
        sentence: One sentence, or what a completion announces as its answer.
        question: The question's text; its words are no answer, but for a quoted one or one after "is".
        explicit: The completion announces ``sentence`` as its answer.
        known_space: The possible answers are known and the sentence has none of them; then it must be clear that it
            answers.
    """
    sentence = _after_colon(_LABEL.sub("", _CONTRACTED.sub(r"\1 is", sentence)))
    known = {normalise(word) for word in WORD.findall(question)}
    noun = asked_noun(question)
    predicate = _PREDICATE.search(sentence) or _OTHER_PREDICATE.search(sentence)
    if predicate is None:
        return _after_noun(sentence, noun, known) or _without_predicate(sentence, known, noun, explicit=explicit)
    subject, rest = sentence[: predicate.start()], sentence[predicate.end() :]
    if not (explicit or _is_about(sentence, subject, question, noun, known, least=2 if known_space else 1)):
        return ""
    if quoted := _QUOTED_NEXT.match(rest):
        return quoted[1]
    return (
        _after_noun(sentence, noun, known)
        or _in_predicate(
            subject, rest, known, noun, about_word=QUOTED.search(question) is not None, brief=not known_space
        )
        or _in_subject(subject, rest, known, noun)
        or (_by_shape(sentence, known, noun) if noun in _SHAPES else _after_naming(sentence, known))
    )


def asked_noun(question: str) -> str:
    """What is asked for: "capital" of "What is the capital of X?", "country" of "... of which country?", or ""."""
    found = _ASKED.search(question)
    return normalise(next(filter(None, found.groups()), "")) if found else ""


def _is_about(sentence: str, subject: str, question: str, noun: str, known: set[str], *, least: int) -> bool:
    """Whether a sentence speaks of what was asked: it has the asked noun, words of the question, its beginning, or a
    pronoun for its subject."""
    content = known - (FILLER if least > 1 else _FUNCTION)
    shared = {normalise(word) for word in WORD.findall(sentence)} & content
    opening = normalise(_WH.split(question)[0])
    begins = len(opening.split()) > 1 and f"{normalise(sentence)} ".startswith(f"{opening} ")
    return _has(sentence, noun) or len(shared) >= least or begins or not _content(subject)


def _after_colon(sentence: str) -> str:
    head, colon, tail = sentence.rpartition(": ")
    is_answer = colon and head.strip() and 0 < len(tail.split()) <= MAX_ANSWER_WORDS and not _PREDICATE.search(tail)
    return tail if is_answer else sentence


def _has(text: str, noun: str) -> bool:
    return bool(noun) and re.search(rf"\b{re.escape(noun)}\b", text, re.IGNORECASE) is not None


def _content(text: str) -> bool:
    """Whether a text has more than filling words, such as "It"."""
    return any(normalise(word) not in FILLER for word in WORD.findall(text))


def _new_quoted(text: str, known: set[str]) -> list[str]:
    return [quoted for quoted in QUOTED.findall(text) if (plain := normalise(quoted)) and plain not in known]


def _in_predicate(subject: str, rest: str, known: set[str], noun: str, *, about_word: bool, brief: bool) -> str:
    """The answer after "is": quoted, new, or, if the subject is what was asked for, whatever follows."""
    words = rest.strip(" .!").split()
    if _INDEFINITE.match(rest):
        is_brief = brief and not about_word and len(words) <= 3 and noun not in _SHAPES
        return rest if is_brief and not _asks(rest, known) and not _has(rest, noun) else ""
    quoted = _new_quoted(rest, known)
    if quoted and not _PREDICATE.search(rest[: rest.find(quoted[0])]):
        return quoted[0]
    if about_word and len(words) > 3:  # a question on a word: its answer is quoted, or stands alone
        return ""
    runs = _first_runs(rest, known, noun)
    if runs:
        return runs[-1]
    first = next(filter(_content, _CLAUSE_END.split(rest)), "").strip(" .!")
    is_asked = (
        _has(subject, noun) and not _has(first, noun) and noun not in FILLER - {"capital", "symbol", "formula", "name"}
    )
    is_fitting = 0 < len(first.split()) <= MAX_ANSWER_WORDS - 2 and not _NO_ANSWER.match(first)
    return first if is_asked and is_fitting else ""


def _in_subject(subject: str, rest: str, known: set[str], noun: str) -> str:
    """The answer before "is the capital of ..."."""
    if _INDEFINITE.match(rest) and not _has(rest, noun):
        return ""
    if _has(subject, noun) and not _has(rest, noun):
        return ""
    runs = _new_quoted(subject, known) or _first_runs(subject, known, noun)
    return runs[0] if runs and not _NO_ANSWER.match(subject) else ""


def _by_shape(sentence: str, known: set[str], noun: str) -> str:
    """The only word in brackets, or in the sentence, of the form that the noun asks for."""
    found = [text for text in _BRACKETED.findall(sentence) if _SHAPES[noun].fullmatch(text)]
    if not found and noun == "formula":
        found = [word for word in WORD.findall(sentence) if _FORMULA.fullmatch(word)]
    new = dict.fromkeys(text for text in found if normalise(text) not in known)
    return next(iter(new)) if len(new) == 1 else ""


def _after_noun(sentence: str, noun: str, known: set[str]) -> str:
    """The new words right after the asked noun: "symbol of Rb", "formula is H2O", "an element named copper"."""
    if not noun:
        return ""
    for found in re.finditer(rf"\b{re.escape(noun)}\b", sentence, re.IGNORECASE):
        linked = _LINK.match(sentence[found.end() :])
        rest = sentence[found.end() + (linked.end() if linked else 0) :].lstrip()
        clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
        quoted, word = QUOTED.match(rest), WORD.match(clause.lstrip(_OPEN + "'"))
        if word is None or normalise(word[0]) in known | FILLER | {""}:
            continue
        if linked is None and not quoted and not (word[0][:1].isupper() or word[0][:1].isdigit()):
            continue
        if noun in _SHAPES:
            return word[0]
        run = quoted[1] if quoted else next(iter(_new_runs(clause, known)), "")
        if run:
            return run
    return ""


def _after_naming(sentence: str, known: set[str]) -> str:
    """The new words after "named", "called" or "known as"."""
    for found in _NAMING.finditer(sentence):
        clause = _CLAUSE_END.split(sentence[found.end() :], maxsplit=1)[0]
        if (runs := _new_runs(clause, known)) and not _asks(clause, known):
            return runs[0]
    return ""


def _without_predicate(sentence: str, known: set[str], noun: str, *, explicit: bool) -> str:
    """The answer in a text without a verb of being: the text itself, its first clause, or the words after the
    question's ("plants absorb carbon dioxide")."""
    clauses = list(filter(str.strip, _CLAUSE_END.split(sentence)))
    first = clauses[0].strip() if clauses else ""
    if quoted := _QUOTED_NEXT.match(sentence):
        return quoted[1]
    if not _asks(first, known) and not _NO_ANSWER.match(first):
        is_whole = explicit or first == sentence.strip(" .!")
        is_fitting = explicit or noun not in _SHAPES or _SHAPES[noun].fullmatch(first)
        if len(first.split()) <= (MAX_ANSWER_WORDS if is_whole else 4) and is_fitting:
            return first
    if noun in _SHAPES:
        return _by_shape(sentence, known, noun)
    for clause in clauses:
        words = WORD.findall(clause)
        linked = [place for place, word in enumerate(words) if normalise(word) in known - FILLER]
        runs = _new_runs(" ".join(words[linked[-1] + 1 :]), known) if len(linked) > 1 else []
        if runs:
            return runs[0]
    return ""


def _asks(text: str, known: set[str]) -> bool:
    """Whether a short text has words of the question, so that it is a sentence and not the bare answer."""
    return any(normalise(word) in known - FILLER for word in WORD.findall(text))


def _first_runs(part: str, known: set[str], noun: str) -> list[str]:
    """The new runs of the first clause that has more than filling words."""
    clause = next(filter(_content, _CLAUSE_END.split(part)), "")
    return [run for run in _new_runs(clause, known) if noun not in _SHAPES or _SHAPES[noun].fullmatch(run)]


def _new_runs(clause: str, known: set[str]) -> list[str]:
    """Runs of words that are not in the question; a capitalised neighbour joins its run (South America)."""
    runs: list[list[str]] = [[]]
    new: list[bool] = [False]
    for word in WORD.findall(clause):
        plain, capital = normalise(word), word[:1].isupper() or word[:1].isdigit()
        is_new = bool(plain) and plain not in known and (plain not in FILLER or (capital and bool(runs[-1])))
        if is_new or (capital and plain not in FILLER):
            runs[-1].append(word)
            new[-1] |= is_new
        elif plain in _JOINERS and runs[-1] and runs[-1][0][:1].isupper():
            runs[-1].append(word)
        else:
            runs.append([])
            new.append(False)
    return list(_joined(runs, new))


def _joined(runs: list[list[str]], new: list[bool]) -> Iterator[str]:
    for run, fresh in zip(runs, new, strict=True):
        while run and normalise(run[-1]) in {*_JOINERS, ""}:
            run.pop()
        if run and fresh:
            yield " ".join(run)
