"""The short free-form answer of a completion.

Its answer statement is searched for a member of the answer space, where the question names one, else for what its kind
of question asks for (yes or no, a year, a number), else for the words that the question does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from neurosig.questions.answers.markup import marked, unmarked, without_emphasis
from neurosig.questions.answers.new_words import MAX_ANSWER_WORDS, asked_noun, new_words
from neurosig.questions.answers.no_spaces import is_unspaced, unspaced_answer
from neurosig.questions.answers.normal import contained, normalise
from neurosig.questions.answers.numbers import number_in
from neurosig.questions.answers.sentences import answer_tails, sentences

_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i (?:do not|don'?t) (?:actually |really )?know|i(?:'m| am) not (?:sure|certain|able)"
    r"|i can(?:not|'t)|as an ai|unable to|not enough information)\b",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"^\W*(?:sure(?: thing)?|certainly|of course|absolutely|(?:great|good|awesome|excellent|nice|interesting)(?: question)?|sounds good|you(?:'re| are) (?:correct|right)|correct|exactly|(?:that's|what) an? \w+ question"
    r"|thank(?:s| you)(?: \w+){0,4}|hello|hi(?: there)?|okay|ok|alright|well|yes|yep|yeah|no problem|indeed|hmm+|ah|oh"
    r"|happy to help|i(?:'d| would) be happy to(?: \w+){0,4}|let me (?:think|see|check)(?: \w+){0,3}"
    r"|here(?:'s| is)(?: \w+){0,4}|understood|natürlich|gerne|klar|bien sûr|claro|certo|当然|好的|はい)"
    r"\s*(?:[!,.:;！、，。]|[-–—]\s|$)\s*",
    re.IGNORECASE,
)
_ABOUT_TASK = re.compile(
    r"\b(?:the user|(?:this|the) question|i(?:'?m| am) (?:glad|happy|thrilled|here|a helpful)|let me|let's|i need to|i have to"
    r"|i should|we need to|in (?:a|one) (?:short )?sentence|short sentence)\b|\bwords\W*$",
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
_YEAR = re.compile(r"(?<!\d)[12]\d{3}(?!\d)")
_COUNT_QUESTION = re.compile(r"\bhow many\b|\bhow much is\b|\bwie viele\b|\bcombien\b|\bcuánt[oa]s\b", re.IGNORECASE)
_CONCESSION = re.compile(
    r"\b(?:think|thought|believe|assume|say|often|commonly|mistaken\w*|not|although|while|despite)\b[^.]{0,200}?\sbut\s",
    re.IGNORECASE,
)
_CLAUSE_BREAK = re.compile(r"[,;:]|(?<!\w)\(|\b(?:but|which|who|though|because|since|where|while)\b")
_DENIED = re.compile(r"\b(?:not|nor|neither|never|than|unlike|isn t)(?: \w+){0,2} $")
_KOREAN_END = re.compile(r"(?<=[\uac00-\ud7a3])(?:입니다|이에요|예요|이다)\.?$")
LONGEST_STATEMENT, MOST_CLAUSES = 1000, 20
"""Characters and clauses in which an answer is looked for."""
_COMPLETE = ".!?\"'”’)]}。！？"


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
    for statement, explicit in statements(text):
        answer = member_answer(statement, question, space)
        if answer is None and not _is_numeric(space):
            answer = _statement_answer(statement, question, explicit=explicit, space=space)
        if answer is not None:
            is_cut = not complete and text[-1:] not in _COMPLETE and f" {normalise(text)}".endswith(f" {answer}")
            return None if is_cut else answer
    return None


def statements(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a completion that may state its answer, the most explicit first, and whether they are announced.

    Announced are marked answers and what follows "Answer:" or "the answer is", the last first; without any, these are
    its sentences in order, without courtesies, questions and remarks on the task.
    """
    plain = unmarked(text)
    announced = [part for part in (*marked(text), *answer_tails(plain.replace("**", "")))]
    announced = [part for part in announced if sentences(part) and not part.lower().startswith("not ")]
    if announced:
        if not is_refusal(announced[0]):
            yield from ((sentences(part)[0][:LONGEST_STATEMENT], True) for part in announced)
        return
    if is_refusal(plain):
        return
    for sentence in map(_without_courtesy, sentences(plain)):
        is_statement = any(char.isalnum() for char in sentence) and not sentence.endswith(("?", "？"))
        if is_statement and not _ABOUT_TASK.search(sentence):
            yield sentence[:LONGEST_STATEMENT], False


def found_members(statement: str, question: str, space: Sequence[Sequence[str]]) -> list[str]:
    """Canonical names, normalised, of the members that a statement has as whole words, in order.

    Members that the question itself has, members inside longer ones, and denied ones ("not Germany") do not count.
    Members that are symbols or numbers are not looked for: a sentence has "In", "He" and "1" for other reasons.
    """
    if _is_abbreviated(space):
        return []
    plain, asked = f" {normalise(statement)} ", f" {normalise(question)} "
    spans = [
        (start, start + len(name), canonical)
        for name, canonical in _named(tuple(map(tuple, space)))
        if f" {name} " in plain and f" {name} " not in asked
        for start in contained(name, plain)
    ]
    found: list[str] = []
    reached = 0
    for start, end, member in sorted(spans, key=lambda span: (span[0], -span[1])):
        if end > reached and not _DENIED.search(plain[max(0, start - 24) : start]):
            found.append(member)
        reached = max(reached, end)
    return list(dict.fromkeys(found))


def member_answer(statement: str, question: str, space: Sequence[Sequence[str]]) -> str | None:
    """The only member of the space in the statement, or in its first clause that has one."""
    if _is_numeric(space):
        return _asked_number(statement, question, {member[0] for member in space})
    for clause in (statement, *_CLAUSE_BREAK.split(statement)[:MOST_CLAUSES]):
        found = found_members(clause, question, space)
        if len(found) == 1:
            return found[0]
        if found and clause is not statement:
            return None
    return None


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
    noun, plain = asked_noun(question), without_emphasis(statement)
    after = re.search(rf"\b{re.escape(noun)}\b[^\d.;,]{{0,30}}?(?=[\d\"])", plain, re.IGNORECASE) if noun else None
    if after:
        return number_in(plain[after.end() :], first=True)
    value = number_in(plain, asides=False)
    return value if value in members else None


def _without_courtesy(sentence: str) -> str:
    while (found := _POLITE.match(sentence)) and not _YES_NO.fullmatch(sentence.strip(" .!")):
        sentence = sentence[found.end() :]
    return sentence


def _statement_answer(statement: str, question: str, *, explicit: bool, space: Sequence[Sequence[str]]) -> str | None:
    """The answer in a statement without a member of the space; where all members are names, only a name."""
    if _YES_NO_QUESTION.match(question) and (found := _YES_NO.match(statement)):
        return normalise(found[1])
    if _YEAR_QUESTION.search(question) and (years := _YEAR.findall(statement)):
        return str(years[-1])
    if _COUNT_QUESTION.search(question) and (count := number_in(without_emphasis(statement))) is not None:
        return count
    if is_unspaced(statement):
        return unspaced_answer(statement, question)
    statement = statement[found.end() :] if (found := _CONCESSION.search(statement)) else statement
    are_names = bool(space) and not _is_abbreviated(space)
    run = new_words(_KOREAN_END.sub("", statement.strip()), question, explicit=explicit, known_space=are_names)
    are_names &= all(member[0][:1].isupper() for member in space)
    answer = normalise(run)
    if (are_names and not explicit and not any(char.isupper() for char in run)) or not answer:
        return None
    return answer if len(answer.split()) <= MAX_ANSWER_WORDS else None
