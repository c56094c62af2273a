"""Learning rate and steps of each method are chosen on development questions, by the same number of tries."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from figures.grid.__main__ import main
from figures.grid.cells import Try, trained_cells, tried_cells, tried_name, tries
from figures.grid.config import METHODS, PRESETS, GridConfig
from figures.grid.tuning import TUNING, choose
from neurosig.runtime.errors import UserError

SOURCES = {"red": "red.jsonl", "blue": "blue.jsonl"}
DEV = {"red": "red-dev.jsonl", "blue": "blue-dev.jsonl"}


def config_in(folder: Path, **changes: Any) -> GridConfig:
    options: dict[str, Any] = {
        "methods": ("probe", "ttrl"),
        "learning_rates": (1.0, 0.5),
        "train": {"steps": 4, "learning_rate": 1e-3},
        "methods_train": {"ttrl": {"learning_rate": 2e-4}},
    }
    return GridConfig(out=folder, model="tiny", **{"sources": ("red", "blue"), **options, **changes})


def judged(config: GridConfig, method: str, source: str, one: Try, value: float) -> None:
    folder = config.out / "tries" / tried_name(method, source, one.learning_rate) / "eval" / f"step-{one.at:06d}"
    folder.mkdir(parents=True)
    block = {"n": 9, "avg_at_k": {"estimate": value}, "avg_at_k_lenient": {"estimate": value}}
    (folder / "summary.json").write_text(json.dumps({"domains": {source: block}}))


def test_every_method_has_as_many_tries_in_every_source(tmp_path: Path) -> None:
    config = GridConfig(out=tmp_path, **PRESETS["cpu"])  # type: ignore[arg-type]
    rates = config.learning_rates
    assert {method: len(tries(config, method)) for method in METHODS} == dict.fromkeys(METHODS, 2 * len(rates))
    sources = {name: name for name in config.sources}
    cells = tried_cells(config, sources, {name: f"{name}:dev" for name in sources})
    assert set(Counter(cell.name.partition("--")[0] for cell in cells).values()) == {len(rates) * len(sources)}
    for cell in cells:
        *_, train, half, whole = cell.commands
        source = cell.name.split("--")[1]
        assert [one.module for one in (train, half, whole)] == ["distill.train", *["distill.evaluate"] * 2]
        assert half.options["questions"] == whole.options["questions"] == [f"{source}:dev"]
        at = train.options["steps"] // 2
        assert (
            half.options["adapter"] == train.out / "checkpoints" / f"step-{at:06d}"
            and train.options["save_steps"] == at
        )
        assert whole.options["adapter"] == train.out / "adapter"


def test_the_published_methods_sample_for_themselves_and_train_by_their_own_loss(tmp_path: Path) -> None:
    config = config_in(tmp_path, methods=("nopsd", "probe-kind"), learning_rates=())
    chosen = choose(config, SOURCES)
    published, kind = (
        trained_cells(config, {"red": "red.jsonl"}, {}, {name: chosen[name]})[0] for name in config.methods
    )
    assert [command.module for command in published.commands] == ["neurosig.export", "distill.train"]
    assert published.commands[0].options["preset"] == published.commands[1].options["preset"] == "published"
    assert "reuse" not in published.commands[0].options
    assert [command.out.name for command in kind.commands[:2]] == ["probe", "probe-kind"]
    assert kind.commands[1].options["reuse"] == kind.commands[0].out


def test_the_best_mean_over_the_sources_is_chosen_and_all_tries_are_kept(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    values = {"probe": {(5e-4, 2): (0.3, 0.5), (5e-4, 4): (0.9, 0.1), (1e-3, 2): (0.2, 0.2), (1e-3, 4): (0.3, 0.4)}}
    values["ttrl"] = {(1e-4, 2): (0.4, 0.4), (1e-4, 4): (0.4, 0.4), (2e-4, 2): (0.9,), (2e-4, 4): (0.1, 0.1)}
    for method, found in values.items():
        for (rate, at), scores in found.items():
            for source, score in zip(SOURCES, scores, strict=False):
                judged(config, method, source, Try(rate, 4, at), score)
    chosen = choose(config, SOURCES)
    assert chosen == {"probe": Try(5e-4, 4, 4), "ttrl": Try(1e-4, 4, 2)}
    with (tmp_path / TUNING).open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 15
    kept = {(row["method"], float(row["learning_rate"]), int(row["at"])) for row in rows if row["chosen"] == "1"}
    assert kept == {("probe", 5e-4, 4), ("ttrl", 1e-4, 2)}
    cells = trained_cells(config, SOURCES, {"red": "red-test.jsonl"}, chosen)
    judged_with = {cell.name: cell.commands[-1].options["adapter"] for cell in cells}
    assert judged_with["probe--red--seed0"] == tmp_path / "tries" / "probe--red--lr0.0005" / "train" / "adapter"
    kept = tmp_path / "tries" / "ttrl--blue--lr0.0001" / "train"
    assert judged_with["ttrl--blue--seed0"] == kept / "checkpoints" / "step-000002"


def test_the_first_seed_is_trained_once(tmp_path: Path) -> None:
    config = config_in(tmp_path, methods=("probe",), seeds=(3,), more_seeds=(4,), more_seeds_for=("probe",))
    tried = {cell.name: cell for cell in tried_cells(config, SOURCES, DEV)}
    cells = trained_cells(config, SOURCES, {"red": "red-test.jsonl"}, {"probe": Try(5e-4, 4, 4)})
    first, other = (next(c for c in cells if c.name == f"probe--red--seed{seed}") for seed in (3, 4))
    assert first.commands[:2] == tried[tried_name("probe", "red", 5e-4)].commands[:2]
    assert other.commands[1].out == tmp_path / "cells" / "probe--red--seed4" / "train"
    config = config_in(tmp_path, methods=("probe",), tuning_sources=("red",))
    cells = trained_cells(config, SOURCES, {"red": "red-test.jsonl"}, {"probe": Try(5e-4, 4, 4)})
    assert [cell.commands[1].out.parts[-3] for cell in cells] == ["tries", "cells"]


def test_sources_without_development_questions_are_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path / "out", sources=("red=red.jsonl",))
    with pytest.raises(UserError, match="no development questions of red; give --dev red=QUESTIONS"):
        main(config)
    assert not config.out.exists()
