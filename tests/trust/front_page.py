"""Run the commands of the README from top to bottom, in a fresh clone and an empty environment, and time them.

    TORCH="torch --index-url https://download.pytorch.org/whl/cpu" python -m tests.trust.front_page

Commands that need a hub's model, a GPU or questions of the reader's, and those that run until they are closed, are
named and left out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.pages import README
from tests.support.paths import ROOT

LEFT_OUT = ("git clone", "Qwen/", "qwen3-4b", "mine.jsonl", "jupyterlab", "make test")


def blocks() -> Iterator[tuple[str, str]]:
    """Language and text of the README's blocks; a shell block gives one text per command."""
    for language, text in re.findall(r"```(sh|python)\n(.*?)```", README, flags=re.DOTALL):
        lines = text.replace("\\\n", " ").splitlines() if language == "sh" else [text]
        yield from ((language, re.sub(r"\s+# .*", "", line) if language == "sh" else line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", action="store_true", help="run make test too (25 minutes)")
    options = parser.parse_args()
    left_out = LEFT_OUT[:-1] if options.tests else LEFT_OUT
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "VENV")}
    failed, begun = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "neurosig"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environ |= {"PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        for language, text in blocks():
            title = text.strip().partition("\n")[0][:90]
            if any(part in text for part in left_out):
                print(f"{'left out':>10}  {title}", flush=True)
                continue
            start = time.perf_counter()
            words = ["bash", "-c", text] if language == "sh" else [str(clone / ".venv" / "bin" / "python"), "-c", text]
            done = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True)
            print(f"{time.perf_counter() - start:8.0f} s  {title}", flush=True)
            if done.returncode:
                failed += 1
                print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    print(f"front page: {failed} commands failed, {time.perf_counter() - begun:.0f} s in all")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
