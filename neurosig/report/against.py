"""The report's section on two exports of the same questions: a model before and after training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from neurosig.exported import Exported
from neurosig.hallucination.probe import contribution_matrix
from neurosig.neurons.config import neuron_name
from neurosig.questions.answers import is_correct
from neurosig.questions.load import Question
from neurosig.report.data import question_level
from neurosig.runtime.errors import UserError
from neurosig.runtime.provenance import differences, explain
from neurosig.statistics.auroc import AnalysisConfig, auroc_interval
from neurosig.statistics.metrics import format_interval, paired_mean_interval

ALIKE = ("neuron_value", "contribution", "active_set", "set_size", "positive_only", "positions")
"""Options of both exports without which their neurons cannot be compared."""


@dataclass(frozen=True, slots=True)
class Against:
    """What changed on the questions that two exports share, as rows of tables.

    Attributes:
        name: The second export's model, or adapter, and folder.
        sentence: What is compared, and how many winners changed.
        answers: Per measure its mean before, after, and the change with its 95% interval paired over questions.
        signals: Per score its AUROC for "the majority is right" in either export; empty without gold answers.
        neurons: Per neuron of the first export's probe, heaviest first, its mean contribution before, after, and the
            change with its interval.
    """

    name: str
    sentence: str
    answers: list[dict[str, str]]
    signals: list[dict[str, str]]
    neurons: list[dict[str, str]]


def against(before: Exported, folder: Path, gold: Mapping[str, Question], analysis: AnalysisConfig) -> Against:
    """Compare an export with another one of the same questions, made by the model after training.

    Raises:
        UserError: The other export cannot be read, shares fewer than two questions, or traced other neurons.
    """
    after = Exported(folder)
    options = [{name: one.manifest.header.options[name] for name in ALIKE} for one in (before, after)]
    sizes = [{"layers": one.signals.n_layers, "neurons per layer": one.signals.d_mlp} for one in (before, after)]
    if pairs := differences(options[0] | sizes[0], options[1] | sizes[1]):
        raise UserError(f"--against {folder}: its neurons are not comparable, these differ: {explain(pairs, 'there')}")
    names = [n for n, row in before.rows.items() if n in after.rows and after.rows[n].text_sha256 == row.text_sha256]
    if len(names) < 2:
        raise UserError(f"--against {folder}: shares {len(names)} questions with the manifest; give one of the same")
    shared = [_restricted(one, names) for one in (before, after)]
    changed = sum(before.rows[name].pseudo_label != after.rows[name].pseudo_label for name in names)
    kept = [{name for name in names if one.rows[name].selected} for one in shared]
    header = after.manifest.header
    adapter = header.model.get("adapter")
    return Against(
        f"{header.model['id']}{f' with adapter {adapter[:12]}' if adapter else ''} ({folder})",
        f"{len(names)} questions are in both exports. The majority answer changed in {changed}; {len(kept[0])} were "
        f"selected before, {len(kept[1])} after, {len(kept[0] & kept[1])} in both.",
        _answers(shared, gold, analysis),
        _signals(shared, gold, analysis),
        _neurons(shared, analysis),
    )


def _restricted(exported: Exported, names: list[str]) -> Exported:
    """The export as if it had these questions alone, in this order."""
    view = copy.copy(exported)
    view.rows = {name: exported.rows[name] for name in names}
    view.rollouts = {name: exported.rollouts[name] for name in names}
    return view


def _row(
    name: str, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], analysis: AnalysisConfig
) -> dict[str, str]:
    change = paired_mean_interval(after, before, seed=analysis.seed, resamples=analysis.resamples)
    interval = format_interval(change.estimate, change.low, change.high, "+.4f")
    return {"": name, "before": f"{before.mean():.4f}", "after": f"{after.mean():.4f}", "change": interval}


def _answers(shared: list[Exported], gold: Mapping[str, Question], analysis: AnalysisConfig) -> list[dict[str, str]]:
    measured: list[dict[str, list[float]]] = []
    for one in shared:
        columns: dict[str, list[float]] = {}
        for name, row in one.rows.items():
            assert row.vote is not None
            values: dict[str, Any] = {
                "votes of the winner, share": row.vote.count / row.vote.n,
                "different answers": len({answer for answer in row.answers if answer is not None}),
                "without an answer, share": row.answers.count(None) / row.vote.n,
                "length in tokens": np.mean([len(rollout.completion_ids) for rollout in one.rollouts[name]]),
                **{score.replace("_", " "): value for score, value in row.scores.items()},
            }
            if name in gold:
                values["right rollouts, share"] = np.mean([is_correct(answer, gold[name]) for answer in row.answers])
                values["right majority, share"] = is_correct(row.pseudo_label, gold[name])
            for measure, value in values.items():
                columns.setdefault(measure, []).append(float(value))
        measured.append(columns)
    both = [measure for measure in measured[0] if measure in measured[1]]
    return [_row(name, np.array(measured[0][name]), np.array(measured[1][name]), analysis) for name in both]


def _signals(shared: list[Exported], gold: Mapping[str, Question], analysis: AnalysisConfig) -> list[dict[str, str]]:
    """AUROC of each signal before and after; empty where either export has right or wrong majorities alone."""
    levels = [question_level(one, gold) for one in shared]
    rows: dict[str, dict[str, str]] = {}
    for when, level in zip(("before", "after"), levels, strict=True):
        if level.right is None or len({*level.right}) < 2:
            return []
        for signal in level.signals:
            found = auroc_interval(signal.trust, level.right, level.owners, analysis)
            text = format_interval(found.estimate, found.low, found.high, ".3f")
            rows.setdefault(signal.name, {"": signal.name.replace("_", " "), "before": "", "after": ""})[when] = text
    return list(rows.values())


def _neurons(shared: list[Exported], analysis: AnalysisConfig) -> list[dict[str, str]]:
    """A rollout in whose active set a neuron is not counts 0 for it; a question counts the mean of its rollouts."""
    probe = shared[0].neurons
    order = probe["weight"].abs().sort_values(ascending=False, kind="stable").index
    means = []
    for one in shared:
        signals = one.signals
        places = [one.place[name, k] for name in one.rows for k in range(len(one.rollouts[name]))]
        matrix = contribution_matrix(
            signals.neuron_ids[places].numpy(), signals.contributions[places].float().numpy(), signals.n_neurons
        )
        columns = (probe["layer"] * signals.d_mlp + probe["index"]).to_numpy()
        k = len(places) // len(one.rows)
        means.append(matrix[:, columns].toarray().reshape(len(one.rows), k, len(columns)).mean(axis=1))
    rows = []
    for index in order:
        facts, column = probe.loc[index], probe.index.get_loc(index)
        row = _row(neuron_name(facts["layer"], facts["index"]), means[0][:, column], means[1][:, column], analysis)
        rows.append({"": row.pop(""), "probe weight": f"{facts['weight']:+.4g}", **row})
    return rows
