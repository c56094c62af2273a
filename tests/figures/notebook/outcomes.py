"""What the notebooks 01 to 03 must have found in a small run; run in a cell after their last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def neuron_signals(seen: Mapping[str, Any]) -> None:
    parts, export, overview = seen["parts"], seen["export"], seen["overview"]
    assert abs(parts["effect"].sum() - parts.attrs["logit"]) < 1e-3
    paris = seen["likeliest"].set_index("token").loc[" Paris"]
    assert paris["after"] < paris["before"] / 2
    read = seen["values"][0, parts.attrs["position"], seen["neuron"]]
    torch.testing.assert_close(float(read), seen["writers"]["value"][0], rtol=1e-4, atol=1e-4)
    activity = seen["activity"].values
    assert activity.shape == (export.tracer.sites.n_layers, len(seen["activity"].tokens)) and (activity > 0).all()
    kinds = seen["kinds"]
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
    assert "least_sure" in rows and "least_sure" in seen["again"].scores
    assert all(auroc.low <= auroc.estimate <= auroc.high for auroc in rows.values())
    assert len(seen["chances"]) == len(seen["other_run"]) and ((seen["chances"] > 0) & (seen["chances"] < 1)).all()
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
