"""Which part of the experiments may import which: the contracts in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

pytest.importorskip("importlinter", reason="import-linter is not installed")

ROOT = Path(__file__).parents[2]
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(experiments: Path) -> subprocess.CompletedProcess:
    """What `lint-imports` says of the package `domainshift` in a folder."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--no-cache", "--no-logo"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(experiments), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_the_contracts_are_kept():
    result = lint(ROOT / "experiments")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("report/study.py", "from domainshift.training import loop", "neither trains nor plans BROKEN"),
        ("methods/base.py", "from domainshift.data import open_data", "parts below it BROKEN"),
        ("models.py", "from domainshift import config", "parts below it BROKEN"),
        ("methods/dann.py", "from fastshape import _ops", "public part of fastshape BROKEN"),
        ("data/toy.py", "from fastshape.backends import native", "public part of fastshape BROKEN"),
        ("utils.py", "", "domainshift.utils"),  # a part without a place
    ],
)  # fmt: skip
def test_an_import_in_the_wrong_direction_is_named(tmp_path, file, line, message):
    package = tmp_path / "domainshift"
    shutil.copytree(
        ROOT / "experiments" / "domainshift", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    with open(package / file, "a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert message in result.stdout, result.stdout


def test_every_private_module_of_fastshape_is_forbidden():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (forbidden,) = (
        contract["forbidden_modules"]
        for contract in contracts["contracts"]
        if contract.get("source_modules") == ["domainshift"]
    )
    private = {f"fastshape.{path.stem}" for path in (ROOT / "fastshape").glob("_[!_]*.py")}
    assert private and private | {"fastshape.backends"} == set(forbidden)
