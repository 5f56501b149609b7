"""Random and target shaping, forward and forward + backward, against common alternatives."""

import functools

import contenders
import pytest
import torch
from contenders import P_ZERO

import fastshape

# Maps of ResNet-18 after conv 1 and in layer 1.
SIZES = {"large": (32, 64, 112, 112), "small": (8, 64, 56, 56)}
CONTENDERS = (
    contenders.eager_reference,
    contenders.torch_compile_of_reference,
    contenders.dropout,
    contenders.published_numpy,
    contenders.clone,
)


class ConvolutionOutput(torch.autograd.Function):
    """A stand-in for a convolution. It gives `z` a node in the graph without changing it, and takes its gradient."""

    @staticmethod
    def forward(ctx, weight, z):
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(()), None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda f: f.__name__)
def test_random_shaping(against, size, direction, contender):
    torch.manual_seed(0)
    x = torch.randn(SIZES[size])
    passes = 1
    if direction == "forward+backward":
        passes = 2
        x.requires_grad_()
        grad = torch.randn_like(x)

    def call(shaping):
        y = shaping(x)
        if passes == 2:
            torch.autograd.grad(y, x, grad)

    against(
        functools.partial(call, contenders.fastshape_shape),
        functools.partial(call, contender),
        moved_bytes=passes * 2 * x.element_size() * x.numel(),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", CONTENDERS[:-1], ids=lambda f: f.__name__)
def test_random_shaping_in_place(against, size, contender):
    """Forward + backward on a convolution's output. Only fastshape overwrites it."""
    torch.manual_seed(0)
    values, weight = torch.randn(SIZES[size]), torch.zeros((), requires_grad=True)
    z, grad = torch.empty_like(values), torch.randn_like(values)

    def call(shaping):
        y = shaping(ConvolutionOutput.apply(weight, z.detach_()))
        torch.autograd.grad(y, weight, grad)

    against(
        functools.partial(call, lambda x: fastshape.shape(x, p_zero=P_ZERO, inplace=True)),
        functools.partial(call, contender),
        moved_bytes=4 * z.element_size() * z.numel(),
        prepare=lambda: z.detach_().copy_(values),
    )


@pytest.mark.parametrize("size", SIZES)
def test_target_shaping(against, size):
    """Forward + backward with a recorded mask, against multiplication by a float mask."""
    torch.manual_seed(0)
    x, target, grad = torch.randn(3, *SIZES[size])
    x.requires_grad_()
    mask, floats = fastshape.BitMask.from_tensor(target), (target > 0).float()

    def ours():
        torch.autograd.grad(fastshape.shape(x, mask=mask), x, grad)

    def float_mask():
        torch.autograd.grad(x * floats, x, grad)

    against(ours, float_mask, moved_bytes=int(2 * (2 * x.element_size() + 1 / 8) * x.numel()))
