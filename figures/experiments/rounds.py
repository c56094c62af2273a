"""Export, train and evaluate round after round: each round looks at the model of the one before and continues it.

    python -m figures.experiments.rounds --preset organism --rounds 3 --out runs/rounds

A round is the three commands of the README in turn: `neurosig.export` with the adapter of the round before,
`distill.train`, which continues that adapter with the model before the round as its teacher, and `distill.evaluate`.
Finished parts are kept, so a second call resumes the first. ``rounds.csv`` has one row per round: the model after it,
on the same questions with the same sampling seed, with 95% bootstrap intervals paired over questions; and the manifest
that the round trained on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from neurosig.runtime.cli import CommonConfig, command_words, run_command
from neurosig.runtime.shapes import AtLeast

logger = logging.getLogger(__name__)

METRICS = ("avg_at_k", "maj_at_k", "ece")


@dataclass(kw_only=True)
class RoundsConfig(CommonConfig):
    """Train a model for several rounds and evaluate it after each; write rounds.csv.

    The tables export, train and evaluate of a --config file hold options of the three commands, presets included.
    """

    out: Path
    """Folder of round-1, round-2 and so on, each with manifest, run and eval, and of rounds.csv."""
    rounds: Annotated[int, AtLeast(1)] = 2
    """Rounds of export and training; more of them continue an earlier call."""
    resamples: int = 10_000
    """Bootstrap resamples of the questions."""
    export: dict[str, Any] = field(default_factory=dict)
    """Options of neurosig.export."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of distill.train."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of distill.evaluate."""


COMMANDS = ("export", "train", "evaluate")
PRESETS: Mapping[str, Mapping[str, object]] = {
    name: {command: {"preset": name} for command in COMMANDS} for name in ("cpu", "organism", "qwen3-4b")
}


def main(config: RoundsConfig) -> None:
    """Run the rounds of ``config`` and write the table.

    Raises:
        UserError: An option of a command is wrong; or see the three commands.
    """
    import distill.config
    import distill.evaluate
    import distill.train
    import neurosig.export
    from neurosig.runtime.files import write_atomic

    def run(module: Any, kind: type, presets: Any, **own: Any) -> None:
        _run(module.main, kind, presets, own, quiet=config.quiet)

    def evaluate(folder: Path, **own: Any) -> None:
        options = {**config.evaluate, **own, "out": folder / "eval"}
        run(distill.evaluate, distill.evaluate.EvaluateConfig, distill.evaluate.PRESETS, **options)

    evaluate(config.out / "round-0")
    for number in range(1, config.rounds + 1):
        folder, before = config.out / f"round-{number}", config.out / f"round-{number - 1}" / "run"
        looked_at = {"adapter": before} if number > 1 else {}
        options = {**config.export, **looked_at, "out": folder / "manifest"}
        run(neurosig.export, neurosig.export.ExportConfig, neurosig.export.PRESETS, **options)
        options = {**config.train, "manifest": folder / "manifest", "out": folder / "run"}
        run(distill.train, distill.config.TrainConfig, distill.config.PRESETS, **options)
        evaluate(folder, adapter=folder / "run")
    table = rounds_table(config)
    write_atomic(config.out / "rounds.csv", table.to_csv(index=False, float_format="%.6f"))
    print(table.round(3).to_string(index=False))


def _run(main: Callable[[Any], None], kind: type, presets: Any, options: dict[str, Any], *, quiet: bool) -> None:
    """Call a command with these options, resuming what an earlier call began."""
    from neurosig.runtime.arguments import parse_config

    words = [*command_words(options, kind), "--resume", *(["--quiet"] if quiet else [])]
    main(parse_config(kind, presets=presets, prog=kind.__name__, argv=words))


def rounds_table(config: RoundsConfig) -> Any:
    """One row per round, 0 for the model before training, as a `pandas.DataFrame`.

    Columns: ``round``, ``n``, ``k``; each metric, and its change against round 0 and against the round before, with
    ``_low`` and ``_high``; ``selected``, the questions that the round trained on, and ``vote_share``, the winner's mean
    share over all questions of its manifest.
    """
    import numpy as np
    import pandas as pd

    from distill.evaluate import read_sampled
    from neurosig.manifest import read_manifest
    from neurosig.statistics.vote_table import VoteTable

    tables, lines = [], []
    for number in range(config.rounds + 1):
        folder = config.out / f"round-{number}"
        rows = sorted(read_sampled(folder / "eval")[1], key=lambda row: str(row["question_id"]))
        own = VoteTable.from_rows(rows)
        tables.append(own)
        line: dict[str, Any] = {"round": number, "n": len(own), "k": own.k}
        for metric in METRICS:
            line[metric] = own.estimate(metric)
            for name, base in (("over_base", 0), ("over_last", number - 1)) if number else ():
                change = own.interval(metric, minus=tables[base], seed=0, resamples=config.resamples)
                column = f"{metric}_{name}"
                line |= {column: change.estimate, f"{column}_low": change.low, f"{column}_high": change.high}
        if number:
            manifest = read_manifest(folder / "manifest")
            shares = [row.vote.count / row.vote.n for row in manifest.rows if row.vote is not None]
            line |= {"selected": len(manifest.selected), "vote_share": float(np.mean(shares))}
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    sys.exit(run_command(RoundsConfig, main, presets=PRESETS, prog="python -m figures.experiments.rounds"))
