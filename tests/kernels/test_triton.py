"""The Triton kernels equal the reference bit for bit: interpreted on any machine, compiled on a GPU.

Triton decides at its first import whether it interprets. So `test_in_the_interpreter` starts a process of its own for the
interpreter. On a GPU the same tests run with the compiled kernels and, if they are available, with the native CUDA kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import DTYPES, as_bits, assert_same_bits, awkward
from test_stream import SEEDS, state_of

import fastshape
from fastshape import reference
from fastshape.backends import triton

TESTS = Path(__file__).parents[1]
INTERPRETED = fastshape.backend_info()["cpu"] == "triton"
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 999, 5000)

pytestmark = pytest.mark.skipif(triton.error() is not None, reason=f"{triton.error()}")


def test_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    selection = [
        "kernels/test_triton.py",
        # Tests through the dispatcher, of changes to arguments and of autograd.
        "package/test_pytorch.py::test_opcheck[shape_]",
        "package/test_pytorch.py::test_opcheck[shape_clipped]",
        "package/test_shape.py::test_values_by_hand",
        "package/test_shape.py::test_gradients_by_hand",
        "package/test_shape.py::test_channels_last_is_kept_and_numbered_in_memory_order",
        "package/test_shape.py::test_saved_for_backward",
        "package/test_bitmask.py",
    ]
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not gpu and not slow",
            "-p",
            "no:cacheprovider",
        ]
        + [str(TESTS / name) for name in selection],
        env={**os.environ, "FASTSHAPE_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-20_000:] + process.stderr


class Ops:
    """The ops of one implementation. Arguments and results are CPU tensors; `device` does the computation."""

    def __init__(self, implementation, device: str):
        self.implementation, self.device = implementation, device

    def __getattr__(self, name):
        def call(*arguments):
            there = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = getattr(self.implementation, name)(*there)
            if name.endswith("_"):  # also return x after the op
                result = (there[0], result)
            return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

        return call


needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
IMPLEMENTATIONS = (
    ["interpreter"]
    if INTERPRETED
    else [pytest.param(name, marks=needs_gpu) for name in ("triton", "native")]
)


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request) -> Ops:
    """Triton interpreted on the CPU, Triton compiled on CUDA, native CUDA."""
    if request.param == "interpreter":
        return Ops(torch.ops.fastshape, "cpu")
    if request.param == "triton":
        return Ops(triton, "cuda")
    if fastshape.backend_info()["cuda"] != "native":
        pytest.skip(fastshape.backend_info()["reasons"]["cuda"])
    return Ops(torch.ops.fastshape, "cuda")


def masks(n: int):
    """(rng_state, bits, p_zero) for a random mask, a given one and none."""
    yield torch.tensor([1234567, 2**32 - 2]), None, 0.37
    yield None, reference.pack(awkward(n, torch.float32, seed=9)), 0.0
    yield None, None, 0.0


def assert_equal(actual, expected) -> None:
    assert_same_bits(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("binarize", (True, False))
def test_shape_equals_reference(ops, dtype, binarize):
    for n in SIZES:
        x = awkward(n, dtype)
        for mask in masks(n):
            arguments = (x, *mask, binarize)
            assert_same_bits(ops.shape(*arguments), reference.shape(*arguments))
            expected = reference.shape_clipped(*arguments)
            assert_equal(ops.shape_clipped(*arguments), expected)
            if n in (9, 5000):
                y, nothing = ops.shape_(x.clone(), *mask, binarize)
                assert_same_bits(y, expected[0])
                assert nothing is None
                assert_equal(ops.shape_clipped_(x.clone(), *mask, binarize), expected)
        assert torch.equal(as_bits(x), as_bits(awkward(n, dtype))), "x must not change"


@pytest.mark.parametrize("seed", SEEDS)
def test_offsets_near_2_32_and_2_64(ops, seed):
    # 5000 elements need 625 calls. With each base the counter carries or wraps between them.
    for base in (0, 2**32 - 300, 2**63 - 300, 2**64 - 300):
        state = state_of(seed, base)
        expected = reference.pack_random(state, 5000, 0.5)
        assert torch.equal(ops.pack_random(state, 5000, 0.5), expected)
        x = torch.ones(5000)
        y = ops.shape(x, state, None, 0.5, True)
        assert torch.equal(reference.pack(y), expected)


@pytest.mark.parametrize("p_zero", (0.0, 1e-9, 1 / 65536, 0.5, 1 - 1 / 65536, 1 - 1e-9))
def test_extreme_probabilities(ops, p_zero):
    n, state = 20_001, fastshape.rng_state(2**63 + 1)
    x = awkward(n, torch.float16)
    expected = reference.pack_random(state, n, p_zero)
    assert torch.equal(ops.pack_random(state, n, p_zero), expected)
    y = ops.shape(x, state, None, p_zero, False)
    assert_same_bits(y, reference.shape(x, state, None, p_zero, False))
    if reference.drop_threshold(p_zero) in (0, 65536):
        assert bool(expected[:-1].all() if p_zero < 0.5 else not expected.any())


@pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_philox_randint_"), reason="this torch has no stateless Philox"
)
@pytest.mark.parametrize("seed", SEEDS)
def test_stream_is_that_of_torchs_stateless_philox(ops, seed):
    n = 4096
    for offset in (0, 2**32 - 100, 2**63):
        words = torch.empty(n // 2, dtype=torch.int32)
        torch.ops.aten._philox_randint_(words, torch.tensor([seed, offset], dtype=torch.uint64))
        words = words.long() & 0xFFFFFFFF
        draws = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)
        for threshold in (1, 0x1234, 0x8000, 0xFFFF):
            bits = ops.pack_random(state_of(seed, offset), n, threshold / 65536)
            assert torch.equal(ops.unpack(bits, n), draws >= threshold)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bool, torch.uint8), ids=str)
def test_pack_and_unpack(ops, dtype):
    for n in (*SIZES, 40_001):
        x = awkward(n, dtype if dtype.is_floating_point else torch.float32)
        if not dtype.is_floating_point:
            x = (x > 0).to(dtype) * (255 if dtype == torch.uint8 else 1)
        bits = ops.pack(x.to(dtype))
        assert torch.equal(bits, reference.pack(x.to(dtype)))
        assert torch.equal(ops.unpack(bits, n), x > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_does_not_start_at_a_vector(ops, dtype):
    # The first element and the bits of a slice are not aligned, and its neighbours must not change.
    whole, n, start = awkward(6000, dtype), 5003, 5
    bits = torch.randint(256, (700,), dtype=torch.uint8)[3 : 3 + (n + 7) // 8]
    expected = whole.clone()
    expected[start : start + n] = reference.shape(whole[start : start + n], None, bits, 0.0, True)

    there, bits = whole.clone().to(ops.device), bits.to(ops.device)
    ops.implementation.shape_(there[start : start + n], None, bits, 0.0, True)
    assert_same_bits(there.cpu(), expected)


@pytest.mark.parametrize("order", ((0, 3, 1, 2), (3, 1, 0, 2)), ids=("channels_last", "permuted"))
def test_elements_are_numbered_in_memory_order(ops, order):
    x = awkward(2 * 6 * 7 * 5, torch.float32).view(2, 6, 7, 5).permute(order)
    for mask in masks(x.numel()):
        expected = reference.shape_clipped(x, *mask, True)
        assert_equal(ops.shape_clipped(x, *mask, True), expected)
    assert torch.equal(ops.pack(x), reference.pack(x))


def test_unsuitable_arguments_are_errors(ops):
    x, state = torch.randn(3, 4), fastshape.rng_state(1)
    bits = torch.zeros(1, dtype=torch.uint8)
    for message, call in {
        "dense": lambda: ops.pack(torch.randn(12, 2).to(ops.device)[:, 0]),
        "2 bytes for 12 elements": lambda: ops.shape(x, None, bits, 0.0, True),
        "1 bytes for 3 elements": lambda: ops.unpack(torch.zeros(2, dtype=torch.uint8), 3),
        "rng_state must be": lambda: ops.shape(x, state.int(), None, 0.5, True),
        "p_zero must be in": lambda: ops.shape(x, state, None, 1.0, True),
        "cannot be shaped": lambda: ops.shape(x.long(), None, None, 0.0, True),
        "not both": lambda: ops.shape(x, state, torch.zeros(2, dtype=torch.uint8), 0.5, True),
        "n must not be negative": lambda: ops.pack_random(state, -1, 0.5),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", (2**31 + 77, 2**32 + 4096), ids=("2^31", "2^32"))
def test_more_than_2_31_elements(n):
    x = torch.ones(n, dtype=torch.float16, device="cuda")
    state = torch.tensor([5, 2**32 - 1000])
    triton.shape_(x, state.cuda(), None, 0.5, True)
    bits = triton.pack(x)
    assert torch.equal(bits, triton.pack_random(state.cuda(), n, 0.5))
    # Draws are numbered by element, so that any stretch equals a small mask with a later offset.
    for start in (0, 2**31 - 800, n // 8 * 8 - 8000):
        stretch = slice(start, min(start + 8000, n))
        later = torch.tensor([5, state[1] + start // 8])
        expected = reference.random_mask(later, stretch.stop - start, 0.5)
        assert torch.equal(x[stretch].bool().cpu(), expected)
        assert torch.equal(
            bits[start // 8 :][: (8000 + 7) // 8].cpu()[:1000], reference.pack_bool(expected)[:1000]
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_reads_the_state_at_each_replay():
    x, state = torch.ones(5000, device="cuda"), fastshape.rng_state(1, device="cuda")
    triton.shape(x, state, None, 0.5, True)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton.shape(x, state, None, 0.5, True)
    for seed in (2, 3):
        state.copy_(fastshape.rng_state(seed))
        graph.replay()
        expected = reference.shape(x.cpu(), fastshape.rng_state(seed), None, 0.5, True)
        assert_same_bits(y.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    x, state = awkward(5000, torch.float32), fastshape.rng_state(1)
    with torch.cuda.device(0):
        y = triton.shape(x.to("cuda:1"), state.to("cuda:1"), None, 0.5, True)
    assert y.device.index == 1
    assert_same_bits(y.cpu(), reference.shape(x, state, None, 0.5, True))


# ---- the code that Triton's compiler generates; no GPU is needed ----


def compile_shape(target, dtype: torch.dtype, mask: str, within_one: bool):
    """The `shape` kernel, compiled for one architecture as `triton.shape` launches it."""
    compiler = pytest.importorskip("triton.compiler")
    from fastshape.backends import triton_kernels

    integer, infinity, one = triton._PATTERNS[dtype]
    bits = 8 * dtype.itemsize
    types = {"x": f"*i{bits}", "y": f"*i{bits}", "n": "i64", "threshold": "i32"}
    pointers = {"within_one": "*u8", "rng_state": "*i64", "bits": "*u8"}
    arguments = {"rng_state" if mask == "random" else "bits"} | (
        {"within_one"} if within_one else set()
    )
    types |= {name: kind for name, kind in pointers.items() if name in arguments}
    constants = dict.fromkeys(set(pointers) - arguments)
    constants |= {"BINARIZE": True, "INFINITY": infinity, "ONE": one}
    constants |= {"BYTES": triton._PROGRAM_BYTES // bits}
    names = triton_kernels.shape.arg_names
    source = compiler.ASTSource(
        triton_kernels.shape,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        # Triton knows that torch's allocations start at multiples of 16 bytes.
        {
            (k,): [["tt.divisibility", 16]]
            for k, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    return compiler.compile(source, target=target, options={"num_warps": triton._WARPS})


@pytest.mark.skipif(triton.interpreted(), reason="Triton is interpreted in this process")
@pytest.mark.parametrize("mask", ("random", "given"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_and_stores_take_16_bytes(dtype, mask, tmp_path, monkeypatch):
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compile_shape(
        compiler.GPUTarget("cuda", 90, 32), dtype, mask, within_one=mask == "random"
    )
    # Programs whose elements all exist have two loads and two stores per thread.
    wide = "v2.b64" if dtype == torch.float64 else "v4.b32"
    assert kernel.asm["ptx"].count(f"ld.global.{wide}") == 2
    assert kernel.asm["ptx"].count(f"st.global.{wide}") == 2


@pytest.mark.skipif(triton.interpreted(), reason="Triton is interpreted in this process")
@pytest.mark.parametrize(
    "target", (("cuda", 75, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)), ids=str
)
def test_compiles_for_other_architectures(target, tmp_path, monkeypatch):
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compile_shape(compiler.GPUTarget(*target), torch.float16, "random", within_one=True)
    assert kernel.asm["cubin" if target[0] == "cuda" else "hsaco"]
