"""Columns of other names, ids and answers of every form, prompts and chats, and what only the teacher sees."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from neurosig.questions.load import Question, load_questions, questions_sha256
from neurosig.questions.prompts import (
    PRIVILEGED_WORDING,
    Demonstration,
    PromptBuilder,
    PromptConfig,
    privileged_question,
)
from neurosig.runtime.errors import UserError
from tests.support.question_files import GOOD, fails, one, write
from tests.support.tiny import tiny_tokenizer

# ---- columns ----


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["x", "y", "z"], 2, "C"),
        (["x", "y", "z"], "2", "C"),
        (["x", "y", "z"], 2.0, "C"),
        (["x", "y", "z"], "B", "B"),
        (["x", "y", "z"], "b", "B"),
        (["x", "y", "z"], "(B)", "B"),
        (["x", "y", "z"], "Answer: B", "B"),
        (["x", "y", "z"], "z", "C"),
        (["A. x", "B. y", "C. z"], "C. z", "C"),
        (["1", "2", "3"], "2", "B"),
        (["1", "2", "3"], 2, "C"),
        ('["x", "y", "z"]', "C", "C"),
        ("['x', 'y', 'z']", "C", "C"),
        ({"A": "x", "B": "y", "C": "z", "D": None}, "C", "C"),
        ({"A": "x", "B": "y", "C": "z"}, 0, "A"),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "1", "A"),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, 1, "A"),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "C", "C"),
        ([{"text": "x", "label": "A"}, {"text": "y", "label": "B"}], "B", "B"),
    ],
)
def test_every_form_of_a_gold_answer_names_its_letter(tmp_path: Path, choices: Any, answer: Any, letter: str) -> None:
    record = {"nr": 5, "stem": "Which?", "opts": choices, "gold": answer, "meta": {"field": "bio"}}
    names = ("question=stem", "choices=opts", "answer=gold", "id=nr", "kind=meta.field")
    question = one(tmp_path, record, fields=names)
    assert (question.id, question.question, question.answer, question.kind) == ("5", "Which?", letter, "bio")
    native = {"id": 5, "question": "Which?", "choices": choices, "answer": answer, "kind": "bio"}
    assert one(tmp_path, native) == question


def test_one_column_per_choice(tmp_path: Path) -> None:
    record = {"question": "Which?", "A": "x", "B": "y", "C": None, "subject": "law", "answer": "B"}
    names = ("choices=A,B,C", "domain=subject")
    question = one(tmp_path, record, fields=names)
    assert (question.domain, question.choices, question.answer) == ("law", ("x", "y"), "B")
    for bad in ("C", 2, -1, True):
        message = fails(write(tmp_path / "bad.jsonl", {**record, "answer": bad}), fields=names)
        assert 'bad.jsonl:1: field "answer": expected a letter of A-B, got' in message


def test_other_columns_keep_their_meaning(tmp_path: Path) -> None:
    """Named columns win over those of our names, of which the others are read as ever."""
    record = {**GOOD, "stem": "Why?", "why": "Since.", "aliases": ["thing"]}
    question = one(tmp_path, record, fields=("question=stem", "privileged_context=why"))
    assert question == Question("a", "d", "Why?", None, "it", ("thing",), line=1, privileged_context="Since.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("question=stm",), '{path}:1: no column "stm" (--fields question); the record has id, q, q.stem, gold'),
        (("kind=sort", "question=q.stem"), '--fields: no record has a column "sort"; the last one has id, q, q.stem'),
        (("stem=question",), '--fields stem=question: no field "stem"; the fields are question, prompt, messages'),
        (("question",), "--fields question: expected FIELD=COLUMN; the fields are question, "),
        (("question=", "x=y"), "--fields question=: expected FIELD=COLUMN"),
        (("question=a", "prompt=b"), "question and prompt would both ask the question; give one of them"),
        (("answer=a", "answer=b"), "--fields answer=b: expected each field and each column once"),
        (("choices=A,,B",), "--fields choices=A,,B: expected each field and each column once, none empty"),
    ],
)
def test_a_wrong_column_is_named_with_those_there_are(tmp_path: Path, fields: tuple[str, ...], message: str) -> None:
    path = write(tmp_path / "set.jsonl", {"id": "a", "q": {"stem": "Why?"}, "gold": "it"})
    assert message.format(path=path) in fails(path, fields=fields)


def test_a_column_that_some_records_lack_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, {**GOOD, "id": "b", "question": "b?", "hint": "An h."})
    questions = load_questions([path, "language:dev"], fields=("privileged_context=hint",))
    assert [question.privileged_context for question in questions[:2]] == [None, "An h."]


# ---- ids, answers, choices ----


def test_ids_are_made_of_the_text(tmp_path: Path) -> None:
    """The same in another file, place or line; a repeated question gets a number."""
    records = [{"question": text} for text in ("Why?", "How?", "Why?")]
    first = load_questions(write(tmp_path / "set.jsonl", *records))
    assert [question.id for question in first[:2]] == [question.text_sha256[:16] for question in first[:2]]
    assert first[2].id == f"{first[0].id}-2"
    (tmp_path / "other").mkdir()
    other = load_questions(write(tmp_path / "other" / "test.jsonl", *records[1::-1]))
    assert [question.id for question in other] == [first[1].id, first[0].id]


@pytest.mark.parametrize(
    ("record", "answer", "aliases"),
    [
        ({"answer": 18}, "18", ()),
        ({"answer": 3.0}, "3", ()),
        ({"answer": 2.5}, "2.5", ()),
        ({"answer": True}, "Yes", ("True",)),
        ({"answer": ["Ann", "Anna"]}, "Ann", ("Anna",)),
        ({"answer": [18, 18.5], "task": ["x"], "category": {"y": 1}}, "18", ("18.5",)),
        ({"answers": {"text": ["Ann", "Anna"], "answer_start": [3, 3]}}, "Ann", ("Anna",)),
    ],
)
def test_answers_of_other_types(tmp_path: Path, record: dict[str, Any], answer: str, aliases: tuple[str, ...]) -> None:
    question = one(tmp_path, {"id": 7, "question": "Who?", **record})
    assert (question.id, question.answer, question.aliases) == ("7", answer, aliases)


@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}", " {}: {}"])
@pytest.mark.parametrize("letters", ["ABC", "abc"])
def test_letters_of_choices_are_not_doubled(tmp_path: Path, form: str, letters: str) -> None:
    texts = ("red", "A. b", "grey")
    given = [form.format(letter, text) for letter, text in zip(letters, texts, strict=True)]
    question = one(tmp_path, {**GOOD, "choices": given, "answer": given[2]})
    assert (question.choices, question.answer) == (texts, "C")


def test_what_only_looks_like_a_letter_stays(tmp_path: Path) -> None:
    for given in (["A. Lincoln", "C. Darwin"], ["A. x", "y"], ["B. x", "A. y"]):
        assert list(one(tmp_path, {**GOOD, "choices": given, "answer": "A"}).choices or ()) == given


# ---- prompts and chats ----

CONFIG = PromptConfig(system="Be kind.", instruction="Be brief.", choice_instruction="Give a letter.")
CHAT = [
    {"role": "system", "content": "You keep books."},
    {"role": "user", "content": "Ready?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Who owes?"},
]


def prompt_of(question: Question, *context: Demonstration) -> str:
    builder = PromptBuilder(tiny_tokenizer(), CONFIG)
    return builder.tokenizer.decode(list(builder.teacher(question, context) if context else builder.student(question)))


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def test_a_prompt_is_sent_as_it_is(tmp_path: Path) -> None:
    question = one(tmp_path, {"prompt": "Red or blue? One word.", "choices": ["Red", "blue"], "answer": "A"})
    assert prompt_of(question) == chat(("system", "Be kind."), ("user", "Red or blue? One word."))
    listed = one(tmp_path, {"prompt": "Which?", "choices": ["Red", "blue"]}, fields=("question=prompt",))
    assert prompt_of(listed).endswith("Which?\nA. Red\nB. blue\nGive a letter.<|im_end|>\n<|im_start|>assistant\n")
    lacking = fails(write(tmp_path / "bad.jsonl", {"prompt": "Red or?", "choices": ["Red", "blue"]}))
    assert "lacks the choice 'blue' (str); have the choices listed with --fields question=COLUMN" in lacking


@pytest.mark.parametrize("column", ["messages", "prompt", "chat"])
def test_the_turns_before_the_question_are_kept(tmp_path: Path, column: str) -> None:
    fields = ("messages=chat",) if column == "chat" else ()
    question = one(tmp_path, {column: CHAT, "answer": "Ann"}, fields=fields)
    turns = [(turn["role"], turn["content"]) for turn in CHAT]
    assert prompt_of(question) == chat(*turns)
    system, ready, yes, last = turns
    shown = Demonstration(question, "Ann.")
    before = [("user", "Ready?"), ("assistant", "Yes."), ("user", "Who owes?"), ("assistant", "Ann.")]
    assert prompt_of(Question("b", "d", "Why?"), shown) == chat(
        ("system", "Be kind."), *before, ("user", "Why?\nBe brief.")
    )
    assert prompt_of(question, shown) == chat(system, *before, ready, yes, last)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:3], 'field "messages": the last message is from the assistant; expected the user\'s question'),
        ([], 'field "messages": expected a list of messages, got an empty one'),
        ("Hello", "field \"messages\": expected a list of messages with role and content, got 'Hello' (str)"),
        (["Hello"], 'field "messages[0]": expected an object with role and content'),
        ([{"from": "human"}], 'field "messages[0]": expected an object with role and content'),
        ([{"role": "tool", "content": "x"}], 'field "messages[0].role": expected one of system, user, assistant'),
        ([*CHAT[1:], CHAT[0]], 'field "messages[3].role": expected one of user, assistant'),
        ([{"role": "user", "content": None}], 'field "messages[0].content": expected text, got null'),
        ([{"role": "user", "content": ["x"]}], "field \"messages[0].content\": expected text, got ['x']"),
    ],
)
def test_malformed_messages_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    assert f"set.jsonl:1: {message}" in fails(write(tmp_path / "set.jsonl", {"messages": messages}))


def test_a_system_message_per_question_wins_over_the_option(tmp_path: Path) -> None:
    own = one(tmp_path, {**GOOD, "system": "Be curt."})
    assert prompt_of(own).startswith("<|im_start|>system\nBe curt.<|im_end|>")
    assert prompt_of(one(tmp_path, {**GOOD, "system": ""})).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert one(tmp_path, {**GOOD, "tone": "Be curt."}, fields=("system=tone",)) == own


def test_what_the_student_reads_is_in_the_hash(tmp_path: Path) -> None:
    """And the privileged context is not, which is no part of the question."""
    plain = {**GOOD, "question": "Who owes?"}
    changes: list[dict[str, Any]] = [{}, {"system": "x"}, {"as_is": True}, {"earlier_turns": [["user", "x"]]}]
    changes += [{"earlier_turns": [["assistant", "x"]]}, {"earlier_turns": [["user", "x"], ["assistant", "x"]]}]
    questions = [one(tmp_path, {**plain, **change}) for change in changes]
    assert len({question.text_sha256 for question in questions}) == len({*map(prompt_of, questions)}) == len(changes)
    shown = one(tmp_path, {**plain, "privileged_context": "Ann owes."})
    assert questions_sha256([shown]) == questions_sha256(questions[:1])


# ---- what only the teacher sees ----


def test_the_privileged_context_is_the_teachers_alone(tmp_path: Path) -> None:
    """In the default wording the teacher's prompt ends as the student's does."""
    question = one(
        tmp_path, {**GOOD, "choices": ["x", "y"], "answer": "A", "privileged_context": ["It is {question}", "x."]}
    )
    student = prompt_of(question)
    assert "It is" not in student and student == prompt_of(replace(question, privileged_context=None))
    teacher = prompt_of(privileged_question(question, CONFIG, PRIVILEGED_WORDING))
    user_turn = "What is it?\nA. x\nB. y\nGive a letter."
    assert teacher.endswith(f"do not mention it.\n\nIt is {{question}}\n\nx.\n\n{student[student.index(user_turn) :]}")
    own = prompt_of(privileged_question(question, CONFIG, "{question}\n({privileged_context})"))
    assert f"{user_turn}\n(It is {{question}}\n\nx.)<|im_end|>" in own
    bare = one(tmp_path, GOOD)
    assert privileged_question(bare, CONFIG, PRIVILEGED_WORDING) == bare


def test_the_fields_round_trip(tmp_path: Path) -> None:
    """A question written as JSON with its own field names is read back, as figures.grid does."""
    question = Question("a", "d", "Who owes?", ("Ann", "owes"), "A", system="s", earlier_turns=(("user", "x"),),
                        as_is=False, privileged_context="p", line=1)  # fmt: skip
    assert one(tmp_path, {name: value for name, value in asdict(question).items() if name != "line"}) == question
    with pytest.raises(UserError, match="expected turns of user and assistant"):
        Question("a", "d", "q?", earlier_turns=(("system", "x"),))
