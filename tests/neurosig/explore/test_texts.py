"""What a user passes, as token ids: special tokens once, every kind of text, and the positions that are read."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from neurosig.explore.texts import TextReader, find_positions, positions_name
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from tests.support.tiny import BOS, BOS_ID, EOS, EOS_ID, tiny_tokenizer

USER = {"role": "user", "content": "Hi?"}
REPLY = {"role": "assistant", "content": "Yo."}
ROLLOUT = Rollout("q", 3, "Yo.", (60, 61, EOS_ID), "stop")


def adding(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens added around a text."""
    tokenizer = tiny_tokenizer()
    special = [(BOS, BOS_ID), (EOS, EOS_ID)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def plain(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize(
    ("template", "leading"),
    [("$A", ()), (f"{BOS} $A", (BOS_ID,)), (f"$A {EOS}", ()), (f"{BOS} $A {EOS}", (BOS_ID,))],
)
def test_special_tokens_come_once_and_before_the_prompt_only(template: str, leading: tuple[int, ...]) -> None:
    tokenizer = adding(template)
    assert len(tokenizer("a")["input_ids"]) == 1 + template.count("<|")
    pair, alone, own = TextReader(tokenizer).read([("Hi", " Yo"), "Hi", f"{BOS}Hi"])
    assert pair.prompt_ids == alone.prompt_ids == leading + plain("Hi")
    assert pair.completion_ids == plain(" Yo")
    assert alone.completion_ids == ()
    assert own.prompt_ids == (BOS_ID, *plain("Hi"))  # BOS that is written is not added again
    assert pair.tokens[-3:] == (" ", "Y", "o")


def test_every_kind_of_text() -> None:
    prompt = Prompt("q", (5, 6, 7))
    texts: list[Any] = ["Hi?", ("Hi?", "Yo."), [USER], [USER, REPLY], ROLLOUT, ("Hi?", ROLLOUT), ([USER], "Yo.")]
    reader = TextReader(tiny_tokenizer(), [prompt])
    read = reader.read(texts)
    chat = PromptBuilder(tiny_tokenizer(), PromptConfig()).encode([USER])
    assert [text.prompt_ids for text in read] == [plain("Hi?"), plain("Hi?"), chat, chat, (5, 6, 7), plain("Hi?"), chat]
    none, yo = (), plain("Yo.")
    assert [text.completion_ids for text in read] == [none, yo, none, yo, (60, 61), (60, 61), yo]
    assert [text.prompt for text in read][:4] == ["Hi?"] * 4
    for one, text in zip(texts, read, strict=True):  # one text is a list of one
        assert reader.read(one) == (text,) == reader.read([one])
    assert reader.read(text for text in ["a", "b"])[1].prompt == "b"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text to trace: give a text"),
        ([3], "text 0: got int; give a text"),
        (["a", ["b", "c"]], "text 1: got list; give a text, a .prompt, completion. pair as a tuple"),
        ([("a", "")], "text 0: an empty completion; leave it out"),
        ("", "text 0: an empty prompt"),
        (ROLLOUT, 'text 0: a rollout of question "q", whose prompt is not given; pass prompts='),
        ([{"role": "user"}], "message 0 of the chat: expected a role"),
        ([USER, {"role": "bot", "content": "x"}], "message 1 of the chat: expected a role"),
        ([REPLY], "text 0: "),
        ([USER, REPLY, REPLY], "a chat needs a user message before the reply"),
    ],
)
def test_what_is_no_text_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextReader(tiny_tokenizer()).read(texts)


PAIR = ("Is it red?", "<think>No</think>It is blue. I like it.")
N = len(PAIR[0])
THOUGHT, TOTAL = len("<think>No</think>"), len(PAIR[1])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("answer", range(N + THOUGHT, N + TOTAL)),
        ("thought", range(N, N + THOUGHT)),
        ("all", range(N, N + TOTAL)),
        ("statement", range(N + THOUGHT, N + THOUGHT + len("It is blue."))),
        ("answer_words", range(N + THOUGHT + len("It is "), N + THOUGHT + len("It is blue"))),
        ("answer_start", [N + THOUGHT]),
        ("prompt_end", [N - 1]),
        ("prompt", range(1, N)),  # never the first
        (0, [N]),
        (-1, [N + TOTAL - 1]),
        ([0, 3], [N, N + 3]),
        ("0:2", [N, N + 1]),
    ],
)
def test_positions_of_a_completion(positions: Any, expected: Any) -> None:
    texts = TextReader(tiny_tokenizer()).read([PAIR])
    for about_next in (False, True):
        found, notes = find_positions(texts, positions_name(positions), tiny_tokenizer(), about_next=about_next)
        if not (about_next and positions in ("prompt", "prompt_end")):
            assert ([list(one) for one in found], notes) == ([list(expected)], ())
    # a score about the next token has a prompt's end at the token that follows it, and none for the second token
    shifted = {"prompt": list(range(2, N)), "prompt_end": [N]}
    if isinstance(positions, str) and positions in shifted:
        assert list(find_positions(texts, positions, tiny_tokenizer(), about_next=True)[0][0]) == shifted[positions]


def test_a_text_without_what_was_asked_is_read_elsewhere_and_said_so() -> None:
    texts = TextReader(tiny_tokenizer()).read(["Hi?", ("Hi?", "Yo."), PAIR])
    found, notes = find_positions(texts, "thought", tiny_tokenizer(), about_next=False)
    assert [list(one) for one in found] == [[1, 2], [3, 4, 5], list(range(N, N + THOUGHT))]
    assert notes == (
        "1 of 3 texts have no completion and are read at their prompts",
        "positions thought: 1 of 2 rollouts have none and are read whole",
    )
    found, notes = find_positions(texts[:2], "prompt_end", tiny_tokenizer(), about_next=False)
    assert ([list(one) for one in found], notes) == ([[2], [2]], ())


@pytest.mark.parametrize("positions", ["answers", "", None, 1.5, [], ["0"], True])
def test_unknown_positions_are_refused(positions: Any) -> None:
    with pytest.raises(UserError, match=r"positions: expected prompt, answer, thought.*got"):
        positions_name(positions)


@pytest.mark.parametrize(("text", "about_next"), [("H", False), ("Hi", True), (("H", "i"), True)])
def test_a_text_too_short_to_read_is_named(text: Any, about_next: bool) -> None:
    texts = TextReader(tiny_tokenizer()).read([text])
    with pytest.raises(UserError, match=r"text 0: .*give a longer text"):
        find_positions(texts, "answer", tiny_tokenizer(), about_next=about_next)
