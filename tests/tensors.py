"""Dtypes, sizes, awkward values and bitwise comparison for the tests of kernels and package."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Sizes around a mask byte (8), a block of vectors (64) and a thread's share (32768).
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 99, 999, 32768, 100_003)


def awkward(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """(n,) normal values with NaNs, infinities, zeros, denormal numbers and numbers around 1 among them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    tiny, eps = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    special = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]
    special += [
        tiny,
        -tiny,
        tiny / 4,
        -tiny / 4,
        1 + eps,
        -1 - eps,
        1 - eps / 2,
        torch.finfo(dtype).max,
    ]
    for k, value in enumerate(special):
        x[k * 7 + 3 :: 131] = value
    return x


def as_bits(t: torch.Tensor) -> torch.Tensor:
    """The elements as integers of the same width. Their equality distinguishes -0 from +0 and one NaN from another."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert torch.equal(as_bits(actual), as_bits(expected))
