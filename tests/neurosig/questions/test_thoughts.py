"""Thoughts of every kind of model: how they are read, and how demonstrations show them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from neurosig.questions.answers import extract_answer
from neurosig.questions.load import Question
from neurosig.questions.prompts import (
    Demonstration,
    PromptBuilder,
    PromptConfig,
    check_same_stream,
    teacher_config,
)
from neurosig.questions.thoughts import MARKS
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import answer_start, completion_text
from tests.support.thinking import DROPS, DROPS_AND_OPENS, KEEPS, OPENS
from tests.support.tiny import tiny_tokenizer

ASKED, OTHER = Question("a", "d", "Why is it?"), Question("o", "d", "Who was it?")


def builder(template: str, thinking: bool | None = None, thoughts: bool = False) -> PromptBuilder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return PromptBuilder(tokenizer, PromptConfig(enable_thinking=thinking, demonstration_thoughts=thoughts))


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_a_thought_that_is_not_closed_has_no_answer(opening: str, closing: str) -> None:
    """Opened by the completion or by the template's generation prompt, with the marks of any model."""
    question = Question("q", "d", "What is the capital of France?")
    template = KEEPS.replace("'<|im_start|>assistant\\n' }}", f"'<|im_start|>assistant\\n{opening}' }}}}", 1)
    opens = builder(template).opens_thought
    assert opens and not builder(KEEPS).opens_thought
    for before, in_prompt in ((opening, False), ("", opens)):
        thought = f"{before}It might be Lyon. Answer: Lyon."
        assert extract_answer(thought, question, prompt_opens_thought=in_prompt) is None
        assert extract_answer(f"{thought}{closing}Paris.", question, prompt_opens_thought=in_prompt) == "paris"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_the_answer_starts_after_the_token_that_closes_the_thought(opening: str, closing: str, special: bool) -> None:
    """Whether the marks are tokens, special ones, or spelt."""
    tokenizer = tiny_tokenizer()
    if special and "channel" not in opening:
        tokenizer.add_tokens([AddedToken(mark, special=True) for mark in (opening, closing)])
    thought, answer = f"{opening}It is 5 \u20ac, naïve.{closing}", "\n\nAnswer: Paris 🙂."
    before, after = (tokenizer(text)["input_ids"] for text in (thought, answer))

    def decode(ids: list[int]) -> str:
        return completion_text(tokenizer, ids)

    assert decode(before + after) == thought + answer
    assert answer_start(decode, before + after) == len(before)
    assert answer_start(decode, after) == 0 == answer_start(decode, before[:-1])
    assert answer_start(decode, before) == len(before)


@pytest.mark.parametrize("template", [KEEPS, DROPS, OPENS, DROPS_AND_OPENS])
@pytest.mark.parametrize("thoughts", [False, True])
def test_demonstrations_show_what_the_option_says_whatever_the_template_does(template: str, thoughts: bool) -> None:
    """With the thought or without it, token for token the text that the model wrote itself."""
    opened = builder(template).opens_thought
    opening = "<think>\n"
    response = "red or blue?\n</think>\n\nRed." if opened else f"{opening}red or blue?\n</think>\n\nRed."
    prompts = builder(template, thoughts=thoughts)
    ids = prompts.teacher(ASKED, [Demonstration(OTHER, response)])
    shown = "<think>\nred or blue?\n</think>\n\nRed." if thoughts else "Red."
    instruction = PromptConfig().instruction
    assert prompts.tokenizer.decode(list(ids)) == (
        f"<|im_start|>user\nWho was it?\n{instruction}<|im_end|>\n<|im_start|>assistant\n{shown}<|im_end|>\n"
        f"<|im_start|>user\nWhy is it?\n{instruction}<|im_end|>\n<|im_start|>assistant\n{opening * opened}"
    )
    assert ids[-len(prompts.student(ASKED)) :] == prompts.student(ASKED)
    assert prompts.teacher(ASKED, [Demonstration(OTHER, "Red.")]) == builder(template).teacher(
        ASKED, [Demonstration(OTHER, response)]
    )


def test_marks_that_are_special_tokens_stay_tokens_in_demonstrations_alone() -> None:
    """A question that spells one has it as text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("[THINK]", "[/THINK]")])
    prompts = PromptBuilder(tokenizer, PromptConfig(demonstration_thoughts=True))
    question = Question("h", "d", "Is [THINK] a mark?")
    ids = prompts.teacher(question, [Demonstration(OTHER, "[THINK]Well.<|im_end|>[/THINK]Ann.")])
    marks = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    assert [ids.count(mark) for mark in marks] == [1, 1]
    assert ids.count(tokenizer.eos_token_id) == 3  # none of the thought's own


def test_a_template_that_cannot_show_demonstrations_is_refused() -> None:
    empty = "('<think></think>' if message.role == 'assistant' else '') + message.content +"
    shown = [Demonstration(OTHER, "<think>Well.</think>Ann.")]
    with pytest.raises(UserError, match=r"empty thought before earlier answers.*--demonstration-thoughts"):
        builder(KEEPS.replace("message.content +", empty), thoughts=True).teacher(ASKED, shown)
    mute = KEEPS.replace("message.content +", "(message.content if message.role == 'user' else '') +")
    with pytest.raises(UserError, match="leaves out a message"):
        builder(mute).teacher(ASKED, [Demonstration(OTHER, "u")])  # though a question has this letter


@pytest.mark.parametrize(
    ("template", "student", "teacher", "refused"),
    [
        (KEEPS, None, None, ""),
        (KEEPS, False, None, ""),
        (KEEPS, True, False, "the student's prompt ends without a thought, the teacher's after an empty thought"),
        (OPENS, None, True, ""),
        (OPENS, False, True, "the student's prompt ends after an empty thought, the teacher's inside a thought"),
        (OPENS, True, False, "the student's prompt ends inside a thought, the teacher's after an empty thought"),
    ],
)
def test_modes_that_read_an_answer_as_a_thought_are_refused(
    template: str, student: bool | None, teacher: bool | None, refused: str
) -> None:
    own = builder(template, student)
    other = PromptBuilder(own.tokenizer, teacher_config(own.config, teacher, False))
    if not refused:
        return check_same_stream(own, other)
    with pytest.raises(UserError, match=f"--teacher-thinking: {refused}, but the teacher scores the student's"):
        check_same_stream(own, other)


def test_a_teacher_that_expects_a_thought_is_named(caplog: pytest.LogCaptureFixture) -> None:
    own = builder(KEEPS, False)
    check_same_stream(own, PromptBuilder(own.tokenizer, teacher_config(own.config, True, False)))
    assert "the teacher expects a thought where the student answers" in caplog.text and "--skip-first" in caplog.text
