"""BitMask: a binary mask with one bit per element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, fx

from .layout import MEMORY_FORMATS, MemoryFormat, dense_strides, memory_format_name
from .rng import brief, checked_p_zero, checked_rng_state
from .rng import rng_state as new_rng_state

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASK_DTYPES = (*_FLOATS, torch.bool, torch.uint8)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)


class BitMask:
    """A binary mask, packed: element i (in memory order) is bit ``i % 8`` of byte ``i // 8``.

    The layout is that of ``numpy.packbits(bitorder="little")``. Spare bits of the last byte are zero.

    Masks combine element by element with ``&``, ``|``, ``^`` and ``~``. ``len``, iteration and an index go by sample, which is
    dimension 0, as with a tensor. ``==`` compares whole masks. A mask has no truth value. A mask of some samples may share the
    bits of the whole one.

    Attributes:
        bits: uint8 (ceil(n / 8),), where n is the number of elements.
        shape: torch.Size of the mask.
        memory_format: ``"contiguous"``, ``"channels_last"`` or ``"channels_last_3d"``: the order in which elements are
            numbered.

    Save with ``torch.save`` and load with ``torch.load(..., weights_only=True)``.

    Example:
        >>> mask = fastshape.BitMask.from_tensor(torch.tensor([1.5, -0.3, 0.2]))
        >>> mask.to_bool()
        tensor([ True, False,  True])
        >>> mask.bits
        tensor([5], dtype=torch.uint8)
    """

    __slots__ = ("bits", "memory_format", "shape")

    bits: Tensor
    shape: torch.Size
    memory_format: MemoryFormat

    def __init__(
        self, bits: Tensor, shape: Sequence[int], memory_format: MemoryFormat = "contiguous"
    ):
        """Wrap bits that are already packed; `from_tensor` packs.

        Raises:
            TypeError: bits is not a uint8 tensor.
            ValueError: the length of bits does not match the shape, or memory_format is unknown or does not match the number
                of dimensions.
        """
        shape = torch.Size(shape)
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
            kind: object = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"bits: must be a uint8 tensor, not {kind}")
        needed = (shape.numel() + 7) // 8
        if bits.shape != (needed,):
            raise ValueError(
                f"bits: a mask of shape {tuple(shape)} needs shape ({needed},), not {tuple(bits.shape)}"
            )
        if memory_format not in MEMORY_FORMATS:
            allowed = ", ".join(MEMORY_FORMATS)
            raise ValueError(f"memory_format={brief(memory_format)}: allowed are {allowed}")
        dims = {"channels_last": 4, "channels_last_3d": 5}.get(memory_format, len(shape))
        if len(shape) != dims:
            raise ValueError(
                f"memory_format={memory_format!r} needs {dims} dimensions, not {len(shape)}"
            )
        self.bits = bits.contiguous()
        self.shape = shape
        self.memory_format = memory_format

    @classmethod
    def from_tensor(cls, t: Tensor, threshold: float = 0.0) -> BitMask:
        """Pack ``t > threshold``, in t's memory format (contiguous if t's strides match no memory format).

        Args:
            t: any shape; float16, bfloat16, float32, float64, bool or uint8.
            threshold: a number, compared as torch does.

        Raises:
            TypeError: t is not a tensor of one of these dtypes, or threshold is not a number.
            ValueError: threshold is NaN.
        """
        if not isinstance(t, Tensor) or t.dtype not in _MASK_DTYPES:
            kind: object = t.dtype if isinstance(t, Tensor) else type(t).__name__
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _MASK_DTYPES)
            raise TypeError(f"mask: must be a BitMask or a tensor of {allowed}, not {kind}")
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise TypeError(f"threshold={brief(threshold)}: must be a number")
        if math.isnan(threshold):
            raise ValueError("threshold=nan: must be a number that values can exceed")
        t = t.detach()
        memory_format = memory_format_name(t)
        if memory_format is None:
            t, memory_format = t.contiguous(), "contiguous"
        if threshold != 0:
            t = t > threshold
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
        shape: Sequence[int],
        p_zero: float,
        *,
        rng_state: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        memory_format: MemoryFormat = "contiguous",
    ) -> BitMask:
        """The random mask that ``fastshape.shape`` draws for this state.

        Args:
            shape: shape of the mask.
            p_zero: probability of a zero, in [0, 1). It is rounded to a multiple of 1/65536, which `fastshape.realised_rate`
                returns. A probability that this would make 0 or 1 is refused.
            rng_state: int64 [seed, offset]; None draws a state from `generator`.
            generator: draws the state; None is the default generator of `device`.
            device: the device of the mask; None is the device of rng_state, or the CPU without one.
            memory_format: the order in which elements are numbered.

        Raises:
            ValueError, TypeError: p_zero, rng_state or memory_format is not valid, or rng_state and generator are both given.
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

    def in_memory_format(self, memory_format: MemoryFormat) -> BitMask:
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
        return self if count == self.shape[0] else self._range(0, count)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BitMask:
        """The same mask on another device; the mask itself if it is there.

        Args:
            device, non_blocking: as in `torch.Tensor.to`.

        Raises:
            TypeError: device is a dtype.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"device={device}: a BitMask has no dtype; to_bool().to({device}) gives a tensor"
            )
        bits = self.bits.to(device, non_blocking=non_blocking)
        return self if bits is self.bits else BitMask(bits, self.shape, self.memory_format)

    def cuda(
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> BitMask:
        """The same mask on a GPU, by default the current one. The arguments are those of `torch.Tensor.cuda`."""
        bits = self.bits.cuda(device, non_blocking=non_blocking)
        return self if bits is self.bits else BitMask(bits, self.shape, self.memory_format)

    def cpu(self) -> BitMask:
        """The same mask on the CPU."""
        return self.to("cpu")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """A bool array for numpy. Without this method numpy would index the mask down to single elements."""
        array = self.to_bool().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def _operand(self, other: BitMask) -> Tensor:
        """The bits of `other` in the order of this mask."""
        if other.shape != self.shape:
            raise ValueError(
                f"masks of shapes {tuple(self.shape)} and {tuple(other.shape)}: must be equal"
            )
        if other.device != self.device:
            raise ValueError(f"masks on {self.device} and {other.device}: must be on one device")
        return other.in_memory_format(self.memory_format).bits

    def __and__(self, other: BitMask) -> BitMask:
        """Element-wise and.

        Raises:
            ValueError: the masks differ in shape or device.
        """
        if not isinstance(other, BitMask):
            return NotImplemented
        return BitMask(self.bits & self._operand(other), self.shape, self.memory_format)

    def __or__(self, other: BitMask) -> BitMask:
        """Element-wise or.

        Raises:
            ValueError: the masks differ in shape or device.
        """
        if not isinstance(other, BitMask):
            return NotImplemented
        return BitMask(self.bits | self._operand(other), self.shape, self.memory_format)

    def __xor__(self, other: BitMask) -> BitMask:
        """Element-wise exclusive or.

        Raises:
            ValueError: the masks differ in shape or device.
        """
        if not isinstance(other, BitMask):
            return NotImplemented
        return BitMask(self.bits ^ self._operand(other), self.shape, self.memory_format)

    def __invert__(self) -> BitMask:
        """Element-wise not."""
        bits = _without_spare_bits(~self.bits, self.numel())
        return BitMask(bits, self.shape, self.memory_format)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a BitMask has no truth value: compare it with None, use len() for its samples or density() for its ones"
        )

    def __len__(self) -> int:
        """Number of samples (dimension 0).

        Raises:
            TypeError: the mask has no dimensions.
        """
        if not self.shape:
            raise TypeError("len() of a mask without dimensions")
        return self.shape[0]

    def __iter__(self) -> Iterator[BitMask]:
        """The masks of the samples, one after another."""
        return (self[i] for i in range(len(self)))

    def __getitem__(
        self, index: SupportsIndex | slice | Sequence[int] | Sequence[bool] | Tensor
    ) -> BitMask:
        """The mask of some samples, as indexing dimension 0 of the bool tensor gives it.

        Args:
            index: an int removes dimension 0. A slice, (k,) ints or (N,) bools keep it: the result has its samples in this
                order. Ints and bools come as a list, a tensor (integer dtypes but uint8) or an array of numpy. Negative
                numbers count from the end.

        Returns:
            BitMask in this mask's memory format; a single sample is ``"contiguous"``.

        Raises:
            TypeError: the index is of another kind. Only samples can be chosen: ``to_bool()`` has the other dimensions.
            IndexError: there is no such sample; the number of bools is not that of the samples; the mask has no dimensions.
            ValueError: the step of a slice is not positive.
        """
        if not self.shape:
            raise IndexError("a mask without dimensions has no samples")
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step < 1:
                raise ValueError(f"index={index}: the step must be positive")
            if step == 1:
                return self._range(start, max(start, stop))
            return self._choice(torch.arange(start, max(start, stop), step, device=self.device))
        chosen = self._checked_index(index)
        if isinstance(chosen, Tensor):
            return self._choice(chosen)
        sample = self._range(chosen, chosen + 1)
        if self.memory_format == "contiguous":
            return BitMask(sample.bits, self.shape[1:])
        return BitMask.from_tensor(sample.to_bool()[0].contiguous())

    def _checked_index(self, index: Any) -> int | Tensor:
        """`index` as the number of a sample, or as an int64 (k,) or bool (N,) tensor on this mask's device."""
        count, given = len(self), index
        if getattr(index, "shape", None) == ():
            index = index.item()  # an element of numpy or torch
        if isinstance(index, Integral) and not isinstance(index, bool):
            number = int(index)
            if not -count <= number < count:
                raise IndexError(f"index={number}: this mask has {count} samples")
            return number % count
        if isinstance(index, list | range):
            try:
                index = torch.tensor(index, dtype=None if index else torch.int64)
            except (TypeError, ValueError):
                index = None
        elif hasattr(index, "__array__") and not isinstance(index, Tensor):
            index = torch.from_numpy(index.__array__().copy())  # its strides may be negative
        if not isinstance(index, Tensor) or index.dim() != 1:
            raise TypeError(
                f"index={brief(given)}: must be an int, a slice, or ints or bools in one dimension, because a BitMask is indexed "
                "by sample; to_bool() gives a tensor"
            )
        if index.dtype == torch.bool:
            if len(index) != count:
                raise IndexError(f"index: {len(index)} bools for the {count} samples of this mask")
            return index.to(self.device)
        if index.dtype not in _INDEX_DTYPES:
            raise TypeError(
                f"index: must be of an int dtype other than uint8, or of bool, not {index.dtype}"
            )
        index = index.long()
        if index.device.type == "cpu" and len(index):  # a GPU would stop at a wrong number
            for number in index.aminmax():
                if not -count <= number < count:
                    raise IndexError(f"index={int(number)}: this mask has {count} samples")
        return index.to(self.device)

    def _choice(self, index: Tensor) -> BitMask:
        """The samples `index`, an int64 or bool tensor."""
        count, per_sample = len(self), self.shape[1:].numel()
        if per_sample % 8 == 0:  # a sample has bytes of its own, in every memory format
            bytes_of = self.bits.view(count, per_sample // 8)[index]
            return BitMask(
                bytes_of.reshape(-1), (len(bytes_of), *self.shape[1:]), self.memory_format
            )
        chosen = self.to_bool()[index].contiguous(memory_format=MEMORY_FORMATS[self.memory_format])
        return BitMask(torch.ops.fastshape.pack.default(chosen), chosen.shape, self.memory_format)

    def _range(self, start: int, stop: int) -> BitMask:
        """The samples from `start` to before `stop`, both from 0 to N. They share the bits if a byte begins with the first."""
        # The batch is the outermost dimension in every memory format, so that these samples have successive bits.
        shape = torch.Size((stop - start, *self.shape[1:]))
        n, per_sample = shape.numel(), self.shape[1:].numel()
        skipped = start * per_sample % 8
        first_byte = start * per_sample // 8
        bits = self.bits[first_byte : first_byte + (skipped + n + 7) // 8]
        if skipped:
            flat = torch.ops.fastshape.unpack.default(bits, skipped + n)
            bits = torch.ops.fastshape.pack.default(flat[skipped:])
        elif n % 8 and stop < self.shape[0]:
            bits = _without_spare_bits(bits.clone(), n)
        return BitMask(bits, shape, self.memory_format)

    def __eq__(self, other: object) -> bool:
        if (
            not isinstance(other, BitMask)
            or other.shape != self.shape
            or other.device != self.device
        ):
            return False
        return torch.equal(self.bits, other.in_memory_format(self.memory_format).bits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"BitMask(shape={tuple(self.shape)}, memory_format={self.memory_format!r}, "
            f"device={str(self.device)!r}, bytes={self.bits.numel()})"
        )

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        """A mask among the arguments of a traced call: its bits become a buffer of the traced model."""
        arguments = (tracer.create_arg(self.bits), tuple(self.shape), self.memory_format)
        return tracer.create_node("call_function", BitMask, arguments, {})

    def __getstate__(self) -> dict:
        # torch.save would write the whole storage, of which this mask may have a part.
        shared = self.bits.untyped_storage().nbytes() > self.bits.numel()
        return {
            "bits": self.bits.clone() if shared else self.bits,
            "shape": tuple(self.shape),
            "memory_format": self.memory_format,
        }

    def __setstate__(self, state: dict) -> None:
        BitMask.__init__(self, state["bits"], state["shape"], state["memory_format"])


def _without_spare_bits(bits: Tensor, n: int) -> Tensor:
    """`bits` of n elements; those after the last element become 0, in place."""
    if n % 8:
        bits[-1] &= (1 << n % 8) - 1
    return bits


torch.serialization.add_safe_globals([BitMask])
