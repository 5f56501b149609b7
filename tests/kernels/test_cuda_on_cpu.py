"""The source of the CUDA kernels, compiled as C++ and run one warp at a time without a GPU, equals the reference bit for bit.

The 32 lanes of a warp run in turn, each until its next exchange. This tests the arithmetic, the ownership of bytes, the tails
and the bounds, and where the compiler can, that nothing in it is undefined in C++. It does not test memory models, speed or the
launch.
"""

import ctypes
import math
import platform
import shutil
import subprocess
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from tensors import DTYPES, as_bits, awkward

from fastshape import reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3, torch.bool: 4}
# Sizes around a mask byte, a tile (256) and a step of several tiles (256, 512 or 1024); the largest makes blocks loop.
SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 3001, 12_007)
# Tails that end in each of the 8 accesses of an incomplete tile, 32 elements each: at its first, a middle and its last element.
TAILS = [1024 + 32 * access + last for access in range(8) for last in (1, 13, 32)]
STATE = torch.tensor([1234567, 2**32 - 2])
GUARD = 16  # elements before and after a tensor, which must not change


class Pointer:
    """Passes a tensor or None to a C function."""

    @classmethod
    def from_param(cls, t: torch.Tensor | None) -> ctypes.c_void_p:
        return pointer(t)


TYPES = {"p": Pointer, "i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double}
SIGNATURES = {  # the functions of emulation.cpp
    "pack_top": "ipplll",
    "ones": "ippplppd",
    "count": "plllp",
    "normalize": "ppippiiddiipllpp",
    "look_up": "iplllpp",
    "partials": "lll",
    "sums": "ipplllp",
    "differentiate": "ppiiiipplllppp",
    "grad_input": "ipplllppdpp",
    "divided": "ll",
}


def undefined_behavior_flags(compiler: str, folder: Path) -> list[str]:
    """The options that make the library report undefined behavior on stderr; none if the compiler has no such runtime."""
    source, flags = folder / "empty.cc", ["-fsanitize=undefined"]
    source.write_text("int main() {}")
    command = [compiler, *flags, source, "-o", folder / "empty"]
    process = subprocess.run(command, capture_output=True, timeout=60)
    return flags if process.returncode == 0 else []


@pytest.fixture(autouse=True)
def no_undefined_behavior(capfd):
    yield
    reports = [line for line in capfd.readouterr().err.splitlines() if "runtime error" in line]
    assert not reports


def test_undefined_behavior_is_reported(tmp_path, capfd):
    compiler = shutil.which("c++")
    flags = [] if compiler is None else undefined_behavior_flags(compiler, tmp_path)
    if not flags:
        pytest.skip("no C++ compiler that reports undefined behavior")
    source, library = tmp_path / "faults.cpp", tmp_path / "faults.so"
    source.write_text(
        'extern "C" int shifted(int by) { return 1 << by; }\n'
        'extern "C" int loaded(const char* from) { return *reinterpret_cast<const int*>(from); }\n'
    )
    command = [compiler, "-O1", "-fPIC", "-shared", *flags, source, "-o", library]
    subprocess.run(command, check=True, timeout=60)
    faults = ctypes.CDLL(str(library))
    numbers = torch.zeros(8, dtype=torch.uint8)
    for call, argument, word in (
        (faults.shifted, ctypes.c_int(40), "shift exponent"),
        (faults.loaded, pointer(numbers[1:]), "misaligned address"),
    ):
        call(argument)
        error = capfd.readouterr().err
        assert "runtime error" in error and word in error


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler on x86-64")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    launch = "kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);"
    call = "(void)stream; emulation::run(blocks, threads, [&] { kernel(arguments...); });"
    launches = 0
    for path in (CSRC / "cuda").glob("*.cu*"):
        source = path.read_text()
        assert source.count("<<<") == source.count(launch)
        launches += source.count(launch)
        name = path.with_suffix(".cpp").name if path.suffix == ".cu" else path.name
        (folder / name).write_text(source.replace(launch, call))
    assert launches == 1
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-pthread"]
    command += undefined_behavior_flags(compiler, folder)
    command += [f"-I{folder}", f"-I{HERE / 'cuda_on_cpu'}", f"-I{CSRC / 'include'}"]
    sources = [*folder.glob("*.cpp"), HERE / "cuda_on_cpu" / "emulation.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([*command, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait(timeout=300) for process in compilers] == [0] * len(sources)
    subprocess.run([*command, "-shared", *objects, "-o", folder / "emulation.so"], check=True)
    library = ctypes.CDLL(str(folder / "emulation.so"))
    for name, codes in SIGNATURES.items():
        getattr(library, name).argtypes = [TYPES[code] for code in codes]
    library.partials.restype = library.divided.restype = ctypes.c_int64
    return library


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


def guarded_storage(t: torch.Tensor, shift: int) -> torch.Tensor:
    """A storage with a copy of t between guards. The copy is aligned to 16 bytes if shift is 0."""
    storage = torch.full((t.numel() + 2 * GUARD + shift,), 7, dtype=t.dtype)
    inside(storage, shift, t.numel()).copy_(t)
    return storage


def inside(storage: torch.Tensor, shift: int, n: int) -> torch.Tensor:
    return storage[GUARD + shift : GUARD + shift + n]


def assert_guards(storage: torch.Tensor, shift: int, n: int) -> None:
    assert (storage[: GUARD + shift] == 7).all() and (storage[GUARD + shift + n :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("random", "bits", "none"))
@pytest.mark.parametrize("shift", (0, 1), ids=("aligned", "misaligned"))
def test_shape(emulation, dtype, kind, shift):
    for n in (*SIZES, *TAILS):
        x = awkward(n, dtype)
        bits = reference.pack(awkward(n, torch.float32, seed=9)) if kind == "bits" else None
        state = STATE if kind == "random" else None
        for binarize, inplace, clipped in (
            (True, False, True),
            (False, True, True),
            (True, True, False),
        ):
            expected, expected_within = reference.shape_clipped(x, state, bits, 0.37, binarize)
            source = guarded_storage(x, shift)
            target = source if inplace else guarded_storage(torch.zeros_like(x), shift)
            y = inside(target, shift, n)
            within = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8) if clipped else None
            error = emulation.shape(
                CODES[dtype],
                pointer(inside(source, shift, n)),
                pointer(y),
                pointer(within),
                ctypes.c_int64(n),
                pointer(state),
                pointer(bits),
                ctypes.c_double(0.37),
                binarize,
            )
            assert error == 0 and torch.equal(as_bits(y), as_bits(expected))
            assert_guards(target, shift, n)
            if clipped:
                assert torch.equal(within[:-8], expected_within) and (within[-8:] == 0xAA).all()


@pytest.mark.parametrize("shift", (0, 1), ids=("aligned", "misaligned"))
def test_pack_and_unpack(emulation, shift):
    for n in (*SIZES, *TAILS):
        for dtype in (*DTYPES, torch.bool):
            x = torch.randn(n) > 0 if dtype == torch.bool else awkward(n, dtype)
            storage = guarded_storage(x, shift)
            x = inside(storage, shift, n)
            bits = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8)
            assert emulation.pack(CODES[dtype], pointer(x), pointer(bits), ctypes.c_int64(n)) == 0
            assert torch.equal(bits[:-8], reference.pack(x)) and (bits[-8:] == 0xAA).all()
        out = guarded_storage(torch.zeros(n, dtype=torch.uint8), shift)
        values = inside(out, shift, n)
        assert emulation.unpack(pointer(bits), pointer(values), ctypes.c_int64(n)) == 0
        assert torch.equal(values, reference.unpack(bits[:-8], n).byte())
        assert_guards(out, shift, n)


@pytest.mark.parametrize("p_zero", (0.0, 0.3, 1 - 1e-9))
@pytest.mark.parametrize("offset", (0, 2**32 - 3, -3), ids=("0", "2^32-3", "2^64-3"))
def test_pack_random(emulation, p_zero, offset):
    state = torch.tensor([-5, offset])
    for n in (*SIZES, *TAILS):
        bits = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8)
        error = emulation.pack_random(
            pointer(state), ctypes.c_double(p_zero), pointer(bits), ctypes.c_int64(n)
        )
        assert error == 0 and torch.equal(bits[:-8], reference.pack_random(state, n, p_zero))
        assert (bits[-8:] == 0xAA).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", (1, 3, 8, 49, 196, 3001))
def test_pack_top(emulation, dtype, row):
    """More groups of rows than warps, an incomplete last group, and bytes of several rows."""
    rows = max(3, 1200 // row) | 1
    n = rows * row
    for shift, x in enumerate((awkward(n, dtype), awkward(n, dtype).relu())):
        for count in {1, row // 3, row - 1, row}:
            bits = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8)
            source = guarded_storage(x, shift)
            code = CODES[dtype]
            assert emulation.pack_top(code, inside(source, shift, n), bits, n, row, count) == 0
            assert torch.equal(bits[:-8], reference.pack_top(x, row, count))
            assert (bits[-8:] == 0xAA).all()


def test_grid_is_sized_from_the_device_and_changes_nothing(emulation):
    n = 60_011
    x = awkward(n, torch.float16)
    expected = reference.shape(x, STATE, None, 0.5, True)
    grids = []
    try:
        for multiprocessors, blocks in ((1, 1), (2, 1), (100, 8)):
            emulation.set_device(multiprocessors, blocks)
            y = torch.empty_like(x)
            emulation.shape(
                0, pointer(x), pointer(y), None, ctypes.c_int64(n), pointer(STATE), None,
                ctypes.c_double(0.5), 1,
            )  # fmt: skip
            assert torch.equal(as_bits(y), as_bits(expected))
            grids.append(emulation.last_grid())
    finally:
        emulation.set_device(2, 1)
    # 58 steps and three plain tiles are work for 61 warps, 8 per block.
    assert grids == [4, 8, 8]


# ---- shape + BatchNorm2d (+ ReLU), step by step ----

PLANES = ((1, 1), (3, 5), (7, 7), (14, 14), (112, 5))
CHANNELS = (1, 3, 8, 20, 64)
FORMATS = (torch.contiguous_format, torch.channels_last)


def flat(t: torch.Tensor) -> torch.Tensor:
    return reference.in_memory_order(t)


def inner_of(x: torch.Tensor) -> int:
    return x.shape[2] * x.shape[3] if x.is_contiguous() else 1


def bits_for(n: int) -> torch.Tensor:
    return torch.full(((n + 7) // 8,), 0xAA, dtype=torch.uint8)


def guarded_view(t: torch.Tensor, shift: int):
    """(storage with guards, a copy of t in it). The copy is aligned to 16 bytes if shift is 0."""
    storage = guarded_storage(flat(t), shift)
    return storage, inside(storage, shift, t.numel()).as_strided(
        t.size(), t.stride(), GUARD + shift
    )


def assert_equal_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    same = as_bits(actual) == as_bits(expected)
    assert (same | (actual.isnan() & expected.isnan())).all()


class Layer:
    """The parameters and settings of a BatchNorm2d. The weights have both signs, and one is 0."""

    def __init__(
        self, channels, *, affine=True, tracks=True, training=True, relu=True, dtype=torch.float32
    ):
        generator = torch.Generator().manual_seed(channels)
        self.training, self.relu = training, relu
        self.weight = self.bias = self.running_mean = self.running_var = None
        if affine:
            self.weight = torch.randn(channels, generator=generator).to(dtype)
            self.weight[channels // 2] = 0
            self.bias = torch.randn(channels, generator=generator).to(dtype)
        if tracks:
            self.running_mean = torch.rand(channels, generator=generator)
            self.running_var = torch.rand(channels, generator=generator)

    @property
    def running(self) -> tuple:
        return self.running_mean, self.running_var

    @property
    def parameters(self) -> tuple:
        """weight, bias and the code of their dtype, as arguments of the C functions."""
        code = CODES[self.weight.dtype] if self.weight is not None else 0
        return self.weight, self.bias, code

    def reference_forward(self, x, masks, p_zero, clipped):
        """y, ones, within_one, statistics and running statistics. The layer's own running statistics do not change."""
        running = [None if t is None else t.clone() for t in self.running]
        out = reference.shaped_batch_norm(
            x, *masks, p_zero, self.weight, self.bias, *running, self.training, 0.1, 1e-5, self.relu, clipped
        )  # fmt: skip
        return *out, running

    def reference_backward(self, grad, ones, statistics, masks, p_zero):
        return reference.shaped_batch_norm_backward(
            grad, ones, statistics, *masks, p_zero, self.weight, self.bias, self.training, self.relu, True
        )  # fmt: skip

    def emulated_forward(self, emulation, x, y, masks, p_zero, clipped):
        n, channels = x.numel(), x.shape[1]
        ones, within_one = bits_for(n), bits_for(n if clipped else 0)
        code, running = CODES[x.dtype], [None if t is None else t.clone() for t in self.running]
        assert (
            emulation.ones(code, x, ones, within_one if clipped else None, n, *masks, p_zero) == 0
        )
        counts = torch.full((channels if self.training else 0,), 77)
        if self.training:
            assert emulation.count(ones, n, channels, inner_of(x), counts) == 0
        statistics = torch.full((2, channels), 7.0, dtype=torch.float64)
        table = torch.full((2, channels), 7, dtype=x.dtype)
        assert (
            emulation.normalize(
                *self.parameters, *running, CODES[torch.float32], self.training, 0.1, 1e-5, self.relu, code,
                counts if self.training else None, n, channels, statistics, table,
            )
            == 0
        )  # fmt: skip
        assert emulation.look_up(code, ones, n, channels, inner_of(x), table, y) == 0
        return ones, within_one, statistics, running

    def emulated_sums(self, emulation, grad, ones):
        """float64 (parts, 2, channels)."""
        shape = grad.numel(), grad.shape[1], inner_of(grad)
        parts = torch.full((emulation.partials(*shape), 2, grad.shape[1]), 7.0, dtype=torch.float64)
        assert emulation.sums(CODES[grad.dtype], grad, ones, *shape, parts) == 0
        return parts

    def emulated_backward(self, emulation, grad, dx, ones, statistics, masks, p_zero):
        """d(weight), d(bias) and the coefficients; writes dx."""
        n, channels = grad.numel(), grad.shape[1]
        parts = self.emulated_sums(emulation, grad, ones)
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        coefficients = torch.full((4, channels), 7, dtype=wide)
        grads = [None if t is None else torch.full_like(t, 7) for t in (self.weight, self.bias)]
        assert (
            emulation.differentiate(
                *self.parameters, self.training, self.relu, CODES[grad.dtype], statistics, parts,
                len(parts), n, channels, *grads, coefficients,
            )
            == 0
        )  # fmt: skip
        shape = n, channels, inner_of(grad)
        assert (
            emulation.grad_input(
                CODES[grad.dtype], grad, ones, *shape, *masks, p_zero, coefficients, dx
            )
            == 0
        )
        return *grads, coefficients


def mask_of(kind: str, n: int) -> tuple:
    """(rng_state, bits)"""
    bits = reference.pack(awkward(n, torch.float32, seed=9)) if kind == "bits" else None
    return (STATE if kind == "random" else None), bits


def images_of(channels: int, plane: tuple) -> int:
    """A number of images from 1 to 5 that varies with the shape."""
    return (channels + plane[0]) % 5 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ("random", "bits", "none"))
def test_batch_norm_forward(emulation, dtype, memory_format, kind):
    for case, (channels, plane) in enumerate(product(CHANNELS, PLANES)):
        shape = (images_of(channels, plane), channels, *plane)
        x = awkward(math.prod(shape), dtype).view(shape).contiguous(memory_format=memory_format)
        masks, shift, clipped = mask_of(kind, x.numel()), case % 2, case % 3 == 0
        layer = Layer(channels, relu=case % 4 != 1, affine=case % 5 != 2, training=case % 6 != 5)
        y, *expected = layer.reference_forward(x, masks, 0.37, clipped)
        source, inner_map = guarded_view(x, shift)
        before = source.clone()
        target, actual = (source, inner_map) if case % 2 else guarded_view(torch.zeros_like(x), 0)
        ones, within, statistics, running = layer.emulated_forward(
            emulation, inner_map, actual, masks, 0.37, clipped
        )
        assert torch.equal(ones, expected[0]) and torch.equal(within, expected[1])
        assert_equal_numbers(statistics, expected[2])
        for now, then in zip(running, expected[3], strict=True):
            assert_equal_numbers(now, then)
        assert_equal_numbers(actual, y)
        assert_guards(target, shift if case % 2 else 0, x.numel())
        assert case % 2 or torch.equal(as_bits(source), as_bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ("random", "bits", "none"))
def test_batch_norm_backward(emulation, dtype, memory_format, kind):
    """Gradients are eighths of small integers. Their sums are exact in any order, so that all bits must be equal."""
    for case, (channels, plane) in enumerate(product(CHANNELS, PLANES)):
        shape = (images_of(channels, plane), channels, *plane)
        x = awkward(math.prod(shape), dtype).view(shape).contiguous(memory_format=memory_format)
        masks, shift = mask_of(kind, x.numel()), case % 2
        parameters = (torch.float32, dtype)[case % 2]
        layer = Layer(
            channels, relu=case % 4 != 1, affine=case % 5 != 2, training=case % 6 != 5, dtype=parameters
        )  # fmt: skip
        _, ones, _, statistics, _ = layer.reference_forward(x, masks, 0.37, False)
        generator = torch.Generator().manual_seed(case)
        grad = torch.randint(-16, 17, shape, generator=generator).to(dtype) / 8
        grad = grad.contiguous(memory_format=memory_format)
        dx, *expected = layer.reference_backward(grad, ones, statistics, masks, 0.37)
        source, inner_map = guarded_view(grad, shift)
        target, actual = guarded_view(torch.zeros_like(grad), shift)
        before = source.clone()
        *grads, _ = layer.emulated_backward(
            emulation, inner_map, actual, ones, statistics, masks, 0.37
        )
        assert_equal_numbers(actual, dx)
        if layer.weight is not None:
            assert_equal_numbers(grads[0], expected[0])
            assert_equal_numbers(grads[1], expected[1])
        assert_guards(target, shift, x.numel())
        assert torch.equal(as_bits(source), as_bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_sums_are_within_their_bound(emulation, dtype, memory_format):
    """Many and few rows, one and several chunks per plane. The bits do not depend on the alignment."""
    for shape in ((2, 3, 95, 97), (3, 72, 9, 31), (1, 5, 1, 1), (300, 2, 3, 2), (2, 260, 3, 3)):
        n = math.prod(shape)
        grad = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        grad = (grad * 100).to(dtype).view(shape).contiguous(memory_format=memory_format)
        ones = reference.pack(awkward(n, torch.float32, seed=3))
        layer = Layer(shape[1])
        parts = layer.emulated_sums(emulation, guarded_view(grad, 0)[1], ones)
        assert torch.equal(parts, layer.emulated_sums(emulation, guarded_view(grad, 1)[1], ones))
        a = reference.unpack(ones, n).as_strided(grad.size(), grad.stride())
        unit = n * 2**-53 + (0 if dtype == torch.float64 else 64 * 2**-24)
        for value, where in enumerate((~a, a)):
            values = torch.where(where, grad.double(), 0)
            error = (parts[:, value].sum(0) - values.sum((0, 2, 3))).abs()
            assert (error <= unit * values.abs().sum((0, 2, 3))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_input_gradient_of_any_gradient(emulation, dtype, memory_format):
    """Gradients with NaN, infinities and denormal numbers, for given coefficients. After a closed ReLU they have no effect."""
    shape = (3, 20, 7, 9)
    x = awkward(math.prod(shape), dtype).view(shape).contiguous(memory_format=memory_format)
    grad = (
        awkward(math.prod(shape), dtype, seed=2).view(shape).contiguous(memory_format=memory_format)
    )
    for kind in ("random", "bits", "none"):
        masks = mask_of(kind, x.numel())
        layer = Layer(20)
        _, ones, _, statistics, _ = layer.reference_forward(x, masks, 0.37, False)
        dx = torch.zeros_like(grad)
        *_, coefficients = layer.emulated_backward(
            emulation, grad, dx, ones, statistics, masks, 0.37
        )
        a = reference.unpack(ones, x.numel()).as_strided(x.size(), x.stride())
        scale0, scale1, shift0, shift1 = coefficients[:, :, None, None]
        assert (scale0 == 0).any() and (scale1 == 0).any()
        scale, shift = torch.where(a, scale1, scale0), torch.where(a, shift1, shift0)
        product = torch.where(scale != 0, scale * grad.to(scale.dtype), 0)
        mask = reference._mask(x, *masks, 0.37)
        expected = (product + shift).to(dtype)
        expected = (
            expected if mask is None else torch.where(mask, expected, torch.zeros((), dtype=dtype))
        )
        assert_equal_numbers(dx, expected)


def assert_batch_norm_equals_the_reference(
    emulation, shape, dtype, memory_format, kind, clipped=True
):
    """A training step of a BatchNorm. Gradients are eighths, as above."""
    n, channels = math.prod(shape), shape[1]
    x = awkward(n, dtype).view(shape).contiguous(memory_format=memory_format)
    masks, layer = mask_of(kind, n), Layer(channels)
    y, *expected = layer.reference_forward(x, masks, 0.37, clipped)
    storage, actual = guarded_view(torch.zeros_like(x), 0)
    ones, within, statistics, running = layer.emulated_forward(
        emulation, guarded_view(x, 0)[1], actual, masks, 0.37, clipped
    )
    assert torch.equal(ones, expected[0]) and torch.equal(within, expected[1])
    for now, then in zip((statistics, *running), (expected[2], *expected[3]), strict=True):
        assert_equal_numbers(now, then)
    assert_equal_numbers(actual, y)
    assert_guards(storage, 0, n)
    grad = torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(n)).to(dtype) / 8
    grad = grad.contiguous(memory_format=memory_format)
    dx, *expected = layer.reference_backward(grad, ones, statistics, masks, 0.37)
    storage, actual = guarded_view(torch.zeros_like(grad), 0)
    *grads, _ = layer.emulated_backward(
        emulation, guarded_view(grad, 0)[1], actual, ones, statistics, masks, 0.37
    )
    assert_equal_numbers(actual, dx)
    assert_equal_numbers(grads[0], expected[0])
    assert_equal_numbers(grads[1], expected[1])
    assert_guards(storage, 0, n)


# Planes of several chunks, of which count has 8,192 elements each and sums 4,096: whole ones, and an odd end.
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("plane", ((112, 112), (64, 128), (103, 107), (129, 127)), ids=str)
def test_planes_of_several_chunks(emulation, dtype, memory_format, plane):
    assert_batch_norm_equals_the_reference(
        emulation, (2, 3, *plane), dtype, memory_format, "random"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_tails_of_batch_norm(emulation, dtype, memory_format):
    for k, n in enumerate(TAILS):
        kind = ("random", "bits", "none")[k % 3]
        assert_batch_norm_equals_the_reference(emulation, (1, 1, 1, n), dtype, memory_format, kind)
        if n % 3 == 0:
            shape = (n // 3, 3, 1, 1)
            assert_batch_norm_equals_the_reference(emulation, shape, dtype, memory_format, kind)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_map_without_elements(emulation, memory_format):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)):
        x = torch.empty(shape).contiguous(memory_format=memory_format)
        layer = Layer(3) if shape[1] else Layer(1)
        if shape[1] == 0:
            layer.weight, layer.bias = torch.empty(0), torch.empty(0)
            layer.running_mean, layer.running_var = torch.empty(0), torch.empty(0)
        _, _, statistics, running = layer.emulated_forward(emulation, x, x, (None, None), 0.0, True)
        assert statistics.shape == (2, shape[1]) and statistics[0].isnan().all()
        for now, then in zip(running, layer.running, strict=True):
            assert torch.equal(now, then)
        grad_weight, grad_bias, _ = layer.emulated_backward(
            emulation, x, x, bits_for(0), statistics, (None, None), 0.0
        )
        assert (grad_bias == 0).all() and grad_weight.shape == (shape[1],)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ((2, 24, 31, 33), (3, 100, 5, 7)), ids=str)
def test_the_grid_changes_no_bit_of_batch_norm(emulation, memory_format, shape):
    x = torch.randn(shape).contiguous(memory_format=memory_format).half()
    grad = torch.randn(shape).contiguous(memory_format=memory_format).half()
    layer, masks, runs = Layer(shape[1]), (STATE, None), []
    try:
        for multiprocessors, blocks in ((1, 1), (3, 2), (1000, 8)):
            emulation.set_device(multiprocessors, blocks)
            y, dx = torch.zeros_like(x), torch.zeros_like(x)
            ones, _, statistics, running = layer.emulated_forward(
                emulation, x, y, masks, 0.5, False
            )
            grads = layer.emulated_backward(emulation, grad, dx, ones, statistics, masks, 0.5)
            runs.append([y, dx, statistics, *running, *grads])
    finally:
        emulation.set_device(2, 1)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(as_bits(a), as_bits(b))


def test_channel_of_an_element(emulation):
    """Division by multiplication at its hardest: around multiples of the divisor, up to 2^63."""
    random = Random(1)
    divisors = [1, 2, 3, 5, 7, 49, 64, 12_544, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**62 + 1]
    divisors += [random.randrange(1, 2 ** random.randrange(1, 63)) for _ in range(300)]
    for divisor in divisors:
        for _ in range(30):
            multiple = random.randrange(0, 2 ** random.randrange(1, 64)) // divisor * divisor
            for x in (multiple - 1, multiple, multiple + 1, 2**63 - 1):
                if 0 <= x < 2**63:
                    assert emulation.divided(x, divisor) == x // divisor
