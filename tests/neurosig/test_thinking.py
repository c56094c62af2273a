"""A thinking model from rollouts to a manifest: what is traced, counted, shown and left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neurosig.export import main as export
from neurosig.exported import Exported
from neurosig.manifest import read_manifest
from neurosig.manifest.files import BEFORE_1_3
from neurosig.models.load import load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.prompts import PromptBuilder
from neurosig.runtime.errors import UserError
from neurosig.verify.recomputed import lengths_problem
from tests.support.flow import export_config
from tests.support.manifests import edit_header, edit_row
from tests.support.thinking import DROPS, KEEPS, OPENS, K, write_world


def exported(folder: Path, out: str = "manifest", **options: Any) -> Exported:
    export(export_config(folder, folder / "model", folder / "questions.jsonl", out, **options))
    return Exported(folder / out)


@pytest.fixture(scope="module", params=[DROPS, OPENS], ids=["completion opens", "prompt opens"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder, request.param, opens=request.param == OPENS)


@pytest.mark.parametrize("part", ["answer", "thought", "all"])
def test_the_traced_tokens_are_those_of_a_naive_slice(world: tuple[Path, dict[str, Any]], part: str) -> None:
    """The other tokens are a prompt that nothing is read from, or follow and are never seen."""
    folder, given = world
    own = exported(folder, part, **given, positions=part)
    loaded = load_model(folder / "model")
    builder = PromptBuilder(loaded.tokenizer, own.manifest.header.prompt_config())
    prompts, completions = [], []
    for (name, _), rollout in own.manifest.rollouts.items():
        prompt, ids = builder.student(own.rows[name].as_question()), list(rollout.completion_ids_without_eos)
        text = loaded.tokenizer.decode(ids)
        thought, closing, _ = text.rpartition("</think>")
        n = len(loaded.tokenizer(thought + closing)["input_ids"]) if closing else 0
        assert rollout.answer_start == n
        before = n if part == "answer" else 0
        prompts.append([*prompt, *ids[:before]])
        completions.append(ids[before : n if part == "thought" and n else None])
    naive = NeuronTracer(loaded.model, TraceConfig(set_size=16)).trace(prompts, completions)
    assert torch.equal(own.signals.neuron_ids, naive.neuron_ids)
    torch.testing.assert_close(own.signals.contributions.float(), naive.contributions, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(own.signals.hidden_states.float(), naive.hidden_states, rtol=2e-3, atol=1e-3)


def test_lengths_are_counted_and_a_warning_names_the_limit(
    world: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, given = world
    with caplog.at_level("INFO", logger="neurosig"):
        manifest = exported(folder, "lengths", **given).manifest
    lengths, rollouts = manifest.header.lengths, list(manifest.rollouts.values())
    n = len(rollouts)
    assert (lengths["truncated_rate"], lengths["unclosed_rate"]) == (7 / 15, 5 / 15)
    unclosed = [rollout for rollout in rollouts if "</think>" not in rollout.text]
    assert len(unclosed) == 5 and all(not rollout.answer_start for rollout in unclosed)
    thoughts = sum(len(rollout.completion_ids) for rollout in unclosed) + sum(r.answer_start for r in rollouts)
    assert lengths["mean_thought_length"] == pytest.approx(thoughts / n)
    total = sum(len(rollout.completion_ids) for rollout in rollouts) / n
    assert lengths["mean_thought_length"] + lengths["mean_answer_length"] == pytest.approx(total)
    assert "46.7% of the rollouts cut off, 33.3% inside a thought;" in caplog.text
    assert "47% of the rollouts were cut off at --max-new-tokens, 33% inside a thought; raise it" in caplog.text
    assert lengths_problem(manifest) == ""
    edit_header(folder / "lengths", lambda header: header["lengths"].update(unclosed_rate=0.0))
    assert lengths_problem(read_manifest(folder / "lengths")) == "unclosed_rate is 0.0, not 0.333333"


@pytest.mark.parametrize("question_filter", ["neuron", "vote_only", "neuron_only", "threshold", "all"])
def test_a_cut_off_rollout_is_no_representative_and_no_demonstration(
    world: tuple[Path, dict[str, Any]], question_filter: str
) -> None:
    """q1 has no finished rollout of its majority: it is left out, but for the filter that takes every question."""
    folder, given = world
    given = given | {"question_filter": question_filter, "keep_fraction": 1.0, "max_score": 9.0}
    own = exported(folder, f"filter-{question_filter}", **given)
    votes = {name: (row.pseudo_label, row.vote and row.vote.count) for name, row in own.rows.items()}
    assert set(votes.values()) == {("yes", K - 1)}
    reasons = {name: row.reason for name, row in own.rows.items()}
    assert reasons.pop("q1") == ("selected" if question_filter == "all" else "cut_off")
    assert set(reasons.values()) == {"selected"}
    assert own.manifest.header.counts.get("cut_off", 0) == (question_filter != "all")
    assert own.representatives.keys() == reasons.keys()
    shown = [(item.question_id, item.rollout_id) for row in own.manifest.selected for item in row.context]
    assert shown and all(own.manifest.rollouts[key].finish_reason == "stop" for key in shown)


def test_u_opsd_has_no_solution_of_a_question_that_was_cut_off(world: tuple[Path, dict[str, Any]]) -> None:
    folder, given = world
    own = exported(folder, "own", **given, context_policy="majority_solution")
    assert {name: row.reason for name, row in own.rows.items() if not row.selected} == {"q1": "cut_off"}
    kept = exported(folder, "kept", **{**given, "keep_truncated": True}, context_policy="majority_solution")
    assert all(row.selected for row in kept.rows.values())
    first = kept.rows["q1"].context[0]
    edit_header(folder / "kept", lambda header: header["options"].update(keep_truncated=False))
    with pytest.raises(UserError, match=r"questions.jsonl:2: \$.context\[0\]: a rollout that was cut off is no"):
        read_manifest(folder / "kept")
    assert first.rollout_id == 0


def test_a_thought_that_is_not_shown_costs_no_context(world: tuple[Path, dict[str, Any]]) -> None:
    """240 tokens hold two questions with their answers, but only one with its thought."""
    folder, given = world
    sizes = []
    for thoughts in (False, True):
        options: Any = {"max_context_tokens": 240, "demonstration_thoughts": thoughts}
        own = exported(folder, f"budget-{thoughts}", **given, **options)
        sizes.append({len(row.context) for row in own.manifest.selected})
    assert sizes == [{2}, {1}]


def test_modes_are_recorded_and_the_teachers_can_change_without_sampling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = write_world(tmp_path, KEEPS)
    first = exported(tmp_path, "first", **given, student_thinking=False).manifest.header
    assert (first.options["student_thinking"], first.options["teacher_thinking"]) == (False, None)
    assert first.prompt_config().enable_thinking is first.teacher_prompt_config().enable_thinking is False
    config = export_config(tmp_path, tmp_path / "model", tmp_path / "questions.jsonl", "second", **given)
    config = replace(config, student_thinking=False, teacher_thinking=True, reuse=tmp_path / "first")
    assert "were cut off at --max-new-tokens" in caplog.text
    caplog.clear()
    export(config)
    assert "were cut off" not in caplog.text  # nothing is sampled, so no option can change it
    second = read_manifest(tmp_path / "second").header
    assert (second.prompt_config().enable_thinking, second.teacher_prompt_config().enable_thinking) == (False, True)
    with pytest.raises(UserError, match=r"--reuse .*student_thinking \(false there, true here\)"):
        export(replace(config, student_thinking=True, out=tmp_path / "third"))
    with pytest.raises(UserError, match="the teacher's after an empty thought"):
        exported(tmp_path, "fourth", **given, student_thinking=True, teacher_thinking=False)
    assert not (tmp_path / "fourth" / "manifest.json").exists()


def test_a_manifest_from_before_is_read_as_it_was_made(tmp_path: Path) -> None:
    """Schema 1.2 had one mode for both, showed whole rollouts and traced whole completions."""
    exported(tmp_path, **write_world(tmp_path, KEEPS), student_thinking=False)

    def older(header: dict[str, Any]) -> None:
        for name in (*BEFORE_1_3, "student_thinking"):
            del header["options"][name]
        header["options"]["enable_thinking"] = False
        header["schema_version"] = "1.2"
        del header["lengths"]

    edit_row(tmp_path / "manifest", 1, lambda row: row.pop("answer_start"), name="rollouts.jsonl")
    edit_header(tmp_path / "manifest", older)
    header = read_manifest(tmp_path / "manifest").header
    assert {name: header.options[name] for name in BEFORE_1_3} == BEFORE_1_3
    assert header.prompt_config().enable_thinking is header.teacher_prompt_config().enable_thinking is False
    assert header.teacher_prompt_config().demonstration_thoughts


def test_rollouts_without_a_thought_are_traced_whole(tmp_path: Path) -> None:
    """The same signals whatever --positions says."""
    write_world(tmp_path, KEEPS)
    lines = [{"question_id": f"q{index}", "text": f"Yes, {k}."} for index in range(5) for k in range(K)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = []
    for part in ("answer", "thought", "all"):
        exported(tmp_path, part, rollouts=tmp_path / "plain.jsonl", positions=part)
        files.append((tmp_path / part / "signals.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
