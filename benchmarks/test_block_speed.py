"""Shaping, BatchNorm and ReLU as one op, against the same in parts and against BatchNorm and ReLU without shaping."""

import functools

import contenders
import pytest
import torch
from contenders import P_ZERO, BatchNormReLU
from test_shape_speed import ConvolutionOutput

import fastshape

# Maps after conv 1 and in layer 1 of ResNet-18, for images of 224 pixels.
SIZES = {"conv1": (16, 64, 112, 112), "layer1": (32, 64, 56, 56)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def compiled(channels, shaping=None):
    torch._dynamo.reset()
    return torch.compile(BatchNormReLU(channels, shaping), fullgraph=True)


def compiled_shaped(channels):
    # The state is an input, so that Inductor does not have to fuse a random draw.
    block = compiled(
        channels, lambda x: fastshape.reference.differentiable_shape(x, STATE, None, P_ZERO)
    )
    return block


STATE = fastshape.rng_state(0)
CONTENDERS = {
    "shaped_eager_reference": lambda c: BatchNormReLU(c, contenders.eager_reference),
    "shaped_torch_compile": compiled_shaped,
    "shaped_by_parts": lambda c: BatchNormReLU(c, contenders.fastshape_shape),
    "shaped_published_numpy": lambda c: BatchNormReLU(c, contenders.published_numpy),
    "unshaped_eager": BatchNormReLU,
    "unshaped_torch_compile": compiled,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_block(against, size, memory_format, contender):
    torch.manual_seed(0)
    channels = SIZES[size][1]
    values = torch.randn(SIZES[size]).contiguous(memory_format=FORMATS[memory_format])
    z, grad = torch.empty_like(values), torch.randn_like(values)
    weight = torch.zeros((), requires_grad=True)
    ours = fastshape.ShapedBatchNorm2d(channels, p_zero=P_ZERO, relu=True, inplace=True)
    theirs = CONTENDERS[contender](channels)

    def call(block):
        y = block(ConvolutionOutput.apply(weight, z.detach_()))
        torch.autograd.grad(y, [weight, *block.parameters()], grad)

    # Reads z, writes y, reads dy twice and writes dz. Writes the bits of the map once and reads them three times.
    moved = int((5 * z.element_size() + 4 / 8) * z.numel())
    # These contenders take a second or more, or are compiled first.
    slow = contender not in ("unshaped_eager", "shaped_by_parts")
    rounds = {"rounds": 5, "warmup_rounds": 1} if slow else {}
    against(
        functools.partial(call, ours),
        functools.partial(call, theirs),
        moved,
        prepare=lambda: z.detach_().copy_(values),
        **rounds,
    )
