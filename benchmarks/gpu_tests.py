"""Runs all tests marked gpu, or a selection of them. benchmarks/gpu.py runs it:

    python benchmarks/gpu_tests.py RECORDS [ARGUMENTS OF PYTEST]

It appends a line of JSON to the file RECORDS at the end of each test, so that a kill loses no result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests"


def files() -> list[Path]:
    """The files with tests marked gpu. The other files are not imported, so that their dependencies may be missing."""
    return sorted(p for p in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in p.read_text())


class Records:
    """A pytest plugin that writes one record per test."""

    def __init__(self, path: str):
        self.file = open(path, "a", buffering=1)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._write(report.nodeid, "error", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report) -> None:
        # A test has three reports. Those of set-up and tear-down are written only if they fail or skip.
        if report.when == "call" or not report.passed:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            message = report.longreprtext if not report.passed else ""
            if report.skipped and isinstance(report.longrepr, tuple):
                message = report.longrepr[2]  # file, line, reason
            self._write(report.nodeid, outcome, report.duration, message)

    def _write(self, name: str, outcome: str, seconds: float, message: str) -> None:
        record = {"kind": "test", "name": name, "outcome": outcome, "seconds": round(seconds, 3)}
        print(json.dumps(record | {"message": message[-4000:]}), file=self.file)


def main() -> int:
    arguments = sys.argv[2:] or list(map(str, files()))
    code = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments], plugins=[Records(sys.argv[1])]
    )
    return 0 if code == pytest.ExitCode.TESTS_FAILED else code  # the records have the failures


if __name__ == "__main__":
    sys.exit(main())
