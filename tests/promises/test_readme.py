"""The README's commands are commands, and the tests it names exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from neurosig.runtime.cli import parse_config
from tests.benchmarks import memory
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "neurosig.export": "ExportConfig",
    "neurosig.check": "CheckConfig",
    "neurosig.report": "ReportConfig",
    "neurosig.intervene": "InterveneConfig",
    "neurosig.verify": "VerifyConfig",
    "distill.train": "TrainConfig",
    "distill.evaluate": "EvaluateConfig",
    "distill.compare": "CompareConfig",
    "figures.grid": "GridConfig",
}


def commands() -> list[str]:
    """Every shell line of the README's sh blocks, continued lines joined, comments left out."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in blocks.splitlines())
    return [" ".join(line.removeprefix("$ ").split()) for line in lines if line]


@pytest.mark.parametrize("command", [line for line in commands() if "-m neurosig." in line or "-m distill." in line])
def test_every_command_parses(command: str) -> None:
    """As the command itself would parse it; `accelerate launch` and what it is given by its own parser too."""
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        assert launched.module
        module, argv = launched.training_script, launched.training_script_args
    else:
        place = words.index("-m")
        assert words[place - 1] == "python"
        module, argv = words[place + 1], words[place + 2 :]
    loaded = importlib.import_module(module)
    parse_config(getattr(loaded, CONFIGS[module]), presets=getattr(loaded, "PRESETS", {}), prog=module, argv=argv)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]+)", "\n".join(commands()) + " ".join(re.findall(r"`([^`]*)`", README)))
    )
    assert {"demo", "test"} <= named <= targets


def test_every_test_named_as_evidence_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", README)
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_file_of_the_layout_exists_and_none_is_left_out() -> None:
    layout = README[README.index("## Layout") :]
    layout = layout[layout.index("```\n") + 4 :]
    layout = layout[: layout.index("```")]
    named: dict[str, set[str]] = {}
    folder = ""
    for line in layout.splitlines():
        if not line.startswith(" "):
            folder = line.split("/")[0]
        named.setdefault(folder, set()).update(re.findall(r"[\w*]+\.py", line))
    for package in ("neurosig", "distill"):
        present = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        for name in named[package]:
            assert list((ROOT / package).glob(name)), f"{package}/{name}"
        left_out = {name for name in present if not any(Path(name).match(pattern) for pattern in named[package])}
        assert not left_out, package


def test_the_memory_table_is_the_arithmetic() -> None:
    terms = memory.gigabytes(memory.Arithmetic())
    table = {line.split("|")[1].strip(): line.split("|")[2:5] for line in README.splitlines() if line.startswith("| ")}

    def cells(name: str) -> list[float]:
        return [float(cell) for cell in next(row for head, row in table.items() if head.startswith(name))]

    embeddings = 2 * 151_936 * 2560 / 1e9
    decoder = terms["weights"] - embeddings
    for name, expected in {
        "weights": [terms["weights"]] * 2 + [embeddings + decoder / 8],
        "adapter, gradient": [terms["adapter, gradient, Adam"]] * 2 + [terms["adapter, gradient, Adam"] / 8],
        "sampling: merged": [terms["sampling: merged weights"]] * 2 + [terms["sampling: merged weights"] + decoder],
        "sampling: keys": [terms["sampling: keys and values"] / ranks for ranks in (1, 8, 8)],
        "learning: student's": [terms["learning: student's activations"]] * 3,
        "learning: the same": [terms["learning: with --gradient-checkpointing"]] * 3,
        "learning: teacher's": [terms["learning: teacher's keys and values"]] * 3,
        "loss: two": [terms["loss: two chunks of logits"]] * 3,
    }.items():
        assert cells(name) == pytest.approx(expected, abs=0.06), name
