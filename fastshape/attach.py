"""Attach shaping to a model without changing its code."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from .bitmask import BitMask
from .chains import (
    CONSTANTS,
    Chain,
    FusedBatchNorm2d,
    Fusion,
    Owner,
    find_chains,
    output_is_free,
    trace,
)
from .functional import GRADIENTS, shape
from .modules import AT_EVAL
from .rng import checked_p_zero, rng_state
from .sites import choose_layers

MODES = ("random", "target", "binarize", "product")
SYNONYMS = {"da": "target"}  # the word of the experiments, for domain adaptation
RECORD_MODES = ("eval", "train")
METHODS = ("hooks", "replace")


_COUNTING = threading.Lock()  # of what several threads count


class _Stop(BaseException):
    """Ends a target pass after its last recording. A BaseException, because a model may catch every Exception."""


def _count_calls(model: nn.Module, names: Sequence[str], inputs: tuple, kwargs: dict) -> int | None:
    """The number of calls of the modules `names` in one forward; None if the model cannot be traced."""
    try:
        return len(trace(model, names, inputs, kwargs).calls(*names)) or None
    except Exception:  # the model's code may raise anything
        return None


class _Calls(threading.local):
    """How often one thread called each chosen module in its current forward of the model."""

    def __init__(self, names: Sequence[str]):
        self.of = dict.fromkeys(names, 0)


def _unshaped(module: nn.Module, args: tuple, output) -> None:
    """The hook that a copy of a part of the model has in place of a `_Site`."""


class _Site:
    """The forward hook of one chosen module."""

    def __init__(self, attachment: Attachment, name: str, fusion: Fusion | None):
        self.attachment = attachment
        self.name = name
        self.fusion = fusion  # the chain that starts with the module, or None

    def __deepcopy__(self, memo: dict):
        if id(self.attachment.model) not in memo:  # a part of the model is copied without the rest
            return _unshaped
        copied = memo[id(self)] = object.__new__(_Site)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layers: {self.name!r} returns a {type(output).__name__}; only a module that returns one "
                "tensor can be shaped"
            )
        self.attachment._require_no_other_recorder()
        if self.attachment.check_finite:
            _require_finite(self.name, output)
        if self.attachment._recorder is not None:
            self.attachment._record_output(self.name, output)
            return None
        return self.attachment._shape_output(self.name, output, module, self.fusion)


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


@functools.cache
def _keep_out_of_graphs() -> None:
    """Make torch.compile run the hooks, and the BatchNorms that they pass shaping to, in Python.

    The hooks count calls. A graph that captured a counter would have to be compiled again at every call. This runs once, at
    the first attach and not at import, because it imports the compiler, which takes seconds.

    It also makes the compiler check hooks before it reuses code. By default code that was compiled for a block without
    hooks serves an equal block with a hook, which then never fires. Code compiled before is discarded for the same reason.
    """
    _Site.__call__ = torch.compiler.disable(_Site.__call__)
    FusedBatchNorm2d.forward = torch.compiler.disable(FusedBatchNorm2d.forward)
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()


class Attachment:
    """The shaping that `attach` puts on a model. As a context manager, it removes itself at the end.

    Attributes:
        names: names of the shaped modules.
        fired: number of times that shaping was applied, by name.
        method_of: ``"replace"`` or ``"hooks"``, by name: the method that serves the module.
        reasons: why hooks serve a module although ``method="replace"`` was requested, by name.
        at_eval: the argument of `attach`; may be set to another of its values between two forwards.
        check_finite: the argument of `attach`; may be set.
        first_sample: number of this process's first sample in a batch that several processes share; 0 at first. Set it
            before each forward. If the generators of the processes are in the same state, their random masks are then
            the parts of the mask that one process would draw for the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        *,
        mode: str,
        p_zero: dict[str, float],
        binarize: bool,
        gradient: str,
        at_eval: str,
        record_mode: str,
        check_finite: bool,
        chains: dict[str, Chain],
        reasons: dict[str, str],
    ):
        self.model = model
        self.names = names
        self.mode = mode
        self.p_zero = p_zero
        self.binarize = binarize
        self.gradient = gradient
        self.at_eval = at_eval
        self.record_mode = record_mode
        self.check_finite = check_finite
        self.first_sample = 0
        self.fired = dict.fromkeys(names, 0)
        self.method_of = {name: "replace" if name in chains else "hooks" for name in names}
        self.reasons = reasons
        self._recorder: int | None = None  # the thread whose record goes on
        self._recorded: dict[str, list[BitMask | Tensor]] = {}
        # Autograd's node count at the last record. Nodes with higher numbers belong to later forwards.
        self._recorded_at = 0
        # The number of calls of the chosen modules in one forward, by the kind of call; None where it is unknown.
        self._calls_per_pass: dict[tuple, int | None] = {}
        self._stop_after: int | None = None
        self._calls = _Calls(names)
        self._last_mask: dict[str, tuple] = {}
        _keep_out_of_graphs()
        modules = dict(model.named_modules())
        self._handles = [model.register_forward_pre_hook(self._begin)]
        self._fusions = {
            name: Fusion(name, modules[name], modules[chain.bn], modules.get(chain.relu))
            for name, chain in chains.items()
        }
        for name in names:
            site = _Site(self, name, self._fusions.get(name))
            self._handles.append(modules[name].register_forward_hook(site))
        for owner in dict.fromkeys(chain.owner for chain in chains.values()):
            module = modules[owner]
            calls = Owner(
                model,
                module,
                [self._fusions[n] for n in names if n in chains and chains[n].owner == owner],
            )
            self._handles += [
                module.register_forward_pre_hook(calls.begin, with_kwargs=True),
                module.register_forward_hook(calls.end, always_call=True),
            ]
        for fusion in self._fusions.values():
            fusion.start(gradient)

    # ---- public ----

    def record(self, *inputs, **kwargs) -> None:
        """Run the target pass and keep its maps for all forwards until the next `record`.

        The pass builds no graph, also in inference mode, shapes nothing and ends at the deepest chosen layer. With ``record_mode="eval"`` the whole
        model runs in evaluation mode and the BatchNorm statistics stay. With ``"train"`` it runs in training mode and they
        move. Afterwards each module has its old training flag again.

        Args:
            inputs, kwargs: the arguments of the model: a batch of N target images.

        Raises:
            RuntimeError: the mode records nothing, the attachment was removed, the pass did not reach a layer, or another
                thread records. A forward in another thread during a record raises it too.
        """
        if self.mode not in ("target", "product"):
            raise RuntimeError(f"mode={self.mode!r} records nothing; only target and product do")
        if not self._handles:
            raise RuntimeError("this attachment was removed from its model")
        with self._recording(), torch.inference_mode(False), torch.no_grad(), self._record_flags():
            constants = [
                t if isinstance(t, CONSTANTS) else ... for t in (*inputs, *kwargs.values())
            ]
            call = (self.model.training, len(inputs), *kwargs, *constants)
            if call not in self._calls_per_pass:
                self._calls_per_pass[call] = _count_calls(self.model, self.names, inputs, kwargs)
            self._stop_after = self._calls_per_pass[call]
            self._recorded = {name: [] for name in self.names}
            self._recorded_at = torch._C._autograd._get_sequence_nr()
            try:
                self.model(*inputs, **kwargs)
                # The model ran to its end, so the number of calls is now known even if tracing failed.
                self._calls_per_pass[call] = sum(map(len, self._recorded.values()))
            except _Stop:
                pass
            except BaseException:
                self._recorded = {}
                raise
            finally:
                for fusion in self._fusions.values():  # _Stop skips the hooks that end an owner
                    fusion.now.owner_runs = None
        missing = [name for name in self.names if not self._recorded[name]]
        if missing:
            self._recorded = {}
            raise RuntimeError(
                f"the target pass did not reach {', '.join(missing)}: nothing was recorded there"
            )

    @property
    def density(self) -> dict[str, float]:
        """The share of ones in the last mask of each layer, by name. Waits for the device.

        It is 1.0 for a layer without a mask. For mode ``"product"`` it is the share of positive values in the map.
        """
        return {name: _density(*last) for name, last in self._last_mask.items()}

    def remove(self) -> None:
        """Remove the shaping, so that the model is as before. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for fusion in self._fusions.values():
            fusion.stop()
        self._handles, self._fusions = [], {}
        self._recorded = {}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_calls"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._calls, self._recorder = _Calls(self.names), None
        self._recorded_at = 0  # a copy has no graph yet, and another process has its own node count

    def __repr__(self) -> str:
        state = "" if self._handles else ", removed"
        return f"Attachment(mode={self.mode!r}, layers={list(self.names)}{state})"

    # ---- called by the hooks ----

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._require_no_other_recorder()
        self._calls.of = dict.fromkeys(self.names, 0)

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
            self._recorder = threading.get_ident()
        try:
            yield
        finally:
            self._recorder = None

    @contextlib.contextmanager
    def _record_flags(self) -> Iterator[None]:
        flags = [(module, module.training) for module in self.model.modules()]
        if self.record_mode == "eval":
            self.model.eval()
        elif not self.model.training:
            self.model.train()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training

    def _record_output(self, name: str, output: Tensor) -> None:
        # Copy at once, as bits or whole: a later module may overwrite `output` in place.
        recorded = BitMask.from_tensor(output) if self.mode == "target" else output.detach().clone()
        self._recorded[name].append(recorded)
        if sum(map(len, self._recorded.values())) == self._stop_after:
            raise _Stop

    def _shape_output(
        self, name: str, x: Tensor, module: nn.Module, fusion: Fusion | None
    ) -> Tensor | None:
        if not self.model.training and self.at_eval == "off":
            return None
        # Backward runs checkpointed modules again. This call must then repeat what forward did.
        again = torch._C._current_graph_task_id() != -1
        p_zero = mask = state = None
        binarize = self.binarize
        if self.mode == "binarize" or not (self.model.training or self.at_eval == "on"):
            last = (None,)
            binarize = True
        elif self.mode == "random":
            state = rng_state(device=x.device)
            if self.first_sample:
                _skip_samples(state, self.first_sample, name, x)
            p_zero = self.p_zero[name]
            last = (state, x.shape, p_zero)
        else:
            mask = self._recorded_for(name, x, again)
            last = (mask,)
        if not again:
            self._last_mask[name] = last
            self._calls.of[name] += 1
            with _COUNTING:
                self.fired[name] += 1
        if isinstance(mask, Tensor):  # the raw product
            return (x.detach() if self.gradient == "zero" else x) * mask
        inplace = output_is_free(module, x)
        if fusion is not None and fusion.takes_over(again):
            fusion.defer(x, p_zero or 0.0, mask, state, inplace)
            return None
        return shape(
            x,
            p_zero=p_zero,
            mask=mask,
            rng_state=state,
            binarize=binarize,
            gradient=self.gradient,
            inplace=inplace,
        )

    def _recorded_for(self, name: str, x: Tensor, again: bool) -> BitMask | Tensor:
        maps = self._recorded.get(name)
        if not maps:
            raise RuntimeError(
                f"mode={self.mode!r}: nothing is recorded for {name!r}; call attachment.record(target_batch) "
                "before the source batch"
            )
        if again:
            if torch._C._current_autograd_node()._sequence_nr() < self._recorded_at:
                raise RuntimeError(
                    f"{name!r} is checkpointed, and a later record replaced the maps that backward needs: call backward "
                    "before the next record, and do not nest checkpoints with use_reentrant=True"
                )
            if len(maps) > 1:
                raise RuntimeError(
                    f"{name!r} is checkpointed and was called {len(maps)} times in the target pass: mode={self.mode!r} "
                    "allows one call, because backward does not say which call it repeats"
                )
        call = 0 if again else self._calls.of[name]
        if call >= len(maps):
            raise RuntimeError(
                f"{name!r} was called {call + 1} times in one forward but {len(maps)} times in the target pass "
                "(a new forward starts only when the whole model is called)"
            )
        recorded = maps[call]
        if recorded.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"{name!r}: the recorded map has shape {tuple(recorded.shape)}, the source map {tuple(x.shape)}; "
                "only the batch size may differ"
            )
        if len(x) > recorded.shape[0]:
            raise ValueError(
                f"{name!r}: a source batch of {len(x)} needs as many recorded maps; the target batch had only "
                f"{recorded.shape[0]}"
            )
        return recorded.first(len(x)) if isinstance(recorded, BitMask) else recorded[: len(x)]


def _skip_samples(state: Tensor, samples: int, name: str, x: Tensor) -> None:
    """Advance `state` in place past the elements of the `samples` samples that come before x in the batch."""
    elements = x.shape[1:].numel()
    if samples * elements % 8:  # one offset serves 8 elements
        raise ValueError(
            f"first_sample={samples}: {name!r} has {elements} elements per sample; the product of both must be a "
            "multiple of 8"
        )
    state[1].add_(samples * elements // 8)  # needs no copy from the host, and wraps at 2**64


def _density(
    mask: BitMask | Tensor | None, size: torch.Size | None = None, p_zero: float = 0.0
) -> float:
    if mask is None:
        return 1.0
    if size is not None:  # `mask` is the state of a random mask: draw the mask again
        mask = BitMask.random(size, p_zero, rng_state=mask)
    elif isinstance(mask, Tensor):
        mask = BitMask.from_tensor(mask)
    return mask.density()


def attach(
    model: nn.Module,
    layers: int | str | Iterable[int | str],
    *,
    mode: str = "random",
    p_zero: float | Sequence[float] | None = None,
    after: str = "conv",
    every: int = 1,
    binarize: bool = True,
    gradient: str = "straight_through",
    at_eval: str = "off",
    record_mode: str = "eval",
    method: str = "hooks",
    check_finite: bool = False,
) -> Attachment:
    """Shape the output of chosen layers of `model`. The code of the model stays unchanged.

    Args:
        model: any module. The chosen submodules get hooks.
        layers: numbers, names, shell patterns, a list of these, or ``"all"``. Numbers count the modules of kind `after` from 1
            in ``named_modules()`` order. In ResNet-18 conv 1 is conv1, conv 4 is layer1.1.conv1, and 8, 13 and 18 are the
            downsample convolutions.
        mode: ``"random"`` draws a mask at each forward. ``"target"``, or ``"da"``, uses the maps of `Attachment.record`,
            binarized. ``"binarize"`` uses no mask. ``"product"`` is ``y = x * m`` with the recorded map m unchanged, which is what the
            published domain-adaptation code does.
        p_zero: for mode ``"random"``: the probability of a zero, in [0, 1); one number for all layers or one per layer.
        after: the kind of module that numbers and patterns refer to: ``"conv"``, ``"bn"`` or ``"relu"`` (any activation).
        every: keep every `every`-th of `layers`: ``"all"`` with 3 gives the layers 3, 6, 9, ...
        binarize, gradient: as in `fastshape.shape`. Mode ``"product"`` never binarizes; its gradient is exact or, with
            ``"zero"``, none.
        at_eval: what happens while ``model.training`` is False. ``"off"`` shapes nothing, ``"binarize"`` binarizes without a
            mask, ``"on"`` shapes as in training.
        record_mode: how `Attachment.record` runs the model: ``"eval"`` or ``"train"``.
        method: ``"hooks"`` shapes the output of each chosen module in a forward hook. ``"replace"`` runs a chain convolution ->
            shaping -> BatchNorm2d -> ReLU with one op after the convolution, `ShapedBatchNorm2d`. A chain needs a
            convolution whose output goes to one `nn.BatchNorm2d` and nowhere else. The ReLU joins it if nothing else takes
            the output of the BatchNorm. Outputs, masks and recorded maps are those of ``"hooks"``, except for the rounding
            that `ShapedBatchNorm2d` describes. torch.fx finds the chains in the code of the model. Hooks serve a layer
            that has no chain or that torch.fx cannot trace, and every layer without `binarize`; a warning,
            `Attachment.method_of` and `Attachment.reasons` say so. Hooks also serve a call that does not run the whole
            module around the chain, or that does not give it exactly its required arguments.
        check_finite: whether a forward or a record raises FloatingPointError, which names the layer, where the output of a
            chosen layer holds a NaN or an infinity. Binarization would hide it: the loss stays finite, because B(NaN) = 0.
            It reads each output once more, and waits for the device.

    `torch.utils.checkpoint` works inside and around the model. Backward shapes what it computes again as forward did, and
    does not count it in `fired`. Therefore call backward before `remove` and before the next `record`. Random masks need the
    generator states that checkpoint restores by default. With recorded maps, a checkpointed layer may be called only once per
    forward.

    Returns:
        An `Attachment`. If several processes share a batch, set its `first_sample`: their random masks are then parts of one.

    Raises:
        ValueError: an argument is not allowed; a layer is unknown (the message lists the known ones) or named twice; a pattern
            matches nothing; the number of p_zero is neither one nor the number of layers.
        TypeError: an argument has a wrong type.

    Example:
        >>> with fastshape.attach(model, [1, 4], p_zero=0.7) as attachment:
        ...     loss = criterion(model(images), labels)
        >>> attachment.fired
        {'conv1': 1, 'layer1.1.conv1': 1}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
    mode = SYNONYMS.get(mode, mode)
    for argument, value, allowed in (
        ("mode", mode, MODES),
        ("gradient", gradient, GRADIENTS),
        ("at_eval", at_eval, AT_EVAL),
        ("record_mode", record_mode, RECORD_MODES),
        ("method", method, METHODS),
    ):
        if value not in allowed:
            raise ValueError(f"{argument}={value!r}: allowed are {', '.join(allowed)}")
    if mode == "product" and gradient == "clipped":
        raise ValueError(
            "gradient='clipped': mode 'product' allows straight_through (which is exact there) and zero"
        )
    if not isinstance(check_finite, bool):
        raise TypeError(f"check_finite={check_finite!r}: must be True or False")
    names = choose_layers(model, layers, after=after, every=every)
    for module in model.modules():  # of a copied part
        for key in [key for key, hook in module._forward_hooks.items() if hook is _unshaped]:
            del module._forward_hooks[key]
    p_zero = _p_zero_by_layer(mode, p_zero, names)
    chains, reasons = {}, {}
    if method == "replace":
        if mode == "product" or not binarize:
            reasons = dict.fromkeys(names, "the shaped map is not binary")
        else:
            chains, reasons = find_chains(
                model, names, (True,) if at_eval == "off" else (True, False)
            )
    if reasons:
        layers_and_reasons = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"method='replace': hooks serve {layers_and_reasons}", stacklevel=2)
    return Attachment(
        model,
        names,
        mode=mode,
        p_zero=p_zero,
        binarize=binarize,
        gradient=gradient,
        at_eval=at_eval,
        record_mode=record_mode,
        check_finite=check_finite,
        chains=chains,
        reasons=reasons,
    )


def _p_zero_by_layer(
    mode: str, p_zero: float | Sequence[float] | None, names: tuple[str, ...]
) -> dict[str, float]:
    if mode != "random":
        if p_zero is not None:
            raise ValueError(f"p_zero={p_zero!r}: only mode 'random' draws masks, not {mode!r}")
        return {}
    if p_zero is None:
        raise ValueError("p_zero: mode 'random' needs a probability in [0, 1)")
    one = isinstance(p_zero, Real) or not isinstance(p_zero, Iterable)
    values = [p_zero] * len(names) if one else list(p_zero)
    if len(values) != len(names):
        raise ValueError(
            f"p_zero: {len(values)} values for {len(names)} layers; give one value, or one per layer"
        )
    return {name: checked_p_zero(value) for name, value in zip(names, values, strict=True)}


def attachments(model: nn.Module) -> list[Attachment]:
    """The attachments of `model`. Use it to get the attachments of a copied or unpickled model."""
    hooks = model._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Attachment)]
