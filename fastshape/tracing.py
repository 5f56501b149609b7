"""How often a model calls its modules in one forward, from its code, without running it."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import fx, nn

# Tracing passes arguments of these types to the code as they are, so that it may branch on them.
CONSTANTS = (type(None), bool, int, float, complex, str)

_IGNORED = frozenset(vars(nn.Module())) - {
    "training"
}  # what every module has, and is no state of its code
_TRACES = 32  # of one model; one that changes with every call is not worth more


class CallCounts:
    """Counts the calls of the modules `names` in one forward of a model.

    A count is certain for the state of the model and the constants among the inputs for which it was made: training flags and
    all attributes of modules that are numbers, strings and the like. Other counts are None: where the code cannot be traced,
    draws random numbers, changes its class, or branches on values of tensors. Globals of a program are not looked at.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.counts: dict = {}  # by state
        self.traces = 0

    def of(self, model: nn.Module, inputs: Sequence, kwargs: Mapping) -> int | None:
        try:
            state = _state_of(model, inputs, kwargs)
        except _Unknown:
            return None
        if state not in self.counts:
            if self.traces == _TRACES:
                return None
            self.traces += 1
            self.counts[state] = self._count(model, inputs, kwargs)
        return self.counts[state]

    def _count(self, model: nn.Module, inputs: Sequence, kwargs: Mapping) -> int | None:
        try:
            with _generators_restored() as code_drew, _classes_restored(model) as code_wrote:
                graph = trace(model, self.names, inputs, kwargs)
                if code_drew() or code_wrote():
                    return None
        except Exception:  # the model's code may raise anything
            return None
        return sum(n.op == "call_module" and n.target in self.names for n in graph.nodes) or None


# ---- state ----


class _Unknown(Exception):
    """Raised for an attribute that may change unseen."""


def _state_of(model: nn.Module, inputs: Sequence, kwargs: Mapping) -> tuple:
    """Everything that the code may branch on, hashable."""
    values: list[object] = [(k, v if isinstance(v, CONSTANTS) else ...) for k, v in kwargs.items()]
    values += [t if isinstance(t, CONSTANTS) else ... for t in inputs]
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _IGNORED:
                values.append((name, _frozen(value)))
    return tuple(values)


def _frozen(value, depth: int = 4):
    if isinstance(value, (*CONSTANTS, bytes, torch.dtype, torch.device, torch.Size)):
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        return (id(value), None if value.is_inference() else value._version)
    if isinstance(value, nn.Module) or callable(value):
        return id(value)
    if depth == 0:
        raise _Unknown
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return (type(value), *(_frozen(item, depth - 1) for item in items))
    if isinstance(value, Mapping):
        return (type(value), *((repr(k), _frozen(v, depth - 1)) for k, v in value.items()))
    if hasattr(value, "__dict__"):
        return (id(value), _frozen(vars(value), depth - 1))
    raise _Unknown


def _generators() -> list[tuple[Callable, object, bytes]]:
    """For each generator that code may draw from: what sets its state, the state, and the state to compare."""
    result: list[tuple[Callable, object, bytes]] = []
    python, numpy = random.getstate(), sys.modules.get("numpy")
    result.append((random.setstate, python, pickle.dumps(python)))
    if numpy is not None:
        state = numpy.random.get_state()
        result.append((numpy.random.set_state, state, pickle.dumps(state)))
    cpu = torch.get_rng_state()
    result.append((torch.set_rng_state, cpu, cpu.numpy().tobytes()))
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        compared = b"".join(s.cpu().numpy().tobytes() for s in states)
        result.append((torch.cuda.set_rng_state_all, states, compared))
    return result


@contextmanager
def _generators_restored() -> Iterator[Callable[[], bool]]:
    """Puts the state of every generator back. Gives a function that tells whether code has drawn from one."""
    before = _generators()
    try:
        yield lambda: [drawn for *_, drawn in _generators()] != [drawn for *_, drawn in before]
    finally:
        for setter, state, _ in before:
            setter(state)


@contextmanager
def _classes_restored(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Puts back numbers and strings that belong to the classes of modules. Gives a function that tells whether code set one."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    before = {
        (cls, name): value
        for cls in classes
        if not cls.__module__.startswith(("torch.", "builtins"))
        for name, value in vars(cls).items()
        if isinstance(value, CONSTANTS) and not name.startswith("__")
    }

    def changed() -> list[tuple[type, str]]:
        return [(c, n) for (c, n), value in before.items() if vars(c).get(n) is not value]

    try:
        yield lambda: bool(changed())
    finally:
        for cls, name in changed():
            setattr(cls, name, before[cls, name])


# ---- tracing ----


class _Tracer(fx.Tracer):
    # The code gets proxies for parameters and buffers, and cannot branch on their values or write to them.
    proxy_buffer_attributes = True

    def __init__(self, leaves: Sequence[str]):
        super().__init__()
        self.leaves = frozenset(leaves)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # Code of a module without submodules calls none, and may fail with proxies, as that of a norm's subclass does.
        return not module._modules or name in self.leaves or super().is_leaf_module(module, name)


def trace(
    model: nn.Module,
    leaves: Sequence[str] = (),
    inputs: Sequence = (),
    kwargs: Mapping = MappingProxyType({}),
) -> fx.Graph:
    """The calls of one forward of `model` with these inputs. The model does not change: a copy without values is traced.

    Inputs of the types `CONSTANTS` and the defaults of omitted arguments reach the code as they are. All other inputs are
    proxies.

    Args:
        leaves: names of modules that are not traced into, in addition to those of torch.nn.

    Raises:
        Exception: anything that the model's code raises for proxies.
    """
    signature = inspect.signature(model.forward)
    arguments = signature.bind_partial(*inputs, **kwargs).arguments
    constants = {name: value for name, value in arguments.items() if isinstance(value, CONSTANTS)}
    for name, parameter in signature.parameters.items():
        if name not in arguments and parameter.default is not parameter.empty:
            constants[name] = parameter.default
    memo: dict[int, object] = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=False)
        for t in model.parameters()
    }
    memo |= {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    for module in model.modules():  # hooks see no proxies
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            memo[id(hooks)] = OrderedDict()
    return _Tracer(leaves).trace(copy.deepcopy(model, memo), concrete_args=constants)
