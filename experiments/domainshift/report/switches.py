"""What the switches of a result say: its method, what sets two arms apart, what confounds them.

The method's class answers everything that depends on the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainshift.config import Config, choices, preset, preset_values
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, Method
from domainshift.records.results import Result
from domainshift.records.validate import method_of_record

PROTOCOL_DATA = "PACS"  # of every published protocol

# What the published rows of one protocol differ in, so that no value of it departs from them.
VARIED = ("layers", "after", "every", "p_zero")


def method_of(result: Result) -> type[Method]:
    """The method of a result: of AdaBN, which is a test of the baseline's training, AdaBN."""
    config = result.config
    for method in METHODS.values():
        if method.trains_as == config["mode"] and all(
            config.get(name) == value for name, value in method.defaults.items()
        ):
            return method
    return method_of_record(result.training)


def mode_of(result: Result) -> str:
    method = method_of(result)
    return method.name if method.trains_as else result.training.mode


def in_words(result: Result) -> str:
    """The method with its switches; of a method whose file is not loaded its name alone."""
    method, mode = method_of(result), mode_of(result)
    return method.words(result.config) if method.name == mode else mode


def method_values(result: Result) -> dict[str, Any]:
    """The switches that make an arm what it is: mode, options of the method, how it is tested."""
    own = {n: v for n, v in result.training.switches.items() if n not in Config.model_fields}
    test = result.evaluation
    return {"mode": mode_of(result)} | own | {"at_eval": test.at_eval, "bn_at_test": test.bn}


def other_values(result: Result) -> dict[str, Any]:
    """All other switches of the training. A difference in one of them confounds a comparison.

    Seed and domains are left out: they pair the results of two arms.
    """
    return {
        name: plain(name, value)
        for name, value in result.training.switches.items()
        if name in Config.model_fields and name not in ("mode", "source", "seed")
    }


def default_of(method: type[Method], name: str) -> Any:
    """A method's value of a switch that differs between arms; common ones have none."""
    if name in method.defaults:
        return method.defaults[name]
    if name == "bn_at_test":
        return Config.model_fields[name].default
    if name not in method.Options.model_fields:
        return "off" if name == "at_eval" else ...
    default = method.Options.model_fields[name].default
    return list(default) if isinstance(default, tuple) else default


def all_values(result: Result) -> dict[str, Any]:
    return method_values(result) | other_values(result)


def plain(name: str, value: Any) -> Any:
    """A switch's value as it is on every machine: of weights the file's name."""
    return Path(value).name if name == "weights" and isinstance(value, str) else value


def is_choice(result: Result, name: str) -> bool:
    """Whether a switch is on/off or has a few words as values, and is not the mode."""
    kind = Config if name in Config.model_fields else method_of(result).Options
    if name not in kind.model_fields or name == "mode":
        return False
    annotation = kind.model_fields[name].annotation
    return annotation is bool or bool(choices(annotation))


def words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(words, value)) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """'name a -> b' by name, for each value in which two results differ."""
    names = dict.fromkeys([*before, *after])
    values = {name: (before.get(name), after.get(name)) for name in names}
    return {n: f"{n} {words(x)} -> {words(y)}" for n, (x, y) in values.items() if x != y}


def departures(result: Result, but: Sequence[str] = (), protocol: str | None = None) -> list[str]:
    """'name value (protocol: value)' where a result is not of the published protocol of its preset.

    The project's own preset follows no published protocol: only its data and weights can be less than
    whole. A preset has a protocol for the switches of a method, at_eval among them, if it sets some.
    `VARIED` and `but` are not looked at, nor is what a method sets by itself, as AdaBN bn_at_test.

    Args:
        protocol: another preset than the result's own.
    """
    name = protocol or result.training.places["preset"]
    mode, method = result.training.mode, method_of(result)
    try:
        given = preset_values(name, mode)
    except ConfigError:
        return []
    values = all_values(result) | {"data": result.training.data}
    has_method = mode in preset(name).get("modes", {})
    compared = [n for n in values if n == "data" or n in Config.model_fields or has_method]
    if name == Config.model_fields["preset"].default:
        compared = ["data", "limit", "image_size", "weights"]
    right = {n: field.default for n, field in Config.model_fields.items()}
    right |= {n: default_of(method, n) for n in method.Options.model_fields}
    right |= given | {"data": PROTOCOL_DATA}
    skipped = {"mode", *VARIED, *but, *method.defaults}
    return [
        f"{n} {words(values[n])} (protocol: {words(right[n])})"
        for n in compared
        # of amp a preset may say auto: float16 on a GPU and off without one is no departure
        if n not in skipped and right.get(n) not in (values[n], "auto")
    ]
