"""--help of the commands is quick: it prints what needs no torch, so it imports none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
COMMANDS = sorted(path.name for path in EXPERIMENTS.glob("*.py"))
SLOW = {
    "torch",
    "torchvision",
    "fastshape",
    "scipy",
    "matplotlib",
    "ray",
}  # each takes about a second

# Runs a command, and then names the top-level packages that the process imported.
CODE = """
import runpy, sys
file, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = file
try:
    runpy.run_path(file, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported_by(command, *arguments):
    """What a command prints, and the top-level packages that it imported."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(EXPERIMENTS / command), *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(EXPERIMENTS.parent), str(EXPERIMENTS)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, set(result.stderr.splitlines()[-1].split())


def test_every_command_is_found():
    assert {"data.py", "report.py", "run.py", "suite.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command):
    printed, packages = imported_by(command, "--help")
    assert printed.startswith(f"usage: {command}")
    assert "domainshift" in packages
    assert not packages & SLOW


@pytest.mark.parametrize(
    ("command", "argument"), [("report.py", "--records"), ("suite.py", "--schema")]
)
def test_documentation_of_files_imports_no_torch(command, argument):
    printed, packages = imported_by(command, argument)
    assert printed
    assert not packages & SLOW


def test_what_a_command_imports_is_seen():
    """Layers are read from a network, so that list has torch: the check can fail."""
    words = "--layers list --model resnet18-slim --data toy --weights none --device cpu".split()
    printed, packages = imported_by("run.py", *words)
    assert "conv1" in printed
    assert {"torch", "torchvision", "fastshape"} <= packages
