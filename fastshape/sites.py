"""Selects modules of a model by number, name, pattern or kind."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from numbers import Integral

from torch import nn

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Hardtanh,
)  # fmt: skip
KINDS = {
    "conv": nn.modules.conv._ConvNd,
    "bn": nn.modules.batchnorm._BatchNorm,
    "relu": _ACTIVATIONS,
}


def modules_of_kind(model: nn.Module, kind: str) -> list[str]:
    """Names of the model's convolutions, batch norms or activations, in ``named_modules()`` order.

    Layer k of the published reports is entry k - 1. For ``"conv"`` in ResNet-18, 1 is conv1, 20 is layer4.1.conv2, and 8, 13
    and 18 are the downsample convolutions.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"after={kind!r}: allowed are {', '.join(KINDS)}")
    return [name for name, module in model.named_modules() if isinstance(module, KINDS[kind])]


def _by_number(number: int, candidates: Sequence[str], kind: str) -> str:
    if not 1 <= number <= len(candidates):
        listing = ", ".join(f"{k} {name}" for k, name in enumerate(candidates, 1)) or "none"
        raise ValueError(f"layers: there is no {kind} {number}; this model has {listing}")
    return candidates[number - 1]


def _by_name(text: str, modules: dict[str, str], candidates: Sequence[str], kind: str) -> list[str]:
    if text and text in modules:
        return [modules[text]]
    if any(sign in text for sign in "*?["):
        matches = [name for name in candidates if fnmatch.fnmatchcase(name, text)]
        if matches:
            return matches
        listing = ", ".join(candidates) or "none"
        raise ValueError(f"layers: pattern {text!r} matches no {kind}; this model has {listing}")
    listing = ", ".join(name for name in modules if name)
    raise ValueError(f"layers: there is no module {text!r}; this model has {listing}")


def choose_layers(
    model: nn.Module,
    layers: int | str | Iterable[int | str],
    *,
    after: str = "conv",
    every: int = 1,
) -> tuple[str, ...]:
    """Names of the chosen modules, in the order of `layers`.

    Args:
        layers: numbers (which count the modules of kind `after` from 1), module names, shell patterns for the names of that
            kind, a list of these, or ``"all"``.
        after: ``"conv"``, ``"bn"`` or ``"relu"`` (any activation module).
        every: keep every `every`-th module of `layers`.

    Raises:
        ValueError: a kind, number or name is unknown (the message lists the known ones), a pattern matches nothing, a module
            is named twice, or no module is left.
        TypeError: an entry is neither int nor str.
    """
    candidates = modules_of_kind(model, after)
    # A module that has several names goes by its first.
    first_names = {module: name for name, module in model.named_modules()}
    modules = {n: first_names[m] for n, m in model.named_modules(remove_duplicate=False)}
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: must be an int of at least 1")
    if not isinstance(layers, (Integral, str, Iterable)):
        raise TypeError(
            f"layers={layers!r}: must be numbers, names, patterns, a list of these, or 'all'"
        )
    entries = [layers] if isinstance(layers, (Integral, str)) else list(layers)
    result: list[str] = []
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (Integral, str)):
            raise TypeError(f"layers: {entry!r} is neither a number, a name nor a pattern")
        if entry == "all":
            names = candidates
        elif isinstance(entry, Integral):  # numpy's numbers too
            names = [_by_number(entry, candidates, after)]
        else:
            names = _by_name(entry, modules, candidates, after)
        for name in names:
            if name in result:
                raise ValueError(f"layers: {name!r} is named twice (again by {entry!r})")
            result.append(name)
    result = result[every - 1 :: every]
    if not result:
        raise ValueError(
            f"layers={layers!r}, after={after!r}, every={every}: nothing to shape; "
            f"this model has {len(candidates)} modules of kind {after}"
        )
    return tuple(result)
