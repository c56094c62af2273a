"""Options of ``python -m figures.grid``, its presets, and how each method differs from N-OPSD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Fixed

from figures.sources import DATA
from neurosig.runtime.cli import CommonConfig
from neurosig.runtime.shapes import AtLeast, Shapes

Options = Mapping[str, Any]
SETTINGS = "grid.json"
PLAN = DATA / "evidence_plan.toml"
"""The stated tests; a grid keeps a copy of them as they were when it was started."""
BASE, CONTROL = "base", "control"
"""The untrained model, and the same at its best temperature."""


@dataclass(frozen=True)
class Method:
    """How a method differs from N-OPSD: options of its export and of its training."""

    export: Options = field(default_factory=dict)
    train: Options = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "nopsd": Method(),
    "nopsd-random": Method(export={"context_policy": "random"}),
    "nopsd-kind": Method(export={"context_policy": "random_within_kind"}),
    "vote-only": Method(export={"question_filter": "vote_only"}),
    "vote-only-random": Method(export={"question_filter": "vote_only", "context_policy": "random"}),
    "u-opsd": Method(export={"context_policy": "majority_solution"}, train={"method": "u-opsd"}),
    "opsa": Method(train={"method": "opsa"}),
    "lmsi": Method(train={"method": "lmsi"}),
    "ttrl": Method(train={"method": "ttrl"}),
    "intuitor": Method(train={"method": "intuitor"}),
}
"""The paper's rows, the 2 x 2 of filter and context, and the control without a teacher (opsa)."""


@dataclass(kw_only=True)
class GridConfig(CommonConfig):
    """Train and evaluate methods x source domains x seeds; run it again to resume.

    A --config file may also hold the tables [export], [train] and [evaluate], options of those commands for all cells,
    and [methods_train.NAME], options of one method's training.
    """

    out: Path
    """Folder of the cells and their results."""
    model: str
    """Hub id, folder, GGUF file, or a bundled model: smollm2-135m, organism."""
    methods: tuple[str, ...] = (
        "nopsd",
        "nopsd-random",
        "nopsd-kind",
        "vote-only",
        "u-opsd",
        "lmsi",
        "ttrl",
        "intuitor",
    )
    """Rows of the tables; vote-only-random completes the 2 x 2 of filter and context, opsa is the control without a
    teacher."""
    sources: tuple[str, ...]
    """Training questions of each domain: a bundled set, or NAME=QUESTIONS."""
    targets: tuple[str, ...] = ()
    """Test questions of each domain, in the same form; default: the sources (bundled sets are split)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds. All cells of a source share its rollouts; all evaluations share their sampling seeds."""
    more_seeds: tuple[int, ...] = ()
    """Further training seeds of the methods in --more-seeds-for."""
    more_seeds_for: tuple[str, ...] = ("nopsd", "nopsd-random", "lmsi")
    """Methods that are also trained with --more-seeds."""
    evaluation_seeds: tuple[int, ...] = (0,)
    """Sampling seeds of the evaluations. Every model is evaluated once per seed and the tables average over them, so
    that no claim rests on one draw of the rollouts; a seed added later repeats no evaluation."""
    jobs: Annotated[int, Shapes.RESOURCES, AtLeast(1)] = 1
    """Cells that run at the same time and share the CPU's threads; each has a GPU of its own where there are as many
    (CUDA_VISIBLE_DEVICES is respected). Keep one value per grid: last bits depend on it."""
    control_temperatures: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Candidates of the temperature control."""
    dev: tuple[str, ...] = ()
    """Labelled development questions that choose among them, given like --sources; default: of the bundled targets."""
    allow_difference: tuple[str, ...] = ()
    """Options, other than temperature, seed and adapter, in which the evaluations of a target may differ."""
    export: Fixed[dict[str, Any]] = field(default_factory=dict)
    train: Fixed[dict[str, Any]] = field(default_factory=dict)
    evaluate: Fixed[dict[str, Any]] = field(default_factory=dict)
    methods_train: Fixed[dict[str, dict[str, Any]]] = field(default_factory=dict)


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {
        "model": "smollm2-135m",
        "sources": ("geography", "language", "chemistry"),
        "evaluate": {"limit": 70},
        "methods_train": {
            "ttrl": {"learning_rate": 2e-4, "num_generations": 4, "questions_per_step": 4, "vote_generations": 8},
            "intuitor": {"learning_rate": 5e-5, "num_generations": 4, "questions_per_step": 4},
        },
    },
    "paper": {
        "model": "Qwen/Qwen3-4B",
        "control_temperatures": (0.3, 0.6, 0.8),
        "export": {"preset": "qwen3-4b"},
        "train": {"preset": "qwen3-4b"},
        "evaluate": {"preset": "qwen3-4b"},
        "methods_train": {
            "ttrl": {"num_generations": 8, "questions_per_step": 4, "vote_generations": 16, "learning_rate": 5e-7},
            "intuitor": {"num_generations": 8, "questions_per_step": 4, "learning_rate": 3e-6},
        },
    },
}
