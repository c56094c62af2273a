"""Run every test of faults, determinism and verification, and count the cases.

python -m tests.trust.cases
"""

from __future__ import annotations

import sys

import pytest

from tests.support.paths import TESTS

FILES = ("promises", "neurosig/verify", "trust/test_kills.py")


class Count:
    """Outcomes of the tests."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.passed += report.outcome == "passed" and report.when == "call"
            self.failed += report.outcome == "failed"
            self.skipped += report.outcome == "skipped"


def main() -> None:
    count = Count()
    code = pytest.main(["-q", *(str(TESTS / name) for name in FILES)], plugins=[count])
    print(f"cases: {count.passed} passed, {count.failed} failed, {count.skipped} skipped")
    sys.exit(code)


if __name__ == "__main__":
    main()
