"""The state of a random mask: an int64 tensor [seed, offset], which is an ordinary input of the ops."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor


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
    """
    if seed is None:
        # One draw for both numbers: on a GPU this takes one launch and no copy from the host.
        return torch.randint(0, 2**63 - 1, (2,), generator=generator, device=device)
    if generator is not None:
        raise ValueError("seed and generator: give one of them, not both")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: must be an int")
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


def checked_p_zero(p_zero: float) -> float:
    """`p_zero` as a float, if it is a probability below one.

    Raises:
        TypeError: p_zero is not a number.
        ValueError: p_zero is outside [0, 1) or NaN.
    """
    if isinstance(p_zero, bool) or not isinstance(p_zero, Real):  # numpy's numbers too
        raise TypeError(f"p_zero={p_zero!r}: must be a number in [0, 1)")
    if not 0 <= p_zero < 1:
        raise ValueError(f"p_zero={p_zero}: must be in [0, 1); 1 would drop everything")
    return float(p_zero)
