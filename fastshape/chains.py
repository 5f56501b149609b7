"""Chains conv -> BatchNorm2d (-> ReLU). torch.fx finds them in a model's code, and one op runs BatchNorm and ReLU."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
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

# Tracing passes arguments of these types to the code as they are.
CONSTANTS = (type(None), bool, int, float, str)

_CONVS_2D = (nn.Conv2d, nn.ConvTranspose2d)
_CONVS = (*_CONVS_2D, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
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


def _is_watched(module: nn.Module) -> bool:
    """Whether `module` has hooks that see its input or output."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


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


# ---- tracing ----


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Iterable[str]):
        super().__init__()
        self.leaves = frozenset(leaves)
        self.proxies: dict[fx.Node, ref] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # A module without submodules has no chain. Its code may fail with proxies, as that of a norm's subclass does.
        return not module._modules or name in self.leaves or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self.proxies[node] = ref(proxy)
        return proxy


class Trace(NamedTuple):
    """One forward of a module.

    Attributes:
        graph: the calls of the forward.
        kept: values that the module still references after the forward.
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
    """Trace a call of `model` with these inputs. The state of the model does not change.

    Inputs of the types `CONSTANTS` and the defaults of omitted arguments reach the code as they are, so that it may branch on
    them. All other inputs become proxies.

    Args:
        leaves: names of modules that are not traced into, in addition to those of torch.nn.
        training: the mode of all modules; None leaves each in its own mode.

    Raises:
        Exception: anything that the model's code raises for proxies.
    """
    signature = inspect.signature(model.forward)
    arguments = signature.bind_partial(*inputs, **kwargs).arguments
    constants = {name: value for name, value in arguments.items() if isinstance(value, CONSTANTS)}
    for name, parameter in signature.parameters.items():
        if name not in arguments and parameter.default is not parameter.empty:
            constants[name] = parameter.default
    # Trace a twin that shares the tensors and has no hooks, so that attributes that the code sets are set there.
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():
        memo[id(module._forward_pre_hooks)] = OrderedDict()
        memo[id(module._forward_hooks)] = OrderedDict()
    twin = copy.deepcopy(model, memo)
    if training is not None:
        twin.train(training)
    tracer = _Tracer(leaves)
    graph = tracer.trace(twin, concrete_args=constants)
    return Trace(graph, {node for node, proxy in tracer.proxies.items() if proxy() is not None})


# ---- search ----


class Chain(NamedTuple):
    """The modules after a convolution.

    Attributes:
        owner: name of the module whose code calls the chain; ``""`` is the model itself.
        bn: name of the BatchNorm2d that is the only user of the convolution's output.
        relu: name of the ReLU that is the only user of bn's output, or None.
        escapes: whether owner returns bn's output. If so, only the caller of owner knows who uses it.
    """

    owner: str
    bn: str
    relu: str | None
    escapes: bool


class _NoChain(Exception):
    """Raised with the reason why a convolution starts no chain."""


class _Unclear(_NoChain):
    """Raised if the code of one module does not show the chain, but the code of a module around it may."""


def find_chains(
    model: nn.Module, names: Iterable[str], modes: Sequence[bool]
) -> tuple[dict[str, Chain], dict[str, str]]:
    """The chains that start with the modules `names`, and the reasons why the other modules start none, both by name.

    Args:
        modes: the values of ``training`` for which a chain must be the same.
    """

    @functools.cache
    def forward_of(owner: str, training: bool) -> Trace | str:
        try:
            return trace(model.get_submodule(owner), training=training)
        except Exception as problem:  # the model's code may raise anything
            return f"torch.fx cannot trace {owner or 'the model'}: {problem}"

    chains, reasons = {}, {}
    for name in names:
        try:
            chains[name] = _find_chain(model, name, modes, forward_of)
        except _NoChain as reason:
            reasons[name] = str(reason)
    return chains, reasons


def _find_chain(model: nn.Module, name: str, modes: Sequence[bool], forward_of: Callable) -> Chain:
    conv = model.get_submodule(name)
    if not _is_plain(conv, *_CONVS_2D):
        raise _NoChain(f"it is a {type(conv).__name__}, not a plain 2d convolution")
    if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        raise _NoChain("it has other hooks")
    # Start with the smallest module: it is often called on its own, and can be traced even if the whole model cannot.
    result, parts = None, name.split(".")
    while parts:
        owner = ".".join(parts := parts[:-1])
        try:
            chains = {
                _chain_in(model, owner, name, forward_of(owner, training)) for training in modes
            }
            if len(chains) > 1:
                raise _NoChain("training and evaluation use its output differently")
            (chain,) = chains
            if result is None or chain.relu:
                result = chain
            if not chain.escapes:
                break
        except _Unclear as reason:
            unclear = reason
        except _NoChain:
            if result is None:
                raise
            break
    if result is None:
        raise unclear
    return result


def _chain_in(model: nn.Module, owner: str, name: str, forward: Trace | str) -> Chain:
    if isinstance(forward, str):
        raise _Unclear(forward)
    prefix = f"{owner}." if owner else ""
    conv = forward.calls(name.removeprefix(prefix))
    if not conv:
        raise _Unclear(f"{owner or 'the model'} does not call it")
    if len(conv) > 1:
        raise _NoChain(f"it is called {len(conv)} times in one forward")

    user = forward.only_user(conv[0])
    if user is None:
        raise _NoChain(
            f"its output is not used by one BatchNorm2d alone, but by {forward.users(conv[0])}"
        )
    if user.op == "output":
        raise _Unclear(f"{owner or 'the model'} returns its output")
    if user.op != "call_module":
        raise _NoChain(f"its output is used by {user.name}, not by a BatchNorm2d")
    bn_name = prefix + user.target
    bn = model.get_submodule(bn_name)
    if not _is_plain(bn, nn.BatchNorm2d):
        raise _NoChain(
            f"its output is used by {bn_name}, which is a {type(bn).__name__}, not a plain BatchNorm2d"
        )
    if _is_watched(bn):
        raise _NoChain(f"{bn_name} has hooks")
    if (times := len(forward.calls(user.target))) > 1:
        raise _NoChain(f"{bn_name} is called {times} times in one forward")

    user = forward.only_user(user)
    relu = None
    if user is not None and user.op == "call_module":
        module = model.get_submodule(prefix + user.target)
        if _is_plain(module, nn.ReLU, PassingReLU) and not _is_watched(module):
            relu = prefix + user.target
    return Chain(owner, bn_name, relu, escapes=user is not None and user.op == "output")


# ---- execution ----

# Attributes that a tensor carries from one module of a chain to the next. They live as long as the tensor, and modules outside
# the chain ignore them.
_SHAPING = "_fastshape_shaping"  # on a convolution's output: how bn should shape it
_RECTIFIED = "_fastshape_rectified"  # on bn's output: the tensor version that is already rectified


class FusedBatchNorm2d(ShapedBatchNorm2d):
    """The class of a BatchNorm2d in a chain while `attach` is active. It shapes input that carries a shaping."""

    def forward(self, input: Tensor) -> Tensor:
        shaping = vars(input).pop(_SHAPING, None)
        if shaping is None:
            return nn.BatchNorm2d.forward(self, input)
        fusion, p_zero, mask, rng_state, inplace = shaping
        fusion.now.waiting = False
        relu = fusion.relu is not None and not _is_watched(fusion.relu)
        y = self._shaped(input, p_zero, mask, rng_state, relu, inplace)
        if relu and not y.is_inference():
            setattr(y, _RECTIFIED, y._version)
        return y


class PassingReLU(nn.ReLU):
    """The class of a ReLU in a chain while `attach` is active. It returns input that is already rectified as it is."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # compiled code fuses the ReLU anyway
            version = vars(input).get(_RECTIFIED)
            if version is not None and version == input._version:
                return input
        return super().forward(input)


class _Now(threading.local):
    """Where the forward of one thread is in a chain."""

    owner_runs: bool | None = None  # whether the owner runs as traced; None: it does not run
    waiting = False  # bn has not yet received the output that it should shape


class Fusion:
    """One chain of a model, which runs as one op while its owner runs.

    Without its owner, as when the convolution is called on its own, the user of the convolution's output is unknown.
    """

    def __init__(self, name: str, conv: nn.Module, bn: nn.Module, relu: nn.Module | None):
        self.name, self.conv, self.bn, self.relu = name, conv, bn, relu
        self.now = _Now()
        # The value of owner_runs when forward last called the convolution. Backward may run in another thread.
        self.owner_ran = False

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "now"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, now=_Now())

    def start(self, gradient: str) -> None:
        """Change the classes of bn and relu. The module objects stay, with their state and hooks."""
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
        # If another attachment uses the same ReLU, that attachment only loses speed.
        if type(self.relu) is PassingReLU:
            self.relu.__class__ = nn.ReLU

    def takes_over(self, again: bool) -> bool:
        """Whether bn may shape the output of this call: the owner runs, and no other hook sees the output.

        Args:
            again: backward repeats the call. The owner may not run then, because a checkpoint may cover only a part of it.
        """
        conv, owner_runs = self.conv, self.now.owner_runs
        if not again:
            self.owner_ran = bool(owner_runs)
        return (
            (self.owner_ran if again and owner_runs is None else owner_runs)
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
        """Let bn shape x."""
        setattr(x, _SHAPING, (self, p_zero, mask, rng_state, inplace))
        self.now.waiting = True


class Owner:
    """The hooks on a module whose code calls chains. They tell the chains whether the module runs.

    Args:
        model: the attached model. A copy of `module` without it has no chains.
    """

    def __init__(self, model: nn.Module, module: nn.Module, fusions: list[Fusion]):
        self.model, self.fusions = model, fusions
        self.inputs = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is parameter.empty
        ]

    def __deepcopy__(self, memo: dict) -> Owner:
        copied = memo[id(self)] = object.__new__(Owner)
        whole = id(self.model) in memo
        state = vars(self) if whole else {"model": None, "fusions": [], "inputs": self.inputs}
        vars(copied).update(copy.deepcopy(state, memo))
        return copied

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # With other arguments than it was traced with, the owner may run other code. torch.compile needs lists here.
        as_traced = len(args) + len(kwargs) == len(self.inputs)
        as_traced = as_traced and all([name in self.inputs for name in kwargs])
        as_traced = as_traced and not any(
            [isinstance(t, CONSTANTS) for t in (*args, *kwargs.values())]
        )
        for fusion in self.fusions:
            fusion.now.owner_runs, fusion.now.waiting = as_traced, False

    def end(self, module: nn.Module, args: tuple, output) -> None:
        for fusion in self.fusions:
            fusion.now.owner_runs = None
            if fusion.now.waiting and output is not None:  # None: the owner raised
                raise RuntimeError(
                    f"method='replace': the output of {fusion.name} did not reach its BatchNorm2d and is not shaped. If "
                    "nn.SyncBatchNorm.convert_sync_batchnorm or other code changed the model after attach, change it before, "
                    "or use method='hooks'"
                )
