"""Draw the project's figures.

    python -m figures before_after --results runs/demo

Without a name it draws all figures whose results are there.
"""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from neurosig.runtime.cli import CommonConfig, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed

logger = logging.getLogger(__name__)

FIGURES = {
    "before_after": "figures.draw.before_after",
    "clusters": "figures.draw.clusters",
    "context_policies": "figures.experiments.context_policies",
    "dose_response": "figures.draw.dose_response",
    "findings": "figures.draw.findings",
    "gap_gain": "figures.draw.gap_gain",
    "hallucination_score": "figures.draw.hallucination_score",
    "methods": "figures.draw.methods",
    "organism": "figures.draw.organism",
    "overview": "figures.draw.overview",
    "paper_tables": "figures.draw.paper_tables",
    "planted_neurons": "figures.experiments.planted_neurons",
    "reliability": "figures.draw.reliability",
    "screening": "figures.experiments.screening",
    "selectors": "figures.experiments.selectors",
    "signal_search": "figures.experiments.signal_search",
    "speed": "figures.draw.speed",
    "training_curves": "figures.draw.training_curves",
}
"""Figure -> its module, with ``NEEDS`` (a file of the results folder, or ``None``) and ``draw(results, out)``."""


@dataclass(kw_only=True)
class FiguresConfig(CommonConfig):
    """Draw figures from a results folder, as PDF and PNG with the plotted numbers as CSV."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Figures to draw; default: all whose results exist."""
    results: Path = Path("runs/demo")
    """Results folder, as make demo writes it; some figures fall back on the numbers in figures/data."""
    out: Path | None = None
    """Folder of the figures; default: RESULTS/figures."""


def main(config: FiguresConfig) -> None:
    """Draw the figures of ``config``.

    Raises:
        UserError: A figure is unknown, or one given by name has no results.
    """
    unknown = [name for name in config.names if name not in FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]}: no such figure; have {', '.join(FIGURES)}")
    check_installed("figures", "matplotlib", "seaborn")
    out = config.results / "figures" if config.out is None else config.out
    for name in config.names or FIGURES:
        figure = importlib.import_module(FIGURES[name])
        if not config.names and figure.NEEDS is not None and not (config.results / figure.NEEDS).is_file():
            logger.info("%s: left out, there is no %s", name, config.results / figure.NEEDS)
            continue
        for path in figure.draw(config.results, out):
            logger.info("%s", path)


if __name__ == "__main__":
    sys.exit(run_command(FiguresConfig, main, presets={}, prog="python -m figures"))
