"""Everything that can be wrong with what a command is given: one sentence, exit code 2, nothing half-written.

``EVIDENCE`` lists the 61 faults that the project answers for, each with the tests that hold its behaviour. ``CASES`` runs
the commands, in this process, on inputs that were spoiled in one way each.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from flow import make_manifest, save_tiny, write_questions
from safetensors.torch import load_file, save_file
from test_manifest import edit_header, edit_row
from tiny import tiny_model

from neurosig.cli import run_command

HERE = Path(__file__).parent

EVIDENCE: Mapping[int, tuple[str, ...]] = {
    1: ("test_questions.py::test_missing_file_and_unknown_suffix", "test_questions.py::test_folder_without_files"),
    2: ("test_questions.py::test_empty_file_has_0_questions",),
    3: ("test_export.py::test_a_single_question_has_no_context",),
    4: ("test_questions.py::test_invalid_json_names_line_and_column",),
    5: ("test_questions.py::test_torn_last_line_is_an_error_even_if_a_limit_leaves_it_out",),
    6: (
        "test_questions.py::test_invalid_utf8_names_line_and_byte",
        "test_questions.py::test_byte_order_mark_is_accepted_with_a_note",
        "test_questions.py::test_utf16_is_named",
    ),
    7: ("test_questions.py::test_crlf_blank_lines_and_no_final_newline",),
    8: ("test_questions.py::test_duplicate_id_names_both_lines",),
    9: (
        "test_questions.py::test_same_text_under_two_ids_warns_with_the_count",
        "test_selection.py::test_a_question_its_twin_and_the_unclean_are_never_context",
    ),
    10: ("test_questions.py::test_malformed_field_is_named_with_its_line",),
    11: ("test_questions.py::test_malformed_field_is_named_with_its_line",),
    12: (
        "test_questions.py::test_text_hash_is_of_nfc_question_and_choices",
        "test_questions.py::test_unicode_line_separators_and_emoji_stay_in_the_text",
        "test_faults_whole_runs.py::test_odd_texts_pass_through_every_step",
    ),
    13: ("test_prompts.py::test_special_tokens_inside_a_question_stay_text",),
    14: ("test_export.py::test_a_question_that_does_not_fit_is_left_out_and_counted",),
    15: ("test_questions.py::test_line_limit_is_named", "test_questions.py::test_line_that_is_no_record_is_named"),
    16: ("test_questions.py::test_other_format_under_a_jsonl_name_is_named",),
    17: ("test_manifest.py::test_a_malformed_row_names_line_and_field",),
    18: ("test_manifest.py::test_a_malformed_row_names_line_and_field",),
    19: ("test_manifest.py::test_an_export_that_was_killed_is_incomplete",),
    20: ("test_manifest.py::test_files_changed_after_export_are_noticed",),
    21: ("test_manifest.py::test_a_malformed_header_is_refused",),
    22: ("test_manifest.py::test_a_malformed_header_is_refused",),
    23: (
        "test_manifest.py::test_a_path_outside_the_folder_is_never_opened",
        "test_manifest.py::test_symbolic_links_out_of_the_folder_are_not_followed",
    ),
    24: (
        "test_manifest.py::test_a_malformed_row_names_line_and_field",
        "test_manifest.py::test_a_context_with_the_same_text_under_another_id_is_refused",
    ),
    25: ("test_interventions.py::test_bad_neurons_are_named",),
    26: ("test_train.py::test_the_manifest_of_another_model_is_refused",),
    27: ("test_faults.py::test_wrong_input_is_one_sentence",),
    28: (
        "test_signal_report.py::test_gold_is_joined_by_id_and_text",
        "test_faults.py::test_wrong_input_is_one_sentence",
    ),
    29: ("test_export.py::test_nothing_selected_is_told_and_not_trained_on",),
    30: ("test_faults_whole_runs.py::test_rollouts_that_say_nothing",),
    31: ("test_faults_whole_runs.py::test_rollouts_that_all_say_the_same",),
    32: ("test_models.py::test_files_that_are_no_weights_are_named",),
    33: (
        "test_train.py::test_the_manifest_of_another_model_is_refused",
        "test_verify.py::test_tampering_is_named",
    ),
    34: ("test_models.py::test_missing_weights_are_never_random",),
    35: ("test_models.py::test_a_tied_head_may_be_missing", "test_models.py::test_a_folder_loads_as_it_was_saved"),
    36: ("test_models.py::test_pickles_and_remote_code_are_refused",),
    37: ("test_models.py::test_pickles_and_remote_code_are_refused",),
    38: (
        "test_prompts.py::test_a_template_that_does_not_work_is_refused",
        "test_prompts.py::test_a_template_that_loops_or_explodes_is_stopped",
    ),
    39: ("test_prompts.py::test_a_tokenizer_without_template_is_refused",),
    40: ("test_models.py::test_a_model_without_an_end_token_is_named",),
    41: (
        "test_sites.py::test_an_unsupported_type_names_the_supported_ones",
        "test_sites.py::test_a_mixture_of_experts_says_that_its_experts_have_no_module",
    ),
    42: ("test_export.py::test_killed_while_sampling", "test_kills.py::test_killed_runs_resume_to_the_same_bytes"),
    43: ("test_export.py::test_killed_while_tracing", "test_kills.py::test_killed_runs_resume_to_the_same_bytes"),
    44: (
        "test_checkpoints.py::test_a_resumed_run_equals_an_uninterrupted_one",
        "test_kills.py::test_killed_runs_resume_to_the_same_bytes",
    ),
    45: ("test_checkpoints.py::test_killed_inside_the_write",),
    46: (
        "test_checkpoints.py::test_a_damaged_checkpoint_is_set_aside",
        "test_checkpoints.py::test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_used",
    ),
    47: (
        "test_export.py::test_killed_while_sampling",
        "test_checkpoints.py::test_resuming_with_other_options_names_them",
    ),
    48: (
        "test_export.py::test_a_complete_export_is_left_alone",
        "test_train.py::test_a_finished_run_is_left_alone_and_never_overwritten_by_accident",
    ),
    49: ("test_outdir.py::test_earlier_runs_are_kept_unless_told_otherwise",),
    50: (
        "test_outdir.py::test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on",
        "test_export.py::test_two_exports_into_one_folder",
    ),
    51: ("test_faults_disk.py::test_a_full_disk_costs_nothing_that_was_done",),
    52: ("test_faults_disk.py::test_a_read_only_folder_is_named_before_the_model_loads",),
    53: ("test_kills.py::test_ctrl_c_saves_and_says_how_to_go_on",),
    54: (
        "test_train.py::test_a_loss_that_is_not_finite_stops_the_run",
        "test_train.py::test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite",
    ),
    55: ("test_sampling.py::test_logits_that_are_not_finite_name_the_question",),
    56: ("test_faults_disk.py::test_out_of_memory_is_one_sentence_and_keeps_the_state",),
    57: ("test_faults_disk.py::test_a_closed_pipe_and_a_terminal_without_unicode",),
    58: ("test_signal_report.py::test_hostile_text_is_shown_and_does_nothing",),
    59: ("test_cli.py::test_model_text_is_shown_harmlessly",),
    60: ("test_determinism.py::test_batches_and_threads_change_no_vote",),
    61: ("test_faults_disk.py::test_odd_names_and_a_clock_that_moves_back",),
}


def test_every_fault_has_a_test_that_exists() -> None:
    assert sorted(EVIDENCE) == list(range(1, 62))
    functions: dict[str, set[str]] = {}
    for node in {node for nodes in EVIDENCE.values() for node in nodes}:
        file, name = node.split("::")
        if file not in functions:
            tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
            functions[file] = {item.name for item in ast.walk(tree) if isinstance(item, ast.FunctionDef)}
        assert name in functions[file], node


class Command(NamedTuple):
    module: str
    config: str
    options: Mapping[str, str]


SAMPLING = {"--num-generations": "2", "--max-new-tokens": "4", "--temperature": "1"}
COMMANDS: Mapping[str, Command] = {
    "export": Command(
        "neurosig.export",
        "ExportConfig",
        {"--model": "{w}/model", "--questions": "{w}/questions.jsonl", **SAMPLING, "--set-size": "16"},
    ),
    "train": Command("distill.train", "TrainConfig", {"--manifest": "{w}/manifest", "--steps": "1"}),
    "evaluate": Command(
        "distill.evaluate", "EvaluateConfig", {"--model": "{w}/model", "--questions": "{w}/questions.jsonl", **SAMPLING}
    ),
    "compare": Command("distill.report", "ReportConfig", {"--base": "{w}/base", "--trained": "{w}/trained"}),
    "signals": Command("neurosig.report", "ReportConfig", {"--run": "{w}/manifest", "--resamples": "100"}),
    "intervene": Command(
        "neurosig.intervene",
        "InterveneConfig",
        {"--manifest": "{w}/manifest", "--questions": "{w}/questions.jsonl", **SAMPLING},
    ),
    "grid": Command("distill.grid", "GridConfig", {"--model": "{w}/model", "--sources": "a={w}/questions.jsonl"}),
}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Iterator[None]:
    """As in a command of its own, where they read their settings when they are imported."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions, rollouts made elsewhere, a manifest, a training run and two evaluations, all small."""
    folder = tmp_path_factory.mktemp("world")
    make_manifest(folder, num_generations=2)
    lines = [json.loads(line) for line in (folder / "manifest" / "rollouts.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in ("question_id", "text", "token_ids", "finish_reason")} for line in lines]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (folder / "run.toml").write_text("seed = 1\n")
    for command, out, options in (
        ("train", "run", {"--keep-truncated": "", "--lora-r": "2"}),
        ("evaluate", "base", {}),
        ("evaluate", "trained", {"--adapter": "{w}/run/adapter"}),
    ):
        assert call(folder, command, {"--out": f"{{w}}/{out}", **options}) == 0
    return folder


def call(world: Path, name: str, options: Mapping[str, str]) -> int:
    """Run a command as its command line would; a flag with an empty value is given alone."""
    command = COMMANDS[name]
    words = []
    for flag, value in {**command.options, "--out": "{w}/out", **options}.items():
        words += [flag, *value.replace("{w}", str(world)).split()]
    module = importlib.import_module(command.module)
    config, presets = getattr(module, command.config), getattr(module, "PRESETS", {})
    return run_command(config, module.main, presets=presets, prog=name, argv=[*words, "--quiet"])


Spoil = Callable[[Path], object]


class Case(NamedTuple):
    commands: str
    what: str
    message: str
    spoil: Spoil = lambda w: None
    options: Mapping[str, str] = {}


def text(name: str, content: str | bytes) -> Spoil:
    return lambda w: (w / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def again(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda w: (w / name).write_bytes(change((w / name).read_bytes()))


def gone(name: str) -> Spoil:
    return lambda w: (w / name).unlink()


def fields(name: str, **changes: Any) -> Spoil:
    """Change fields of a JSON file, or of the second line of a JSONL file."""

    def change(data: bytes) -> bytes:
        if not name.endswith("l"):
            return json.dumps({**json.loads(data), **changes}).encode()
        lines = data.splitlines()
        lines[1] = json.dumps({**json.loads(lines[1]), **changes}).encode()
        return b"\n".join(lines) + b"\n"

    return again(name, change)


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(w: Path) -> None:
        tensors = load_file(w / name)
        change(tensors)
        save_file(tensors, w / name, metadata={"format": "pt"})

    return spoil


def mixture(w: Path) -> None:
    tiny_model("mixtral").save_pretrained(w / "model")


def table(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    def spoil(w: Path) -> None:
        rows = pyarrow.parquet.read_table(w / name).to_pylist()
        change(rows)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), w / name)

    return spoil


QUESTIONS, MANIFEST, ROLLOUTS = "questions.jsonl", "manifest/manifest.json", "rollouts.jsonl"
ASKED = r"questions\.jsonl"
CASES = [
    # questions
    Case("export evaluate intervene", "missing questions", r"dataset \S+gone\.jsonl: no such file", options={"--questions": "{w}/gone.jsonl"}),
    Case("export evaluate", "a folder without questions", "is a directory without", options={"--questions": "{w}/model"}),
    Case("export evaluate", "empty", rf"{ASKED}: 0 questions", text(QUESTIONS, "")),
    Case("export", "cut off", rf"{ASKED}:8: invalid JSON at column \d+: .* \(the last line may be cut off\)", again(QUESTIONS, lambda data: data[:-9])),
    Case("export", "UTF-16", rf"{ASKED}: UTF-16", again(QUESTIONS, lambda data: data.decode().encode("utf-16"))),
    Case("evaluate", "Latin-1", rf"{ASKED}:9: not UTF-8 \(0xe9 at byte 8", again(QUESTIONS, lambda data: data + b'{"id":"\xe9"}\n')),
    Case("export", "gzip", rf"{ASKED}: gzip data: decompress it first", again(QUESTIONS, gzip.compress)),
    Case("export evaluate", "an id twice", rf'{ASKED}:2: id "q0" already on line 1', fields(QUESTIONS, id="q0")),
    Case("export", "a number for a text", rf'{ASKED}:2: field "question": expected text, got 7 \(int\)', fields(QUESTIONS, question=7)),
    Case("evaluate", "gold no choice", rf'{ASKED}:2: field "answer": expected a letter of A-B', fields(QUESTIONS, choices=["x", "y"])),
    Case("evaluate intervene", "no gold", r'question "q1" \(line 2\) has no answer', fields(QUESTIONS, answer=None)),
    Case("export", "NUL", rf'{ASKED}:2: field "question": holds a NUL character at character 2', fields(QUESTIONS, question="a\0")),
    Case("export", "too long for the model, all", r"every question is too long: the shortest prompt has \d+ tokens", options={"--max-new-tokens": "505"}),
    Case("evaluate", "too long for the model", r'a prompt of \d+ tokens and --max-new-tokens 505 exceed its 512', options={"--max-new-tokens": "505"}),
    Case("evaluate", "1 MB question", r"a prompt of 1000\d\d\d tokens and --max-new-tokens 4 exceed its 512", fields(QUESTIONS, question="x" * 10**6)),
    # manifests
    Case("train signals intervene", "missing manifest", "manifest \\S+gone: no such folder", options={"--manifest": "{w}/gone", "--run": "{w}/gone"}),
    Case("train signals intervene", "no header", r"incomplete export \(no manifest\.json\); rerun neurosig\.export with --resume", gone(MANIFEST)),
    Case("train signals", "a changed byte", rf"{ASKED}: sha256 differs from manifest\.json", again("manifest/questions.jsonl", lambda data: data.replace(b"red", b"bad"))),
    Case("train", "an unknown field", rf'{ASKED}:2: \$\.seleced: unknown field \(did you mean "selected"\?\)', lambda w: edit_row(w / "manifest", 2, lambda row: row.update(seleced=True))),
    Case("train", "selected for another reason", rf'{ASKED}:2: \$\.selected: true, though the reason is "tie"', lambda w: edit_row(w / "manifest", 2, lambda row: row.update(reason="tie"))),
    Case("train", "own context", rf"{ASKED}:2: \$\.context\[0\]: a question is its own context", lambda w: edit_row(w / "manifest", 2, lambda row: row["context"][0].update(question_id="q1"))),
    Case("train", "dangling context", rf'{ASKED}:2: \$\.context\[0\]: no rollout 9 of question', lambda w: edit_row(w / "manifest", 2, lambda row: row["context"][0].update(rollout_id=9))),
    Case("train intervene", "newer schema", r"schema version 2\.0, this neurosig reads 1\.0; upgrade", lambda w: edit_header(w / "manifest", lambda header: header.update(schema_version="2.0"))),
    Case("train", "a path out of the folder", r'files\["\.\./x"\]: path leaves the manifest folder', lambda w: edit_header(w / "manifest", lambda header: header["files"].update({"../x": header["files"]["neurons.csv"]}))),
    Case("train", "another model", r"made by \S+, not by \S+: weights \w{12} against \w{12}; give the right --model", lambda w: save_tiny(w / "model", seed=3)),
    Case("train", "another tokenizer", r"tokenizer \w{12} against \w{12}", again("model/tokenizer.json", lambda data: data.replace(b"<|unused_299|>", b"<|other_299|>"))),
    Case("train", "another template", r"chat template \w{12} against \w{12}", again("model/chat_template.jinja", lambda data: data + b" ")),
    Case("train", "a reuse of other questions", "its rollouts and traces are not those of this export, these differ: dataset, questions", lambda w: write_questions(w / "fewer.jsonl", 5), {"--reuse": "{w}/manifest", "--questions": "{w}/fewer.jsonl"}),
    Case("train", "nothing selected", r"0 of 8 questions selected \(8 low_agreement\)", lambda w: [edit_row(w / "manifest", line, lambda row: row.update(selected=False, reason="low_agreement")) for line in range(1, 9)] and edit_header(w / "manifest", lambda header: header.update(counts={"questions": 8, "low_agreement": 8}))),
    # signals
    Case("signals", "signals cut off", r"signals\.safetensors: not what neurosig\.export writes", lambda w: (again("manifest/signals.safetensors", lambda data: data[: len(data) // 2])(w), edit_header(w / "manifest", lambda header: None))),
    Case("intervene", "a neuron that is not there", r"neurons\.csv", lambda w: (text("manifest/neurons.csv", "layer,index,weight,active_share\n7,0,1.0,0.5\n")(w), edit_header(w / "manifest", lambda header: None))),
    # rollouts made elsewhere
    Case("export", "missing rollouts", r"rollouts \S+: no such file", options={"--rollouts": "{w}/gone.jsonl"}),
    Case("export", "empty rollouts", "every question needs the same number of rollouts, found none", text(ROLLOUTS, ""), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "a malformed line", r"rollouts\.jsonl:3: invalid JSON", again(ROLLOUTS, lambda data: data.replace(b'{"question_id": "q1"', b'{"question_id" "q1"', 1)), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "an unknown question", r'rollouts\.jsonl:2: question_id "x" is in none', fields(ROLLOUTS, question_id="x"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "too long", r'rollouts\.jsonl: rollout 1 of question "q0": 600 tokens after a prompt of \d+ exceed the model\'s 512', fields(ROLLOUTS, token_ids=[5] * 600, finish_reason="length"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "beyond the vocabulary", r'rollout 1 of question "q0": token id 300, but the model has 300', fields(ROLLOUTS, token_ids=[300], finish_reason="length"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "rollouts in Latin-1", r"rollouts\.jsonl:17: invalid JSON", again(ROLLOUTS, lambda data: data + b'{"question_id":"\xe9"}\n'), {"--rollouts": "{w}/rollouts.jsonl"}),
    # configs
    Case("export train evaluate compare signals intervene grid", "missing config", r"config \S+gone\.toml: No such file", options={"--config": "{w}/gone.toml"}),
    Case("export train evaluate", "config in Latin-1", r"config \S+run\.toml: not UTF-8 \(byte 2\)", text("run.toml", b"# \xe9\n"), {"--config": "{w}/run.toml"}),
    Case("export train grid", "malformed config", r"run\.toml: invalid TOML: ", text("run.toml", "seed = \n"), {"--config": "{w}/run.toml"}),
    Case("export train evaluate compare", "unknown option", r'run\.toml: sede: unknown option \(did you mean "seed"\?\)', text("run.toml", "sede = 1\n"), {"--config": "{w}/run.toml"}),
    Case("export train evaluate compare", "wrong type", r"run\.toml: seed: expected int, got True", text("run.toml", "seed = true\n"), {"--config": "{w}/run.toml"}),
    Case("export train", "unknown preset", r"--preset nope: no such preset; have", options={"--preset": "nope"}),
    # models
    Case("export evaluate train", "missing model", r"model \S+gone: no such file or folder", options={"--model": "{w}/gone"}),
    Case("export evaluate", "empty config.json", r"config\.json is damaged", text("model/config.json", "")),
    Case("export evaluate train", "weights cut off", r"damaged weights|cannot load it", again("model/model.safetensors", lambda data: data[:-8])),
    Case("evaluate", "empty weights", r"model\.safetensors is empty; download it again", text("model/model.safetensors", "")),
    Case("export", "a layer missing", r"1 weights are missing from its files", weights("model/model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))),
    Case("export evaluate", "NaN in the weights", r'logits are not finite while sampling question "q\d"', weights("model/model.safetensors", lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))),
    Case("export evaluate", "no chat template", "the tokenizer has no chat template; give --template plain", gone("model/chat_template.jinja")),
    Case("export evaluate", "a template that ignores the question", "the chat template leaves out the question", text("model/chat_template.jinja", "hello")),
    Case("export train", "a template with a mistake", r"the chat template fails at line 2: |chat template \w{12} against", text("model/chat_template.jinja", "\n{% for %}")),
    Case("export", "pickled weights", "holds pickle weights; convert to safetensors", lambda w: (w / "model/model.safetensors").rename(w / "model/pytorch_model.bin")),
    Case("evaluate", "code beside the weights", r"config\.json asks for remote code \(auto_map\), which is never run", fields("model/config.json", auto_map={"AutoModel": "evil.Model"})),
    Case("export", "a mixture of experts", r"mixtral", mixture),
    # adapters, evaluations, checkpoints
    Case("evaluate", "missing adapter", r"--adapter \S+gone: no adapter_model\.safetensors there", options={"--adapter": "{w}/gone"}),
    Case("evaluate", "adapter cut off", r"--adapter \S+adapter: ", again("run/adapter/adapter_model.safetensors", lambda data: data[:-8]), {"--adapter": "{w}/run/adapter"}),
    Case("evaluate", "adapter of another shape", r"--adapter \S+adapter: ", weights("run/adapter/adapter_model.safetensors", lambda tensors: tensors.update({name: tensor[:, :1].contiguous() for name, tensor in tensors.items()})), {"--adapter": "{w}/run/adapter"}),
    Case("evaluate", "adapter without its config", r"--adapter \S+adapter: ", gone("run/adapter/adapter_config.json"), {"--adapter": "{w}/run/adapter"}),
    Case("compare", "missing evaluation", r"no finished evaluation \(summary\.json is missing\)", gone("trained/summary.json")),
    Case("compare", "a damaged summary", r"trained: cannot be read", text("trained/summary.json", "{")),
    Case("compare", "a damaged table", r"trained: cannot be read", again("trained/results.parquet", lambda data: data[:-9])),
    Case("compare", "other questions", r"trained: not the questions of", table("trained/results.parquet", lambda rows: rows.pop())),
    Case("compare", "another K", r"K=3 samples a question", table("trained/results.parquet", lambda rows: [row.update(k=3) for row in rows])),
    Case("compare", "a missing training run", r"--train \S+gone: no finished training run", options={"--train": "{w}/gone"}),
    Case("compare", "one question in a scope", r'"q0" is its only in-domain question; an interval needs at least 2', lambda w: [table(f"{name}/results.parquet", lambda rows: rows.__delitem__(slice(1, None)))(w) for name in ("base", "trained")]),
    Case("train", "resumed with other options", r"cannot resume, these differ from the interrupted run: learning_rate, lora_r", lambda w: (w / "run/train.json").unlink(), {"--out": "{w}/run", "--resume": "", "--learning-rate": "0.1", "--keep-truncated": ""}),
    Case("train export evaluate compare", "a file in the way", r"out: is a file; give a folder", text("out", "mine")),
    Case("train evaluate", "an earlier run in the way", r"holds an earlier run; give --resume to continue it, --overwrite", lambda w: shutil.copytree(w / "run", w / "out") and shutil.copytree(w / "base", w / "out", dirs_exist_ok=True)),
    Case("grid", "a grid of unknown methods", r"method x: expected one of nopsd", options={"--methods": "x"}),
]  # fmt: skip
REUSE = {"a reuse of other questions"}


def flat() -> list[Any]:
    return [
        pytest.param(command, case, id=f"{command}: {case.what}") for case in CASES for command in case.commands.split()
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("command", "case"), flat())
def test_wrong_input_is_one_sentence(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, case: Case
) -> None:
    w = tmp_path / "w"
    shutil.copytree(world, w, copy_function=os.link)
    for path in w.rglob("*"):  # a spoiled file must not reach the others' copies
        if path.is_file():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    relocate(w, world)
    case.spoil(w)
    before = snapshot(w)
    name = "export" if case.what in REUSE else command
    options = {
        flag: value
        for flag, value in case.options.items()
        if not (flag in ("--manifest", "--run") and flag not in COMMANDS[name].options)
    }
    code = call(w, name, options)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert code == 2, shown.err
    assert len(lines) == 1 and lines[0].startswith("error: "), shown.err
    assert re.search(case.message, lines[0]), lines[0]
    assert "Traceback" not in shown.err + shown.out
    after = snapshot(w)
    new = [path for path in after if path not in before and not path.startswith(("out/.work", "out/.rollouts.log"))]
    assert not new and {path: after[path] for path in before} == before, new


def relocate(w: Path, world: Path) -> None:
    """The copied manifest names the copied model, so that a spoiled model is the one that is loaded."""

    def moved(header: dict[str, Any]) -> None:
        header["model"]["id"] = header["model"]["id"].replace(str(world), str(w))

    edit_header(w / "manifest", moved)
