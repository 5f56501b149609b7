"""Figures are drawn whatever backend the environment names."""

import os
import subprocess
import sys

import pytest
from domainshift.config import REPOSITORY

EXPERIMENTS = REPOSITORY / "experiments"
NOTEBOOK = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline_that_is_not_here"}


@pytest.mark.parametrize("words", [["report.py", "--help"], ["data.py", "--help"]])
def test_commands_start_in_a_notebooks_child_process(words):
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / words[0], *words[1:]], env=NOTEBOOK, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_figure_is_drawn_and_the_name_stays(tmp_path):
    code = (
        "import os; from pathlib import Path\n"
        "from domainshift.training.pictures import save\n"
        "from domainshift.plotting import Figure\n"
        "figure = Figure(); figure.subplots().plot([1, 2])\n"
        f"save(figure, Path({str(tmp_path / 'x.png')!r}))\n"
        "print(os.environ['MPLBACKEND'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=NOTEBOOK | {"PYTHONPATH": str(EXPERIMENTS)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == NOTEBOOK["MPLBACKEND"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("home", ["missing", "read-only"])
def test_a_home_that_cannot_be_used_is_not_missed(tmp_path, home):
    (tmp_path / "home").mkdir(mode=0o500)
    place = "/dev/null/home" if home == "missing" else str(tmp_path / "home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG", "MPL"))}
    done = subprocess.run(
        [sys.executable, "-c", "import domainshift.plotting"],
        env=environment | {"HOME": place, "PYTHONPATH": str(EXPERIMENTS)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
