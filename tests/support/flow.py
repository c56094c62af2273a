"""Exports of a tiny model, and interruptions of commands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import neurosig.sampling.sampler
from neurosig.export import ExportConfig
from neurosig.export import main as export
from tests.support.tiny import Arch, OtherArch, tiny_model, tiny_tokenizer

WORDS = ("red", "blue", "green", "amber", "pink", "grey", "white", "black", "teal", "plum", "rust", "sand")


def save_tiny(folder: Path, arch: Arch | OtherArch = "qwen3", seed: int = 0) -> Path:
    """A tiny model folder that every command can load."""
    tiny_model(arch, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_questions(path: Path, n: int = 8, **changes: Any) -> Path:
    """``n`` questions; ``changes`` replaces fields of every record, and ``None`` removes them."""
    records = []
    for index, word in enumerate(WORDS[:n]):
        record = {"id": f"q{index}", "domain": "colour", "kind": f"k{index % 2}", "question": f"Is {word} nice?"}
        record |= {"choices": None, "answer": f"GOLD{index}", **changes}
        records.append({key: value for key, value in record.items() if value is not None})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def export_config(tmp_path: Path, model: Path, questions: Path, out: str = "manifest", **changes: Any) -> ExportConfig:
    """A quick export that selects every question: the answers of a random model never agree, and few of them end."""
    defaults: dict[str, Any] = {
        "num_generations": 3,
        "max_new_tokens": 4,
        "temperature": 1.0,
        "set_size": 16,
        "question_filter": "all",
        "keep_truncated": True,
        "quiet": True,
    }
    return ExportConfig(model=str(model), questions=(str(questions),), out=tmp_path / out, **{**defaults, **changes})


def make_manifest(tmp_path: Path, out: str = "manifest", **changes: Any) -> Path:
    """Export on a fresh tiny model; returns the manifest's folder."""
    model = tmp_path / "model"
    if not model.exists():
        save_tiny(model)
    questions = tmp_path / "questions.jsonl"
    if not questions.exists():
        write_questions(questions)
    export(export_config(tmp_path, model, questions, out, **changes))
    return tmp_path / out


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in the folder except the run record."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "run.json"}


@contextlib.contextmanager
def killed_while_sampling(groups: int) -> Iterator[None]:
    """Interrupt the body, as Ctrl-C does, after this many groups of rollouts."""
    sample = neurosig.sampling.sampler.sample

    def killed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, group in enumerate(sample(*args, **kwargs)):
            if number == groups:
                raise KeyboardInterrupt
            yield group

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(neurosig.sampling.sampler, "sample", killed)
        yield


@contextlib.contextmanager
def decoded_windows() -> Iterator[list[Any]]:
    """Record the windows of questions that the body decodes."""
    decode, windows = neurosig.sampling.sampler._decode_window, []

    def recorded(*args: Any) -> Any:
        windows.append(args)
        return decode(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurosig.sampling.sampler, "_decode_window", recorded)
        yield windows


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Interrupt training, as Ctrl-C does, between the student's and the teacher's update of this step."""
    from distill.teacher import Teacher

    update = Teacher.update
    calls: list[int] = []

    def interrupted(self: Teacher) -> None:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "update", interrupted)
        yield
