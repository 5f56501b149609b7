"""Masks of recorded maps, random masks of blocks, and how several masks become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .bitmask import _INDEX_DTYPES, _MASK_DTYPES, BitMask
from .rng import rng_state as new_rng_state


@dataclass(frozen=True)
class above:
    """The mask of a map where it is greater than `threshold`.

    Example:
        >>> fastshape.attach(model, [4], mode="target", to_mask=fastshape.above(0.5))
    """

    threshold: float

    def __call__(self, x: Tensor) -> BitMask:
        return BitMask.from_tensor(x, self.threshold)


@dataclass(frozen=True)
class top_k:
    """The mask of the largest values of each sample, or of each channel of each sample.

    Of m values, ``max(1, round(fraction * m))`` are ones (halves go to even). Of equal values those that come first in
    row-major order. NaN counts as larger than all numbers, -0 as equal to +0.

    Args:
        fraction: in (0, 1].
        by: ``"sample"`` or ``"channel"``.

    Raises:
        ValueError: fraction or by is not allowed.
        TypeError, when it is called: the map is not dense, or its dtype is complex or of 8-bit floats.

    Example:
        >>> fastshape.top_k(0.25, by="sample")(torch.tensor([[3.0, 1.0, 4.0, 2.0]])).to_bool()
        tensor([[False, False,  True, False]])
    """

    fraction: float
    by: Literal["sample", "channel"] = "channel"

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}: must be in (0, 1]")
        if self.by not in ("sample", "channel"):
            raise ValueError(f"by={self.by!r}: allowed are sample, channel")

    def __call__(self, x: Tensor) -> BitMask:
        if x.layout != torch.strided or x.dtype not in (*_MASK_DTYPES, *_INDEX_DTYPES):
            allowed = "float16, bfloat16, float32, float64, bool and integers of up to 64 bits"
            raise TypeError(f"x: {x.dtype}, {x.layout}: must be dense, and of {allowed}")
        x = x.detach().contiguous()
        row = x.flatten(2 if self.by == "channel" else 1).shape[-1]
        if x.numel() == 0:
            return BitMask.from_bool(torch.zeros(x.shape, dtype=torch.bool, device=x.device))
        count = max(1, round(self.fraction * row))
        pack_top = (
            torch.ops.fastshape.pack_top.default if x.is_floating_point() else reference.pack_top
        )
        return BitMask(pack_top(x, row, count), x.shape)


def random_blocks(
    shape: Sequence[int],
    p_zero: float,
    side: int | None,
    *,
    rng_state: Tensor | None = None,
    device: torch.device | str | None = None,
    first_sample: int = 0,
) -> BitMask:
    """A random mask in which the elements of a block are 0 or 1 together.

    Args:
        shape: (N, C, ...) of the mask.
        p_zero: probability that a block is 0, in [0, 1); see `BitMask.random`.
        side: of the blocks, in elements of each dimension after the second. The first block begins at the plane's first
            element; the last one may be cut. None: each (sample, channel) is one block, as in `nn.Dropout2d`.
        rng_state: int64 [seed, offset]; None draws a state from the default generator of `device`.
        device: of the mask; None is the device of rng_state, or the CPU without one.
        first_sample: place of the mask's first sample in the batch for which the mask is drawn.

    Raises:
        ValueError, TypeError: p_zero or rng_state is not valid, the shape has fewer than two dimensions, or side is not a
            whole number from 1.

    Example:
        >>> mask = fastshape.random_blocks((2, 3, 4, 4), 0.5, None, rng_state=fastshape.rng_state(0))
        >>> channel = mask.to_bool()[0, 0]
        >>> bool(channel.all() or not channel.any())
        True
    """
    if len(shape) < 2:
        raise ValueError(f"shape {tuple(shape)}: must be (N, C, ...)")
    if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
        raise ValueError(f"side={side!r}: must be an int of at least 1, or None")
    sides = [side or size or 1 for size in shape[2:]]
    grid = [-(-size // s) for size, s in zip(shape[2:], sides, strict=True)]
    if rng_state is None:
        rng_state = new_rng_state(device=device or "cpu")
    drawn = (first_sample + shape[0], shape[1], *grid)
    mask = BitMask.random(drawn, p_zero, rng_state=rng_state, device=device).to_bool()[
        first_sample:
    ]
    # From the last dimension to the first, so that the later copies are of whole rows.
    for dim, (s, size) in reversed(list(enumerate(zip(sides, shape[2:], strict=True), 2))):
        before, after = mask.shape[: dim + 1], mask.shape[dim + 1 :]
        mask = mask.unsqueeze(dim + 1).expand(*before, s, *after).flatten(dim, dim + 1)
        mask = mask.narrow(dim, 0, size)
    return BitMask.from_bool(mask)


def majority(masks: Sequence[BitMask]) -> BitMask:
    """The mask that is one where more than half of `masks` are.

    Args:
        masks: at least one, all of one shape and device.

    Raises:
        ValueError: there is none, or they differ in shape.

    Example:
        >>> a, b, c = (torch.tensor(m) > 0 for m in ([1, 1, 0], [1, 0, 0], [1, 1, 1]))
        >>> fastshape.majority([fastshape.BitMask.from_bool(m) for m in (a, b, c)]).to_bool()
        tensor([ True,  True, False])
    """
    masks = list(masks)
    if not masks:
        raise ValueError("masks: there must be at least one")
    if len({mask.shape for mask in masks}) > 1:
        shapes = ", ".join(str(tuple(mask.shape)) for mask in masks)
        raise ValueError(f"masks of shapes {shapes}: must be equal")
    votes = torch.zeros(masks[0].shape, dtype=torch.int32, device=masks[0].device)
    for mask in masks:
        votes += mask.to_bool()
    return BitMask.from_bool(2 * votes > len(masks))
