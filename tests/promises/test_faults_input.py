"""Wrong input of every command: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import gzip
import json
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
from safetensors.torch import load_file, save_file

from neurosig.runtime.cli import run_command
from tests.support.commands import command_module
from tests.support.flow import make_manifest, save_tiny, write_questions
from tests.support.manifests import edit_header, edit_row, rehash
from tests.support.tiny import tiny_model


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
    "compare": Command("distill.compare", "CompareConfig", {"--base": "{w}/base", "--trained": "{w}/trained"}),
    "report": Command("neurosig.report", "ReportConfig", {"--manifest": "{w}/manifest", "--resamples": "100"}),
    "intervene": Command(
        "neurosig.intervene",
        "InterveneConfig",
        {"--manifest": "{w}/manifest", "--questions": "{w}/questions.jsonl", **SAMPLING},
    ),
    "grid": Command("figures.grid", "GridConfig", {"--model": "{w}/model", "--sources": "a={w}/questions.jsonl"}),
}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Iterator[None]:
    """No progress bars, as in a command, which turns them off before transformers is imported."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, questions, external rollouts, a manifest, a training run and two evaluations."""
    folder = tmp_path_factory.mktemp("world")
    make_manifest(folder, num_generations=2)
    lines = [json.loads(line) for line in (folder / "manifest" / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [
        {key: line[key] for key in ("question_id", "text", "completion_ids", "finish_reason")} for line in lines
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    (folder / "run.toml").write_text("seed = 1\n")
    for command, out, options in (
        ("train", "run", {"--keep-truncated": "", "--lora-r": "2"}),
        ("evaluate", "base", {}),
        ("evaluate", "trained", {"--adapter": "{w}/run/adapter"}),
    ):
        assert call(folder, command, {"--out": f"{{w}}/{out}", **options}) == 0
    return folder


def call(world: Path, name: str, options: Mapping[str, str]) -> int:
    """Run a command with these flags; one with an empty value is a switch."""
    command = COMMANDS[name]
    words = []
    for flag, value in {**command.options, "--out": "{w}/out", **options}.items():
        words += [flag, *value.replace("{w}", str(world)).split()]
    module = command_module(command.module)
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


def nothing_selected(w: Path) -> None:
    for line in range(1, 9):
        edit_row(w / "manifest", line, lambda row: row.update(selected=False, reason="low_agreement"))
    edit_header(w / "manifest", lambda header: header.update(counts={"questions": 8, "low_agreement": 8}))


def narrowed(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: tensor[:, :1].contiguous() for name, tensor in tensors.items()}


def one_row_each(w: Path) -> None:
    for name in ("base", "trained"):
        table(f"{name}/results.parquet", lambda rows: rows.__delitem__(slice(1, None)))(w)


def question_row(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the second row of the manifest; the hashes follow."""
    return lambda w: edit_row(w / "manifest", 2, change)


def rehashed(spoil: Spoil) -> Spoil:
    """Spoil a file of the manifest; the hashes follow."""
    return lambda w: (spoil(w), rehash(w / "manifest"))


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return lambda w: edit_header(w / "manifest", change)


QUESTIONS, MANIFEST, ROLLOUTS = "questions.jsonl", "manifest/manifest.json", "rollouts.jsonl"
PATTERN = r"questions\.jsonl"
CASES = [
    # questions
    Case("export evaluate intervene", "missing questions", r"dataset \S+gone\.jsonl: no such file",
         options={"--questions": "{w}/gone.jsonl"}),
    Case("export evaluate", "a folder without questions", "is a directory without",
         options={"--questions": "{w}/model"}),
    Case("export evaluate", "empty", rf"{PATTERN}: 0 questions", text(QUESTIONS, "")),
    Case("export", "cut off", rf"{PATTERN}:8: invalid JSON at column \d+: .* \(the last line may be cut off\)",
         again(QUESTIONS, lambda data: data[:-9])),
    Case("export", "UTF-16", rf"{PATTERN}: UTF-16", again(QUESTIONS, lambda data: data.decode().encode("utf-16"))),
    Case("evaluate", "Latin-1", rf"{PATTERN}:9: not UTF-8 \(0xe9 at byte 8",
         again(QUESTIONS, lambda data: data + b'{"id":"\xe9"}\n')),
    Case("export", "gzip", rf"{PATTERN}: gzip data: decompress it first", again(QUESTIONS, gzip.compress)),
    Case("export evaluate", "an id twice", rf'{PATTERN}:2: id "q0" already on line 1', fields(QUESTIONS, id="q0")),
    Case("export", "a number for a text", rf'{PATTERN}:2: field "question": expected text, got 7 \(int\)',
         fields(QUESTIONS, question=7)),
    Case("evaluate", "gold no choice", rf'{PATTERN}:2: field "answer": expected a letter of A-B',
         fields(QUESTIONS, choices=["x", "y"])),
    Case("evaluate intervene", "no gold", r'question "q1" \(line 2\) has no answer', fields(QUESTIONS, answer=None)),
    Case("export", "NUL", rf'{PATTERN}:2: field "question": holds a NUL character at character 2',
         fields(QUESTIONS, question="a\0")),
    Case("export", "too long for the model, all", r"every question is too long: the shortest prompt has \d+ tokens",
         options={"--max-new-tokens": "505"}),
    Case("evaluate", "too long for the model", r"a prompt of \d+ tokens and --max-new-tokens 505 exceed its 512",
         options={"--max-new-tokens": "505"}),
    Case("evaluate", "1 MB question", r"a prompt of 1000\d\d\d tokens and --max-new-tokens 4 exceed its 512",
         fields(QUESTIONS, question="x" * 10**6)),
    # manifests
    Case("train report intervene", "missing manifest", "manifest \\S+gone: no such folder",
         options={"--manifest": "{w}/gone"}),
    Case("train report intervene", "no header",
         r"incomplete export \(no manifest\.json\); rerun neurosig\.export with --resume", gone(MANIFEST)),
    Case("train report", "a changed byte", rf"{PATTERN}: sha256 differs from manifest\.json",
         again("manifest/questions.jsonl", lambda data: data.replace(b"red", b"bad"))),
    Case("train", "an unknown field", rf'{PATTERN}:2: \$\.seleced: unknown field \(did you mean "selected"\?\)',
         question_row(lambda row: row.update(seleced=True))),
    Case("train", "selected for another reason", rf'{PATTERN}:2: \$\.selected: contradicts the reason "tie"',
         question_row(lambda row: row.update(reason="tie"))),
    Case("train", "own context", rf"{PATTERN}:2: \$\.context\[0\]: a question is its own context",
         question_row(lambda row: row["context"][0].update(question_id="q1"))),
    Case("train", "dangling context", rf"{PATTERN}:2: \$\.context\[0\]: no rollout 9 of question",
         question_row(lambda row: row["context"][0].update(rollout_id=9))),
    Case("train intervene", "newer schema", r"schema version 2\.0, this neurosig reads 1\.4; upgrade",
         header(lambda h: h.update(schema_version="2.0"))),
    Case("train", "a path out of the folder", r'files\["\.\./x"\]: path leaves the manifest folder',
         header(lambda h: h["files"].update({"../x": h["files"]["neurons.csv"]}))),
    Case("train", "another model", r"made by \S+, not by \S+: weights \w{12} against \w{12}; give the right --model",
         lambda w: save_tiny(w / "model", seed=3)),
    Case("train", "another tokenizer", r"tokenizer \w{12} against \w{12}",
         again("model/tokenizer.json", lambda data: data.replace(b"<|unused_299|>", b"<|other_299|>"))),
    Case("train", "another template", r"chat template \w{12} against \w{12}",
         again("model/chat_template.jinja", lambda data: data + b" ")),
    Case("export", "a reuse of other texts under the same ids",
         r'these differ: dataset \(.* \(1 questions have another text, the first is "q1" on line 2\)',
         lambda w: (w / "other.jsonl").write_text((w / QUESTIONS).read_text().replace("Is blue", "Is bleu")),
         {"--reuse": "{w}/manifest", "--questions": "{w}/other.jsonl"}),
    Case("export", "a reuse of other questions",
         r"its rollouts and traces are not those of this export, these differ: dataset \(\w{12} there, \w{12} here\)",
         lambda w: write_questions(w / "fewer.jsonl", 5),
         {"--reuse": "{w}/manifest", "--questions": "{w}/fewer.jsonl"}),
    Case("train", "nothing selected", r"0 of 8 questions selected \(8 low_agreement\)", nothing_selected),
    # signals
    Case("report", "signals cut off", r"signals\.safetensors: not what neurosig\.export writes",
         rehashed(again("manifest/signals.safetensors", lambda data: data[: len(data) // 2]))),
    Case("intervene", "a neuron that is not there", r"neurons\.csv",
         rehashed(text("manifest/neurons.csv", "layer,index,weight,active_share\n7,0,1.0,0.5\n"))),
    # external rollouts
    Case("export", "missing rollouts", r"rollouts \S+: no such file", options={"--rollouts": "{w}/gone.jsonl"}),
    Case("export", "empty rollouts", r"rollouts\.jsonl: no rollouts for 8 of 8 questions, the first is \"q0\"",
         text(ROLLOUTS, ""), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "a malformed line", r"rollouts\.jsonl:3: invalid JSON",
         again(ROLLOUTS, lambda data: data.replace(b'{"question_id": "q1"', b'{"question_id" "q1"', 1)),
         {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "an unknown question", r'rollouts\.jsonl:3: question "q1" has 2 rollouts, "q0" on line 1 has 1',
         fields(ROLLOUTS, question_id="x"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "ids of another text", r'rollouts\.jsonl:2: completion_ids: they decode to "\S+", the text is ',
         fields(ROLLOUTS, text="something else"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "too long",
         r'rollouts\.jsonl: rollout 1 of question "q0": \d+ tokens after a prompt of \d+ exceed the model\'s 512',
         fields(ROLLOUTS, completion_ids=None, text="long " * 600, finish_reason="length"),
         {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "beyond the vocabulary", r"rollouts\.jsonl:2: completion_ids: token id 300, but the model has 300",
         fields(ROLLOUTS, completion_ids=[300], finish_reason="length"), {"--rollouts": "{w}/rollouts.jsonl"}),
    Case("export", "rollouts in Latin-1", r"rollouts\.jsonl:17: invalid JSON",
         again(ROLLOUTS, lambda data: data + b'{"question_id":"\xe9"}\n'), {"--rollouts": "{w}/rollouts.jsonl"}),
    # configs
    Case("export train evaluate compare report intervene grid", "missing config",
         r"config \S+gone\.toml: No such file", options={"--config": "{w}/gone.toml"}),
    Case("export train evaluate", "config in Latin-1", r"config \S+run\.toml: not UTF-8 \(byte 2\)",
         text("run.toml", b"# \xe9\n"), {"--config": "{w}/run.toml"}),
    Case("export train grid", "malformed config", r"run\.toml: invalid TOML: ", text("run.toml", "seed = \n"),
         {"--config": "{w}/run.toml"}),
    Case("export train evaluate compare", "unknown option",
         r'run\.toml: sede: unknown option \(did you mean "seed"\?\)', text("run.toml", "sede = 1\n"),
         {"--config": "{w}/run.toml"}),
    Case("export train evaluate compare", "wrong type", r"run\.toml: seed: expected int, got True",
         text("run.toml", "seed = true\n"), {"--config": "{w}/run.toml"}),
    Case("export train", "unknown preset", r"--preset nope: no such preset; have", options={"--preset": "nope"}),
    # models
    Case("export evaluate train", "missing model", r"model \S+gone: no such file or folder",
         options={"--model": "{w}/gone"}),
    Case("export evaluate", "empty config.json", r"config\.json is damaged", text("model/config.json", "")),
    Case("export evaluate train", "weights cut off", r"damaged weights|cannot load it",
         again("model/model.safetensors", lambda data: data[:-8])),
    Case("evaluate", "empty weights", r"model\.safetensors is empty; download it again",
         text("model/model.safetensors", "")),
    Case("export", "a layer missing", r"1 weights are missing from its files",
         weights("model/model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))),
    Case("export evaluate", "NaN in the weights", r'logits are not finite while sampling question "q\d"',
         weights("model/model.safetensors", lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))),
    Case("export evaluate", "no chat template", "the tokenizer has no chat template; give --template plain",
         gone("model/chat_template.jinja")),
    Case("export evaluate", "a template that ignores the question", "the chat template leaves out the question",
         text("model/chat_template.jinja", "hello")),
    Case("export train", "a template with a mistake",
         r"the chat template fails at line 2: |chat template \w{12} against",
         text("model/chat_template.jinja", "\n{% for %}")),
    Case("export", "pickled weights", "holds pickle weights; convert to safetensors",
         lambda w: (w / "model/model.safetensors").rename(w / "model/pytorch_model.bin")),
    Case("evaluate", "code beside the weights", r"config\.json asks for remote code \(auto_map\), which is never run",
         fields("model/config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})),
    Case("export", "a mixture of experts", r"mixtral", mixture),
    # adapters, evaluations, checkpoints
    Case("evaluate", "missing adapter", r"--adapter \S+gone: no adapter_model\.safetensors there",
         options={"--adapter": "{w}/gone"}),
    Case("evaluate", "adapter cut off", r"--adapter \S+adapter: ",
         again("run/adapter/adapter_model.safetensors", lambda data: data[:-8]), {"--adapter": "{w}/run/adapter"}),
    Case("evaluate", "adapter of another shape", r"--adapter \S+adapter: ",
         weights("run/adapter/adapter_model.safetensors", narrowed), {"--adapter": "{w}/run/adapter"}),
    Case("evaluate", "adapter without its config", r"--adapter \S+adapter: ", gone("run/adapter/adapter_config.json"),
         {"--adapter": "{w}/run/adapter"}),
    Case("compare", "missing evaluation", r"no finished evaluation \(summary\.json is missing\)",
         gone("trained/summary.json")),
    Case("compare", "a damaged summary", r"trained: cannot be read", text("trained/summary.json", "{")),
    Case("compare", "a damaged table", r"trained: cannot be read",
         again("trained/results.parquet", lambda data: data[:-9])),
    Case("compare", "results of an earlier version", r"trained: results with the columns of an earlier version",
         table("trained/results.parquet", lambda rows: [row.update(id=row.pop("question_id")) for row in rows])),
    Case("compare", "other questions", r"trained: not the questions of",
         table("trained/results.parquet", lambda rows: rows.pop())),
    Case("compare", "other texts under the same ids",
         r"trained: the ids are those of .*, but texts or gold answers of its questions are not",
         again("trained/summary.json", lambda data: data.replace(b'"questions_sha256": "', b'"questions_sha256": "0'))),
    Case("compare", "another K", r"K=3 samples per question",
         table("trained/results.parquet", lambda rows: [row.update(k=3) for row in rows])),
    Case("compare", "a missing training run", r"--train \S+gone: no finished training run",
         options={"--train": "{w}/gone"}),
    Case("compare", "one question in a scope", r'"q0" is its only in-domain question; an interval needs at least 2',
         one_row_each),
    Case("train", "resumed with other options",
         r"cannot resume, these differ from the interrupted run: learning_rate \(\S+ before, 0.1 now\), lora_r \(",
         lambda w: (w / "run/train.json").unlink(),
         {"--out": "{w}/run", "--resume": "", "--learning-rate": "0.1", "--keep-truncated": ""}),
    Case("train export evaluate compare", "a file in the way", r"out: is a file; give a folder", text("out", "mine")),
    Case("train evaluate", "an earlier run in the way",
         r"holds an earlier run; give --resume to continue it, --overwrite",
         lambda w: [shutil.copytree(w / run, w / "out", dirs_exist_ok=True) for run in ("run", "base")]),
    Case("grid", "a grid of unknown methods", r"method x: expected one of nopsd", options={"--methods": "x"}),
]  # fmt: skip


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
    shutil.copytree(world, w)
    relocate(w, world)
    case.spoil(w)
    before = snapshot(w)
    code = call(w, command, case.options)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    assert code == 2, output.err
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert re.search(case.message, lines[0]), lines[0]
    assert "Traceback" not in output.err + output.out
    after = snapshot(w)
    new = [path for path in after if path not in before and not path.startswith(("out/.work", "out/.rollouts.log"))]
    assert not new and {path: after[path] for path in before} == before, new


def relocate(w: Path, world: Path) -> None:
    """Make the copied manifest name the copied model, so that a spoiled model is loaded."""

    def moved(header: dict[str, Any]) -> None:
        header["model"]["id"] = header["model"]["id"].replace(str(world), str(w))

    edit_header(w / "manifest", moved)
