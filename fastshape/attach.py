"""Attach shaping to a model without changing its code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from types import FrameType, MappingProxyType
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from .bitmask import BitMask
from .functional import GRADIENTS, shape
from .fusion import Unrectified, Unshaped, output_is_free, wait
from .layout import MemoryFormat, memory_format_name
from .masks import random_blocks
from .modules import AT_EVAL, AtEval, Gradient
from .rng import brief, checked_p_zero, checked_rng_state
from .rng import rng_state as new_rng_state
from .sites import Kind, Layer, choose_layers
from .tracing import CallCounts
from .unfinished import Unfinished

Mode = Literal["random", "target", "da", "binarize", "product"]
RecordMode = Literal["eval", "train"]
Method = Literal["hooks", "replace", "auto"]
Layers = Layer | Iterable[Layer] | Mapping[Layer, float]
PZero = float | Sequence[float] | Mapping[Layer, float]

MODES = tuple(mode for mode in get_args(Mode) if mode != "da")
SYNONYMS = {"da": "target"}  # the word of the experiments, for domain adaptation
RECORD_MODES = get_args(RecordMode)
METHODS = get_args(Method)

# From the offset of one random mask of a stream to that of the next, in Philox calls of 8 elements.
_STRIDE = 1 << 36
NOT_BINARY = "the shaped map is not binary"
_KEPT = 64  # masks of one layer in one forward that `Attachment.masks` shows

_eval_frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
_COUNTING = threading.Lock()  # of what several threads count


class _Stop(BaseException):
    """Ends a target pass after its last recording. A BaseException, because a model may catch every Exception."""


# ---- one layer ----

_NO_TORCHSCRIPT = (
    "torch.jit cannot keep an attachment: use torch.export, or call fastshape.detach(model) first"
)


class _Layer:
    """The forward hook of one chosen module, and what it learns about the readers of the module's output.

    Attributes:
        attachment: None in a copied part of the model, which is not shaped.
        rectified: whether a ReLU read the output of the BatchNorm when anything last did.
        fired, fused: how often the output was shaped, and how often a BatchNorm's op did it.
        last_was_fused: None before the first.
        reason: why hooks served the layer when it was last not fused.
    """

    attachment: Attachment | None

    def __init__(self, attachment: Attachment, name: str):
        self.attachment, self.name = attachment, name
        self.rectified = True
        self.fired = self.fused = 0
        self.last_was_fused: bool | None = None
        self.reason: str | None = None

    @property
    def __name__(self) -> str:
        # torch.jit.script asks each hook for its name before it compiles anything. Others ask with a default.
        raise AttributeError(_NO_TORCHSCRIPT)

    def __getstate__(self) -> dict:
        # A copy of the whole model has a copy of the attachment, which takes the layer. A copied part has none.
        return vars(self) | {"attachment": None}

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        # Compiled code called the hook if there is a callback. The call stands here because this frame alone is not compiled.
        callback = _eval_frame_callback()
        return self.run(module, args, output, callback is not None and callback is not False)

    def run(self, module: nn.Module, args: tuple, output: Tensor, compiled: bool) -> Tensor | None:
        if self.attachment is None:
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layers: {self.name!r} returns a {type(output).__name__}; only a module that returns one tensor can be shaped"
            )
        if torch.jit.is_tracing():
            raise RuntimeError(_NO_TORCHSCRIPT)
        attachment = self.attachment
        attachment._require_no_other_recorder()
        if attachment._check_finite:
            _require_finite(self.name, output)
        if attachment._recorder is not None:
            attachment._record_output(self.name, output)
            return None
        return attachment._shape_output(self, output, module, args, compiled)

    def obstacle(self, x: Tensor, module: nn.Module, args: tuple, compiled: bool) -> str | None:
        """Why a BatchNorm cannot take the shaped map of x, if so."""
        if cast(Attachment, self.attachment)._never_binary:
            return NOT_BINARY
        if compiled or torch.compiler.is_compiling():
            return "compiled code runs it"
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms it"
        if module._backward_hooks or module._backward_pre_hooks:
            return "it has backward hooks"
        if type(x) is not Tensor:
            return f"its output is a {type(x).__name__}"
        if x.dim() != 4:
            return f"its output has {x.dim()} dimensions, not 4"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation goes on"
        if x._is_view() or any(isinstance(t, Tensor) and _share_memory(t, x) for t in args):
            return "its output is a part of another tensor, which may change"
        return None

    # What `fusion` tells.

    def taken(self) -> None:
        if _is_backward():
            return
        self.last_was_fused, self.reason = True, None
        with _COUNTING:
            self.fused += 1

    def finished(self, by: str) -> None:
        if not _is_backward():
            self.served(f"{by} reads its output before a BatchNorm does")

    def served(self, reason: str) -> None:
        self.last_was_fused, self.reason = False, reason


def _require_finite(name: str, x: Tensor) -> None:
    """Raise a FloatingPointError where a value of `x` is a NaN or infinite. Waits for the device."""
    if not x.numel():
        return
    x = x.detach()
    # one pass that writes nothing: the least and the greatest value are NaN where any value is
    if not torch.stack(x.aminmax()).isfinite().all():
        count = int((~x.isfinite()).sum())
        raise FloatingPointError(
            f"layer {name!r}: {count} of {x.numel()} values of its output are not finite"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.layout == b.layout == torch.strided
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    )


def _is_backward() -> bool:
    """Whether backward runs, which computes checkpointed parts again."""
    return torch._C._current_graph_task_id() != -1


@functools.cache
def _keep_out_of_graphs() -> None:
    """Make torch.compile run the hooks in Python.

    The hooks count calls. A graph that captured a counter would have to be compiled again at every call. This runs once, at
    the first attach and not at import, because it imports the compiler, which takes seconds.

    It also makes the compiler check hooks before it reuses code. By default code that was compiled for a block without
    hooks serves an equal block with a hook, which then never fires. Code compiled before is discarded for the same reason.
    """
    for owner, name in ((_Layer, "run"), (Attachment, "_begin"), (Attachment, "_end")):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
    for name in ("read", "__torch_dispatch__"):
        function = torch.compiler.disable(vars(Unfinished)[name].__func__)
        setattr(Unfinished, name, classmethod(function))
    # Their own code alone is not compiled. That costs nothing at each call, and what they call is disabled above.
    torch.compiler.disable(_Layer.__call__, recursive=False)
    for function in (
        vars(Unfinished)["__torch_function__"].__func__,
        Unshaped.done,
        Unrectified.done,
    ):
        torch.compiler.disable(function, recursive=False)
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.nontraceable_tensor_subclasses |= {Unshaped, Unrectified}
    torch._dynamo.reset()


# ---- the attachment ----


class _Drawn(NamedTuple):
    """A random mask. `first` is the place of its first sample, with blocks; for elements, `state` includes it."""

    state: Tensor
    shape: torch.Size
    p_zero: float
    memory_format: MemoryFormat
    unit: str | int
    first: int

    def mask(self) -> BitMask:
        if self.unit == "element":
            return BitMask.random(
                self.shape, self.p_zero, rng_state=self.state, memory_format=self.memory_format
            )
        side = None if self.unit == "channel" else cast(int, self.unit)
        return random_blocks(
            self.shape, self.p_zero, side, rng_state=self.state, first_sample=self.first
        )


class _Forward(threading.local):
    """The current forward of the model in one thread: its number, and how often each chosen module was called in it."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.records = 0  # how many records had begun before
        self.start()

    def start(self) -> None:
        self.number = next(_forwards)
        self.calls = dict.fromkeys(self.names, 0)


_forwards = itertools.count()


def _setting(name: str, doc: str) -> property:
    """An argument of `attach` that may be set later. It is checked as there."""

    def get(self):
        return getattr(self, f"_{name}")

    def set_(self, value):
        setattr(self, f"_{name}", self._checked({name: value})[name])

    return property(get, set_, doc=doc)


def _fixed(name: str, doc: str) -> property:
    return property(lambda self: getattr(self, f"_{name}"), doc=doc)


class Attachment:
    """The shaping that `attach` puts on a model. As a context manager, it removes itself at the end.

    The arguments of `attach` that may be set between two forwards are checked as there, and obeyed from the next forward on:
    p_zero, unit, binarize, gradient, at_eval, record_mode, to_mask, once, check_finite, generator. So are `stream` and
    `first_sample`. Everything else is fixed.

    Example:
        >>> with fastshape.attach(model, [1], p_zero=0.5) as shaping:
        ...     shaping.p_zero = 0.7
        ...     output = model(images)
        >>> shaping.fired
        {'conv1': 1}
    """

    _p_zero: dict[str, float]
    _binarize: bool
    _gradient: Gradient
    _at_eval: AtEval
    _record_mode: RecordMode
    _to_mask: Callable[[Tensor], BitMask | Tensor] | None
    _once: bool
    _check_finite: bool
    _generator: torch.Generator | None
    _unit: str | int

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        mode: str,
        method: str,
        settings: dict,
        after: Kind,
        seed: int | None,
    ):
        self._model, self._names, self._mode, self._method = model, names, mode, method
        self._after, self._seed = after, seed
        for name, value in self._checked(settings).items():
            setattr(self, f"_{name}", value)
        self._stream = None if self._seed is None else new_rng_state(self._seed)
        self._first_sample = 0
        self._layers = {name: _Layer(self, name) for name in names}
        self._recorder: int | None = None  # the thread whose record goes on
        self._last_recorder: int | None = None  # the thread of the last one
        self._records = 0  # how many began
        self._recorded: dict[str, list[BitMask | Tensor]] = {}
        # Autograd's node count at the last record and forward. Nodes with higher numbers belong to later forwards.
        self._recorded_at = self._began_at = 0
        self._used_by: int | None = None  # the forward that used the record
        self._call_counts = CallCounts(names)
        self._stop_after: int | None = None
        self._forward = _Forward(names)
        self._assigned: dict[str, list[BitMask | Tensor]] = {}
        self._drawn: dict[str, list[_Drawn]] = {}  # in the last forward that drew
        self._drawn_by: int | None = None  # its number
        self._told = False  # whether the user knows what the first forward showed
        _keep_out_of_graphs()
        modules = dict(model.named_modules())
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]
        for name, layer in self._layers.items():
            self._handles.append(modules[name].register_forward_hook(layer))

    # ---- settings ----

    p_zero = property(
        lambda self: MappingProxyType(self._p_zero),
        lambda self, value: setattr(self, "_p_zero", self._checked({"p_zero": value})["p_zero"]),
        doc="Probability of a zero by layer; set to one number, one per layer, or a dictionary by layer.",
    )
    binarize = _setting("binarize", "Whether the output is binarized before it meets the mask.")
    gradient = _setting("gradient", "The gradient through the binarization.")
    at_eval = _setting("at_eval", "What happens in evaluation mode.")
    record_mode = _setting("record_mode", "How `record` runs the model.")
    to_mask = _setting("to_mask", "Turns a recorded map into its mask.")
    once = _setting("once", "Whether a record serves one forward alone.")
    check_finite = _setting("check_finite", "Whether an output that is not finite raises.")
    generator = _setting("generator", "Draws the random masks.")
    unit = _setting("unit", "What one draw of a random mask decides.")

    @property
    def first_sample(self) -> int:
        """Number of this process's first sample in a batch that several processes share; 0 at first.

        Set it before each forward. If the generators or streams of the processes are in the same state, their random masks
        are then the parts of the mask that one process would draw for the whole batch.
        """
        return self._first_sample

    @first_sample.setter
    def first_sample(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"first_sample={value!r}: must be an int of at least 0")
        self._first_sample = value

    @property
    def stream(self) -> Tensor | None:
        """The state of the random masks to come: int64 [seed, offset]; None without the argument `seed`.

        It is a copy. Save it, and set it in a resumed run to draw the masks that would have followed.
        """
        return None if self._stream is None else self._stream.clone()

    @stream.setter
    def stream(self, value: Tensor) -> None:
        if self._stream is None:
            raise ValueError("stream: this attachment draws from a generator; attach it with seed=")
        self._stream = checked_rng_state(value, value.device).clone()

    model = _fixed("model", "The attached model.")
    names = _fixed("names", "Names of the shaped modules.")
    mode = _fixed("mode", "The argument of `attach`.")
    method = _fixed("method", "The argument of `attach`.")
    after = _fixed("after", "The argument of `attach`.")

    def __setattr__(self, name: str, value) -> None:
        known = getattr(type(self), name, None)
        if name.startswith("_") or (isinstance(known, property) and known.fset):
            return super().__setattr__(name, value)
        if name in ("mode", "method", "after", "model", "names"):
            raise AttributeError(
                f"{name} is fixed: remove() this attachment, and attach again with the other {name}"
            )
        if hasattr(type(self), name):
            raise AttributeError(f"{name} is read-only: it tells what the attachment did")
        settable = [n for n, p in vars(type(self)).items() if isinstance(p, property) and p.fset]
        close = difflib.get_close_matches(name, settable, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(settable)}"
        raise AttributeError(f"an attachment has no setting {name!r}{hint}")

    def _checked(self, changes: dict) -> dict:
        """The values of settings, if they are allowed and fit the others."""
        result = {name: _CHECKS[name](self, value) for name, value in changes.items()}
        binarize, at_eval = (
            result[name] if name in result else getattr(self, f"_{name}")
            for name in ("binarize", "at_eval")
        )
        if at_eval == "binarize" and (not binarize or self._mode == "product"):
            what = "mode='product'" if self._mode == "product" else "binarize=False"
            raise ValueError(
                f"at_eval='binarize' and {what}: evaluation would show the network binary maps, which training never does; "
                "allowed are off and on"
            )
        return result

    # ---- what it did ----

    @property
    def fired(self) -> dict[str, int]:
        """How often shaping was applied, by name."""
        return {name: layer.fired for name, layer in self._layers.items()}

    @property
    def fused(self) -> dict[str, int]:
        """How often one op ran shaping and BatchNorm together, by name."""
        return {name: layer.fused for name, layer in self._layers.items()}

    @property
    def method_of(self) -> dict[str, str]:
        """What shaped each layer last, by name: ``"replace"`` (one op with the BatchNorm) or ``"hooks"``.

        Before the first forward it is what will be tried.
        """
        first = "hooks" if self._method == "hooks" or self._never_binary else "replace"
        words = {None: first, True: "replace", False: "hooks"}
        return {name: words[layer.last_was_fused] for name, layer in self._layers.items()}

    @property
    def reasons(self) -> dict[str, str]:
        """Why hooks shaped a layer last although ``method="replace"`` was asked for, by name."""
        if self._method == "hooks":
            return {}
        if self._never_binary:
            return dict.fromkeys(self._names, NOT_BINARY)
        return {n: layer.reason for n, layer in self._layers.items() if layer.reason is not None}

    @property
    def _never_binary(self) -> bool:
        return self._mode == "product" or not self._binarize

    @property
    def masks(self) -> Masks:
        """The masks by layer, which can be read, assigned and deleted; see `Masks`."""
        return Masks(self)

    def density(self) -> dict[str, float]:
        """The share of ones in the last mask of each layer that has been shaped, by name. Waits for the device.

        It is 1.0 for a layer without a mask. For mode ``"product"`` it is the share of positive values in the map.
        """
        result = {}
        for name, layer in self._layers.items():
            masks = self.masks.get(name)
            last = masks[-1] if isinstance(masks, list) else masks
            if isinstance(last, Tensor):  # of the raw product, or one that broadcasts
                last = BitMask.from_tensor(last)
            if layer.fired and (last is not None or self._mode == "binarize"):
                result[name] = 1.0 if last is None else last.density()
        return result

    # ---- public ----

    def record(self, *inputs, **kwargs) -> None:
        """Run the target pass and keep its maps for all forwards until the next `record`.

        The pass builds no graph, also in inference mode, and shapes nothing. With ``record_mode="eval"`` the whole model runs
        in evaluation mode, so that the BatchNorm statistics stay, and the pass ends after the last call of a chosen layer,
        where the code of the model shows which that is; else at the end. With ``"train"`` the whole network runs in training
        mode, and the statistics move. Afterwards each module has its old training flag again.

        Args:
            inputs, kwargs: the arguments of the model: a batch of N target images.

        Raises:
            RuntimeError: the mode records nothing, the attachment was removed, the pass did not reach a layer, or another
                thread records. A forward in another thread during a record raises it too.
        """
        if self._mode not in ("target", "product"):
            raise RuntimeError(f"mode={self._mode!r} records nothing; only target and product do")
        if not self._handles:
            raise RuntimeError("this attachment was removed from its model")
        with self._recording(), torch.inference_mode(False), torch.no_grad(), self._record_flags():
            self._stop_after = None
            if self._record_mode == "eval":
                self._stop_after = self._call_counts.of(self._model, inputs, kwargs)
            self._recorded = {name: [] for name in self._names}
            self._recorded_at = torch._C._autograd._get_sequence_nr()
            self._used_by = None
            try:
                self._model(*inputs, **kwargs)
            except _Stop:
                pass
            except BaseException:
                self._recorded = {}
                raise
        missing = [name for name in self._names if not self._recorded[name]]
        if missing:
            self._recorded = {}
            raise RuntimeError(
                f"the target pass did not reach {', '.join(missing)}: nothing was recorded there"
            )

    def remove(self) -> None:
        """Remove the shaping, so that the model is as before. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __copy__(self) -> Attachment:
        raise TypeError("an attachment belongs to its model: copy the model, with copy.deepcopy")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_forward"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for layer in self._layers.values():
            layer.attachment = self
        self._forward, self._recorder = _Forward(self._names), None
        self._recorded_at = self._began_at = 0  # another process has its own node count
        self._used_by = None
        _keep_out_of_graphs()

    def __repr__(self) -> str:
        state = "" if self._handles else ", removed"
        return f"Attachment(mode={self._mode!r}, layers={list(self._names)}{state})"

    # ---- called by the hooks ----

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._require_no_other_recorder()
        self._forward.records = self._records
        if not _is_backward():
            self._start_forward()

    def _start_forward(self) -> None:
        self._forward.start()
        if self._recorder is None:
            self._began_at = torch._C._autograd._get_sequence_nr()

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        # torch.jit.script reads the code here before it comes to the layers, which refuse it by name.
        self._end_forward()

    def _end_forward(self) -> None:
        if self._forward.records != self._records and self._last_recorder != threading.get_ident():
            raise RuntimeError(
                "attachment.record ran in another thread during this forward, and changed the modes of its modules: a record "
                "must wait for the forwards of other threads"
            )
        if self._told or self._recorder is not None or not self._is_on():
            return
        self._told = True
        never = [name for name, calls in self._forward.calls.items() if not calls]
        if never:
            warnings.warn(
                f"this forward never ran {', '.join(never)}: nothing is shaped there", stacklevel=4
            )
        if self._method == "replace" and not self._never_binary and self.reasons:
            listing = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            warnings.warn(f"method='replace': hooks serve {listing}", stacklevel=4)

    def _is_on(self) -> bool:
        """Whether a chosen layer would be shaped."""
        if self._at_eval != "off":
            return True
        return any(self._model.get_submodule(name).training for name in self._names)

    def _require_no_other_recorder(self) -> None:
        if self._recorder is not None and self._recorder != threading.get_ident():
            raise RuntimeError(
                "attachment.record runs in another thread, which changes the modes of all modules: a forward or a second "
                "record must wait for it"
            )

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        with _COUNTING:
            self._require_no_other_recorder()
            self._recorder = self._last_recorder = threading.get_ident()
            self._records += 1
        try:
            yield
        finally:
            self._recorder = None

    @contextlib.contextmanager
    def _record_flags(self) -> Iterator[None]:
        flags = [(module, module.training) for module in self._model.modules()]
        if self._record_mode == "eval":
            self._model.eval()
        elif not self._model.training:
            self._model.train()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training

    def _record_output(self, name: str, output: Tensor) -> None:
        # Copy at once, as bits or whole: a later module may overwrite `output` in place.
        output = output.detach()
        recorded: BitMask | Tensor
        if self._mode == "product":
            recorded = output.clone()
        elif self._to_mask is None:
            recorded = BitMask.from_tensor(output)
        else:
            recorded = _as_mask(self._to_mask(output), f"to_mask: for {name!r}")
            if recorded.shape != output.shape:
                raise ValueError(
                    f"to_mask: for {name!r} it returned shape {tuple(recorded.shape)} for a map of shape "
                    f"{tuple(output.shape)}: must be equal"
                )
        self._recorded[name].append(recorded)
        if sum(map(len, self._recorded.values())) == self._stop_after:
            raise _Stop

    def _shape_output(
        self, layer: _Layer, x: Tensor, module: nn.Module, args: tuple, compiled: bool
    ) -> Tensor | None:
        if not module.training and self._at_eval == "off":
            return None
        if isinstance(x, Unfinished):
            x = x.finish("another attachment")
        # Backward runs checkpointed modules again. This call must then repeat what forward did.
        again = _is_backward()
        call = 0 if again else self._next_call(layer.name, compiled)
        p_zero: float | None = None
        mask: BitMask | Tensor | None = None
        state: Tensor | None = None
        binarize = self._binarize
        if self._mode == "binarize" and layer.name not in self._assigned:
            binarize = True
        elif not (module.training or self._at_eval == "on"):
            binarize = True
        elif layer.name in self._assigned and self._mode != "product":
            mask = self._assigned_for(layer.name, x, call)
        elif self._mode == "random":
            drawn = self._draw(layer.name, x, again)
            if drawn.unit == "element":
                p_zero, state = drawn.p_zero, drawn.state
            else:
                mask = drawn.mask()
        else:
            mask = self._recorded_for(layer.name, x, call, again)
        if not again:
            self._forward.calls[layer.name] += 1
            with _COUNTING:
                layer.fired += 1
        if isinstance(mask, Tensor):  # the raw product
            layer.served(NOT_BINARY)
            return (x.detach() if self._gradient == "zero" else x) * mask
        inplace = output_is_free(module, x)
        if self._method != "hooks":
            obstacle = layer.obstacle(x, module, args, compiled)
            if obstacle is None:
                return wait(
                    x,
                    layer,
                    p_zero=p_zero,
                    mask=mask,
                    rng_state=state,
                    gradient=self._gradient,
                    inplace=inplace,
                )
            layer.served(obstacle)
        return shape(
            x,
            p_zero=p_zero,
            mask=mask,
            rng_state=state,
            binarize=binarize,
            gradient=self._gradient,
            inplace=inplace,
        )

    def _next_call(self, name: str, compiled: bool) -> int:
        """The number of this call of a layer in the current forward, from 0."""
        call = self._forward.calls[name]
        # A direct call of model.forward, or of a part of the model, runs no hook of the model. The next one starts where the
        # layer has been called as often as the record says.
        calls = len(self._recorded.get(name, ())) or 1
        if call >= calls and not compiled and not _is_called(self._model):
            self._start_forward()
            return 0
        return call

    # ---- masks ----

    def _draw(self, name: str, x: Tensor, again: bool) -> _Drawn:
        own = self._stream is not None or self._generator is not None
        if again and own:  # a checkpoint restores torch's generators alone
            drawn = self._drawn.get(name, [])
            if len(drawn) != 1 or torch._C._current_autograd_node()._sequence_nr() < self._began_at:
                raise RuntimeError(
                    f"{name!r} is checkpointed, and its random mask cannot be repeated: with seed= or generator=, call "
                    "backward before the next forward, call a checkpointed layer once in a forward, and give a checkpoint "
                    "around the whole model use_reentrant=False"
                )
            return drawn[0]
        if self._stream is None:
            state = new_rng_state(generator=self._generator, device=x.device)
        else:
            with _COUNTING:
                if self._stream.device != x.device:
                    self._stream = self._stream.to(x.device)
                state = self._stream.clone()
                self._stream[1].add_(_STRIDE)
        if self._first_sample and self._unit == "element":
            _skip_samples(state, self._first_sample, name, x)
        memory_format = memory_format_name(x) or "contiguous"
        result = _Drawn(
            state, x.shape, self._p_zero[name], memory_format, self._unit, self._first_sample
        )
        if not again:
            if self._drawn_by != self._forward.number:
                self._drawn, self._drawn_by = {}, self._forward.number
            drawn = self._drawn.setdefault(name, [])
            drawn.append(result)
            del drawn[:-_KEPT]
        return result

    def _assigned_for(self, name: str, x: Tensor, call: int) -> BitMask:
        masks = self._assigned[name]
        mask = masks[call % len(masks)]
        if isinstance(mask, BitMask):
            return cast(BitMask, _first_of(mask, x, f"{name!r}: the assigned mask"))
        try:
            return BitMask.from_bool(mask.expand(x.shape))
        except RuntimeError:
            raise ValueError(
                f"{name!r}: the assigned mask has shape {tuple(mask.shape)}, which does not broadcast to the map's "
                f"{tuple(x.shape)}"
            ) from None

    def _recorded_for(self, name: str, x: Tensor, call: int, again: bool) -> BitMask | Tensor:
        maps = self._recorded.get(name)
        if not maps:
            raise RuntimeError(
                f"mode={self._mode!r}: nothing is recorded for {name!r}; call attachment.record(target_batch) before the "
                "source batch, or assign attachment.masks"
            )
        if again:
            if torch._C._current_autograd_node()._sequence_nr() < self._recorded_at:
                raise RuntimeError(
                    f"{name!r} is checkpointed, and a later record replaced the maps that backward needs: call backward "
                    "before the next record, and do not nest checkpoints with use_reentrant=True"
                )
            if len(maps) > 1:
                raise RuntimeError(
                    f"{name!r} is checkpointed and was called {len(maps)} times in the target pass: mode={self._mode!r} "
                    "allows one call, because backward does not say which call it repeats"
                )
        elif self._once and self._used_by not in (None, self._forward.number):
            raise RuntimeError(
                f"once=True: the maps of {name!r} served a forward before; call attachment.record(target_batch) first"
            )
        if call >= len(maps):
            raise RuntimeError(
                f"{name!r} was called {call + 1} times in one forward but {len(maps)} times in the target pass; call the "
                "whole model, whose call starts a forward"
            )
        if not again:
            self._used_by = self._forward.number
        return _first_of(maps[call], x, f"{name!r}: the recorded map")


def _first_of(mask: BitMask | Tensor, x: Tensor, what: str) -> BitMask | Tensor:
    """The masks of as many samples as x has."""
    if mask.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"{what} has shape {tuple(mask.shape)}, the source map {tuple(x.shape)}; only the batch size may differ"
        )
    if len(x) > mask.shape[0]:
        raise ValueError(
            f"{what} has {mask.shape[0]} samples, and a source batch of {len(x)} needs as many"
        )
    return mask.first(len(x)) if isinstance(mask, BitMask) else mask[: len(x)]


def _as_mask(value, what: str) -> BitMask:
    if isinstance(value, BitMask):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return BitMask.from_bool(value)
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{what} a mask must be a BitMask or a bool tensor, not {kind}")


def _is_called(model: nn.Module) -> bool:
    """Whether a call of `model` is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


_CALL = nn.Module._call_impl.__code__


def _skip_samples(state: Tensor, samples: int, name: str, x: Tensor) -> None:
    """Advance `state` in place past the elements of the `samples` samples that come before x in the batch."""
    elements = x.shape[1:].numel()
    if samples * elements % 8:  # one offset serves 8 elements
        raise ValueError(
            f"first_sample={samples}: {name!r} has {elements} elements per sample; the product of both must be a "
            "multiple of 8"
        )
    state[1].add_(samples * elements // 8)  # needs no copy from the host, and wraps at 2**64


class Masks(MutableMapping):
    """The masks of an attachment, by layer: its name, or its number or another name that `attach` takes.

    A mask is a `BitMask`; where a layer is called several times in a forward, it is a list with one for each call.

    - Reading gives the assigned mask; else, with mode ``"target"``, the recorded one (``"product"``: the recorded map, a
      tensor); else, with ``"random"``, the one that the last forward drew.
    - Assigning takes a `BitMask`, a bool tensor that broadcasts to the layer's output, or a list of them. It stays, and comes
      before what is recorded and drawn, until it is replaced or deleted.
    - Deleting removes an assigned mask.

    Example:
        >>> shaping = fastshape.attach(model, [1], mode="target")
        >>> shaping.record(images)
        >>> shaping.masks[1].shape
        torch.Size([2, 64, 32, 32])
        >>> shaping.masks["conv1"] = ~shaping.masks[1]
    """

    def __init__(self, attachment: Attachment):
        self._attachment = attachment

    def _name(self, layer) -> str:
        attachment = self._attachment
        (name,) = choose_layers(attachment._model, [layer], after=attachment._after)
        if name not in attachment._names:
            raise KeyError(f"{name!r} is not shaped; shaped are {', '.join(attachment._names)}")
        return name

    def __getitem__(self, layer) -> BitMask | Tensor | list:
        name, attachment = self._name(layer), self._attachment
        if name in attachment._assigned:
            masks = attachment._assigned[name]
        elif attachment._recorded.get(name):
            masks = attachment._recorded[name]
        elif name in attachment._drawn:
            masks = [drawn.mask() for drawn in attachment._drawn[name]]
        else:
            raise KeyError(f"{name!r} has no mask yet")
        return masks[0] if len(masks) == 1 else list(masks)

    def __setitem__(self, layer, mask: BitMask | Tensor | Sequence[BitMask | Tensor]) -> None:
        name = self._name(layer)
        if self._attachment._mode == "product":
            raise ValueError("masks: mode 'product' multiplies by recorded maps alone")
        masks = list(mask) if isinstance(mask, (list, tuple)) else [cast("BitMask | Tensor", mask)]
        for each in masks or (None,):
            if not isinstance(each, BitMask):
                _as_mask(each, f"masks[{name!r}]:")
        self._attachment._assigned[name] = masks

    def __delitem__(self, layer) -> None:
        del self._attachment._assigned[self._name(layer)]

    def __iter__(self) -> Iterator[str]:
        attachment = self._attachment
        sources = (attachment._assigned, attachment._recorded, attachment._drawn)
        return (name for name in attachment._names if any(name in source for source in sources))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Masks({list(self)})"


# ---- checks of settings ----


def _one_of(argument: str, allowed: Sequence[str]) -> Callable:
    def check(attachment: Attachment, value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{argument}={value!r}: allowed are {', '.join(allowed)}")
        return value

    return check


def _flag(argument: str) -> Callable:
    def check(attachment: Attachment, value: bool) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{argument}={value!r}: must be True or False")
        return value

    return check


def _checked_gradient(attachment: Attachment, value: str) -> str:
    _one_of("gradient", GRADIENTS)(attachment, value)
    if attachment._mode == "product" and value == "clipped":
        raise ValueError(
            "gradient='clipped': mode 'product' allows straight_through (which is exact there) and zero"
        )
    return value


def _checked_generator(attachment: Attachment, value):
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator: must be a torch.Generator or None, not {type(value).__name__}")
    if value is not None and attachment._seed is not None:
        raise ValueError("seed and generator: give one of them, not both")
    if value is not None and attachment._mode != "random":
        raise ValueError(f"generator: only mode 'random' draws masks, not {attachment._mode!r}")
    return value


def _checked_to_mask(attachment: Attachment, value):
    if value is not None and not callable(value):
        raise TypeError(f"to_mask={value!r}: must be a function of a recorded map, or None")
    if value is not None and attachment._mode != "target":
        raise ValueError(
            f"to_mask: only mode 'target' makes masks of maps, not {attachment._mode!r}"
        )
    return value


def _checked_unit(attachment: Attachment, value: str | int) -> str | int:
    is_side = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_side and value not in ("element", "channel"):
        raise ValueError(
            f"unit={brief(value)}: allowed are element, channel, and the side of blocks, an int of at least 1"
        )
    if value != "element" and attachment._mode != "random":
        raise ValueError(
            f"unit={value!r}: only mode 'random' draws masks, not {attachment._mode!r}"
        )
    return value


def _checked_p_zeros(attachment: Attachment, p_zero: PZero | None) -> dict[str, float]:
    """The probabilities by name."""
    mode, names = attachment._mode, attachment._names
    if mode != "random":
        if p_zero is not None:
            raise ValueError(f"p_zero={p_zero!r}: only mode 'random' draws masks, not {mode!r}")
        return {}
    if p_zero is None:
        raise ValueError("p_zero: mode 'random' needs a probability in [0, 1)")
    if isinstance(p_zero, Mapping):
        values: dict[str, float] = {}
        for layer, value in p_zero.items():
            for name in choose_layers(attachment._model, [layer], after=attachment._after):
                if name in values or name not in names:
                    problem = "is named twice" if name in values else "is not shaped"
                    raise ValueError(f"p_zero: {name!r} {problem} (by {layer!r})")
                values[name] = checked_p_zero(value)
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"p_zero: no value for {', '.join(missing)}; give one per layer")
        return {name: values[name] for name in names}
    if getattr(p_zero, "ndim", None) == 0:  # of numpy or torch
        p_zero = cast(float, p_zero.item())  # type: ignore[union-attr]
    if isinstance(p_zero, Real) or not isinstance(p_zero, Iterable):
        numbers = [cast(float, p_zero)] * len(names)
    else:
        numbers = list(p_zero)
    if len(numbers) != len(names):
        raise ValueError(
            f"p_zero: {len(numbers)} values for {len(names)} layers; give one value, or one per layer"
        )
    return {name: checked_p_zero(value) for name, value in zip(names, numbers, strict=True)}


_CHECKS: dict[str, Callable] = {
    "p_zero": _checked_p_zeros,
    "binarize": _flag("binarize"),
    "gradient": _checked_gradient,
    "at_eval": _one_of("at_eval", AT_EVAL),
    "record_mode": _one_of("record_mode", RECORD_MODES),
    "to_mask": _checked_to_mask,
    "once": _flag("once"),
    "check_finite": _flag("check_finite"),
    "generator": _checked_generator,
    "unit": _checked_unit,
}


# ---- attach ----


def attach(
    model: nn.Module,
    layers: Layers,
    *,
    mode: Mode = "random",
    p_zero: PZero | None = None,
    unit: Literal["element", "channel"] | int = "element",
    after: Kind = "conv",
    every: int = 1,
    binarize: bool = True,
    gradient: Gradient = "straight_through",
    at_eval: AtEval = "off",
    record_mode: RecordMode = "eval",
    method: Method = "hooks",
    check_finite: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    to_mask: Callable[[Tensor], BitMask | Tensor] | None = None,
    once: bool = False,
    stack: bool = False,
) -> Attachment:
    """Shape the output of chosen layers of `model`. The code of the model, its modules and its tensors stay unchanged.

    The default gradient is straight-through. The published code, ``(a > 0).float()``, had none: that is ``gradient="zero"``,
    with which nothing before the layer learns.

    Args:
        model: any module. The chosen submodules get hooks.
        layers: numbers, names, shell patterns, modules, a list of these, ``"all"``, or a dictionary from layers to their
            p_zero. Numbers count the modules of kind `after` from 1 in ``named_modules()`` order. In ResNet-18 conv 1 is
            conv1, conv 4 is layer1.1.conv1, and 8, 13 and 18 are the downsample convolutions.
        mode: ``"random"`` draws a mask at each forward. ``"target"``, or ``"da"``, uses the maps of `Attachment.record`,
            binarized. ``"binarize"`` uses no mask. ``"product"`` is ``y = x * m`` with the recorded map m unchanged, which is what the
            published domain-adaptation code does.
        p_zero: for mode ``"random"``: the probability of a zero, in [0, 1); one number for all layers, one per layer, or a
            dictionary by layer. It is rounded to a multiple of 1/65536, which `fastshape.realised_rate` returns. A
            probability that this would make 0 or 1 is refused. With one state of the generator, the ones of a larger p_zero
            are among those of a smaller one.
        unit: what one draw of a random mask decides: ``"element"``; ``"channel"``, a (sample, channel), as in `nn.Dropout2d`;
            or a number, the side of square blocks of a channel's plane (see `fastshape.random_blocks`).
        after: the kind of module that numbers and patterns refer to: ``"conv"``, ``"bn"`` or ``"relu"`` (any activation).
        every: keep every `every`-th of `layers`: ``"all"`` with 3 gives the layers 3, 6, 9, ...
        binarize, gradient: as in `fastshape.shape`. Mode ``"product"`` never binarizes; its gradient is exact or, with
            ``"zero"``, none. The shaped map has the dtype of the layer's output, also under autocast, where
            ``(a > 0).float()`` makes it and what follows float32; a hook that returns ``output.float()``, registered after
            attach, gets that.
        at_eval: what happens while the layer is in evaluation mode. ``"off"`` shapes nothing, ``"binarize"`` binarizes without a
            mask, ``"on"`` shapes as in training. As with dropout, the flag of the layer itself decides. A BatchNorm in
            evaluation mode after a layer in training mode changes nothing.
        record_mode: how `Attachment.record` runs the model: ``"eval"`` or ``"train"``.
        method: ``"hooks"`` shapes the output of each chosen module in a forward hook. ``"replace"`` runs shaping, BatchNorm and
            ReLU as one op, that of `ShapedBatchNorm2d`, wherever a BatchNorm is the first to read the output of the layer and, for
            the ReLU, a ReLU the first to read the BatchNorm's. Whatever else reads them gets what hooks would give it. Outputs,
            masks and recorded maps are those of ``"hooks"``, except for the rounding that `ShapedBatchNorm2d` describes.
            Compiled code, maps that are not binary and outputs without four dimensions are served by hooks. `Attachment.method_of`
            and `Attachment.reasons` say what happened, and a warning after the first forward. ``"auto"`` is ``"replace"`` without
            the warning.
        check_finite: whether a forward or a record raises FloatingPointError, which names the layer, where the output of a
            chosen layer holds a NaN or an infinity. Binarization would hide it: the loss stays finite, because B(NaN) = 0.
            It reads each output once more, and waits for the device.
        seed: draws the random masks from a stream of their own, `Attachment.stream`, so that no other random number changes.
            Give all processes that share a batch one seed, and set `Attachment.first_sample` in each.
        generator: draws the random masks, on the device of the layers' outputs. With neither, torch's default generator does.
        to_mask: for mode ``"target"``: gets a recorded map and returns its mask, a `BitMask` or a bool tensor of its shape; None
            is ``x > 0``. See `fastshape.above` and `fastshape.top_k`.
        once: whether a forward raises where the maps of a record have served a forward before.
        stack: whether the layers may have another attachment already. Both then apply, one after the other.

    `torch.utils.checkpoint` works inside and around the model. Backward shapes what it computes again as forward did, and
    does not count it in `fired`. Therefore call backward before `remove` and before the next `record`. Random masks need the
    generator states that checkpoint restores by default; with `seed` or `generator`, call backward before the next forward,
    and give a checkpoint around the whole model use_reentrant=False.
    With recorded maps, a checkpointed layer may be called only once per forward.

    `torch.compile` runs the hooks between its graphs, so ``fullgraph=True`` is refused; use `ActivationShaping` there.

    Returns:
        An `Attachment`.

    Raises:
        ValueError: an argument is not allowed; a layer is unknown (the message lists the known ones) or named twice; a pattern
            matches nothing; the number of p_zero is neither one nor the number of layers; arguments contradict each other.
        TypeError: an argument has a wrong type.

    Example:
        >>> with fastshape.attach(model, [1, 4], p_zero=0.7) as attachment:
        ...     loss = criterion(model(images), labels)
        >>> attachment.fired
        {'conv1': 1, 'layer1.1.conv1': 1}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
    mode = cast(Mode, SYNONYMS.get(mode, mode))
    _one_of("mode", MODES)(None, mode)
    _one_of("method", METHODS)(None, method)
    _flag("stack")(None, stack)
    if isinstance(layers, Mapping):
        if p_zero is not None:
            raise ValueError("p_zero: layers is a dictionary that gives it already")
        p_zero = layers
    names = choose_layers(model, layers, after=after, every=every)
    if seed is not None:
        new_rng_state(seed)  # raises what is wrong with it
        if mode != "random":
            raise ValueError(f"seed={seed!r}: only mode 'random' draws masks, not {mode!r}")
    for module in model.modules():  # of a copied part
        hooks = module._forward_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, _Layer) and hook.attachment is None:
                del hooks[key]
    if not stack:
        _warn_of_others(model, names)
    settings = {
        "p_zero": p_zero,
        "binarize": binarize,
        "gradient": gradient,
        "at_eval": at_eval,
        "record_mode": record_mode,
        "to_mask": to_mask,
        "once": once,
        "check_finite": check_finite,
        "generator": generator,
        "unit": unit,
    }
    attachment = Attachment(model, names, mode, method, settings, after, seed)
    if method == "replace" and attachment.reasons:
        warnings.warn(f"method='replace': hooks serve all layers: {NOT_BINARY}", stacklevel=2)
    return attachment


def _warn_of_others(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        for hook in model.get_submodule(name)._forward_hooks.values():
            if isinstance(hook, _Layer):
                warnings.warn(
                    f"{name} is shaped by {hook.attachment} already, and now twice: remove the first, or pass stack=True",
                    stacklevel=3,
                )


def attachments(model: nn.Module) -> list[Attachment]:
    """The attachments of `model`. Use it to get the attachments of a copied or unpickled model.

    Example:
        >>> import copy
        >>> shaping = fastshape.attach(model, [1], p_zero=0.5)
        >>> [each.names for each in fastshape.attachments(copy.deepcopy(model))]
        [('conv1',)]
    """
    hooks = model._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Attachment)]


def detach(model: nn.Module) -> None:
    """Remove every attachment of `model`, as from a copy of an attached model or of a part of one.

    A copied part is not shaped, but keeps hooks that do nothing. They go too.

    Example:
        >>> shaping = fastshape.attach(model, [1], p_zero=0.5)
        >>> fastshape.detach(model)
        >>> fastshape.attachments(model)
        []
    """
    for attachment in attachments(model):
        attachment.remove()
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Layer) and hook.attachment is None:
                del module._forward_hooks[key]
