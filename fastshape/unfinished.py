"""Tensors that get their values when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .layout import dense_strides, memory_format_name

without_override = torch._C.DisableTorchFunctionSubclass

# What tells no value.
_PROPERTIES = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_xpu", "is_mps",
        "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes",
    )
} | {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point",
        "is_complex", "get_device", "__len__",
    )
}  # fmt: skip


class Unfinished(Tensor):
    """A tensor of known shape, dtype and device without values.

    A function that reads it gets the finished tensor. torch announces functions to ``__torch_function__``. What bypasses it, as
    an extension in C++ or an autograd.Function may, meets ``__torch_dispatch__``, below autograd.
    """

    # Functions that need no finished tensor, and what runs in their place. That returns None where it does not serve.
    readers: dict[Callable, Callable] = {}

    def __init__(self, *arguments):
        pass

    @staticmethod
    def like(cls: type, x: Tensor) -> Any:
        """An instance of `cls` with the shape, dtype and device of x, and its strides where they are dense."""
        strides = dense_strides(x.shape, memory_format_name(x) or "contiguous")
        return Tensor._make_wrapper_subclass(
            cls, x.shape, strides=strides, dtype=x.dtype, device=x.device
        )

    def done(self) -> Tensor | None:
        """The finished tensor, if it is."""
        raise NotImplementedError(f"{type(self).__name__} must define done: it is abstract")

    def finish(self, reader: str) -> Tensor:
        """The finished tensor, always the same object, for a function of this name."""
        raise NotImplementedError(f"{type(self).__name__} must define finish: it is abstract")

    def for_dispatch(self, reader: str) -> Tensor:
        """The finished tensor for code below autograd."""
        return self.finish(reader).detach()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _PROPERTIES:
            done = args[0].done()
            if done is not None:  # its shape may have changed in place
                return function(done, *args[1:], **kwargs)
            with without_override():
                return function(*args, **kwargs)
        return cls.read(function, args, kwargs)

    @classmethod
    def read(cls, function, args, kwargs):
        """What `function` returns for finished tensors, or what runs in its place."""
        if reader := cls.readers.get(function):
            result = reader(*args, **kwargs)
            if result is not None:
                return result
        name = getattr(function, "__name__", str(function))
        args, kwargs = tree_map_only(Unfinished, lambda t: t.finish(name), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        if function._schema.is_mutable:
            raise RuntimeError(
                f"method='replace': {function} would write to a shaped map that is not computed yet, in a way that torch "
                "does not announce; use method='hooks'"
            )
        args, kwargs = tree_map_only(
            Unfinished, lambda t: t.for_dispatch(str(function)), (args, kwargs or {})
        )
        return function(*args, **kwargs)
