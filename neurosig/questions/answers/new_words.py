"""The words of a sentence that answer a question: those that stand where its answer stands and are not in the question.

Rules for English sentences of the forms "The capital of X is Y", "Y is the capital of X", "X has the symbol Y"; other
languages with spaces go the same way as far as their verbs of being are known. Source: reconstruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from neurosig.questions.answers.normal import normalise
from neurosig.questions.answers.question_form import (
    ADVERB,
    CLOSE,
    FILLER,
    FUNCTION,
    OPEN,
    QUOTED,
    WORD,
    QuestionForm,
    content_words,
    has,
    plain_word,
    question_form,
)
from neurosig.questions.answers.shapes import COMPOSED, LONGEST_SYMBOL, SHAPE_NEXT, SHAPES, by_shape

MAX_ANSWER_WORDS = 6

_CLAUSE_END = re.compile(
    r"[,;:]|(?<!\w)\(|\s[-–—]\s|\b(?:and|or)\b(?!\s+[A-Z])"
    r"|\b(?:but|which|who|that|not|though|because|since|as|when|where|while|also)\b"
)
_PREDICATE = re.compile(
    r"(?<!that )(?<!which )(?<!who )\b(?:is|are|was|were|be|has|had|lies|means|becomes|belongs)\b", re.IGNORECASE
)
_OTHER_PREDICATE = re.compile(
    r"\b(?:called|ist|sind|war|wurde|heißt|lautet|est|sont|était|s'appelle|es|son|fue|è|sono|é|são|är|er)\b",
    re.IGNORECASE,
)
_QUOTED_NEXT = re.compile(
    rf"^\s*(?:(?:{ADVERB}|the|word|(?:a|an|the)\s+(?:\w+\s+){{0,2}}?(?:noun|verb|word|adjective|adverb|phrase|term|infinitive|form))\s+)*"
    rf"[{OPEN}']+([^{OPEN}{CLOSE}]+?)[.,]?[{CLOSE}']+(?!\w)",
    re.IGNORECASE,
)
_LINK = re.compile(
    rf"^(?:\s*(?:(?:is|was|are|of|for|as|being|called|named(?!\s+(?:for|after|in)\b)|known\s+as|(?:denoted|represented)\s+(?:as|by)|written\s+as"
    rf"|(?:located|situated)\s+[io]n|the|{ADVERB})\b|[:=]|,(?=\s*[A-Z][^,.]{{0,40}},)))+\s*",
    re.IGNORECASE,
)
_LINKED_BY_OF = frozenset({"symbol", "formula", "number", "continent", "country", "state", "city", "title", "name"})
"""Nouns that "of" may link to their name: "the continent of Africa", but not "an element of the noble gases"."""
_INDEFINITE = re.compile(rf"^\W*(?:{ADVERB}\s+)*(?:a|an|one|part|not)\b", re.IGNORECASE)
_ORIGIN = re.compile(rf"^\W*(?:{ADVERB}\s+)*(?:from|in|of)\b", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"^\W*(?:i|i'm|i\u2019m|i'd|we|you|this|that|these|please|feel|although|if|when|in|to|from|at|on|by|for|as"
    r"|she|he|they|it|there|here|which|what|who|how|why|where|whether|given|just|let)\b",
    re.IGNORECASE,
)
"""Words that begin a remark or an aside, and no answer."""
_AMOUNT = re.compile(r"(?<![\w.])-?\d[\d.,]*(?<![.,])(?:\s+(?!(?:and|or|in|at|of|to|on)\b)[A-Za-z]+){0,2}")
_ASIDE = re.compile(r"^\W*(?:just|given|like|let|please|by|as)\b", re.IGNORECASE)
_LABEL = re.compile(
    r"^\W*(?:(?:A|sentence|response|reply|output|noun|verb|\w+(?=: (?:the|it|in|a)\b))\s*:|while\b)\s*", re.I
)
_ADDRESSED = re.compile(r"\byou(?:['\u2019]re| are) (?:referring to|asking (?:about|for)|looking for)\b", re.IGNORECASE)
_BEFORE_NOUN = (
    r"(?<![\w'])([A-Z][\w-]*(?:\s[A-Z][\w-]*)*)(?:\s+(?:or|and)\s+[A-Z][\w-]*)?"
    r"[\"*\u201d]*\s+(?:descent|origin|{noun})\b"
)
_QUALIFIED = re.compile(r"\s(?:from|with|in|at|on)\s")
_NAME = re.compile(r"(?<![\w'])[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)*")
_NAMING = re.compile(
    r"\b(?:named|called|short\s+for|(?:known|denoted|referred\s+to|abbreviated|represented|written|expressed|given)\s+(?:as|by))\s+"
    r"(?:as\s+)?(?!after|in\b|by\b|for\b|with\b)",
    re.IGNORECASE,
)
_NAMED = frozenset({"", "name", "compound", "element", "symbol", "formula", "term", "word"})
"""Nouns whose things are said to be "known as" their answer."""
NEAR = 30
"""Characters after the predicate in which a quoted word answers."""
_NEVER = frozenset(
    ["a", "an", "the", "to", "of", "in", "on", "at", "and", "or", "is", "it", "its", "that", "this", "which", "what"]
)
_JOINERS = frozenset({"of", "and", "the", "de", "la", "del", "du", "des", "da", "di", "von", "van"})
_ARTICLES = frozenset({"el", "la", "los", "las", "le", "les", "il", "lo"})


def new_words(sentence: str, question: str, *, explicit: bool, names: bool) -> str:
    """The run of words that answers, or "" without one.

    Args:
        sentence: One sentence, or what a completion announces as its answer.
        question: The question's text; its words are no answer, but for a quoted one or one after "is".
        explicit: The completion announces ``sentence`` as its answer.
        names: The possible answers are known, and the sentence has none of them: then only a name answers.
    """
    form = question_form(question)
    sentence = _after_colon(_LABEL.sub("", _ADDRESSED.sub("", sentence)), form)
    equation = re.fullmatch(r"(.*?)\s=\s+([^\s]+).*", sentence, re.DOTALL) if form.noun == "formula" else None
    if equation and not _PREDICATE.search(equation[1]):
        left, right = equation[1].strip(), equation[2].rstrip(".,;")
        return left if SHAPES[form.noun].fullmatch(left) else right if SHAPES[form.noun].match(right) else ""
    predicate = _PREDICATE.search(sentence) or _OTHER_PREDICATE.search(sentence)
    if predicate is not None and not WORD.search(sentence[: predicate.start()] + sentence[predicate.end() :]):
        return predicate[0]  # the answer "was"
    if predicate is None:
        run = _appositive(sentence, form) or _after_noun(sentence, form) or _after_naming(sentence, form)
        run = run or _without_predicate(sentence, form, explicit=explicit, names=names)
    else:
        subject, rest = sentence[: predicate.start()], sentence[predicate.end() :]
        is_about = explicit or form.is_asked_by(sentence, subject)
        run = _with_predicate(sentence, subject, rest, form, names=names) if is_about else _appositive(subject, form)
    return run if normalise(run) not in _NEVER or form.noun in SHAPES else ""


def _with_predicate(sentence: str, subject: str, rest: str, form: QuestionForm, *, names: bool) -> str:
    quoted = _QUOTED_NEXT.match(rest)
    is_answer = quoted and len(quoted[1].split()) <= MAX_ANSWER_WORDS and not has(quoted[1], form.noun)
    if quoted and is_answer and (form.is_on_word or not form.in_words(quoted[1])):
        return quoted[1]
    if form.noun in SHAPES and (shape := SHAPE_NEXT[form.noun].match(rest)) and form.is_new(shape[1]):
        return shape[1]
    copula = re.search(r"\b(?:is|are|was|were)$", sentence[: len(sentence) - len(rest)], re.IGNORECASE)
    reversed_of = (
        copula
        and form.noun
        and re.match(
            rf"\s*(?:{ADVERB}\s+)*(?:(?:the|a|an|correct)\s+)*(?:\w+\s+){{0,2}}?{re.escape(form.noun)}\s+(?:of|for)\b(.*)",
            rest,
            re.DOTALL | re.IGNORECASE,
        )
    )
    if reversed_of and form.is_of and not has(subject, form.noun):
        return _reversed(subject, reversed_of[1], form)
    after = _after_noun(sentence, form)
    if after and after in subject and not has(rest[:NEAR], form.noun):  # the compound HClO4 is HClO
        after = _in_predicate(subject, rest, form, names=names) or after
    return (
        _appositive(subject, form)
        or after
        or _in_predicate(subject, rest, form, names=names)
        or _before_noun(rest, form)
        or ("" if names and not has(rest, form.noun) else _in_subject(subject, rest, form))
        or _after_naming(sentence, form)
        or (by_shape(sentence, form) or _after_noun(sentence, form, known=True) if form.noun in SHAPES else "")
    )


def _after_colon(sentence: str, form: QuestionForm) -> str:
    head, colon, tail = sentence.rpartition(": ")
    shape = SHAPES.get(form.noun)
    if shape is not None and (shape.fullmatch(head) or not shape.match(tail)):
        return sentence if not shape.fullmatch(head) else head
    is_answer = colon and head.strip() and 0 < len(tail.split()) <= MAX_ANSWER_WORDS and not _PREDICATE.search(tail)
    return tail if is_answer else sentence


def _reversed(subject: str, of: str, form: QuestionForm) -> str:
    """The subject of "Y is the capital of X", if it is X that was asked about."""
    if content_words(of) and not form.in_words(of):
        other = QUOTED.search(of)
        is_own = any({*normalise(text).split()} & form.known for text in QUOTED.findall(subject))
        if form.noun == "opposite" and other and is_own:  # "before" is the opposite of "after"
            return other[1]
        symbol = of.strip(' ."*') if form.noun == "symbol" else ""
        return symbol if re.fullmatch("[A-Z][a-z]?", symbol) else ""
    if quoted := QUOTED.search(subject):
        return quoted[1]
    runs = _first_runs(subject, form, any_form=True)
    own = subject.strip(" .,")
    return runs[0] if runs else own if 0 < len(content_words(own)) <= 3 and not _NO_ANSWER.match(own) else ""


def _appositive(subject: str, form: QuestionForm) -> str:
    """X of "X, the capital of ..."."""
    clauses = [clause.strip() for clause in _CLAUSE_END.split(subject) if clause.strip()]
    is_named = any(has(clause, form.noun) for clause in clauses[1:]) and not has(clauses[0], form.noun)
    is_new = is_named and len(clauses[0].split()) <= 3 and not form.in_words(clauses[0])
    return clauses[0] if is_new and not _NO_ANSWER.match(clauses[0]) else ""


def _in_predicate(subject: str, rest: str, form: QuestionForm, *, names: bool) -> str:
    """The answer after "is": new words, or, if the subject is what was asked for, whatever follows."""
    first = next(filter(content_words, _CLAUSE_END.split(rest)), "").strip(" .!")
    repeats = content_words(first)[:1]
    subject_answers = not form.content & {*content_words(subject)} or (not form.noun and _new_runs(subject, form))
    if repeats and repeats[0] in form.content and not form.is_on_word and subject_answers:
        return ""  # Jupiter is the largest planet in the solar system
    if _INDEFINITE.match(rest):
        brief = _QUALIFIED.split(first, maxsplit=1)[0] if names else rest.strip(" .!")
        is_brief = len(brief.split()) <= 3 and not form.is_on_word and form.noun not in SHAPES
        runs = [run for run in _new_runs(brief, form) if run[0].isupper() >= names]
        return (
            runs[0]
            if is_brief and runs and not form.content & {*content_words(brief)} and not has(brief, form.noun)
            else ""
        )
    if COMPOSED.match(rest.strip()):
        return ""
    if form.is_on_word:
        quoted = [text for text in QUOTED.findall(first[:NEAR]) if form.is_new(text) and len(text.split()) <= 3]
        if quoted or len(first.split()) > 2:
            return quoted[0] if quoted and not _ORIGIN.match(rest) else ""
    is_alias = _NAMING.match(rest.lstrip()) and not has(subject, form.noun) and form.noun not in _NAMED
    if names and (is_alias or (_ORIGIN.match(rest) and form.noun == "nationality")):
        return ""
    runs = [run for run in _first_runs(rest, form) if run[0].isupper() >= names]
    if runs:
        return _last_of(runs, rest)
    if form.is_on_word and not content_words(subject) and len(first.split()) == 1:
        return first
    is_asked = has(subject, form.noun) and not has(first, form.noun)
    is_fitting = 0 < len(first.split()) <= MAX_ANSWER_WORDS - 2 and not _NO_ANSWER.match(first)
    is_fitting &= form.noun not in FILLER or form.noun in {"capital", "plural", "opposite", "tense", *SHAPES}
    return first if is_asked and is_fitting and not _first_runs(subject, form) else ""


def _last_of(runs: list[str], text: str) -> str:
    """The first run, or the one that it leads to: "the Mediterranean nation of Mauritius"."""
    chosen, *later = [run for run in runs if not run.isdigit()] or runs
    for run in later:
        gap = text[text.find(chosen) + len(chosen) : text.find(run)].split()
        if not gap or (gap[-1] != "of" and gap[-2:] != ["of", "the"]):
            break
        chosen = run
    return chosen


def _in_subject(subject: str, rest: str, form: QuestionForm) -> str:
    """The answer before "is an element with the symbol X"."""
    if form.noun in SHAPES:
        own = subject.strip(" .,")
        shape = SHAPES["formula"] if form.noun == "formula" else re.compile("[A-Z][a-z]?")
        return own if shape.fullmatch(own) and form.is_new(own) else ""
    names_noun = has(rest, form.noun)
    says_more = any(plain_word(word) not in form.known for word in WORD.findall(rest))
    if not names_noun and (_INDEFINITE.match(rest) or (has(subject, form.noun) and says_more)):
        return ""
    quoted = [text for text in QUOTED.findall(subject) if form.is_new(text)]
    if form.is_on_word and not quoted and sum(plain_word(word) not in FUNCTION for word in WORD.findall(subject)) > 1:
        return ""
    runs = [run for run in quoted or _first_runs(subject, form) if not run.isdigit()]
    return runs[0] if runs and not _NO_ANSWER.match(subject) else ""


def _after_noun(sentence: str, form: QuestionForm, *, known: bool = False) -> str:
    """The new words right after the asked noun: "symbol of Rb", "formula is H2O", "an element named copper"; with
    ``known`` a word of the question where a symbol or formula should be ("with the symbol gallium")."""
    noun = r"nationality|citizens?(?= of\b)" if form.noun == "nationality" else re.escape(form.noun)
    for found in re.finditer(rf"\b(?:{noun})\b", sentence, re.IGNORECASE) if form.noun else ():
        linked = _LINK.match(sentence[found.end() :])
        link = linked[0] if linked else ""
        by_of = form.noun in _LINKED_BY_OF or found[0].lower().startswith("citizen")
        if not by_of and link.split()[:1] in (["of"], ["for"]):
            continue
        rest = sentence[found.end() + len(link) :].lstrip()
        if form.noun in SHAPES:
            shape = SHAPE_NEXT[form.noun].match(rest) or re.match(r"^([a-z]{1,3})(?![\w-])", rest)
            alone = re.match(r"^[\"*]*([^\s,;]+?)[.\"*]*$", _CLAUSE_END.split(rest, maxsplit=1)[0].strip())
            word = shape or (alone if link or (alone and any(map(str.isdigit, alone[1]))) else None)
            if word and form.is_new(word[1]) and (shape or normalise(word[1]) not in FILLER):
                return word[1]
            if known and alone:
                return alone[1]
            continue
        clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
        quoted, word = QUOTED.match(rest), WORD.match(clause.lstrip(OPEN + "'"))
        if word is None or plain_word(word[0]) in form.known | FILLER | {""}:
            continue
        if (form.is_on_word and not quoted) or not (link or quoted or word[0][:1].isupper() or word[0][:1].isdigit()):
            continue
        run = quoted[1] if quoted else next(iter(_new_runs(clause, form)), "")
        if run:
            return run
    return ""


def _before_noun(rest: str, form: QuestionForm) -> str:
    """The name right before the asked noun: "the Australasia continent", "of Ashanti descent"."""
    if not form.noun or form.is_on_word or (form.is_of and form.noun != "nationality"):
        return ""
    found = re.search(_BEFORE_NOUN.format(noun=re.escape(form.noun)), rest)
    return found[1] if found and form.noun not in SHAPES and not form.in_words(found[1]) else ""


def _after_naming(sentence: str, form: QuestionForm) -> str:
    """The new words after "named", "called" or "known as"."""
    for found in _NAMING.finditer(sentence) if form.noun in _NAMED else ():
        rest = sentence[found.end() :]
        if form.noun in SHAPES and found[0].lower().startswith(("named", "called")):
            continue
        if form.noun in SHAPES:
            shape = SHAPE_NEXT[form.noun].match(rest)
            runs = [shape[1]] if shape and form.is_new(shape[1]) else []
        else:
            clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
            runs = [] if form.in_words(clause) else _new_runs(clause, form)
        if runs:
            return runs[0]
    return ""


def _without_predicate(sentence: str, form: QuestionForm, *, explicit: bool, names: bool) -> str:
    """The answer in a text without a verb of being: the text itself, its first clause, or the words after the
    question's ("plants absorb carbon dioxide")."""
    clauses = list(filter(str.strip, _CLAUSE_END.split(sentence)))
    first = clauses[0].strip(" .!") if clauses else ""
    if quoted := _QUOTED_NEXT.match(sentence):
        return quoted[1]
    is_whole = explicit or first == sentence.strip(" .!")
    if form.is_on_word and is_whole:
        return first if len(first.split()) <= 3 else ""
    if (has(first, form.noun) or not content_words(first)) and not explicit and form.noun not in SHAPES:
        return _before_noun(sentence, form)
    if first[:1].isupper() and not explicit and not form.in_words(first):
        first = _QUALIFIED.split(first, maxsplit=1)[0]
    if names and not explicit and _INDEFINITE.match(sentence):
        return ""
    is_symbol = form.noun in SHAPES and SHAPES[form.noun].fullmatch(first)
    if not form.in_words(first) and (explicit or is_symbol or not _NO_ANSWER.match(first)):
        words = len(first.split())
        is_fitting = explicit or form.noun not in SHAPES or (words == 1 and len(first) <= LONGEST_SYMBOL)
        is_fitting &= (
            explicit or not names or all(word[:1].isupper() for word in WORD.findall(first) if word not in FILLER)
        )
        is_fitting &= not re.match(r"\s*(?:i|we|you)\b", sentence[len(clauses[0]) + 1 :], re.IGNORECASE)
        if words <= (MAX_ANSWER_WORDS if is_whole else 4) and is_fitting:
            return first
    if form.noun in SHAPES:
        return by_shape(sentence, form)
    if _ASIDE.match(sentence):
        return ""
    asked_stems = {word[:4] for word in form.known - FUNCTION}
    n_asked = len({stem for word in WORD.findall(sentence) if (stem := plain_word(word)[:4]) in asked_stems})
    for clause in clauses:
        words_of = WORD.findall(clause)
        linked = [place for place, word in enumerate(words_of) if plain_word(word)[:4] in asked_stems]
        runs = [run for part in _around(words_of, linked) for run in _new_runs(part, form)] if linked else []
        if runs and n_asked > 1:
            return runs[0]
    if (amount := _AMOUNT.search(sentence)) and form.in_words(sentence) and not form.is_on_word and not names:
        return amount[0]
    names_of = [match[0] for match in _NAME.finditer(sentence) if match.start() > 0]
    found = [name for name in names_of if not {*map(plain_word, WORD.findall(name))} <= form.known]
    return found[0] if len(found) == 1 and form.in_words(sentence) and not form.is_on_word else ""


def _around(words: list[str], linked: list[int]) -> tuple[str, str]:
    """The words after the last word of the question, and those before the first."""
    return " ".join(words[linked[-1] + 1 :]), " ".join(words[: linked[0]])


def _first_runs(part: str, form: QuestionForm, *, any_form: bool = False) -> list[str]:
    """The new runs of the first clause that has more than filling words."""
    clause = next(filter(content_words, _CLAUSE_END.split(part)), "")
    shape = None if any_form else SHAPES.get(form.noun)
    return [run for run in _new_runs(clause, form) if shape is None or shape.fullmatch(run)]


def _new_runs(clause: str, form: QuestionForm) -> list[str]:
    """Runs of words that are not in the question; a capitalised neighbour joins its run (South America)."""
    runs: list[list[str]] = [[]]
    new: list[bool] = [False]
    for word, after in pairwise([*WORD.findall(clause), ""]):
        plain, capital = plain_word(word), word[:1].isupper() or word[:1].isdigit()
        leads = plain in _ARTICLES and capital and after[:1].isupper()  # El Quintero
        is_new = bool(plain) and plain not in form.known and (plain not in FILLER or (capital and bool(runs[-1])))
        if is_new or leads or (capital and plain not in FILLER):
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
