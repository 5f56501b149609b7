"""The schemas of all fastshape ops, and what each op returns for fake tensors. Implementations are elsewhere.

Conventions: ``x`` is dense. ``bits`` is uint8: element i is bit i % 8 of byte i // 8, in x's memory order.
``rng_state`` is int64 [seed, offset]. A mask is random (``rng_state`` and ``p_zero``), given (``bits``) or,
with neither, all ones. `fastshape.reference` defines what each op computes.
"""

from __future__ import annotations

import torch

NAMESPACE = "fastshape"

_MASK = "Tensor? rng_state, Tensor? bits, float p_zero, bool binarize"
_BATCH_NORM = (
    "Tensor? rng_state, Tensor? bits, float p_zero, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, "
    "bool relu, bool clipped"
)
SCHEMAS = {
    "shape": f"(Tensor x, {_MASK}) -> Tensor",
    "shape_": f"(Tensor(a!) x, {_MASK}) -> ()",
    "shape_clipped": f"(Tensor x, {_MASK}) -> (Tensor, Tensor)",
    "shape_clipped_": f"(Tensor(a!) x, {_MASK}) -> Tensor",
    "pack": "(Tensor x) -> Tensor",
    "pack_random": "(Tensor rng_state, SymInt n, float p_zero) -> Tensor",
    "pack_top": "(Tensor x, SymInt row, SymInt count) -> Tensor",
    "unpack": "(Tensor bits, SymInt n) -> Tensor",
    "shaped_batch_norm": f"(Tensor x, {_BATCH_NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    "shaped_batch_norm_": f"(Tensor(c!) x, {_BATCH_NORM}) -> (Tensor, Tensor, Tensor)",
    "shaped_batch_norm_backward": (
        "(Tensor grad, Tensor ones, Tensor statistics, Tensor? rng_state, Tensor? bits, float p_zero, "
        "Tensor? weight, Tensor? bias, bool training, bool relu, bool needs_x) -> (Tensor, Tensor, Tensor)"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


def _bytes_for(n):
    return (n + 7) // 8


@torch.library.register_fake(f"{NAMESPACE}::shape")
def _(x, rng_state, bits, p_zero, binarize):
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::shape_")
def _(x, rng_state, bits, p_zero, binarize):
    return None


@torch.library.register_fake(f"{NAMESPACE}::shape_clipped")
def _(x, rng_state, bits, p_zero, binarize):
    return torch.empty_like(x), x.new_empty((_bytes_for(x.numel()),), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::shape_clipped_")
def _(x, rng_state, bits, p_zero, binarize):
    return x.new_empty((_bytes_for(x.numel()),), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::pack")
def _(x):
    return x.new_empty((_bytes_for(x.numel()),), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::pack_random")
def _(rng_state, n, p_zero):
    return rng_state.new_empty((_bytes_for(n),), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::pack_top")
def _(x, row, count):
    return x.new_empty((_bytes_for(x.numel()),), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::unpack")
def _(bits, n):
    return bits.new_empty((n,), dtype=torch.bool)


def _saved(x, clipped):
    """What `shaped_batch_norm` returns after y: ones, within_one, statistics."""
    n = _bytes_for(x.numel())
    return (
        x.new_empty((n,), dtype=torch.uint8),
        x.new_empty((n if clipped else 0,), dtype=torch.uint8),
        x.new_empty((2, x.shape[1]), dtype=torch.float64),
    )


@torch.library.register_fake(f"{NAMESPACE}::shaped_batch_norm")
def _(x, *arguments):
    return torch.empty_like(x), *_saved(x, clipped=arguments[-1])


@torch.library.register_fake(f"{NAMESPACE}::shaped_batch_norm_")
def _(x, *arguments):
    return _saved(x, clipped=arguments[-1])


@torch.library.register_fake(f"{NAMESPACE}::shaped_batch_norm_backward")
def _(grad, ones, statistics, rng_state, bits, p_zero, weight, bias, training, relu, needs_x):
    return (
        torch.empty_like(grad) if needs_x else grad.new_empty((0,)),
        grad.new_empty((0,)) if weight is None else torch.empty_like(weight),
        grad.new_empty((0,)) if bias is None else torch.empty_like(bias),
    )


def refuse_vmap(info, in_dims, *args):
    """Raise: under vmap an op sees one sample and cannot number the elements of the whole batch."""
    raise NotImplementedError(
        "fastshape has no vmap rule: a mask is numbered over the memory of one whole tensor. "
        "Call fastshape.shape on the batched tensor outside torch.func.vmap."
    )


for _name in SCHEMAS:
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", refuse_vmap)
