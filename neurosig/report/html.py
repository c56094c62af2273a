"""The report as one self-contained page: no script, no network, model text escaped and made visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from neurosig.report.data import Layer, LevelData
from neurosig.report.signal_table import DISGUISE, SignalRow
from neurosig.report.words import MEANING
from neurosig.runtime.cli import visible

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Table:
    """A signals table and the scales of its drawings.

    Attributes:
        rows: Its lines.
        sample: The number of its rows, and what is left out and why.
        confounders: Names of the correlations.
        low: Left end of the AUROC scale, which ends at 1.
        reach: The scale of gains runs from minus to plus this.
    """

    rows: Sequence[SignalRow]
    sample: str
    confounders: tuple[str, ...]
    low: float
    reach: float


@dataclass(frozen=True, slots=True)
class LayerChart:
    """Bars by layer: ``up`` above or below the zero line by sign, ``down`` below it; ``colour`` is by sign if empty."""

    title: str
    up: Sequence[int | float]
    down: Sequence[int]
    colour: str = ""


def table_of(rows: Sequence[SignalRow], level: LevelData, sample: str) -> Table:
    """The table, with scales that fit every interval except the gains of the vote share."""
    aurocs = [row.auroc.low for row in rows if row.auroc is not None]
    others = [row for row in rows if row.signal.name != "vote_share"]  # its gain would dwarf the others
    gains = [gain.auroc for row in others for gain in (row.over_vote, row.over_outputs) if gain is not None]
    reach = max([0.01, *(abs(end) for gain in gains for end in (gain.low, gain.high))])
    return Table(rows, sample, tuple(level.confounders), min([0.4, *aurocs]), reach)


def layer_charts(layers: Sequence[Layer]) -> list[LayerChart]:
    """Probe neurons per layer, their contributions, and how these differ between split and agreeing questions."""
    nothing = [0] * len(layers)
    charts = [
        LayerChart(
            "Probe neurons by layer: up, to hallucination; down, to trust",
            [layer.to_hallucination for layer in layers],
            [layer.to_trust for layer in layers],
        ),
        LayerChart(
            "Mean contribution of an active neuron by layer", [layer.contribution for layer in layers], nothing, "plain"
        ),
    ]
    differences = [layer.difference for layer in layers if layer.difference is not None]
    if len(differences) == len(layers):
        title = "Contribution on split minus on agreeing questions by layer, in standard deviations"
        charts.append(LayerChart(title, differences, nothing))
    return charts


def render(page: Mapping[str, Any]) -> str:
    """The page; ``page`` holds the variables of the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible_value,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["signed"] = "{:+.3f}".format
    environment.filters["meaning"] = lambda name: MEANING.get(str(name), "")
    environment.filters["spoken"] = lambda name: name.replace("_", " ")
    environment.filters["within"] = lambda value, low, high: min(max(value, low), high)
    return environment.get_template(TEMPLATE).render(page, disguise=f"{DISGUISE:g}")


def _visible_value(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
