"""Runs the tests marked gpu, or those named. A part of benchmarks/gpu.py, which runs it:

    python benchmarks/gpu_tests.py RECORDS [PYTEST'S ARGUMENTS]

Appends a line of JSON to the file RECORDS as each test ends, so that a kill leaves what had been found out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests"


def files() -> list[Path]:
    """The files with such tests. The others need not be imported, nor what they import be installed."""
    return sorted(p for p in TESTS.glob("test_*.py") if "pytest.mark.gpu" in p.read_text())


class Records:
    """What pytest calls: writes one record a test."""

    def __init__(self, path: str):
        self.file = open(path, "a", buffering=1)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._write(report.nodeid, "error", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report) -> None:
        # A test has three reports. Setting up and tearing down are told of where they failed or skipped.
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
    return 0 if code == pytest.ExitCode.TESTS_FAILED else code  # which, the records tell


if __name__ == "__main__":
    sys.exit(main())
