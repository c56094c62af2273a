"""Every method on every source domain, judged on every target domain: the runs behind the paper's tables.

    python -m figures.grid --preset cpu --out runs/grid
    python -m figures.grid --config grid.toml

A cell is a method, a source and a seed. Export, training and evaluation are the commands of the same names, each in a
process of its own. Finished commands are skipped and interrupted ones resumed; a cell that fails is reported, and the
other cells still run. ``results.csv`` has one row per cell, target and evaluation seed, ``grid.parquet`` one row per
question. The command prints their tables in the paper's form; ``python -m figures paper_tables --results OUT`` draws
them. ``evidence_plan.toml`` is the plan of tests as it was when the grid was started.

With ``--learning-rates`` every method's learning rate and steps are chosen first, on the development questions and by
the same number of tries (``tries/``, ``tuning.csv``).

Two controls are part of every grid: the untrained model at the temperature with the best Avg@K on the development
splits, and context that is random within the question's kind (method ``probe-kind``).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence

from figures.grid.cells import Cell, trained_cells, tried_cells, untrained_cells
from figures.grid.config import METHODS, PLAN, PRESETS, SETTINGS, GridConfig
from figures.grid.processes import LOG, forkserver, run_cells
from figures.grid.tuning import choose
from neurosig.runtime.cli import config_record, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import EXTRAS, check_installed
from neurosig.runtime.files import write_atomic
from neurosig.runtime.folder import output_folder
from neurosig.runtime.provenance import differences, explain
from neurosig.runtime.recorded import check_inputs_unchanged

logger = logging.getLogger(__name__)


def main(config: GridConfig) -> None:
    """Run the missing cells of the grid, then collect its results.

    Raises:
        UserError: An option is wrong, the folder belongs to a grid with other options, or a cell failed.
    """
    from figures.grid.collect import RESULTS, collect

    sources = _by_domain(config.sources, "--sources")
    targets = _by_domain(config.targets or config.sources, "--targets")
    dev = _by_domain(config.dev, "--dev")
    _check(config, sources)
    tuning = {name: sources[name] for name in config.tuning_sources or sources}
    judging = _dev_of_sources(config, tuning, dev)
    check_installed("figures.grid", *EXTRAS["signals"])
    with output_folder(config.out, finished=RESULTS, owned=(), resume=True, overwrite=False):
        _keep_settings(config, {"sources": sources, "targets": targets, "dev": dev})
        context = forkserver()
        failed = []
        for folder, cells_of in (
            ("cells", lambda: untrained_cells(config, targets, dev)),
            ("tries", lambda: tried_cells(config, tuning, judging)),
            ("cells", lambda: trained_cells(config, sources, targets, choose(config, tuning))),
        ):
            cells = cells_of()
            _check_finished(cells)
            failed += run_cells(cells, config.out / folder, context, jobs=config.jobs, quiet=config.quiet)
        print(collect(config.out, list(targets), config.allow_difference))
    if failed:
        raise UserError(f"{len(failed)} cells failed ({', '.join(failed)}): see {LOG} in each; fix it and run again")


def _check_finished(cells: Sequence[Cell]) -> None:
    """Refuse to go on with cells whose questions, model or manifest have changed since."""
    for command in {command.out: command for cell in cells for command in cell.commands}.values():
        if (command.out / command.done).is_file():
            check_inputs_unchanged(command.out)


def _by_domain(values: Sequence[str], flag: str) -> dict[str, str]:
    """Domain -> questions, from ``NAME=QUESTIONS`` or the name of a bundled set alone."""
    questions_of: dict[str, str] = {}
    for value in values:
        name, _, questions = value.partition("=")
        if name in questions_of or not re.fullmatch(r"[\w.-]+", name) or "--" in name:
            raise UserError(
                f"{flag} {value}: expected NAME=QUESTIONS with each NAME once, of letters, digits, ., - and _"
            )
        questions_of[name] = questions or name
    return questions_of


def _dev_of_sources(config: GridConfig, sources: Mapping[str, str], dev: Mapping[str, str]) -> dict[str, str]:
    """Source of the tries -> its development questions."""
    found = {name: dev.get(name, f"{name}:dev" if questions == name else "") for name, questions in sources.items()}
    if missing := [name for name, questions in found.items() if not questions and config.learning_rates]:
        raise UserError(
            f"--learning-rates: no development questions of {missing[0]}; give --dev {missing[0]}=QUESTIONS"
        )
    return found


def _check(config: GridConfig, sources: Mapping[str, str]) -> None:
    unknown = [name for name in (*config.methods, *config.more_seeds_for, *config.methods_train) if name not in METHODS]
    if unknown:
        raise UserError(f"method {unknown[0]}: expected one of {', '.join(METHODS)}")
    if unknown := [name for name in config.tuning_sources if name not in sources]:
        raise UserError(f"--tuning-sources {unknown[0]}: expected domains of --sources: {', '.join(sources)}")
    if not config.evaluation_seeds:
        raise UserError("--evaluation-seeds: give at least one")
    if "seed" in config.evaluate:
        raise UserError("[evaluate] seed: give the sampling seeds of the evaluations as --evaluation-seeds")


def _keep_settings(config: GridConfig, questions: Mapping[str, Mapping[str, str]]) -> None:
    """Record the options that every cell depends on and the stated tests; refuse a folder made with other options.

    ``questions`` are those of each domain, by option: domains may be added, but not changed.
    """
    shared = ("model", "export", "train", "evaluate", "methods_train")
    options = config_record(config)
    record = {name: options[name] for name in shared}
    path = config.out / SETTINGS
    if not path.is_file():
        write_atomic(config.out / PLAN.name, PLAN.read_bytes())
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else record
    for name, domains in questions.items():
        record[name] = {**earlier.get(name, {}), **domains}
        earlier[name] = {**domains, **earlier.get(name, {})}
    if earlier.get("jobs", config.jobs) != config.jobs:
        logger.warning("--jobs %d before, %d now; bits of the results may differ", earlier["jobs"], config.jobs)
    earlier = {name: earlier.get(name) for name in record}
    if changed := differences(earlier, record):
        names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in changed))
        raise UserError(
            f"{config.out}: its cells were made with other {names} options: {explain(changed)}; give the same ones or "
            "another --out"
        )
    write_atomic(path, json.dumps({**record, "jobs": config.jobs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(GridConfig, main, presets=PRESETS, prog="python -m figures.grid"))
