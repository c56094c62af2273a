"""Time and memory of the divergence alone, against its GEMM floor and TRL; printed, never asserted (``make bench``)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.bench
WAYS = {
    "ours": "ours, whole vocabulary",
    "ours_topk": "ours, top-100 and tail",
    "trl_full": "TRL SDFT, full logits",
    "trl_topk": "TRL SDFT, top-100 and tail",
    "trl_chunked": "TRL Distillation, chunked",
}


def test_divergence_against_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 tokens, 49,152 entries, width 576, forward and backward; each implementation in its own process."""
    lines = []
    for way, name in WAYS.items():
        command = [sys.executable, "-m", "tests.benchmarks.divergence_variants", way]
        result = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
        )
        ratio = result["seconds"] / result["floor"]
        lines.append(f"| {name} | {result['seconds']:.1f} s | {ratio:.2f}x | +{result['peak_mb']:.0f} MB |")
    with capsys.disabled():
        print("\n| divergence of 1,024 tokens | time | of the GEMM floor | peak memory |\n|---|---|---|---|")
        print("\n".join(lines))
