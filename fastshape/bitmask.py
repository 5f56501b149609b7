"""BitMask: a binary mask with one bit per element."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import MEMORY_FORMATS, dense_strides, memory_format_name
from .rng import checked_p_zero, checked_rng_state
from .rng import rng_state as new_rng_state

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASK_DTYPES = (*_FLOATS, torch.bool, torch.uint8)


class BitMask:
    """A binary mask, packed: element i (in memory order) is bit ``i % 8`` of byte ``i // 8``.

    The layout is that of ``numpy.packbits(bitorder="little")``. Spare bits of the last byte are zero.

    Attributes:
        bits: uint8 (ceil(n / 8),), where n is the number of elements.
        shape: torch.Size of the mask.
        memory_format: ``"contiguous"``, ``"channels_last"`` or ``"channels_last_3d"``: the order in which elements are
            numbered.

    Save with ``torch.save`` and load with ``torch.load(..., weights_only=True)``.
    """

    __slots__ = ("bits", "memory_format", "shape")

    def __init__(self, bits: Tensor, shape, memory_format: str = "contiguous"):
        """Wrap bits that are already packed; `from_tensor` packs.

        Raises:
            TypeError: bits is not a uint8 tensor.
            ValueError: the length of bits does not match the shape, or memory_format is unknown or does not match the number
                of dimensions.
        """
        shape = torch.Size(shape)
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
            kind = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"bits: must be a uint8 tensor, not {kind}")
        needed = (shape.numel() + 7) // 8
        if bits.shape != (needed,):
            raise ValueError(
                f"bits: a mask of shape {tuple(shape)} needs shape ({needed},), not {tuple(bits.shape)}"
            )
        if memory_format not in MEMORY_FORMATS:
            allowed = ", ".join(MEMORY_FORMATS)
            raise ValueError(f"memory_format={memory_format!r}: allowed are {allowed}")
        dims = {"channels_last": 4, "channels_last_3d": 5}.get(memory_format, len(shape))
        if len(shape) != dims:
            raise ValueError(
                f"memory_format={memory_format!r} needs {dims} dimensions, not {len(shape)}"
            )
        self.bits = bits.contiguous()
        self.shape = shape
        self.memory_format = memory_format

    @classmethod
    def from_tensor(cls, t: Tensor) -> BitMask:
        """Pack ``t > 0``, in t's memory format (contiguous if t's strides match no memory format).

        Args:
            t: any shape; float16, bfloat16, float32, float64, bool or uint8.

        Raises:
            TypeError: t is not a tensor of one of these dtypes.
        """
        if not isinstance(t, Tensor) or t.dtype not in _MASK_DTYPES:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _MASK_DTYPES)
            raise TypeError(f"mask: must be a BitMask or a tensor of {allowed}, not {kind}")
        t = t.detach()
        memory_format = memory_format_name(t)
        if memory_format is None:
            t, memory_format = t.contiguous(), "contiguous"
        return cls(torch.ops.fastshape.pack.default(t), t.shape, memory_format)

    @classmethod
    def from_bool(cls, t: Tensor) -> BitMask:
        """Pack a bool tensor.

        Raises:
            TypeError: t is not bool.
        """
        if t.dtype != torch.bool:
            raise TypeError(f"t: must be bool, not {t.dtype}; from_tensor packs t > 0")
        return cls.from_tensor(t)

    @classmethod
    def random(
        cls,
        shape,
        p_zero: float,
        *,
        rng_state: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        memory_format: str = "contiguous",
    ) -> BitMask:
        """The random mask that ``fastshape.shape`` draws for this state.

        Args:
            shape: shape of the mask.
            p_zero: probability of a zero, in [0, 1).
            rng_state: int64 [seed, offset]; None draws a state from `generator`.
            generator: draws the state; None is the default generator of `device`.
            device: the device of the mask; None is the device of rng_state, or the CPU without one.
            memory_format: the order in which elements are numbered.

        Raises:
            ValueError, TypeError: p_zero or rng_state is not valid, or rng_state and generator are both given.
        """
        p_zero = checked_p_zero(p_zero)
        if rng_state is None:
            rng_state = new_rng_state(generator=generator, device=device or "cpu")
        elif generator is not None:
            raise ValueError("rng_state and generator: give one of them, not both")
        rng_state = checked_rng_state(rng_state, torch.device(device or rng_state.device))
        n = torch.Size(shape).numel()
        return cls(
            torch.ops.fastshape.pack_random.default(rng_state, n, p_zero), shape, memory_format
        )

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def numel(self) -> int:
        """Number of elements (not bytes)."""
        return self.shape.numel()

    def to_bool(self) -> Tensor:
        """The mask as a bool tensor of `shape`, in `memory_format`."""
        flat = torch.ops.fastshape.unpack.default(self.bits, self.numel())
        return flat.as_strided(self.shape, dense_strides(self.shape, self.memory_format))

    def density(self) -> float:
        """The share of ones, from 0 to 1; NaN for an empty mask. Waits for the device."""
        if self.numel() == 0:
            return float("nan")
        per_byte = torch.bincount(self.bits, minlength=256).cpu()
        ones = sum(count * value.bit_count() for value, count in enumerate(per_byte.tolist()))
        return ones / self.numel()

    def in_memory_format(self, memory_format: str) -> BitMask:
        """The same mask with its elements numbered in `memory_format`; the mask itself if they already are."""
        if memory_format == self.memory_format:
            return self
        ordered = self.to_bool().contiguous(memory_format=MEMORY_FORMATS[memory_format])
        # If both orders are equal, as with a single channel, memory_format_name(ordered) could return either name.
        return BitMask(torch.ops.fastshape.pack.default(ordered), self.shape, memory_format)

    def first(self, count: int) -> BitMask:
        """The masks of the first `count` samples of the batch (dimension 0).

        Raises:
            ValueError: the mask has fewer samples.
        """
        if not 0 <= count <= self.shape[0]:
            raise ValueError(f"count={count}: this mask has {self.shape[0]} samples")
        if count == self.shape[0]:
            return self
        # The batch is the outermost dimension in every memory format, so the first samples are a prefix of the bits.
        shape = torch.Size((count, *self.shape[1:]))
        n = shape.numel()
        bits = self.bits[: (n + 7) // 8]
        if n % 8:
            bits = bits.clone()
            bits[-1] &= (1 << n % 8) - 1
        return BitMask(bits, shape, self.memory_format)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BitMask:
        """The same mask on another device."""
        return BitMask(
            self.bits.to(device, non_blocking=non_blocking), self.shape, self.memory_format
        )

    def __and__(self, other: BitMask) -> BitMask:
        """Element-wise and.

        Raises:
            ValueError: the masks differ in shape or device.
        """
        if not isinstance(other, BitMask):
            return NotImplemented
        if other.shape != self.shape:
            raise ValueError(
                f"masks of shapes {tuple(self.shape)} and {tuple(other.shape)}: must be equal"
            )
        if other.device != self.device:
            raise ValueError(f"masks on {self.device} and {other.device}: must be on one device")
        other = other.in_memory_format(self.memory_format)
        return BitMask(self.bits & other.bits, self.shape, self.memory_format)

    def __eq__(self, other) -> bool:
        if (
            not isinstance(other, BitMask)
            or other.shape != self.shape
            or other.device != self.device
        ):
            return False
        return torch.equal(self.bits, other.in_memory_format(self.memory_format).bits)

    __hash__ = None

    def __repr__(self) -> str:
        return (
            f"BitMask(shape={tuple(self.shape)}, memory_format={self.memory_format!r}, "
            f"device={str(self.device)!r}, bytes={self.bits.numel()})"
        )

    def __getstate__(self) -> dict:
        return {
            "bits": self.bits,
            "shape": tuple(self.shape),
            "memory_format": self.memory_format,
        }

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["bits"], state["shape"], state["memory_format"])


torch.serialization.add_safe_globals([BitMask])
