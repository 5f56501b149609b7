"""The state of a random mask: an int64 tensor [seed, offset], which is an ordinary input of the ops."""

from __future__ import annotations

from numbers import Real
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from .reference import drop_threshold

# A random mask compares draws of 16 bits with round(p_zero * 65536). Between these two that is neither 0 nor 65536.
_ROUNDED_TO_0 = 0.5 / 65536
_ROUNDED_TO_1 = 1 - _ROUNDED_TO_0


def rng_state(
    seed: int | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A state for one random mask.

    Each element of the mask is a function of this state and the element's number alone. So the mask is the same for every
    backend, device, thread count and dtype.

    Args:
        seed: the 64-bit Philox key; the offset is then 0. None draws key and offset from `generator`.
        generator: a generator of `device`; None is the default generator of `device`.
        device: the device of the state, which must be that of the tensor to shape.

    Returns:
        int64 tensor [seed, offset] on `device`, both read as 64 unsigned bits.

    Raises:
        TypeError: seed is not an int.
        ValueError: seed and generator are both given, or seed does not fit 64 bits.

    Example:
        >>> fastshape.rng_state(7)
        tensor([7, 0])
    """
    if seed is None:
        # One draw for both numbers: on a GPU this takes one launch and no copy from the host.
        return torch.randint(0, 2**63 - 1, (2,), generator=generator, device=device)
    if generator is not None:
        raise ValueError("seed and generator: give one of them, not both")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={brief(seed)}: must be an int")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed}: must fit 64 bits, -2**63 to 2**64 - 1")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, 0], dtype=torch.int64, device=device)


def checked_rng_state(state: Tensor, device: torch.device) -> Tensor:
    """`state` itself, if it is an rng_state on `device`.

    Raises:
        TypeError: state is not an int64 tensor.
        ValueError: state has a wrong shape or device.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.int64:
        kind = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"rng_state: must be an int64 tensor [seed, offset], not {kind}")
    if state.shape != (2,):
        raise ValueError(f"rng_state: must have shape (2,), not {tuple(state.shape)}")
    if state.device != device:
        raise ValueError(
            f"rng_state is on {state.device}, x on {device}: they must be on one device"
        )
    return state


def realised_rate(p_zero: float) -> float:
    """The exact probability of a zero in a random mask that is asked for with `p_zero`.

    An element is dropped if a draw of 16 bits is less than ``round(p_zero * 65536)`` (halves round to even), so that the
    possible rates are the multiples of 1/65536. The realised rate is off by at most 1/131072.

    Args:
        p_zero: as in `fastshape.shape`.

    Returns:
        ``round(p_zero * 65536) / 65536``.

    Raises:
        TypeError, ValueError: p_zero is not allowed, as in `fastshape.shape`.

    Example:
        >>> fastshape.realised_rate(0.7)
        0.6999969482421875
    """
    return drop_threshold(checked_p_zero(p_zero)) / 65536


def checked_p_zero(p_zero: SupportsFloat) -> float:
    """`p_zero` as a float, if it is a rate that a random mask can have.

    Raises:
        TypeError: p_zero is not a number.
        ValueError: p_zero is outside [0, 1) or NaN, or would be rounded to 0 or to 1 although it is neither.
    """
    # Numbers of numpy are Real too. A tensor is refused: reading it would wait for its device.
    if isinstance(p_zero, bool) or not isinstance(p_zero, Real):
        raise TypeError(f"p_zero={brief(p_zero)}: must be a number in [0, 1)")
    rate = float(p_zero)
    if not 0 <= rate < 1:
        raise ValueError(f"p_zero={p_zero}: must be in [0, 1); 1 would drop everything")
    if rate and not _ROUNDED_TO_0 < rate < _ROUNDED_TO_1:
        raise ValueError(
            f"p_zero={p_zero}: would be rounded to {round(rate)}, because a rate is a multiple of 1/65536; allowed are 0 "
            f"and what lies between 1/131072 ({_ROUNDED_TO_0:.3g}) and 1 - 1/131072 ({_ROUNDED_TO_1:.7f}), both excluded"
        )
    return rate


def brief(value: object) -> str:
    """How a message shows a value that is not allowed: its repr on one line, cut; of a module or tensor only the class."""
    if isinstance(value, nn.Module | Tensor):
        return f"{type(value).__name__}(...)"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
