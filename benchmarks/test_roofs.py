"""The limits of the machine: the roofs below which `roofline.py` draws the kernels."""

import pytest
import torch

import fastshape
from fastshape.reference import drop_threshold

N = 32 * 64 * 112 * 112


def copy_to_warm_memory():
    """Memory that was written before, so that the system does not have to map it."""
    x, y = torch.randn(2, N)
    return lambda: y.copy_(x), 2 * x.element_size() * N


def copy_to_fresh_memory():
    x = torch.randn(N)
    return x.clone, 2 * x.element_size() * N


@pytest.mark.parametrize(
    "roof", (copy_to_warm_memory, copy_to_fresh_memory), ids=lambda f: f.__name__
)
def test_bandwidth(benchmark, roof):
    call, moved = roof()
    benchmark.extra_info["bytes"] = moved
    benchmark.pedantic(call, rounds=15, warmup_rounds=3)


def test_random_bits(benchmark):
    """Philox alone: a mask of one bit per element, which hardly uses memory."""
    state = fastshape.rng_state(0)
    assert drop_threshold(0.5) > 0
    benchmark.extra_info["elements"] = N
    benchmark.pedantic(
        lambda: torch.ops.fastshape.pack_random(state, N, 0.5), rounds=15, warmup_rounds=3
    )
