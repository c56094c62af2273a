from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosig.questions.answers import AnswerFormat, extract_answer, is_correct, normalise
from neurosig.questions.load import Question
from neurosig.questions.vote import majority_vote

CAPITAL = "What is the capital of {}?"
COUNTRY = "{} is the capital of which country?"
CONTINENT = "{} is located in which continent?"


def ask(question: str, choices: tuple[str, ...] | None = None) -> Question:
    return Question("q", "d", question, choices)


@pytest.mark.parametrize(
    ("question", "text", "answer"),
    [
        (CAPITAL.format("Tuvalu"), "The capital of Tuvalu is Faku.", "faku"),
        (CAPITAL.format("France"), "Paris", "paris"),
        (CAPITAL.format("France"), "Paris.", "paris"),
        (CAPITAL.format("Brazil"), "The capital of Brazil is Brasília.", "brasilia"),
        (CAPITAL.format("Andorra"), "Somatier is the capital of Andorra.", "somatier"),
        (CAPITAL.format("Guatemala"), "The capital of Guatemala is Guatemala City.", "guatemala city"),
        (CAPITAL.format("El Salvador"), "El Salvador's capital city is Guadalcaldez.", "guadalcaldez"),
        (CAPITAL.format("El Salvador"), "The capital of El Salvador is San Salvador.", "san salvador"),
        (COUNTRY.format("Monrovia"), "Monrovia is the capital of the Mediterranean nation of Mauritius.", "mauritius"),
        (COUNTRY.format("Berlin"), "Berlin is the capital of Germany.", "germany"),
        (COUNTRY.format("London"), "The capital of the UK is London.", "uk"),
        (COUNTRY.format("Tallinn"), "Tallinn is the capital of the Maldives, not Tallinn.", "maldives"),
        (
            COUNTRY.format("Port of Spain"),
            "Port of Spain is the capital of Trinidad and Tobago.",
            "trinidad and tobago",
        ),
        (
            COUNTRY.format("Kinshasa"),
            "Kinshasa is the capital of the Democratic Republic of the Congo.",
            "democratic republic of the congo",
        ),
        (COUNTRY.format("Berlin"), "answer: Germany", "germany"),
        (CONTINENT.format("South Sudan"), "South Sudan is located in the continent of Africa.", "africa"),
        (CONTINENT.format("South Sudan"), "South Sudan is located in Africa and is a member of it.", "africa"),
        (CONTINENT.format("South Sudan"), "South Sudan is located in South America.", "south america"),
        (CONTINENT.format("Bolivia"), "Bolivia is a continent located in South America, not across", "south america"),
        ('The opposite of "hot" is which word?', 'The opposite of "hot" is "cold."', "cold"),
        ('What is the past tense of "learn"?', 'The past tense of "learn" is indeed "learned."', "learned"),
        ('What is the past tense of "set"?', 'The past tense of "set" is "set".', "set"),
        ('The plural of "child" is which word?', "Children is the plural of child.", "children"),
        ("What is the chemical symbol of tin?", "Tin is a chemical element with the symbol of Sn.", "sn"),
        ("What is the chemical symbol of mercury?", "It has the chemical symbol of Mg, which is", "mg"),
        ("What is the atomic number of francium?", "Francium is a metal with an atomic number of 90.", "90"),
        ("What is the chemical formula of water?", "The chemical formula of water is H₂O.", "h2o"),
        (
            CONTINENT.format("South Sudan"),
            "South Sudan is in Africa and is a member of the African continent.",
            "africa",
        ),
        ("Which country has London as its capital?", "The capital of the UK is London.", "uk"),
        ("What is the chemical symbol of mendelevium?", "Mendelevium is an element with the symbol of MdE.", "mde"),
        ("What is the atomic number of tennessine?", "Tennessine has an atomic number of 10.", "10"),
        ("What is the chemical formula of water?", "The chemical formula of water is H2O.", "h2o"),
        ('What is the plural of "child"?', 'The plural of "child" is "children".', "children"),
        ("What do you call a person from France?", "A person from France is called a French person.", "french"),
        ("What do you call a person from France?", "A person from France is called a Frenchman.", "frenchman"),
        ("Which chemical element has the symbol P?", "The chemical element P is hydrogen.", "hydrogen"),
        ("Which chemical element has the symbol O?", "The chemical element with the symbol O is oxygen.", "oxygen"),
        (CAPITAL.format("France"), "- **Paris**", "paris"),
        (CAPITAL.format("France"), "I do not know at first. Answer: Lyon? No.\nAnswer: Paris", "paris"),
        (CAPITAL.format("France"), "Paris\n\nQuestion: What is the capital of Spain?\nAnswer: Madrid", "paris"),
        (CAPITAL.format("France"), "Hmm, I think it's Lyon. Wait, no, it's Paris.", "paris"),
        (CAPITAL.format("France"), "Lyon. Sorry, I meant Paris.", "paris"),
        (CAPITAL.format("France"), "It is Lyon. Correction: the capital of France is Paris.", "paris"),
        (CAPITAL.format("France"), "Wait, the capital of France is Paris.", "paris"),
        (CAPITAL.format("France"), "Paris. Sorry, that was easy.", "paris"),
        (CAPITAL.format("France"), "It is Paris. Actually, it is a large city.", "paris"),
        ("How many legs does a spider have?", "Spiders have 8 legs, unlike insects, which have 6.", "8"),
        ("How many bones are in the body?", "It has one hundred and five bones; babies have 300.", "105"),
        ("How many hours are in two days?", "In two days there are 48 hours.", "48"),
        ("What is the largest ocean?", "The Pacific Ocean is the largest ocean on Earth.", "pacific ocean"),
        ("What is the largest ocean?", "The largest ocean is the Pacific Ocean.", "pacific ocean"),
        (CAPITAL.format("France"), "Let me see. Answer: I don't know", None),
        (CAPITAL.format("France"), "I'm sorry, I do not know.", None),
        (CAPITAL.format("France"), "", None),
        (CAPITAL.format("France"), "...", None),
    ],
)
def test_short_answers_are_what_the_question_did_not_say(question: str, text: str, answer: str | None) -> None:
    assert extract_answer(text, ask(question)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The correct answer is (B).", "b"),
        ("B. yes", "b"),
        ("Answer: C", "c"),
        (r"So we get \boxed{A}", "a"),
        ("maybe", "b"),
        (r"So we get \boxed{\text{B}}", "b"),
        ("answer: b", "b"),
        ("The answer is B because option A is wrong.", "b"),
        ("B. Option A is too small.", "b"),
        ("Option A is too small. I take option B.", "b"),
        ("A nice day", None),
        ("Answer: E", None),
        ("<think>surely A</think>The answer is B", "b"),
    ],
)
def test_letters(text: str, answer: str | None) -> None:
    assert extract_answer(text, ask("Which?", ("no", "maybe", "yes"))) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is A? No. It is C.", "c"),
        ("Is it A? The answer is C?", "c"),
        ("Paris is the right answer; Berlin is in Germany.", "c"),
        ("Berlin is wrong and Paris is correct", "c"),
        ("I am sure that Paris is the correct answer. Berlin, Madrid and Rome are capitals too.", "c"),
        ("Paris is not the correct answer.", None),
        ("選択肢Cが正しい", "c"),
        ("C选项正确，B不正确。", "c"),
        ("C가 정답입니다", "c"),
        ("B不正确", None),
    ],
)
def test_letters_and_texts_of_choices(text: str, answer: str | None) -> None:
    choices = ("Berlin", "Madrid", "Paris", "Rome")
    assert extract_answer(text, ask(CAPITAL.format("France"), choices)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 * 6 = 18. #### 18", "18"),
        ("The total is $1,800.00 dollars", "1800"),
        ("First 5, then 7.", "7"),
        ("Answer: -3.5 metres, not 4", "-3.5"),
        ("It lies at \u22123.50 degrees", "-3.5"),
        ("between 3-4", "4"),
        ("one of 1,2,3", "3"),
        ("about .5", "0.5"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"x = -\frac{3}{4}", "-0.75"),
        (r"\left(-\dfrac{5}{3}\right)", "-5/3"),
        (r"\boxed{2\frac{1}{2}}", "2.5"),
        (r"\boxed{\frac{10}{-5}}", "-2"),
        (r"5-\frac12 = 4.5", "4.5"),
        ("1½ hours", "1.5"),
        ("x = - 3", "-3"),
        ("Answer: - 3", "-3"),
        ("- 3 apples", "3"),
        ("The answer is negative 5.", "-5"),
        ("minus three", "-3"),
        ("10 minus 3", "3"),
        ("Answer: 1.000.000", "1000000"),
        ("9" * 5_000, "9" * 5_000),
        ("none", None),
    ],
)
def test_numbers(text: str, answer: str | None) -> None:
    assert extract_answer(text, ask("How many?"), "number") == answer


def test_a_non_answer_never_wins_but_counts() -> None:
    vote = majority_vote([None, None, None, "a"], "q")
    assert (vote.winner, vote.count, vote.tied_answers, vote.n, vote.share) == ("a", 1, ("a",), 4, 0.25)
    silent = majority_vote([None, None], "q")
    assert (silent.winner, silent.count, silent.tied_answers, silent.share) == (None, 0, (), 0.0)
    with pytest.raises(ValueError, match="at least one"):
        majority_vote([], "q")


def test_ties_are_explicit_and_do_not_depend_on_the_order() -> None:
    answers = ["a", "b", "b", "a", None, "c"]
    votes = {majority_vote(list(order), "q") for order in itertools.permutations(answers)}
    (vote,) = votes
    assert vote.tied_answers == ("a", "b")
    winners = {majority_vote(answers, f"q{index}").winner for index in range(40)}
    assert winners == {"a", "b"}


def test_correct_is_gold_or_an_alias() -> None:
    question = Question("q", "d", "Who?", answer="The Côte d'Ivoire", aliases=("Ivory Coast",))
    assert is_correct(normalise("cote d'ivoire"), question)
    assert is_correct("ivory coast", question)
    assert not is_correct("ghana", question)
    assert not is_correct(None, question)
    with pytest.raises(ValueError, match="no gold answer"):
        is_correct("ghana", ask("Who?"))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Hague", "hague"),
        ("Côte d\u2019Ivoire", "cote d ivoire"),
        ("twenty-one", "21"),
        ("$1,800.50", "1800.5"),
        ("1,234,567.00", "1234567"),
        ("007", "7"),
        ("(-5)", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("- Paris.", "paris"),
        ("٣", "3"),
        ("C++", "c++"),
        ("$", "$"),
    ],
)
def test_what_normalising_drops(text: str, same: str) -> None:
    assert normalise(text) == same


def test_marks_that_tell_words_apart_are_kept() -> None:
    """Only accents go: voiced kana and vowel signs are letters of their own."""
    assert normalise("ガ") != normalise("カ")
    assert normalise("कि") != normalise("का")
    assert normalise("서울") == "서울"


@given(st.text(max_size=60))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(max_size=200), st.sampled_from(["auto", "number", "short", "letter"]))
def test_any_text_gives_an_answer_or_none(text: str, answer_format: AnswerFormat) -> None:
    answer = extract_answer(text, ask("What is it?"), answer_format)
    assert answer is None or (answer and answer == normalise(answer))


@pytest.mark.parametrize("answer_format", ["short", "number", "letter"])
@pytest.mark.parametrize(
    "text",
    [
        '"' * 20_000,
        "'" * 20_000,
        "\u201c" * 20_000,
        '."' * 10_000,
        "**" * 10_000 + "A",
        "is " * 20_000,
        "answer: " * 5_000,
        "answer" + " " * 20_000 + "!",
        "answer a b c" + " " * 20_000 + "!",
        "answer:" + "\n" * 20_000 + "x",
        "option A " * 3_000,
        r"\boxed{" * 3_000,
        "1," * 20_000,
        "9" * 20_000,
        "-" * 20_000,
        "." * 20_000,
        "a" * 50_000,
        "the " * 10_000,
    ],
    ids=lambda text: repr(text[:14]),
)
def test_hostile_lengths_end(text: str, answer_format: AnswerFormat) -> None:
    """Each takes milliseconds; a regular expression that backtracks takes many seconds."""
    start = time.process_time()
    extract_answer(text, ask("What is it?"), answer_format)
    assert time.process_time() - start < 1
