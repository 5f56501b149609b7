"""Activation shaping for PyTorch: binarize an activation map and multiply it by a mask, in one pass."""

from . import _ops, reference  # noqa: F401  (defines the ops)
from .attach import Attachment, Masks, attach, attachments, detach
from .backends import backend_info, choose
from .batch_norm import ShapedBatchNorm2d
from .bitmask import BitMask
from .functional import shape
from .masks import above, majority, random_blocks, top_k
from .modules import ActivationShaping
from .rng import realised_rate, rng_state

choose()

__version__ = "0.1.0"
__all__ = [
    "ActivationShaping",
    "Attachment",
    "BitMask",
    "Masks",
    "ShapedBatchNorm2d",
    "above",
    "attach",
    "attachments",
    "backend_info",
    "detach",
    "majority",
    "random_blocks",
    "realised_rate",
    "reference",
    "rng_state",
    "shape",
    "top_k",
]
