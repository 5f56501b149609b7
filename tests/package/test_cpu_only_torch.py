"""fastshape with a torch without CUDA: it builds, works and reports what is missing.

The tests download torch (200 MB), and so run only on request: ``make test-cpu-only-torch``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fetch, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# The suffix selects the build without CUDA. Without the suffix pip may download gigabytes of CUDA.
TORCH = "torch==2.13.0+cpu"
TOOLS = ("setuptools>=77", "pybind11", "ninja", "numpy", "pytest")
# These tests compare forward and backward with the reference, and check the random stream and the packed bits.
TESTS = (
    "package/test_shape.py::test_equals_reference_bit_for_bit",
    "kernels/test_stream.py",
    "package/test_bitmask.py",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source without build products."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastshape"):
        ignored = shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    """``run(program, *arguments)`` runs a program in a new environment with that torch and this fastshape."""
    folder = tmp_path_factory.mktemp("environment")
    ours = ("PYTHONPATH", "FASTSHAPE_BACKEND", "FASTSHAPE_CUDA", "FASTSHAPE_SKIP_EXT")
    clean = {name: value for name, value in os.environ.items() if name not in ours}

    def run(program, *arguments, check=True, **variables):
        process = subprocess.run(
            [folder / "bin" / program, *arguments], cwd=folder, env=clean | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        assert process.returncode == 0 or not check, process.stdout[-5000:]
        return process

    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = run("pip", "install", "--quiet", TORCH, *TOOLS, check=False)
    if install.returncode:
        # A skip would go unnoticed in CI, so fail. PIP_EXTRA_INDEX_URL can name another index.
        pytest.fail(f"pip cannot get {TORCH} here: {install.stdout[-1000:]}")
    run("pip", "install", "--quiet", "--no-build-isolation", "--no-deps", str(source))
    yield run
    shutil.rmtree(folder)  # pytest would keep three folders of a gigabyte each


def test_kernels_serve_the_cpu_and_cuda_has_a_reason(run):
    code = """
import json, os, sys, torch, fastshape
from fastshape.backends import cuda
files = os.listdir(os.path.dirname(fastshape.__file__))
print(json.dumps([torch.__version__, fastshape.backend_info(), files, cuda._build_facts(), "fastshape._C_cuda" in sys.modules]))
"""
    version, info, files, built, loaded = json.loads(run("python", "-c", code).stdout)
    assert version == TORCH.removeprefix("torch==")
    assert (info["cpu"], info["cuda"]) == ("native", "reference")
    assert info["native"]["built_with_torch"] == version
    assert len(info["native"]["sources"]) == 16
    assert info["reasons"]["cuda"] == "this torch has neither CUDA nor ROCm"
    assert info["native_cuda"] == {"error": "this torch has no CUDA"}
    assert built["built"] is False and built["reason"].startswith("torch has no CUDA, ")
    assert any(name.startswith("_C.") for name in files)
    assert not loaded and not [name for name in files if name.startswith("_C_cuda")]


def test_module_prints_it(run):
    printed = run("python", "-m", "fastshape").stdout
    rows = {" ".join(line.split("  ")[0].split()): line for line in printed.splitlines()}
    assert "native (compiled kernels are loaded)" in rows["on the CPU"]
    assert "reference (this torch has neither CUDA nor ROCm)" in rows["on CUDA"]
    assert "this torch has no CUDA" in rows["CUDA kernels: error"]


def test_requests_that_cannot_be_met_raise_with_a_reason(run, source):
    process = run("python", str(source / "setup.py"), "--version", check=False, FASTSHAPE_CUDA="1")
    assert process.returncode != 0
    assert (
        "FASTSHAPE_CUDA=1, but the CUDA kernels cannot be built: torch has no CUDA"
        in process.stdout
    )
    process = run("python", "-c", "import fastshape", check=False, FASTSHAPE_BACKEND="triton")
    assert process.returncode != 0
    assert "FASTSHAPE_BACKEND=triton: Triton is not installed" in process.stdout
    # Without CUDA, native needs only the CPU kernels.
    run("python", "-c", "import fastshape", FASTSHAPE_BACKEND="native")


def test_same_bits_as_the_reference(run):
    # `python -m pytest` would import fastshape from the current folder.
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    printed = run("pytest", "-q", "-p", "no:cacheprovider", *tests).stdout
    assert " passed" in printed and "failed" not in printed
