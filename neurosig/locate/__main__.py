"""Locate the neurons that go with guessing over several kinds of question and domains, and say which survive.

    python -m neurosig.locate --manifest runs/geography runs/language --out runs/located

A neuron may predict which questions split because it marks a hard kind of question. Here a located neuron counts only
if it is stable over questions and has one sign in every kind and domain that can tell. The power is stated before the
result, and the probe's AUROC is given by question, by entity, with one kind and with one domain left out, with p-values
from labels permuted within kinds. Labels are annotation-free: whether a question's rollouts agree or split.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from neurosig.runtime.cli import CommonConfig, PhaseTimer, config_record, printable, run_command
from neurosig.runtime.shapes import AtLeast

LOCATED, STABLE, SURVIVING, RECORD = (
    *("located_neurons.csv", "stable_neurons.csv", "surviving_neurons.csv"),
    "located.json",
)


@dataclass(kw_only=True)
class LocateConfig(CommonConfig):
    """Name the neurons that go with guessing in every kind of question, from one or several exports.

    Writes located_neurons.csv (every neuron with a weight or stable), stable_neurons.csv and surviving_neurons.csv (the
    stable ones, and those of one sign everywhere; tables for neurosig.intervene --table), and located.json.
    """

    manifest: tuple[Path, ...]
    """Manifest folders of neurosig.export, of one model; several domains show which neurons belong to one."""
    out: Path
    """Folder of the tables and of located.json."""
    pairs: Annotated[int, AtLeast(1)] = 50
    """Pairs of complementary halves of the questions in stability selection."""
    permutations: Annotated[int, AtLeast(0)] = 49
    """Refits of the probe to labels permuted within kinds; p is at least 1 / (1 + this). 0 leaves p out."""
    seed: int = 0
    """Seed of halves, folds, permutations and planted data."""


def main(config: LocateConfig) -> None:
    """Locate, print what was found, and write it."""
    from neurosig.exported import Exported, join_gold
    from neurosig.hallucination.locate import write_neurons
    from neurosig.locate.analysis import findings, locate_over_kinds, planned, power, transfer
    from neurosig.locate.pooled import pool
    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.provenance import run_record

    with PhaseTimer() as timer:
        with timer.phase("read"):
            exports = [Exported(folder) for folder in config.manifest]
            pooled = pool(exports, [join_gold(one.manifest)[0] for one in exports])
            options = replace(pooled.config, pairs=config.pairs, seed=config.seed, groups="question")
        with timer.phase("power"):
            stated = power(pooled, options, quiet=config.quiet)
            for line in planned(pooled, stated):
                print(printable(line), flush=True)
        with timer.phase("locate"):
            located = locate_over_kinds(pooled, options, quiet=config.quiet)
        with timer.phase("leave out"):
            rows = transfer(pooled, options, config.permutations, quiet=config.quiet)
        lines = findings(located, rows)
        with timer.phase("write"):
            config.out.mkdir(parents=True, exist_ok=True)
            table = located.table
            write_neurons(config.out / LOCATED, table)
            write_neurons(config.out / STABLE, table[table["stable"]])
            write_neurons(config.out / SURVIVING, table[table["survives"]])
            record = {
                "manifests": [one.manifest.header.content_sha256 for one in exports],
                "power": asdict(stated),
                "auroc": [asdict(row) for row in rows],
                "expected_false": located.stability.expected_false,
                "findings": lines,
                "config": config_record(config),
                "run": run_record(),
            }
            write_atomic(config.out / RECORD, json.dumps(record, indent=1) + "\n")
    for line in lines:
        print(printable(line))


if __name__ == "__main__":
    sys.exit(run_command(LocateConfig, main, presets={}, prog="python -m neurosig.locate"))
