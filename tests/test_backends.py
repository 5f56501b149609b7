"""Which backend is chosen, and what is said about it. Each case is a process of its own: the choice is made at import."""

import os
import subprocess
import sys

import pytest

WITHOUT_KERNELS = "import sys; sys.modules['fastshape._C'] = None\n"


def run(code: str, backend: str | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "FASTSHAPE_BACKEND"}
    if backend is not None:
        environment["FASTSHAPE_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


SAME_BITS = """
import torch, fastshape
y = fastshape.shape(torch.ones(1000), p_zero=0.5, rng_state=fastshape.rng_state(5))
print(fastshape.backend_info()["cpu"], int((y * torch.arange(1000)).sum()))
"""


def test_same_bits_from_either_backend(kernels):
    native, reference = (
        run(SAME_BITS, "native").stdout.split(),
        run(SAME_BITS, "reference").stdout.split(),
    )
    assert native[0] == "native" and reference[0] == "reference"
    assert native[1] == reference[1]


def test_auto_falls_back_with_a_reason():
    done = run(WITHOUT_KERNELS + SAME_BITS + "print(fastshape.backend_info()['reason'])", "auto")
    assert done.stdout.startswith("reference"), done.stderr
    assert "pip install" in done.stdout


def test_explicit_choice_that_cannot_be_had_raises_and_says_why():
    done = run(WITHOUT_KERNELS + "import fastshape", "native")
    assert done.returncode != 0
    assert "FASTSHAPE_BACKEND=native" in done.stderr and "pip install" in done.stderr


def test_unknown_choice():
    done = run("import fastshape", "gpu")
    assert (
        "ValueError: FASTSHAPE_BACKEND='gpu': allowed are auto, native, triton, reference"
        in done.stderr
    )


@pytest.mark.parametrize("backend", (None, "reference"))
def test_module_prints_what_is_chosen_and_why(backend):
    done = run("import runpy; runpy.run_module('fastshape', run_name='__main__')", backend)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert rows["FASTSHAPE_BACKEND"] == (backend or "auto")
    assert "on the CPU" in done.stdout and "kernels:" in done.stdout


def test_core_needs_torch_alone():
    code = """
import sys
import torch
before = {name.split(".")[0] for name in sys.modules}
import fastshape
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))
"""
    assert run(code).stdout.strip() == "['fastshape']"
