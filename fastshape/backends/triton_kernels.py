"""Triton kernels, without torch. `triton.py` in this folder launches them.

Each program owns BYTES whole mask bytes and their 8 * BYTES elements, so that no byte is shared. Numbers are passed as the
integers of their bit patterns, because a comparison of numbers gives another result under flush-to-zero. The dtypes then
differ in two constants only: INFINITY and ONE, the patterns of +inf and 1.0. A mask is random (`rng_state`), given (`bits`)
or, if both are None, all ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The number of elements and the threshold change from call to call. A new value must not compile the kernel again.
_PER_CALL = ("n", "threshold")


@triton.jit
def _random_bytes(rng_state, byte, threshold):
    """Random mask bytes: eight decisions from one Philox call each. Bit k is 1 if and only if element k is kept.

    Args:
        rng_state: pointer to int64 [seed, offset]. The kernel reads it, so that a captured graph uses the current state.
        byte: int64 block with the numbers of the mask bytes, i // 8. offset + byte wraps at 2^64.
        threshold: an element is kept if its 16-bit draw is >= threshold.

    Returns:
        int32 block of the shape of `byte`.
    """
    seed = tl.load(rng_state)
    offset = tl.load(rng_state + 1)
    word0, word1, word2, word3 = tl.randint4x(seed, offset + byte)
    threshold = threshold.to(tl.uint32)
    kept = ((word0 & 0xFFFF) >= threshold).to(tl.int32)
    kept |= ((word0 >> 16) >= threshold).to(tl.int32) << 1
    kept |= ((word1 & 0xFFFF) >= threshold).to(tl.int32) << 2
    kept |= ((word1 >> 16) >= threshold).to(tl.int32) << 3
    kept |= ((word2 & 0xFFFF) >= threshold).to(tl.int32) << 4
    kept |= ((word2 >> 16) >= threshold).to(tl.int32) << 5
    kept |= ((word3 & 0xFFFF) >= threshold).to(tl.int32) << 6
    kept |= ((word3 >> 16) >= threshold).to(tl.int32) << 7
    return kept


@triton.jit
def _is_positive(x, INFINITY: tl.constexpr):
    """x > 0: false for NaN, for both zeros and for negative numbers, whose patterns are negative integers."""
    return (x > 0) & (x <= INFINITY)


@triton.jit
def _is_within_one(x, ONE: tl.constexpr):
    """abs(x) <= 1: false for NaN, whose pattern without the sign is above the pattern of infinity."""
    MAGNITUDE: tl.constexpr = (1 << (x.dtype.primitive_bitwidth - 1)) - 1
    return (x & MAGNITUDE) <= ONE


@triton.jit
def _packed(flags):
    """bool (BYTES, 8) -> uint8 (BYTES,): element k of a row is bit k."""
    place = tl.arange(0, 8)[None, :]
    return tl.sum(flags.to(tl.int32) << place, axis=1).to(tl.uint8)


@triton.jit
def _places(n, first, WHOLE: tl.constexpr, BYTES: tl.constexpr):
    """The numbers of the elements and bytes of one program, counted from its first, and whether they exist.

    With WHOLE all exist and the masks are constants, so that each load takes 16 bytes. With a computed mask each load would
    take one element.

    Returns:
        element (BYTES, 8) int32, exists (BYTES, 8) bool, byte (BYTES,) int32, byte_exists (BYTES,) bool.
    """
    byte = tl.arange(0, BYTES)
    element = 8 * byte[:, None] + tl.arange(0, 8)[None, :]
    if WHOLE:
        return (
            element,
            tl.full([BYTES, 8], True, tl.int1),
            byte,
            tl.full([BYTES], True, tl.int1),
        )
    left = n - 8 * first
    return element, element < left, byte, 8 * byte < left


@triton.jit
def _shape_bytes(
    x, y, within_one, rng_state, bits, n, threshold, first,
    BINARIZE: tl.constexpr, INFINITY: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    element, exists, byte, byte_exists = _places(n, first, WHOLE, BYTES)
    value = tl.load(x + 8 * first + element, mask=exists, other=0)

    if rng_state is not None:
        mask = _random_bytes(rng_state, first + byte, threshold)
    elif bits is not None:
        mask = tl.load(bits + first + byte, mask=byte_exists, other=0).to(tl.int32)
    else:
        mask = tl.full([BYTES], 0xFF, tl.int32)
    keep = ((mask[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0

    if within_one is not None:
        packed = _packed(keep & exists & _is_within_one(value, ONE))
        tl.store(within_one + first + byte, packed, mask=byte_exists)
    # The mask selects: where it is 0 the result is +0 for every x.
    if BINARIZE:
        shaped = tl.where(keep & _is_positive(value, INFINITY), ONE, 0).to(value.dtype)
    else:
        shaped = tl.where(keep, value, 0)
    tl.store(y + 8 * first + element, shaped, mask=exists)


@triton.jit(do_not_specialize=_PER_CALL)
def shape(
    x, y, within_one, rng_state, bits, n, threshold,
    BINARIZE: tl.constexpr, INFINITY: tl.constexpr, ONE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """``y = B(x) * M``, or ``x * M`` without BINARIZE; y may be x.

    Args:
        x, y: pointers to n integers.
        within_one: pointer to uint8 (ceil(n / 8),) for the bits of M * 1[abs(x) <= 1], or None.
        rng_state: pointer to int64 [seed, offset], or None. bits: pointer to uint8 (ceil(n / 8),), or None.
        threshold: see `_random_bytes`.
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    if n - 8 * first >= 8 * BYTES:
        _shape_bytes(
            x, y, within_one, rng_state, bits, n, threshold, first, BINARIZE, INFINITY, ONE, True, BYTES,
        )  # fmt: skip
    else:
        _shape_bytes(
            x, y, within_one, rng_state, bits, n, threshold, first, BINARIZE, INFINITY, ONE, False, BYTES,
        )  # fmt: skip


@triton.jit
def _pack_bytes(
    x, bits, n, first, INFINITY: tl.constexpr, WHOLE: tl.constexpr, BYTES: tl.constexpr
):
    element, exists, byte, byte_exists = _places(n, first, WHOLE, BYTES)
    value = tl.load(x + 8 * first + element, mask=exists, other=0)
    tl.store(bits + first + byte, _packed(_is_positive(value, INFINITY)), mask=byte_exists)


@triton.jit(do_not_specialize=_PER_CALL)
def pack(x, bits, n, INFINITY: tl.constexpr, BYTES: tl.constexpr):
    """The bits of x > 0.

    Args:
        x: pointer to n integers; uint8 for bool and uint8.
        bits: pointer to uint8 (ceil(n / 8),).
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    if n - 8 * first >= 8 * BYTES:
        _pack_bytes(x, bits, n, first, INFINITY, True, BYTES)
    else:
        _pack_bytes(x, bits, n, first, INFINITY, False, BYTES)


@triton.jit(do_not_specialize=_PER_CALL)
def pack_random(rng_state, bits, n, threshold, BYTES: tl.constexpr):
    """The bits of a random mask of n elements. Spare bits of the last byte are 0.

    Args:
        rng_state: pointer to int64 [seed, offset]; None keeps all.
        bits: pointer to uint8 (ceil(n / 8),).
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    byte = tl.arange(0, BYTES)
    left = n - 8 * (first + byte)
    if rng_state is not None:
        mask = _random_bytes(rng_state, first + byte, threshold)
    else:
        mask = tl.full([BYTES], 0xFF, tl.int32)
    here = tl.minimum(tl.maximum(left, 0), 8).to(tl.int32)
    mask &= (1 << here) - 1
    tl.store(bits + first + byte, mask.to(tl.uint8), mask=left > 0)


@triton.jit
def _unpack_bytes(bits, out, n, first, WHOLE: tl.constexpr, BYTES: tl.constexpr):
    element, exists, byte, byte_exists = _places(n, first, WHOLE, BYTES)
    mask = tl.load(bits + first + byte, mask=byte_exists, other=0).to(tl.int32)
    flag = (mask[:, None] >> tl.arange(0, 8)[None, :]) & 1
    tl.store(out + 8 * first + element, flag.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=_PER_CALL)
def unpack(bits, out, n, BYTES: tl.constexpr):
    """0 or 1 for each element, one byte per element.

    Args:
        bits: pointer to uint8 (ceil(n / 8),).
        out: pointer to uint8 (n,).
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    if n - 8 * first >= 8 * BYTES:
        _unpack_bytes(bits, out, n, first, True, BYTES)
    else:
        _unpack_bytes(bits, out, n, first, False, BYTES)
