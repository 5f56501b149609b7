"""Whether the CUDA kernels are built, why, and what nvcc made of them. No GPU is needed."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fastshape.backends import cuda

ROOT = Path(__file__).parent.parent
SETUP = ROOT / "setup.py"


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py, without setting anything up."""
    pytest.importorskip("setuptools")
    return runpy.run_path(str(SETUP))


# ---- the decision ----


@pytest.mark.parametrize("torch_cuda", (None, "13.2", "12.8"))
@pytest.mark.parametrize("nvcc", (None, "13.0", "12.6"))
@pytest.mark.parametrize("requested", (None, "1", "0"))
def test_decision(setup, requested, torch_cuda, nvcc):
    possible = (torch_cuda, nvcc) in (("13.2", "13.0"), ("12.8", "12.6"))
    if requested == "1" and not possible:
        with pytest.raises(SystemExit) as error:
            setup["decide_cuda"](requested, torch_cuda, nvcc)
        reason = str(error.value)
        assert "FASTSHAPE_CUDA=1" in reason
    else:
        build, reason = setup["decide_cuda"](requested, torch_cuda, nvcc)
        assert build == (possible and requested != "0")
    if requested == "0":
        assert reason == "FASTSHAPE_CUDA=0"
    else:
        assert (f"torch has CUDA {torch_cuda}" if torch_cuda else "torch has no CUDA") in reason
        assert (f"nvcc is of CUDA {nvcc}" if nvcc else "no nvcc") in reason
        assert ("majors must be equal" in reason) == bool(torch_cuda and nvcc and not possible)


@pytest.mark.parametrize("requested", ("", "yes", "2", "true"))
def test_any_other_value_is_refused(setup, requested):
    with pytest.raises(SystemExit, match=f"FASTSHAPE_CUDA='{requested}': allowed are"):
        setup["decide_cuda"](requested, "13.0", "13.0")


def test_architectures(setup):
    choose, flags = setup["choose_architectures"], setup["architecture_flags"]
    known = ["compute_75", "compute_80", "compute_90", "compute_100", "compute_120"]
    assert choose(None, known) == ["7.5", "8.0", "9.0+PTX"]
    assert choose(None, known[:3]) == ["7.5", "8.0", "9.0+PTX"]
    assert choose("8.0;9.0a+PTX", known) == ["8.0", "9.0a+PTX"]
    assert choose("8.6 12.0", known) == ["8.6", "12.0"]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST='Hopper'.*compute capability"):
        choose("Hopper", known)
    assert flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# ---- what is said where the kernels cannot be had ----


def test_mismatch_names_both_versions_and_what_to_do():
    built = {"built": True, "reason": "", "version": "13.0"}
    assert cuda.mismatch("13.2", built) is None
    problem = cuda.mismatch("12.8", built)
    assert "built for CUDA 13.0" in problem and "this torch has CUDA 12.8" in problem
    assert "pip install" in problem
    left_out = {"built": False, "reason": "torch has CUDA 13.2, no nvcc in CUDA_HOME"}
    assert "no nvcc in CUDA_HOME" in cuda.mismatch("13.2", left_out)
    assert "not built" in cuda.mismatch("13.2", {})
    assert cuda.mismatch(None, built) == "this torch has no CUDA"


def test_a_file_that_does_not_load_is_an_error_kept():
    code = """
import sys; sys.modules["fastshape._C_cuda"] = None
import torch, fastshape
from fastshape.backends import cuda
torch.version.cuda = "13.0"
cuda._build_facts = lambda: {"built": True, "version": "13.0"}
cuda._load.cache_clear()
print(cuda.error())
print(cuda.facts())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "did not load" in done.stdout and "pip install" in done.stdout, done.stderr


# ---- what nvcc made ----


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location(
        "cuda_report", ROOT / "benchmarks" / "cuda_report.py"
    )
    cuda_report = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cuda_report  # dataclasses look there
    spec.loader.exec_module(cuda_report)
    if cuda.error() is not None:
        pytest.skip(cuda.error())
    cuobjdump = cuda_report.tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("no cuobjdump beside nvcc, on PATH or in Triton")
    return cuda_report.report(cuda_report.library(), cuobjdump)


def test_every_kernel_is_there(kernels):
    for arch in {kernel.arch for kernel in kernels}:
        names = [kernel.name for kernel in kernels if kernel.arch == arch]
        # 4 dtypes x binarize x within_one x 3 mask sources; pack: 5 dtypes; pack_random: 3; unpack: 2.
        assert len(names) == len(set(names)) == 48 + 5 + 3 + 2


def test_no_local_memory_and_no_spills(kernels):
    for kernel in kernels:
        assert (kernel.stack, kernel.local, kernel.local_accesses) == (0, 0, 0), kernel


def test_memory_is_met_sixteen_bytes_at_a_time(kernels):
    for kernel in kernels:
        if kernel.is_shape:
            assert kernel.loads_16 >= 4 and kernel.stores_16 >= 4, kernel


def test_registers_leave_room_for_a_thousand_threads(kernels):
    for kernel in kernels:
        assert kernel.registers <= 64, kernel
