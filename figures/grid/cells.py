"""The cells of a grid: a model, trained or not, and the commands that make and evaluate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures.grid.config import BASE, CONTROL, METHODS, GridConfig, Options

SHARED_EXPORT = "manifests/{source}/nopsd"
"""The export of a source whose rollouts all its other exports reuse."""


@dataclass(frozen=True)
class Command:
    """One call of another command of this project; it is finished once ``out`` holds the file ``done``."""

    module: str
    out: Path
    done: str
    options: Options


@dataclass(frozen=True)
class Cell:
    """A model and its commands, in order."""

    name: str
    commands: Sequence[Command]


def evaluation_folder(out: Path, target: str, seed: int) -> Path:
    """The evaluation on one target with one sampling seed; that of seed 0 has the target's name alone."""
    return out / (target if seed == 0 else f"{target}--seed{seed}")


def untrained_cells(config: GridConfig, targets: Mapping[str, str], dev: Mapping[str, str]) -> list[Cell]:
    """The base model on every target, and at every candidate temperature on development questions and targets.

    Args:
        config: The grid's options.
        targets: Domain -> test questions.
        dev: Domain -> development questions; without any there are no candidates of the control. By default the
            development splits of the targets that are bundled sets.
    """
    dev = dev or {name: f"{name}:dev" for name, questions in targets.items() if questions == name}
    cells = [Cell(BASE, _evaluations(config, BASE, targets))]
    for temperature in config.control_temperatures if dev else ():
        name = f"{CONTROL}-T{temperature:g}"
        questions = {**{f"dev-{domain}": source for domain, source in dev.items()}, **targets}
        cells.append(Cell(name, _evaluations(config, name, questions, {"temperature": temperature})))
    return cells


def trained_cells(config: GridConfig, sources: Mapping[str, str], targets: Mapping[str, str]) -> list[Cell]:
    """Every method on every source with every seed; all cells of the first seed come first."""
    return [
        _trained_cell(config, method, source, seed, sources[source], targets)
        for seed in (*config.seeds, *config.more_seeds)
        for method in config.methods
        if seed in config.seeds or method in config.more_seeds_for
        for source in sources
    ]


def _trained_cell(
    config: GridConfig, name: str, source: str, seed: int, questions: str, targets: Mapping[str, str]
) -> Cell:
    """Export, training and evaluations; a method that selects otherwise has an export of its own."""
    method, cell = METHODS[name], f"{name}--{source}--seed{seed}"
    shared = config.out / SHARED_EXPORT.format(source=source)
    own = shared.with_name(name) if method.export else shared
    run = config.out / "cells" / cell / "train"
    export = {"model": config.model, "questions": [questions], **config.export}
    reuse = {**method.export, "reuse": shared} if method.export else {}
    train = {**config.train, **config.methods_train.get(name, {}), **method.train, "manifest": own, "seed": seed}
    return Cell(
        cell,
        [
            Command("neurosig.export", shared, "manifest.json", export),
            Command("neurosig.export", own, "manifest.json", {**export, **reuse}),
            Command("distill.train", run, "train.json", train),
            *_evaluations(config, cell, targets, {"adapter": run / "adapter"}),
        ],
    )


def _evaluations(
    config: GridConfig, cell: str, targets: Mapping[str, str], options: Options | None = None
) -> list[Command]:
    """One evaluation per target and sampling seed, so that a target or seed added later repeats no evaluation."""
    out = config.out / "cells" / cell / "eval"
    shared = {"model": config.model, **config.evaluate, **(options or {})}
    return [
        Command("distill.evaluate", evaluation_folder(out, domain, seed), "summary.json", own)
        for seed in config.evaluation_seeds
        for domain, questions in targets.items()
        for own in ({**shared, "questions": [questions], "seed": seed},)
    ]
