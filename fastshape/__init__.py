"""Activation shaping for PyTorch: binarize an activation map and multiply it by a mask, in one pass."""

from . import _ops, reference  # noqa: F401  (defines the ops)
from .attach import Attachment, attach, attachments
from .backends import backend_info, choose
from .batch_norm import ShapedBatchNorm2d
from .bitmask import BitMask
from .functional import shape
from .modules import ActivationShaping
from .rng import rng_state

choose()

__version__ = "0.1.0"
__all__ = [
    "ActivationShaping",
    "Attachment",
    "BitMask",
    "ShapedBatchNorm2d",
    "attach",
    "attachments",
    "backend_info",
    "reference",
    "rng_state",
    "shape",
]
