"""Draw the project's figures: ``python -m figures [NAME ...] --results DIR``."""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from neurosig.cli import CommonConfig, run_command
from neurosig.errors import UserError

logger = logging.getLogger(__name__)

FIGURES = (
    "before_after",
    "clusters",
    "context_policies",
    "dose_response",
    "findings",
    "gap_gain",
    "hallucination_sign",
    "methods",
    "organism",
    "overview",
    "paper_tables",
    "planted_neurons",
    "reliability",
    "signal_search",
    "speed",
    "training_curves",
)


@dataclass(kw_only=True)
class FiguresConfig(CommonConfig):
    """Draw figures from a results folder, as PDF and PNG with the plotted numbers as CSV."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Figures to draw; by default all whose results are there."""
    results: Path = Path("runs/demo")
    """Folder of evaluations and report, as make demo writes it."""
    out: Path | None = None
    """Folder of the figures; default: RESULTS/figures."""


def main(config: FiguresConfig) -> None:
    """Draw what ``config`` names."""
    unknown = [name for name in config.names if name not in FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]}: no such figure; have {', '.join(FIGURES)}")
    out = config.results / "figures" if config.out is None else config.out
    for name in config.names or FIGURES:
        figure = importlib.import_module(f"figures.{name}")
        lacking = None if config.names else figure.NEEDS
        if lacking is not None and not (config.results / lacking).is_file():
            logger.info("%s: left out, there is no %s", name, config.results / lacking)
            continue
        for path in figure.draw(config.results, out):
            logger.info("%s", path)


if __name__ == "__main__":
    sys.exit(run_command(FiguresConfig, main, presets={}, prog="python -m figures"))
