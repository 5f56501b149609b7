"""Shape + BatchNorm2d + ReLU as one op. A binary map has two values, and so has each of its channels after BatchNorm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .bitmask import BitMask
from .functional import _checked_mask, _checked_x, _Unbatched, apply
from .layout import MEMORY_FORMATS, memory_format_name
from .modules import AtEval, Gradient, checked_setting, fx_node
from .rng import checked_rng_state
from .rng import rng_state as new_rng_state


class _ShapedBatchNorm(_Unbatched):
    """The gradient of BatchNorm, then the straight-through one. Saves bits and numbers per channel, never x or y."""

    @staticmethod
    def forward(
        x, rng_state, bits, p_zero, weight, bias, running_mean, running_var, training, momentum, eps, relu, clipped,
        inplace, memory_format,
    ):  # fmt: skip
        arguments = (
            x, rng_state, bits, p_zero, weight, bias, running_mean, running_var, training, momentum, eps, relu, clipped,
        )  # fmt: skip
        if inplace:
            return x, *torch.ops.fastshape.shaped_batch_norm_.default(*arguments)
        return torch.ops.fastshape.shaped_batch_norm.default(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (
            x, rng_state, bits, ctx.p_zero, weight, bias, _, _, ctx.training, _, _, ctx.relu, clipped,
            inplace, ctx.memory_format,
        ) = inputs  # fmt: skip
        _, ones, within_one, statistics = output
        if inplace:
            ctx.mark_dirty(x)
        ctx.mark_non_differentiable(ones, within_one, statistics)
        ctx.set_materialize_grads(False)
        if clipped:  # within_one includes the mask
            rng_state, bits = None, within_one
        ctx.save_for_backward(ones, statistics, rng_state, bits, weight, bias)

    @staticmethod
    def backward(ctx, grad, *_):
        needs_x, _, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = gradients(ctx, grad, needs_x, needs_weight, needs_bias)
        return dx, *(None,) * 3, dweight, dbias, *(None,) * 9


def gradients(
    ctx, grad: Tensor | None, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple:
    """dL/dx, dL/dweight and dL/dbias, each None where it is not needed.

    Args:
        ctx: of the forward: p_zero, training, relu, memory_format; it saved ones, statistics, rng_state, bits, weight, bias.
        grad: dL/dy.
    """
    if not torch.is_grad_enabled():
        return _gradients(ctx, grad, needs_x, needs_weight, needs_bias)
    # once_differentiable takes longer than the op itself on a small map. It is needed only with create_graph=True.
    result = once_differentiable(_gradients)(ctx, grad, needs_x, needs_weight, needs_bias)
    for node in {g.grad_fn for g in result if g is not None} - {None}:
        node.register_prehook(_refuse_second)
    return result


def _gradients(ctx, grad, needs_x, needs_weight, needs_bias):
    if grad is None:
        return None, None, None
    ones, statistics, rng_state, bits, weight, bias = ctx.saved_tensors
    grad = grad.contiguous(memory_format=MEMORY_FORMATS[ctx.memory_format])
    dx, dweight, dbias = torch.ops.fastshape.shaped_batch_norm_backward.default(
        grad, ones, statistics, rng_state, bits, ctx.p_zero, weight, bias, ctx.training, ctx.relu, needs_x
    )  # fmt: skip
    return dx if needs_x else None, dweight if needs_weight else None, dbias if needs_bias else None


def _refuse_second(_):
    raise RuntimeError(
        "the backward pass of ShapedBatchNorm2d cannot be differentiated; use fastshape.shape and nn.BatchNorm2d, "
        "or fastshape.attach with method='hooks'"
    )


class ShapedBatchNorm2d(nn.BatchNorm2d):
    """Shaping, then BatchNorm2d, then (with `relu`) ReLU, in one op.

    The result is that of `fastshape.shape`, `nn.BatchNorm2d` and `nn.ReLU` one after the other. The op makes fewer passes over
    the map and saves one bit per element for backward.

    A shaped map is binary, ``a = B(x) * M``. With k ones among the m elements of a channel:

        mean = k / m,  var = mean (1 - mean),  y(a) = bias + (a - mean) weight / sqrt(var + eps)

    k and m are exact integers, so that the result does not depend on the order of summation. Everything after them is float64,
    and each operation rounds once. y is then rounded to float32 and to x's dtype (float64 stays), and the running statistics to
    their dtype. Backward sums over a channel in float64 and computes dL/dx in float32 (float64 for float64).
    If the result of `nn.BatchNorm2d` differs by more than such rounding, the error is in `nn.BatchNorm2d`. On a CPU its sums over
    a float32 channels_last map are off by up to 1e-3 (torch 2.15, 16 images of 112 x 112). For that reason training with hooks
    and training by replacement soon diverge.

    Parameters, running statistics, ``num_batches_tracked`` and state_dict are those of `nn.BatchNorm2d`, and so checkpoints can
    be exchanged. Under DistributedDataParallel each process has its own statistics, as with `nn.BatchNorm2d`. There is no
    variant that shares them: ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would drop shaping and ReLU, raises a
    RuntimeError. Modules before this one in the model are converted by then.

    The arguments after `dtype` are attributes, which may be set at any time; each is then checked as here. torch.fx traces the
    module as one node.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer: as in `nn.BatchNorm2d`.
        p_zero: probability of a zero in the mask that each call draws, in [0, 1); None draws no mask. It is rounded to a
            multiple of 1/65536, which `fastshape.realised_rate` returns. A probability that this would make 0 or 1 is
            refused.
        gradient: ``"straight_through"``, ``"clipped"`` or ``"zero"``, as in `fastshape.shape`. Weight and bias get their
            gradient in each case.
        at_eval: what happens in evaluation mode. ``"off"`` is plain BatchNorm (and ReLU), ``"binarize"`` binarizes without a
            mask, ``"on"`` shapes as in training.
        relu: also apply ReLU.
        inplace: write y into x where possible. Nothing else may need x for its own backward; this holds for the output of a
            convolution.

    Shape:
        Input and output: (N, C, H, W); float16, bfloat16, float32 or float64, with parameters of the same dtype or of
        float32. A contiguous or channels_last input keeps its memory format. Other strides give a contiguous output.

    The backward pass cannot be differentiated. The backward passes of `fastshape.shape` and `nn.BatchNorm2d` can.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: p_zero, gradient or at_eval is not allowed.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), fastshape.ShapedBatchNorm2d(8, p_zero=0.3, relu=True))
    """

    p_zero: float | None
    gradient: Gradient
    at_eval: AtEval
    relu: bool
    inplace: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        p_zero: float | None = None,
        gradient: Gradient = "straight_through",
        at_eval: AtEval = "off",
        relu: bool = False,
        inplace: bool = False,
        **newer: Any,  # arguments that nn.BatchNorm2d has in later versions of torch
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer
        )
        self.p_zero = p_zero
        self.gradient = gradient
        self.at_eval = at_eval
        self.relu = relu
        self.inplace = inplace

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("p_zero", "gradient", "at_eval", "relu", "inplace"):
            value = checked_setting(name, value)
        super().__setattr__(name, value)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        # convert_sync_batchnorm makes a new module from the parameters alone and asks nobody. But it then calls this method, which
        # few others call and no forward does.
        if (
            not torch.compiler.is_compiling()
            and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm"
        ):
            raise RuntimeError(
                f"convert_sync_batchnorm: {type(self).__name__} cannot become a SyncBatchNorm, which has no shaping and no ReLU. "
                "Build the model with fastshape.ActivationShaping, nn.BatchNorm2d and nn.ReLU in its place, or with plain "
                "nn.BatchNorm2d and call fastshape.attach(..., method='hooks') after the conversion"
            )
        return super().named_children()

    @classmethod
    def from_batch_norm(cls, bn: nn.BatchNorm2d, **shaping: Any) -> ShapedBatchNorm2d:
        """The shaped form of `bn`. It shares the Parameters and buffers of `bn`, so that an optimizer keeps working.

        Args:
            shaping: p_zero, gradient, at_eval, relu, inplace.

        Raises:
            TypeError: bn is not exactly an `nn.BatchNorm2d`. A subclass may compute something else. `nn.SyncBatchNorm` does:
                its statistics are those of all processes.
        """
        if type(bn) is not nn.BatchNorm2d:
            reason = (
                ", whose statistics are those of all processes"
                if isinstance(bn, nn.SyncBatchNorm)
                else ""
            )
            raise TypeError(f"bn: must be a torch.nn.BatchNorm2d, not {type(bn).__name__}{reason}")
        module = cls(
            bn.num_features, bn.eps, bn.momentum, affine=False, track_running_stats=False, **shaping
        )
        module.affine, module.track_running_stats = bn.affine, bn.track_running_stats
        module._parameters.update(bn._parameters)
        module._buffers.update(bn._buffers)
        return module.train(bn.training)

    def forward(
        self,
        input: Tensor,
        mask: BitMask | Tensor | None = None,
        rng_state: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Shape and normalize `input`.

        Args:
            mask: a `BitMask`, or a tensor of the input's shape and device, read as ``> 0``. It replaces the random mask.
            rng_state: int64 [seed, offset] on the input's device; determines the random mask.
            generator: draws the state; None is the default generator of the input's device.

        Raises:
            TypeError: the dtype cannot be shaped; mask or rng_state has a wrong type.
            ValueError: the input is not (N, C, H, W) with C = num_features; in training a channel has only one value, or eps is
                not positive; mask or rng_state has a wrong shape or device; rng_state or generator is given without a random
                mask; both are given.
            RuntimeError: `inplace` and the input is a leaf that requires a gradient.
        """
        if isinstance(input, fx.Proxy) or isinstance(mask, fx.Proxy):
            return fx_node(self, input, mask=mask, rng_state=rng_state, generator=generator)
        if not self.training and self.at_eval == "off":
            y = nn.BatchNorm2d.forward(self, input)
            return functional.relu(y, inplace=True) if self.relu else y
        if rng_state is not None or generator is not None:
            if self.p_zero is None or mask is not None:
                raise ValueError(
                    "rng_state and generator go with a random mask: set p_zero, and give no mask"
                )
            if rng_state is not None and generator is not None:
                raise ValueError("rng_state and generator: give one of them, not both")
        input = _checked_x(input)
        p_zero = self.p_zero if mask is None else None
        if not (self.training or self.at_eval == "on"):
            mask = p_zero = rng_state = None
        elif p_zero is not None:
            if rng_state is None:
                rng_state = new_rng_state(generator=generator, device=input.device)
            rng_state = checked_rng_state(rng_state, input.device)
        return self._shaped(input, p_zero or 0.0, mask, rng_state, self.relu, self.inplace)

    def _shaped(
        self,
        x: Tensor,
        p_zero: float,
        mask: BitMask | Tensor | None,
        rng_state: Tensor | None,
        relu: bool,
        inplace: bool,
    ) -> Tensor:
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"input has {x.shape[1]} channels, num_features is {self.num_features}: must be equal"
            )
        if inplace and x.is_leaf and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "inplace=True: input is a leaf that requires a gradient and must keep its values"
            )
        if self.gradient == "zero":
            x = x.detach()
        if x.numel() == 0:  # nothing to shape
            y = nn.BatchNorm2d.forward(self, x)
            return functional.relu(y) if relu else y

        memory_format = memory_format_name(x)
        if memory_format is None:
            x, memory_format, inplace = x.contiguous(), "contiguous", False
        bits = None if mask is None else _checked_mask(mask, x, memory_format)
        # The compiler decides itself where to write in place. Autograd does not let a function that returns more than one
        # tensor write to a view.
        inplace = inplace and not torch.compiler.is_compiling() and not x._is_view()

        # The choice of statistics follows nn.BatchNorm2d.forward.
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running_mean, running_var = self.running_mean, self.running_var
        batch_statistics = self.training or (running_mean is None and running_var is None)
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        if batch_statistics and x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}"
            )
        if batch_statistics and self.eps <= 0:  # a channel of zeros has variance 0
            raise ValueError(f"eps={self.eps}: must be positive in training")
        weight, bias = self.weight, self.bias
        if weight is not None and bias is None:  # the op needs both or neither
            bias = torch.zeros_like(weight)
        y, *_ = apply(
            _ShapedBatchNorm, x, rng_state, bits, p_zero, weight, bias, running_mean, running_var, batch_statistics,
            momentum, self.eps, relu, self.gradient == "clipped", inplace, memory_format,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, p_zero={self.p_zero}, gradient={self.gradient!r}, "
            f"at_eval={self.at_eval!r}, relu={self.relu}, inplace={self.inplace}"
        )
