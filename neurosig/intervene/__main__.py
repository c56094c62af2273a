"""Scale the located neurons and measure how the answers change: the causal check of an export.

    python -m neurosig.intervene --manifest runs/demo/manifest --questions world-facts --out runs/demo/intervene

A probe finds neurons that correlate with guessing, not whether they cause it. The neurons of a manifest's
``neurons.csv`` are multiplied by each factor during generation, through nnsight, and the answers to labelled questions
are measured. Controls are the same number of neurons in the same layers: random ones (``layer``), random ones that
contribute as much (``activity``), and the largest contributors (``strongest``), which show whether so few neurons can
move the model at all. H-Neurons (arXiv 2512.01797) scales its neurons alike; the controls are a
reconstruction.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from neurosig.options import QWEN3_4B, QWEN3_4B_THINKING, EvalOptions
from neurosig.runtime.cli import PhaseTimer, config_record, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.folder import run_in_folder
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np

    from neurosig.exported import Exported
    from neurosig.intervene.interventions import NeuronSet
    from neurosig.manifest import Manifest
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.sites import FFNSites
    from neurosig.questions.load import Question

logger = logging.getLogger(__name__)

RESULTS, TABLE, PLAN, CELLS = "results.json", "results.csv", "plan.json", "cells"


@dataclass(kw_only=True)
class InterveneConfig(EvalOptions):
    """Scale a manifest's neurons during generation and measure how the answers change.

    Writes results.csv (change with the factor, against the unscaled model and against the controls), results.json
    (what was run) and cells/ (samples and measures of every neuron set at every factor).
    """

    manifest: Annotated[Path, Section.QUESTIONS]
    """Folder of neurosig.export; its neurons.csv names the neurons, signals.safetensors their contributions."""
    questions: tuple[str, ...]
    """Labelled questions: bundled set (optionally :train, :dev, :test), file, folder or hf:ORG/NAME[/SET]."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the results."""
    model: str | None = None
    """Hub id, folder, GGUF file or embedded name; default: the manifest's model."""
    adapter: Path | None = None
    """Folder of a distill.train run, its adapter/ or one of its checkpoints/step-N; default: the manifest's adapter."""
    split: Literal["train", "dev", "test", "all"] = "dev"
    """Split of the bundled sets that name none."""
    limit: int | None = None
    """Use only the first N questions."""
    table: Annotated[Path | None, Section.NEURONS] = None
    """CSV of neurons (layer, index, weight) to use instead of the manifest's, such as report/located_neurons.csv."""
    neurons: Literal["positive", "negative", "all"] = "positive"
    """Sign of the probe's weight: positive points to guessing."""
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Factors on the neurons' values; the unscaled model (1) is always measured."""
    widest: float | None = None
    """Widen the doses: multiply the largest factor by 4 until the located neurons break the generation (half of the
    samples without an answer, or ten times the perplexity), at most to this factor. Few neurons need large ones."""
    controls: int = 3
    """Random draws per kind of control, at least 1."""
    matching: tuple[Literal["layer", "activity"], ...] = ("layer", "activity")
    """Random controls: from the same layers, or from the same layers with a similar mean contribution."""
    reference_rollouts: int = 1
    """Rollouts of the unscaled model per question whose perplexity is measured, at least 1."""
    strongest: bool = True
    """Also scale the same number of the layers' largest contributors."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue an interrupted run; leave a finished one unchanged."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, valid, expected in (
            ("--controls", self.controls >= 1, "at least 1"),
            (
                "--reference-rollouts",
                1 <= self.reference_rollouts <= self.num_generations,
                "1 to --num-generations",
            ),
            ("--matching", len(set(self.matching)) == len(self.matching), "each kind once"),
            ("--factors", any(factor != 1 for factor in self.factors), "a factor other than 1"),
            ("--factors", len(set(self.factors)) == len(self.factors), "each factor once"),
            ("--factors", all(abs(factor) < 1e6 for factor in self.factors), "finite numbers"),
            ("--widest", self.widest is None or max(self.factors) <= self.widest < 1e6, "at least the largest factor"),
        ):
            if not valid:
                raise UserError(f"{flag}: expected {expected}")


PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {},
    "qwen3-4b": {**QWEN3_4B, "eval_thinking": False},
    "qwen3-4b-thinking": {**QWEN3_4B_THINKING, "eval_thinking": True},
}


def main(config: InterveneConfig) -> None:
    """Run the dose-response experiment described by ``config``."""
    run_in_folder(config, _intervene, finished=RESULTS, owned=(RESULTS, TABLE, PLAN, CELLS))


def _intervene(config: InterveneConfig, timer: PhaseTimer) -> None:
    from neurosig.exported import Exported
    from neurosig.intervene.cells import run_cells
    from neurosig.intervene.dose_response import dose_response, milestones
    from neurosig.neurons.nnsight_reader import NeuronScaler
    from neurosig.neurons.sites import ffn_sites
    from neurosig.questions.prompts import PromptBuilder
    from neurosig.sampling.sampler import Prompt

    questions = _questions(config)
    with timer.phase("load"):
        exported = Exported(config.manifest)
        manifest = exported.manifest
        loaded = _load(config, manifest)
        sites = ffn_sites(loaded.model)
        _warn_of_known_questions(questions, manifest)
        sets, contributions = _neuron_sets(config, exported, sites)
        scaler = NeuronScaler(loaded.model, sites)
    builder = PromptBuilder(loaded.tokenizer, config.prompt_config())
    prompts = [Prompt(question.id, builder.student(question)) for question in questions]
    _write_plan(config, manifest, loaded, questions, sets)
    cells, power = run_cells(config, config.out / CELLS, loaded, scaler, sets, questions, prompts, timer)
    with timer.phase("summarise"):
        rows = dose_response(cells, seed=config.seed)
        reached = milestones(rows)
    found = {"rows": rows, "power": power, "milestones": reached}
    _write(config, manifest, loaded, sets, contributions, found, timer)
    _report(rows)
    for sentence in reached:
        logger.info("%s", sentence)


def _questions(config: InterveneConfig) -> list[Question]:
    from neurosig.questions.load import load_questions

    questions = load_questions(config.questions, split=config.split, limit=config.limit, fields=config.fields)
    for question in questions:
        if question.answer is None:
            raise UserError(
                f'question "{question.id}" (line {question.line}) has no answer; accuracy needs gold answers'
            )
    if len(questions) < 2:
        raise UserError(f"{len(questions)} question; an interval needs at least 2")
    return questions


def _load(config: InterveneConfig, manifest: Manifest) -> LoadedModel:
    """The model to intervene on. It must have the manifest's architecture; other weights cause a warning."""
    from neurosig.models.load import load_model

    header = manifest.header.model
    name = str(header["id"]) if config.model is None else config.model
    where: Any = {"dtype": config.dtype, "device": config.device, "template": config.template}
    loaded = load_model(name, **where, adapter=manifest.header.adapter(config.adapter))
    if loaded.info.config_sha256 != header.get("config_sha256"):
        raise UserError(
            f"model {name}: not the architecture of the manifest's model ({header['id']}), so its neurons differ"
        )
    if (loaded.info.weights, loaded.info.adapter) != (header["weights"], header.get("adapter")):
        logger.warning("model %s: its weights differ from those the neurons were located in (%s)", name, header["id"])
    return loaded


def _warn_of_known_questions(questions: Sequence[Question], manifest: Manifest) -> None:
    located_on = {row.text_sha256 for row in manifest.rows}
    known = sum(question.text_sha256 in located_on for question in questions)
    if known:
        logger.warning("%d of %d questions are among those the neurons were located on", known, len(questions))


def _neuron_sets(config: InterveneConfig, exported: Exported, sites: FFNSites) -> tuple[list[NeuronSet], np.ndarray]:
    """The located neurons and their controls, and every neuron's mean contribution."""
    import numpy as np

    from neurosig.intervene.interventions import (
        NeuronSet,
        activity_matched,
        choose_neurons,
        layer_matched,
        mean_contributions,
        strongest,
    )
    from neurosig.manifest import NEURONS

    table = config.manifest / NEURONS if config.table is None else config.table
    located, every = choose_neurons(table, sites, config.neurons)
    contributions = mean_contributions(exported.signals)
    sets = [NeuronSet("located", 0, tuple(located))]
    for kind in config.matching:
        for draw in range(config.controls):
            rng = np.random.default_rng([config.seed, draw])
            drawn = (
                layer_matched(located, every, sites, rng)
                if kind == "layer"
                else activity_matched(located, every, contributions, sites, rng)
            )
            sets.append(NeuronSet(kind, draw, tuple(drawn)))
    if config.strongest:
        sets.append(NeuronSet("strongest", 0, tuple(strongest(located, every, contributions, sites))))
    return sets, contributions


def _write_plan(
    config: InterveneConfig,
    manifest: Manifest,
    loaded: LoadedModel,
    questions: Sequence[Question],
    sets: Sequence[NeuronSet],
) -> None:
    """Everything that determines the cells; a resumed run must have the same."""
    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.provenance import check_same_run

    plan = {
        "manifest": manifest.header.content_sha256,
        "model": loaded.info.as_dict(),
        "prompts": config.prompt_config().as_dict(),
        "sampling": config.sampling_config().as_dict(),
        "answers": config.answer_reader(loaded).record(),
        "reference_rollouts": config.reference_rollouts,
        "questions": [[question.id, question.text_sha256] for question in questions],
        "neurons": {neurons.name: list(neurons.ids) for neurons in sets},
        "factors": [*config.factors, *([] if config.widest is None else [f"to {config.widest:g}"])],
    }
    path = config.out / PLAN
    if path.exists():
        check_same_run(config.out, json.loads(path.read_text(encoding="utf-8")), plan)
    write_atomic(path, json.dumps(plan) + "\n")


def _write(
    config: InterveneConfig,
    manifest: Manifest,
    loaded: LoadedModel,
    sets: Sequence[NeuronSet],
    contributions: np.ndarray,
    found: Mapping[str, Any],
    timer: PhaseTimer,
) -> None:
    import csv
    import io

    from neurosig.intervene.dose_response import MEASURES
    from neurosig.runtime.files import write_atomic
    from neurosig.runtime.provenance import run_record

    table, rows = io.StringIO(), found["rows"]
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(config.out / TABLE, table.getvalue())
    record = {
        **found,
        "measures": dict(MEASURES),
        "sets": {
            neurons.name: {
                "neurons": len(neurons.ids),
                "mean_contribution": float(contributions[list(neurons.ids)].mean()),
            }
            for neurons in sets
        },
        "k": config.num_generations,
        "manifest_sha256": manifest.header.content_sha256,
        "model": loaded.info.as_dict(),
        "config": config_record(config),
        "seconds": {phase: round(seconds, 1) for phase, seconds in timer.seconds.items()},
        "run": run_record(),
    }
    write_atomic(config.out / RESULTS, json.dumps(record, indent=1) + "\n")


def _report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Log what the located neurons do to accuracy, and how that differs from the controls."""
    from neurosig.statistics.metrics import format_interval

    for row in rows:
        if row["measure"] != "avg_at_k" or "change" not in row:
            continue
        line = f"{row['group']} x{row['factor']:g}: accuracy {row['value']:.3f}"
        for name, text in (("change", "against unscaled"), ("difference", "located minus these")):
            if name in row:
                interval = format_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], "+.3f")
                line += f", {interval} {text}"
        logger.info("%s (n=%d)", line, row["n"])


if __name__ == "__main__":
    sys.exit(run_command(InterveneConfig, main, presets=PRESETS, prog="python -m neurosig.intervene"))
