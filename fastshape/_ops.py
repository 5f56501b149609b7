"""Every op of fastshape: its schema and what it returns under fake tensors. No implementation stands here.

Conventions: ``x`` is dense; ``bits`` is uint8, element i at bit i % 8 of byte i // 8, in x's memory
order; ``rng_state`` is int64 [seed, offset]. A mask is random (``rng_state`` and ``p_zero``), given
(``bits``) or, with neither, all ones. `fastshape.reference` says what each op computes.
"""

from __future__ import annotations

import torch

NAMESPACE = "fastshape"

_MASK = "Tensor? rng_state, Tensor? bits, float p_zero, bool binarize"
SCHEMAS = {
    "shape": f"(Tensor x, {_MASK}) -> Tensor",
    "shape_": f"(Tensor(a!) x, {_MASK}) -> ()",
    "shape_clipped": f"(Tensor x, {_MASK}) -> (Tensor, Tensor)",
    "shape_clipped_": f"(Tensor(a!) x, {_MASK}) -> Tensor",
    "pack": "(Tensor x) -> Tensor",
    "pack_random": "(Tensor rng_state, SymInt n, float p_zero) -> Tensor",
    "unpack": "(Tensor bits, SymInt n) -> Tensor",
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


@torch.library.register_fake(f"{NAMESPACE}::unpack")
def _(bits, n):
    return bits.new_empty((n,), dtype=torch.bool)


def refuse_vmap(info, in_dims, *args):
    """A mask has no meaning for one sample of a batch that is hidden from it."""
    raise NotImplementedError(
        "fastshape has no vmap rule: a mask is numbered over the memory of one whole tensor. "
        "Call fastshape.shape on the batched tensor outside torch.func.vmap."
    )


for _name in SCHEMAS:
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", refuse_vmap)
