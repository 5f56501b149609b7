"""Random shaping, forward and forward + backward, against what people use today."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastshape
from fastshape import reference

P_ZERO = 0.5
SIZES = {"large": (32, 64, 112, 112), "small": (8, 64, 56, 56)}


@functools.cache
def compiled_reference():
    return torch.compile(reference.differentiable_shape, fullgraph=True)


def fastshape_shape(x):
    return fastshape.shape(x, p_zero=P_ZERO)


def eager_reference(x):
    return reference.differentiable_shape(x, fastshape.rng_state(), None, P_ZERO)


def torch_compile_of_reference(x):
    return compiled_reference()(x, fastshape.rng_state(), None, P_ZERO)


def dropout(x):
    return F.dropout(x, P_ZERO)


def published_numpy(x):
    """The reports' way: a mask by numpy.random.choice on the host, as floats, multiplied in.

    Without their binarization, which cuts the gradient: so there is a backward pass to time.
    """
    mask = np.random.choice([0, 1], size=tuple(x.shape), p=[P_ZERO, 1 - P_ZERO])
    return x * torch.from_numpy(mask).to(x)


def clone(x):
    """No shaping at all: what a fresh copy of the map costs."""
    return x.clone()


CONTENDERS = (eager_reference, torch_compile_of_reference, dropout, published_numpy, clone)


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
        functools.partial(call, fastshape_shape),
        functools.partial(call, contender),
        moved_bytes=passes * 2 * x.element_size() * x.numel(),
    )
