"""The CPU kernels of `pack_top` equal the reference bit for bit, and the reference takes what a sort by hand takes."""

import pytest
import torch
from tensors import DTYPES, awkward

import fastshape
from fastshape import reference

ops = torch.ops.fastshape

# Rows below and above a byte, a block of keys (512) and a histogram's worth of candidates; and how many of them.
ROWS = {1: 19, 2: 9, 7: 41, 8: 5, 49: 67, 196: 9, 511: 9, 512: 3, 513: 9, 3136: 9, 12_545: 3}


def maps(n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Maps of n elements: special values, many ties, one sign."""
    x = awkward(n, dtype)
    generator = torch.Generator().manual_seed(1)
    zeros = torch.zeros(n, dtype=dtype)
    zeros[torch.rand(n, generator=generator) < 0.5] = -0.0
    return {
        "awkward": x,
        "after a ReLU": (x - 1).relu(),
        "integers": (2 * x).round(),
        "zeros of both signs": zeros,
        "negative": -x.abs(),
        "NaN": torch.where(x > 0, float("nan"), x),
        "close": 1 + torch.finfo(dtype).eps * torch.randint(0, 900, (n,), generator=generator).to(dtype),
    }  # fmt: skip


def counts(row: int) -> set[int]:
    return {0, 1, row // 4, row // 2, row - 1, row}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(simd, threads, row, dtype):
    for name, x in maps(ROWS[row] * row, dtype).items():
        for count in counts(row):
            expected = reference.pack_top(x, row, count)
            for number in (1, 2):
                threads(number)
                assert torch.equal(ops.pack_top(x, row, count), expected), (name, count, number)


def test_threads_share_no_byte(simd, threads):
    """More rows than one thread takes at once, whose bits begin and end within bytes."""
    x = torch.randn(4001 * 49, generator=torch.Generator().manual_seed(2))
    expected = reference.pack_top(x, 49, 12)
    for number in (1, 2, 3):
        threads(number)
        for _ in range(5):
            assert torch.equal(ops.pack_top(x, 49, 12), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_by_hand(simd, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([-0.0, 1.0, nan, 0.0, inf, -inf, -nan, -1.0, -0.0], dtype=dtype)
    order = [2, 6, 4, 1, 0, 3, 8, 7, 5]  # NaN of both signs, inf, 1, zeros of both signs, -1, -inf
    for count in range(10):
        for bits in (ops.pack_top(x, 9, count), reference.pack_top(x, 9, count)):
            kept = reference.unpack(bits, 9).nonzero().flatten().tolist()
            assert kept == sorted(order[:count])


@pytest.mark.parametrize("pack_top", (ops.pack_top, reference.pack_top), ids=("op", "reference"))
@pytest.mark.parametrize(
    ("row", "count", "message"),
    (
        (5, 1, "row must divide the 12 elements of x and be from 1 to 2.32 - 1, not 5"),
        (0, 0, "row must .*, not 0"),
        (-3, 0, "row must .*, not -3"),
        (4, 5, "count must be from 0 to row=4, not 5"),
        (4, -1, "count must be from 0 to row=4, not -1"),
    ),
)
def test_refuses(pack_top, row, count, message):
    with pytest.raises(RuntimeError, match=message):
        pack_top(torch.randn(12), row, count)


@pytest.mark.parametrize("pack_top", (ops.pack_top, reference.pack_top), ids=("op", "reference"))
def test_refuses_a_map_that_is_not_contiguous(pack_top):
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        pack_top(torch.randn(3, 4).t(), 4, 1)


def test_the_kernel_refuses_integers(kernels):
    if fastshape.backend_info()["cpu"] != "native":
        pytest.skip("the kernels are not in use")
    with pytest.raises(RuntimeError, match="float16, bfloat16, float32 and float64"):
        ops.pack_top(torch.arange(4), 4, 1)


def test_a_map_without_elements():
    assert ops.pack_top(torch.empty(0, 3), 3, 2).shape == (0,)


def test_under_vmap_it_refuses():
    with pytest.raises(NotImplementedError, match="fastshape has no vmap rule"):
        torch.func.vmap(lambda row: ops.pack_top(row, 4, 1))(torch.randn(3, 4))
