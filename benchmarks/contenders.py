"""The contenders of fastshape. Each computes the same in another way, or does no shaping at all."""

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
    """The reports' way: numpy.random.choice draws a mask on the host, and x is multiplied by it as floats.

    Their binarization is left out, because it cuts the gradient and would leave no backward pass to time.
    """
    mask = np.random.choice([0, 1], size=tuple(x.shape), p=[P_ZERO, 1 - P_ZERO])
    return x * torch.from_numpy(mask).to(x)


def clone(x: Tensor) -> Tensor:
    """No shaping: the cost of a fresh copy of the map."""
    return x.clone()


class PublishedTargetMaps:
    """The reports' domain adaptation.

    The target pass runs the whole network in training mode, builds a graph that nobody uses and keeps float copies of the maps.
    The source pass multiplies its maps by these copies.
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
    """The layers after a convolution: optional shaping, BatchNorm and, as in ResNets, an in-place ReLU."""

    def __init__(self, channels: int, shaping=None):
        super().__init__()
        self.shaping = shaping
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(x if self.shaping is None else self.shaping(x)))
