"""Finds tensors with numbers that are not finite, which stop a run before it writes a record.

Binarization hides them: it makes 0 of a NaN. So does argmax, which gives a class to logits that are NaN.
A run could end well with figures that mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def nonfinite_names(tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity, in their order. Waits for the device once.

    Args:
        tensors: by name, on one device. Whole numbers are finite; what is no tensor is left out.
    """
    floats = {
        name: t
        for name, t in dict(tensors).items()
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) and t.numel()
    }
    if not floats:
        return []
    finite = torch.stack([t.detach().isfinite().all() for t in floats.values()]).tolist()
    return [name for name, good in zip(floats, finite, strict=True) if not good]
