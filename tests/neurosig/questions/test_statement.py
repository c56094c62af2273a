"""Where a completion states its answer."""

from __future__ import annotations

import pytest

from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.questions.statement import answer_place

CAPITAL = Question(id="q", question="What is the capital of France?", domain="d")
LETTER = Question(id="q", question="Which city is the capital?", domain="d", choices=("Lyon", "Paris"))
SUM = Question(id="q", question="What is 400 plus 600?", domain="d")
COUNTRY = Question(id="q", question="Which country has the capital Washington?", domain="d", answer_space="countries")


@pytest.mark.parametrize(
    ("question", "answer_format", "text", "statement", "words"),
    [
        (CAPITAL, "auto", "The capital of France is Paris.", "The capital of France is Paris.", "Paris"),
        (CAPITAL, "auto", "Sure! It's Lyon? No.\nAnswer: Paris. I am glad.", "Answer: Paris.", "Paris"),
        (CAPITAL, "auto", "I like Lyon. So \\boxed{Paris} it is.", "So \\boxed{Paris} it is.", "Paris"),
        (CAPITAL, "auto", "<think>Is it Paris?</think>\nIt is Paris.", "It is Paris.", "Paris"),
        (CAPITAL, "auto", "Good question!\nThe capital is **Orléans**!", "The capital is **Orléans**!", "Orléans"),
        (LETTER, "auto", "It is not Lyon (A). The answer is B.", "The answer is B.", "B"),
        (LETTER, "auto", "The answer is Paris.", "The answer is Paris.", None),
        (SUM, "number", "400 and 600 are two numbers. They make 1,000.", "They make 1,000.", "1,000"),
        (COUNTRY, "auto", "It is the USA, a large country.", "It is the USA, a large country.", "USA"),
    ],
)
def test_the_statement_is_where_the_parser_reads_the_answer(
    question: Question, answer_format: str, text: str, statement: str, words: str | None
) -> None:
    reader = AnswerReader(answer_format)  # type: ignore[arg-type]
    answer = reader.extract(text, "stop", question)
    assert answer is not None
    place = answer_place(text, answer, question, reader)
    assert place is not None and text[slice(*place.statement)] == statement
    assert (place.words and text[slice(*place.words)]) == words


@pytest.mark.parametrize("text", ["", "I do not know.", "<think>The capital is Paris.", "Is it?"])
def test_a_completion_without_an_answer_has_no_statement(text: str) -> None:
    reader = AnswerReader()
    assert answer_place(text, reader.extract(text, "stop", CAPITAL), CAPITAL, reader) is None


def test_an_answer_that_the_text_does_not_have_has_no_statement() -> None:
    """A parser of one's own may read what no words say."""
    assert answer_place("The capital of France is Paris.", "42", CAPITAL, AnswerReader()) is None
