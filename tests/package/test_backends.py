"""The choice of backends and its reasons. Each case is a process of its own, because fastshape chooses at import."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

WITHOUT_KERNELS = "import sys; sys.modules['fastshape._C'] = None\n"
WITHOUT_CUDA_KERNELS = "import sys; sys.modules['fastshape._C_cuda'] = None\n"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
WITHOUT_GPU = "import torch; torch.cuda.is_available = torch.xpu.is_available = lambda: False\n"
WITH_GPU = "import torch; torch.cuda.is_available = lambda: True\n"
INFO = "import fastshape; info = fastshape.backend_info()\n"


def run(code: str, backend: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    ours = ("FASTSHAPE_BACKEND", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
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
    process = run(WITHOUT_KERNELS + SAME_BITS + "print(fastshape.backend_info()['reason'])", "auto")
    assert process.stdout.startswith("reference"), process.stderr
    assert "pip install" in process.stdout


def test_an_explicit_choice_that_is_not_available_raises_with_a_reason():
    process = run(WITHOUT_KERNELS + "import fastshape", "native")
    assert process.returncode != 0
    assert "FASTSHAPE_BACKEND=native" in process.stderr and "pip install" in process.stderr


def test_unknown_choice():
    process = run("import fastshape", "gpu")
    assert (
        "ValueError: FASTSHAPE_BACKEND='gpu': allowed are auto, native, triton, reference"
        in process.stderr
    )


@pytest.mark.parametrize("backend", (None, "reference"))
def test_module_prints_what_is_chosen_and_why(backend):
    process = run("import runpy; runpy.run_module('fastshape', run_name='__main__')", backend)
    assert process.returncode == 0, process.stderr
    rows = dict(line.split(None, 1) for line in process.stdout.splitlines())
    assert rows["FASTSHAPE_BACKEND"] == (backend or "auto")
    for row in ("on the CPU", "on CUDA", "elsewhere", "kernels:", "CUDA kernels:", "Triton:"):
        assert f"\n{row}" in process.stdout


def test_fastshape_needs_only_torch():
    code = """
import sys
import torch
before = {name.split(".")[0] for name in sys.modules}
import fastshape
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))
"""
    assert run(code).stdout.strip() == "['fastshape']"


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
torch_has_cuda = pytest.mark.skipif(
    not (torch.version.cuda or torch.version.hip), reason="this torch has neither CUDA nor ROCm"
)


@pytest.mark.parametrize("backend", ("auto", "native", "reference"))
def test_every_device_has_a_backend_and_a_reason(backend):
    process = run(INFO + "import json; print(json.dumps(info))", backend)
    assert process.returncode == 0, process.stderr
    info = json.loads(process.stdout)
    assert info["requested"] == backend
    assert {"cpu", "cuda", "other_devices"} <= info["reasons"].keys()
    for device, reason in info["reasons"].items():
        assert info[device] in ("native", "triton", "reference")
        assert reason and "\n" not in reason
    assert info["reason"] == info["reasons"]["cpu"] and info["other_devices"] == "reference"


@torch_has_cuda
@needs_triton
def test_triton_serves_cuda_without_compiled_kernels():
    code = "print(info['cuda'], info['reasons']['cuda'], sep='|')"
    backend, reason = run(WITHOUT_CUDA_KERNELS + INFO + code, "auto").stdout.strip().split("|")
    assert backend == "triton" and "CUDA" in reason
    process = run(WITHOUT_CUDA_KERNELS + WITHOUT_TRITON + INFO + code, "auto")
    backend, both_reasons = process.stdout.strip().split("|")
    assert (
        backend == "reference" and "pip install triton" in both_reasons and reason in both_reasons
    )


def test_a_torch_without_cuda_is_the_reason():
    without = "import torch; torch.version.cuda = torch.version.hip = None\n"
    process = run(without + INFO + "print(info['cuda'], info['reasons']['cuda'])", "auto")
    assert process.stdout.startswith("reference this torch has neither CUDA nor ROCm"), (
        process.stderr
    )


@needs_triton
def test_triton_needs_a_gpu_or_the_interpreter():
    process = run(WITHOUT_GPU + "import fastshape", "triton")
    assert process.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=triton: no GPU is visible" in process.stderr
    assert "TRITON_INTERPRET=1" in process.stderr


def test_triton_that_is_not_installed():
    process = run(WITHOUT_TRITON + WITH_GPU + "import fastshape", "triton")
    assert process.returncode != 0
    assert "FASTSHAPE_BACKEND=triton: Triton is not installed" in process.stderr
    assert "pip install triton" in process.stderr


@needs_triton
def test_interpreted_triton_serves_the_cpu_on_request():
    interpreted = run(SAME_BITS, "triton", TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    assert interpreted.stdout.split() == ["triton", run(SAME_BITS, "reference").stdout.split()[1]]
    process = run(INFO + "print(info['cpu'])", "auto", TRITON_INTERPRET="1")
    assert process.stdout.strip() in ("native", "reference"), process.stderr


@needs_triton
def test_triton_is_imported_by_the_first_op_that_needs_it():
    code = """
import sys, torch, fastshape
fastshape.backend_info()
before = "triton" in sys.modules
fastshape.shape(torch.ones(8))
print(before, "triton" in sys.modules)
"""
    assert run(code, "triton", TRITON_INTERPRET="1").stdout.split() == ["False", "True"]
    assert run(code, "auto").stdout.split() == ["False", "False"]


@torch_has_cuda
@pytest.mark.skipif(not torch.version.cuda, reason="there are no native kernels for ROCm")
def test_native_needs_the_cuda_kernels_only_if_a_gpu_is_visible(kernels):
    process = run(WITHOUT_CUDA_KERNELS + WITH_GPU + "import fastshape", "native")
    assert process.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=native: " in process.stderr and "CUDA" in process.stderr
    process = run(
        WITHOUT_CUDA_KERNELS + WITHOUT_GPU + INFO + "print(info['cpu'], info['cuda'])", "native"
    )
    assert process.stdout.split() == ["native", "reference"], process.stderr
