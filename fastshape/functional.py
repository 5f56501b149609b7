"""fastshape.shape: activation shaping with its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ops
from .bitmask import _FLOATS, BitMask
from .layout import MEMORY_FORMATS, MemoryFormat, memory_format_name
from .rng import checked_p_zero, checked_rng_state
from .rng import rng_state as new_rng_state
from .unfinished import Unfinished

if TYPE_CHECKING:
    from .modules import Gradient

GRADIENTS = ("straight_through", "clipped", "zero")


def _masked(x, rng_state, bits, p_zero, memory_format):
    """x * M. It has a gradient itself, so that the backward pass can be differentiated."""
    x = x.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    if not torch.is_grad_enabled():
        return torch.ops.fastshape.shape.default(x, rng_state, bits, p_zero, False)
    return apply(_StraightThrough, x, rng_state, bits, p_zero, False, False, memory_format)


class _Unbatched(torch.autograd.Function):
    """A function of one whole tensor, without torch.func.vmap. Call it with `apply` below.

    torch.func needs ``setup_context``. With it, autograd binds the signature of forward at every call, which takes several times
    as long as the op on a small map. So each function has a twin whose forward sets up the context itself.
    """

    twin: type[torch.autograd.Function]  # with the context set up in forward

    def __init_subclass__(cls):
        super().__init_subclass__()

        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.twin = type(cls.__name__, (torch.autograd.Function,), methods)

    @staticmethod
    def vmap(info, in_dims, *args):
        _ops.refuse_vmap(info, in_dims, *args)


def apply(function: type[_Unbatched], *inputs):
    """``function.apply``, or that of the faster twin outside torch.func and torch.compile."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    return function.twin.apply(*inputs)


class _StraightThrough(_Unbatched):
    """dL/dx = dL/dy * M. Saves [seed, offset] or the bits of the mask, never x or y."""

    @staticmethod
    def forward(x, rng_state, bits, p_zero, binarize, inplace, memory_format):
        if inplace:
            torch.ops.fastshape.shape_.default(x, rng_state, bits, p_zero, binarize)
            return x
        return torch.ops.fastshape.shape.default(x, rng_state, bits, p_zero, binarize)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, rng_state, bits, ctx.p_zero, _, inplace, ctx.memory_format = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(rng_state, bits)

    @staticmethod
    def backward(ctx, grad):
        rng_state, bits = ctx.saved_tensors
        if rng_state is not None or bits is not None:
            grad = _masked(grad, rng_state, bits, ctx.p_zero, ctx.memory_format)
        return grad, None, None, None, None, None, None


class _Clipped(_Unbatched):
    """dL/dx = dL/dy * M * 1[abs(x) <= 1]. Saves one bit per element."""

    @staticmethod
    def forward(x, rng_state, bits, p_zero, binarize, inplace, memory_format):
        if inplace:
            return x, torch.ops.fastshape.shape_clipped_.default(
                x, rng_state, bits, p_zero, binarize
            )
        return torch.ops.fastshape.shape_clipped.default(x, rng_state, bits, p_zero, binarize)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, _, _, _, inplace, ctx.memory_format = inputs
        _, within_one = output
        if inplace:
            ctx.mark_dirty(x)
        ctx.mark_non_differentiable(within_one)
        ctx.save_for_backward(within_one)

    @staticmethod
    def backward(ctx, grad, _):
        (within_one,) = ctx.saved_tensors
        grad = _masked(grad, None, within_one, 0.0, ctx.memory_format)
        return grad, None, None, None, None, None, None


def _checked_x(x: Tensor) -> Tensor:
    """x itself, finished, if it can be shaped."""
    if isinstance(x, Unfinished):
        x = x.finish("fastshape")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a tensor, not {type(x).__name__}")
    if x.dtype not in _FLOATS:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)
        raise TypeError(f"x: dtype {x.dtype} cannot be shaped; allowed are {allowed}")
    if x.layout != torch.strided:
        raise TypeError(f"x: layout {x.layout} cannot be shaped; only dense tensors can")
    return x


def _checked_mask(mask: BitMask | Tensor, x: Tensor, memory_format: MemoryFormat) -> Tensor:
    """The bits of `mask`, in the order of the elements of x."""
    if not isinstance(mask, BitMask):
        if isinstance(mask, Tensor) and mask.shape != x.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, x {tuple(x.shape)}: must be equal"
            )
        mask = BitMask.from_tensor(mask)
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, x {tuple(x.shape)}: must be equal")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x on {x.device}: they must be on one device")
    return mask.in_memory_format(memory_format).bits


def shape(
    x: Tensor,
    *,
    p_zero: float | None = None,
    mask: BitMask | Tensor | None = None,
    binarize: bool = True,
    gradient: Gradient = "straight_through",
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> Tensor:
    """Activation shaping: ``B(x) * M``, with B(x) = 1 where x > 0 and 0 elsewhere (NaN included).

    M is random (give `p_zero`), recorded (give `mask`) or all ones (give neither). The mask selects: where M is 0 the result is
    +0, even if x is infinite or NaN.

    Args:
        x: any shape; float16, bfloat16, float32 or float64. A contiguous or channels_last x keeps its memory format. Other
            strides give a contiguous result.
        p_zero: probability of a zero in a random mask, in [0, 1). It is rounded to a multiple of 1/65536, which
            `fastshape.realised_rate` returns. A probability that this would make 0 or 1 is refused.
        mask: a `BitMask`, or a tensor of x's shape and device, read as ``> 0``. It gets no gradient.
        binarize: False gives ``x * M`` with its exact gradient.
        gradient: ``"straight_through"`` is dL/dx = dL/dy * M. ``"clipped"`` is dL/dy * M * 1[abs(x) <= 1]. ``"zero"`` has no
            gradient: the result is detached.
        rng_state: int64 [seed, offset] on x's device; determines the random mask.
        generator: draws the state; None is the default generator of x's device.
        inplace: write the result into x. Nothing else may need x for its own backward; this holds for the output of a
            convolution.

    Returns:
        Tensor of x's shape and dtype, also under autocast: a convolution's bfloat16 map stays bfloat16, where
        ``(x > 0).float()`` makes it float32. ``shape(x.float())`` gives float32. With `inplace` it is x itself or, for
        gradient ``"zero"``, a detached alias of x.

    Raises:
        TypeError: the dtype cannot be shaped; mask, p_zero or rng_state has a wrong type.
        ValueError: p_zero is outside [0, 1); mask or rng_state has a wrong shape or device; p_zero and mask are both given;
            rng_state or generator is given without p_zero, or both are; the gradient is unknown.
        RuntimeError: `inplace` and x is a leaf that requires a gradient.

    Example:
        >>> x = torch.tensor([-1.0, 2.0, 3.0])
        >>> fastshape.shape(x, mask=torch.tensor([True, True, False]))
        tensor([0., 1., 0.])
    """
    if isinstance(x, torch.fx.Proxy):  # torch.fx traces a model that calls this
        options = {"p_zero": p_zero, "mask": mask, "binarize": binarize, "gradient": gradient,
                   "rng_state": rng_state, "generator": generator, "inplace": inplace}  # fmt: skip
        return x.tracer.create_proxy("call_function", shape, (x,), options)
    x = _checked_x(x)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r}: allowed are {', '.join(GRADIENTS)}")
    if p_zero is not None and mask is not None:
        raise ValueError("p_zero and mask: a mask is random or given, not both")
    if p_zero is None and (rng_state is not None or generator is not None):
        raise ValueError("rng_state and generator go with p_zero: only a random mask draws")
    if rng_state is not None and generator is not None:
        raise ValueError("rng_state and generator: give one of them, not both")
    if inplace and x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "inplace=True: x is a leaf that requires a gradient and must keep its values"
        )
    if gradient == "zero":
        x = x.detach()

    memory_format = memory_format_name(x)
    dense = x if memory_format else x.contiguous()
    memory_format = memory_format or "contiguous"

    bits = None
    if p_zero is not None:
        p_zero = checked_p_zero(p_zero)
        if rng_state is None:
            rng_state = new_rng_state(generator=generator, device=x.device)
        rng_state = checked_rng_state(rng_state, x.device)
    elif mask is not None:
        bits = _checked_mask(mask, x, memory_format)

    # Four cases need a copy. The values of a negative view are not those in its memory. Strides that match no memory format are
    # made contiguous. Under torch.compile the compiler decides itself where to write in place. And autograd lets a function
    # write to a view only if it returns nothing else, which excludes the clipped gradient.
    writes_x = inplace and dense is x and not torch.compiler.is_compiling()
    if writes_x and (x.is_neg() or (gradient == "clipped" and x._is_view())):
        writes_x = False

    arguments = (dense, rng_state, bits, p_zero or 0.0, binarize, writes_x, memory_format)
    if gradient == "clipped":
        y, _ = apply(_Clipped, *arguments)
    else:
        y = apply(_StraightThrough, *arguments)
    return x.copy_(y) if inplace and not writes_x else y
