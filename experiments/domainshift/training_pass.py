"""The loss of a method as the one module that DistributedDataParallel wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


class TrainingPass(nn.Module):
    """A loss as a module that holds what it trains."""

    def __init__(
        self, loss: Callable[..., tuple[Tensor, Tensor]], trained: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.loss = loss
        self.trained = nn.ModuleList(trained)

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        return self.loss(*batch)
