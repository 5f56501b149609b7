"""The specification of activation shaping in plain PyTorch.

Every other backend must return the same bits. The code is readable rather than fast, and needs only torch.

Elements are numbered in memory order: element ``i`` of a contiguous or channels_last tensor is the ``i``-th in memory.
`fastshape.shape` makes any other tensor contiguous first.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "differentiable_shape",
    "drop_threshold",
    "normalized_values",
    "pack",
    "pack_random",
    "pack_top",
    "philox_words",
    "shape",
    "shape_clipped",
    "shaped_batch_norm",
    "shaped_batch_norm_backward",
    "unpack",
]

_WORD = 0xFFFFFFFF


def philox_words(seed: Tensor, offset: Tensor) -> Tensor:
    """Philox4x32-10 words (Salmon et al., SC 2011).

    Args:
        seed: int64 scalar, read as unsigned: the key (low word, high word).
        offset: int64 (m,), read as unsigned: the counter words (low, high, 0, 0).

    Returns:
        int64 (m, 4), each value one unsigned 32-bit word.
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    counter = [offset & _WORD, (offset >> 32) & _WORD, torch.zeros_like(offset)]
    counter.append(counter[2])
    for _ in range(10):
        # An int64 product wraps at 2^64, so that its bits are those of the unsigned product.
        product0 = counter[0] * 0xD2511F53
        product1 = counter[2] * 0xCD9E8D57
        counter = [
            ((product1 >> 32) & _WORD) ^ counter[1] ^ key[0],
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ counter[3] ^ key[1],
            product0 & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return torch.stack(counter, dim=-1)


def drop_threshold(p_zero: float) -> int:
    """``round(p_zero * 65536)``: an element with a 16-bit draw below it is dropped."""
    return round(p_zero * 65536)


def random_mask(rng_state: Tensor, n: int, p_zero: float) -> Tensor:
    """bool (n,): element i is kept if and only if its 16-bit draw is at least `drop_threshold`.

    The draw of element i is half ``i % 2`` (0 is the low half) of word ``(i % 8) // 2`` of the Philox call with offset
    ``rng_state[1] + i // 8``, which wraps at 2^64.
    """
    calls = torch.arange((n + 7) // 8, device=rng_state.device)
    words = philox_words(rng_state[0], rng_state[1] + calls)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return (halves >= drop_threshold(p_zero)).reshape(-1)[:n]


def pack_bool(mask: Tensor) -> Tensor:
    """bool (n,) -> uint8 (ceil(n / 8),): element i is bit i % 8 of byte i // 8; spare bits are 0."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8))
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) << place).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """uint8 (ceil(n / 8),) -> bool (n,): the inverse of `pack_bool`."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.view(-1, 1) >> place) & 1).reshape(-1)[:n].bool()


def in_memory_order(x: Tensor) -> Tensor:
    """A 1-d view of a dense tensor, with its elements in memory order."""
    return x.as_strided((x.numel(),), (1,))


def pack(x: Tensor) -> Tensor:
    """uint8 bits of ``x > 0``, in memory order."""
    return pack_bool(in_memory_order(x) > 0)


def pack_random(rng_state: Tensor, n: int, p_zero: float) -> Tensor:
    """uint8 bits of `random_mask`."""
    return pack_bool(random_mask(rng_state, n, p_zero))


def pack_top(x: Tensor, row: int, count: int) -> Tensor:
    """uint8 bits of the `count` largest elements of each row of `row` consecutive elements.

    The order is that of torch's stable descending sort: NaN is largest, -0 equals +0, and of equal elements those come first
    that are first in memory.

    Args:
        x: contiguous, n elements of any dtype that torch sorts.
        row: a divisor of n, from 1 to 2^32 - 1.
        count: from 0 to `row`.

    Raises:
        RuntimeError: x is not contiguous, or row or count is not allowed.
    """
    n = x.numel()
    if not x.is_contiguous():
        raise RuntimeError("x must be contiguous")
    if not 1 <= row < 2**32 or n % row:
        raise RuntimeError(
            f"row must divide the {n} elements of x and be from 1 to 2^32 - 1, not {row}"
        )
    if not 0 <= count <= row:
        raise RuntimeError(f"count must be from 0 to row={row}, not {count}")
    rows = x.view(-1, row)
    largest = rows.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros(rows.shape, dtype=torch.bool, device=x.device).scatter_(-1, largest, True)
    return pack_bool(kept.view(-1))


def _mask(x: Tensor, rng_state: Tensor | None, bits: Tensor | None, p_zero: float) -> Tensor | None:
    if rng_state is not None:
        mask = random_mask(rng_state, x.numel(), p_zero)
    elif bits is not None:
        mask = unpack(bits, x.numel())
    else:
        return None
    return mask.as_strided(x.size(), x.stride())


def shape(
    x: Tensor, rng_state: Tensor | None, bits: Tensor | None, p_zero: float, binarize: bool
) -> Tensor:
    """``B(x) * M``, or ``x * M`` without `binarize`. B(x) is 1 where x > 0, else 0 (also for NaN).

    M is random (`rng_state`, `p_zero`), given (`bits`) or, with neither, all ones. The mask selects: where M is 0 the result is
    +0, even if x is infinite or NaN.

    Args:
        x: dense, float16, bfloat16, float32 or float64, n elements.
        rng_state: int64 [seed, offset], or None.
        bits: uint8 (ceil(n / 8),), or None.
        p_zero: probability of a zero in a random mask, in [0, 1).

    Returns:
        Tensor of x's shape, dtype and memory format.
    """
    value = (x > 0).to(x.dtype) if binarize else x
    mask = _mask(x, rng_state, bits, p_zero)
    if mask is None:
        return value.clone()
    return torch.where(mask, value, torch.zeros((), dtype=x.dtype, device=x.device))


def shape_clipped(
    x: Tensor, rng_state: Tensor | None, bits: Tensor | None, p_zero: float, binarize: bool
) -> tuple[Tensor, Tensor]:
    """`shape`, and the bits of ``M * 1[abs(x) <= 1]`` that the clipped gradient needs."""
    within_one = x.abs() <= 1
    mask = _mask(x, rng_state, bits, p_zero)
    if mask is not None:
        within_one = within_one & mask
    flat = within_one.as_strided((x.numel(),), (1,))
    return shape(x, rng_state, bits, p_zero, binarize), pack_bool(flat)


def _table(statistics: Tensor, weight: Tensor | None, bias: Tensor | None):
    """float64 (C,) each: scale; xhat of a zero and of a one; y of a zero and of a one, before ReLU."""
    mean, invstd = statistics
    scale = invstd if weight is None else weight.double() * invstd
    bias = torch.zeros_like(mean) if bias is None else bias.double()
    normalized = (-mean * invstd, (1 - mean) * invstd)
    return scale, normalized, (bias + -mean * scale, bias + (1 - mean) * scale)


def _entries(y: tuple, dtype: torch.dtype, relu: bool) -> tuple[Tensor, Tensor]:
    """The y of `_table` as it is written: rounded to float32, then to `dtype` (float64 stays), then ReLU."""
    if dtype != torch.float64:
        y = [t.float() for t in y]
    y = [t.to(dtype) for t in y]
    return tuple(torch.where(t <= 0, 0, t) if relu else t for t in y)


def normalized_values(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, relu: bool
) -> tuple[Tensor, Tensor]:
    """The two values that y of `shaped_batch_norm` has in each channel.

    Args:
        statistics: its result.

    Returns:
        (C,) of `dtype` each: y where a is 0, and where it is 1.
    """
    return _entries(_table(statistics, weight, bias)[2], dtype, relu)


def _per_channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def shaped_batch_norm(
    x: Tensor,
    rng_state: Tensor | None,
    bits: Tensor | None,
    p_zero: float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    clipped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm2d and (with `relu`) ReLU of ``a = B(x) * M``. y has two values per channel.

    With k ones among the m elements of a channel, mean = k / m, var = mean (1 - mean) and
    y(a) = bias + (a - mean) weight / sqrt(var + eps). All this is float64; y is then rounded to x's dtype. With `training` the
    statistics are those of the batch, and the running statistics become (1 - momentum) old + momentum new, where the new
    variance is the unbiased one. Otherwise the running statistics are used.

    Args:
        x: (N, C, H, W), contiguous or channels_last; float16, bfloat16, float32 or float64.
        rng_state, bits, p_zero: as in `shape`.
        weight, bias: (C,), or both None.
        running_mean, running_var: (C,), updated in place, or both None.
        clipped: also return the bits of M * 1[abs(x) <= 1].

    Returns:
        y: of x's shape, dtype and memory format.
        ones: uint8, the bits of B(x) * M.
        within_one: uint8, the bits of M * 1[abs(x) <= 1]; empty unless `clipped`.
        statistics: float64 (2, C): mean and 1 / sqrt(var + eps).
    """
    if clipped:
        a, within_one = shape_clipped(x, rng_state, bits, p_zero, True)
    else:
        a, within_one = shape(x, rng_state, bits, p_zero, True), x.new_empty(0, dtype=torch.uint8)
    a = a > 0
    if training:
        m = x.numel() // x.shape[1]
        mean = a.sum((0, 2, 3)).double() / m
        var = mean * (1 - mean)
        if running_mean is not None and m > 0:
            for running, now in ((running_mean, mean), (running_var, var * m / (m - 1))):
                running.copy_((1 - momentum) * running.double() + momentum * now)
    else:
        mean, var = running_mean.double(), running_var.double()
    # On a CPU rsqrt is 1 / sqrt with each operation rounded once. torch's sqrt may be off in the last bit.
    statistics = torch.stack([mean, (var + eps).rsqrt()])
    zero, one = normalized_values(statistics, weight, bias, x.dtype, relu)
    y = torch.where(a, _per_channel(one), _per_channel(zero))
    return y.contiguous(memory_format=_format_of(x)), pack(a), within_one, statistics


def _format_of(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def shaped_batch_norm_backward(
    grad: Tensor,
    ones: Tensor,
    statistics: Tensor,
    rng_state: Tensor | None,
    bits: Tensor | None,
    p_zero: float,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    relu: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `shaped_batch_norm`: that of BatchNorm, then the straight-through gradient da * M.

    Sums over a channel are float64. dx = M (scale[a] dy + shift[a]) is computed in float32 (float64 for float64); the product
    and the sum round once each. Where scale[a] is 0, as after a closed ReLU, dy is not read.

    Args:
        grad: dL/dy, with the shape, dtype and memory format of y.
        ones, statistics: results of the forward.
        weight, bias, training, relu: arguments of the forward.
        rng_state, bits, p_zero: the mask M. For the clipped gradient, `bits` is the within_one of the forward.
        needs_x: whether to compute dL/dx.

    Returns:
        dL/dx (empty unless `needs_x`); dL/dweight and dL/dbias, of weight's dtype (empty without a weight).
    """
    a = unpack(ones, grad.numel()).as_strided(grad.size(), grad.stride())
    m = grad.numel() // grad.shape[1]
    scale, normalized, y = _table(statistics, weight, bias)
    passes = [
        ~(t <= 0) if relu else torch.ones_like(t, dtype=torch.bool)
        for t in _entries(y, grad.dtype, False)
    ]
    zero = torch.zeros((), dtype=torch.float64, device=grad.device)
    sums = [torch.where(where, grad.double(), zero).sum((0, 2, 3)) for where in (~a, a)]
    sums = [torch.where(p, s, zero) for p, s in zip(passes, sums, strict=True)]
    grad_bias = sums[0] + sums[1]
    grad_weight = sums[0] * normalized[0] + sums[1] * normalized[1]
    if weight is None:
        parameters = grad.new_empty(0), grad.new_empty(0)
    else:
        parameters = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    if not needs_x:
        return grad.new_empty(0), *parameters

    accumulator = torch.float64 if grad.dtype == torch.float64 else torch.float32
    dx = []
    for passing, xhat in zip(passes, normalized, strict=True):
        shift = (
            -scale * (grad_bias / m + xhat * (grad_weight / m))
            if training
            else zero.expand_as(scale)
        )
        factor = _per_channel(torch.where(passing, scale, zero).to(accumulator))
        product = torch.where(factor != 0, factor * grad.to(accumulator), 0)
        dx.append(product + _per_channel(shift.to(accumulator)))
    dx = torch.where(a, dx[1], dx[0]).to(grad.dtype)
    mask = _mask(grad, rng_state, bits, p_zero)
    if mask is not None:
        dx = torch.where(mask, dx, torch.zeros((), dtype=grad.dtype, device=grad.device))
    return dx.contiguous(memory_format=_format_of(grad)), *parameters


class _Differentiable(torch.autograd.Function):
    """The gradients as formulas over a bool mask, without packing or fusion."""

    @staticmethod
    def forward(ctx, x, rng_state, bits, p_zero, binarize, gradient):
        mask = _mask(x, rng_state, bits, p_zero)
        if mask is None:
            mask = torch.ones_like(x, dtype=torch.bool)
        passes = mask & (x.abs() <= 1) if gradient == "clipped" else mask
        ctx.save_for_backward(passes)
        value = (x > 0).to(x.dtype) if binarize else x
        return torch.where(mask, value, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx, grad):
        (passes,) = ctx.saved_tensors
        zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
        return torch.where(passes, grad, zero), None, None, None, None, None


def differentiable_shape(
    x: Tensor,
    rng_state: Tensor | None = None,
    bits: Tensor | None = None,
    p_zero: float = 0.0,
    binarize: bool = True,
    gradient: str = "straight_through",
) -> Tensor:
    """`shape` with its gradient dL/dy * M, times 1[abs(x) <= 1] if `gradient` is ``"clipped"``.

    Tests and benchmarks use it as the baseline. `fastshape.shape` returns the same bits.
    """
    return _Differentiable.apply(x, rng_state, bits, p_zero, binarize, gradient)
