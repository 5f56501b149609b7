"""Registers the reference as the implementation for every device."""

from __future__ import annotations

import torch

from .. import _ops, reference


def _shape_(x, rng_state, bits, p_zero, binarize):
    x.copy_(reference.shape(x, rng_state, bits, p_zero, binarize))


def _shape_clipped_(x, rng_state, bits, p_zero, binarize):
    y, within_one = reference.shape_clipped(x, rng_state, bits, p_zero, binarize)
    x.copy_(y)
    return within_one


def _shaped_batch_norm_(x, *arguments):
    y, *saved = reference.shaped_batch_norm(x, *arguments)
    x.copy_(y)
    return tuple(saved)


_IMPLEMENTATIONS = {
    "shape": reference.shape,
    "shape_": _shape_,
    "shape_clipped": reference.shape_clipped,
    "shape_clipped_": _shape_clipped_,
    "pack": reference.pack,
    "pack_random": reference.pack_random,
    "pack_top": reference.pack_top,
    "unpack": reference.unpack,
    "shaped_batch_norm": reference.shaped_batch_norm,
    "shaped_batch_norm_": _shaped_batch_norm_,
    "shaped_batch_norm_backward": reference.shaped_batch_norm_backward,
}


def register() -> None:
    """Register the reference for all devices. Backends of one device take precedence there."""
    for name, implementation in _IMPLEMENTATIONS.items():
        torch.library.impl(f"{_ops.NAMESPACE}::{name}", "CompositeExplicitAutograd", implementation)
