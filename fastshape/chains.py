"""Chains conv -> BatchNorm2d (-> ReLU): found in a model's code by torch.fx, and run as one op."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .batch_norm import ShapedBatchNorm2d
from .bitmask import BitMask

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    str,
)  # what code may ask of an argument when it is traced

_CONVS_2D = (nn.Conv2d, nn.ConvTranspose2d)
_CONVS = (*_CONVS_2D, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Nodes of autograd that keep what went in and not what came out.
_KEEP_NO_OUTPUT = {
    "ConvolutionBackward0",
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
}


def _is_plain(module: nn.Module, *types: type) -> bool:
    """Of one of these types, not of a subclass, and with that type's own forward."""
    return type(module) in types and "forward" not in vars(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes in or comes out."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def output_is_free(module: nn.Module, output: Tensor) -> bool:
    """Whether the only forward hook of `module` may write into its output: nothing else has it, or needs it for backward.

    True of torch's own convolutions and batch norms, which keep their input alone. Not of a subclass, nor beside other
    hooks: these may keep the output. Not of a view, nor where autograd has it from elsewhere, as from compiled code.
    """
    if (
        not _is_plain(module, *_CONVS, *_BATCH_NORMS)
        or len(module._forward_hooks) > 1
        or _has_any_global_hook()
        or output._is_view()
    ):
        return False
    made_by = output.grad_fn
    return not output.requires_grad if made_by is None else made_by.name() in _KEEP_NO_OUTPUT


# ---- tracing ----


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Iterable[str]):
        super().__init__()
        self.leaves = frozenset(leaves)
        self.proxies: dict[fx.Node, ref] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # What holds no module holds no chain, and may be of no use to stand-ins, as a subclass of a norm is.
        return not module._modules or name in self.leaves or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self.proxies[node] = ref(proxy)
        return proxy


class Trace(NamedTuple):
    """One forward of a module.

    Attributes:
        graph: what it calls.
        kept: values that the module's code still holds when it is done.
    """

    graph: fx.Graph
    kept: set[fx.Node]

    def calls(self, *names: str) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_module" and n.target in names]

    def only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 and node not in self.kept else None

    def users(self, node: fx.Node) -> str:
        names = [user.name for user in node.users]
        return ", ".join(names + ["an attribute"] * (node in self.kept)) or "nothing"


def trace(
    model: nn.Module,
    leaves: Iterable[str] = (),
    inputs: Sequence = (),
    kwargs: Mapping = MappingProxyType({}),
    training: bool | None = None,
) -> Trace:
    """Trace `model` as called with these inputs. Its own state stays as it is.

    `CONSTANTS` are taken as they are, and so is the default of what is left out: code may ask for them. Other inputs may
    be anything.

    Args:
        leaves: names of modules not to look into, besides those of torch.nn.
        training: the mode of all modules; None is the one that each is in.

    Raises:
        Exception: whatever the model's code may raise when it meets stand-ins.
    """
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*inputs, **kwargs).arguments
    known = {name: value for name, value in given.items() if isinstance(value, CONSTANTS)}
    for name, parameter in signature.parameters.items():
        if name not in given and parameter.default is not parameter.empty:
            known[name] = parameter.default
    # The code runs on a twin, which shares the tensors and has no hooks: what it sets, it sets there.
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():
        memo[id(module._forward_pre_hooks)] = OrderedDict()
        memo[id(module._forward_hooks)] = OrderedDict()
    twin = copy.deepcopy(model, memo)
    if training is not None:
        twin.train(training)
    tracer = _Tracer(leaves)
    graph = tracer.trace(twin, concrete_args=known)
    return Trace(graph, {node for node, proxy in tracer.proxies.items() if proxy() is not None})


# ---- finding ----


class Chain(NamedTuple):
    """What follows a convolution.

    Attributes:
        owner: name of the module whose code calls the chain; ``""`` is the model itself.
        bn: name of the BatchNorm2d that alone takes the convolution's output.
        relu: name of the ReLU that alone takes bn's output, or None.
        escapes: whether owner returns bn's output, so that only its caller knows what takes it.
    """

    owner: str
    bn: str
    relu: str | None
    escapes: bool


class _NoChain(Exception):
    """Why there is none."""


class _Unclear(_NoChain):
    """Why one module's code does not tell; that of a module around it may."""


def find_chains(
    model: nn.Module, names: Iterable[str], modes: Sequence[bool]
) -> tuple[dict[str, Chain], dict[str, str]]:
    """The chains that begin with the modules `names`, and for the other names why none does.

    Args:
        modes: the values of ``training`` in which a chain must be the same.
    """

    @functools.cache
    def traced(owner: str, training: bool) -> Trace | str:
        try:
            return trace(model.get_submodule(owner), training=training)
        except Exception as problem:  # whatever that code may raise
            return f"torch.fx cannot trace {owner or 'the model'}: {problem}"

    chains, reasons = {}, {}
    for name in names:
        try:
            chains[name] = _find_chain(model, name, modes, traced)
        except _NoChain as reason:
            reasons[name] = str(reason)
    return chains, reasons


def _find_chain(model: nn.Module, name: str, modes: Sequence[bool], traced: Callable) -> Chain:
    conv = model.get_submodule(name)
    if not _is_plain(conv, *_CONVS_2D):
        raise _NoChain(f"it is a {type(conv).__name__}, not a plain 2d convolution")
    if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        raise _NoChain("other hooks see its output")
    # The smallest module whose code tells: a part of a model is often called alone, and traced where the whole cannot be.
    found, parts = None, name.split(".")
    while parts:
        owner = ".".join(parts := parts[:-1])
        try:
            ways = {_chain_in(model, owner, name, traced(owner, training)) for training in modes}
            if len(ways) > 1:
                raise _NoChain("what follows it in training is not what follows it in evaluation")
            (way,) = ways
            if found is None or way.relu:
                found = way
            if not way.escapes:
                break
        except _Unclear as reason:
            unclear = reason
        except _NoChain:
            if found is None:
                raise
            break
    if found is None:
        raise unclear
    return found


def _chain_in(model: nn.Module, owner: str, name: str, traced: Trace | str) -> Chain:
    if isinstance(traced, str):
        raise _Unclear(traced)
    prefix = f"{owner}." if owner else ""
    conv = traced.calls(name.removeprefix(prefix))
    if not conv:
        raise _Unclear(f"{owner or 'the model'} does not call it")
    if len(conv) > 1:
        raise _NoChain(f"it is called {len(conv)} times in one forward")

    user = traced.only_user(conv[0])
    if user is None:
        raise _NoChain(f"not only a BatchNorm2d takes its output, but {traced.users(conv[0])}")
    if user.op == "output":
        raise _Unclear(f"{owner or 'the model'} returns its output")
    if user.op != "call_module":
        raise _NoChain(f"{user.name} takes its output, not a BatchNorm2d")
    bn_name = prefix + user.target
    bn = model.get_submodule(bn_name)
    if not _is_plain(bn, nn.BatchNorm2d):
        raise _NoChain(
            f"{bn_name} takes its output, a {type(bn).__name__}, not a plain BatchNorm2d"
        )
    if _is_watched(bn):
        raise _NoChain(f"{bn_name} has hooks")
    if (times := len(traced.calls(user.target))) > 1:
        raise _NoChain(f"{bn_name} is called {times} times in one forward")

    user = traced.only_user(user)
    relu = None
    if user is not None and user.op == "call_module":
        module = model.get_submodule(prefix + user.target)
        if _is_plain(module, nn.ReLU, PassingReLU) and not _is_watched(module):
            relu = prefix + user.target
    return Chain(owner, bn_name, relu, escapes=user is not None and user.op == "output")


# ---- running ----

# What a tensor carries from one module of a chain to the next. It goes with the tensor: what is not part of a chain never
# sees it, and nothing is left behind.
_SHAPING = "_fastshape_shaping"  # on a convolution's output: how bn is to shape it
_RECTIFIED = "_fastshape_rectified"  # on bn's output: the version that is rectified


class FusedBatchNorm2d(ShapedBatchNorm2d):
    """What `attach` makes of a BatchNorm2d while it is attached: plain, but for input that is to be shaped."""

    def forward(self, input: Tensor) -> Tensor:
        shaping = vars(input).pop(_SHAPING, None)
        if shaping is None:
            return nn.BatchNorm2d.forward(self, input)
        fusion, p_zero, mask, rng_state, inplace = shaping
        fusion.waiting = False
        relu = fusion.relu is not None and not _is_watched(fusion.relu)
        y = self._shaped(input, p_zero, mask, rng_state, relu, inplace)
        if relu and not y.is_inference():
            setattr(y, _RECTIFIED, y._version)
        return y


class PassingReLU(nn.ReLU):
    """What `attach` makes of a ReLU while it is attached: plain, but it hands on what is rectified already."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # the compiler fuses it with what follows
            version = vars(input).get(_RECTIFIED)
            if version is not None and version == input._version:
                return input
        return super().forward(input)


class Fusion:
    """One chain of a model, run as one op while its owner runs. Elsewhere, as where the convolution is called alone, nobody
    knows what takes the convolution's output.
    """

    def __init__(self, name: str, conv: nn.Module, bn: nn.Module, relu: nn.Module | None):
        self.name, self.conv, self.bn, self.relu = name, conv, bn, relu
        self.owner_runs: bool | None = None  # as it was traced; None where it does not run
        self.owner_ran = False  # when forward called the convolution last, and as it was traced
        self.waiting = False  # bn has not yet met what it is to shape

    def start(self, gradient: str) -> None:
        """Change the classes of bn and relu. The modules stay the same ones, with their state, hooks and places."""
        settings = {"p_zero": None, "gradient": gradient, "at_eval": "off", "inplace": False}
        vars(self.bn).update(settings, relu=self.relu is not None)
        self.bn.__class__ = FusedBatchNorm2d
        if self.relu is not None:
            self.relu.__class__ = PassingReLU

    def stop(self) -> None:
        if type(self.bn) is FusedBatchNorm2d:
            self.bn.__class__ = nn.BatchNorm2d
            for setting in ("p_zero", "gradient", "at_eval", "inplace", "relu"):
                del vars(self.bn)[setting]
        # It may serve another attachment too, which then loses speed and nothing else.
        if type(self.relu) is PassingReLU:
            self.relu.__class__ = nn.ReLU

    def takes_over(self, again: bool) -> bool:
        """Whether bn may shape what the convolution gives now: within its owner, and with nobody looking on.

        Args:
            again: backward computes it again, maybe without its owner: what is checkpointed may be a part of that.
        """
        conv = self.conv
        if not again:
            self.owner_ran = bool(self.owner_runs)
        return (
            (self.owner_ran if self.owner_runs is None else self.owner_runs)
            and len(conv._forward_hooks) == 1
            and not (conv._backward_hooks or conv._backward_pre_hooks or _is_watched(self.bn))
            and not _has_any_global_hook()
        )

    def defer(
        self,
        x: Tensor,
        p_zero: float,
        mask: BitMask | None,
        rng_state: Tensor | None,
        inplace: bool,
    ) -> None:
        """Leave it to bn to shape x."""
        setattr(x, _SHAPING, (self, p_zero, mask, rng_state, inplace))
        self.waiting = True


class Owner:
    """The hooks on a module whose code calls chains: they tell the chains that it runs."""

    def __init__(self, module: nn.Module, fusions: list[Fusion]):
        self.fusions = fusions
        self.inputs = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is parameter.empty
        ]

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Called in another way than it was traced, it may do something else. Lists: the compiler follows no generators.
        as_traced = len(args) + len(kwargs) == len(self.inputs)
        as_traced = as_traced and all([name in self.inputs for name in kwargs])
        as_traced = as_traced and not any(
            [isinstance(t, CONSTANTS) for t in (*args, *kwargs.values())]
        )
        for fusion in self.fusions:
            fusion.owner_runs, fusion.waiting = as_traced, False

    def end(self, module: nn.Module, args: tuple, output) -> None:
        for fusion in self.fusions:
            fusion.owner_runs = None
            if fusion.waiting and output is not None:  # None: it raised
                raise RuntimeError(
                    f"method='replace': what {fusion.name} gave never reached its BatchNorm2d, and is not shaped; was the "
                    "model changed after attach, as nn.SyncBatchNorm.convert_sync_batchnorm does? Change it before, or use "
                    "method='hooks'"
                )
