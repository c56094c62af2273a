"""The answer in a sentence whose script has no spaces between words (Chinese, Japanese, Thai, ...)."""

from __future__ import annotations

import re

from neurosig.questions.answers.normal import normalise
from neurosig.questions.answers.question_form import QUOTED

MAX_ANSWER_CHARS = 24
LONGEST_SENTENCE, LONGEST_QUESTION = 200, 1000
"""Characters that are compared."""

_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_COPULA = re.compile(
    r"^(?:です|は|が|の|是|为|為|叫做?|คือ|[\s、，,:「『“\"])+|(?:でした|である|であり|です|だ|は|が|的|是|了|ครับ|ค่ะ|[\s。、，,.!！」』”\"])+$"
)


def is_unspaced(text: str) -> bool:
    """Whether more than half of a text's letters and digits are of scripts without spaces."""
    return len(_UNSPACED.findall(text)) * 2 > len(re.findall(r"\w", text))


def unspaced_answer(sentence: str, question: str) -> str | None:
    """What remains of a sentence without its longest common parts with the question, copulas and particles."""
    quoted = QUOTED.search(sentence)
    rest = (quoted[1] if quoted else sentence)[:LONGEST_SENTENCE]
    while quoted is None and (shared := _longest_shared(rest, question[:LONGEST_QUESTION])):
        before, _, after = rest.partition(shared)
        rest = max(after, before, key=lambda part: len(_bare(part)))
    answer = normalise(_bare(rest))
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _bare(text: str) -> str:
    return _COPULA.sub("", _COPULA.sub("", text))


def _longest_shared(text: str, question: str) -> str:
    """The longest common substring of at least three characters."""
    best = ""
    for start in range(len(text)):
        size = max(3, len(best) + 1)
        while start + size <= len(text) and text[start : start + size] in question:
            best, size = text[start : start + size], size + 1
    return best
