"""A results folder drawn from by several tests, and the figures that are saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import figures.style
from figures.draw import clusters, gap_gain, hallucination_score, overview, reliability, speed, training_curves
from neurosig.export import main as export
from tests.support.exports import K, write_lines, write_world
from tests.support.flow import export_config

STEPS = 7


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder: an export with known rollouts, half of it selected, evaluations and a training log by hand."""
    folder = write_world(tmp_path_factory.mktemp("results"))
    lines = (folder / "questions.jsonl").read_text().splitlines()
    kinds = [{**json.loads(line), "kind": f"kind_{index % 2}"} for index, line in enumerate(lines)]
    questions = write_lines(folder / "questions.jsonl", kinds)
    files = {"rollouts": folder / "rollouts.jsonl", "num_generations": K, "question_filter": "neuron"}
    export(export_config(folder, folder / "model", questions, **files))
    rng = np.random.default_rng(0)
    for method in ("nopsd", "base", "control"):
        place = folder / "eval" / method
        place.mkdir(parents=True)
        rows = {"question_id": [f"q{i}" for i in range(30)], "domain": ["made up"] * 20 + ["shape"] * 10, "k": 4}
        rows |= {"votes": rng.integers(1, 5, 30), "n_tied": np.ones(30, int), "n_tied_right": rng.integers(0, 2, 30)}
        pd.DataFrame(rows).to_parquet(place / "results.parquet")
        (place / "summary.json").write_text(json.dumps({"config": {"temperature": 0.8, "seed": 3}}))
    (folder / "nopsd").mkdir()
    (folder / "nopsd" / "train.json").write_text(
        json.dumps({"config": {"questions_per_step": 8, "num_generations": 2, "seed": 5}})
    )
    names = ("divergence", "student_entropy", "teacher_entropy", "entropy_gap", "mean_length", "grad_norm")
    log = [
        {"step": step, "rollouts_in_loss": 16.0, **dict(zip(names, rng.uniform(0, 1, len(names)), strict=True))}
        for step in range(1, STEPS + 1)
    ]
    write_lines(folder / "nopsd" / "metrics.jsonl", log)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = figures.style.save_figure

    def seen(figure: Figure, folder: Path, name: str, numbers: str) -> list[Path]:
        saved.append(figure)
        return save(figure, folder, name, numbers)

    for module in (
        figures.style,
        clusters,
        gap_gain,
        hallucination_score,
        overview,
        reliability,
        speed,
        training_curves,
    ):
        monkeypatch.setattr(module, "save_figure", seen)
    return saved
