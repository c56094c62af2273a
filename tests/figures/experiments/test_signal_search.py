"""The signal search end to end on tiny exports: what chooses does not confirm, and every variant is judged unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figures.experiments.search_features import POSITIONS, READINGS, features_of
from figures.experiments.search_plan import DEFAULT, TASKS, VARIANTS, Task, Variant
from figures.experiments.signal_search import ALL_TASKS, SearchConfig, draw, main, search
from neurosig.export import ExportConfig
from neurosig.export import main as export
from neurosig.exported import Exported
from neurosig.runtime.errors import UserError
from tests.support.exports import K, N, write_lines, write_world
from tests.support.flow import export_config

FEW = (
    DEFAULT,
    Variant("statement"),
    Variant("answer_words", "contrast"),
    Variant("prompt_end", values="layer_z"),
    Variant("0:3", values="signed_z"),
    Variant("hidden", "gold", role="control"),
)
PLAN = (
    Task("search", ("one",), "one", "unseen kinds"),
    Task("search", ("one",), "two", "other domain"),
    Task("confirmation", ("two",), "three", "unseen questions"),
    Task("confirmation", ("one", "two"), "three", "other domain"),
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exports of one tiny model, over different questions of two kinds; each beside its world."""
    folder = tmp_path_factory.mktemp("exports")
    for index, name in enumerate(("one", "two", "three")):
        (folder / f"world-{name}").mkdir()
        world = write_world(folder / f"world-{name}", N * index)
        lines = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
        write_lines(world / "questions.jsonl", [line | {"kind": f"k{k % 2}"} for k, line in enumerate(lines)])
        export(exported_as(folder, name, name))
    return folder


def exported_as(folder: Path, world: str, out: str, **options: Any) -> ExportConfig:
    files = {"rollouts": folder / f"world-{world}" / "rollouts.jsonl", "num_generations": K}
    where = folder / f"world-{world}" / "model", folder / f"world-{world}" / "questions.jsonl"
    return export_config(folder, *where, out, **files, **options)


def test_variants_are_chosen_on_some_sets_and_confirmed_on_others(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(exports=exports, out=tmp_path, resamples=100, permutations=2, quiet=True)
    table = search(config, FEW, PLAN)
    found, confirmed = (table[table["stage"] == stage] for stage in ("search", "confirmation"))
    assert set(found["task"]) == {"one", "one to two", ALL_TASKS}
    assert set(confirmed["task"]) == {"two to three", "one + two to three", ALL_TASKS}
    assert {variant.name for variant in FEW} <= set(found["variant"])
    means = found[(found["task"] == ALL_TASKS) & (found["event"] == "majority is right") & (found["role"] == "tried")]
    best = means.groupby("variant")["auroc"].mean().sort_values(ascending=False).index[:3]
    assert set(confirmed.loc[confirmed["role"] == "tried", "variant"]) == set(best)
    for event in ("majority is right", "rollout is right"):
        for grading in ("strict", "lenient"):
            own = found[(found["event"] == event) & (found["grading"] == grading) & (found["task"] == "one")]
            assert own.set_index("variant").loc["vote share", "auroc"] > 0.7  # known by construction
    for base in ("over_vote", "over_default"):
        tried = table[(table["role"] == "tried") & table[f"{base}_p"].notna()]
        assert len(tried) and (tried[f"{base}_p_holm"] >= tried[f"{base}_p"]).all()
    one = confirmed[(confirmed["variant"] == best[0]) & (confirmed["task"] == "two to three")].set_index("event")
    default = confirmed[(confirmed["role"] == "default") & (confirmed["task"] == "two to three")].set_index("event")
    difference = one["auroc"].to_numpy() - default["auroc"].to_numpy()
    np.testing.assert_allclose(one["over_default"].to_numpy(), difference, atol=1e-6)
    printed = capsys.readouterr().out
    assert "Search: 4 variants on 2 tasks." in printed and "By this rule: " in printed
    names = {"signal_search.csv", "signal_search.pdf", "signal_search.png"}
    assert {path.name for path in draw(tmp_path, tmp_path / "out")} == names


def test_the_plan_confirms_on_sets_that_choose_nothing() -> None:
    judged = {stage: {task.judged for task in TASKS if task.stage == stage} for stage in ("search", "confirmation")}
    assert not judged["search"] & judged["confirmation"]
    assert {name.split("-")[0] for task in TASKS for name in task.fitted} == {"geography", "language", "chemistry"}
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert {variant.positions for variant in VARIANTS} == {*POSITIONS, "hidden"}


def test_readings_are_those_of_an_export(exports: Path, tmp_path: Path) -> None:
    """The same neurons with the same values, at the positions of the export's option."""
    exported = Exported(exports / "one")
    features = features_of(exported, tmp_path, quiet=True)
    for positions in ("answer_words", "prompt_end"):
        export(exported_as(exports, "one", f"one-{positions}", positions=positions, set_size=0.0217))
        own = Exported(exports / f"one-{positions}").signals
        column = READINGS.index(positions)
        order = np.argsort(features.ids[:, column], axis=1)
        assert np.array_equal(np.take_along_axis(features.ids[:, column], order, axis=1), own.neuron_ids.numpy())
        values = np.take_along_axis(features.values[:, column], order, axis=1).astype(np.float32)
        np.testing.assert_allclose(values, own.contributions.float().numpy(), rtol=2e-3, atol=1e-4)


def test_a_missing_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"geography-train: no finished export"):
        main(SearchConfig(exports=tmp_path, out=tmp_path / "out", quiet=True))
