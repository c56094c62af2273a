"""Every published selector on the same questions: what it selects, and what its contexts do to the teacher.

    python -m figures.experiments.selectors --model smollm2-135m --questions geography --out runs/selectors

Each selector is a preset of `neurosig.export` with its own sampling; ``probe`` is our default, ``votes`` our vote
filter alone, and ``random`` a fifth drawn by the seed with contexts of the same kind. The teacher answers M times with
each context (also where the selector does not ask it), and gold answers judge both sides (`neurosig.report.effects`).
An export that is there already is not made again, so a second run resumes the first.

`python -m figures selectors` draws ``selectors.csv`` of the results folder, or the committed
``figures/data/selectors.csv``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.export_config import PRESETS, ExportConfig
from neurosig.options import ORGANISM
from neurosig.runtime.cli import CommonConfig, progress, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from neurosig.manifest import Manifest

logger = logging.getLogger(__name__)

NAME = "selectors"
NEEDS = None
M = 5
OWN: Mapping[str, Mapping[str, object]] = {
    "probe": {},
    "votes": {"question_filter": "vote_only"},
    "random": {
        **{"question_filter": "neuron_only", "hallucination_score": "random", "keep_fraction": 0.2},
        **{"context_policy": "random_within_kind", "num_demonstrations": 3},
    },
}
PUBLISHED = ("published", "inflow", "consistency", "redundancy", "mutual", "full", "canon", "u-opsd")
LABELS = {
    "probe": "our probe",
    "votes": "votes alone",
    "random": "random fifth, same kind",
    "published": "N-OPSD, published reading",
    "inflow": "INFLOW",
    "consistency": "CONSISTENCY",
    "redundancy": "REDUNDANCY",
    "mutual": "MUTUAL",
    "full": "FULL",
    "canon": "CANON",
    "u-opsd": "U-OPSD",
}
PANELS = (
    ("student", "right majority among\nthe selected"),
    ("teacher", "right majority of the\nteacher with context"),
    ("balance", "fixed minus broken by\nthe context"),
    ("gap", "entropy gap\n(nats per token)"),
)


@dataclass(kw_only=True)
class SelectorsConfig(CommonConfig):
    """Export the same questions with every selector and judge what it selects; write selectors.csv."""

    model: str
    """Hub id, folder, GGUF file, or a bundled model: smollm2-135m, organism."""
    questions: tuple[str, ...]
    """Labelled questions, as for neurosig.export."""
    limit: int | None = 60
    """Use only the first N questions."""
    selectors: tuple[str, ...] = (*OWN, *PUBLISHED)
    """Selectors to run, of ours and of the published presets."""
    out: Path = Path("runs/selectors")
    """Folder of the exports and the table."""
    seed: int = 0
    """Seed of sampling, selection and bootstrap."""


def main(config: SelectorsConfig) -> None:
    """Run the selectors of ``config`` and write the table.

    Raises:
        UserError: A selector is unknown; or see `neurosig.export`.
    """
    import pandas as pd

    from neurosig.runtime.files import write_atomic

    unknown = [name for name in config.selectors if name not in LABELS]
    if unknown:
        raise UserError(f"--selectors {unknown[0]}: no such selector; have {', '.join(LABELS)}")
    rows = []
    for name in progress(config.selectors, desc="selectors", quiet=config.quiet):
        rows += _measured(config, name)
    table = pd.DataFrame(rows)
    write_atomic(config.out / f"{NAME}.csv", table.to_csv(index=False, float_format="%.6f"))
    print(table[table["grading"] == "strict"].round(3).to_string(index=False))


def _measured(config: SelectorsConfig, name: str) -> list[dict[str, Any]]:
    """The rows of one selector, one per grading."""
    from neurosig.export import main as export
    from neurosig.exported import Exported, join_gold
    from neurosig.report.effects import effects
    from neurosig.statistics.auroc import AnalysisConfig
    from neurosig.statistics.vote_table import GRADINGS

    preset = OWN[name] if name in OWN else PRESETS[name]
    wording = {key: value for key, value in ORGANISM.items() if key != "model"} if config.model == "organism" else {}
    options: Any = {**wording, **preset, "teacher_rollouts": M, "seed": config.seed}
    where: Any = {"model": config.model, "questions": config.questions, "limit": config.limit}
    folder = config.out / name
    export(ExportConfig(**where, **options, out=folder, resume=True, quiet=True))
    exported = Exported(folder)
    gold, _ = join_gold(exported.manifest, required=True)
    found = effects(exported, gold, AnalysisConfig(config.seed))
    if found is None:
        raise UserError(f"{folder}: the teacher was asked nothing; give more --limit")
    chosen = [row for row in found.questions if row["selected"]]
    shared = {"selector": name, "model": config.model, "questions": " ".join(config.questions), "seed": config.seed}
    shared |= {"asked": len(exported.rows), "k": exported.manifest.k, "m": M, "n": len(chosen)}
    shared |= _cost(exported.manifest)
    return [{**shared, "grading": grading, **_judged(chosen, grading, config.seed)} for grading in GRADINGS]


def _cost(manifest: Manifest) -> dict[str, int]:
    """Sampled tokens of both sides, and the tokens of the demonstrations that the teacher reads before it answers."""
    student, teacher = (
        sum(len(one.completion_ids) for one in side.values()) for side in (manifest.rollouts, manifest.teacher_rollouts)
    )
    return {"student_tokens": student, "teacher_tokens": teacher}


def _judged(rows: Sequence[Mapping[str, Any]], grading: str, seed: int) -> dict[str, float]:
    """Means over the selected questions with 95% bootstrap intervals."""
    import numpy as np

    from neurosig.statistics.metrics import paired_mean_interval

    outcomes = np.array([row[f"outcome_{grading}"] for row in rows])
    fixed, broken = outcomes == "fix", outcomes == "break"
    columns = {
        "student": np.isin(outcomes, ["right", "break"]),
        "teacher": np.isin(outcomes, ["right", "fix"]),
        "fix": fixed,
        "break": broken,
        "balance": fixed.astype(float) - broken,
        "gap": np.array([row["entropy_gap"] for row in rows], float),
    }
    judged: dict[str, float] = {}
    for name, values in columns.items():
        found = paired_mean_interval(values.astype(float), np.zeros(len(rows)), seed=seed)
        judged |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    return judged


# Drawing


def draw(results: Path, out: Path) -> list[Path]:
    """Draw the figure from ``results`` into ``out``."""
    import pandas as pd

    from figures.sources import made_or_committed
    from figures.style import caption, save_figure, subplots

    source = made_or_committed(results / f"{NAME}.csv", NAME)
    table = pd.read_csv(source)
    table = table[table["grading"] == "strict"]
    models = list(dict.fromkeys(table["model"]))
    figure, axes = subplots(
        len(models), len(PANELS), size=(8.2, 0.6 + 2.6 * len(models)), sharey="row", sharex="col", squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        part = table[table["model"] == model].reset_index(drop=True)
        for axis, (column, label) in zip(line, PANELS, strict=True):
            _draw_panel(axis, part, column)
            axis.set_xlabel(label, fontsize=8)
        line[0].set_yticks(range(len(part)), [f"{LABELS[row.selector]} ({row.n})" for row in part.itertuples()])
        line[0].tick_params(axis="y", labelsize=8)
        line[0].set_ylim(len(part) - 0.5, -0.5)
        line[0].set_title(f"{model}, {part['asked'].iloc[0]} questions", fontsize=9, loc="left")
    caption(
        figure,
        f"in brackets: selected questions; the teacher answers {int(table['m'].iloc[0])} times; lines: 95% bootstrap "
        "intervals over\nquestions; strict grading",
    )
    return save_figure(figure, out, NAME, source.read_text())


def _draw_panel(axis: Any, table: pd.DataFrame, column: str) -> None:
    from figures.style import Colour

    if column in ("balance", "gap"):
        axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    for place, row in enumerate(table.to_dict("records")):
        colour = Colour.OURS if row["selector"] == "probe" else Colour.BASELINE
        axis.hlines(place, row[f"{column}_low"], row[f"{column}_high"], color=colour, linewidth=1.4)
        axis.plot(row[column], place, "o", color=colour, markersize=5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(labelsize=8)


if __name__ == "__main__":
    sys.exit(run_command(SelectorsConfig, main, presets={}, prog="python -m figures.experiments.selectors"))
