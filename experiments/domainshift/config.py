"""The switches of a run: what each means, which values it takes, where its value comes from.

`Config` holds the switches that every method has. The switches of one method are its `Options`
(see `domainshift.methods`), and `Config.options` holds them. A switch has a role:

    training   it decides what is trained, so it is part of the key of a training
    testing    only a test reads it: one training serves all its values
    place      it decides where and how fast, not what: it is part of no key

`resolve` merges the sources of values; later ones win: defaults of the switches, the preset, the
defaults of the data set, the method's own, and the values that the user gave.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Union,
    get_args,
    get_origin,
)

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from domainshift import files
from domainshift.errors import ConfigError

if TYPE_CHECKING:  # --help needs no torch, which takes seconds to import
    import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = REPOSITORY / "experiments" / "presets"

PATCH = 16  # side, in pixels, of the patches that target_transform shuffled puts in random order

# --- types of values --------------------------------------------------------------------------


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _several(value: Any) -> Any:
    """One value, a list, or text with commas between the values, as a list."""
    parts = []
    for part in value if isinstance(value, list | tuple) else [value]:
        parts += (
            [p.strip() for p in part.split(",") if p.strip()] if isinstance(part, str) else [part]
        )
    return parts


def _layer(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a layer is a number or text")
    return int(value) if str(value).lstrip("-").isdigit() else value


Whole = Annotated[int, BeforeValidator(_no_bool), Ge(1)]
FromZero = Annotated[int, BeforeValidator(_no_bool), Ge(0)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Probability = Annotated[Number, Ge(0), Lt(1)]
Share = Annotated[Number, Gt(0), Le(1)]
Text = Annotated[
    str, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v), Field(min_length=1)
]
Names = Annotated[tuple[Text, ...], BeforeValidator(_several)]
Layers = Annotated[
    tuple[Annotated[int | str, BeforeValidator(_layer)], ...], BeforeValidator(_several)
]
Probabilities = Annotated[tuple[Probability, ...], BeforeValidator(_several)]

Role = Literal["training", "testing", "place"]


def switch(
    default: Any, help: str, *, role: Role = "training", group: str = "method", allowed: str = ""
) -> Any:
    """A field of `Switches`. `allowed` replaces the words that its type gives."""
    extra = {"role": role, "group": group, "allowed": allowed}
    return Field(default, description=help, json_schema_extra=extra)


class FromYaml(BaseModel):
    """Frozen values that may come from YAML; unknown names and values out of range are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _yaml_on_off(cls, values: Any) -> Any:
        """YAML reads a bare on or off as true or false; a value with these words means the words."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, value in values.items():
            words = choices(cls.model_fields[name].annotation) if name in cls.model_fields else ()
            if isinstance(value, bool) and {"on", "off"} & set(words):
                values[name] = "on" if value else "off"
        return values


class Switches(FromYaml):
    """A set of switches."""

    @classmethod
    def names(cls, *roles: Role) -> tuple[str, ...]:
        """Its switches, or those of some roles."""
        return tuple(
            n for n in cls.model_fields if n != "options" and (not roles or role(cls, n) in roles)
        )


def role(kind: type[Switches], name: str) -> Role:
    return kind.model_fields[name].json_schema_extra["role"]


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a `Literal` allows, also inside Optional and Annotated; () for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next((c for a in get_args(annotation) if (c := choices(a))), ())
    return ()


def allowed_words(kind: type[Switches], name: str) -> str:
    """Which values a switch takes, in words."""
    field = kind.model_fields[name]
    return field.json_schema_extra["allowed"] or _words(name, field.annotation, field.metadata)


def _words(name: str, annotation: Any, metadata: Sequence[Any] = ()) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return _words(name, inner, [*extra, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        arms = [a for a in get_args(annotation) if a is not type(None)]
        return _words(name, arms[0], metadata) if len(arms) == 1 else "a number or text"
    if words := choices(annotation):
        return " | ".join(words)
    if get_origin(annotation) is tuple:
        return f"{_words(name, get_args(annotation)[0])}; one or several"
    if annotation is bool:
        return "true | false"
    if annotation is str:
        return "text"
    flat = [m for entry in metadata for m in getattr(entry, "metadata", [entry])]
    low = next(
        (
            f"{m.ge:g} <=" if isinstance(m, Ge) else f"{m.gt:g} <"
            for m in flat
            if isinstance(m, Ge | Gt)
        ),
        "",
    )
    high = next(
        (
            f"<= {m.le:g}" if isinstance(m, Le) else f"< {m.lt:g}"
            for m in flat
            if isinstance(m, Le | Lt)
        ),
        "",
    )
    kind = "a whole number" if annotation is int else "a number"
    if low and high:
        return f"{low} {name} {high}" + (", a whole number" if annotation is int else "")
    if low:
        return f"{kind} " + ("from " if "=" in low else "above ") + low.split()[0]
    return kind


# --- the switches of every run ----------------------------------------------------------------


class Config(Switches):
    """The switches of a run. The defaults are the common protocol of both published reports."""

    mode: Text = switch("baseline", "the method", group="method")
    options: Switches = Field(default_factory=Switches)
    preset: Text = switch(
        "fastshape",
        "where the values of all other switches come from",
        role="place",
        group="method",
    )
    method_file: Text | None = switch(
        None, "a Python file with a method of your own, for --mode", role="place", group="method"
    )
    source: Text = switch("art_painting", "labelled domain to train on", group="data")
    target: Names = switch(
        ("sketch",),
        "domains to test on; a method that uses target images trains once for each",
        role="testing",
        group="data",
    )

    data: Text | None = switch(
        None,
        "a folder <domain>/<class>/<image>, or toy (drawn images); none: data/PACS, else toy",
        role="place",
        group="data",
    )
    limit: Whole | None = switch(
        None, "use only this many images per class of each domain", group="data"
    )
    image_size: Annotated[int, BeforeValidator(_no_bool), Ge(32), Le(1024)] = switch(
        224, "side of the network's input, in pixels", group="data"
    )
    holdout: Annotated[Number, Ge(0), Le(0.5)] = switch(
        0.0, "part of the source that is tested on and not trained on", group="data"
    )
    cache: Text | None = switch(
        None, "folder for decoded images; none: data/cache", role="place", group="data"
    )

    bn_at_test: Literal["trained", "source", "target"] = switch(
        "trained",
        "BatchNorm statistics while testing: those of training; measured on the source's training "
        "images, shaped as in the test; measured on the tested domain's images (AdaBN)",
        role="testing",
        group="testing",
    )
    test_set: Literal["target", "source-train"] = switch(
        "target",
        "source-train: also test on the source's own training images, as report A did by mistake; "
        "that figure is invalid and labelled so",
        role="testing",
        group="testing",
    )
    evaluate: Annotated[Text, BeforeValidator(lambda v: str(v) if type(v) is int else v)] = switch(
        "last",
        "when to test: after the last epoch, after each, or after every N-th and the last; before the "
        "last, targets are tested with --bn-at-test alone",
        role="testing",
        group="testing",
        allowed="last | each | a whole number from 1",
    )

    model: Text = switch(
        "resnet18", "a torchvision classifier, resnet18-slim, or timm:NAME", group="network"
    )
    weights: Text = switch(
        "imagenet", "initial weights: imagenet, none, or a file of a state dict", group="network"
    )

    epochs: Whole | None = switch(
        30, "passes over the source; null where --updates sets the length", group="optimization"
    )
    updates: Whole | None = switch(
        None,
        "optimizer steps in all, in place of --epochs; the last epoch may be cut short",
        group="optimization",
    )
    batch_size: Whole = switch(
        128, "source images per update, in all processes together", group="optimization"
    )
    accumulate: Whole = switch(
        1,
        "split each update over this many passes; BatchNorm then sees the smaller parts",
        group="optimization",
    )
    lr: Positive = switch(1e-3, "learning rate of SGD", group="optimization")
    momentum: Probability = switch(0.9, "momentum of SGD", group="optimization")
    nesterov: bool = switch(True, "Nesterov's form of momentum", group="optimization")
    weight_decay: NotNegative = switch(5e-4, "L2 penalty on all parameters", group="optimization")
    step_fraction: Share = switch(
        0.8,
        "the learning rate drops every int(step_fraction * epochs) epochs, or as many updates of "
        "--updates",
        group="optimization",
    )
    gamma: Share = switch(0.1, "factor of that drop", group="optimization")
    amp: Literal["auto", "off", "float16", "bfloat16"] = switch(
        "auto",
        "autocast in training and testing; auto: float16 on CUDA, bfloat16 on a CPU with "
        "instructions for it, else off",
        group="optimization",
    )
    seed: Annotated[FromZero, Lt(2**64)] = switch(  # torch's generators take no more
        0,
        "seed of weights, data order, augmentation and maps",
        group="optimization",
        allowed="a whole number from 0 to 2**64 - 1",
    )

    device: Text = switch("auto", "auto | cpu | cuda | cuda:N", role="place", group="machine")
    pipeline: Literal["auto", "device", "reference"] = switch(
        "auto",
        "reference: torchvision crops images one by one on the CPU; device: a whole batch is cropped "
        "where training runs, pixels at most 1/255 apart; auto: device on CUDA",
        role="place",
        group="machine",
    )
    workers: Annotated[int, BeforeValidator(_no_bool), Ge(0), Le(64)] = switch(
        0, "loader processes of the reference pipeline", role="place", group="machine"
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = switch(
        "auto",
        "of weights and images; auto: channels_last on CUDA and with bfloat16, else contiguous",
        role="place",
        group="machine",
    )
    log: Literal["none", "tensorboard", "wandb"] = switch(
        "none",
        "also write curves for TensorBoard or Weights & Biases",
        role="place",
        group="machine",
    )
    out: Text | None = switch(
        None,
        "run folder; none: runs/ and a name from the switches",
        role="place",
        group="machine",
    )

    # --- values -----------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """All switches, the method's among them, as plain values for YAML and JSON.

        Paths inside the repository are relative to it, so a record names nothing of its machine.
        """
        values = self.model_dump(exclude={"options"}) | self.options.model_dump()
        for name in ("data", "weights", "cache", "method_file"):
            path = values[name]
            if path is not None and Path(path).is_relative_to(REPOSITORY):
                values[name] = Path(path).relative_to(REPOSITORY).as_posix()
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def training_values(self) -> dict[str, Any]:
        """The switches of role training, as plain values."""
        names = {*self.names("training"), *self.options.names("training")}
        return {name: value for name, value in self.as_dict().items() if name in names}

    def length(self, images: int) -> tuple[int, int]:
        """Epochs (the last one perhaps cut short) and updates of a training on that many images."""
        per_epoch = -(-images // self.batch_size)
        if self.updates is not None:
            return -(-self.updates // per_epoch), self.updates
        return self.epochs, self.epochs * per_epoch

    def tests_after(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch (from 1) is followed by tests."""
        if epoch == epochs or self.evaluate == "each":
            return True
        return self.evaluate != "last" and epoch % int(self.evaluate) == 0

    def tests(self) -> list[Test]:
        """What these switches ask to be tested, in the order of the record: the targets first.

        Beside each target stands the held-out part of the source, if there is one, and the source's
        training images with --test-set source-train. Statistics of a target never serve the source.
        """
        at_eval = getattr(self.options, "at_eval", "off")
        tests = [Test(domain=t, at_eval=at_eval, bn=self.bn_at_test) for t in self.target]
        of_source = "trained" if self.bn_at_test == "target" else self.bn_at_test
        for images, wanted in (("holdout", self.holdout > 0), ("train", self.test_set != "target")):
            if wanted:
                tests.append(Test(domain=self.source, images=images, at_eval=at_eval, bn=of_source))
        return tests


class Test(FromYaml):
    """How a checkpoint is tested: on which images, shaped how, with which BatchNorm statistics."""

    __test__: ClassVar[bool] = False  # pytest: not a test case

    domain: str = Field(description="the domain that is tested")
    images: Literal["all", "holdout", "train"] = Field(
        "all", description="all of them, or one part of the source's: held out, or trained on"
    )
    at_eval: Literal["off", "binarize", "on"] = Field("off", description="shaping while testing")
    bn: Literal["trained", "source", "target"] = Field(
        "trained", description="BatchNorm as trained, measured on the source, or on the domain"
    )

    @property
    def name(self) -> str:
        """For file names: sketch, art_painting-holdout, sketch-shaping-on, sketch-bn-target."""
        parts = [self.domain]
        parts += [self.images] if self.images != "all" else []
        parts += [f"shaping-{self.at_eval}"] if self.at_eval != "off" else []
        parts += [f"bn-{self.bn}"] if self.bn != "trained" else []
        return "-".join(parts)


def hash_of(value: Any) -> str:
    """SHA-256, in hex, of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


# --- presets ----------------------------------------------------------------------------------


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """The files of experiments/presets by name."""
    return {path.stem: files.read_yaml(path) for path in sorted(PRESETS.glob("*.yaml"))}


def preset(name: str) -> dict[str, Any]:
    """What a preset sets: `about`, `values`, `modes` (values by mode) and perhaps `only`."""
    if not isinstance(name, str) or name not in presets():
        raise ConfigError(f"preset: {name!r} is not allowed; allowed: {' | '.join(presets())}")
    return presets()[name]


def preset_values(name: str, mode: str) -> dict[str, Any]:
    """The values that a preset gives a mode. Raises ConfigError for a mode that it never ran."""
    content = preset(name)
    only = content.get("only")
    if only is not None and mode not in only:
        allowed = " | ".join(only)
        raise ConfigError(f"mode: {mode!r} is not in preset {name}; allowed: {allowed}")
    return content.get("values", {}) | content.get("modes", {}).get(mode, {})


# --- from values to a configuration -----------------------------------------------------------


class MethodLike(Protocol):
    """What `resolve` asks of a method class (see `domainshift.methods.base.Method`)."""

    name: str
    Options: type[Switches]
    defaults: Mapping[str, Any]

    @classmethod
    def settle(cls, values: dict[str, Any], given: Mapping[str, Any]) -> None: ...

    @classmethod
    def check(cls, config: Config, refuse: Callable[[str, str], None]) -> list[str]: ...


class DataLike(Protocol):
    """What `resolve` asks of a data set (see `domainshift.data.folder.DataSet`)."""

    name: str
    domains: Sequence[str]
    defaults: Mapping[str, Any]
    remarks: Sequence[str]


class Resolved(NamedTuple):
    config: Config
    warnings: list[str]


def resolve(given: Mapping[str, Any], method: MethodLike, data: DataLike) -> Resolved:
    """The configuration that follows from the values that the user gave.

    Args:
        given: values by switch, as text or as YAML has them. `mode` is that of `method`.
        method: class of the method; its options are switches too.
        data: the data set that the switch `data` names.

    Returns:
        A configuration without any "auto" left, and the warnings that its record must carry.

    Raises ConfigError, which names the switch, the value and what is allowed.
    """
    kinds = (Config, method.Options)
    for name in given:
        if not any(name in kind.names() for kind in kinds):
            known = ", ".join(sorted({n for kind in kinds for n in kind.names()}))
            raise ConfigError(f"{name}: mode {method.name} has no such switch; it has {known}")
    values = {name: default for kind in kinds for name, default in defaults(kind).items()}
    name = given.get("preset", values["preset"])
    values |= preset_values(name, method.name)
    replaced = {
        n: v for n, v in data.defaults.items() if n not in given and n in values and values[n] != v
    }
    if given.get("updates") is not None:
        replaced.pop("epochs", None)
    values |= replaced | {n: v for n, v in method.defaults.items() if n not in data.defaults}
    values |= {"mode": method.name}
    method.settle(values, given)
    if given.get("updates") is not None:
        values["epochs"] = None
    values |= given
    warnings = list(data.remarks)
    if replaced:
        listing = ", ".join(f"{k} {shortened(v)}" for k, v in replaced.items())
        warnings.append(
            f"defaults of data set {data.name} replace those of preset {name}: {listing}"
        )

    config = validated(values, method)
    config = config.model_copy(update=_places(config))
    warnings += check(config, method, data)
    return Resolved(config, list(dict.fromkeys(warnings)))


def shortened(value: Any) -> Any:
    """A path without its folders, other values as they are."""
    return Path(value).name if isinstance(value, str) and os.sep in value else value


def defaults(kind: type[Switches]) -> dict[str, Any]:
    return {name: kind.model_fields[name].default for name in kind.names()}


def validated(values: Mapping[str, Any], method: MethodLike) -> Config:
    """A Config of plain values, each of which is checked. Raises ConfigError."""
    try:
        options = method.Options(**{n: values[n] for n in method.Options.names() if n in values})
        config = Config(**{n: values[n] for n in Config.names() if n in values}, options=options)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        kind = Config if name in Config.names() else method.Options
        value = values[name]
        value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        raise ConfigError(
            f"{name}: {value!r} is not allowed; allowed: {allowed_words(kind, name)}"
        ) from None
    if config.evaluate not in ("last", "each") and not (
        config.evaluate.isdigit() and int(config.evaluate) > 0
    ):
        allowed = allowed_words(Config, "evaluate")
        raise ConfigError(f"evaluate: {config.evaluate!r} is not allowed; allowed: {allowed}")
    return config


def _places(config: Config) -> dict[str, Any]:
    """The switches that depend on the machine, with every "auto" decided."""
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    values: dict[str, Any] = {"device": str(device)}
    if config.data is not None and config.data != "toy":
        values["data"] = absolute(config.data)
    if config.weights not in ("imagenet", "none"):
        values["weights"] = absolute(config.weights)
    if config.method_file is not None:
        values["method_file"] = absolute(config.method_file)
    if config.amp == "auto":
        values["amp"] = "float16" if cuda else "bfloat16" if cpu_has_bfloat16() else "off"
    amp = values.get("amp", config.amp)
    if config.pipeline == "auto":
        values["pipeline"] = "device" if cuda else "reference"
    if config.memory_format == "auto":
        last = cuda or amp == "bfloat16"
        values["memory_format"] = "channels_last" if last else "contiguous"
    return values


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by itself (avx512_bf16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def absolute(path: str) -> str:
    """`path` from the root on, so that a run can be resumed from another folder.

    A relative path that is not in the working folder is one in the repository, as records have it.
    """
    given = Path(os.path.expanduser(path))  # leaves a ~ that cannot be resolved
    within = REPOSITORY / given
    return os.path.abspath(within if within.exists() and not given.exists() else given)


def pick_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"device: {name!r} is not allowed; allowed: auto | cpu | cuda | cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name!r} needs a CUDA GPU, and torch sees none; use cpu or auto"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def check(config: Config, method: MethodLike, data: DataLike) -> list[str]:
    """Refuse switches that contradict each other. Returns warnings. Raises ConfigError."""

    def refuse(name: str, why: str) -> None:
        value = (
            getattr(config, name, None) if name in Config.names() else getattr(config.options, name)
        )
        value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        raise ConfigError(f"{name}: {value!r} {why}")

    domains = ", ".join(data.domains)
    if config.source not in data.domains:
        refuse("source", f"is no domain of data set {data.name}; allowed: {domains}")
    others = " | ".join(name for name in data.domains if name != config.source)
    if not config.target:
        refuse("target", f"is empty; allowed: {others}")
    for name in config.target:
        if name not in data.domains:
            raise ConfigError(
                f"target: {name!r} is no domain of data set {data.name}; allowed: {others}"
            )
        if name == config.source:
            raise ConfigError(
                f"target: {name!r} is also the source; allowed with this source: {others}"
            )
    if len(set(config.target)) < len(config.target):
        refuse("target", "names a domain twice; allowed: each domain once")
    if (config.epochs is None) == (config.updates is None):
        refuse("epochs", f"and updates {config.updates!r}: one of them sets the length of training; "
               "allowed: a whole number from 1 for one, null for the other")  # fmt: skip
    if config.nesterov and config.momentum == 0:
        refuse("nesterov", "needs a momentum above 0; use --no-nesterov or another --momentum")
    if config.accumulate > config.batch_size:
        refuse("accumulate", f"is more than batch_size {config.batch_size}")
    warnings = list(method.check(config, refuse) or ())
    if config.limit is not None:
        warnings.append(f"limit {config.limit}: only that many images per class, not whole domains")
    if config.test_set == "source-train":
        warnings.append(
            "INVALID FIGURE: test_set source-train repeats report A's mistake. It is measured on the "
            "training images; only the figures of the targets are results"
        )
    return warnings


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name: old -> new' for each training switch in which two configurations differ."""
    pairs = [(n, old.get(n), new.get(n)) for n in sorted({*old, *new})]
    return [f"{n}: {a!r} -> {b!r}" for n, a, b in pairs if a != b]
