"""Accuracy and entropy gap of the teacher under every context policy.

    python -m figures.experiments.context_policies --manifest runs/demo/manifest --out runs/contexts

The manifest's rollouts are selected from again under each policy (`neurosig.export` with ``--reuse``). The teacher
answers the selected questions on fresh rollouts, with the same random numbers under every policy, and the entropy gap
is measured on the student's own rollouts (`distill.entropy_gap`). Gold answers are read here, to judge only. ``none``
is the student itself; policies that draw contexts from other pools are measured on the same questions. Each policy's
measurements are kept in OUT/parts, so a second run resumes the first.

`python -m figures context_policies` draws ``context_policies.csv`` of the results folder, or the committed
``figures/data/context_policies.csv``. ``gap_gain.csv`` has one row per policy and question.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.cli import CommonConfig, progress, run_command

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from neurosig.manifest import Manifest
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

NAME = "context_policies"
POINTS = "gap_gain"
NEEDS = None
CONTROL = "random_within_kind"

POLICIES: Mapping[str, Mapping[str, Any]] = {
    "none": {"context_policy": "none"},
    "random": {"context_policy": "random"},
    CONTROL: {"context_policy": CONTROL},
    "hidden_state": {"context_policy": "nearest", "signature": "hidden_state"},
    "nearest": {"context_policy": "nearest"},
    "nearest_vote_only": {"context_policy": "nearest", "question_filter": "vote_only"},
    "nearest_all": {"context_policy": "nearest", "question_filter": "all"},
}
"""Policy -> options of its selection; the questions are always those that the manifest's own filter selects."""

LABELS = {
    "none": "no context",
    "random": "random",
    CONTROL: "random, same kind",
    "hidden_state": "nearest hidden states",
    "nearest": "nearest neurons",
    "nearest_vote_only": "nearest neurons, vote filter only",
    "nearest_all": "nearest neurons, all questions",
}
READS_NEURONS = frozenset({"nearest", "nearest_vote_only", "nearest_all"})
PANELS = (
    ("teacher", "Avg@{k} of the teacher", None),
    ("over_kind", "difference in Avg@{k} to\nrandom of the same kind", 0.0),
    ("gap", "entropy gap, student less\nteacher (nats per token)", 0.0),
)
"""Column, axis label, and the value of no effect."""


@dataclass(kw_only=True)
class ContextsConfig(CommonConfig):
    """Measure the teacher under every context policy; write context_policies.csv and gap_gain.csv."""

    manifest: Path
    """Finished export whose selected questions the teacher answers."""
    out: Path = Path("runs/contexts")
    """Folder of the tables and of the other selections."""
    policies: tuple[str, ...] = tuple(POLICIES)
    """Policies to measure; none and random_within_kind are always measured."""
    num_generations: int = 8
    """Fresh samples per question."""
    entropy_rollouts: int = 2
    """Rollouts per question on which the entropy gap is measured."""
    seed: int = 0
    """Seed of the samples and of the bootstrap."""


def main(config: ContextsConfig) -> None:
    """Measure the policies of ``config`` and write both tables.

    Raises:
        UserError: A policy is unknown, or the manifest or its gold answers cannot be read.
    """
    import pandas as pd

    from neurosig.exported import join_gold
    from neurosig.manifest import read_manifest
    from neurosig.models.load import load_model
    from neurosig.runtime.errors import UserError
    from neurosig.runtime.files import csv_cell, write_atomic

    unknown = [name for name in config.policies if name not in POLICIES]
    if unknown:
        raise UserError(f"--policies {unknown[0]}: no such policy; have {', '.join(POLICIES)}")
    manifest = read_manifest(config.manifest)
    gold, _ = join_gold(manifest, required=True)
    options = manifest.header.options
    where: Any = {"dtype": options["dtype"], "template": options["template"], "adapter": manifest.header.adapter()}
    loaded = load_model(manifest.header.model["id"], **where)
    names = [name for name in POLICIES if name in {"none", CONTROL, *config.policies}]
    tables = [
        _measured(name, manifest, loaded, gold, config) for name in progress(names, desc="contexts", quiet=config.quiet)
    ]
    points = pd.concat(tables, ignore_index=True)
    student = points[points["policy"] == "none"].set_index("question")["teacher"]
    points["student"] = points["question"].map(student)
    points["gain"] = points["teacher"] - points["student"]
    points[["question", "kind"]] = points[["question", "kind"]].map(csv_cell)
    table = summary(points, k=config.num_generations, seed=config.seed)
    write_atomic(config.out / f"{POINTS}.csv", points.to_csv(index=False, float_format="%.6f"))
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.6f"))
    print(table.round(3).to_string(index=False))


def summary(points: pd.DataFrame, *, k: int, seed: int) -> pd.DataFrame:
    """One row per policy: means over questions with 95% bootstrap intervals, paired where they are differences.

    Columns: ``policy``, ``n``, ``k``, ``seed``, ``same_kind`` (share of the demonstrations of the question's own kind),
    and with ``_low`` and ``_high`` ``teacher`` (accuracy), ``gain`` (over no context), ``over_kind`` (over random
    contexts of the same kind) and ``gap`` (nats per token).

    Args:
        points: Columns ``policy``, ``question``, ``same_kind``, ``teacher``, ``gain``, ``gap``.
        k: Samples per question.
        seed: Seed of rollouts and bootstrap.
    """
    import numpy as np
    import pandas as pd

    from neurosig.statistics.metrics import paired_mean_interval

    by_policy = {name: rows.set_index("question") for name, rows in points.groupby("policy", sort=False)}
    rows = []
    for name, measured in by_policy.items():
        control = by_policy[CONTROL]["teacher"].loc[measured.index].to_numpy()
        nothing = np.zeros(len(measured))
        row = {"policy": name, "n": len(measured), "k": k, "seed": seed, "same_kind": measured["same_kind"].mean()}
        for measure, value, base in (
            ("teacher", "teacher", nothing),
            ("gain", "gain", nothing),
            ("over_kind", "teacher", control),
            ("gap", "gap", nothing),
        ):
            interval = paired_mean_interval(measured[value].to_numpy(), base, seed=seed)
            row |= {measure: interval.estimate, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _measured(
    name: str, manifest: Manifest, loaded: LoadedModel, gold: Mapping[str, Question], config: ContextsConfig
) -> pd.DataFrame:
    """One row per question under one policy, from OUT/parts if an earlier run measured it."""
    import pandas as pd

    from distill.entropy_gap import fresh_accuracy, token_entropies
    from figures.notebook.runs import select_again
    from neurosig.runtime.files import sha256_text, write_atomic

    header = manifest.header
    key = sha256_text(repr((header.content_sha256, config.num_generations, config.entropy_rollouts, config.seed)))[:8]
    part = config.out / "parts" / f"{name}-{key}.csv"
    if not part.is_file():
        chosen = select_again(config.manifest, config.out / "selections", **POLICIES[name])
        contexts = _only(chosen, [row.question_id for row in manifest.selected if row.question_id in gold])
        gaps: dict[str, list[float]] = {}
        for one in token_entropies(contexts, loaded, rollouts=config.entropy_rollouts):
            gaps.setdefault(one.question_id, []).extend((one.student - one.teacher).tolist())
        right = fresh_accuracy(
            contexts, loaded, gold, teacher=True, num_generations=config.num_generations, seed=config.seed
        )
        kinds = {row.question_id: row.kind or row.domain for row in contexts.rows}
        rows = [
            {
                "policy": name,
                "question": row.question_id,
                "kind": kinds[row.question_id],
                "same_kind": _mean([kinds[item.question_id] == kinds[row.question_id] for item in row.context]),
                "gap": _mean(gaps[row.question_id]),
                "teacher": right[row.question_id],
            }
            for row in contexts.selected
        ]
        part.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(part, pd.DataFrame(rows).to_csv(index=False, float_format="%.6f"))
    return pd.read_csv(part)


def _only(manifest: Manifest, question_ids: Sequence[str]) -> Manifest:
    """The manifest with these questions selected and no others; all remain available as demonstrations."""
    kept = set(question_ids)
    rows = tuple(row.model_copy(update={"selected": row.question_id in kept}) for row in manifest.rows)
    return dataclasses.replace(manifest, rows=rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


# Drawing


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    import pandas as pd

    from figures.sources import made_or_committed
    from figures.style import caption, save_figure, subplots

    source = made_or_committed(results / f"{NAME}.csv", NAME)
    table = pd.read_csv(source)
    figure, axes = subplots(1, len(PANELS), size=(7, 3.1), sharey=True, width_ratios=[1, 1, 1.08])
    n, k, seed = (int(table[column].iloc[0]) for column in ("n", "k", "seed"))
    for axis, (column, label, nothing) in zip(axes, PANELS, strict=True):
        _draw_panel(axis, table, column, nothing)
        axis.set_xlabel(label.format(k=k), fontsize=8)
    axes[0].set_yticks(range(len(table)), [_label(row) for row in table.itertuples()], fontsize=8)
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    caption(
        figure,
        f"{n} selected questions, {k} fresh rollouts each, seed {seed}; lines: 95% bootstrap intervals over questions\n"
        "(paired in the middle); diamonds: chosen by neurons; in brackets: demonstrations of the same kind",
    )
    return save_figure(figure, out, NAME, source.read_text())


def _label(row: Any) -> str:
    return LABELS[row.policy] if row.policy == "none" else f"{LABELS[row.policy]} ({row.same_kind:.0%})"


def _draw_panel(axis: Axes, table: pd.DataFrame, column: str, nothing: float | None) -> None:
    from figures.style import Colour

    where = float(table.set_index("policy")[column]["none"]) if nothing is None else nothing
    axis.axvline(where, color="black", linewidth=0.8, linestyle="--")
    for place, row in enumerate(table.to_dict("records")):
        colour, marker = (Colour.OURS, "D") if row["policy"] in READS_NEURONS else (Colour.BASELINE, "o")
        axis.hlines(place, row[f"{column}_low"], row[f"{column}_high"], color=colour, linewidth=1.4)
        axis.plot(row[column], place, marker, color=colour, markersize=5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(labelsize=8)


if __name__ == "__main__":
    sys.exit(run_command(ContextsConfig, main, presets={}, prog="python -m figures.experiments.context_policies"))
