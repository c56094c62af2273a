"""The code stays small: files, functions, nesting, modules per folder; and its import graph has no circle."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter

from tests.support.paths import ROOT

PACKAGES = ("neurosig", "distill", "figures")
MOST_LINES = {"tests": 500}
"""Lines per file; elsewhere 400."""
MOST_MODULES = {"neurosig": 11, "distill": 21, "figures/draw": 20}
"""Modules per folder; elsewhere 13."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that a module imports, also inside functions, but for those that only type checkers need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported(node)


def nesting(tree: ast.AST) -> int:
    """How deep the blocks of a function are nested; an ``elif`` is no deeper than its ``if``."""
    deepest = 0
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(tree, ast.If) and tree.orelse == [node]
        opens = isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Try) and not is_elif
        deepest = max(deepest, opens + nesting(node))
    return deepest


def test_code_is_small_and_imports_have_no_circle() -> None:
    paths = sorted(path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py"))
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    lines = {path: text.count("\n") for path, text in texts.items()}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    problems = [f"{path}: {n} lines" for path, n in lines.items() if n > MOST_LINES.get(path.parts[0], 400)]
    folders = Counter(str(path.parent) for path in lines if path.parts[0] != "tests" and path.stem != "__init__")
    problems += [f"{name}: {n} modules" for name, n in folders.items() if n > MOST_MODULES.get(name, 13)]
    n_distill = sum(n for path, n in lines.items() if str(path.parent) == "distill")
    problems += [f"distill without baselines: {n_distill} lines"] if n_distill > 4_445 else []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                problems += [f"{path}: {node.name}: {length} lines"] if length > 80 else []
                problems += [f"{path}: {node.name}: nested {nesting(node)} deep"] if nesting(node) > 4 else []
        names = [name for name in imported(tree) if name.startswith("tests.") and ".test_" in name]
        problems += [f"{path}: imports {name} from another test file" for name in names]
    assert not problems

    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): tree
        for path, tree in trees.items()
        if path.parts[0] in PACKAGES
    }
    graph = {
        name: {target if target in modules else target.rpartition(".")[0] for target in imported(tree)} - {name}
        for name, tree in modules.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def test_completions_are_parsed_in_one_place() -> None:
    """Every command reads answers through `AnswerReader`, which knows the format, the finish reason and the merging."""
    allowed = {
        "extract_answer": {"neurosig/questions/reader.py", "neurosig/questions/gold.py", "neurosig/questions/answers"},
        "majority_vote": {
            "neurosig/questions/reader.py",
            "neurosig/questions/vote.py",
            "neurosig/verify/recomputed.py",
        },
    }
    problems = []
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        problems += [
            f"{place}: {name}"
            for name, homes in allowed.items()
            if name in names and not place.startswith(tuple(homes))
        ]
    assert not problems
