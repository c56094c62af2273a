"""What a learning rate does to the divergence from the teacher and to development accuracy.

    python -m tests.benchmarks.learning_rates --manifest runs/demo/manifest --out runs/rates --dev world-facts:dev

The loss, the adapter and the dtype are those of the 4B preset, on a model that a CPU can train; a rate that suits a
small model is an upper bound for a large one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from distill.config import PRESETS, TrainConfig
from distill.train import main as train


@dataclass(kw_only=True)
class Options:
    """What to sweep."""

    manifest: Path
    """Folder written by neurosig.export."""
    out: Path
    """Folder of the runs."""
    dev: str | None = None
    """Labelled development questions."""
    rates: tuple[float, ...] = (2.5e-6, 5e-6, 2e-5, 1e-4, 5e-4)
    """Learning rates."""
    steps: int = 40
    """Optimizer steps."""
    questions: int = 8
    """Questions per step, one rollout each."""
    dtype: str = "bfloat16"
    """Dtype of the weights."""


def main(options: Options) -> None:
    print(
        "| learning rate | divergence, first 5 steps | last 5 steps | sampler_kl, largest | dev maj@8 before | after |"
    )
    print("|---|---|---|---|---|---|")
    for rate in options.rates:
        out = options.out / f"{rate:g}"
        preset: dict[str, Any] = {**PRESETS["qwen3-4b"], "micro_batch_size": 8, "learning_rate": rate}
        preset |= {"steps": options.steps, "questions_per_step": options.questions, "save_steps": options.steps}
        preset |= {"dev_questions": options.dev, "dev_limit": 48, "keep_step": "last", "dtype": options.dtype}
        train(TrainConfig(manifest=options.manifest, out=out, quiet=True, resume=True, **preset))
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        divergence = [step["divergence"] for step in steps if step["divergence"] is not None]
        cells = [f"{rate:g}", *(f"{np.mean(part):.4f}" for part in (divergence[:5], divergence[-5:]))]
        cells.append(f"{max(abs(step['sampler_kl'] or 0.0) for step in steps):.4f}")
        if options.dev is not None:
            measured = [json.loads(line) for line in (out / "development.jsonl").read_text().splitlines()]
            cells += [f"{entry['maj_at_k']:.3f}" for entry in (measured[0], measured[-1])]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
