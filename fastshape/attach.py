"""Attach shaping to a model without editing it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence

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
RECORD_MODES = ("eval", "train")
METHODS = ("hooks", "replace")


class _Stop(BaseException):
    """Ends a recording pass once nothing is left to record. Not an Exception: a model may catch those."""


def _count_calls(model: nn.Module, names: Sequence[str], inputs: tuple, kwargs: dict) -> int | None:
    """How often one forward on such inputs calls the modules `names`; None where it cannot be traced."""
    try:
        return len(trace(model, names, inputs, kwargs).calls(*names)) or None
    except Exception:  # whatever the model's code may raise
        return None


class _Site:
    """The forward hook of one chosen module."""

    def __init__(self, attachment: Attachment, name: str, fusion: Fusion | None):
        self.attachment = attachment
        self.name = name
        self.fusion = fusion  # the chain that the module begins, if any

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layers: {self.name!r} gives a {type(output).__name__}; only a module whose output "
                "is one tensor can be shaped"
            )
        if self.attachment._recording:
            self.attachment._record_output(self.name, output)
            return None
        return self.attachment._shape_output(self.name, output, module, self.fusion)


@functools.cache
def _keep_out_of_graphs() -> None:
    """Have torch.compile leave the hooks, and what they hand to a BatchNorm, to Python.

    Their counters change at every call, so a graph that captured them would be compiled anew each time. Done once, and
    not where the class is defined: it imports the compiler, which takes seconds.

    The compiler is also told to look at hooks before it reuses code: by default it takes a block that it
    compiled without a hook for an equal block that has one, and the hook never fires. What it compiled
    before is thrown away for the same reason.
    """
    _Site.__call__ = torch.compiler.disable(_Site.__call__)
    FusedBatchNorm2d.forward = torch.compiler.disable(FusedBatchNorm2d.forward)
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()


class Attachment:
    """Shaping attached to a model: what `attach` returns. Also a context manager that removes it.

    Attributes:
        names: names of the shaped modules.
        fired: how often shaping was applied, by name.
        method_of: ``"replace"`` or ``"hooks"``, by name: what was asked for, or what there can be instead.
        reasons: why there can be hooks alone where replacement was asked for, by name.
        first_sample: number of the first sample that comes in a batch of which several processes have parts; to be
            set before each forward, 0 at first. Where the processes' generators are in one state, their random
            masks are then the parts of the mask that one process would draw for the whole batch.
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
        self.first_sample = 0
        self.fired = dict.fromkeys(names, 0)
        self.method_of = {name: "replace" if name in chains else "hooks" for name in names}
        self.reasons = reasons
        self._recording = False
        self._recorded: dict[str, list[BitMask | Tensor]] = {}
        self._recorded_at = 0  # what is younger in autograd's graph comes from a later forward
        # Calls of the chosen modules in one forward, by how the model is called; None: not known yet.
        self._calls_per_pass: dict[tuple, int | None] = {}
        self._stop_after: int | None = None
        self._calls = dict.fromkeys(names, 0)  # in the forward under way
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
                module,
                [self._fusions[n] for n in names if n in chains and chains[n].owner == owner],
            )
            self._handles += [
                module.register_forward_pre_hook(calls.begin, with_kwargs=True),
                module.register_forward_hook(calls.end, always_call=True),
            ]
        for fusion in self._fusions.values():
            fusion.start(gradient)

    # ---- what a user calls ----

    @torch.no_grad()
    def record(self, *inputs, **kwargs) -> None:
        """Run the target pass and hold its maps for the forwards that follow, until the next `record`.

        No graph is built, this attachment shapes nothing, and the pass ends at the deepest chosen layer. With
        ``record_mode="eval"`` the whole model runs as in evaluation and BatchNorm statistics stay; with
        ``"train"`` it runs as in training and they move. Training flags are put back afterwards.

        Args:
            inputs, kwargs: what the model is called with: a batch of N target images.

        Raises:
            RuntimeError: the mode records nothing, or the attachment was removed.
        """
        if self.mode not in ("target", "product"):
            raise RuntimeError(f"mode={self.mode!r} records nothing; only target and product do")
        if not self._handles:
            raise RuntimeError("this attachment was removed from its model")
        with self._record_flags():
            known = [t if isinstance(t, CONSTANTS) else ... for t in (*inputs, *kwargs.values())]
            way = (self.model.training, len(inputs), *kwargs, *known)
            if way not in self._calls_per_pass:
                self._calls_per_pass[way] = _count_calls(self.model, self.names, inputs, kwargs)
            self._stop_after = self._calls_per_pass[way]
            self._recorded = {name: [] for name in self.names}
            self._recorded_at = torch._C._autograd._get_sequence_nr()
            self._recording = True
            try:
                self.model(*inputs, **kwargs)
                # Seen whole: where tracing could not tell, now it is known where the next pass may end.
                self._calls_per_pass[way] = sum(map(len, self._recorded.values()))
            except _Stop:
                pass
            except BaseException:
                self._recorded = {}
                raise
            finally:
                self._recording = False
                for fusion in self._fusions.values():  # a pass that was stopped ends no owner
                    fusion.owner_runs = None
        missing = [name for name in self.names if not self._recorded[name]]
        if missing:
            self._recorded = {}
            raise RuntimeError(
                f"the target pass never reached {', '.join(missing)}: nothing recorded there"
            )

    @property
    def density(self) -> dict[str, float]:
        """Share of ones in the mask each layer used last, by name. Waits for the device.

        1.0 where no mask was applied. A raw product has no mask: its share of positive values is given.
        """
        return {name: _density(*last) for name, last in self._last_mask.items()}

    def remove(self) -> None:
        """Take everything off the model, which is then as it was. More than once does no harm."""
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

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._recorded_at = 0  # a copy is in no graph yet, and another process counts anew

    def __repr__(self) -> str:
        state = "" if self._handles else ", removed"
        return f"Attachment(mode={self.mode!r}, layers={list(self.names)}{state})"

    # ---- what the hooks call ----

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._calls = dict.fromkeys(self.names, 0)

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
        # Bits or a copy, at once: a later module may overwrite `output` in place.
        recorded = BitMask.from_tensor(output) if self.mode == "target" else output.detach().clone()
        self._recorded[name].append(recorded)
        if sum(map(len, self._recorded.values())) == self._stop_after:
            raise _Stop

    def _shape_output(
        self, name: str, x: Tensor, module: nn.Module, fusion: Fusion | None
    ) -> Tensor | None:
        if not self.model.training and self.at_eval == "off":
            return None
        # Backward computes what is checkpointed again: as in forward, whose call it is.
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
            self._calls[name] += 1
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
                f"mode={self.mode!r}: nothing was recorded for {name!r}; call attachment.record(target_batch) "
                "before the source batch"
            )
        if again:
            if torch._C._current_autograd_node()._sequence_nr() < self._recorded_at:
                raise RuntimeError(
                    f"{name!r} is checkpointed, and the maps of the forward that backward computes again went with a later "
                    "record: call backward before the next record, and nest no checkpoints with use_reentrant=True"
                )
            if len(maps) > 1:
                raise RuntimeError(
                    f"{name!r} is checkpointed and was called {len(maps)} times in the target pass: mode={self.mode!r} "
                    "cannot tell which of these calls backward computes again"
                )
        call = 0 if again else self._calls[name]
        if call >= len(maps):
            raise RuntimeError(
                f"{name!r} was called {call + 1} times in one forward, {len(maps)} in the target pass "
                "(a part of the model called on its own does not start a new forward)"
            )
        recorded = maps[call]
        if recorded.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"{name!r}: the recorded map has shape {tuple(recorded.shape)}, the source's {tuple(x.shape)}; "
                "they may differ in the batch alone"
            )
        if len(x) > recorded.shape[0]:
            raise ValueError(
                f"{name!r}: a source batch of {len(x)} needs as many recorded maps; the target batch had "
                f"{recorded.shape[0]}"
            )
        return recorded.first(len(x)) if isinstance(recorded, BitMask) else recorded[: len(x)]


def _skip_samples(state: Tensor, samples: int, name: str, x: Tensor) -> None:
    """Move a fresh state on, in place, by the elements of so many samples before x, the outermost dimension in memory."""
    elements = x.shape[1:].numel()
    if samples * elements % 8:  # one offset draws for 8 elements
        raise ValueError(
            f"first_sample={samples}: {name!r} gives {elements} elements a sample, and their product must be a "
            "multiple of 8"
        )
    state[1].add_(samples * elements // 8)  # no copy from the host, and it wraps at 2**64


def _density(
    mask: BitMask | Tensor | None, size: torch.Size | None = None, p_zero: float = 0.0
) -> float:
    if mask is None:
        return 1.0
    if size is not None:  # the state of a random mask: draw it again
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
) -> Attachment:
    """Shape the output of chosen layers of `model`, which is not edited.

    Args:
        model: any module; hooks are put on the chosen submodules.
        layers: numbers, names, shell patterns, a list of these, or ``"all"``. Numbers count the modules of
            kind `after` from 1 in ``named_modules()`` order: in ResNet-18 conv 1 is conv1, 4 is
            layer1.1.conv1, and 8, 13 and 18 are the downsample convolutions.
        mode: ``"random"``: a mask drawn at each forward. ``"target"``: the maps of `Attachment.record`,
            binarized. ``"binarize"``: no mask. ``"product"``: ``y = x * m`` with the recorded map as it is,
            which is what the published domain-adaptation code ran.
        p_zero: for mode ``"random"``: probability of a zero, one number or one for each layer, in [0, 1).
        after: which kind numbers and patterns mean: ``"conv"``, ``"bn"`` or ``"relu"`` (any activation).
        every: keep every `every`-th of `layers`: with ``"all"`` and 3, the layers 3, 6, 9, ...
        binarize, gradient: as in `fastshape.shape`. Mode ``"product"`` never binarizes, and has an exact
            gradient or, with ``"zero"``, none.
        at_eval: what happens while ``model.training`` is False: ``"off"``: nothing is shaped.
            ``"binarize"``: binarized, no mask. ``"on"``: shaped as in training.
        record_mode: how `Attachment.record` runs the model: ``"eval"`` or ``"train"``.
        method: ``"hooks"``: the output of each chosen module is shaped in a hook. ``"replace"``: where that is a
            convolution whose output goes to one `nn.BatchNorm2d` and nowhere else, shaping, BatchNorm and a ReLU
            that alone takes its output run as one op, `ShapedBatchNorm2d`, in the place of that BatchNorm. Numbers,
            masks and what is recorded are the same, but for the rounding that `ShapedBatchNorm2d` speaks of. The chains are
            found by torch.fx in the code of the modules around them; where it cannot tell, where a chain is not one and
            without `binarize`, hooks serve instead: a warning says so, and `Attachment.method_of` and
            `Attachment.reasons`. A module called in another way than with its required arguments, or only in
            part, is served by hooks too while it is called so.

    `torch.utils.checkpoint` may be used in the model or around it: what it computes again in backward is shaped as in
    forward and not counted in `fired`. So backward comes before `remove` and the next `record`. Where masks are random it must
    put the generators back, as it does by default; with recorded maps a layer is called once in a forward.

    Returns:
        An `Attachment`. Where several processes share a batch, its `first_sample` makes their random masks parts of one.

    Raises:
        ValueError: an argument outside what is allowed; an unknown layer (those that exist are listed), one
            named twice, a pattern without a match; as many p_zero as layers are needed.
        TypeError: an argument of a wrong type.

    Example:
        >>> with fastshape.attach(model, [1, 4], p_zero=0.7) as attachment:
        ...     loss = criterion(model(images), labels)
        >>> attachment.fired
        {'conv1': 1, 'layer1.1.conv1': 1}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
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
            "gradient='clipped': mode 'product' allows straight_through (exact) and zero"
        )
    names = choose_layers(model, layers, after=after, every=every)
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
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"method='replace': hooks serve {why}", stacklevel=2)
    return Attachment(
        model,
        names,
        mode=mode,
        p_zero=p_zero,
        binarize=binarize,
        gradient=gradient,
        at_eval=at_eval,
        record_mode=record_mode,
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
    values = list(p_zero) if isinstance(p_zero, Sequence) else [p_zero] * len(names)
    if len(values) != len(names):
        raise ValueError(
            f"p_zero: {len(values)} values for {len(names)} layers; give one, or one a layer"
        )
    return {name: checked_p_zero(value) for name, value in zip(names, values, strict=True)}


def attachments(model: nn.Module) -> list[Attachment]:
    """What is attached to `model`: how to find it again on a copy or after loading a pickled model."""
    hooks = model._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Attachment)]
