"""Fixtures that all tests share: real data, weights, kernels and threads."""

import os
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tensors")


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
    """The primitives of the compiled module."""
    return pytest.importorskip("fastshape._C", reason="the compiled kernels are not built")


@pytest.fixture(params=("plain", "avx2", "avx512"))
def simd(request, kernels) -> str:
    """Limits the kernels to one instruction set. Kernels that it does not have run with the next lower set."""
    try:
        if kernels.limit_simd(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        kernels.limit_simd("avx512")


@pytest.fixture
def threads():
    """torch.set_num_threads. The fixture restores the old number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
