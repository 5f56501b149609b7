"""The documentation of the public names: `make docs` renders it without a warning, and its examples run."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastshape

ROOT = Path(__file__).parents[2]
OBJECTS = {name: getattr(fastshape, name) for name in fastshape.__all__}


def test_make_docs_renders_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    (recipe,) = re.findall(r"\ndocs:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text())
    command = recipe.replace("\\\n", " ").replace("$(BIN)/python", shlex.quote(sys.executable))
    command = command.replace("build/docs", shlex.quote(str(tmp_path)))
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    page = (tmp_path / "fastshape.html").read_text()
    for name in OBJECTS.keys() - {"reference"}:
        assert f'<section id="{name}">' in page, name
    assert (tmp_path / "fastshape" / "reference.html").is_file()


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_name_is_documented(name):
    assert OBJECTS[name].__doc__


class ShownOutput(doctest.OutputChecker):
    """Compares what an example prints only if the example shows it."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", sorted(OBJECTS.keys() - {"reference"}))
def test_examples_run(name):
    models = pytest.importorskip("torchvision.models")
    given = {
        "torch": torch,
        "nn": torch.nn,
        "fastshape": fastshape,
        "model": models.resnet18(num_classes=7),
        "images": torch.randn(2, 3, 64, 64),
        "labels": torch.tensor([0, 6]),
        "criterion": torch.nn.functional.cross_entropy,
    }
    runner = doctest.DocTestRunner(ShownOutput(), optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(OBJECTS[name], name, globs=given):
        runner.run(test)
    assert runner.summarize().failed == 0
