"""Options of ``python -m figures.grid``, its presets, and the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Fixed

from figures.protocols import OVERALL, PROTOCOLS, file_options
from figures.sources import DATA
from neurosig.options import QWEN3_4B
from neurosig.runtime.cli import CommonConfig
from neurosig.runtime.shapes import Above0, AtLeast, Shapes

Options = Mapping[str, Any]
SETTINGS = "grid.json"
PLAN = DATA / "evidence_plan.toml"
"""The stated tests; a grid keeps a copy of them as they were when it was started."""
BASE, CONTROL = "base", "control"
"""The untrained model, and the same at its best temperature."""


PUBLISHED = {
    "nopsd": "published",
    **{name: name for name in ("full", "redundancy", "consistency", "mutual", "inflow", "canon")},
}
"""Method -> its preset of neurosig.export and distill.train; ``nopsd`` is the only published reading of N-OPSD."""


@dataclass(frozen=True)
class Method:
    """Options of a method's export and of its training. An export with a preset samples and traces for itself; the
    others reuse the rollouts of ``probe``."""

    export: Options = field(default_factory=dict)
    train: Options = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    **{name: Method({"preset": preset}, {"preset": preset}) for name, preset in PUBLISHED.items()},
    "probe": Method(),
    "probe-random": Method(export={"context_policy": "random"}),
    "probe-kind": Method(export={"context_policy": "random_within_kind"}),
    "vote-only": Method(export={"question_filter": "vote_only"}),
    "vote-only-random": Method(export={"question_filter": "vote_only", "context_policy": "random"}),
    "u-opsd": Method(export={"context_policy": "majority_solution"}, train={"method": "u-opsd"}),
    "opsa": Method(train={"method": "opsa"}),
    "lmsi": Method(train={"method": "lmsi"}),
    "ttrl": Method(train={"method": "ttrl"}),
    "intuitor": Method(train={"method": "intuitor"}),
}
"""How each method differs from ``probe``, N-OPSD with this project's probe: the published selectors, each with the
training of the same name; the 2 x 2 of filter and context; the paper's baselines; the control without a teacher."""


METHOD_LABELS = {
    BASE: "base",
    CONTROL: "base, best temperature",
    "lmsi": "LMSI",
    "ttrl": "TTRL",
    "intuitor": "Intuitor",
    "u-opsd": "U-OPSD",
    "opsa": "OPSA (no teacher)",
    "canon": "CANON",
    "full": "FULL",
    "redundancy": "REDUNDANCY",
    "consistency": "CONSISTENCY",
    "mutual": "MUTUAL",
    "inflow": "INFLOW",
    "nopsd": "N-OPSD (published reading)",
    "probe": "N-OPSD with our probe",
    "vote-only": "vote alone filters",
    "probe-kind": "our probe, random context of the kind",
    "probe-random": "our probe, random context",
    "vote-only-random": "vote alone, random context",
}
"""Method -> label, in the order of the tables; other methods follow by name."""


def method_label(method: str) -> str:
    """The label of a method; its own name where it has none."""
    return METHOD_LABELS.get(method, method)


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
        "probe",
        "inflow",
        "canon",
        "vote-only",
        "probe-kind",
        "opsa",
        "lmsi",
        "ttrl",
        "intuitor",
    )
    """Rows of the tables. nopsd is N-OPSD as published, probe the same with our probe, probe-kind its control with
    contexts that are random within the kind; opsa has no teacher. probe-random and vote-only-random complete the
    2 x 2 of filter and context."""
    sources: tuple[str, ...]
    """Training questions of each domain: a bundled set, or NAME=QUESTIONS."""
    targets: tuple[str, ...] = ()
    """Test questions of each domain, in the same form; default: the sources (bundled sets are split)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds. All cells of a source share its rollouts; all evaluations share their sampling seeds."""
    more_seeds: tuple[int, ...] = ()
    """Further training seeds of the methods in --more-seeds-for."""
    more_seeds_for: tuple[str, ...] = ("nopsd", "probe", "inflow", "lmsi")
    """Methods that are also trained with --more-seeds."""
    evaluation_seeds: tuple[int, ...] = (0,)
    """Sampling seeds of the evaluations. Every model is evaluated once per seed and the tables average over them, so
    that no claim rests on one draw of the rollouts; a seed added later repeats no evaluation."""
    jobs: Annotated[int, Shapes.RESOURCES, AtLeast(1)] = 1
    """Cells that run at the same time and share the CPU's threads; each has a GPU of its own where there are as many
    (CUDA_VISIBLE_DEVICES is respected). Keep one value per grid: last bits depend on it."""
    control_temperatures: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Candidates of the temperature control."""
    learning_rates: tuple[Annotated[float, Above0], ...] = ()
    """Factors on each method's learning rate. Every method is trained with each of them in every one of
    --tuning-sources, and judged on the source's development questions after half of its steps and at the end; the pair
    with the best mean Avg@K is the method's in the whole grid. Default: the learning rate as it is, all steps."""
    tuning_sources: tuple[str, ...] = ()
    """Domains of --sources in which learning rates are tried; default: all."""
    dev: tuple[str, ...] = ()
    """Labelled development questions that choose temperature and learning rates, given like --sources; default: of the
    bundled targets and sources."""
    allow_difference: tuple[str, ...] = ()
    """Options, other than temperature, seed and adapter, in which the evaluations of a target may differ."""
    export: Fixed[dict[str, Any]] = field(default_factory=dict)
    train: Fixed[dict[str, Any]] = field(default_factory=dict)
    evaluate: Fixed[dict[str, Any]] = field(default_factory=dict)
    methods_train: Fixed[dict[str, dict[str, Any]]] = field(default_factory=dict)


SMALL: Options = {
    **{"learning_rate": 5e-4, "warmup_steps": 3, "lora_r": 16, "lora_alpha": 32},
    **{"questions_per_step": 8, "num_generations": 2, "max_new_tokens": 24},
}
"""What of a published training is made for models of billions of parameters, as this project's defaults have it."""
STRUCTURED: Options = {
    "instruction": "Give key words, then the method in one sentence, and end with one line: Answer: <answer>",
    "choice_instruction": "Give key words, then the method in one sentence and the option's text, and end with one "
    "line: Answer: <letter>",
}
"""INFLOW's form of a response, in our words."""
PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {
        "model": "smollm2-135m",
        "sources": ("geography", "language", "chemistry"),
        "learning_rates": (0.3, 1.0, 3.0),
        "tuning_sources": ("geography",),
        "train": {"steps": 20},
        "evaluate": {"limit": 100},
        "methods_train": {  # 320 rollouts each, so that all sample as many tokens; lmsi learns from the export's
            **{name: {**SMALL, "steps": 40, "num_generations": 1} for name in ("nopsd", "inflow")},
            "canon": SMALL,
            "ttrl": {
                **{"learning_rate": 2e-4, "num_generations": 4, "questions_per_step": 4, "vote_generations": 8},
                "steps": 10,
            },
            "intuitor": {"learning_rate": 5e-5, "num_generations": 4, "questions_per_step": 4},
        },
    },
    "paper": {
        "model": "Qwen/Qwen3-4B",
        "sources": file_options("paper", tuple(PROTOCOLS["paper"]), "train"),
        "targets": file_options("paper", tuple(PROTOCOLS["paper"]), "test"),
        "dev": file_options("paper", tuple(PROTOCOLS["paper"]), "dev"),
        "control_temperatures": (0.3, 0.6, 0.8),
        "export": {  # the prompts also for the methods whose export has a preset of its own
            **{"preset": "qwen3-4b", "student_thinking": False},
            **{name: QWEN3_4B[name] for name in ("instruction", "choice_instruction", "max_new_tokens")},
        },
        "train": {"preset": "qwen3-4b"},
        "evaluate": {"preset": "qwen3-4b"},
        "methods_train": {
            "ttrl": {"num_generations": 8, "questions_per_step": 4, "vote_generations": 16, "learning_rate": 5e-7},
            "intuitor": {"num_generations": 8, "questions_per_step": 4, "learning_rate": 3e-6},
        },
    },
    "inflow": {
        "model": "Qwen/Qwen3-4B",
        "methods": ("full", "redundancy", "consistency", "nopsd", "mutual", "inflow"),
        "sources": file_options("inflow", (OVERALL,), "train"),
        "targets": file_options("inflow", (OVERALL, *PROTOCOLS["inflow"]), "test"),
        "dev": file_options("inflow", (OVERALL,), "dev"),
        "export": {**STRUCTURED, "max_new_tokens": 256, "student_thinking": False},
        "evaluate": {
            **{**STRUCTURED, "max_new_tokens": 2048, "eval_thinking": False},
            **{"num_generations": 3, "temperature": 0.6, "top_p": 0.95},
        },
    },
}
"""``paper`` and ``inflow`` are the published protocols, on the files of `figures.protocols`."""
