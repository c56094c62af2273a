"""Coverage-guided fuzzing of the readers of untrusted files: questions and manifests.

    python -m tests.trust.fuzz questions --seconds 300
    python -m tests.trust.fuzz manifest --seconds 300

libFuzzer, through atheris, keeps and changes inputs that reach new branches. For all input a reader must return records
or raise UserError; anything else is a finding, whose input is written to ``--out``. A manifest's input is split into
its files, and the hashes are made to fit, so that the search gets past them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["neurosig.manifest"]
    + [f"neurosig.questions.{name}" for name in ("columns", "formats", "load", "records", "released")]
):
    import neurosig.manifest
    import neurosig.questions.formats
    import neurosig.questions.load
    import neurosig.questions.records

from neurosig.runtime.errors import UserError
from tests.support.paths import ROOT

CUT = b"\n#####\n"
"""Between the files of a manifest."""
RECORD = {"id": "a", "domain": "d", "question": "Why?", "choices": ["x", "y"], "answer": "A", "aliases": ["B"]}
QUESTIONS = [
    RECORD,
    {"question_id": 70, "question": "Which?", "options": ["x", "N/A", "y"], "answer": "A", "answer_index": 0},
    {"question": "Q?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A", "details": {"task": "t"}},
    {"question": {"stem": "Q?", "choices": [{"text": "A. x", "label": "1"}, {"text": "B. y"}]}, "answerKey": 1},
    {"Question": "Q?", "Correct Answer": "x", **{f"Incorrect Answer {n}": f"y{n}" for n in (1, 2, 3)}},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Q?"}], "answer": ["x"]},
    {"prompt": "x or y?", "choices": "['x', 'y']", "answer": 1, "system": "s", "privileged_context": ["p"]},
]


def read_questions(folder: Path) -> Callable[[bytes], None]:
    path = folder / "set.jsonl"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        for question in neurosig.questions.load.load_questions(path):
            assert question.id.strip() and question.question.strip()
            question.text_sha256.encode()

    return one


def read_manifest(folder: Path) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        head, questions, rollouts = [*data.split(CUT), b"", b""][:3]
        contents = {
            "questions.jsonl": questions,
            "rollouts.jsonl": rollouts,
            "signals.safetensors": b"",
            "neurons.csv": b"",
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        try:
            header = json.loads(head)
            for name, entry in header["files"].items():
                if name in contents:
                    entry |= {"sha256": hashlib.sha256(contents[name]).hexdigest()}
            header["files"]["questions.jsonl"]["rows"] = len(questions.splitlines())
            header["files"]["rollouts.jsonl"]["rows"] = len(rollouts.splitlines())
            header["content_sha256"] = neurosig.manifest.files._content_sha256(header)
            head = json.dumps(header).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        (folder / "manifest.json").write_bytes(head)
        manifest = neurosig.manifest.read_manifest(folder)
        for row in manifest.rows:
            assert all(item.question_id != row.question_id for item in row.context) or "majority" in str(
                manifest.header.options
            )

    return one


def seeds(folder: Path, target: str) -> None:
    """Write valid files, from which the search starts."""
    folder.mkdir()
    if target == "questions":
        for number, record in enumerate(QUESTIONS):
            (folder / f"{number}").write_bytes((json.dumps(record) + "\n").encode())
        return
    from tests.support.flow import make_manifest

    with tempfile.TemporaryDirectory() as temporary:
        out = make_manifest(Path(temporary), limit=3, num_generations=1)
        files = [(out / name).read_bytes() for name in ("manifest.json", "questions.jsonl", "rollouts.jsonl")]
        (folder / "0").write_bytes(CUT.join(files))


def run(target: str, folder: Path, arguments: list[str]) -> None:
    """Fuzz in this process; libFuzzer ends it."""
    one = {"questions": read_questions, "manifest": read_manifest}[target](folder)

    def guarded(data: bytes) -> None:
        try:
            one(data)
        except UserError as error:
            assert "\n" not in str(error)

    atheris.Setup([sys.argv[0], *arguments], guarded)
    atheris.Fuzz()


def fuzz(target: str, seconds: int, out: Path, seed: int = 1) -> tuple[int, str]:
    """Fuzz in a new process; returns the number of executions and the finding, or an empty string."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        seeds(Path(temporary) / "seeds", target)
        (Path(temporary) / "work").mkdir()
        limits = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=2000", "-max_len=20000"]
        limits += [f"-artifact_prefix={out}/", "-print_final_stats=1"]
        done = subprocess.run(
            [sys.executable, "-m", "tests.trust.fuzz", target, "--inside", f"{temporary}/work", *limits,
             f"{temporary}/seeds"],
            capture_output=True, text=True, errors="replace", check=False,
            cwd=ROOT,
        )  # fmt: skip
    output = done.stderr + done.stdout
    count = re.search(r"stat::number_of_executed_units: (\d+)", output) or re.search(r"Done (\d+) runs", output)
    if count is None or done.returncode:
        return int(count[1]) if count else 0, output[-2000:]
    return int(count[1]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["questions", "manifest"])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.inside:
        run(options.target, options.inside, arguments)
    executions, finding = fuzz(options.target, options.seconds, options.out)
    print(f"fuzz executions of the {options.target} reader: {executions:,}, findings: {int(bool(finding))}")
    if finding:
        sys.exit(finding)


if __name__ == "__main__":
    main()
