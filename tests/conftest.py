"""What the tests share: the sizes and dtypes every backend is held to, and where real data is."""

import os
from pathlib import Path

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Below, at and above a mask byte (8), a vector block (64) and a thread's share (32768).
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 99, 999, 32768, 100_003)


def awkward(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """(n,) normal values with every special number among them, at places that shift with n."""
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
    """The tensor's memory as integers: equality that tells -0 from +0 and one NaN from another."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert torch.equal(as_bits(actual), as_bits(expected))


@pytest.fixture
def pacs() -> Path:
    """The real PACS folder."""
    path = os.environ.get("FASTSHAPE_PACS")
    if not path:
        pytest.skip("FASTSHAPE_PACS does not name a PACS folder")
    return Path(path)


@pytest.fixture
def imagenet_weights() -> Path:
    """A ResNet-18 state dict trained on ImageNet."""
    path = os.environ.get("FASTSHAPE_WEIGHTS")
    if not path:
        pytest.skip("FASTSHAPE_WEIGHTS does not name a weights file or folder")
    path = Path(path)
    return next(path.glob("*.pth")) if path.is_dir() else path


@pytest.fixture
def kernels():
    """The compiled module's primitives."""
    return pytest.importorskip("fastshape._C", reason="the compiled kernels are not built")


@pytest.fixture(params=("plain", "avx2", "avx512"))
def simd(request, kernels) -> str:
    """The kernels of one instruction set, and of those below it where it has none of its own."""
    try:
        if kernels.limit_simd(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        kernels.limit_simd("avx512")


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
