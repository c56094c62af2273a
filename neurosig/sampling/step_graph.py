"""Decoding steps captured as CUDA graphs: one launch per token instead of one per kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Steps that run as they are before one is captured, so that every library is loaded and every kernel chosen."""


class StepGraph:
    """Captures a step whose shapes and addresses stay as they are, and replays it.

    Without CUDA, and where the model's forward pass cannot be captured, every step runs as it is; a note says so once.
    """

    def __init__(self, device: torch.device):
        self._captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)
        self._version, self._seen = -1, 0
        if not self._captures:
            logger.info("--compile-decoding: no CUDA graphs on %s, so it saves no time here", device.type)

    def run(self, step: Callable[[], Tensor], version: int) -> Tensor:
        """The step's result, which the next call may overwrite.

        Args:
            step: Reads and writes tensors in place and never waits for the device.
            version: Another number than before if any of these tensors has moved.
        """
        if version != self._version:
            self._graph, self._version, self._seen = None, version, 0
        if self._graph is None and self._captures and self._seen >= WARM_UP:
            self._capture(step)
        if self._graph is None:
            self._seen += 1
            return step()
        self._graph.replay()
        return self._output

    def _capture(self, step: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those of collective operations, may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = step()
        except (RuntimeError, ValueError) as error:  # what a model's code raises where it reads a value on the host
            self._captures = False
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("--compile-decoding: this model's step cannot be captured (%s); decoding without", reason)
            return
        self._graph = graph
