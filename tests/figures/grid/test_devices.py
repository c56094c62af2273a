"""Which GPU the cells of a grid see; the machine of the test needs none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from figures.grid.cells import Cell, Command
from figures.grid.processes import forkserver, run_cells
from tests.support.flow import save_tiny, write_questions

PARSER = """
import os, pathlib, time

def parse(text, question, *args, **options):
    return None

seen = pathlib.Path({folder!r})
(seen / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
until = time.monotonic() + 60
while len(list(seen.iterdir())) < {together} and time.monotonic() < until:  # the cells run at the same time
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("n_devices", "named", "jobs", "options", "expected"),
    [
        (3, None, 2, {}, ["0", "1"]),
        (2, "5,GPU-3f,7", 3, {}, ["5", "5", "GPU-3f"]),
        (2, None, 1, {}, ["all"]),
        (2, None, 2, {"device": "cpu"}, ["all", "all"]),
        (0, None, 2, {}, ["all", "all"]),
    ],
    ids=["a device each", "more jobs than devices", "one job", "an explicit device", "no device"],
)
def test_each_running_cell_sees_one_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_devices: int,
    named: str | None,
    jobs: int,
    options: dict[str, str],
    expected: list[str],
) -> None:
    """As the commands' processes see it, from an answer parser that they import."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    seen, cells = tmp_path / "seen", []
    seen.mkdir()
    module = f"parser_of_{n_devices}_{jobs}_{len(options)}"
    (tmp_path / f"{module}.py").write_text(PARSER.format(folder=str(seen), together=jobs))
    monkeypatch.syspath_prepend(tmp_path)
    model, questions = save_tiny(tmp_path / "model"), write_questions(tmp_path / "questions.jsonl", n=2)
    for number in range(jobs):
        given = {"model": model, "questions": questions, "max_new_tokens": 2, "num_generations": 2, **options}
        given["answer_parser"] = f"{module}:parse"
        out = tmp_path / f"eval{number}"
        cells.append(Cell(f"cell{number}", [Command("distill.evaluate", out, "summary.json", given)]))
    assert run_cells(cells, tmp_path / "cells", forkserver(), jobs=jobs, quiet=True) == []
    assert sorted(path.read_text() for path in seen.iterdir()) == expected
