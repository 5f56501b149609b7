"""The CUDA kernels' source, compiled as C++ and run a warp at a time: the same bits as the reference, without a GPU.

A warp is 32 threads that meet at every exchange. That proves the arithmetic, who owns which byte, the tails and the
bounds; it proves nothing about memory models, speed or the launch.
"""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, as_bits, awkward

from fastshape import reference

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3, torch.bool: 4}
# At and around a mask byte, a tile (256) and a step of several tiles (256, 512 or 1024), and several rounds of the grid.
SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 3001, 12_007)
STATE = torch.tensor([1234567, 2**32 - 2])
GUARD = 16  # elements before and after, which must stay as they are


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler on x86-64")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    launch = "kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);"
    call = "(void)stream; emulation::run(blocks, kThreads, [&] { kernel(arguments...); });"
    source = (CSRC / "cuda" / "kernels.cu").read_text()
    assert source.count("<<<") == source.count(launch) == 1
    (folder / "kernels.cpp").write_text(source.replace(launch, call))
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread"]
    command += [f"-I{HERE / 'cuda_on_cpu'}", f"-I{CSRC / 'cuda'}", f"-I{CSRC / 'include'}"]
    command += [folder / "kernels.cpp", HERE / "cuda_on_cpu" / "emulation.cpp"]
    subprocess.run([*command, "-o", folder / "emulated.so"], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "emulated.so"))


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


def guarded(t: torch.Tensor, shift: int) -> torch.Tensor:
    """A storage with a copy of t inside; aligned to 16 bytes where shift is 0."""
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
def test_shape(emulated, dtype, kind, shift):
    for n in SIZES:
        x = awkward(n, dtype)
        bits = reference.pack(awkward(n, torch.float32, seed=9)) if kind == "bits" else None
        state = STATE if kind == "random" else None
        for binarize, inplace, clipped in (
            (True, False, True),
            (False, True, True),
            (True, True, False),
        ):
            expected, expected_within = reference.shape_clipped(x, state, bits, 0.37, binarize)
            source = guarded(x, shift)
            target = source if inplace else guarded(torch.zeros_like(x), shift)
            y = inside(target, shift, n)
            within = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8) if clipped else None
            error = emulated.shape(
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
def test_pack_and_unpack(emulated, shift):
    for n in SIZES:
        for dtype in (*DTYPES, torch.bool):
            x = torch.randn(n) > 0 if dtype == torch.bool else awkward(n, dtype)
            storage = guarded(x, shift)
            x = inside(storage, shift, n)
            bits = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8)
            assert emulated.pack(CODES[dtype], pointer(x), pointer(bits), ctypes.c_int64(n)) == 0
            assert torch.equal(bits[:-8], reference.pack(x)) and (bits[-8:] == 0xAA).all()
        out = guarded(torch.zeros(n, dtype=torch.uint8), shift)
        values = inside(out, shift, n)
        assert emulated.unpack(pointer(bits), pointer(values), ctypes.c_int64(n)) == 0
        assert torch.equal(values, reference.unpack(bits[:-8], n).byte())
        assert_guards(out, shift, n)


@pytest.mark.parametrize("p_zero", (0.0, 0.3, 1 - 1e-9))
@pytest.mark.parametrize("offset", (0, 2**32 - 3, -3), ids=("0", "2^32-3", "2^64-3"))
def test_pack_random(emulated, p_zero, offset):
    state = torch.tensor([-5, offset])
    for n in SIZES:
        bits = torch.full(((n + 7) // 8 + 8,), 0xAA, dtype=torch.uint8)
        error = emulated.pack_random(
            pointer(state), ctypes.c_double(p_zero), pointer(bits), ctypes.c_int64(n)
        )
        assert error == 0 and torch.equal(bits[:-8], reference.pack_random(state, n, p_zero))
        assert (bits[-8:] == 0xAA).all()


def test_grid_is_sized_from_the_device_and_changes_nothing(emulated):
    n = 60_011
    x = awkward(n, torch.float16)
    expected = reference.shape(x, STATE, None, 0.5, True)
    grids = []
    try:
        for multiprocessors, blocks in ((1, 1), (2, 1), (100, 8)):
            emulated.set_device(multiprocessors, blocks)
            y = torch.empty_like(x)
            emulated.shape(
                0, pointer(x), pointer(y), None, ctypes.c_int64(n), pointer(STATE), None,
                ctypes.c_double(0.5), 1,
            )  # fmt: skip
            assert torch.equal(as_bits(y), as_bits(expected))
            grids.append(emulated.last_grid())
    finally:
        emulated.set_device(2, 1)
    # 58 steps and three tiles of the tail: 61 warps of work, 8 a block.
    assert grids == [4, 8, 8]
