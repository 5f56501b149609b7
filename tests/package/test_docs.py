"""The documentation of the public names: `make docs` renders it without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
