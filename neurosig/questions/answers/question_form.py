"""What a question asks for, and whether a sentence speaks of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache

from neurosig.questions.answers.normal import normalise

# the next two lookbehinds start a match at a run's first character only: otherwise a long run takes quadratic time
WORD = re.compile(r"(?<![\w$%+'\u2019.\-])[\w$%+'\u2019.\-]*\w[\w$%+'\u2019]*(?:\([\w+\-]{1,8}\)\w*)*")
OPEN, CLOSE = '"*\u201c\u00ab\u2018\u300c', '"*\u201d\u00bb\u2019\u300d'
"""Quotation marks, with Markdown's emphasis."""
QUOTED = re.compile(rf"(?<![{OPEN}])[{OPEN}]+([^{OPEN}{CLOSE}]+?)[.,]?[{CLOSE}]+")
_NOUN = re.compile(
    r"^what\s+is\s+the\s+name\s+of\s+(?:the|this|an?)\s+(\w+)|^the\s+(?:\w+\s+)?(\w+)\s+of\b.*\bwhich\s+\w+\s*\?"
    r"|^(?:what|which)\s+(?:is|are|was|were)\s+the\s+(?:\w+\s+){0,2}?(\w+)\s+(?:of|for|in)\b"
    r"|^(?:what|which)\s+(?:\w+\s+)??(\w+)\s+(?:has|is|was|did|do|does|are|have|can)\b|\bwhich\s+(\w+)\s*\?",
    re.IGNORECASE,
)
ADVERB = (
    r"(?:indeed|actually|typically|often|usually|simply|officially|currently|generally|commonly|also|probably|likely"
    r"|just|now|predominantly|primarily|mostly|mainly)"
)
"""Words between "is" and an answer."""
_WH = re.compile(r"\b(?:which|what)\b", re.IGNORECASE)
_OTHER_NOUN = {"plural": "singular", "singular": "plural", "opposite": "synonym"}
FUNCTION = frozenset(
    """
    a an the of in on at to from by for with as its it this that there their one two either both than
    is are was were be been being has have had do does did can could will would may might which what who
    after before despite near during under without including along
    between through less more very much most around about circa
    der die das den dem des ein eine von im le les un une el los il lo
    """.split()  # noqa: SIM905 (a list of eighty strings reads worse)
)
FILLER = FUNCTION | frozenset(
    """
    located situated found considered known called named referred represented denoted abbreviated spelled written
    defined given used based wrote discovered invented painted composed founded built made geschrieben erfunden entdeckt
    gemalt gebaut écrit peint gives give makes make produces produce yields speaks speak eats eat uses use plays
    played play
    incorrect undefined unknown irregular wrong
    misunderstood confused misinterpreted mistaken originally technically correct right best answer common other
    largely entirely location
    actually indeed typically often usually officially currently simply generally commonly also likely probably
    predominantly primarily mostly mainly
    continent continental country nation state city town place capital word term name person people citizen
    individual native resident
    official chemical element symbol formula compound number atomic past tense plural singular form opposite verb noun
    """.split()  # noqa: SIM905
)
"""Words that fill sentences and are no answer by themselves."""
MOST_WORDS, ALIKE = 40, 0.75
"""Words of a sentence that are compared with those of the question, and how alike a misspelt one is (difflib)."""


@lru_cache(maxsize=4096)
def plain_word(word: str) -> str:
    """A word normalised, without a possessive 's."""
    return normalise(re.sub("['\u2019]s$", "", word))


def has(text: str, noun: str) -> bool:
    """Whether a text has a noun as a whole word."""
    return bool(noun) and re.search(rf"\b{re.escape(noun)}\b", text, re.IGNORECASE) is not None


def content_words(text: str) -> list[str]:
    """The words of a text, normalised, that are not filling words."""
    return [plain for word in WORD.findall(text) if (plain := plain_word(word)) and plain not in FILLER]


@dataclass(frozen=True, slots=True)
class QuestionForm:
    """A question as its answers are read.

    Attributes:
        noun: What is asked for: "capital" of "What is the capital of X?", "country" of "... of which country?"; "" if
            unclear.
        known: Its words, normalised; they are no answer.
        content: Those that are not filling words.
        opening: Its words up to "which" or "what", normalised.
        is_of: It asks for "the NOUN of" something.
        is_on_word: It asks for a word and quotes one, so that its answer is quoted or stands alone.
    """

    noun: str
    known: frozenset[str]
    content: frozenset[str]
    opening: str
    is_of: bool
    is_on_word: bool

    def in_words(self, text: str) -> bool:
        """Whether a text has words of the question's content, misspelt or derived ones too."""
        words = {part for word in content_words(text) for part in (word, *word.split())}
        if words & self.content:
            return True
        long = sorted(word for word in words if len(word) > 4 and word.isalpha())[:MOST_WORDS]
        own = [word for word in self.content if len(word) > 4 and word.isalpha()]
        return any(a[:4] == b[:4] or get_close_matches(a, [b], cutoff=ALIKE) for a in long for b in own)

    def is_new(self, text: str) -> bool:
        """Whether a text is a word or phrase that the question does not have."""
        plain = normalise(text)
        return bool(plain) and plain not in self.known

    def is_asked_by(self, sentence: str, subject: str) -> bool:
        """Whether a sentence speaks of what was asked.

        It has words of the question, misspelt ones too, or begins as the question does; or its subject is a pronoun or
        the asked noun, or it says no more than that its subject is what was asked for. A subject that is something
        else ("Poland's national anthem") does not.
        """
        if any(f"singular {link} " in f"{normalise(sentence)} " for link in ("of", "form", "word")):
            return _OTHER_NOUN.get(self.noun) != "singular"
        own = set(content_words(subject))
        noun = re.escape(self.noun)
        begins = re.match(rf"\W*(?:the|this)?\s*(?:\w+\s+)?{noun}\b(?!\s+of\b)", subject, re.IGNORECASE)
        names_noun = has(sentence, self.noun)
        if not self.noun or own <= {self.noun} or begins:
            return True
        if not self.content:
            return names_noun or any(self.known & {*normalise(text).split()} for text in QUOTED.findall(sentence))
        if names_noun and re.search(rf"\b{noun}\s+(?:called|named|known\s+as)\b", sentence, re.IGNORECASE):
            return True
        if names_noun and (self.noun in ("symbol", "formula") or set(content_words(sentence)) - own <= {self.noun}):
            return True
        lower = (plain_word(word) for word in WORD.findall(subject.split(",")[0]) if word[:1].islower())
        if self.noun and not names_noun and any(word not in self.known | FILLER for word in lower):
            return False
        starts = f"{normalise(sentence)} ".startswith(f"{self.opening} ") and len(self.opening.split()) > 1
        return starts or self.in_words(sentence)


@cache
def question_form(question: str) -> QuestionForm:
    """The question as its answers are read."""
    found = _NOUN.search(question)
    noun = normalise(next(filter(None, found.groups()), "")) if found else ""
    known = frozenset(part for word in WORD.findall(question) for part in (plain_word(word), *plain_word(word).split()))
    content = frozenset(word for word in known if word not in FILLER and word != noun)
    opening = normalise(_WH.split(question)[0])
    is_of = re.search(rf"\b{re.escape(noun)}\s+(?:of|for)\b", question, re.IGNORECASE) is not None
    return QuestionForm(noun, known, content, opening, is_of, QUOTED.search(question) is not None)
