"""The measures of scaled models, the changes between them, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import neurosig.intervene.cells
from figures.draw.dose_response import draw
from neurosig.intervene.__main__ import InterveneConfig, main
from neurosig.intervene.cells import _planned, detectable
from neurosig.intervene.dose_response import (
    MEASURES,
    Cell,
    _interval,
    broken,
    dose_response,
    measure,
    milestones,
    repetition,
)
from neurosig.intervene.interventions import (
    NeuronSet,
    completion_nll,
)
from neurosig.manifest import read_manifest, write_manifest
from neurosig.questions.load import Question
from neurosig.runtime.errors import UserError
from neurosig.sampling.rollouts import Rollout
from neurosig.statistics.metrics import paired_mean_interval
from tests.support.flow import make_manifest, save_tiny, write_questions


def rollout(text: str, ids: tuple[int, ...] = (5, 6), reason: Any = "stop") -> Rollout:
    return Rollout("q", 0, text, ids, reason, mean_entropy=0.5)


def test_measures_of_one_question_by_hand() -> None:
    question = Question("q", "geography", "What is the capital of France?", answer="Paris")
    group = [
        rollout("The capital of France is Paris."),
        rollout("The capital of France is Lyon.", (5, 6, 7, 8)),
        rollout("The capital of France is Paris.", (5, 5, 5, 5), "length"),
        rollout("I'm sorry, but I cannot say."),
    ]
    assert measure(question, group, 1.25) == {
        "avg_at_k": 0.5,
        "maj_at_k": 1.0,
        "agreement": 0.5,
        "unparsed": 0.25,
        "refusal": 0.25,
        "no_answer": 0.25,
        "nll": 1.25,
        "entropy": 0.5,
        "length": 3.0,
        "truncated": 0.25,
        "repetition": 0.125,
    }
    tied = measure(question, [group[0], group[1]], 0.0)
    assert (tied["maj_at_k"], tied["agreement"]) == (0.5, 0.5)


def test_repetition_counts_trigrams_that_occurred_before() -> None:
    assert repetition((1, 2)) == repetition((1, 2, 3, 4)) == 0
    assert repetition((7, 7, 7, 7, 7)) == pytest.approx(2 / 3)
    assert repetition((1, 2, 3, 1, 2, 3)) == 0.25


def cell(neurons: NeuronSet | None, factor: float, **values: list[float]) -> Cell:
    zero = np.zeros(4)
    return Cell(neurons, factor, {name: np.array(values[name]) if name in values else zero for name in MEASURES})


def test_changes_and_differences_are_paired() -> None:
    located = NeuronSet("located", 0, (1,))
    cells = [
        cell(None, 1.0, avg_at_k=[1.0, 0.0, 0.5, 0.5]),
        cell(located, 4.0, avg_at_k=[0.75, -0.25, 0.25, 0.25]),
        cell(NeuronSet("layer", 0, (2,)), 4.0, avg_at_k=[1.0, 0.0, 0.5, 0.5]),
        cell(NeuronSet("layer", 1, (3,)), 4.0, avg_at_k=[0.9, -0.1, 0.4, 0.4]),
    ]
    rows = {(row["group"], row["factor"]): row for row in dose_response(cells, seed=0) if row["measure"] == "avg_at_k"}
    assert set(rows) == {("located", 1.0), ("located", 4.0), ("layer", 1.0), ("layer", 4.0)}
    assert "change" not in rows["located", 1.0] and rows["layer", 1.0]["value"] == 0.5
    change = rows["located", 4.0]
    assert [change[name] for name in ("change", "change_low", "change_high")] == pytest.approx([-0.25] * 3)
    assert "difference" not in change
    control = rows["layer", 4.0]
    assert (control["draws"], control["n"]) == (2, 4)
    assert control["value"] == pytest.approx(0.45) and control["change"] == pytest.approx(-0.05)
    assert control["difference"] == pytest.approx(-0.2)
    # every question differs by the same, so the interval is that of the draws
    assert (control["difference_low"], control["difference_high"]) == pytest.approx((-0.25, -0.15))
    with pytest.raises(UserError, match="no cell of the unscaled model"):
        dose_response(cells[1:], seed=0)


def test_intervals_resample_draws_and_questions() -> None:
    """Against a loop over resamples, and for one draw against the paired bootstrap, up to their own noise."""
    delta = np.random.default_rng(3).normal(0.1, 0.5, (3, 30)) + np.array([[0.0], [0.3], [-0.2]])
    rng = np.random.default_rng(1)
    loop = [delta[np.ix_(rng.integers(3, size=3), rng.integers(30, size=30))].mean() for _ in range(10_000)]
    one = paired_mean_interval(delta[0], np.zeros(30), seed=1)
    for deltas, expected in ((delta, np.quantile(loop, [0.025, 0.975])), (delta[:1], (one.low, one.high))):
        found = _interval("change", deltas, 0)
        assert found["change"] == pytest.approx(deltas.mean())
        assert (found["change_low"], found["change_high"]) == pytest.approx(tuple(expected), abs=0.015)


def test_generation_is_broken_by_answers_or_by_perplexity() -> None:
    assert broken(0.5, 0.0) and not broken(0.49, 0.0)
    assert broken(0.0, np.log(10.0)) and not broken(0.0, 2.3) and broken(0.0, float("nan"))


def test_milestones_are_the_nearest_doses() -> None:
    located, control = NeuronSet("located", 0, (1,)), NeuronSet("layer", 0, (2,))
    cells = [cell(None, 1.0, avg_at_k=[1.0, 0.5, 1.0, 0.5])]
    for factor, drop, lost in ((0.0, 0.0, 0.0), (4.0, 0.25, 0.0), (16.0, 0.5, 0.25), (64.0, 0.5, 0.75)):
        right = [one - drop for one in (1.0, 0.5, 1.0, 0.5)]
        cells += [cell(located, factor, avg_at_k=right, no_answer=[lost] * 4), cell(control, factor, avg_at_k=right)]
    cells[-1].values["nll"][:] = 5.0
    assert milestones(dose_response(cells, seed=0)) == [
        "located: accuracy moves from x4, generation breaks from x64 (x0 to x64)",
        "layer: accuracy moves from x4, generation breaks from x64 (x0 to x64)",
    ]
    still = [cell(None, 1.0), cell(located, 4.0)]
    assert milestones(dose_response(still, seed=0)) == [
        "located: accuracy moves at no dose, generation breaks at none (x4 to x4)"
    ]


def test_doses_widen_until_the_located_neurons_break_generation(tmp_path: Path) -> None:
    sets = [NeuronSet("located", 0, (1,)), NeuronSet("layer", 0, (2,))]

    def doses(breaks_at: float, widest: float | None) -> list[float]:
        cells: list[Cell] = []
        options = InterveneConfig(
            manifest=tmp_path, questions=("x",), out=tmp_path, factors=(0.0, 2.0), widest=widest, controls=1
        )
        for neurons, factor in _planned(options, sets, cells):
            lost = 1.0 if neurons is not None and neurons.group == "located" and factor >= breaks_at else 0.0
            cells.append(cell(neurons, factor, no_answer=[lost] * 4))
        assert [one.factor for one in cells[1::2]] == [one.factor for one in cells[2::2]]  # both sets at each
        return [one.factor for one in cells[1::2]]

    assert doses(30.0, 1000.0) == [0.0, 2.0, 8.0, 32.0]
    assert doses(2.0, 1000.0) == [0.0, 2.0] == doses(30.0, None)
    assert doses(1e5, 100.0) == [0.0, 2.0, 8.0, 32.0]
    with pytest.raises(UserError, match="--widest: expected at least the largest factor"):
        doses(1.0, 1.5)


def test_the_stated_power_is_that_of_simulated_runs() -> None:
    rng, n, k = np.random.default_rng(0), 80, 2
    chance = rng.choice([0.1, 0.9], n)
    right = rng.binomial(k, chance) / k
    change = detectable(right, k)
    assert change["same"] < change["correlated"]
    found = 0
    for _ in range(400):
        lower = rng.binomial(k, np.clip(chance - change["same"], 0, 1), n) / k
        delta = lower - rng.binomial(k, chance, n) / k
        found += abs(delta.mean()) > 1.96 * delta.std(ddof=1) / np.sqrt(n)
    assert 0.6 < found / 400 < 0.95
    assert 0 < detectable(np.array([1.0, 0.0, 1.0, 1.0]), 1)["correlated"] < 1


# The command


NEURONS_CSV = "layer,index,weight,active_share\n0,3,0.5,0.5\n0,17,0.25,0.5\n1,5,0.5,0.5\n1,9,-0.5,0.5\n"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real export of a tiny model, with neurons: its probe has nothing to learn from."""
    folder = make_manifest(tmp_path_factory.mktemp("intervene"))
    read = read_manifest(folder)
    header = {name: getattr(read.header, name) for name in ("tool", "model", "tokenizer", "dataset", "sampling")}
    write_manifest(
        folder,
        read.rows,
        read.rollouts.values(),
        signals=(folder / "signals.safetensors").read_bytes(),
        neurons_csv=NEURONS_CSV,
        header=header | {"options": read.header.options, "answers": read.header.answers},
    )
    return folder


def config(manifest: Path, out: Path, **changes: Any) -> InterveneConfig:
    defaults: dict[str, Any] = {
        "questions": (str(manifest.parent / "questions.jsonl"),),
        "factors": (0.0, 4.0),
        "controls": 2,
        "num_generations": 2,
        "max_new_tokens": 4,
        "limit": 5,
        "quiet": True,
    }
    return InterveneConfig(manifest=manifest, out=out, **{**defaults, **changes})


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_every_cell_and_a_table(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(config(manifest, out))
    names = ["located", "layer-0", "layer-1", "activity-0", "activity-1", "strongest"]
    files = {"unscaled.json", *(f"{name}-x{factor}.json" for name in names for factor in (0, 4))}
    assert {path.name for path in (out / "cells").iterdir()} == files
    rows = table(out)
    assert len(rows) == 4 * 3 * len(MEASURES)
    record = json.loads((out / "results.json").read_text())
    assert {name: entry["neurons"] for name, entry in record["sets"].items()} == dict.fromkeys(names, 3)
    assert record["config"]["seed"] == 0 and record["run"]["libraries"]["nnsight"]
    assert len(json.loads((out / "plan.json").read_text())["neurons"]["located"]) == 3
    # the table says what the cells say
    content = {path.stem: json.loads(path.read_text())["measures"] for path in (out / "cells").iterdir()}
    mean = {name: np.mean([values["nll"] for values in cells.values()]) for name, cells in content.items()}
    nll = {(row["group"], row["factor"]): row for row in rows if row["measure"] == "nll"}
    assert float(nll["located", "4"]["value"]) == pytest.approx(mean["located-x4"], abs=1e-4)
    assert float(nll["located", "4"]["change"]) == pytest.approx(mean["located-x4"] - mean["unscaled"], abs=1e-4)
    pooled = (mean["layer-0-x4"] + mean["layer-1-x4"]) / 2
    assert float(nll["layer", "4"]["difference"]) == pytest.approx(mean["located-x4"] - pooled, abs=1e-4)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main(config(manifest, out, resume=True))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_figure_shows_the_table(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run; run `python -m neurosig\.intervene"):
        draw(tmp_path, tmp_path / "figures")
    main(config(manifest, tmp_path / "intervene", controls=1))
    pdf, png, plotted = draw(tmp_path, tmp_path / "figures")
    assert pdf.read_bytes().startswith(b"%PDF") and png.read_bytes().startswith(b"\x89PNG")
    drawn_rows = pd.read_csv(plotted)
    assert set(drawn_rows["group"]) == {"located", "layer", "activity", "strongest"}
    results = {(row["group"], float(row["factor"]), row["measure"]): row for row in table(tmp_path / "intervene")}
    for row in drawn_rows.to_dict("records"):
        source = results[row["group"], row["factor"], row["measure"]]
        value, change, low = (float(source[name] or 0) for name in ("value", "change", "change_low"))
        shown = np.log([row["value"], row["low"]]) if row["measure"] == "nll" else [row["value"], row["low"]]
        assert shown == pytest.approx([value, value - change + low], abs=1e-4)


def test_an_interrupted_run_resumes_cell_by_cell(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(config(manifest, tmp_path / "straight"))
    scored = completion_nll
    calls: list[int] = []

    def killed(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(neurosig.intervene.cells, "completion_nll", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(manifest, tmp_path / "broken"))
    assert len(list((tmp_path / "broken" / "cells").iterdir())) == 4
    with pytest.raises(UserError, match=r"run: factors \(.*\), temperature \(0.8 before, 1.0 now\)"):
        main(config(manifest, tmp_path / "broken", resume=True, factors=(0.0,), temperature=1.0))
    with pytest.raises(UserError, match="holds an earlier run"):
        main(config(manifest, tmp_path / "broken"))
    main(config(manifest, tmp_path / "broken", resume=True))
    assert len(calls) == 5 + 13 - 4
    straight, broken = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*.json")) if path.stem != "results"}
        for name in ("straight", "broken")
    )
    assert straight == broken
    assert table(tmp_path / "straight") == table(tmp_path / "broken")


def test_bad_requests_are_refused(manifest: Path, tmp_path: Path) -> None:
    for changes, problem in (
        ({"factors": (1.0,)}, "--factors: expected a factor other than 1"),
        ({"factors": (0.0, 0.0)}, "--factors: expected each factor once"),
        ({"factors": (float("nan"), 2.0)}, "--factors: expected finite numbers"),
        ({"matching": ("layer", "layer")}, "--matching: expected each kind once"),
        ({"controls": 0}, "--controls: expected at least 1"),
        ({"reference_rollouts": 3}, "--reference-rollouts: expected 1 to --num-generations"),
    ):
        with pytest.raises(UserError, match=problem):
            config(manifest, tmp_path / "run", **changes)
    unlabelled = write_questions(tmp_path / "unlabelled.jsonl", answer=None)
    with pytest.raises(UserError, match=r'question "q0" \(line 1\) has no answer'):
        main(config(manifest, tmp_path / "run", questions=(str(unlabelled),)))
    with pytest.raises(UserError, match="1 question; an interval needs at least 2"):
        main(config(manifest, tmp_path / "run", limit=1))
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match="not the architecture of the manifest's model"):
        main(config(manifest, tmp_path / "run", model=str(other)))
    assert not (tmp_path / "run").exists()


def test_other_weights_of_the_same_architecture_are_allowed_with_a_warning(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny(tmp_path / "trained", seed=1)
    located = tmp_path / "table.csv"
    located.write_text("layer,index,weight\n0,8,1\n1,9,1\n")
    changes: dict[str, Any] = {"factors": (0.0,), "controls": 1, "matching": ("layer",), "table": located}
    main(config(manifest, tmp_path / "run", model=str(other), **changes))
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["neurons"]["located"] == [8, 64 + 9]
    assert "its weights differ from those the neurons were located in" in caplog.text
    assert "5 of 5 questions are among those the neurons were located on" in caplog.text
    assert {row["group"] for row in table(tmp_path / "run")} == {"located", "layer", "strongest"}
