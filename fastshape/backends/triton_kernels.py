"""Triton kernels. No torch here, and no choice of anything: `triton.py` beside this file launches them.

Each program owns BYTES whole mask bytes and their 8 * BYTES elements, so that nobody shares a byte. Numbers
come as the integers of their bit patterns, because a comparison of numbers answers differently under
flush-to-zero, and because dtypes then differ in two constants only: INFINITY and ONE, the patterns of +inf
and 1.0. A mask comes from `rng_state` (random), from `bits` (given) or, both None, is all ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The number of elements and the threshold differ from call to call: their values must not cause a compilation.
_PER_CALL = ("n", "threshold")


@triton.jit
def _random_bytes(rng_state, byte, threshold):
    """Eight decisions from one Philox call, for each mask byte: element k is bit k, 1 iff it is kept.

    Args:
        rng_state: pointer to int64 [seed, offset]. Read here, so that a captured graph sees what it holds then.
        byte: int64 block of mask bytes' numbers, i // 8. Offset and number add up modulo 2^64.
        threshold: a 16-bit draw is kept iff it is >= this.

    Returns:
        int32 block of byte's shape.
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
    """x > 0: false for NaN, for both zeros and for everything negative, whose patterns are negative integers."""
    return (x > 0) & (x <= INFINITY)


@triton.jit
def _is_within_one(x, ONE: tl.constexpr):
    """abs(x) <= 1: false for NaN, whose pattern without its sign is above that of infinity."""
    MAGNITUDE: tl.constexpr = (1 << (x.dtype.primitive_bitwidth - 1)) - 1
    return (x & MAGNITUDE) <= ONE


@triton.jit
def _packed(flags):
    """bool (BYTES, 8) -> uint8 (BYTES,): element k of a row is bit k."""
    place = tl.arange(0, 8)[None, :]
    return tl.sum(flags.to(tl.int32) << place, axis=1).to(tl.uint8)


@triton.jit
def _places(n, first, WHOLE: tl.constexpr, BYTES: tl.constexpr):
    """Where the elements and bytes of one program are, counted from its first, and which of them exist.

    `WHOLE` says that all do. Then the masks are constants, and loads take 16 bytes at once; a mask that is
    computed would have them take one element each.

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
    # A mask selects: where it is 0 the result is +0, whatever x is.
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
        within_one: pointer to uint8 (ceil(n / 8),), which receives the bits of M * 1[abs(x) <= 1], or None.
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
    """The bits of a random mask of n elements; spare bits of the last byte are 0.

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
    """0 or 1 for each element, a byte each.

    Args:
        bits: pointer to uint8 (ceil(n / 8),).
        out: pointer to uint8 (n,).
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    if n - 8 * first >= 8 * BYTES:
        _unpack_bytes(bits, out, n, first, True, BYTES)
    else:
        _unpack_bytes(bits, out, n, first, False, BYTES)
