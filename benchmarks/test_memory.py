"""Bytes saved for backward, and peak memory, of shaping + BatchNorm + ReLU as one op, against the contenders."""

import contenders
import pytest
import torch
from contenders import P_ZERO, BatchNormReLU
from test_block_speed import SIZES
from test_shape_speed import ConvolutionOutput
from torch.profiler import ProfilerActivity, profile

import fastshape

CONTENDERS = {
    "unshaped_eager": BatchNormReLU,
    "shaped_eager_reference": lambda c: BatchNormReLU(c, contenders.eager_reference),
    "shaped_published_numpy": lambda c: BatchNormReLU(c, contenders.published_numpy),
}


def saved_bytes(block, z) -> int:
    """Bytes of the distinct tensors that the graph saves for backward, without parameters and the block's result."""
    weight, sizes = torch.zeros((), requires_grad=True), {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(ConvolutionOutput.apply(weight, z))
    # The result exists in any case, because the next convolution saves it.
    for t in (y, *block.parameters(), *block.buffers()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_bytes(block, z, grad) -> int:
    """The peak of allocated bytes in forward + backward, above those before it."""
    weight = torch.zeros((), requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = block(ConvolutionOutput.apply(weight, z))
        torch.autograd.grad(y, [weight, *block.parameters()], grad)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("what", (saved_bytes, peak_bytes), ids=lambda f: f.__name__)
def test_memory(benchmark, size, contender, what):
    torch.manual_seed(0)
    channels = SIZES[size][1]
    blocks = (
        fastshape.ShapedBatchNorm2d(channels, p_zero=P_ZERO, relu=True, inplace=True),
        CONTENDERS[contender](channels),
    )
    arguments = (torch.randn(SIZES[size]),) if what is peak_bytes else ()

    def measure(block):
        return what(block, torch.randn(SIZES[size]), *arguments)

    ours, theirs = map(measure, blocks)
    benchmark.extra_info.update(ours_bytes=ours, theirs_bytes=theirs, ratio=theirs / ours)
    benchmark.pedantic(lambda: None)  # nothing is timed; pytest-benchmark only stores extra_info
