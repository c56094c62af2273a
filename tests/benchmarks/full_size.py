"""Export and one training step at a model's full size, with random weights: does it fit, and what does it take?

    python -m tests.benchmarks.full_size --out runs/full-size

Qwen3-4B's configuration in bfloat16: a folder of 8 GB is written, and removed at the end. No download, no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from tests.benchmarks.shapes import random_model
from tests.support.flow import write_questions
from tests.support.paths import ROOT
from tests.support.tiny import tiny_tokenizer


@dataclass(kw_only=True)
class Options:
    """What to try."""

    out: Path
    """Folder of the model and of what the commands write."""
    shape: str = "qwen3-4b"
    """Model shape: tiny, qwen3-0.6b, qwen3-4b."""
    questions: int = 2
    """Questions, all of which are trained on."""
    k: int = 2
    """Rollouts per question at export."""
    tokens: int = 8
    """Tokens per rollout."""
    preset: str = "qwen3-4b"
    """Preset of distill.train."""


def main(options: Options) -> None:
    model, manifest = options.out / "model", options.out / "manifest"
    options.out.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        start = time.perf_counter()
        random = random_model(options.shape, "cpu", torch.bfloat16)
        assert random.generation_config is not None
        random.generation_config.eos_token_id = list(range(0, random.config.vocab_size, 8))  # or no rollout would end
        random.save_pretrained(model)
        del random
        tiny_tokenizer().save_pretrained(model)
        print(f"{options.shape}: random weights written in {time.perf_counter() - start:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
    questions = write_questions(options.out / "questions.jsonl", options.questions)
    common = ["--max-new-tokens", str(options.tokens), "--dtype", "bfloat16", "--device", "cpu", "--overwrite"]
    commands = {
        "neurosig.export": ["--model", str(model), "--questions", str(questions), "--out", str(manifest), *common,
                            "--num-generations", str(options.k), "--question-filter", "all", "--temperature", "1",
                            "--keep-truncated", "--num-demonstrations", "1", "--context-policy", "random",
                            "--answer-parser", "tests.support.parsers:agreeing"],
        "distill.train": ["--manifest", str(manifest), "--out", str(options.out / "run"), *common,
                          "--preset", options.preset, "--steps", "1", "--keep-truncated"],
    }  # fmt: skip
    print(f"| command | seconds | peak of this process (GB), weights {size:.1f} |\n|---|---|---|")
    for module, arguments in commands.items():
        seconds, peak = _run([sys.executable, "-m", module, *arguments])
        print(f"| {module} | {seconds:.0f} | {peak:.1f} |", flush=True)
    print((options.out / "run" / "metrics.jsonl").read_text().strip())
    shutil.rmtree(model)


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in GB; the command's own messages pass through."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command[2]} ended with {code}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main(tyro.cli(Options))
