"""Time and memory of the divergence alone, beside its GEMM floor and TRL; printed, never asserted (``make bench``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
SCRIPT = Path(__file__).parent / "divergence_variants.py"
WAYS = {
    "ours": "ours, whole vocabulary",
    "ours_topk": "ours, top-100 and tail",
    "trl_full": "TRL SDFT, full logits",
    "trl_topk": "TRL SDFT, top-100 and tail",
    "trl_chunked": "TRL Distillation, chunked",
}


def test_divergence_against_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 tokens, 49,152 entries, width 576, forward and backward; each way in a process of its own."""
    lines = []
    for way, name in WAYS.items():
        command = [sys.executable, str(SCRIPT), way]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        ratio = result["seconds"] / result["floor"]
        lines.append(f"| {name} | {result['seconds']:.1f} s | {ratio:.2f}x | +{result['peak_mb']:.0f} MB |")
    with capsys.disabled():
        print("\n| divergence of 1,024 tokens | time | of the GEMM floor | peak memory |\n|---|---|---|---|")
        print("\n".join(lines))
