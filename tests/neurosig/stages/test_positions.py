"""Which tokens are read: the indices of each choice, their traces against plain hooks, and what depends on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from neurosig.export import ExportConfig
from neurosig.exported import Exported
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.arguments import parse_config
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout, completion_text
from neurosig.stages.positions import PROMPT_END, read_positions, token_span, traced_at
from tests.support.exports import write_lines
from tests.support.flow import export_config, make_manifest, save_tiny, write_questions
from tests.support.hooked import hooked_scores
from tests.support.tiny import D_MLP, rollouts, tiny_model, tiny_tokenizer

QUESTION = Question(id="q", question="What is the capital of France?", domain="d")
TEXT = "<think>Hm.</think>\nSure. The capital of France is Orléans. I like it."


def rollout(text: str) -> Rollout:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    start = len(tokenizer(text.partition("</think>")[0] + "</think>")["input_ids"]) if "</think>" in text else 0
    return Rollout("q", 0, text, (*ids, tokenizer.eos_token_id), "stop", answer_start=start)


def read(positions: str, *texts: str) -> tuple[list[Any], str]:
    group = [rollout(text) for text in texts]
    indices, note = read_positions(positions, {"q": group}, [QUESTION], AnswerReader(), tiny_tokenizer())
    return indices["q"], note


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", TEXT),
        ("thought", "<think>Hm.</think>"),
        ("answer", "\nSure. The capital of France is Orléans. I like it."),
        ("answer_start", "\n"),
        ("statement", "The capital of France is Orléans."),
        ("answer_words", "Orléans"),
        ("0", "<"),
        ("-1", "."),
        ("0:3", "<th"),
        ("-3:", "it."),
        ("0,-1,3:5", "<in."),
        (":-3", TEXT[:-3]),
    ],
)
def test_each_choice_reads_its_tokens(positions: str, expected: str) -> None:
    """A token of this tokenizer is a byte: é is two."""
    (indices,), note = read(positions, TEXT)
    ids = rollout(TEXT).completion_ids
    assert completion_text(tiny_tokenizer(), [ids[index] for index in indices]) == expected
    assert note == ""


@pytest.mark.parametrize(
    ("positions", "read_as", "text"),
    [
        ("statement", "answer", "I do not know."),
        ("answer_words", "answer", "<think>Hm.</think>Who knows?"),
        ("99", "answer", "Paris"),
        ("7:9", "answer", "Paris"),
        ("answer_start", "answer", "<think>Hm.</think>"),
        ("thought", "all", "Paris"),
    ],
)
def test_a_rollout_without_such_a_token_is_counted_and_read_otherwise(positions: str, read_as: str, text: str) -> None:
    found, note = read(positions, text, "<think>Hm.</think>" + "It is Paris." * 9)
    assert found[0] == read(read_as, text)[0][0] and len(found[0]) > 0
    how = "whole" if positions == "thought" else "at their answers"
    assert note == f"positions {positions}: 1 of 2 rollouts have none and are read {how}"


def test_every_character_is_found_by_its_tokens() -> None:
    tokenizer, text = tiny_tokenizer(), "aé日b\u00a0🙂c"
    ids = tokenizer(text)["input_ids"]
    places = [0, *(len(text[:end].encode()) for end in range(1, len(text) + 1))]
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            assert token_span(tokenizer, ids, text, start, end) == range(places[start], places[end])


def test_a_token_over_an_end_of_the_span_belongs_to_it(smollm2: Any) -> None:
    text = "The capital is Lagos, they say."
    ids = smollm2.tokenizer(text)["input_ids"]
    span = token_span(smollm2.tokenizer, ids, text, text.index("Lagos"), text.index(","))
    assert smollm2.tokenizer.decode([ids[index] for index in span]) == " Lagos"


@pytest.mark.parametrize("batch_tokens", [1, 4096])
@pytest.mark.parametrize("score", ["cett", "unembed"])
def test_every_choice_is_traced_as_by_hooks(score: Literal["cett", "unembed"], batch_tokens: int) -> None:
    """Padded with others or alone; what ``unembed`` says of a token is read at the position before it."""
    model = tiny_model("llama")
    prompts, completions = rollouts([(6, 4), (4, 9), (6, 4), (5, 7), (6, 1), (3, 5)])
    chosen: list[Any] = [range(4), range(3, 9), [0], [0, 2, 6], PROMPT_END, PROMPT_END]
    about_next = score == "unembed"
    expected = []
    for prompt, completion, indices in zip(prompts, completions, chosen, strict=True):
        where = [len(prompt) + index - about_next for index in indices]
        if indices == PROMPT_END:
            where = [len(prompt) - 1]
        expected.append(hooked_scores(model, prompt + completion, score=score)[where].mean(dim=0).float())
    rows = [traced_at(*row, about_next=about_next) for row in zip(prompts, completions, chosen, strict=True)]
    masks = [[k in indices for k in range(len(completion))] for _, completion, indices in rows]
    tracer = NeuronTracer(model, TraceConfig(score=score, set_size=10**6, batch_tokens=batch_tokens))
    sets = tracer.trace([row[0] for row in rows], [row[1] for row in rows], token_masks=masks)
    torch.testing.assert_close(
        sets.contributions.unflatten(1, (-1, D_MLP)), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


def test_a_prompt_of_one_token_has_no_end_to_read() -> None:
    with pytest.raises(UserError, match="--positions prompt_end: a prompt of one token; it needs two"):
        traced_at([5], [6, 7], PROMPT_END, about_next=False)


def write_world(folder: Path) -> dict[str, Any]:
    """Rollouts of which one per question has no answer."""
    save_tiny(folder / "model")
    write_questions(folder / "questions.jsonl", 5)
    texts = ["Sure. The answer is yes.", "The answer is no. I like it.", "I do not know."]
    lines = [{"question_id": f"q{index}", "text": text} for index in range(5) for text in texts]
    return {"rollouts": write_lines(folder / "rollouts.jsonl", lines)}


def test_an_export_reads_the_tokens_that_it_was_told_to(tmp_path: Path) -> None:
    """Other signals, the same as of the tokens alone; a note counts what has no statement; reuse refuses other ones."""
    given = write_world(tmp_path)
    answer = make_manifest(tmp_path, "answer", **given)
    folder = make_manifest(tmp_path, "statement", **given, positions="statement")
    own = Exported(folder)
    assert own.manifest.header.options["positions"] == "statement"
    assert "positions statement: 5 of 15 rollouts have none and are read at their answers" in own.manifest.header.notes
    loaded = load_model(tmp_path / "model")
    builder = PromptBuilder(loaded.tokenizer, own.manifest.header.prompt_config())
    prompt = builder.student(own.rows["q0"].as_question())
    ids = own.rollouts["q0"][1].completion_ids_without_eos
    mask = [index < len("The answer is no.") for index in range(len(ids))]
    naive = NeuronTracer(loaded.model, TraceConfig(set_size=16)).trace([prompt], [ids], token_masks=[mask])
    place = own.place["q0", 1]
    assert torch.equal(own.signals.neuron_ids[place], naive.neuron_ids[0])
    whole = Exported(answer).signals
    assert torch.equal(own.signals.neuron_ids[own.place["q0", 2]], whole.neuron_ids[own.place["q0", 2]])
    assert not torch.equal(own.signals.contributions[place], whole.contributions[place])
    with pytest.raises(UserError, match=r"--reuse .*positions \(answer there, statement here\)"):
        make_manifest(tmp_path, "other", **given, positions="statement", reuse=answer)
    with pytest.raises(UserError, match=r"--reuse .*answers.answer_format \(auto there, number here\)"):
        make_manifest(tmp_path, "third", **given, positions="statement", answer_format="number", reuse=folder)
    again = make_manifest(tmp_path, "again", **given, positions="statement", vote_merge="exact", reuse=folder)
    assert read_manifest(again).header.notes == own.manifest.header.notes


def test_the_prompts_end_is_the_same_in_all_rollouts(tmp_path: Path) -> None:
    signals = Exported(make_manifest(tmp_path, **write_world(tmp_path), positions="prompt_end")).signals
    by_question = signals.neuron_ids.unflatten(0, (5, 3))
    assert torch.equal(by_question, by_question[:, :1].expand_as(by_question))
    assert not torch.equal(by_question[0], by_question[1])


def test_shards_of_other_positions_are_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that was interrupted after tracing is continued with other positions."""
    import neurosig.export

    given = write_world(tmp_path)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(neurosig.export, "_scores", interrupted)
        make_manifest(tmp_path, "stopped", **given)
    assert list((tmp_path / "stopped" / ".work").glob("signals-*"))
    stopped = make_manifest(tmp_path, "stopped", **given, positions="0:2", resume=True)
    straight = make_manifest(tmp_path, "straight", **given, positions="0:2")
    assert (stopped / "signals.safetensors").read_bytes() == (straight / "signals.safetensors").read_bytes()


def test_a_manifest_that_recorded_trace_is_read_as_its_positions(tmp_path: Path) -> None:
    from tests.support.manifests import edit_header

    given = write_world(tmp_path)
    folder = make_manifest(tmp_path, **given, positions="all")

    def older(header: dict[str, Any]) -> None:
        header["options"]["trace"] = header["options"].pop("positions")

    edit_header(folder, older)
    assert "trace" in json.loads((folder / "manifest.json").read_text())["options"]
    options = read_manifest(folder).header.options
    assert options["positions"] == "all" and "trace" not in options
    make_manifest(tmp_path, "again", **given, positions="all", reuse=folder)


def test_positions_on_the_command_line(tmp_path: Path) -> None:
    required = ["--model", "m", "--questions", "q", "--out", str(tmp_path / "out")]

    def parsed(*words: str) -> str:
        config = parse_config(ExportConfig, presets={}, prog="export", argv=[*required, *words])
        return str(config.positions)

    assert parsed("--positions", "-1") == "-1"
    assert parsed("--positions=-3:") == "-3:"
    assert parsed("--positions", "0:3") == "0:3"
    for wrong in ("last", "1.5", "0:3:2", "", "0,"):
        with pytest.raises(UserError, match=r"--positions: expected answer, thought, all, statement, .*or tokens"):
            parsed(f"--positions={wrong}")
    with pytest.raises(UserError, match="--positions"):
        export_config(tmp_path, tmp_path, tmp_path, positions="nowhere")
