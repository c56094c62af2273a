"""The cells of a grid: a model, trained or not, and the commands that make and evaluate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import PRESETS, TrainConfig
from figures.grid.config import BASE, CONTROL, METHODS, GridConfig, Options

SHARED_EXPORT = "manifests/{source}/probe"
"""The export of a source whose rollouts the exports without a preset reuse."""


@dataclass(frozen=True)
class Try:
    """A learning rate and a number of steps of a method's training.

    Attributes:
        learning_rate: Peak learning rate.
        steps: Steps of the training, which its schedule depends on.
        at: Step after which the adapter is taken.
    """

    learning_rate: float
    steps: int
    at: int

    @property
    def options(self) -> Options:
        """Options of the training."""
        return {"learning_rate": self.learning_rate, "steps": self.steps, "save_steps": max(1, self.steps // 2)}

    def adapter(self, run: Path) -> Path:
        """Where the training in ``run`` leaves the adapter."""
        return run / "adapter" if self.at == self.steps else run / "checkpoints" / f"step-{self.at:06d}"


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


def tries(config: GridConfig, method: str) -> list[Try]:
    """What is tried for a method, smallest learning rate first; without ``learning_rates`` its own alone."""
    options = _train_options(config, method)
    options = {**PRESETS.get(options.get("preset", ""), {}), **options}
    rate, steps = options.get("learning_rate", TrainConfig.learning_rate), options.get("steps", TrainConfig.steps)
    if not config.learning_rates:
        return [Try(rate, steps, steps)]
    places = sorted({max(1, steps // 2), steps})
    return [Try(float(f"{rate * factor:g}"), steps, at) for factor in sorted(config.learning_rates) for at in places]


def tried_cells(config: GridConfig, sources: Mapping[str, str], dev: Mapping[str, str]) -> list[Cell]:
    """Every try of every method on each of the sources, judged on the source's development questions.

    The methods take turns, so that cells at the same time do not wait for one export.
    """
    seed = config.seeds[0]
    found: dict[str, Cell] = {}
    methods = config.methods if config.learning_rates else ()
    planned = [
        (*numbered, method, source)
        for method in methods
        for source in sources
        for numbered in enumerate(tries(config, method))
    ]
    for _, one, method, source in sorted(planned, key=lambda each: each[0]):
        name = tried_name(method, source, one.learning_rate)
        train = _training(config, method, source, sources[source], config.out / "tries" / name, seed, one)
        found.setdefault(name, Cell(name, train))
        judged = {"adapter": one.adapter(config.out / "tries" / name / "train"), "questions": [dev[source]]}
        options = {"model": config.model, **config.evaluate, **judged, "seed": config.evaluation_seeds[0]}
        place = config.out / "tries" / name / "eval" / f"step-{one.at:06d}"
        found[name] = Cell(name, [*found[name].commands, Command("distill.evaluate", place, "summary.json", options)])
    return list(found.values())


def tried_name(method: str, source: str, learning_rate: float) -> str:
    """Name of the cell of `tried_cells`."""
    return f"{method}--{source}--lr{learning_rate:g}"


def trained_cells(
    config: GridConfig, sources: Mapping[str, str], targets: Mapping[str, str], chosen: Mapping[str, Try]
) -> list[Cell]:
    """Every method of ``chosen`` on every source with every seed; all cells of the first seed come first.

    A try is a training with the first seed, which is not repeated.
    """
    return [
        _trained_cell(config, method, source, seed, sources[source], targets, chosen[method])
        for seed in (*config.seeds, *config.more_seeds)
        for method in config.methods
        if method in chosen and (seed in config.seeds or method in config.more_seeds_for)
        for source in sources
    ]


def _trained_cell(
    config: GridConfig, name: str, source: str, seed: int, questions: str, targets: Mapping[str, str], chosen: Try
) -> Cell:
    cell = f"{name}--{source}--seed{seed}"
    tried = bool(config.learning_rates) and seed == config.seeds[0] and source in (config.tuning_sources or [source])
    folder = config.out / (f"tries/{tried_name(name, source, chosen.learning_rate)}" if tried else f"cells/{cell}")
    adapter = {"adapter": chosen.adapter(folder / "train")}
    train = _training(config, name, source, questions, folder, seed, chosen)
    return Cell(cell, [*train, *_evaluations(config, cell, targets, adapter)])


def _training(
    config: GridConfig, name: str, source: str, questions: str, folder: Path, seed: int, chosen: Try
) -> list[Command]:
    """Export and training; a method that selects otherwise has an export of its own."""
    method, shared = METHODS[name], config.out / SHARED_EXPORT.format(source=source)
    own = shared.with_name(name) if method.export else shared
    export = {"model": config.model, "questions": [questions], **config.export}
    exports = [Command("neurosig.export", own, "manifest.json", {**export, **method.export})]
    if method.export and "preset" not in method.export:
        reused = Command("neurosig.export", own, "manifest.json", {**export, **method.export, "reuse": shared})
        exports = [Command("neurosig.export", shared, "manifest.json", export), reused]
    train = {**_train_options(config, name), **chosen.options, "manifest": own, "seed": seed}
    return [*exports, Command("distill.train", folder / "train", "train.json", train)]


def _train_options(config: GridConfig, name: str) -> dict[str, Any]:
    return {**config.train, **config.methods_train.get(name, {}), **METHODS[name].train}


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
