"""The cells of a dose-response experiment: each neuron set at each factor, sampled, measured and kept on disk.

Doses may be widened while the experiment runs: the largest factor is multiplied until the located neurons break the
generation, so that an effect on accuracy, or its absence, is seen at doses that act at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from neurosig.intervene.dose_response import MEASURES, Cell, broken, measure
from neurosig.intervene.interventions import NeuronSet, completion_nll, scale_neurons
from neurosig.runtime.cli import PhaseTimer, progress
from neurosig.runtime.files import write_atomic
from neurosig.statistics.significance import planned_mde

if TYPE_CHECKING:
    from neurosig.intervene.__main__ import InterveneConfig
    from neurosig.models.load import LoadedModel
    from neurosig.neurons.nnsight_reader import NeuronScaler
    from neurosig.questions.load import Question
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt

logger = logging.getLogger(__name__)

WIDEN_BY = 4.0
"""Each further dose is this many times the one before."""
CORRELATION = 0.85
"""Of the chances of a right sample with and without the intervention, in the cautious of the two stated powers."""


def run_cells(
    config: InterveneConfig,
    folder: Path,
    loaded: LoadedModel,
    scaler: NeuronScaler,
    sets: Sequence[NeuronSet],
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    timer: PhaseTimer,
) -> tuple[list[Cell], dict[str, float]]:
    """Sample and measure each set at each factor; the unscaled model comes first, its samples are the reference.

    Returns:
        The cells, and the smallest detectable change of accuracy (`detectable`), logged before any neuron is scaled.
    """
    folder.mkdir(exist_ok=True)
    reference: dict[str, list[Rollout]] = {}
    cells: list[Cell] = []
    power: dict[str, float] = {}
    total = (1 + len(sets) * sum(factor != 1 for factor in config.factors)) * len(questions)
    with progress(total=total, desc="intervene", quiet=config.quiet) as bar:
        for neurons, factor in _planned(config, sets, cells):
            path = folder / f"{'unscaled' if neurons is None else f'{neurons.name}-x{factor:g}'}.json"
            if not path.exists():
                model = loaded if neurons is None else scale_neurons(loaded, scaler, neurons.ids, factor)
                groups = _sample(config, model, prompts, bar, timer)
                _write_cell(path, config, model, questions, prompts, groups, reference or groups, timer)
            else:
                bar.update(len(questions))
            groups, rows = _read_cell(path)
            reference = reference or groups
            values = {name: np.array([rows[question.id][name] for question in questions]) for name in MEASURES}
            cells.append(Cell(neurons, factor, values))
            if neurons is None:
                power = detectable(values["avg_at_k"], config.num_generations)
                logger.info(
                    "power 80%%: a paired change of accuracy of %.3f (both find the same questions hard) to %.3f "
                    "(correlation %.2f) can be told with %d questions and K=%d",
                    power["same"], power["correlated"], CORRELATION, len(questions), config.num_generations,
                )  # fmt: skip
    return cells, power


def _planned(
    config: InterveneConfig, sets: Sequence[NeuronSet], cells: Sequence[Cell]
) -> Iterator[tuple[NeuronSet | None, float]]:
    """The unscaled model, every set at every factor, then further doses until `_broken`."""
    yield None, 1.0
    factors = [factor for factor in config.factors if factor != 1]
    for factor in factors:
        yield from ((neurons, factor) for neurons in sets)
    largest = max(max(factors), 1.0)
    while config.widest is not None and largest * WIDEN_BY <= config.widest and not _broken(cells, largest):
        largest *= WIDEN_BY
        yield from ((neurons, largest) for neurons in sets)


def _broken(cells: Sequence[Cell], factor: float) -> bool:
    """Whether the located neurons at this factor break the generation."""
    unscaled, found = cells[0].values["nll"].mean(), False
    for cell in cells[1:]:
        if cell.neurons is not None and cell.neurons.group == "located" and cell.factor == factor:
            found |= broken(float(cell.values["no_answer"].mean()), float(cell.values["nll"].mean() - unscaled))
    return found


def detectable(right: Float[np.ndarray, " questions"], k: int) -> dict[str, float]:
    """Smallest paired change of Avg@K that these questions show with 80% power, from the unscaled model alone.

    Args:
        right: Share of right samples of each question.
        k: Samples per question; with one, questions are taken to be always right or always wrong.

    Returns:
        ``same``: where the intervention finds the same questions hard; ``correlated``: at `CORRELATION`.
    """
    accuracy = float(right.mean())
    within = 0.0 if k == 1 else float((right * (1 - right)).mean()) * k / (k - 1)
    spread = max(0.0, accuracy * (1 - accuracy) - within)
    return {
        name: planned_mde(len(right), k, correlation=correlation, accuracy=accuracy, spread=spread)
        for name, correlation in (("same", 1.0), ("correlated", CORRELATION))
    }


def _sample(
    config: InterveneConfig, loaded: LoadedModel, prompts: Sequence[Prompt], bar: Any, timer: PhaseTimer
) -> dict[str, list[Rollout]]:
    from neurosig.sampling.sampler import sample

    groups = {}
    sampling, decoding = config.sampling_config(), config.decoding()
    with timer.phase("sample"):
        for group in sample(loaded, prompts, sampling, **decoding, salt="intervene"):
            groups[group[0].question_id] = group
            bar.update()
    return groups


def _write_cell(
    path: Path,
    config: InterveneConfig,
    loaded: LoadedModel,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    groups: Mapping[str, Sequence[Rollout]],
    reference: Mapping[str, Sequence[Rollout]],
    timer: PhaseTimer,
) -> None:
    with timer.phase("perplexity"):
        first = {name: group[: config.reference_rollouts] for name, group in reference.items()}
        nll = completion_nll(loaded, prompts, first)
    reader = config.answer_reader(loaded)
    content = {
        "measures": {
            question.id: measure(question, groups[question.id], nll[question.id], reader) for question in questions
        },
        "rollouts": {question.id: [asdict(rollout) for rollout in groups[question.id]] for question in questions},
    }
    write_atomic(path, json.dumps(content, ensure_ascii=False) + "\n")


def _read_cell(path: Path) -> tuple[dict[str, list[Rollout]], dict[str, dict[str, float]]]:
    from neurosig.sampling.rollouts import parse_rollout

    content = json.loads(path.read_text(encoding="utf-8"))
    groups = {name: [parse_rollout(fields) for fields in group] for name, group in content["rollouts"].items()}
    return groups, content["measures"]
