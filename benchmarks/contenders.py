"""What fastshape is timed against: each contender computes the same thing in another way, or nothing of it at all."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastshape
from fastshape import reference

P_ZERO = 0.5


def fastshape_shape(x: Tensor) -> Tensor:
    return fastshape.shape(x, p_zero=P_ZERO)


def eager_reference(x: Tensor) -> Tensor:
    return reference.differentiable_shape(x, fastshape.rng_state(), None, P_ZERO)


@functools.cache
def compiled_reference():
    return torch.compile(reference.differentiable_shape, fullgraph=True)


def torch_compile_of_reference(x: Tensor) -> Tensor:
    return compiled_reference()(x, fastshape.rng_state(), None, P_ZERO)


def dropout(x: Tensor) -> Tensor:
    return F.dropout(x, P_ZERO)


def published_numpy(x: Tensor) -> Tensor:
    """The reports' way: a mask by numpy.random.choice on the host, as floats, multiplied in.

    Without their binarization, which cuts the gradient: so there is a backward pass to time.
    """
    mask = np.random.choice([0, 1], size=tuple(x.shape), p=[P_ZERO, 1 - P_ZERO])
    return x * torch.from_numpy(mask).to(x)


def clone(x: Tensor) -> Tensor:
    """No shaping at all: what a fresh copy of the map costs."""
    return x.clone()


class PublishedTargetMaps:
    """The reports' domain adaptation: the whole network on target images in train mode, a graph built and dropped, float
    copies of the maps; then the source, its maps multiplied by them.
    """

    def __init__(self, model: nn.Module, names: list[str]):
        self.model = model
        self.maps: dict[str, Tensor] = {}
        self.recording = False
        for name in names:
            model.get_submodule(name).register_forward_hook(functools.partial(self._hook, name))

    def _hook(self, name, module, args, output):
        if self.recording:
            self.maps[name] = output.clone().detach()
            return None
        return output * self.maps[name]

    def record(self, images: Tensor) -> None:
        self.recording = True
        self.model(images)
        self.recording = False


class BatchNormReLU(nn.Module):
    """An optional shaping, BatchNorm, and the in-place ReLU that ResNets have: what follows a convolution."""

    def __init__(self, channels: int, shaping=None):
        super().__init__()
        self.shaping = shaping
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(x if self.shaping is None else self.shaping(x)))
