"""The Triton kernels for GPUs that the compiled kernels do not serve. This file checks arguments, allocates and launches.

Triton itself is imported at the first call of an op, because the import takes seconds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from .. import _ops
from ..reference import drop_threshold

# By dtype: the integer type of its bit patterns, and the patterns of +inf and 1.0.
_PATTERNS = {
    torch.float16: (torch.int16, 0x7C00, 0x3C00),
    torch.bfloat16: (torch.int16, 0x7F80, 0x3F80),
    torch.float32: (torch.int32, 0x7F800000, 0x3F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x3FF0000000000000),
}
# These dtypes can be packed but not shaped. Everything except zero is positive.
_BYTE_PATTERNS = dict.fromkeys((torch.bool, torch.uint8), (torch.uint8, 0xFF, 1))

# A program reads 4 KiB: two loads of 16 bytes in flight in each of its 128 threads. With twice that, the random kernels
# need so many registers that fewer loads are in flight on the whole processor.
_PROGRAM_BYTES = 4096
_WARPS = 4


# ---- availability ----


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), which works on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def error() -> str | None:
    """Why Triton cannot be used, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with: pip install triton"
    return None


def facts() -> dict:
    """Triton's version and whether it is interpreted, or ``{"error": the reason}``."""
    if problem := error():
        return {"error": problem}
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"  # installed under another name, as for AMD and Intel
    return {"version": version, "interpreted": interpreted()}


@functools.cache
def _kernels():
    try:
        from . import triton_kernels
    except ImportError as problem:
        raise RuntimeError(
            f"Triton is installed but did not load: {problem}; FASTSHAPE_BACKEND=reference does not need it"
        ) from problem
    return triton_kernels


# ---- launches ----


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_dense(x: Tensor) -> None:
    dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(x)
    _check(dense, "x must be dense in memory (contiguous or channels_last)")


def _check_bits(bits: Tensor, n: int, device: torch.device) -> None:
    fits = bits.dtype == torch.uint8 and bits.is_contiguous() and bits.numel() == (n + 7) // 8
    _check(
        fits and bits.device == device,
        f"bits must be a contiguous uint8 tensor on {device} of {(n + 7) // 8} bytes for {n} elements",
    )


def _check_rng_state(rng_state: Tensor, device: torch.device, p_zero: float) -> None:
    fits = rng_state.dtype == torch.int64 and rng_state.is_contiguous() and rng_state.numel() == 2
    _check(
        fits and rng_state.device == device,
        f"rng_state must be a contiguous int64 tensor [seed, offset] on {device}",
    )
    _check(0 <= p_zero < 1, f"p_zero must be in [0, 1), not {p_zero}")


def _launch(kernel: str, n: int, device: torch.device, item_bytes: int, *arguments, **constants):
    """Launch `kernel` for n elements on the current stream of `device`."""
    if n == 0:
        return
    mask_bytes = _PROGRAM_BYTES // (8 * item_bytes)
    programs = -(-n // (8 * mask_bytes))
    # Triton launches on the current device. The index of a CPU is None, which changes nothing.
    with torch.accelerator.device_index(device.index):
        getattr(_kernels(), kernel)[(programs,)](
            *arguments, BYTES=mask_bytes, num_warps=_WARPS, **constants
        )


def _run_shape(x, y, within_one, rng_state, bits, p_zero, binarize) -> None:
    """Shape x into y, which may be x. Write the bits of M * 1[abs(x) <= 1] to `within_one` unless it is None."""
    _check(
        x.dtype in _PATTERNS,
        "x: this dtype cannot be shaped; float16, bfloat16, float32 and float64 can",
    )
    _check_dense(x)
    _check(
        rng_state is None or bits is None,
        "a mask is random (rng_state) or given (bits), not both",
    )
    n, threshold = x.numel(), 0
    if rng_state is not None:
        _check_rng_state(rng_state, x.device, p_zero)
        threshold = drop_threshold(p_zero)
        if threshold == 0:  # no element can be dropped
            rng_state = None
    elif bits is not None:
        _check_bits(bits, n, x.device)
    integer, infinity, one = _PATTERNS[x.dtype]
    x_integers = x.view(integer)
    y_integers = x_integers if y is x else y.view(integer)
    _launch(
        "shape", n, x.device, x.element_size(),
        x_integers, y_integers, within_one, rng_state, bits, n, threshold,
        BINARIZE=binarize, INFINITY=infinity, ONE=one,
    )  # fmt: skip


def _new_bytes(like: Tensor, n: int) -> Tensor:
    return torch.empty((n + 7) // 8, dtype=torch.uint8, device=like.device)


# ---- ops, as `fastshape.reference` defines them ----


def shape(x, rng_state, bits, p_zero, binarize):
    y = torch.empty_like(x)
    _run_shape(x, y, None, rng_state, bits, p_zero, binarize)
    return y


def shape_(x, rng_state, bits, p_zero, binarize):
    _run_shape(x, x, None, rng_state, bits, p_zero, binarize)


def shape_clipped(x, rng_state, bits, p_zero, binarize):
    y, within_one = torch.empty_like(x), _new_bytes(x, x.numel())
    _run_shape(x, y, within_one, rng_state, bits, p_zero, binarize)
    return y, within_one


def shape_clipped_(x, rng_state, bits, p_zero, binarize):
    within_one = _new_bytes(x, x.numel())
    _run_shape(x, x, within_one, rng_state, bits, p_zero, binarize)
    return within_one


def pack(x):
    patterns = _PATTERNS | _BYTE_PATTERNS
    _check(
        x.dtype in patterns,
        "x: this dtype cannot be packed; float16, bfloat16, float32, float64, bool and uint8 can",
    )
    _check_dense(x)
    bits = _new_bytes(x, x.numel())
    integer, infinity, _ = patterns[x.dtype]
    _launch(
        "pack", x.numel(), x.device, x.element_size(),
        x.view(integer), bits, x.numel(),
        INFINITY=infinity,
    )  # fmt: skip
    return bits


def pack_random(rng_state, n, p_zero):
    _check(n >= 0, f"n must not be negative, not {n}")
    _check_rng_state(rng_state, rng_state.device, p_zero)
    bits = _new_bytes(rng_state, n)
    threshold = drop_threshold(p_zero)
    state = rng_state if threshold else None
    _launch("pack_random", n, bits.device, 2, state, bits, n, threshold)
    return bits


def unpack(bits, n):
    _check(n >= 0, f"n must not be negative, not {n}")
    _check_bits(bits, n, bits.device)
    out = torch.empty(n, dtype=torch.bool, device=bits.device)
    _launch("unpack", n, bits.device, 1, bits, out.view(torch.uint8), n)
    return out


_IMPLEMENTATIONS = {
    "shape": shape,
    "shape_": shape_,
    "shape_clipped": shape_clipped,
    "shape_clipped_": shape_clipped_,
    "pack": pack,
    "pack_random": pack_random,
    "unpack": unpack,
}


def register(key: str) -> None:
    """Register the kernels for one dispatch key: ``"CUDA"`` (also AMD GPUs), ``"XPU"`` or ``"CPU"``."""
    for name, implementation in _IMPLEMENTATIONS.items():
        torch.library.impl(f"{_ops.NAMESPACE}::{name}", key, implementation)
