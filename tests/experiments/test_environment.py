"""Commands start in environments that users have."""

import os
import subprocess
import sys

import pytest
from domainshift.config import REPOSITORY


@pytest.mark.parametrize("script", ["run.py", "suite.py", "data.py", "report.py"])
def test_commands_start_without_docstrings(script):
    done = subprocess.run(
        [sys.executable, "-OO", REPOSITORY / "experiments" / script, "--help"],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and f"usage: {script}" in done.stdout
