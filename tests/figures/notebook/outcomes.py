"""What the notebooks must have found in a small run; run in a cell after their last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

import neurosig


def neuron_signals(seen: Mapping[str, Any]) -> None:
    probe, found = seen["probe"], neurosig.compare(seen["run_base"], seen["run_trained"])
    assert probe.auroc > 0.8 and len(probe.neurons) and probe.classes_.tolist() == ["right", "wrong"]
    right, wrong = neurosig.load_probe(seen["saved"]).score(seen["other_run"])
    assert right < wrong  # of a country that the probe has not seen
    assert found.models[0] != found.models[1] and (found.jaccard < 1).any() and (found.table["change"] != 0).any()
    parts, export, overview = seen["parts"], seen["export"], seen["overview"]
    assert abs(parts["effect"].sum() - parts.attrs["logit"]) < 1e-3
    paris = seen["likeliest"].set_index("token").loc[" Paris"]
    assert paris["after"] < paris["before"] / 2
    read = seen["values"][0, parts.attrs["position"], seen["neuron"]]
    torch.testing.assert_close(float(read), seen["writers"]["value"][0], rtol=1e-4, atol=1e-4)
    activity = seen["activity"].values
    assert activity.shape == (export.tracer.sites.n_layers, len(seen["activity"].tokens)) and (activity > 0).all()
    kinds = seen["question_kinds"]
    same = torch.tensor([[a == b for b in kinds] for a in kinds])
    between = torch.from_numpy(seen["similarity"])
    assert between[same & ~torch.eye(len(kinds), dtype=torch.bool)].mean() > between[~same].mean() + 0.02
    assert overview["neuron_agreement"].corr(overview["share"]) > 0
    assert all(view.sides[0].verdict in ("right", "majority") for view in seen["comparisons"].views.values())


def hallucination_neurons(seen: Mapping[str, Any]) -> None:
    free, doses = seen["free"], seen["doses"]
    rows = {row.signal.name: row.auroc for row in seen["rows"]}
    assert seen["probe"].auroc > 0.5 and free.auroc > 0.5
    assert (free.neurons["weight"] != 0).sum() == len(free.fitted_.columns) > 0
    assert rows["vote_share"].estimate > 0.5 and rows["vote_share"].estimate > rows["random"].low
    assert "faint" in rows and "faint" in seen["again"].scores
    assert all(auroc.low <= auroc.estimate <= auroc.high for auroc in rows.values())
    chances, transfer, wrong = seen["chances"], seen["transfer"], (seen["truth"] == "wrong").to_numpy()
    assert ((chances > 0) & (chances < 1)).all() and abs(chances.mean() - wrong.mean()) < 0.1
    assert chances[wrong].mean() > 0.6 > 0.4 > chances[~wrong].mean()  # on questions that it has not seen
    language = transfer["fitted on language"]
    assert language["language"] == language.max() and language["chemistry"] > 0.7 > language["geography"]
    silenced = doses[doses["factor"] == 0].set_index("group")["change"]
    assert silenced["strongest"] > 0  # silencing the largest contributors costs likelihood


def reasoning_patterns(seen: Mapping[str, Any]) -> None:
    found, export, labels = seen["found"], seen["export"], seen["labels"]
    assert len(labels) == len(export.represented) and set(labels) == set(range(len(found.clusters)))
    assert (found.found.markers["lift"] > 1).all() and (found.found.markers["q"] <= 0.05).all()
    comparison = seen["known"].found.comparison.set_index("clustering")
    assert comparison["purity"]["neurons"] > comparison["largest_kind"]["neurons"]
    assert comparison["ari_kinds"]["neurons"] > comparison["ari_kinds"]["tokens"]
    shown = seen["organism_browser"].views.values()
    assert all(neighbour.kind == view.kind for view in shown for neighbour in view.neighbours if neighbour.used)
    nearest = [(view, view.neighbours[0]) for view in seen["browser"].views.values() if view.neighbours]
    assert nearest and all(neighbour.similarity > view.typical for view, neighbour in nearest)


def entropy_gap(seen: Mapping[str, Any]) -> None:
    effects, changed = seen["effects"], seen["changed"]
    assert set(effects["context"]) == set(seen["policies"]) and effects.groupby("context").size().nunique() == 1
    assert set(effects["outcome_strict"]) <= {"fix", "break", "right", "wrong"}
    assert changed["student"].ne(changed["teacher"]).all()  # a fix or a break is another answer
    assert effects["belief_shift"].between(0, 0.6932).all()  # a Jensen-Shannon divergence is at most ln 2
    gaps = effects.groupby("context")["entropy_gap"].mean()
    assert gaps["nearest"] > gaps["random"] > 0


def calibration(seen: Mapping[str, Any]) -> None:
    summary, questions = seen["summary"], seen["questions"]
    base = summary[summary["method"] == "base"].set_index("scope")
    assert {"in-domain"} <= set(summary["scope"]) and len(summary) == len(questions.groupby(["scope", "method"]))
    assert (summary["smooth_ece"] <= summary["ece"] + 1e-9).all()  # never exceeds the exact-support ECE
    assert summary["ece"].between(0, 1).all() and (summary["ece_low"] <= summary["ece_high"]).all()
    assert summary["ece_floor"].between(0, 1, inclusive="neither").all()
    assert ((summary["confidence"] - summary["maj_at_k"] - summary["signed_gap"]).abs() < 1e-9).all()
    assert (summary["ece"] >= summary["signed_gap"].abs() - 1e-9).all()  # a mean of absolute gaps
    question_ids = set(questions["question_id"])
    assert all(set(own) == question_ids for _, own in questions.groupby("method")["question_id"])
    sharpened = summary[summary["temperature"] < base["temperature"].min()]
    assert len(sharpened) and all(row.confidence > base["confidence"][row.scope] for row in sharpened.itertuples())


def the_whole_method(seen: Mapping[str, Any]) -> None:
    folder, run, steps, found = seen["folder"], seen["run"], seen["steps"], seen["found"]
    base, trained = (pd.read_parquet(folder / "eval" / name / "results.parquet") for name in ("base", "nopsd"))
    assert run.selected and all(run.row(name).context for name in run.selected)
    assert "answer" not in run.manifest.rows[0].model_dump()  # no gold label in the manifest
    assert list(steps["step"]) == [1, 2, 3, 4] and steps["loss"].notna().all()
    assert list(base["question_id"]) == list(trained["question_id"]) and len(base) == 8
    assert set(run.questions.index).isdisjoint(base["question_id"])  # never seen by the export
    assert base["answers"].map(list).tolist() != trained["answers"].map(list).tolist()
    assert (folder / "report" / "table.md").read_text().count("| in-domain |") == 6
    assert found.n_texts == found.n_groups == len(seen["texts"]) and found.models[0] != found.models[1]
    table = found.to_frame()
    assert table["change"].abs().max() > 0 and table["q"].is_monotonic_increasing
