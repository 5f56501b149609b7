"""fastshape.shape as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .bitmask import BitMask
from .functional import GRADIENTS, shape
from .rng import checked_p_zero

AT_EVAL = ("off", "binarize", "on")


class ActivationShaping(nn.Module):
    """Shapes its input: ``B(x) * M``; see `fastshape.shape`.

    Args:
        p_zero: probability of a zero in the mask that each call draws, in [0, 1); None draws no mask.
        binarize, gradient, inplace: as in `fastshape.shape`.
        at_eval: what happens in evaluation mode. ``"off"`` returns the input, ``"binarize"`` binarizes without a mask, ``"on"``
            shapes as in training.

    Shape:
        Input and output: any shape, float16, bfloat16, float32 or float64.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), fastshape.ActivationShaping(p_zero=0.3), nn.ReLU())
    """

    def __init__(
        self,
        p_zero: float | None = None,
        *,
        binarize: bool = True,
        gradient: str = "straight_through",
        at_eval: str = "off",
        inplace: bool = False,
    ):
        super().__init__()
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient!r}: allowed are {', '.join(GRADIENTS)}")
        if at_eval not in AT_EVAL:
            raise ValueError(f"at_eval={at_eval!r}: allowed are {', '.join(AT_EVAL)}")
        self.p_zero = None if p_zero is None else checked_p_zero(p_zero)
        self.binarize = binarize
        self.gradient = gradient
        self.at_eval = at_eval
        self.inplace = inplace

    def forward(self, x: Tensor, mask: BitMask | Tensor | None = None) -> Tensor:
        """Shape `x`. A `mask` replaces the random mask."""
        if not self.training and self.at_eval == "off":
            return x
        masked = self.training or self.at_eval == "on"
        return shape(
            x,
            p_zero=self.p_zero if masked and mask is None else None,
            mask=mask if masked else None,
            binarize=self.binarize,
            gradient=self.gradient,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        return (
            f"p_zero={self.p_zero}, binarize={self.binarize}, gradient={self.gradient!r}, "
            f"at_eval={self.at_eval!r}, inplace={self.inplace}"
        )
