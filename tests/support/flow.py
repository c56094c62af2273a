"""The commands on a tiny model, for the end-to-end tests."""

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
from tests.support.tiny import Arch, tiny_model, tiny_tokenizer

WORDS = ("red", "blue", "green", "amber", "pink", "grey", "white", "black", "teal", "plum", "rust", "sand")


def save_tiny(folder: Path, arch: Arch = "qwen3", seed: int = 0) -> Path:
    """A tiny model folder that every command can load."""
    tiny_model(arch, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_questions(path: Path, n: int = 8, **changes: Any) -> Path:
    """``n`` questions; ``changes`` replaces fields of every record, ``None`` removes them."""
    records = []
    for index, word in enumerate(WORDS[:n]):
        record = {"id": f"q{index}", "domain": "colour", "kind": f"k{index % 2}", "question": f"Is {word} nice?"}
        record |= {"choices": None, "answer": f"GOLD{index}", **changes}
        records.append({key: value for key, value in record.items() if value is not None})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def export_config(tmp_path: Path, model: Path, questions: Path, out: str = "manifest", **changes: Any) -> ExportConfig:
    """A quick export: one-token answers of a random model, so every question is kept and none agrees."""
    defaults: dict[str, Any] = {
        "num_generations": 3,
        "max_new_tokens": 4,
        "temperature": 1.0,
        "set_size": 16,
        "clean_filter": "all",
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
    """Name -> bytes of every file of a folder but the run record."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "run.json"}


@contextlib.contextmanager
def killed_while_sampling(groups: int) -> Iterator[None]:
    """The body is interrupted once so many groups of rollouts were yielded, as by Ctrl-C."""
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
    """The windows of questions that are decoded in the body."""
    decode, windows = neurosig.sampling.sampler._decode_window, []

    def counted(*args: Any) -> Any:
        windows.append(args)
        return decode(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurosig.sampling.sampler, "_decode_window", counted)
        yield windows


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C in the middle of this training step: the student has moved, the teacher has not."""
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
