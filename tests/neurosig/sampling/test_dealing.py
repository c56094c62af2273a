"""Two processes export and evaluate what one does, to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import neurosig.neurons.signals_file
import neurosig.sampling.choice_scoring
import neurosig.sampling.sampler
from neurosig.runtime.cli import command_words
from neurosig.runtime.errors import UserError
from neurosig.runtime.ranks import Ranks
from neurosig.sampling.dealing import deal
from neurosig.sampling.sampler import Prompt
from tests.support.flow import save_tiny, write_questions
from tests.support.processes import exit_codes, run_evaluate, run_export, start_ranks

QUICK: dict[str, Any] = {"num_generations": 3, "max_new_tokens": 4, "temperature": 1.0, "batch_rows": 3}
EXPORT: dict[str, Any] = {**QUICK, "set_size": 16, "question_filter": "all", "keep_truncated": True}
SECOND = {**EXPORT, "teacher_rollouts": 2, "context_policy": "trajectory"}
SAME = {
    "second": (
        *("questions.jsonl", "rollouts.jsonl", "teacher_rollouts.jsonl"),
        *("signals.safetensors", "neurons.csv", "manifest.json"),
    ),
    "export": ("questions.jsonl", "rollouts.jsonl", "signals.safetensors", "neurons.csv", "manifest.json"),
    "evaluate": ("results.parquet", "rollouts.jsonl"),
}


def traced_in_threes(work: Any, arguments: list[str]) -> int:
    """A command whose shards hold three rollouts, so that there is one for each process."""
    neurosig.neurons.signals_file.CHUNK = 3
    return int(work(arguments))


def broken_off(work: Any, arguments: list[str], fault: BaseException, groups: dict[str, int]) -> int:
    """A command whose process of each rank (by name) raises ``fault`` after N questions; -1: never."""
    after = groups[os.environ["RANK"]]
    for module, name in ((neurosig.sampling.sampler, "sample"), (neurosig.sampling.choice_scoring, "score_choices")):
        draw = getattr(module, name)

        def interrupted(*args: Any, draw: Any = draw, **kwargs: Any) -> Iterator[Any]:
            for number, group in enumerate(draw(*args, **kwargs)):
                if number == after:
                    raise fault
                yield group

        setattr(module, name, interrupted)
    return traced_in_threes(work, arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its questions, with an export and evaluations by one process."""
    folder = tmp_path_factory.mktemp("one")
    save_tiny(folder / "model")
    write_questions(folder / "questions.jsonl", n=12)
    write_questions(folder / "choices.jsonl", n=12, choices=["one", "two", "three"], answer="B")
    run_all(folder, folder, 1)
    return folder


def run_all(made: Path, out: Path, world: int) -> None:
    """Every command at the same time, on ``world`` processes each."""
    running = {
        name: start_ranks(out / f"log-{name}", world, traced_in_threes, work, arguments)
        for name, (work, arguments) in commands(made, out).items()
    }
    for name, processes in running.items():
        assert exit_codes(processes) == [0] * world, (out / f"log-{name}" / "rank0.log").read_text()


def said(folder: Path, rank: int) -> list[str]:
    """What a process printed, without the bars of transformers, which was imported before its messages were off."""
    lines = (folder / f"rank{rank}.log").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("Loading weights")]


def commands(made: Path, out: Path, **changes: Any) -> dict[str, tuple[Any, list[str]]]:
    """What is run and with which arguments, by name."""
    model = {"model": made / "model", **changes}
    common = {**model, "questions": made / "questions.jsonl"}
    scored = {**model, "questions": made / "choices.jsonl", "scoring": "loglikelihood", "mutual_info": True}
    return {
        "export": (run_export, command_words({**common, "out": out / "export", **EXPORT})),
        "second": (run_export, command_words({**common, "out": out / "second", **SECOND})),
        "evaluate": (run_evaluate, command_words({**common, "out": out / "evaluate", **QUICK})),
        "scored": (run_evaluate, command_words({**scored, "out": out / "scored", "batch_rows": 6})),
    }


def assert_same(one: Path, other: Path) -> None:
    files = SAME.get(one.name, SAME["evaluate"])
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    for name in files:
        if name == "manifest.json":  # the content's hash is of all but time stamps
            hashes = [json.loads((folder / name).read_text())["content_sha256"] for folder in (one, other)]
            assert hashes[0] == hashes[1]
        else:
            assert (other / name).read_bytes() == (one / name).read_bytes(), name


def test_two_processes_write_the_bytes_of_one(tmp_path: Path, made: Path) -> None:
    run_all(made, tmp_path, 2)
    for name in ("export", "second", "evaluate", "scored"):
        assert_same(made / name, tmp_path / name)
        assert json.loads((tmp_path / name / "run.json").read_text())["processes"] == 2
        assert said(tmp_path / f"log-{name}", 0) and not said(tmp_path / f"log-{name}", 1)


@pytest.mark.parametrize("name", ["export", "second", "evaluate", "scored"])
def test_a_killed_run_resumes_with_another_number_of_processes(tmp_path: Path, made: Path, name: str) -> None:
    work, arguments = commands(made, tmp_path)[name]
    again = (work, [*arguments, "--resume"])
    killed = start_ranks(tmp_path / "log", 2, broken_off, work, arguments, KeyboardInterrupt(), {"0": 1, "1": 2})
    assert exit_codes(killed) == [130, 130]
    assert said(tmp_path / "log", 0)[-1] == "interrupted; rerun with --resume" and not said(tmp_path / "log", 1)
    kept = {path.name: len(path.read_text().splitlines()) - 1 for path in (tmp_path / name).rglob("*rollouts.log*")}
    assert sorted(kept.values()) == [1, 2]

    left = {"0": 12 if name == "second" else 9}  # questions, of which the teacher is asked all
    shutil.copytree(tmp_path / name, tmp_path / "two" / name)
    assert exit_codes(start_ranks(tmp_path / "log1", 1, broken_off, *again, KeyboardInterrupt(), left)) == [0]
    assert_same(made / name, tmp_path / name)

    two = (work, [*commands(made, tmp_path / "two")[name][1], "--resume"])
    assert exit_codes(start_ranks(tmp_path / "log2", 2, traced_in_threes, *two)) == [0, 0]
    assert_same(made / name, tmp_path / "two" / name)


@pytest.mark.parametrize(
    ("name", "changes", "groups", "message"),
    [
        ("export", {}, {"0": -1, "1": 1}, "error: one process has a fault"),
        ("evaluate", {}, {"0": -1, "1": 1}, "error: one process has a fault"),
        ("export", {"device": "cuda:0"}, {"0": -1, "1": -1}, "error: --device cuda:0: leave it out under several"),
        ("evaluate", {"model": "/nowhere"}, {"0": -1, "1": -1}, "error: model /nowhere: no such file or folder"),
    ],
    ids=["export", "evaluate", "device", "model"],
)
def test_one_fault_ends_both_with_one_message(
    tmp_path: Path, made: Path, name: str, changes: dict[str, Any], groups: dict[str, int], message: str
) -> None:
    work, arguments = commands(made, tmp_path, **changes)[name]
    fault = UserError("one process has a fault")
    assert exit_codes(start_ranks(tmp_path / "log", 2, broken_off, work, arguments, fault, groups)) == [2, 2]
    lines = [line for rank in range(2) for line in said(tmp_path / "log", rank)]
    assert [line.startswith(message) for line in lines if line.startswith("error")] == [True]
    assert not any((tmp_path / name).glob("[!.]*.json"))


def test_the_launchers_start_export_and_evaluate(tmp_path: Path, made: Path) -> None:
    """As on GPUs. The export is compared with a plain one, whose shards are as large: batches of another size may
    differ in the last bits."""
    accelerate = "accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no -m neurosig.export"
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 -m distill.evaluate"
    plain = tmp_path / "plain"
    runs = (("export", "neurosig.export", plain), ("export", accelerate, tmp_path), ("evaluate", torchrun, tmp_path))
    for name, launcher, out in runs:
        done = subprocess.run(
            [sys.executable, "-m", *launcher.split(), *commands(made, out)[name][1], "--quiet"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    assert_same(plain / "export", tmp_path / "export")
    assert_same(made / "evaluate", tmp_path / "evaluate")


def test_unfinished_blocks_are_dealt_to_and_fro() -> None:
    prompts = [Prompt(name, (1,) * length) for length, name in enumerate("abcdefghij", start=1)]

    def shares(world: int, block: int, done: set[str]) -> list[str]:
        states = [
            cast(Any, SimpleNamespace(num_processes=world, process_index=r, device=SimpleNamespace(type="cpu")))
            for r in range(world)
        ]
        return ["".join(sorted(deal(prompts, block, done, Ranks(state)))) for state in states]

    assert shares(1, 3, set()) == ["abcdefghij"]
    assert shares(2, 2, set()) == ["abghij", "cdef"]
    assert shares(2, 2, {"a", "b", "c"}) == ["dij", "efgh"]
    assert shares(4, 10, {"a"}) == ["bcdefghij", "", "", ""]
