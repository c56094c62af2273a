"""Answers of a chat server: reasoning is put back as a thought, what is unfinished is kept as cut off and counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from neurosig.export import main as export
from neurosig.manifest import read_manifest
from neurosig.models.load import LoadedModel, load_model
from neurosig.questions.load import Question, load_questions
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import ServerConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt
from neurosig.sampling.served import thought_marks
from neurosig.sampling.server import Server
from tests.support.flow import export_config
from tests.support.served import ServerProcess
from tests.support.tiny import CHAT_TEMPLATE, EOS_ID, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("servers")

PROMPT = Prompt("q0", tuple(range(20, 40)))
MESSAGES = {"q0": [{"role": "user", "content": "Is red nice?"}]}
QWEN3, MISTRAL, R1 = "<think>\n{}\n</think>\n\n", "[THINK]{}[/THINK]", "<think>\n{}\n</think>\n"


@pytest.fixture
def loaded(served_folder: Path) -> LoadedModel:
    return load_model(served_folder / "model")


@pytest.fixture
def question(served_folder: Path) -> Question:
    return load_questions(str(served_folder / "questions.jsonl"), limit=1)[0]


def chat(
    process: ServerProcess, loaded: LoadedModel, k: int = 1, prompt: Prompt = PROMPT, **changes: Any
) -> list[Rollout]:
    options = {"timeout": 20.0, "max_retries": 0, "concurrency": 1, **changes}
    served = Server(ServerConfig(process.base_url, "m", api="chat", **options), loaded)
    (group,) = served.sample([prompt], SamplingConfig(k, max_new_tokens=16), messages=MESSAGES)
    return group


def encoded(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@pytest.mark.parametrize(
    ("kind", "text", "finish_reason", "answer"),
    [
        ("none", "yes", "stop", "yes"),
        ("thought", "<think>\nno\n</think>\n\nyes", "stop", "yes"),
        ("thought, new name", "<think>\nno\n</think>\n\nyes", "stop", "yes"),
        ("thought cut off", "<think>\nno", "length", None),
        ("empty", "", "stop", None),
        ("empty cut off", "", "length", None),
        ("null cut off", "", "length", None),
    ],
)
def test_an_answer_is_read_as_the_model_wrote_it(
    process: ServerProcess,
    loaded: LoadedModel,
    question: Question,
    kind: str,
    text: str,
    finish_reason: str,
    answer: str | None,
) -> None:
    process.post("/control", kind=kind)
    (rollout,) = chat(process, loaded)
    assert (rollout.text, rollout.finish_reason) == (text, finish_reason)
    ended = finish_reason == "stop" or not text
    assert list(rollout.completion_ids) == encoded(loaded, text) + [EOS_ID] * ended
    assert AnswerReader().read([rollout], question).answers == (answer,)
    assert len(process.get("/seen")) == 1


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("abort", "ye", "abort"),
        ("content_filter", "", "content_filter"),
        ("tool_calls", "", "tool_calls"),
        ("null", "", "no content"),
        ("None", "yes", "None"),
    ],
)
def test_what_is_unfinished_is_asked_for_once_more_then_kept_and_counted(
    process: ServerProcess, loaded: LoadedModel, caplog: pytest.LogCaptureFixture, kind: str, text: str, reason: str
) -> None:
    process.post("/control", kind=kind, times=1)
    assert [rollout.text for rollout in chat(process, loaded)] == ["yes"]
    first, second = process.get("/seen")
    assert first["seed"] != second["seed"] and "unfinished" not in caplog.text
    process.post("/control", kind=kind, times=2)
    group = chat(process, loaded, k=3)
    assert [rollout.text for rollout in group].count("yes") >= 2
    process.post("/control", kind=kind, times=99)
    group = chat(process, loaded, k=3)
    assert [(rollout.text, rollout.finish_reason) for rollout in group] == [(text, "length")] * 3
    assert all(len(rollout.completion_ids) >= 1 for rollout in group)
    assert len(process.get("/seen")) == 6
    assert f"the server left rollouts unfinished twice, which count as cut off: 3 {reason}" in caplog.text


def test_unfinished_answers_do_not_end_an_export(
    process: ServerProcess, served_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="neurosig")
    process.post("/control", kind="tool_calls", times=6)  # the first question's, twice
    where = served_folder / "model", served_folder / "questions.jsonl"
    options: dict[str, Any] = {"sampler": "openai", "base_url": process.base_url, "server_api": "chat"}
    options |= {"concurrency": 1, "max_retries": 0, "hallucination_score": "agreement"}
    export(export_config(tmp_path, *where, **options))
    assert "the server left rollouts unfinished twice, which count as cut off: 3 tool_calls" in caplog.text
    manifest = read_manifest(tmp_path / "manifest")
    first, *others = manifest.rows
    assert first.answers == (None,) * 3 and all(None not in row.answers for row in others)
    cut_off = {key for key, rollout in manifest.rollouts.items() if rollout.finish_reason == "length"}
    assert cut_off == {(first.question_id, number) for number in range(3)}


def test_the_teacher_is_asked_with_its_context_as_earlier_turns(
    process: ServerProcess, served_folder: Path, tmp_path: Path
) -> None:
    where = served_folder / "model", served_folder / "questions.jsonl"
    options: dict[str, Any] = {"sampler": "openai", "base_url": process.base_url, "server_api": "chat"}
    options |= {"hallucination_score": "agreement", "teacher_rollouts": 2, "num_demonstrations": 1, "max_retries": 0}
    export(export_config(tmp_path, *where, **options))
    manifest = read_manifest(tmp_path / "manifest")
    by_id = {row.question_id: row for row in manifest.rows}
    chats = [request["messages"] for request in process.get("/seen") if "messages" in request]
    asked = [chat for chat in chats if len(chat) > 1]
    assert len(asked) == len(manifest.teacher_rollouts) > 0
    for row in manifest.rows:
        for item in row.context:
            text = manifest.rollouts[item.question_id, item.rollout_id].text.strip()
            own = [chat for chat in asked if row.question in chat[-1]["content"]]
            assert len(own) == 2
            assert all(by_id[item.question_id].question in chat[-3]["content"] for chat in own)
            assert all(chat[-2] == {"role": "assistant", "content": text} for chat in own)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("number", "choices.0.message.content: Input should be a valid string"),
        ("endless", "choices.0.message.content: 50000 characters, more than 16 tokens can spell"),
        ("two", "choices: expected 1, numbered from 0, got 2"),
        ("half", "answer: Invalid JSON: EOF while parsing"),
        ("html", "answer: Invalid JSON: expected value"),
        ("huge", "answer: more than"),
        ("500", "/chat/completions answers 500"),
        ("truncated", "out of reach (peer closed connection"),
    ],
)
def test_an_answer_that_cannot_be_read_is_one_sentence(
    process: ServerProcess, loaded: LoadedModel, kind: str, message: str
) -> None:
    process.post("/control", kind=kind)
    with pytest.raises(UserError) as fault:
        chat(process, loaded)
    assert str(fault.value).startswith(f'server {process.base_url}: question "q0": {message}')


@pytest.mark.parametrize("kind", ["429", "500", "truncated", "hang"])
def test_what_may_pass_is_sent_again(process: ServerProcess, loaded: LoadedModel, kind: str) -> None:
    process.post("/control", kind=kind)
    (rollout,) = chat(process, loaded, max_retries=1, timeout=1.0)
    assert rollout.text == "yes" and len(process.get("/seen")) == 2


def with_reasoning(form: str) -> str:
    """The tests' template, which writes an assistant's reasoning in this form."""
    before, _, after = form.partition("{}")
    written = f"({before!r} + message.reasoning_content + {after!r} if message.reasoning_content else '')"
    return CHAT_TEMPLATE.replace("message.content", f"{written} + message.content")


def test_a_thought_is_written_as_the_template_writes_it(process: ServerProcess, loaded: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    expected = {QWEN3: QWEN3, MISTRAL: MISTRAL, R1: R1, "": QWEN3, "(thinking: {}) ": QWEN3}
    for form, marks in expected.items():
        tokenizer.chat_template = with_reasoning(form) if form else CHAT_TEMPLATE
        assert "{}".join(thought_marks(tokenizer)) == marks
    tokenizer.chat_template = "{{ raise_exception('no reasoning') }}"
    assert "{}".join(thought_marks(tokenizer)) == QWEN3

    loaded.tokenizer.chat_template = with_reasoning(MISTRAL)
    process.post("/control", kind="thought")
    (rollout,) = chat(process, loaded)
    assert rollout.text == "[THINK]no[/THINK]yes"


def test_a_thought_that_the_prompt_opens_is_not_opened_again(
    process: ServerProcess, loaded: LoadedModel, question: Question
) -> None:
    opened = Prompt("q0", tuple(encoded(loaded, "assistant\n<think>\n")))
    for kind, text, answer in (("thought", "no\n</think>\n\nyes", "yes"), ("thought cut off", "no", None)):
        process.post("/control", kind=kind)
        (rollout,) = chat(process, loaded, prompt=opened)
        assert rollout.text == text
        assert AnswerReader(prompt_opens_thought=True).read([rollout], question).answers == (answer,)


def test_marks_that_are_tokens_of_their_own_are_encoded_as_such(process: ServerProcess, loaded: LoadedModel) -> None:
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    start, end = loaded.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    process.post("/control", kind="thought")
    (rollout,) = chat(process, loaded)
    parts = (encoded(loaded, text) for text in ("\nno\n", "\n\nyes"))
    assert list(rollout.completion_ids) == [start, *next(parts), end, *next(parts), EOS_ID]
