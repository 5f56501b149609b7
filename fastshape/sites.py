"""Selects modules of a model by number, name, pattern, module or kind."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Literal, SupportsIndex, cast, get_args

from torch import nn

from .rng import brief

Kind = Literal["conv", "bn", "relu"]
Layer = SupportsIndex | str | nn.Module  # one entry: a number, a name or pattern, or a module

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Hardtanh,
)  # fmt: skip
KINDS: dict[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "conv": nn.modules.conv._ConvNd,
    "bn": nn.modules.batchnorm._BatchNorm,
    "relu": _ACTIVATIONS,
}
_WORDS = {"conv": "conv", "bn": "BatchNorm", "relu": "activation"}


def modules_of_kind(model: nn.Module, kind: Kind) -> list[str]:
    """Names of the model's convolutions, batch norms or activations, in ``named_modules()`` order.

    Layer k of the published reports is entry k - 1. For ``"conv"`` in ResNet-18, 1 is conv1, 20 is layer4.1.conv2, and 8, 13
    and 18 are the downsample convolutions.

    Raises:
        ValueError: the kind is unknown.
        TypeError: the kind is not a str.
    """
    if not isinstance(kind, str):
        raise TypeError(f"after={brief(kind)}: must be one of {_listed(get_args(Kind))}")
    if kind not in KINDS:
        raise ValueError(f"after={brief(kind)}: allowed are {', '.join(KINDS)}")
    return [name for name, module in model.named_modules() if isinstance(module, KINDS[kind])]


def choose_layers(
    model: nn.Module,
    layers: Layer | Iterable[Layer],
    *,
    after: Kind = "conv",
    every: int = 1,
) -> tuple[str, ...]:
    """Names of the chosen modules, in the order of `layers`. A module that has several names goes by its first.

    Args:
        layers: numbers (which count the modules of kind `after` from 1), names of any modules, shell patterns for the names
            of that kind, modules of `model`, an iterable of these (numpy's numbers and arrays too), or ``"all"``. Of a
            mapping its keys count.
        after: ``"conv"``, ``"bn"`` or ``"relu"`` (any activation module).
        every: keep every `every`-th module of `layers`.

    Raises:
        ValueError: a kind, number or name is unknown (the message says which are known or close), a pattern matches nothing,
            a module is not one of `model`, a module is chosen twice, or no module is left.
        TypeError: an argument or an entry of `layers` has a wrong type.
    """
    candidates = modules_of_kind(model, after)
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every={brief(every)}: must be an int of at least 1")
    first_names = {module: name for name, module in model.named_modules()}
    names = {n: first_names[m] for n, m in model.named_modules(remove_duplicate=False)}
    chosen: list[str] = []
    for entry in _entries(layers):
        of_entry: Sequence[str]
        if isinstance(entry, nn.Module):
            of_entry = [_by_module(entry, first_names, model)]
        elif isinstance(entry, Integral) and not isinstance(entry, bool):  # numpy's numbers too
            of_entry = [_by_number(int(entry), candidates, after)]
        elif not isinstance(entry, str):
            raise TypeError(
                f"layers: {brief(entry)} is neither an int, a name, a pattern nor a module"
            )
        elif entry == "all":
            of_entry = candidates
        elif any(sign in entry for sign in "*?[") and entry not in names:
            of_entry = _by_pattern(entry, names, candidates, after, model)
        else:
            of_entry = [_by_name(entry, names, first_names, model)]
        for name in of_entry:
            if name in chosen:
                raise ValueError(f"layers: {name!r} is named twice (again by {brief(entry)})")
            chosen.append(name)
    kept = tuple(chosen[every - 1 :: every])
    if not kept:
        raise ValueError(
            f"layers={brief(layers)}, after={after!r}, every={every}: nothing to shape; "
            f"this model has {len(candidates)} modules of kind {after}"
        )
    return kept


def _entries(layers: Layer | Iterable[Layer]) -> list[Layer]:
    if callable(tolist := getattr(layers, "tolist", None)):  # numpy's arrays, and tensors
        layers = cast("Layer | Iterable[Layer]", tolist())
    if isinstance(layers, nn.ModuleList):  # it never runs itself
        return list(layers)
    if isinstance(layers, Integral | str | nn.Module):
        return [cast(Layer, layers)]
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers={brief(layers)}: must be numbers, names, patterns, modules, a list of these, or 'all'"
        )
    return list(layers)


def _by_number(number: int, candidates: Sequence[str], kind: Kind) -> str:
    if 1 <= number <= len(candidates):
        return candidates[number - 1]
    word, count = _WORDS[kind], len(candidates)
    known = f"{word}s 1 to {count}" if count > 1 else f"only {word} 1" if count else f"no {word}"
    raise ValueError(f"layers: there is no {word} {number}; this model has {known}")


def _by_module(module: nn.Module, first_names: dict[nn.Module, str], model: nn.Module) -> str:
    if module is model:
        raise ValueError(
            f"layers: {brief(module)} is the model itself; only modules inside it can be chosen"
        )
    if module not in first_names:
        raise ValueError(
            f"layers: {brief(module)} is not a module of this model, which is a {type(model).__name__}"
        )
    return first_names[module]


def _by_name(
    name: str, names: dict[str, str], first_names: dict[nn.Module, str], model: nn.Module
) -> str:
    if name in names and name:
        return names[name]
    try:  # a wrapper such as that of torch.compile finds modules under more names than it lists
        module = model.get_submodule(name)
    except AttributeError:
        module = model
    if module is not model and module in first_names:
        return first_names[module]
    raise ValueError(f"layers: there is no module {brief(name)}; {_close_names(name, names)}")


def _by_pattern(
    pattern: str, names: dict[str, str], candidates: Sequence[str], kind: Kind, model: nn.Module
) -> list[str]:
    matched = {first for name, first in names.items() if fnmatch.fnmatchcase(name, pattern)}
    if of_kind := [name for name in candidates if name in matched]:
        return of_kind
    message = f"layers: pattern {brief(pattern)} matches no {_WORDS[kind]}; "
    counts = {other: len(matched & set(modules_of_kind(model, other))) for other in get_args(Kind)}
    hints = [
        f"after={other!r} gives the {_counted(count, _WORDS[other])} that it matches"
        for other, count in counts.items()
        if count
    ]
    if hints:
        raise ValueError(message + " and ".join(hints))
    if others := sorted(matched - {""}):
        raise ValueError(
            f"{message}it matches modules of other kinds ({_listed(others[:3])}), which can be given by name"
        )
    raise ValueError(message + _close_names(pattern, names))


def _close_names(text: str, names: Iterable[str]) -> str:
    names = [name for name in names if name]
    inner = [name for name in names if name.endswith(f".{text}")]
    close = list(dict.fromkeys(inner + difflib.get_close_matches(text, names, n=3)))[:3]
    if close:
        return f"close names are {_listed(close)}"
    if not names:
        return "this model has no modules inside"
    return "no name in it is close; model.named_modules() lists them all"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count > 1 else ''}"
