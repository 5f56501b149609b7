"""What torch keeps for a whole program or thread, which one that calls the experiments may have changed.

These are the default dtype and device, whether gradients are recorded, inference mode, and autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_defaults() -> Iterator[None]:
    """Make them what they are in a new process, in a block or, as a decorator, in a function."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            if device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
