"""Like with like: runs that are resumed, reused or compared have the same options and inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from neurosig.runtime.cli import run_command
from tests.support.commands import command_module
from tests.support.flow import make_manifest, save_tiny, write_questions
from tests.support.parsers import UNCUT
from tests.support.runs import result_bytes
from tests.support.tiny import CHAT_TEMPLATE

SAMPLING = {"--num-generations": "2", "--max-new-tokens": "4", "--temperature": "1"}
ASKED = {"--model": "{w}/model", "--questions": "{w}/questions.jsonl", **SAMPLING}
COMMANDS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "export": (
        "neurosig.export",
        "ExportConfig",
        {**ASKED, "--set-size": "16", "--question-filter": "all", "--keep-truncated": ""},
    ),
    "train": (
        "distill.train",
        "TrainConfig",
        {
            **{"--manifest": "{w}/manifest", "--steps": "3", "--save-steps": "2", "--keep-truncated": ""},
            **{"--questions-per-step": "2", "--lora-r": "2"},
        },
    ),
    "evaluate": ("distill.evaluate", "EvaluateConfig", {**ASKED, "--answer-parser": UNCUT}),
    "intervene": (
        "neurosig.intervene",
        "InterveneConfig",
        {
            **{"--manifest": "{w}/manifest", "--questions": "{w}/questions.jsonl", "--table": "{w}/neurons.csv"},
            **{"--factors": "0", "--controls": "1", "--matching": "layer", **SAMPLING},
        },
    ),
    "study": ("neurosig.organism.study", "StudyConfig", {}),
    "compare": ("distill.compare", "CompareConfig", {"--resamples": "50"}),
}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def call(world: Path, name: str, options: Mapping[str, str], *, quiet: bool = True) -> int:
    """Run a command with these flags; one with an empty value is a switch."""
    module_name, config, own = COMMANDS[name]
    words = []
    for flag, value in {**own, **options}.items():
        words += [flag, *value.replace("{w}", str(world)).split()]
    module = command_module(module_name)
    presets = getattr(module, "PRESETS", {})
    quietly = ["--quiet"] if quiet else []
    return run_command(getattr(module, config), module.main, presets=presets, prog=name, argv=[*words, *quietly])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions, a manifest, rollouts made elsewhere, and one finished run of each command."""
    folder = tmp_path_factory.mktemp("world")
    make_manifest(folder, num_generations=2, instruction="Say it.", answer_format="short", answer_parser=UNCUT)
    fields = ("question_id", "text", "completion_ids", "finish_reason")
    lines = [json.loads(line) for line in (folder / "manifest" / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [json.dumps({name: line[name] for name in fields}) + "\n" for line in lines]
    (folder / "rollouts.jsonl").write_text("".join(rollouts))
    (folder / "neurons.csv").write_text("layer,index,weight,active_share\n0,1,0.5,0.1\n1,2,0.5,0.1\n")
    write_questions(folder / "others.jsonl", id=None, question=None)
    records = [{"id": f"o{i}", "domain": "tone", "question": f"Is {i} loud?", "answer": "x"} for i in range(4)]
    (folder / "others.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = {
        "export": ("export", {"--rollouts": "{w}/rollouts.jsonl"}),
        "train": ("train", {}),
        "base": ("evaluate", {}),
        "evaluate": ("evaluate", {"--adapter": "{w}/train/adapter"}),
        "intervene": ("intervene", {}),
    }
    for out, (name, options) in done.items():
        assert call(folder, name, {"--out": f"{{w}}/{out}", **options}) == 0, out
    return folder


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """The world at another place: the paths of its records still name the first."""
    shutil.copytree(world, tmp_path / "w")
    return tmp_path / "w"


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def text(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda w: (w / name).write_text((w / name).read_text().replace(old, new))


OWN: Mapping[str, Mapping[str, str]] = {
    "export": {"--rollouts": "{w}/rollouts.jsonl"},
    "evaluate": {"--adapter": "{w}/train/adapter"},
}
UNCHANGED: Callable[[Path], object] = bool
DIFFERENT: list[tuple[str, Mapping[str, str], Callable[[Path], object], tuple[str, ...]]] = [
    ("export", {"--temperature": "0.5"}, UNCHANGED, ("temperature (1.0 before, 0.5 now)",)),
    ("export", {"--num-generations": "3"}, UNCHANGED, ("num_generations (2 before, 3 now)",)),
    (
        "export",
        {"--question-filter": "vote_only", "--set-size": "8"},
        UNCHANGED,
        ("question_filter (all before, vote_only now)", "set_size (16 before, 8 now)"),
    ),
    ("export", {}, text("questions.jsonl", "blue", "bleu"), ("questions (", "questions.jsonl with SHA-256")),
    ("export", {}, text("rollouts.jsonl", '"text": "', '"text": "x'), ("rollouts (", "rollouts.jsonl with SHA-256")),
    ("export", {}, lambda w: save_tiny(w / "model", seed=5), ("model (", "model with SHA-256")),
    ("train", {"--learning-rate": "0.1"}, UNCHANGED, ("learning_rate (0.0005 before, 0.1 now)",)),
    ("train", {"--steps": "2"}, UNCHANGED, ("steps (3 before, 2 now)", "steps can only grow")),
    ("train", {"--steps": "9", "--seed": "1"}, UNCHANGED, ("seed (0 before, 1 now)",)),
    ("train", {"--manifest": "{w}/export"}, UNCHANGED, ("manifest (", "/export with SHA-256")),
    ("evaluate", {"--temperature": "0"}, UNCHANGED, ("temperature (1.0 before, 0.0 now)",)),
    ("evaluate", {"--limit": "3"}, UNCHANGED, ("limit ([] before, [3] now)",)),
    ("evaluate", {"--questions": "{w}/others.jsonl"}, UNCHANGED, ("questions (", "others.jsonl with SHA-256")),
    (
        "evaluate",
        {},
        lambda w: (w / "train/adapter/adapter_model.safetensors").write_bytes(b"other"),
        ("adapter (", "train/adapter with SHA-256"),
    ),
    ("intervene", {"--factors": "0 2"}, UNCHANGED, ("factors ([0.0] before, [0.0, 2.0] now)",)),
    ("intervene", {}, text("neurons.csv", "1,2,", "1,3,"), ("table (", "neurons.csv with SHA-256")),
]


@pytest.mark.parametrize(("name", "options", "change", "named"), DIFFERENT)
def test_a_finished_run_is_not_resumed_with_other_options_or_inputs(
    copied: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: Mapping[str, str],
    change: Callable[[Path], object],
    named: tuple[str, ...],
) -> None:
    same = {"--out": f"{{w}}/{name}", "--resume": "", **OWN.get(name, {})}
    change(copied)
    before = state(copied)
    assert call(copied, name, {**same, **options}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "cannot resume, these differ from the finished run: " in error
    assert all(part in error for part in named), error
    assert state(copied) == before


@pytest.mark.parametrize("name", ["export", "train", "evaluate", "intervene"])
def test_a_finished_run_with_the_same_options_is_complete_wherever_its_inputs_are(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = state(copied)
    same = {"--out": f"{{w}}/{name}", "--resume": "", **OWN.get(name, {})}
    assert call(copied, name, same, quiet=False) == 0
    assert "already complete" in capsys.readouterr().err
    assert state(copied) == before


def test_a_study_is_not_resumed_with_another_temperature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = command_module("neurosig.organism.study")
    for part in ("_export", "pattern_rows", "hallucination_rows", "teacher_rows"):
        monkeypatch.setattr(study, part, lambda *args: ([], None) if len(args) == 2 else [])
    monkeypatch.setattr(study, "hallucination_rows", lambda *args: [])
    assert call(tmp_path, "study", {"--out": "{w}/study"}) == 0
    assert call(tmp_path, "study", {"--out": "{w}/study", "--resume": "", "--temperature": "0.4"}) == 2
    assert "temperature (0.8 before, 0.4 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", {"--micro-batch-size": "1", "--batch-rows": "8", "--gradient-checkpointing": "", "--device": "cpu"}),
        ("train", {"--attn-implementation": "eager"}),
        ("evaluate", {"--batch-rows": "8", "--device": "cpu"}),
        ("export", {"--batch-rows": "8", "--batch-tokens": "64", "--device": "cpu"}),
        ("intervene", {"--batch-rows": "8"}),
    ],
)
def test_memory_and_speed_may_change_on_resume(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, options: Mapping[str, str]
) -> None:
    """Of a finished run, and of a training run that was interrupted after its second step."""
    same = {"--out": f"{{w}}/{name}", "--resume": "", **OWN.get(name, {})}
    for finished in (True, False) if name == "train" else (True,):
        if not finished:
            (copied / "train" / "train.json").unlink()
            shutil.rmtree(copied / "train" / "checkpoints" / "step-000003")
        assert call(copied, name, {**same, **options}) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if "may differ" in line]
        assert len(notes) == 1
        assert all(flag.strip("-").replace("-", "_") in notes[0] for flag in options)
    assert (copied / name / "run.json").is_file()


@pytest.mark.parametrize("more", [{}, {"--method": "lmsi"}, {"--dev-questions": "{w}/questions.jsonl"}])
def test_more_steps_continue_a_finished_run_to_the_bytes_of_a_longer_one(world: Path, more: Mapping[str, str]) -> None:
    """The first run ends between two saves, where the longer one writes no checkpoint and measures nothing."""
    short, long = (f"{{w}}/{kind}-{len(str(more))}" for kind in ("short", "long"))
    kept = {"--dev-limit": "4", "--dev-generations": "2"} if "--dev-questions" in more else {}
    options = {**more, **kept}
    assert call(world, "train", {"--out": short, **options}) == 0
    assert call(world, "train", {"--out": short, "--resume": "", **options, "--steps": "6"}) == 0
    assert call(world, "train", {"--out": long, **options, "--steps": "6"}) == 0
    parts = [Path(out.replace("{w}", str(world))) for out in (short, long)]
    names = [
        *("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/trained_on.txt"),
        *(f"checkpoints/step-00000{step}/{file}.safetensors" for step in (4, 6) for file in ("weights", "optimizer")),
        *(["development.jsonl"] if kept else []),
    ]
    for name in names:
        assert result_bytes(parts[0] / name) == result_bytes(parts[1] / name), name
    assert [sorted(path.name for path in (part / "checkpoints").glob("step-*")) for part in parts] == [
        ["step-000004", "step-000006"]
    ] * 2
    assert call(world, "train", {"--out": short, "--resume": "", **options, "--steps": "3"}) == 2


def evaluated(world: Path, out: str, **options: str) -> dict[str, Any]:
    flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    assert call(world, "evaluate", {"--out": f"{{w}}/{out}", **flags}) == 0
    return dict(json.loads((world / out / "summary.json").read_text()))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"instruction": "Reply."}, "instruction (Say it. for base, Reply. for trained)"),
        ({"system": "Be_brief."}, "system (none for base, Be_brief. for trained)"),
        ({"template": "plain"}, "template ("),
        ({"eval_thinking": "False"}, "eval_thinking (none for base, false for trained)"),
        ({"num_generations": "3"}, "num_generations (2 for base, 3 for trained)"),
        ({"max_new_tokens": "5"}, "max_new_tokens (4 for base, 5 for trained)"),
        ({"top_p": "0.9", "top_k": "7"}, "top_k (0 for base, 7 for trained), top_p (1.0 for base, 0.9 for trained)"),
        ({"answer_format": "number"}, "answer_format (short for base, number for trained)"),
        ({"model": "{w}/other"}, "weights ("),
    ],
)
def test_unlike_evaluations_are_not_compared(
    copied: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str], named: str
) -> None:
    save_tiny(copied / "other", seed=5)
    like = {"instruction": "Say it.".replace(" ", "_"), "answer_format": "short"}
    shutil.rmtree(copied / "base")
    evaluated(copied, "base", **like)
    evaluated(copied, "trained", **{**like, **options})
    pair = {"--base": "{w}/base", "--trained": "{w}/trained", "--out": "{w}/report"}
    assert call(copied, "compare", pair) == 2
    error = capsys.readouterr().err
    assert named.replace("Say it.", "Say_it.") in error and "cannot be compared" in error
    assert not (copied / "report").exists()
    keys = [name if name not in ("model",) else "weights" for name in options]
    assert call(copied, "compare", {**pair, "--allow-difference": " ".join(keys[:1])}) == (0 if len(keys) == 1 else 2)
    assert call(copied, "compare", {**pair, "--allow-difference": " ".join(keys)}) == 0
    table = (copied / "report" / "table.md").read_text()
    assert "Allowed differences from base: " + named.replace("Say it.", "Say_it.") in table
    assert json.loads((copied / "report" / "comparison.json").read_text())["allowed_differences"].keys() == {"trained"}
    assert call(copied, "compare", {**pair, "--allow-difference": "wording"}) == 2


def test_temperature_seed_and_adapter_may_differ(copied: Path) -> None:
    """An adapter is evaluated as it was trained, so the base must be asked in the same words."""
    pair = {"--base": "{w}/base", "--trained": "{w}/evaluate", "--out": "{w}/report"}
    assert call(copied, "compare", pair) == 2  # trained with another instruction
    shutil.rmtree(copied / "base")
    write = {"--instruction": "Say_it.", "--answer-format": "short"}
    text("train/adapter/train.json", "Say it.", "Say_it.")(copied)
    assert call(copied, "evaluate", {"--out": "{w}/base", **write}) == 0
    assert call(copied, "evaluate", {"--out": "{w}/cold", **write, "--temperature": "0.3", "--seed": "7"}) == 0
    assert call(copied, "evaluate", {"--out": "{w}/ours", "--adapter": "{w}/train/adapter"}) == 0
    both = {"--base": "{w}/base", "--control": "{w}/cold", "--trained": "{w}/ours", "--out": "{w}/report"}
    assert call(copied, "compare", both) == 0
    table = (copied / "report" / "table.md").read_text()
    assert "Allowed differences" not in table
    assert "trained_on: 8 (trained, in-domain; of 8 questions)" in table


def test_an_adapter_is_evaluated_as_it_was_trained(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wording, format and template of its manifest, though a preset has others; a contradicting flag is refused."""
    (copied / "mine.jinja").write_text(CHAT_TEMPLATE.replace("assistant", "helper"))
    own = {"--template": "{w}/mine.jinja", "--system": "Yes.", "--answer-format": "letter", "--answer-parser": UNCUT}
    own |= {"--student-thinking": "True"}
    assert call(copied, "export", {"--out": "{w}/mine", **own}) == 0
    assert call(copied, "train", {"--out": "{w}/ours", "--manifest": "{w}/mine", "--steps": "1"}) == 0
    (copied / "mine.jinja").unlink()
    header = json.loads((copied / "mine" / "manifest.json").read_text())
    shutil.rmtree(copied / "mine")
    summary = evaluated(copied, "one", adapter="{w}/ours/adapter", preset="qwen3-4b")
    assert summary["model"]["chat_template_sha256"] == header["tokenizer"]["chat_template_sha256"]
    for name in ("system", "instruction", "choice_instruction", "answer_format"):
        assert summary["config"][name] == header["options"][name], name
    assert summary["config"]["eval_thinking"] is header["options"]["student_thinking"] is True  # the preset says False
    capsys.readouterr()
    for flag, value in (("--system", "No."), ("--template", "plain"), ("--answer-format", "short")):
        adapter = {"--adapter": "{w}/ours/adapter", "--out": "{w}/two"}
        assert call(copied, "evaluate", {**adapter, flag: value}) == 2
        error = capsys.readouterr().err
        assert flag.strip("-").replace("-", "_") in error and value in error and "in training" in error
        assert not (copied / "two").exists()
    assert call(copied, "evaluate", {**adapter, "--system": "Yes.", "--eval-thinking": "False"}) == 0
    assert json.loads((copied / "two" / "summary.json").read_text())["config"]["eval_thinking"] is False
    (copied / "run.toml").write_text('answer_format = "short"\n')
    assert call(copied, "evaluate", {**adapter, "--overwrite": "", "--config": "{w}/run.toml"}) == 2


def test_questions_that_were_trained_on_are_counted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By text: three of the eight are reworded, and the manifest is gone."""
    for word in ("red", "blue", "green"):
        text("questions.jsonl", f"Is {word} nice", f"Is {word} fine")(copied)
    shutil.rmtree(copied / "manifest")
    both = "{w}/questions.jsonl {w}/others.jsonl"
    summary = evaluated(copied, "seen", adapter="{w}/train/adapter", questions=both)
    assert {name: block["trained_on"] for name, block in summary["domains"].items()} == {"colour": 5, "tone": 0}
    assert "warning: colour: 5 of 8 questions were trained on" in capsys.readouterr().err
    assert {block["trained_on"] for block in evaluated(copied, "new", questions=both)["domains"].values()} == {0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("export", {"--questions": "{w}/out/questions.jsonl"}),
        ("export", {"--rollouts": "{w}/out/rollouts.jsonl"}),
        ("export", {"--reuse": "{w}/out"}),
        ("export", {"--model": "{w}/out/model"}),
        ("export", {"--template": "{w}/out/t.jinja"}),
        ("train", {"--manifest": "{w}/out/manifest"}),
        ("train", {"--model": "{w}/out/model"}),
        ("train", {"--replay": "{w}/out/questions.jsonl"}),
        ("evaluate", {"--adapter": "{w}/out/train/adapter"}),
        ("evaluate", {"--questions": "{w}/others.jsonl {w}/link/questions.jsonl"}),
        ("intervene", {"--table": "{w}/out/neurons.csv"}),
        ("study", {"--model": "{w}/out/model"}),
    ],
)
def test_inputs_inside_the_output_are_never_overwritten(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, options: Mapping[str, str]
) -> None:
    shutil.copytree(copied, copied.parent / "all")
    shutil.move(copied.parent / "all", copied / "out")
    for part in ("manifest.json", "questions.jsonl", "rollouts.jsonl", "signals.safetensors"):
        shutil.copy(copied / "export" / part, copied / "out" / part)
    (copied / "out" / "t.jinja").write_text(CHAT_TEMPLATE)
    (copied / "link").symlink_to("out")
    before = state(copied)
    assert call(copied, name, {**options, "--out": "{w}/out", "--overwrite": ""}) == 2
    (flag,) = options
    assert f"error: {flag} {copied}/" in (error := capsys.readouterr().err) and "lies inside --out" in error
    assert state(copied) == before


def test_rollouts_that_changed_since_are_not_reused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By content, not by name: a moved file is the same, and the hash on record is that of what was read."""
    from neurosig.runtime.files import sha256_file

    (copied / "moved.jsonl").write_bytes((copied / "rollouts.jsonl").read_bytes())
    digest = sha256_file(copied / "moved.jsonl")
    again = {"--reuse": "{w}/export", "--out": "{w}/again", "--context-policy": "random"}
    assert call(copied, "export", {**again, "--rollouts": "{w}/moved.jsonl"}) == 0
    for folder in ("export", "again"):
        header = json.loads((copied / folder / "manifest.json").read_text())
        assert header["sampling"] == {"rollouts_sha256": digest}
    text("moved.jsonl", '"text": "', '"text": "x')(copied)
    changed = sha256_file(copied / "moved.jsonl")
    for options, now in (({"--rollouts": "{w}/moved.jsonl"}, changed[:12]), ({}, "none")):
        assert call(copied, "export", {**again, "--out": f"{{w}}/{now}", **options}) == 2
        assert f"rollouts ({digest[:12]} there, {now} here)" in capsys.readouterr().err
        assert not (copied / now / "manifest.json").exists()


def test_a_template_that_changed_since_is_not_reused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "t.jinja").write_text(CHAT_TEMPLATE)
    assert call(copied, "export", {"--out": "{w}/first", "--template": "{w}/t.jinja"}) == 0
    (copied / "t.jinja").write_text(CHAT_TEMPLATE.replace("assistant", "helper"))
    again = {"--reuse": "{w}/first", "--out": "{w}/again", "--template": "{w}/t.jinja"}
    assert call(copied, "export", again) == 2
    assert "chat_template (" in capsys.readouterr().err


def test_what_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    from neurosig.runtime.errors import UserError
    from neurosig.runtime.files import read_once

    path = tmp_path / "rollouts.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"rollouts\.jsonl: changed while it was read"), read_once(path):
        path.write_text("{}\n{}\n")
