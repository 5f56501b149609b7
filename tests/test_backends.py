"""Which backend is chosen, and what is said about it. Each case is a process of its own: the choice is made at import."""

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
    for row in ("on the CPU", "on CUDA", "elsewhere", "kernels:", "CUDA kernels:", "Triton:"):
        assert f"\n{row}" in done.stdout


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


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
torch_has_cuda = pytest.mark.skipif(
    not (torch.version.cuda or torch.version.hip), reason="this torch has neither CUDA nor ROCm"
)


@pytest.mark.parametrize("backend", ("auto", "native", "reference"))
def test_every_device_has_a_backend_and_a_reason(backend):
    done = run(INFO + "import json; print(json.dumps(info))", backend)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["requested"] == backend
    assert {"cpu", "cuda", "other_devices"} <= info["reasons"].keys()
    for device, reason in info["reasons"].items():
        assert info[device] in ("native", "triton", "reference")
        assert reason and "\n" not in reason
    assert info["reason"] == info["reasons"]["cpu"] and info["other_devices"] == "reference"


@torch_has_cuda
@needs_triton
def test_triton_serves_cuda_where_the_kernels_do_not():
    code = "print(info['cuda'], info['reasons']['cuda'], sep='|')"
    chosen, reason = run(WITHOUT_CUDA_KERNELS + INFO + code, "auto").stdout.strip().split("|")
    assert chosen == "triton" and "CUDA" in reason
    done = run(WITHOUT_CUDA_KERNELS + WITHOUT_TRITON + INFO + code, "auto")
    chosen, both_reasons = done.stdout.strip().split("|")
    assert chosen == "reference" and "pip install triton" in both_reasons and reason in both_reasons


def test_a_torch_without_cuda_is_said_to_be_one():
    without = "import torch; torch.version.cuda = torch.version.hip = None\n"
    done = run(without + INFO + "print(info['cuda'], info['reasons']['cuda'])", "auto")
    assert done.stdout.startswith("reference this torch has neither CUDA nor ROCm"), done.stderr


@needs_triton
def test_triton_needs_a_gpu_or_the_interpreter():
    done = run(WITHOUT_GPU + "import fastshape", "triton")
    assert done.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=triton: no GPU is visible" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_triton_that_is_not_installed():
    done = run(WITHOUT_TRITON + WITH_GPU + "import fastshape", "triton")
    assert done.returncode != 0
    assert "FASTSHAPE_BACKEND=triton: Triton is not installed" in done.stderr
    assert "pip install triton" in done.stderr


@needs_triton
def test_interpreted_triton_serves_the_cpu_when_asked_for():
    interpreted = run(SAME_BITS, "triton", TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    assert interpreted.stdout.split() == ["triton", run(SAME_BITS, "reference").stdout.split()[1]]
    done = run(INFO + "print(info['cpu'])", "auto", TRITON_INTERPRET="1")
    assert done.stdout.strip() in ("native", "reference"), done.stderr


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
def test_native_wants_the_cuda_kernels_only_where_a_gpu_is_visible(kernels):
    done = run(WITHOUT_CUDA_KERNELS + WITH_GPU + "import fastshape", "native")
    assert done.returncode != 0
    assert "RuntimeError: FASTSHAPE_BACKEND=native: " in done.stderr and "CUDA" in done.stderr
    done = run(
        WITHOUT_CUDA_KERNELS + WITHOUT_GPU + INFO + "print(info['cpu'], info['cuda'])", "native"
    )
    assert done.stdout.split() == ["native", "reference"], done.stderr
