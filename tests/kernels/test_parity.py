"""All backends equal the reference bit for bit.

    make parity

The backends are native C++, the CUDA source on the CPU, interpreted Triton and, on a GPU, CUDA and compiled Triton. The tests
compare values, gradients, masks and packed bits for all dtypes, both memory formats, awkward sizes, and offsets that carry into
the high word or wrap. Other tests of a backend are in the file with its name.

Triton decides at its first import whether it interprets, so that the interpreter runs in a process of its own.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import DTYPES, assert_same_bits, awkward
from test_cuda_on_cpu import CODES, emulation, pointer  # noqa: F401  (a fixture)
from test_stream import state_of

import fastshape
from fastshape import reference
from fastshape.backends import triton

INTERPRETED = fastshape.backend_info()["cpu"] == "triton"
FORMATS = (torch.contiguous_format, torch.channels_last)
SIZES = (0, 1, 7, 8, 9, 65, 255, 257, 999, 2049)
# Offsets of the 269 Philox calls of a map with 2145 elements. In their middle the low word carries or the offset wraps.
OFFSETS = {"2^32": 2**32 - 130, "2^63": 2**63 - 130, "2^64": 2**64 - 130}
SEED = 0xFEDCBA9876543210
MASKS = (*OFFSETS, "target", "none")


class OpsOnDevice:
    """Calls ops on a device. Arguments and results are CPU tensors."""

    def __init__(self, ops, device: str):
        self.ops, self.device = ops, device

    def __getattr__(self, name):
        def call(*arguments):
            moved = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = getattr(self.ops, name)(*moved)
            return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

        return call


class CudaSource:
    """csrc/cuda/kernels.cu compiled as C++."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def shape_clipped(self, x, rng_state, bits, p_zero, binarize):
        y = torch.empty_like(x)
        within_one = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        self._shape(x, y, within_one, rng_state, bits, p_zero, binarize)
        return y, within_one

    def shape(self, x, rng_state, bits, p_zero, binarize):
        y = torch.empty_like(x)
        self._shape(x, y, None, rng_state, bits, p_zero, binarize)
        return y

    def shape_(self, x, rng_state, bits, p_zero, binarize):
        self._shape(x, x, None, rng_state, bits, p_zero, binarize)

    def _shape(self, x, y, within_one, rng_state, bits, p_zero, binarize):
        error = self.library.shape(
            CODES[x.dtype], pointer(x), pointer(y), pointer(within_one), ctypes.c_int64(x.numel()),
            pointer(rng_state), pointer(bits), ctypes.c_double(p_zero), binarize,
        )  # fmt: skip
        assert error == 0

    def pack(self, x):
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        n = ctypes.c_int64(x.numel())
        assert self.library.pack(CODES[x.dtype], pointer(x), pointer(bits), n) == 0
        return bits

    def pack_random(self, rng_state, n, p_zero):
        bits = torch.empty((n + 7) // 8, dtype=torch.uint8)
        error = self.library.pack_random(
            pointer(rng_state), ctypes.c_double(p_zero), pointer(bits), ctypes.c_int64(n)
        )
        assert error == 0
        return bits

    def pack_top(self, x, row, count):
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        assert self.library.pack_top(CODES[x.dtype], x, bits, x.numel(), row, count) == 0
        return bits

    def unpack(self, bits, n):
        values = torch.empty(n, dtype=torch.bool)
        assert self.library.unpack(pointer(bits), pointer(values), ctypes.c_int64(n)) == 0
        return values


BACKENDS = (
    ["Triton interpreted"]
    if INTERPRETED
    else [
        "native",
        "CUDA source on the CPU",
        pytest.param("CUDA", marks=pytest.mark.gpu),
        pytest.param("Triton", marks=pytest.mark.gpu),
    ]
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "CUDA source on the CPU":
        return CudaSource(request.getfixturevalue("emulation"))
    if request.param in ("native", "Triton interpreted"):
        if request.param == "native" and fastshape.backend_info()["cpu"] != "native":
            pytest.skip(fastshape.backend_info()["reason"])
        return OpsOnDevice(torch.ops.fastshape, "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    if request.param == "Triton":
        if problem := triton.error():
            pytest.skip(problem)
        return OpsOnDevice(triton, "cuda")
    if fastshape.backend_info()["cuda"] != "native":
        pytest.skip(fastshape.backend_info()["reasons"]["cuda"])
    return OpsOnDevice(torch.ops.fastshape, "cuda")


def a_map(dtype: torch.dtype, memory_format: torch.memory_format, seed: int = 0) -> torch.Tensor:
    """(3, 5, 11, 13): 2145 elements with all special numbers."""
    x = awkward(3 * 5 * 11 * 13, dtype, seed).view(3, 5, 11, 13)
    return x.contiguous(memory_format=memory_format)


def mask_arguments(mask: str) -> tuple:
    """(rng_state, bits, p_zero) for 2145 elements."""
    if mask in OFFSETS:
        return state_of(SEED, OFFSETS[mask]), None, 0.37
    bits = reference.pack(awkward(2145, torch.float32, seed=9)) if mask == "target" else None
    return None, bits, 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_values(backend, dtype, memory_format, mask):
    x, arguments = a_map(dtype, memory_format), mask_arguments(mask)
    for binarize in (True, False):
        expected, expected_within = reference.shape_clipped(x, *arguments, binarize)
        y, within = backend.shape_clipped(x, *arguments, binarize)
        assert_same_bits(y, expected)
        assert torch.equal(within, expected_within)
        assert_same_bits(backend.shape(x, *arguments, binarize), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("policy", ("straight_through", "clipped"))
def test_gradients(backend, dtype, memory_format, mask, policy):
    # The op of the backward pass, with the tensors that the forward pass saves.
    x, grad = a_map(dtype, memory_format).requires_grad_(), a_map(dtype, memory_format, seed=5)
    rng_state, bits, p_zero = mask_arguments(mask)
    y = reference.differentiable_shape(x, rng_state, bits, p_zero, True, policy)
    (expected,) = torch.autograd.grad(y, x, grad)
    if policy == "clipped":
        _, bits = backend.shape_clipped(x.detach(), rng_state, bits, p_zero, True)
        rng_state, p_zero = None, 0.0
    assert_same_bits(backend.shape(grad, rng_state, bits, p_zero, False), expected)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("p_zero", (1e-6, 0.5, 1 - 1e-6))
def test_masks(backend, offset, p_zero):
    for seed in (SEED, 2**64 - 1):
        state = state_of(seed, OFFSETS[offset])
        for n in SIZES:
            expected = reference.pack_random(state, n, p_zero)
            bits = backend.pack_random(state, n, p_zero)
            assert torch.equal(bits, expected)
            assert torch.equal(backend.unpack(bits, n), reference.unpack(expected, n))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bool), ids=str)
def test_packed_bits(backend, dtype):
    for n in SIZES:
        x = awkward(n, dtype) if dtype.is_floating_point else awkward(n, torch.float32) > 0
        assert torch.equal(backend.pack(x), reference.pack(x))
    if dtype.is_floating_point:
        x = a_map(dtype, torch.channels_last)
        assert torch.equal(backend.pack(x), reference.pack(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", (1, 7, 49, 88, 300))
def test_the_largest_of_each_row(backend, dtype, row):
    if getattr(backend, "ops", None) is triton:
        pytest.skip("Triton has no kernel for it: the reference serves")
    x = awkward(9 * row, dtype)
    for values in (x, x.relu(), x.round()):
        for count in {0, 1, row // 2, row}:
            expected = reference.pack_top(values, row, count)
            assert torch.equal(backend.pack_top(values, row, count), expected)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours")
def test_cuda_source_counts_beyond_2_31_elements(request):
    # The same test of the other backends is in test_shape.py, test_cuda.py and test_triton.py.
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6e9:
        pytest.skip("needs 6 GB of free memory")
    n = 2**31 + 77
    x = torch.ones(n, dtype=torch.float16)
    x[-5:] = -1
    bits = torch.randint(256, ((n + 7) // 8,), dtype=torch.uint8)
    CudaSource(request.getfixturevalue("emulation")).shape_(x, None, bits, 0.0, True)
    for start in (0, 2**31 - 800, n // 8 * 8 - 8000):
        stop = min(start + 9000, n)
        expected = reference.unpack(bits[start // 8 : (stop + 7) // 8], stop - start)
        if stop == n:
            expected[-5:] = False
        assert torch.equal(x[start:stop], expected.half())


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(triton.error() is not None, reason=f"{triton.error()}")
def test_in_the_interpreter():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__)],
        env={**os.environ, "FASTSHAPE_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    output = process.stdout[-20_000:] + process.stderr
    assert process.returncode == 0 and " passed" in process.stdout, output
