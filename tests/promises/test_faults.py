"""Each fault of the list in tests/README.md has a test."""

from __future__ import annotations

import ast
import re

from tests.support.paths import TESTS

ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)


def test_every_fault_has_a_test_that_exists() -> None:
    listed = ROW.findall((TESTS / "README.md").read_text(encoding="utf-8"))
    numbers = [int(number) for number, *_ in listed]
    assert numbers == sorted(set(numbers)) and set(range(1, 62)) <= set(numbers)
    functions = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for number, _, _, names in listed:
        tests = re.findall(r"`(test_\w+)`", names)
        assert tests, number
        assert set(tests) <= functions, (number, set(tests) - functions)
