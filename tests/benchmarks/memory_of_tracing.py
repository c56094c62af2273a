"""Trace N rollouts of 24 tokens through the embedded model into shards; prints the peak resident memory in MB."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from neurosig.models.load import load_model
from neurosig.neurons.signals_file import trace_to_shards
from neurosig.neurons.tracer import NeuronTracer
from tests.benchmarks.resident import resident_mb


def main(n: int) -> None:
    loaded = load_model("smollm2-135m")
    ids = torch.randint(1000, 40_000, (n, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = [(row[:16], row[16:], range(8)) for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        trace_to_shards(NeuronTracer(loaded.model), rollouts, Path(folder), str(loaded.info.weights))
    print(resident_mb("VmHWM"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
