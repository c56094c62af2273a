from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import neurosig.neurons.tracer
import neurosig.sampling.sampler
import neurosig.selection.rows
from distill.config import TrainConfig
from distill.train import main as train
from neurosig.export import PRESETS, ExportConfig
from neurosig.export import main as export
from neurosig.hallucination.scores import BEFORE_CONTEXTS
from neurosig.manifest import read_manifest
from neurosig.models.load import load_model
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.signals_file import read_signals
from neurosig.neurons.tracer import NeuronTracer
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.cli import run_command
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import parse_rollout
from tests.support.flow import (
    decoded_windows,
    export_config,
    file_bytes,
    killed_while_sampling,
    make_manifest,
    save_tiny,
    write_questions,
)
from tests.support.manifests import edit_header
from tests.support.parsers import UNCUT
from tests.support.tiny import D_MLP


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_gold_answers_change_nothing(tmp_path: Path, model: Path) -> None:
    """With answers, without them, with other ones: the same manifest to the byte, and the same adapter."""
    files, adapters = [], []
    for out, gold in (
        ("with", {"answer": "GOLDEN", "aliases": ["GOLDALIAS"]}),
        ("without", {"answer": None}),
        ("wrong", {"answer": "LEADEN"}),
    ):
        questions = write_questions(tmp_path / "questions.jsonl", **gold)
        export(export_config(tmp_path, model, questions, out))
        files.append(file_bytes(tmp_path / out))
        train(
            TrainConfig(
                manifest=tmp_path / out, out=tmp_path / f"{out}-run", steps=2, keep_truncated=True, quiet=True, lora_r=2
            )
        )
        adapters.append((tmp_path / f"{out}-run" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert adapters[0] == adapters[1] == adapters[2]
    assert set(files[0]) == {"manifest.json", "questions.jsonl", "rollouts.jsonl", "signals.safetensors", "neurons.csv"}
    written = [path for out in ("with", "wrong") for path in (tmp_path / out).rglob("*") if path.is_file()]
    assert len(written) == 2 * 6  # the run record too
    for path in written:
        assert not any(word in path.read_bytes() for word in (b"GOLDEN", b"GOLDALIAS", b"LEADEN"))


def test_gold_letters_change_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, seen = [], []
    manifest_rows = neurosig.selection.rows.manifest_rows

    def watched(questions: Sequence[Question], *args: Any, **kwargs: Any) -> Any:
        seen.extend((question.answer, question.aliases) for question in questions)
        return manifest_rows(questions, *args, **kwargs)

    monkeypatch.setattr(neurosig.selection.rows, "manifest_rows", watched)
    for out, answer in (("with", "A"), ("without", None), ("wrong", "B")):
        questions = write_questions(tmp_path / "questions.jsonl", answer=answer, choices=["yes", "no"])
        export(export_config(tmp_path, model, questions, out))
        folders.append(file_bytes(tmp_path / out))
    assert folders[0] == folders[1] == folders[2]
    assert set(seen) == {(None, ())}


def test_the_seed_decides_the_rollouts(tmp_path: Path) -> None:
    first, again, other = (make_manifest(tmp_path, out, seed=seed) for out, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert file_bytes(first) == file_bytes(again)
    assert file_bytes(first)["rollouts.jsonl"] != file_bytes(other)["rollouts.jsonl"]


@pytest.mark.parametrize("torn", [False, True])
def test_killed_while_sampling(tmp_path: Path, model: Path, torn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosig.sampling.sampler.WINDOW", 1)
    questions = write_questions(tmp_path / "questions.jsonl")
    export(export_config(tmp_path, model, questions, "straight", batch_rows=6))
    with killed_while_sampling(5):
        export(export_config(tmp_path, model, questions, "broken", batch_rows=6))
    log = tmp_path / "broken" / ".work" / "rollouts.log"
    assert len(log.read_bytes().splitlines()) == 1 + 5
    assert not (tmp_path / "broken" / "manifest.json").exists()
    if torn:
        log.write_bytes(log.read_bytes()[:-20])
    with pytest.raises(UserError, match="incomplete export"):
        read_manifest(tmp_path / "broken")
    with pytest.raises(UserError, match="holds an earlier run"):
        export(export_config(tmp_path, model, questions, "broken", batch_rows=6))
    with pytest.raises(UserError, match=r"run: seed \(0 before, 4 now\), temperature \(1.0 before, 0.5 now\); use"):
        export(export_config(tmp_path, model, questions, "broken", batch_rows=6, resume=True, temperature=0.5, seed=4))
    others = write_questions(tmp_path / "others.jsonl", n=7)
    with pytest.raises(
        UserError, match=r"differ from the interrupted run: questions \(\S+ with .*, \S+ with .* now\); use"
    ):
        export(export_config(tmp_path, model, others, "broken", batch_rows=6, resume=True))
    with decoded_windows() as decoded:
        export(export_config(tmp_path, model, questions, "broken", batch_rows=6, resume=True))
    assert len(decoded) == 2  # of 4 windows, two were done
    assert file_bytes(tmp_path / "broken") == file_bytes(tmp_path / "straight")


def test_killed_while_tracing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are kept, the rest is traced again, and the bytes are those of an uninterrupted export."""
    monkeypatch.setattr("neurosig.neurons.signals_file.CHUNK", 6)
    questions = write_questions(tmp_path / "questions.jsonl")
    export(export_config(tmp_path, model, questions, "straight"))
    traced: list[int] = []
    trace = neurosig.neurons.tracer.NeuronTracer.trace

    def counted(self: Any, prompts: Any, completions: Any, **kwargs: Any) -> Any:
        if len(traced) == 2 and not resumed:
            raise KeyboardInterrupt
        traced.append(len(prompts))
        return trace(self, prompts, completions, **kwargs)

    resumed = False
    monkeypatch.setattr(neurosig.neurons.tracer.NeuronTracer, "trace", counted)
    with pytest.raises(KeyboardInterrupt):
        export(export_config(tmp_path, model, questions, "broken"))
    resumed = True
    export(export_config(tmp_path, model, questions, "broken", resume=True))
    assert traced == [6, 6, 6, 6]
    assert file_bytes(tmp_path / "broken") == file_bytes(tmp_path / "straight")


def test_a_complete_export_is_left_alone(tmp_path: Path) -> None:
    folder = make_manifest(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_manifest(tmp_path, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="holds an earlier run"):
        make_manifest(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    own_files = [folder / name for name in ("mine.txt", "mine.jsonl", "mine.safetensors")]
    for path in own_files:
        path.write_text("keep me")
    make_manifest(tmp_path, overwrite=True, seed=5)
    assert all(path.read_text() == "keep me" for path in own_files)
    assert read_manifest(folder).header.options["seed"] == 5


def test_two_exports_into_one_folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first samples, and the first is none the worse for it."""
    questions = write_questions(tmp_path / "questions.jsonl")
    export(export_config(tmp_path, model, questions, "alone"))
    sample = neurosig.sampling.sampler.sample
    refused = []

    def intruded_upon(*args: Any, **kwargs: Any) -> Any:
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=r"in use by pid \d+ on \S+; wait or choose another"):
                export(export_config(tmp_path, model, questions, "shared", **flags))
            refused.append(flags)
        yield from sample(*args, **kwargs)

    monkeypatch.setattr(neurosig.sampling.sampler, "sample", intruded_upon)
    export(export_config(tmp_path, model, questions, "shared"))
    assert len(refused) == 2
    assert file_bytes(tmp_path / "shared") == file_bytes(tmp_path / "alone")


def test_selection_may_change_on_resume(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only selects can be changed before the manifest is there: the result is that of the final options."""
    questions = write_questions(tmp_path / "questions.jsonl")
    export(export_config(tmp_path, model, questions, "straight", context_policy="random", set_size=8))
    with monkeypatch.context() as patch:
        patch.setattr(
            "neurosig.manifest.write_manifest", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            export(export_config(tmp_path, model, questions, "broken"))
    assert (tmp_path / "broken" / ".work").is_dir()
    export(export_config(tmp_path, model, questions, "broken", context_policy="random", set_size=8, resume=True))
    assert file_bytes(tmp_path / "broken") == file_bytes(tmp_path / "straight")
    assert not (tmp_path / "broken" / ".work").exists()


def test_rollouts_made_elsewhere(tmp_path: Path) -> None:
    own = make_manifest(tmp_path)
    lines = [json.loads(line) for line in (own / "rollouts.jsonl").read_text().splitlines()]
    path = tmp_path / "elsewhere.jsonl"
    keep = ("question_id", "text", "completion_ids", "finish_reason")
    path.write_text("".join(json.dumps({key: line[key] for key in keep}) + "\n" for line in lines))
    other = make_manifest(tmp_path, "other", rollouts=path)
    assert (own / "signals.safetensors").read_bytes() == (other / "signals.safetensors").read_bytes()
    assert "mean_logprob" not in read_manifest(other).rows[0].scores
    with pytest.raises(UserError, match="have no such score; use one of"):
        make_manifest(tmp_path, "third", rollouts=path, hallucination_score="mean_logprob")


@pytest.mark.parametrize("policy", ["nearest", "nearest_first", "random", "random_within_kind", "none"])
def test_contexts_are_rollouts_of_other_questions(tmp_path: Path, policy: str) -> None:
    manifest = read_manifest(make_manifest(tmp_path, context_policy=policy, answer_parser=UNCUT))
    for row in manifest.rows:
        assert len(row.context) == (0 if policy == "none" else 2)
        assert row.question_id not in {item.question_id for item in row.context}
        similarities = [item.similarity for item in row.context]
        if policy.startswith("nearest"):
            assert similarities == sorted(similarities, reverse=policy == "nearest_first")


@pytest.mark.parametrize("question_filter", ["neuron", "vote_only", "neuron_only", "threshold", "all"])
def test_every_filter_says_why(tmp_path: Path, question_filter: str) -> None:
    manifest = read_manifest(
        make_manifest(tmp_path, question_filter=question_filter, min_vote_share=0.3, answer_parser=UNCUT)
    )
    assert all(row.selected == (row.reason == "selected") for row in manifest.rows)
    counts = manifest.header.counts
    assert counts.pop("questions") == sum(counts.values()) == 8
    kept = {row.question_id for row in manifest.selected}
    assert all(item.question_id in kept for row in manifest.selected for item in row.context)


def test_thinking_mode_reaches_every_prompt(tmp_path: Path) -> None:
    """The tiny Qwen3 with thinking on and off: other prompts and rollouts, and training takes the mode over."""
    rollouts, losses = [], []
    for thinking in (False, True):
        folder = make_manifest(tmp_path, f"thinking-{thinking}", student_thinking=thinking)
        rollouts.append((folder / "rollouts.jsonl").read_bytes())
        assert read_manifest(folder).header.options["student_thinking"] is thinking
        run = tmp_path / f"run-{thinking}"
        train(TrainConfig(manifest=folder, out=run, steps=1, keep_truncated=True, quiet=True))
        losses.append(json.loads((run / "metrics.jsonl").read_text())["loss"])
    assert rollouts[0] != rollouts[1]
    assert losses[0] != losses[1]


def test_nothing_selected_is_reported_and_not_trained_on(tmp_path: Path) -> None:
    folder = make_manifest(tmp_path, question_filter="vote_only", min_vote_share=1.0, answer_parser=UNCUT)
    reasons = [row.reason for row in read_manifest(folder).rows]
    stated = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    assert "tie" in reasons
    with pytest.raises(UserError, match=re.escape(f"0 of 8 questions selected ({stated})")):
        train(TrainConfig(manifest=folder, out=tmp_path / "run", quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_single_question_has_no_context(tmp_path: Path) -> None:
    (row,) = read_manifest(make_manifest(tmp_path, limit=1)).rows
    assert (row.reason, row.selected, row.context) == ("no_context", False, ())


def test_a_question_that_does_not_fit_is_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    questions = write_questions(tmp_path / "questions.jsonl")
    long = {"id": "long", "domain": "colour", "question": "Is it? " * 100}
    questions.write_text(json.dumps(long) + "\n" + questions.read_text())
    export(export_config(tmp_path, model, questions))
    rows = read_manifest(tmp_path / "manifest").rows
    assert [(row.question_id, row.reason) for row in rows[:2]] == [("long", "too_long"), ("q0", "selected")]
    questions.write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match="every question is too long"):
        export(export_config(tmp_path, model, questions, "none"))


def test_signals_follow_the_rollouts(tmp_path: Path, model: Path) -> None:
    """Row i is rollout i: traced alone, it gives the same neurons."""
    folder = make_manifest(tmp_path)
    signals = read_signals(folder / "signals.safetensors")
    assert signals.neuron_ids.shape == signals.contributions.shape == (8 * 3, 2 * 8)
    assert signals.hidden_states.shape == (8 * 3, 32) and signals.probe_scores.shape == (8 * 3,)
    assert (signals.n_layers, signals.d_mlp) == (2, D_MLP)
    loaded = load_model(model)
    builder = PromptBuilder(loaded.tokenizer, PromptConfig())
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    questions = {row.question_id: row.as_question() for row in read_manifest(folder).rows}
    for row in (0, 7, 23):
        rollout = parse_rollout(rollouts[row])
        prompt = builder.student(questions[rollout.question_id])
        alone = NeuronTracer(loaded.model, TraceConfig(set_size=16)).trace(
            [prompt], [rollout.completion_ids_without_eos]
        )
        assert torch.equal(alone.neuron_ids[0], signals.neuron_ids[row])
        torch.testing.assert_close(alone.hidden_states[0].half(), signals.hidden_states[row], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "neufs"},
        {"active_set": "per_token", "contribution": "magnitude", "signature": "union"},
        {"active_set": "global", "signature": "intersection", "hallucination_score": "knn_medoid"},
        {"signature": "frequency", "hallucination_score": "self_certainty"},
        {"signature": "hidden_state", "hallucination_score": "neuron_count"},
        {"context_policy": "majority_solution", "hallucination_score": "agreement_majority"},
        {"contribution": "unembed", "positive_only": True, "same_label_excluded": True},
        {"question_weight": "vote_share"},
    ],
    ids=str,
)
def test_every_option_reaches_the_manifest(tmp_path: Path, options: dict[str, Any]) -> None:
    changed = {key: value for key, value in options.items() if key != "preset"}
    if "preset" in options:
        changed |= PRESETS[options["preset"]]
    plain, manifest = (
        read_manifest(make_manifest(tmp_path / "plain")),
        read_manifest(make_manifest(tmp_path, **changed)),
    )
    assert changed.items() <= manifest.header.options.items()
    assert manifest.header.content_sha256 != plain.header.content_sha256
    assert [row.answers for row in manifest.rows] == [row.answers for row in plain.rows]
    share = {row.question_id: row.vote.count / row.vote.n for row in manifest.rows}  # type: ignore[union-attr]
    by_vote = options.get("question_weight") == "vote_share"
    assert {row.question_id: row.weight for row in manifest.rows} == (share if by_vote else dict.fromkeys(share, 1.0))
    assert set(manifest.rows[0].scores) == set(BEFORE_CONTEXTS)
    if options.get("context_policy") == "majority_solution":
        for row in manifest.selected:
            (item,) = row.context
            lengths = [
                len(manifest.rollouts[row.question_id, i].completion_ids_without_eos)
                for i, a in enumerate(row.answers)
                if a == row.pseudo_label
            ]
            assert item.question_id == row.question_id
            assert len(manifest.rollouts[row.question_id, item.rollout_id].completion_ids_without_eos) == min(lengths)
    else:
        assert all(item.question_id != row.question_id for row in manifest.selected for item in row.context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--questions", "broken.jsonl"], "broken.jsonl:17: invalid JSON"),
        (["--questions", "twice.jsonl"], 'twice.jsonl:2: id "a" already on line 1'),
        (["--questions", "empty.jsonl"], "empty.jsonl: 0 questions"),
        (["--questions", "good.jsonl", "--model", "no/such-model"], "model no/such-model: not a folder here"),
        (["--questions", "good.jsonl", "--model", "bare"], "no chat template; give --template plain"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    model: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = json.dumps({"id": "a", "domain": "d", "question": "Why?"}) + "\n"
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "twice.jsonl").write_text(good + good)
    (tmp_path / "empty.jsonl").write_text("\n")
    records = [json.dumps({"id": f"a{n}", "domain": "d", "question": f"Why {n}?"}) for n in range(16)]
    (tmp_path / "broken.jsonl").write_text("\n".join([*records, '{"id": "x", "question"']) + "\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    model_argument = [] if "--model" in arguments else ["--model", str(model)]
    monkeypatch.chdir(tmp_path)
    argv = [*arguments, *model_argument, "--out", "out", "--quiet"]
    assert run_command(ExportConfig, export, presets=PRESETS, prog="python -m neurosig.export", argv=argv) == 2
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert message in error and error == shown.splitlines()[-1] and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_another_selection_on_the_same_rollouts_equals_an_export_of_its_own(tmp_path: Path) -> None:
    first = make_manifest(tmp_path)
    options = {
        "context_policy": "random",
        "num_demonstrations": 1,
        "question_filter": "vote_only",
        "min_vote_share": 0.1,
    }
    alone = make_manifest(tmp_path, "alone", **options)
    reused = make_manifest(tmp_path, "reused", reuse=first, **options)
    assert file_bytes(reused) == file_bytes(alone) != file_bytes(first)
    with pytest.raises(
        UserError, match=r"--reuse \S+: .* these differ: set_size .*, temperature .1.0 there, 0.5 here.; give"
    ):
        make_manifest(tmp_path, "other", reuse=first, temperature=0.5, set_size=8)


def test_a_set_size_is_recorded_as_the_number_that_it_means(tmp_path: Path) -> None:
    """And so a share, a number and what an earlier version recorded are compared by the sets they give."""
    share = make_manifest(tmp_path, "share", set_size=0.11)
    number = make_manifest(tmp_path, "number", set_size=15)
    header = read_manifest(share).header
    assert (
        header.options["set_size"] == 16 == read_signals(share / "signals.safetensors").neuron_ids.shape[1]
    )  # 8 of 64 in each of 2 layers
    assert file_bytes(share) == file_bytes(number)
    assert file_bytes(make_manifest(tmp_path, "reused", reuse=number, set_size=0.11)) == file_bytes(share)
    with pytest.raises(UserError, match=r"these differ: set_size \(16 there, 18 here\)"):
        make_manifest(tmp_path, "other", reuse=share, set_size=0.13)
    edit_header(share, lambda header: header["options"].update(set_size=15))
    assert file_bytes(make_manifest(tmp_path, "again", reuse=share, set_size=0.11)) == file_bytes(number)
