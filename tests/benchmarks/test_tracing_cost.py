"""Time and memory of tracing against a plain forward pass and other ways. Run with ``make bench``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.bench, pytest.mark.smollm2]


def measured(script: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.benchmarks.{script}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]


def test_tracing_against_other_ways(capsys: pytest.CaptureFixture[str]) -> None:
    """32 rollouts x 192 tokens in batches of 8: each way in its own process, its second pass timed."""
    ways = [
        ("plain forward with logits", "plain", 4),
        ("neurosig, 8 rollouts per prompt", "ours", 4),
        ("neurosig, 1 rollout per prompt", "ours", 32),
        ("nnsight, save everything", "nnsight_save", 4),
        ("TransformerBridge cache", "transformer_bridge", 4),
        ("H-Neurons' way, one by one", "h_neurons", 4),
        ("NeuFS' way, one by one", "neufs", 4),
    ]
    results = [(name, json.loads(measured("tracing_variants", way, str(n)))) for name, way, n in ways]
    baseline = results[0][1]["seconds"]
    with capsys.disabled():
        print("\n| tracing 32 x 192 tokens | time | ratio | peak memory |\n|---|---|---|---|")
        for name, result in results:
            ratio = result["seconds"] / baseline
            print(f"| {name} | {result['seconds']:.1f} s | {ratio:.2f}x | +{result['peak_mb']:.0f} MB |")


def test_memory_is_flat_in_the_number_of_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (float(measured("memory_of_tracing", n)) for n in ("200", "2000"))
    with capsys.disabled():
        print(f"\npeak memory of tracing: 200 rollouts {few:.0f} MB, 2,000 rollouts {many:.0f} MB ({many / few:.3f}x)")
