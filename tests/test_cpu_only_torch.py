"""fastshape installed beside a torch without CUDA: builds, works, and says what it does without.

It fetches a torch (200 MB), and so runs only when asked for: ``make test-cpu-only-torch``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fetch, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
# A version with a build that has no CUDA. The suffix asks for that build: the plain number can bring gigabytes of CUDA.
TORCH = "torch==2.13.0+cpu"
TOOLS = ("setuptools>=77", "pybind11", "ninja", "numpy", "pytest")
# Forward and backward against the reference for each dtype, mask and policy; the stream; the bits.
TESTS = ("test_shape.py::test_equals_reference_bit_for_bit", "test_stream.py", "test_bitmask.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What is installed from, without anything built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastshape"):
        ignored = shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    """``run(program, *arguments)`` in a new environment with that torch and this fastshape."""
    folder = tmp_path_factory.mktemp("environment")
    ours = ("PYTHONPATH", "FASTSHAPE_BACKEND", "FASTSHAPE_CUDA", "FASTSHAPE_SKIP_EXT")
    clean = {name: value for name, value in os.environ.items() if name not in ours}

    def run(program, *arguments, check=True, **variables):
        done = subprocess.run(
            [folder / "bin" / program, *arguments], cwd=folder, env=clean | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout[-5000:]
        return done

    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    fetched = run("pip", "install", "--quiet", TORCH, *TOOLS, check=False)
    if fetched.returncode:
        # Asked for by name, so no skip: CI would not notice. PIP_EXTRA_INDEX_URL says where else to look.
        pytest.fail(f"pip cannot get {TORCH} here: {fetched.stdout[-1000:]}")
    run("pip", "install", "--quiet", "--no-build-isolation", "--no-deps", str(source))
    yield run
    shutil.rmtree(folder)  # pytest would keep three of them, a gigabyte each


def test_kernels_serve_the_cpu_and_cuda_says_why_nothing_does(run):
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


def test_what_cannot_be_had_says_why(run, source):
    asked = run("python", str(source / "setup.py"), "--version", check=False, FASTSHAPE_CUDA="1")
    assert asked.returncode != 0
    assert (
        "FASTSHAPE_CUDA=1, but the CUDA kernels cannot be built: torch has no CUDA" in asked.stdout
    )
    asked = run("python", "-c", "import fastshape", check=False, FASTSHAPE_BACKEND="triton")
    assert asked.returncode != 0
    assert "FASTSHAPE_BACKEND=triton: Triton is not installed" in asked.stdout
    # Where there is no CUDA, native asks for the CPU's kernels alone.
    run("python", "-c", "import fastshape", FASTSHAPE_BACKEND="native")


def test_same_bits_as_the_reference(run):
    # pytest itself, not `python -m pytest`, which would take fastshape from the current folder.
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    printed = run("pytest", "-q", "-p", "no:cacheprovider", *tests).stdout
    assert " passed" in printed and "failed" not in printed
