"""Memory formats: the order in which elements are numbered."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MemoryFormat = Literal["contiguous", "channels_last", "channels_last_3d"]
MEMORY_FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def memory_format_name(x: Tensor) -> MemoryFormat | None:
    """The memory format in which x is dense: a key of `MEMORY_FORMATS`, or None for other strides."""
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return "channels_last_3d"
    return None


def dense_strides(size: torch.Size, memory_format: MemoryFormat) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor of this size and memory format."""
    order = list(range(len(size)))
    if memory_format != "contiguous":
        order = [0, *order[2:], 1]
    strides, step = [0] * len(size), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(size[dim], 1)
    return tuple(strides)
