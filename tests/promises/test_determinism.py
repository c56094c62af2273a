"""Batches and threads change no vote; the network changes nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import load_file

import distill.compare
import distill.evaluate
import distill.train
import neurosig.export
from neurosig.manifest import read_manifest
from tests.support.flow import export_config, file_bytes, save_tiny, write_questions
from tests.support.runs import evaluate_config, train_config

TOLERANCE = 1e-4
"""Of mean log-probabilities (nats) and contributions (relative): float32 sums round differently per batch shape."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    write_questions(folder / "questions.jsonl")
    return folder


def exported(world: Path, out: str, **changes: Any) -> Path:
    folder = world / out
    neurosig.export.main(export_config(world, world / "model", world / "questions.jsonl", out, **changes))
    return folder


def floats(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    names = ("mean_logprob", "mean_entropy", "mean_self_certainty")
    signals = load_file(folder / "signals.safetensors")
    return {name: np.array([line[name] for line in lines]) for name in names} | {
        name: signals[name].astype(np.float64) for name in ("contributions", "hidden_states")
    }


def decisions(folder: Path) -> list[Any]:
    """All fields that are not floats: texts, tokens, answers, votes, selection, contexts."""
    manifest = read_manifest(folder)
    rollouts = [(rollout.text, rollout.completion_ids, rollout.finish_reason) for rollout in manifest.rollouts.values()]
    rows = [
        (
            row.question_id,
            row.answers,
            row.vote,
            row.pseudo_label,
            row.selected,
            row.reason,
            [c.question_id for c in row.context],
        )
        for row in manifest.rows
    ]
    return [*rollouts, *rows]


def test_batches_and_threads_change_no_vote(world: Path) -> None:
    """Export at 1, 8 and 64 rows per batch, with 1 or 2 threads: the same tokens, votes, neurons and contexts."""
    reference = exported(world, "reference", batch_rows=64, batch_tokens=4096)
    threads = torch.get_num_threads()
    for rows, tokens, n_threads in ((1, 64, 1), (8, 512, 1), (64, 4096, 2)):
        torch.set_num_threads(n_threads)
        try:
            other = exported(world, f"rows{rows}-threads{n_threads}", batch_rows=rows, batch_tokens=tokens)
        finally:
            torch.set_num_threads(threads)
        assert decisions(other) == decisions(reference)
        ids, other_ids = (load_file(folder / "signals.safetensors")["neuron_ids"] for folder in (reference, other))
        assert np.array_equal(ids, other_ids)
        for name, values in floats(other).items():
            expected = floats(reference)[name]
            half = name in ("contributions", "hidden_states")  # stored in float16, which may round to either side
            np.testing.assert_allclose(values, expected, rtol=1e-3 if half else TOLERANCE, atol=1e-3 if half else 1e-6)


def test_evaluations_of_other_batches_have_the_same_answers(world: Path) -> None:
    tables = []
    for rows in (4, 8, 64):
        config = evaluate_config(world, f"eval{rows}", batch_rows=rows)
        distill.evaluate.main(config)
        tables.append(pyarrow.parquet.read_table(config.out / "results.parquet").to_pylist())
    for table in tables[1:]:
        for row, expected in zip(table, tables[0], strict=True):
            for name, value in expected.items():
                if isinstance(value, float):
                    assert row[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6)
                else:
                    assert row[name] == value


def test_the_same_call_gives_the_same_bytes(world: Path) -> None:
    assert file_bytes(exported(world, "once")) == file_bytes(exported(world, "twice"))


def test_nothing_contacts_the_network(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, from export to comparison, with all network calls blocked."""
    tried: list[object] = []

    def blocked(*args: object, **kwargs: object) -> object:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, blocked)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, blocked)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the commands must not need it
    folder = exported(world, "offline")
    distill.train.main(train_config(world, folder, "offline-run", steps=1))
    for out, adapter in (("offline-base", None), ("offline-eval", world / "offline-run" / "adapter")):
        distill.evaluate.main(evaluate_config(world, out, adapter=adapter))
    distill.compare.main(
        distill.compare.CompareConfig(
            base=world / "offline-base", trained=world / "offline-eval", out=world / "offline-report", resamples=100
        )
    )
    assert (world / "offline-report" / "table.md").is_file()
    assert not tried
