"""Metrics on TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from distill.config import TrainConfig

Report = Callable[[Mapping[str, float | int]], None]
PROJECT = "neurosig"


def check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
        UserError: Naming the extra to install.
    """
    for name in config.report_to:
        if find_spec(name) is None:
            raise UserError(f"--report-to {name}: not installed; run `pip install 'neurosig[trackers]'`")


@contextlib.contextmanager
def trackers(config: TrainConfig, *, main: bool = True) -> Iterator[Report]:
    """What a step's metrics are given to; it does nothing without ``--report-to`` or off the main process.

    TensorBoard writes into the folder ``tensorboard`` of the run; wandb goes by its own environment variables
    (``WANDB_MODE=offline``, say) and names the run after its folder.
    """
    opened = []
    if main and config.report_to:
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        for name in config.report_to:
            tracker = (
                TensorBoardTracker("tensorboard", logging_dir=config.out)
                if name == "tensorboard"
                else WandBTracker(PROJECT, name=config.out.name, dir=str(config.out), resume="allow")
            )
            tracker.start()
            opened.append(tracker)

    def report(metrics: Mapping[str, float | int]) -> None:
        for tracker in opened:
            tracker.log(dict(metrics), step=int(metrics["step"]))

    try:
        yield report
    finally:
        for tracker in opened:
            tracker.finish()
