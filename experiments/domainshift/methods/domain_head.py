"""The two modules of domain-adversarial training (see `domainshift.methods.dann`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 1024  # width of the domain head's two hidden layers


class ReverseGradient(torch.autograd.Function):
    """The identity, with dL/dx = -weight * dL/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


class DomainHead(nn.Sequential):
    """The domain of features: (n, features) -> logits (n, 1), on the CPU. 0 is the source.

    Args:
        features: width of the input.
        seed: of the initial weights. The global random stream stays where it is.
    """

    def __init__(self, features: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Linear(features, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
