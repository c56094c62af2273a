"""The short free-form answer of a completion.

Its answer statement is searched for a member of the answer space, where the question names one, else for what its kind
of question asks for (yes or no, a year, a number), else for the words that the question does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from neurosig.questions.answers.markup import marked, unmarked, without_emphasis
from neurosig.questions.answers.new_words import MAX_ANSWER_WORDS, new_words
from neurosig.questions.answers.no_spaces import is_unspaced, unspaced_answer
from neurosig.questions.answers.normal import contained, normalise
from neurosig.questions.answers.numbers import number_in
from neurosig.questions.answers.question_form import has, question_form
from neurosig.questions.answers.sentences import answer_tails, sentences

_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i (?:do not|don'?t) (?:actually |really )?know|i(?:'m| am) not (?:sure|certain|able)"
    r"|i can(?:not|'t)|as an ai|unable to|dunno|not enough information)\b",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"^\W*(?:sure(?: thing)?|certainly|of course|absolutely"
    r"|(?:great|good|awesome|excellent|nice|interesting)(?: question)?|sounds good"
    r"|you(?:'re| are) (?:correct|right)|correct|exactly|(?:that's|what) an? \w+ question"
    r"|thank(?:s| you)(?: \w+){0,4}|hello|hi(?: there)?|okay|ok|alright|well|yes|yep|yeah|no problem|indeed|hmm+|ah|oh"
    r"|happy to help|i(?:'d| would) be happy to(?: \w+){0,4}|let me (?:think|see|check)(?: \w+){0,3}"
    r"|here(?:'s| is)(?: \w+){0,4}|understood|uh[- ]huh|yay|a good start"
    r"|natürlich|gerne|klar|bien sûr|claro|certo|当然|好的|はい)"
    r"\s*(?:[!,.:;！、，。]|[-–—]\s|$)\s*",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"^\W*(?:(?:oh|ah|hmm+|but|no|oops|sorry)\b\W*)?(?:wait|oops|scratch that|correction|on second thoughts?"
    r"|let me correct (?:that|myself)|i was wrong|i made a mistake|i meant?)\b"
    r"(?:\W+(?:no|wait|sorry|actually|i meant?|that(?: i|')s (?:wrong|not right|incorrect))\b)*\W*",
    re.IGNORECASE,
)
"""How a sentence begins that takes back what was said before."""
_CONTRACTED = re.compile(r"\b(it|that|this|he|she|there|what)['\u2019]s\b", re.IGNORECASE)
_HEDGE = re.compile(r"^\W*i (?:think|believe|guess|would say)(?: that)? (?=(?:it|that|the)\b)", re.IGNORECASE)
_ABOUT_TASK = re.compile(
    r"\b(?:the user|(?:this|the) question|i(?:'?m| am) (?:glad|happy|thrilled|here|a helpful)|let me|let's"
    r"|i need to|i have to|i should|we need to|in (?:a|one) (?:short )?sentence|short sentence)\b|\bwords\W*$",
    re.IGNORECASE,
)
_YES_NO_QUESTION = re.compile(
    r"^\s*(?:is|are|was|were|do|does|did|can|could|has|have|had|will|would|should|ist|sind|hat|kann|est-ce|es|son|é)\b(?!.*\bor\b)",
    re.IGNORECASE,
)
_YES_NO = re.compile(
    r"^\W*(yes|no|true|false|ja|nein|oui|non|sí|si|sim|não|da|да|нет|是的?|不是?|はい|いいえ|네|아니요)(?![^\W\d_])",
    re.IGNORECASE,
)
_YEAR_QUESTION = re.compile(r"\b(?:what|which) year\b|\bin welchem jahr\b|\bquelle année\b", re.IGNORECASE)
_WHEN_QUESTION = re.compile(r"^\W*(?:when|wann|quand|cuándo)\b", re.IGNORECASE)
_YEAR = re.compile(r"(?<!\d)[12]\d{3}(?!\d)")
_COUNT_QUESTION = re.compile(
    r"\b(?:how many|wie viele|combien d['e]|cuánt[oa]s)\s*(?P<noun>\w+)|\bhow (?:many|much is)\b|\bcombien\b",
    re.IGNORECASE,
)
_CONCESSION = re.compile(
    r"\b(?:(?:many|most|some|people|you|one)\b[^.\"]{0,60}?\b(?:think|thought|believ\w*|assum\w*|say|said|mistak\w*)|not|although)\b"
    r"[^.\"]{0,120}?\sbut\s|^(?:while|although|though)\b[^,.\"]{0,80},\s",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<![\w'])[A-Z][\w'’.-]*(?:\s+(?:(?:and|of|the)\s+)*[A-Z][\w'’.-]*)*")
_CLAUSE_BREAK = re.compile(r"[,;:]|(?<!\w)\(|\b(?:but|which|who|though|because|since|where|while)\b")
_DENIED = re.compile(
    r"\b(?:(?:not|nor|neither|never|than|unlike|isn t|near|next to|adjacent to|close to|off|confused with)(?: \w+){0,2}"
    r"|(?:border\w*|neighbou?r\w*|between|alongside)(?: \w+){0,9}) $"
)
_OTHER_PEOPLE = re.compile(r"\b(?:latin|native|south|north|central|east|west|african|caribbean|afro|anglo) $")
_PEOPLE = frozenset({"american", "african", "asian", "european"})
_HYPHENED = re.compile(r"(?<=[A-Za-z])-\d+\b|\b\d+(?:st|nd|rd|th)\b")
_BRACKETS = re.compile(r"\([^()]*\)")
_COMPOUND = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)+")
_IS_NUMBER = re.compile(r"\bis\s+(?:(?:about|approximately|roughly)\s+)?\d+\W*$")
_A_NAME = re.compile(r"^\s*(?:\w+ly\s+)?an?\s+[A-Z][\w-]*\s*[,.!]")
COUNTED_WITHIN = 5
"""Words before a noun that may count it: "one hundred and five bones"."""
LONGEST_BARE = 5
"""Words of a text that names a thing without saying anything of it."""
_SUBJECT_END = re.compile(r"\b(?:is|are|was|were|has|lies|belongs)\b")
_KOREAN_END = re.compile(r"(?<=[\uac00-\ud7a3])(?:입니다|이에요|예요|이다)\.?$")
_FINISHED = ";.!?\"'”’)]}。！？"
LONGEST_STATEMENT, MOST_CLAUSES = 1000, 20
"""Characters and clauses in which an answer is looked for."""


def is_refusal(text: str) -> bool:
    """Whether a completion declines to answer, by phrases such as "I'm sorry", "I don't know" and "as an AI"."""
    return _REFUSAL.search(text.replace("\u2019", "'")) is not None


def short_answer(text: str, question: str, space: Sequence[Sequence[str]], *, complete: bool) -> str | None:
    """The short answer of a completion, normalised.

    Args:
        text: The completion after `neurosig.questions.answers.markup.with_marks`.
        question: The question's text; its words are no answer.
        space: All possible answers, each with its names; () where they are not known.
        complete: The completion was not cut off; of a cut-off one, an answer at its very end is cut off too.
    """
    first = next(iter(sentences(unmarked(text))), "")
    if _YES_NO_QUESTION.match(question) and (found := _YES_NO.match(first)):
        return normalise(found[1])
    for statement, explicit in statements(text):
        possible = members_in(statement, question, space)
        if len(possible) > 1:
            return None
        answer = possible[0] if possible else None
        if answer is None and not _is_numeric(space):
            answer = _statement_answer(statement, question, explicit=explicit, space=space)
        if answer is not None:
            return answer if complete or not _is_cut(text, answer) else None
    return None


def _is_cut(text: str, answer: str) -> bool:
    """Whether the last word of a text that was cut off is part of its answer."""
    last, plain = normalise(text.split()[-1]), f" {normalise(text)} "
    if plain.count(f" {answer} ") > 1 or text[-1:] in _FINISHED:
        return False
    return plain.endswith(f" {answer} ") or last.startswith(answer)


def statements(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a completion that may state its answer, the most explicit first, and whether they are announced.

    Announced are marked answers and what follows "Answer:" or "the answer is", the last first; without any, these are
    its sentences in order, without courtesies, questions and remarks on the task.
    """
    plain = _CONTRACTED.sub(r"\1 is", unmarked(text))
    announced = [part for part in (*marked(text), *answer_tails(plain.replace("**", "")))]
    announced = [part for part in announced if sentences(part) and not part.lower().startswith("not ")]
    if announced:
        if not is_refusal(announced[0]):
            yield from ((sentences(part)[0][:LONGEST_STATEMENT], True) for part in announced)
        return
    if is_refusal(plain):
        return
    for sentence in map(_without_courtesy, _corrected(sentences(plain))):
        is_statement = any(map(str.isalpha, sentence)) or (sentence.strip(" .").isdigit() and sentence == plain.strip())
        is_statement = is_statement and not sentence.rstrip("\"'”*) ").endswith(("?", "？"))
        if is_statement and not _ABOUT_TASK.search(sentence):
            yield sentence[:LONGEST_STATEMENT], False


def _corrected(parts: Sequence[str]) -> list[str]:
    """The sentences from the last correction on, without its opening words, then those before it."""
    starts = [(place, found.end()) for place, part in enumerate(parts) if (found := _CORRECTION.match(part))]
    if not starts:
        return list(parts)
    place, end = starts[-1]
    return [parts[place][end:], *parts[place + 1 :], *parts[:place]]


def found_members(statement: str, question: str, space: Sequence[Sequence[str]]) -> list[str]:
    """Canonical names, normalised, of the members that a statement has as whole words, in order.

    Members that the question itself has, members inside longer ones, and denied ones ("not Germany") do not count.
    Members that are symbols or numbers are not looked for: a sentence has "In", "He" and "1" for other reasons.
    """
    if _is_abbreviated(space):
        return []
    names = {name for name, _ in _named(tuple(map(tuple, space)))}
    for compound in _COMPOUND.findall(statement):  # Tatar-Kazakhstan is no Kazakhstan
        if normalise(compound) not in names:
            statement = statement.replace(compound, compound.replace("-", "_"))
    plain, known = f" {normalise(statement)} ", f" {normalise(question)} "
    for phrase in filter(None, map(normalise, _NAME.findall(question))):  # South Africa is no Africa
        if any(f" {phrase} " in f" {name} " and name != phrase and f" {name} " in plain for name in names):
            continue  # Guatemala City is not Guatemala
        mask = f" {'_' * len(phrase)} "
        plain, known = plain.replace(f" {phrase} ", mask), known.replace(f" {phrase} ", mask)
    spans = [
        (start, start + len(name), canonical)
        for name, canonical in _named(tuple(map(tuple, space)))
        if f" {name} " in plain and f" {name} " not in known
        for start in contained(name, plain)
    ]
    found: list[str] = []
    reached = 0
    for start, end, member in sorted(spans, key=lambda span: (span[0], -span[1])):
        before = plain[max(0, start - 80) : start]
        is_other = plain[start:end] in _PEOPLE and _OTHER_PEOPLE.search(before)
        if end > reached and not _DENIED.search(before) and not is_other:
            found.append(member)
        reached = max(reached, end)
    return list(dict.fromkeys(found))


def members_in(statement: str, question: str, space: Sequence[Sequence[str]]) -> list[str]:
    """The members of the space in a statement; of several, those in its first clause that has one."""
    if _is_numeric(space):
        number = _asked_number(statement, question, {member[0] for member in space})
        return [] if number is None else [number]
    found = found_members(statement, question, space)
    plain = f" {normalise(statement)} "
    adjectives = [name for name in found if f" {name} " not in plain and f" {name}n " in plain.replace("pean ", "pen ")]
    if len(found) - len(adjectives) == 1:
        found = [name for name in found if name not in adjectives]  # a European nation located in Africa
    if not found:
        return []
    subject, form = _SUBJECT_END.split(statement, maxsplit=1), question_form(question)
    if len(subject) == 1:
        if not has(statement, form.noun) and not space[0][0][0].isupper():
            return [] if len(statement.split()) > LONGEST_BARE else found
    elif _names_another(subject, question, space) or not form.is_asked_by(
        statement, _without_members(subject[0], space)
    ):
        return []
    if len(found) > 1:
        clauses = (found_members(clause, question, space) for clause in _CLAUSE_BREAK.split(statement)[:MOST_CLAUSES])
        found = next(filter(None, clauses), found)
    return found


def _names_another(parts: Sequence[str], question: str, space: Sequence[Sequence[str]]) -> bool:
    """Whether what follows "is" is a name outside the space: "is a Kurd, specifically one of the Armenian diaspora"."""
    subject, rest = parts
    first = _CLAUSE_BREAK.split(rest, maxsplit=1)[0]
    is_name = _A_NAME.match(rest) or (has(subject, question_form(question).noun) and _NAME.search(first))
    return bool(is_name) and not found_members(first, question, space)


def _without_members(subject: str, space: Sequence[Sequence[str]]) -> str:
    """A subject that is itself a possible answer ("Iron is the element Fe") says nothing of what was asked."""
    names = {name for name, _ in _named(tuple(map(tuple, space)))}
    return "" if normalise(subject) in names else subject


@cache
def _named(space: tuple[tuple[str, ...], ...]) -> list[tuple[str, str]]:
    """Each name of each member with the member's canonical one, both normalised."""
    return [(plain, normalise(member[0])) for member in space for name in member if (plain := normalise(name))]


def _is_abbreviated(space: Sequence[Sequence[str]]) -> bool:
    return all(len(member[0]) <= 3 for member in space)


def _is_numeric(space: Sequence[Sequence[str]]) -> bool:
    return bool(space) and all(member[0].isdigit() for member in space)


def _asked_number(statement: str, question: str, members: set[str]) -> str | None:
    """The number right after the asked noun ("an atomic number of 79"), else one of the members."""
    noun, plain = question_form(question).noun, _HYPHENED.sub(" ", without_emphasis(statement))
    after = re.search(rf"\b{re.escape(noun)}\b(?=[^\d.;,]{{0,30}}?[\d\"])", plain, re.IGNORECASE) if noun else None
    if after:
        rest = re.sub(r"^(?:\W|\b(?:of|is|as|the|at|for)\b)+(?=\d)", "", plain[after.end() :])
        return number_in(_BRACKETS.sub(" ", rest), first=True) or number_in(rest, first=True)
    value = number_in(plain, asides=len(plain.split()) <= LONGEST_BARE)
    is_stated = _IS_NUMBER.search(plain) is not None
    return value if value in members or is_stated else None


def _count(statement: str, noun: str | None) -> str | None:
    """The number of the nouns that were asked for ("8 legs, unlike insects, which have 6"), else of the statement."""
    plain = without_emphasis(statement)
    places = re.finditer(rf"\b{re.escape(noun)}\b", plain, re.IGNORECASE) if noun else ()
    near = (number_in(" ".join(plain[: found.start()].split()[-COUNTED_WITHIN:])) for found in places)
    return next(filter(None, near), None) or number_in(plain)


def _without_courtesy(sentence: str) -> str:
    while (found := _POLITE.match(sentence)) and not _YES_NO.fullmatch(sentence.strip(" .!")):
        sentence = sentence[found.end() :]
    return _HEDGE.sub("", sentence)


def _statement_answer(statement: str, question: str, *, explicit: bool, space: Sequence[Sequence[str]]) -> str | None:
    """The answer in a statement without a member of the space; where all members are names, only a name."""
    years = _YEAR.findall(statement)
    if years and (_YEAR_QUESTION.search(question) or (len(years) == 1 and _WHEN_QUESTION.match(question))):
        return str(years[-1])
    if (counted := _COUNT_QUESTION.search(question)) and (count := _count(statement, counted["noun"])) is not None:
        return count
    if is_unspaced(statement):
        return unspaced_answer(statement, question)
    statement = statement[found.end() :] if (found := _CONCESSION.search(statement)) else statement
    names = bool(space) and not _is_abbreviated(space) and all(member[0][:1].isupper() for member in space)
    run = new_words(_KOREAN_END.sub("", statement.strip()), question, explicit=explicit, names=names)
    answer, is_name = normalise(run), any(char.isupper() for char in run)
    if space and not names and not _is_abbreviated(space) and not explicit:
        is_aside = len(_SUBJECT_END.split(statement)) == 1 and not has(statement, question_form(question).noun)
        if (is_aside and len(statement.split()) > LONGEST_BARE) or len(answer) < 2:
            return None
    is_description = bool(space) and not _is_abbreviated(space) and not is_name and (names or len(answer.split()) > 1)
    if not answer or (is_description and not explicit):
        return None
    return answer if len(answer.split()) <= MAX_ANSWER_WORDS else None
