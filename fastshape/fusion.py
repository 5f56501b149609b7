"""Shaped maps that wait for the BatchNorm after them, so that one op runs shaping, BatchNorm and ReLU.

A hook that shapes a layer's output returns an `Unshaped` tensor in its place. It has the shape, dtype, device and gradient of
the shaped map, and no values. What happens next depends on who reads it, as torch's ``__torch_function__`` tells:

- ``torch.nn.functional.batch_norm``, which every module of BatchNorm calls, runs the op and returns an `Unrectified` tensor,
  which waits for a ReLU in the same way;
- everything else gets the finished map: what `fastshape.shape` returns.

So nothing has to know the code of the model beforehand, and no code can tell the difference by its values. The shape and the
other properties of a map do not finish it. Code that bypasses ``__torch_function__``, as an extension in C++ or an
autograd.Function does, meets ``__torch_dispatch__`` below autograd, which finishes the map too; the gradient that comes back
from there passes the mask in `_Wait`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from . import reference
from .batch_norm import gradients
from .bitmask import BitMask
from .functional import _checked_mask, _masked, shape
from .layout import MEMORY_FORMATS, MemoryFormat, dense_strides, memory_format_name
from .modules import Gradient
from .unfinished import Unfinished, without_override

_CONVS = (
    nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Autograd nodes that save their input and not their output.
_KEEP_NO_OUTPUT = {
    "ConvolutionBackward0",
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
}


def _is_plain(module: nn.Module, *types: type) -> bool:
    """Whether `module` is of exactly one of these types and has the forward of that type."""
    return type(module) in types and "forward" not in vars(module)


def output_is_free(module: nn.Module, output: Tensor) -> bool:
    """Whether the only forward hook of `module` may overwrite its output: nothing else uses it or needs it for backward.

    True for convolutions and batch norms of torch, which save only their input. False for subclasses and with other hooks,
    because these may keep the output. False for a view, and if another autograd node made it, as in compiled code.
    """
    if (
        not _is_plain(module, *_CONVS, *_BATCH_NORMS)
        or len(module._forward_hooks) > 1
        or _has_any_global_hook()
        or output._is_view()
    ):
        return False
    node = output.grad_fn
    return not output.requires_grad if node is None else node.name() in _KEEP_NO_OUTPUT


class Reader(Protocol):
    """Learns what becomes of a layer's unfinished maps.

    Attributes:
        name: of the layer, for messages.
        rectified: whether a ReLU is expected to read the output of the BatchNorm.
    """

    name: str
    rectified: bool

    def taken(self) -> None:
        """A BatchNorm took the map."""

    def finished(self, by: str) -> None:
        """A function of this name read the map, which was finished for it."""


class Estimator:
    """The gradient through a shaped map. Autograd's graph keeps it, so it keeps no map, which would keep the graph.

    Attributes:
        bits, within_one: bits that the gradient passes, in `memory_format`; None without.
        bypassed: whether code that autograd does not see read the map, so that its gradient has not passed the mask.
    """

    def __init__(self, gradient: Gradient, p_zero: float | None, rng_state: Tensor | None):
        self.gradient, self.p_zero, self.rng_state = gradient, p_zero or 0.0, rng_state
        self.bits: Tensor | None = None
        self.within_one: Tensor | None = None
        self.bypassed = False
        self.memory_format: MemoryFormat = "contiguous"

    def through(self, grad: Tensor) -> Tensor:
        """The gradient of a layer's output for `grad`, that of the shaped map."""
        if self.rng_state is not None or self.bits is not None:
            grad = _masked(grad, self.rng_state, self.bits, self.p_zero, self.memory_format)
        if self.gradient == "clipped":
            grad = _masked(grad, None, self.within_one, 0.0, self.memory_format)
        return grad


class Shaping:
    """How one output is shaped, and what became of it.

    Attributes:
        x: the layer's output, without a graph; None once the map was read.
        version: of x; another one means that somebody wrote to it.
        inplace: whether x may be overwritten.
        finished: the shaped map, once anything but a BatchNorm read it.
        finished_version: of that map when it was finished.
        ones: the bits of the shaped map, once a BatchNorm took it.
    """

    def __init__(
        self,
        x: Tensor,
        layer: Reader,
        *,
        p_zero: float | None,
        mask: BitMask | None,
        rng_state: Tensor | None,
        gradient: Gradient,
        inplace: bool,
    ):
        self.x: Tensor | None = x.detach()
        self.version = version_of(x)
        self.layer, self.mask, self.inplace = layer, mask, inplace
        self.estimator = Estimator(gradient, p_zero, rng_state)
        self.finished: Tensor | None = None
        self.finished_version: int | None = None
        self.ones: Tensor | None = None

    @property
    def is_remembered(self) -> bool:
        """Whether a BatchNorm took the map, and nobody has written to it since."""
        unchanged = self.finished is None or version_of(self.finished) == self.finished_version
        return self.ones is not None and unchanged

    def take(self) -> Tensor:
        """x, dense. The estimator learns its memory format and the bits of the mask."""
        x = cast(Tensor, self.x)
        if version_of(x) != self.version:
            raise RuntimeError(
                f"method='replace': the output of {self.layer.name!r} was changed in place before its shaped map was read; "
                "use method='hooks'"
            )
        self.x = None
        if x.is_inference() and not torch.is_inference_mode_enabled():
            self.inplace = False
        name = memory_format_name(x)
        if name is None:
            x, self.inplace = x.contiguous(), False
        estimator = self.estimator
        estimator.memory_format = name or "contiguous"
        if self.mask is not None:
            estimator.bits = _checked_mask(self.mask, x, estimator.memory_format)
        return x


def version_of(t: Tensor) -> int | None:
    """Counts writes to t; a tensor of inference mode has no such number."""
    return None if t.is_inference() else t._version


def wait(x: Tensor, layer: Reader, **shaping) -> Tensor:
    """The shaped map of x, unfinished. x itself must not be used any more.

    Args:
        x: (N, C, H, W), a plain tensor.
        shaping: the arguments of `Shaping`.
    """
    state = Shaping(x, layer, **shaping)
    if torch.is_grad_enabled() and x.requires_grad and state.estimator.gradient != "zero":
        return _Wait.apply(x, state)
    return Unshaped(state, x)


def requires_grad(t: Tensor) -> bool:
    with without_override():  # the caller knows it to be unfinished
        return t.requires_grad


class Unshaped(Unfinished):
    """The output of a layer that awaits a BatchNorm."""

    _state: Shaping

    @staticmethod
    def __new__(cls, state: Shaping, x: Tensor):
        result = Unfinished.like(cls, x)
        result._state = state
        return result

    def done(self) -> Tensor | None:
        return self._state.finished

    def finish(self, reader: str) -> Tensor:
        state = self._state
        if requires_grad(self):
            state.estimator.bypassed |= not torch.is_grad_enabled()
            if state.ones is not None:
                _refuse_late(reader, f"the output of {state.layer.name!r}")
        if state.finished is None:
            with _uncounted():
                state.finished = self._shaped(reader) if state.ones is None else self._remembered()
            state.finished_version = version_of(state.finished)
        return state.finished

    def for_dispatch(self, reader: str) -> Tensor:
        self._state.estimator.bypassed = True
        return self.finish(reader).detach()

    def _shaped(self, reader: str) -> Tensor:
        state, estimator = self._state, self._state.estimator
        x = state.take()
        if estimator.gradient == "clipped" and requires_grad(self):
            estimator.within_one = BitMask.from_tensor(x.abs() <= 1).bits
        state.layer.finished(reader)
        x = _opened(self, x)
        with _graph(x.requires_grad, x.is_inference()):
            return shape(
                x,
                p_zero=None if estimator.rng_state is None else estimator.p_zero,
                mask=state.mask,
                rng_state=estimator.rng_state,
                gradient=estimator.gradient,
                inplace=state.inplace,
            )

    def _remembered(self) -> Tensor:
        """The map after a BatchNorm took it."""
        return _opened(self, self.ones().to(self.dtype), self._state.estimator)

    def ones(self) -> Tensor:
        """Where the map that a BatchNorm took is 1: bool, in its memory format."""
        flat = reference.unpack(cast(Tensor, self._state.ones), self.numel())
        return flat.as_strided(
            self.shape, dense_strides(self.shape, self._state.estimator.memory_format)
        )


class _Wait(torch.autograd.Function):
    """The node of an `Unshaped`. Its gradient is dL/da of the shaped map a, or already that of x."""

    @staticmethod
    def forward(ctx, x, state):
        ctx.estimator = state.estimator
        return Unshaped(state, x)

    @staticmethod
    def backward(ctx, grad):
        # M * M = M: a gradient that has passed the mask may pass it again.
        return ctx.estimator.through(grad) if ctx.estimator.bypassed else grad, None


class _Open(torch.autograd.Function):
    """Values for an unfinished tensor, with its gradient."""

    @staticmethod
    def forward(ctx, unfinished, values, estimator):
        ctx.estimator = estimator
        return values.value

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.estimator is None else ctx.estimator.through(grad), None, None


class _Box:
    """Carries a tensor past autograd, which takes no notice of it."""

    def __init__(self, value: Tensor):
        self.value = value


def _opened(unfinished: Unfinished, values: Tensor, estimator: Estimator | None = None) -> Tensor:
    if not requires_grad(unfinished):
        return values
    with _graph(True):
        return _Open.apply(unfinished, _Box(values), estimator)


@contextmanager
def _graph(needed: bool, inference: bool = False) -> Iterator[None]:
    """Where a graph is needed, builds it in every mode of the caller. Without `inference`, results can be trained on."""
    if inference:
        yield
        return
    with torch.inference_mode(False), torch.set_grad_enabled(needed or torch.is_grad_enabled()):
        yield


def _uncounted():
    """Keeps what is saved for backward from hooks, as those of a checkpoint, which would count it once and not again."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


# What asks autograd about a tensor that took part in a forward.
_LATE = ("grad", "backward", "register_hook", "retain_grad", "register_post_accumulate_grad_hook")


def _refuse_late(reader: str, what: str) -> None:
    if reader in _LATE and torch._C._current_graph_task_id() == -1:
        raise RuntimeError(
            f"method='replace': {what} has no gradient of its own after one op took it; use method='hooks', or call "
            f"{reader} before"
        )


# ---- BatchNorm ----


class Normalization:
    """A BatchNorm that took a shaped map.

    Attributes:
        source: the map.
        statistics, training: what the op returned, and whether they are of the batch.
        y: the output of the BatchNorm and, with `rectified`, of a ReLU; None once it was given away.
        parameters: weight and bias with their versions.
        snapshot: (2, C) of their values, which a later change must not reach; None where y needs no table.
        finished: the output of the BatchNorm, once anything but a ReLU read it.
        finished_version: of that output when it was finished.
        was_rectified: whether a ReLU read the output of the BatchNorm.
        node: that of the `Unrectified` in autograd's graph.
    """

    def __init__(self, source, weight, bias, training, rectified, y, statistics):
        self.source, self.weight, self.bias, self.training = source, weight, bias, training
        self.rectified, self.y, self.statistics = rectified, y, statistics
        self.parameters = [(t, version_of(t)) for t in (weight, bias) if t is not None]
        self.snapshot = None
        if rectified and weight is not None:
            with torch.no_grad():
                self.snapshot = torch.stack((weight, bias))
        self.finished: Tensor | None = None
        self.finished_version: int | None = None
        self.was_rectified = False
        self.node = None

    @property
    def parameters_changed(self) -> bool:
        return any(version_of(t) != version for t, version in self.parameters)

    def output(self, relu: bool) -> Tensor:
        """The output of the BatchNorm and, with `relu`, of a ReLU, without a graph."""
        if self.rectified == relu and self.y is not None:
            y, self.y = self.y, None
            return y
        weight, bias = (self.weight, self.bias) if self.snapshot is None else self.snapshot
        with torch.inference_mode(False), torch.no_grad():
            table = reference.normalized_values(
                self.statistics, weight, bias, self.source.dtype, relu
            )
            zero, one = (t.view(1, -1, 1, 1) for t in table)
            y = torch.where(self.source.ones(), one, zero)
            return y.contiguous(
                memory_format=MEMORY_FORMATS[self.source._state.estimator.memory_format]
            )

    def with_graph(self, relu: bool, result: Tensor) -> Tensor:
        """`result`, which is the output, in autograd's graph."""
        return _Normalize.apply(self.source, self.weight, self.bias, self, relu, _Box(result))


class _Normalize(torch.autograd.Function):
    """The gradient of BatchNorm (and ReLU), then that of shaping. Saves bits and numbers per channel."""

    @staticmethod
    def forward(ctx, source, weight, bias, norm, relu, result):
        state, estimator = norm.source._state, norm.source._state.estimator
        ctx.p_zero, ctx.memory_format = estimator.p_zero, estimator.memory_format
        ctx.training, ctx.relu = norm.training, relu
        ctx.set_materialize_grads(False)
        rng_state, bits = estimator.rng_state, estimator.bits
        if estimator.gradient == "clipped":  # within_one includes the mask
            rng_state, bits = None, estimator.within_one
        ctx.save_for_backward(state.ones, norm.statistics, rng_state, bits, weight, bias)
        return result.value

    @staticmethod
    def backward(ctx, grad):
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (*gradients(ctx, grad, needs_x, needs_weight, needs_bias), None, None, None)


class Unrectified(Unfinished):
    """The output of a BatchNorm that took a shaped map. It awaits a ReLU."""

    _norm: Normalization

    @staticmethod
    def __new__(cls, norm: Normalization):
        result = Unfinished.like(cls, norm.source)
        result._norm = norm
        return result

    def done(self) -> Tensor | None:
        return self._norm.finished

    def finish(self, reader: str) -> Tensor:
        norm = self._norm
        layer = norm.source._state.layer
        if norm.was_rectified and requires_grad(self):
            _refuse_late(reader, f"the output of the BatchNorm after {layer.name!r}")
        if norm.finished is None:
            if not norm.was_rectified:
                layer.rectified = False
            norm.finished = _opened(self, norm.output(relu=False))
            norm.finished_version = version_of(norm.finished)
        return norm.finished

    def rectify(self, inplace: bool) -> Tensor | None:
        """The output of a ReLU; None where it has to run."""
        norm = self._norm
        with without_override():
            if self.grad_fn is not norm.node:  # as after a checkpoint that ends here
                return None
        if norm.parameters_changed:
            return None
        if norm.finished is not None and (
            inplace or not norm.was_rectified or version_of(norm.finished) != norm.finished_version
        ):
            return None
        graph = torch.is_grad_enabled()
        if inplace and norm.node is not None and not graph:
            return None
        if norm.y is not None and norm.y.is_inference() and not torch.is_inference_mode_enabled():
            return None
        norm.source._state.layer.rectified = norm.was_rectified = True
        y = norm.output(relu=True)
        if norm.node is not None and graph:
            y = norm.with_graph(True, y)
        if inplace:
            norm.finished, norm.finished_version = y, version_of(y)
        return y


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor | None:
    """``torch.nn.functional.batch_norm`` of an `Unshaped`; None where it has to run on the finished map."""
    parameters = (running_mean, running_var, weight, bias)
    if type(input) is not Unshaped or any(isinstance(t, Unfinished) for t in parameters):
        return None
    state, estimator = input._state, input._state.estimator
    again = state.is_remembered  # as in a checkpoint, for another BatchNorm
    x = input.ones().to(input.dtype) if again else state.x
    if x is None or not _fits(x, *parameters, training, momentum, eps):
        return None
    if weight is not None and bias is None:  # the op needs both or neither
        bias = torch.zeros_like(weight)
    rectified = state.layer.rectified
    with torch.no_grad():
        if again:  # the mask is in x, and saved
            mask: tuple = (None, None, 0.0)
            clipped, inplace = False, True
        else:
            x = state.take()
            mask = (estimator.rng_state, estimator.bits, estimator.p_zero)
            clipped, inplace = estimator.gradient == "clipped", state.inplace
        arguments = (
            x, *mask, weight, bias, running_mean, running_var, training, momentum, eps, rectified, clipped,
        )  # fmt: skip
        if inplace:
            saved = torch.ops.fastshape.shaped_batch_norm_.default(*arguments)
            y = x
        else:
            y, *saved = torch.ops.fastshape.shaped_batch_norm.default(*arguments)
    state.ones, within_one, statistics = saved
    if clipped:
        estimator.within_one = within_one
    if not again:
        state.layer.taken()
    norm = Normalization(input, weight, bias, training, rectified, y, statistics)
    result = norm.with_graph(False, Unrectified(norm))
    with without_override():
        norm.node = result.grad_fn
    return result


def _fits(x, running_mean, running_var, weight, bias, training, momentum, eps) -> bool:
    """Whether the op computes this BatchNorm; torch's own runs, or refuses, what it does not."""
    channels = x.shape[1]
    parameters = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    return (
        x.numel() > 0
        and (not training or (x.numel() > channels and eps > 0))
        and (training or (running_mean is not None and running_var is not None))
        and (running_mean is None) == (running_var is None)
        and isinstance(momentum, float)
        and all(
            type(t) in (Tensor, nn.Parameter)
            and t.shape == (channels,)
            and t.is_contiguous()
            and t.device == x.device
            and t.dtype in (x.dtype, torch.float32)
            for t in parameters
        )
        and (weight is None or bias is None or weight.dtype == bias.dtype)
        and (running_mean is None or running_mean.dtype == running_var.dtype)
    )


def _relu(input, inplace: bool = False) -> Tensor | None:
    return input.rectify(inplace) if type(input) is Unrectified else None


def _relu_(input) -> Tensor | None:
    return _relu(input, inplace=True)


Unfinished.readers |= {
    functional.batch_norm: _batch_norm,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,  # that of torch.nn.functional, too
    Tensor.relu_: _relu_,
}
