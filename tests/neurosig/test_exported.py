"""The reader of finished exports: what it joins, what it refuses, and what it does not load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurosig.exported import Exported
from neurosig.manifest import HEADER, SIGNALS
from neurosig.runtime.errors import UserError
from neurosig.selection.neuron_table import COLUMNS
from tests.support.commands import loaded_after
from tests.support.flow import make_manifest
from tests.support.manifests import edit_row, rehash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_manifest(tmp_path)


def rewrite_signals(folder: Path, rows: int | None = None, largest: int | None = None) -> None:
    """Keep only ``rows`` rows of the signals file, or let it name the neuron ``largest``."""
    tensors = {name: tensor[:rows].clone() for name, tensor in load_file(folder / SIGNALS).items()}
    if largest is not None:
        tensors["neuron_ids"][0, -1] = largest
    save_file(tensors, folder / SIGNALS, metadata={"sites": json.dumps({"n_layers": 2, "d_mlp": 64})})
    rehash(folder)


def test_rows_rollouts_and_signals_belong_together(folder: Path) -> None:
    exported = Exported(folder)
    flat = [(name, rollout.rollout_id) for name, group in exported.rollouts.items() for rollout in group]
    assert flat == list(exported.place) and list(exported.place.values()) == list(
        range(len(exported.signals.neuron_ids))
    )
    assert list(exported.rows) == list(exported.rollouts) == [row.question_id for row in exported.manifest.rows]
    assert list(exported.neurons.columns) == ["layer", "index", *COLUMNS[3:8]]
    for name, chosen in exported.representatives.items():
        row = exported.rows[name]
        scores = [float(exported.signals.probe_scores[exported.place[name, k]]) for k in range(len(row.answers))]
        majority = [k for k, answer in enumerate(row.answers) if answer == row.pseudo_label]
        assert chosen in majority and scores[chosen] == min(scores[k] for k in majority)


def test_a_question_that_was_too_long_has_no_rollouts(folder: Path) -> None:
    header = json.loads((folder / HEADER).read_text())
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    (folder / "rollouts.jsonl").write_text("".join(line + "\n" for line in lines[3:]))
    header["files"]["rollouts.jsonl"]["rows"] -= 3
    (folder / HEADER).write_text(json.dumps(header))
    empty = {"raw_answers": [], "answers": [], "vote": None, "pseudo_label": None, "scores": {}, "context": []}
    for line in range(1, 9):
        edit_row(folder, line, lambda row: row.update(context=[]))
    edit_row(folder, 1, lambda row: row.update(**empty, selected=False, reason="too_long"))
    exported = Exported(folder)
    assert "q0" not in exported.rows and "q0" not in exported.rollouts
    with pytest.raises(UserError, match=r"24 rows for 21 rollouts; export again"):
        _ = exported.signals


def test_a_signals_file_of_another_export_is_refused(folder: Path) -> None:
    rewrite_signals(folder, rows=-1)
    with pytest.raises(UserError, match="23 rows for 24 rollouts; export again"):
        _ = Exported(folder).signals
    rewrite_signals(folder, largest=128)
    with pytest.raises(UserError, match="active sets name neuron 128 of 128"):
        _ = Exported(folder).signals


def test_reading_loads_no_model_library(folder: Path) -> None:
    statement = f"from neurosig.exported import Exported; Exported({str(folder)!r}).representatives"
    assert loaded_after(statement, "nnsight", "transformers", "sklearn", "pandas") == set()
    assert torch.equal(Exported(folder).signals.neuron_ids, load_file(folder / SIGNALS)["neuron_ids"])
