"""Windows is told about WSL in one sentence; macOS needs nothing that only Linux has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

COMMANDS = [
    f"{package}.{name}".removesuffix(".")
    for package, names in {
        "neurosig": ("", "export", "check", "screen", "show", "report", "intervene", "verify"),
        "neurosig.organism": ("study", "train"),
        "distill": ("", "train", "evaluate", "merge", "rescore", "compare"),
        "figures": ("", "grid", "grid.evidence", "grid.rescore", "experiments.signal_search"),
    }.items()
    for name in names
]

WINDOWS = """
import asyncio, concurrent.futures, ctypes, importlib.metadata, json, multiprocessing, platform, runpy, shutil
import scipy.stats, signal, socket, subprocess, sys, tempfile
sys.modules["torch"] = None  # it is slow to import: the sentence comes before it
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
    sys.modules[name] = None
sys.platform = "win32"
codes = {}
for command in json.loads(sys.argv[1]):
    sys.argv = [command, "--help"]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        codes[command] = stop.code
print(json.dumps(codes))
"""


def test_windows_gets_one_sentence_that_names_wsl() -> None:
    """From every command, at once: also where only a value is wrong or help is asked for."""
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, json.dumps(COMMANDS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(COMMANDS, 2)
    assert {*done.stderr.splitlines()} == {
        "error: Windows itself is not supported: install WSL (`wsl --install`) and run this command in it"
    }
    assert done.stderr.count("\n") == len(COMMANDS)


MACOS = """
import os, pathlib, resource, sys, transformers
from tests.support.tiny import tiny_tokenizer
sys.platform = "darwin"
exists, limit, close = pathlib.Path.exists, resource.getrlimit, os.closerange
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
resource.getrlimit = lambda which: (256, 2**63 - 1)  # macOS: no limit of open files
resource.setrlimit = None  # and none of memory that it would keep
def one_by_one(low, high):
    assert high - low < 10**6, "macOS would close billions of files one by one"
    close(low, high)
os.closerange = one_by_one
from neurosig.questions.load import Question
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.runtime.cli import peak_memory_gb
from neurosig.runtime.folder import output_folder
with output_folder(pathlib.Path(sys.argv[1]), finished="done", owned=("done",), resume=False, overwrite=False):
    lock = os.open(pathlib.Path(sys.argv[1]) / ".lock", os.O_RDONLY)
    prompts = PromptBuilder(tiny_tokenizer(), PromptConfig())
    print(len(prompts.student(Question("a", "d", "Why?"))), peak_memory_gb())
"""


def test_macos_renders_locks_and_measures(tmp_path: Path) -> None:
    """Its differences are patched in: no /proc, no limit of open files and none of memory, another unit of memory."""
    done = subprocess.run(
        [sys.executable, "-c", MACOS, f"{tmp_path}/out"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    n_tokens, peak = done.stdout.split()
    assert int(n_tokens) > 20 and 0 < float(peak) < 0.01  # Linux' kilobytes, read as macOS' bytes
