"""Every switch of a run: what it means, what it may be, and what each preset sets it to.

A run is described by one flat `Config`. Its values come, later ones winning, from

1. the preset (which may depend on the mode),
2. the small defaults of the toy data set, when the data is the toy,
3. a yaml file given with `--config`,
4. flags on the command line.

`resolve` does that in one place, checks the result, and says in `warnings` what a reader of the
record must know. The command line passes text and yaml passes numbers and lists; both go through
the same rule of each switch, so an error reads the same whichever way a value came.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data import DOMAINS

from fastshape import backend_info

REPOSITORY = Path(__file__).resolve().parent.parent

# Switches that say where a run happens and not what it computes. A checkpoint may be resumed with
# other values of these, and they do not enter the hash in a run folder's name.
WHERE = ("device", "memory_format", "pipeline", "attach", "workers", "cache", "out")

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class ConfigError(ValueError):
    """A switch has a value it may not have, or two switches contradict each other."""


# --- rules: from text or yaml to a value ------------------------------------------------------


class Rule(NamedTuple):
    """How a switch reads a value, and the words that say which values are allowed."""

    convert: Callable[[Any], Any]  # raises ValueError or TypeError for a value that is not allowed
    allowed: str
    many: bool = False  # takes several values: `--layers 4 7`
    choices: tuple[str, ...] = ()
    flag: bool = False


def choice(*names: str) -> Rule:
    def convert(value: Any) -> str:
        # yaml reads a bare `off` as false
        value = "off" if value is False and "off" in names else value
        if value not in names:
            raise ValueError
        return value

    return Rule(convert, " | ".join(names), choices=names)


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        if not least <= int(value) <= most:
            raise ValueError
        return int(value)

    return Rule(
        convert, f"a whole number from {least}" + (f" to {most}" if most < 2**31 - 1 else "")
    )


def number(allowed: str, inside: Callable[[float], bool]) -> Rule:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not inside(float(value)):  # NaN is inside nothing
            raise ValueError
        return float(value)

    return Rule(convert, allowed)


def text(allowed: str) -> Rule:
    def convert(value: Any) -> str:
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError
        return str(value)

    return Rule(convert, allowed)


def yes_or_no() -> Rule:
    def convert(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule(convert, "true | false", flag=True)


def optional(rule: Rule) -> Rule:
    def convert(value: Any) -> Any:
        return None if value is None else rule.convert(value)

    return rule._replace(convert=convert)


def several(rule: Rule, allowed: str) -> Rule:
    """One value, a list, or text with commas between the values; a tuple comes out."""

    def convert(value: Any) -> tuple:
        values = list(value) if isinstance(value, list | tuple) else [value]
        parts = []
        for part in values:
            parts += [p for p in part.split(",") if p] if isinstance(part, str) else [part]
        return tuple(rule.convert(p) for p in parts)

    return Rule(convert, allowed, many=True)


def layer() -> Rule:
    def convert(value: Any) -> int | str:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return int(value) if str(value).lstrip("-").isdigit() else str(value)

    return Rule(convert, "")


def switch(default: Any, rule: Rule, help: str) -> Any:
    return field(default=default, metadata={"rule": rule, "help": help})


# --- the switches -----------------------------------------------------------------------------

PROBABILITY = number("0 <= p_zero < 1", lambda p: 0 <= p < 1)
POSITIVE = number("a number above 0", lambda v: 0 < v < math.inf)
LAYERS = "conv numbers from 1, module names, shell patterns, or all"


@dataclass(frozen=True)
class Config:
    """Every switch of one run. Defaults here are the common protocol of both reports."""

    # what is trained
    mode: str = switch(
        "baseline",
        choice("baseline", "random", "da", "adabn", "dropout2d", "dann"),
        "baseline: no shaping; random: random maps; da: maps recorded from target images; adabn: "
        "baseline, tested with BatchNorm statistics of target images; dropout2d: whole channels "
        "dropped while training; dann: domain-adversarial training",
    )
    preset: str = switch(
        "fastshape",
        choice("course-template", "report-a", "report-b", "fastshape"),
        "where the values of all other switches come from",
    )
    source: str = switch("art_painting", choice(*DOMAINS), "labelled domain to train on")
    target: str = switch("sketch", choice(*DOMAINS), "domain to test on")

    # shaping
    layers: tuple[int | str, ...] = switch(
        (), several(layer(), LAYERS), f"layers to shape: {LAYERS}"
    )
    p_zero: tuple[float, ...] | None = switch(
        None,
        optional(several(PROBABILITY, "0 <= p_zero < 1, one number or one per layer")),
        "mode random: probability that the map is 0; one number or one per layer",
    )
    mask_unit: str = switch(
        "element",
        choice("element", "channel", "block"),
        "mode random: what one draw decides: an element, a (sample, channel), a block of its plane",
    )
    block_size: int | None = switch(
        None, optional(whole(1)), "mask_unit block: side of the square blocks, in elements"
    )
    epsilon: float = switch(
        0.0,
        number("a number from 0", lambda v: 0 <= v < math.inf),
        "value of the map, in place of 0, where it is not 1",
    )
    after: str = switch("conv", choice("conv", "bn", "relu"), "kind of layer to shape after")
    every: int = switch(
        1, whole(1), "shape every N-th of the layers: N, 2N, 3N, ... of --layers all"
    )
    binarize: bool = switch(True, yes_or_no(), "binarize the activation before it meets the map")
    product: bool = switch(
        False, yes_or_no(), "mode da: multiply by the target's real values, as report B's code did"
    )
    apply_maps: bool = switch(
        True,
        yes_or_no(),
        "mode da: false runs the pass over target images and shapes nothing (with --record-mode "
        "train, the arm bn-only: what moves is BatchNorm's running statistics)",
    )
    top_k: float | None = switch(
        None,
        optional(number("0 < top_k <= 1", lambda v: 0 < v <= 1)),
        "mode da: the map is 1 at this part of its largest values, sample by sample and channel by "
        "channel, in place of 1 where it is above 0; --product keeps those values and zeroes the "
        "others",
    )
    mask_sources: tuple[str, ...] = switch(
        (),
        several(choice(*DOMAINS), " | ".join(DOMAINS)),
        "mode da: record the maps of these domains, in place of the target's, and take their "
        "product: domain generalization, training sees no target image; --source may be among them",
    )
    gradient: str = switch(
        "straight_through",
        choice("straight_through", "clipped", "zero"),
        "gradient through the binarization",
    )
    at_eval: str = switch("off", choice("off", "binarize", "on"), "shaping while testing")
    bn_recalibration: bool = switch(
        False,
        yes_or_no(),
        "before each test, measure the BatchNorm statistics anew on the source's training images, "
        "shaped as in testing (--at-eval): in training they were those of shaped maps",
    )
    record_mode: str = switch(
        "eval",
        choice("eval", "train"),
        "mode da: BatchNorm mode of the target pass; in train mode target images move the "
        "running statistics",
    )
    pairing: str = switch(
        "random",
        choice("random", "modulo"),
        "modes da, dann: which target image meets a source image: a random one, or number "
        "i %% n_target",
    )
    target_transform: str = switch(
        "train",
        choice("train", "test"),
        "modes da, dann: augment the target images, or only resize them",
    )

    # the methods beside shaping
    drop_rate: float | None = switch(
        None,
        optional(number("0 <= drop_rate < 1", lambda p: 0 <= p < 1)),
        "mode dropout2d: probability that a (sample, channel) of the layers is dropped",
    )
    dann_weight: float = switch(
        0.5,
        number("a number from 0", lambda v: 0 <= v < math.inf),
        "mode dann: weight of the two domain losses beside the classification loss",
    )
    dann_lr_factor: float = switch(
        1.0,
        POSITIVE,
        "mode dann: learning rate of classifier and domain head, over that of the rest",
    )

    # what is measured
    holdout: float = switch(
        0.0,
        number("0 <= holdout <= 0.5", lambda v: 0 <= v <= 0.5),
        "part of the source that is not trained on but tested on (0.1: a tenth; 0: none)",
    )
    test_set: str = switch(
        "target",
        choice("target", "source-train"),
        "source-train: besides the target, test on the source's own training images, as report A "
        "did by mistake; such a figure is invalid and labelled so",
    )

    # data
    data: str | None = switch(
        None, optional(text("toy or a folder")), "PACS folder, or toy (drawn images)"
    )
    limit: int | None = switch(
        None, optional(whole(1)), "use only this many images per class of each domain"
    )
    image_size: int = switch(224, whole(32, 1024), "side of the network's input, in pixels")
    cache: str | None = switch(
        None, optional(text("a folder")), "folder for decoded images (default: the data module's)"
    )
    workers: int = switch(
        0,
        whole(0, 64),
        "loader processes of the reference pipeline; the numbers do not depend on it",
    )

    # model
    weights: str = switch(
        "imagenet", text("imagenet | none | a state dict's path"), "initial weights of ResNet-18"
    )

    # optimization
    epochs: int | None = switch(
        30, optional(whole(1)), "passes over the source; null where --updates says how long"
    )
    updates: int | None = switch(
        None,
        optional(whole(1)),
        "optimizer steps in all, in place of --epochs: equal training at any batch size; the last "
        "epoch may be cut short",
    )
    batch_size: int = switch(
        128, whole(1), "source images per update, those of all processes under torchrun"
    )
    accumulate: int = switch(
        1,
        whole(1),
        "split each update's images over this many passes; BatchNorm then sees the smaller parts",
    )
    lr: float = switch(1e-3, POSITIVE, "learning rate of SGD")
    momentum: float = switch(
        0.9, number("0 <= momentum < 1", lambda v: 0 <= v < 1), "momentum of SGD"
    )
    nesterov: bool = switch(True, yes_or_no(), "Nesterov's form of momentum")
    weight_decay: float = switch(
        5e-4, number("a number from 0", lambda v: 0 <= v < math.inf), "L2 penalty on all parameters"
    )
    step_fraction: float = switch(
        0.8,
        number("0 < step_fraction <= 1", lambda v: 0 < v <= 1),
        "the learning rate drops every int(step_fraction * epochs) epochs, or as many updates of "
        "--updates",
    )
    gamma: float = switch(
        0.1, number("0 < gamma <= 1", lambda v: 0 < v <= 1), "factor of that drop"
    )
    amp: str = switch(
        "auto",
        choice("auto", "off", "float16", "bfloat16"),
        "autocast in training and testing; auto: float16 on CUDA, off on CPU",
    )
    seed: int = switch(0, whole(0), "seed of weights, data order, augmentation and maps")

    # where
    device: str = switch("auto", text("auto | cpu | cuda | cuda:N"), "auto: CUDA if there is any")
    pipeline: str = switch(
        "auto",
        choice("auto", "device", "reference"),
        "reference: images are cropped and resized one by one on the CPU, by torchvision; "
        "device: they stay on the training device as uint8, and a whole batch is cropped and resized "
        "there, with the same crops and flips and pixels at most 1/255 apart; auto: device on CUDA, "
        "reference on CPU",
    )
    attach: str = switch(
        "auto",
        choice("auto", "hooks", "replace"),
        "modes random, da: replace: a shaped convolution, its BatchNorm and ReLU run as one op, where "
        "the model has them in a row; hooks: they stay apart; one step is the same but for rounding, which "
        "training magnifies; auto: replace where that is one op on this device, else hooks",
    )
    memory_format: str = switch(
        "auto",
        choice("auto", *MEMORY_FORMATS),
        "of weights and images; auto: channels_last on CUDA, contiguous on CPU",
    )
    out: str | None = switch(
        None, optional(text("a folder")), "run folder (default: runs/ and a name from the switches)"
    )

    @property
    def run_name(self) -> str:
        """A folder name that reads well and differs whenever a result may differ."""
        shaped = "+".join(str(name) for name in self.layers)
        shaped = "".join(c if c.isalnum() or c in "+._" else "_" for c in shaped)[:40]
        parts = [self.mode, self.source, self.target, shaped, f"s{self.seed}"]
        return "-".join(part for part in [*parts, self.hash()[:6]] if part)

    def hash(self) -> str:
        """Hex digest of every switch that can change a result; see `hash_of`."""
        return hash_of(self.as_dict())

    def length(self, images: int) -> tuple[int, int]:
        """Epochs (the last one perhaps cut short) and updates of a run on that many images."""
        per_epoch = -(-images // self.batch_size)
        if self.updates is not None:
            return -(-self.updates // per_epoch), self.updates
        return self.epochs, self.epochs * per_epoch

    def as_dict(self) -> dict[str, Any]:
        """The switches as plain values for yaml, json and checkpoints: tuples become lists.

        Data and weights inside the repository are named from there: a record says where to put
        them, and nothing of the machine.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name in ("data", "weights"):
            if Path(values[name]).is_relative_to(REPOSITORY):
                values[name] = Path(values[name]).relative_to(REPOSITORY).as_posix()
        return values


SWITCHES = {f.name: f for f in fields(Config)}


def plain(switch: str, value: Any) -> Any:
    """A switch's value as it is on every machine: of data toy or PACS, of weights the file's name.

    Where these are the same for every switch but those in WHERE, two runs are the same.
    """
    if isinstance(value, str) and switch == "data":
        return "toy" if value == "toy" else "PACS"
    return Path(value).name if isinstance(value, str) and switch == "weights" else value


def hash_of(values: Mapping[str, Any]) -> str:
    """Hex digest of what the switches that `Config.as_dict()` gives are on every machine."""
    values = {name: plain(name, v) for name, v in values.items() if name not in WHERE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- presets ----------------------------------------------------------------------------------

# Shaping where the user names none: conv 4 is the best layer of report B's target maps, conv 10 is
# where independent runs agree that random maps help; dropping whole channels is compared there.
SHAPING = {
    "baseline": {},
    "random": {"layers": (10,), "p_zero": (0.5,)},
    "da": {"layers": (4,)},
    "adabn": {},
    "dropout2d": {"layers": (10,), "drop_rate": 0.5},
    "dann": {},
}

# What the published code of each report ran.
RAN = {"report-a": ("baseline", "random"), "report-b": ("baseline", "random", "da")}

# Switches that mean nothing outside these modes, and there must keep their defaults.
LAYERED = ("random", "da", "dropout2d")
MODES_OF = {
    "layers": LAYERED,
    "after": LAYERED,
    "every": LAYERED,
    "bn_recalibration": ("baseline", *LAYERED),
    "binarize": ("random", "da"),
    "gradient": ("random", "da"),
    "at_eval": ("random", "da"),
    "epsilon": ("random", "da"),
    "p_zero": ("random",),
    "mask_unit": ("random",),
    "block_size": ("random",),
    "product": ("da",),
    "apply_maps": ("da",),
    "top_k": ("da",),
    "mask_sources": ("da",),
    "record_mode": ("da",),
    "pairing": ("da", "dann"),
    "target_transform": ("da", "dann"),
    "drop_rate": ("dropout2d",),
    "dann_weight": ("dann",),
    "dann_lr_factor": ("dann",),
}

# The toy is small and drawn: a fresh network learns it in a minute on two CPU cores.
TOY = {"weights": "none", "image_size": 64, "epochs": 10, "batch_size": 32, "lr": 0.02}


def preset_values(preset: str, mode: str) -> dict[str, Any]:
    """Every switch that `preset` governs, for `mode`.

    course-template  the common protocol, which both reports start from.
    report-a  what report A's code ran: batch 64; random maps after every third convolution that
              stay on while testing. Its shaped runs were tested on their own training images.
              The gradient is that of a binarization by comparison: none.
    report-b  what report B's code ran: random maps without gradient that stay on while testing;
              in mode da the raw product with a real-valued map, recorded in train mode, target
              image `i % n_target`, batch 256. No shaping while testing in mode da: a test image
              has no recorded map.
    fastshape what this project holds to be sound: straight-through gradient, no shaping while
              testing, recording that leaves BatchNorm alone, random pairs, a held-out tenth, and
              BatchNorm statistics, from source images alone, of the maps that testing sees.

    Raises ConfigError for a report in a mode that it did not run.
    """
    if mode not in RAN.get(preset, SHAPING):
        allowed = " | ".join(RAN[preset])
        raise ConfigError(f"mode: {mode!r} is not in preset {preset}; allowed: {allowed}")
    common = {
        name: f.default
        for name, f in SWITCHES.items()
        if name not in (*WHERE, "mode", "preset", "source", "target", "data", "limit", "seed")
    }
    values = common | SHAPING[mode]
    if preset == "report-a":
        values["batch_size"] = 64
        if mode == "random":
            values |= {"layers": ("all",), "every": 3, "p_zero": (0.2,), "at_eval": "on"}
            values |= {"gradient": "zero", "test_set": "source-train"}
    elif preset == "report-b":
        if mode == "random":
            values |= {"layers": (1,), "p_zero": (0.7,), "gradient": "zero", "at_eval": "on"}
        if mode == "da":
            values |= {"product": True, "binarize": False, "record_mode": "train"}
            values |= {"pairing": "modulo", "batch_size": 256}
    elif preset == "fastshape":
        values["holdout"] = 0.1
        values["bn_recalibration"] = mode in LAYERED
    return values


# --- from what was said to what is run --------------------------------------------------------


def read(name: str, value: Any) -> Any:
    """`value` of the switch `name` by its rule. Raises ConfigError."""
    if name not in SWITCHES:
        raise ConfigError(f"{name}: no such switch; there are {', '.join(SWITCHES)}")
    rule: Rule = SWITCHES[name].metadata["rule"]
    try:
        return rule.convert(value)
    except (ValueError, TypeError, OverflowError):
        shown = value[0] if isinstance(value, list) and len(value) == 1 else value
        raise ConfigError(f"{name}: {shown!r} is not allowed; allowed: {rule.allowed}") from None


def resolve(said: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration that results from what was said explicitly.

    Args:
        said: values by switch, as text or as yaml gives them. Whatever is missing comes from the
            preset, or from the toy's defaults when the data is the toy.

    Returns:
        The configuration, nothing in it left as "auto", and the warnings its record must carry.

    Raises:
        ConfigError: names the switch, the value, and what is allowed.
    """
    said = {name: read(name, value) for name, value in said.items()}
    warnings: list[str] = []

    mode = said.get("mode", SWITCHES["mode"].default)
    preset = said.get("preset", SWITCHES["preset"].default)
    values = preset_values(preset, mode) | {"mode": mode, "preset": preset}

    data = said.get("data")
    if data is None:
        folder = REPOSITORY / "data" / "PACS"
        data = str(folder) if folder.is_dir() else "toy"
        if data == "toy":
            warnings.append("no --data given and no data/PACS folder: the toy data set is used")
    if data == "toy":
        changed = {k: v for k, v in TOY.items() if k not in said and values[k] != v}
        if said.get("updates") is not None:
            changed.pop("epochs", None)
        values |= changed
        warnings.append("toy data: drawn images, not PACS; nothing here compares with a report")
        if changed:
            shown = ", ".join(f"{k} {v}" for k, v in changed.items())
            warnings.append(f"toy defaults replace those of preset {preset}: {shown}")
    else:
        data = absolute(data)

    # a switch of the preset gives way where what was said leaves it no meaning
    if "every" not in said and said.get("layers", ("all",)) != ("all",):
        values["every"] = 1
    if said.get("product") and "binarize" not in said:
        values["binarize"] = False
    if said.get("apply_maps") is False:
        values["bn_recalibration"] = False  # it would undo what the pass over target images does
    if said.get("updates") is not None:
        values["epochs"] = None
    values |= said | {"data": data}
    if values["weights"] not in ("imagenet", "none"):
        values["weights"] = absolute(values["weights"])
    device = pick_device(values.get("device", "auto"))
    values["device"] = str(device)
    cuda = device.type == "cuda"
    fused = values["mode"] in ("random", "da") and values["after"] == "conv" and values["binarize"]
    automatic = {
        "amp": "float16" if cuda else "off",
        "attach": "replace" if fused and backend_info()[device.type] == "native" else "hooks",
        "pipeline": "device" if cuda else "reference",
        "memory_format": "channels_last" if cuda else "contiguous",
    }
    values |= {n: v for n, v in automatic.items() if values.get(n, "auto") == "auto"}

    config = Config(**values)
    check(config)
    if config.record_mode == "train" and config.bn_recalibration:
        warnings.append(
            "bn_recalibration measures BatchNorm anew on source images before each test: what "
            "record_mode train moves is not in the figures"
        )
    if config.limit is not None:
        warnings.append(f"limit {config.limit}: only that many images per class, not whole domains")
    if config.test_set == "source-train":
        warnings.append(
            "INVALID FIGURE: test_set source-train repeats report A's mistake. invalid_test_* is "
            "measured on the training images; only target_* is a result"
        )
    return config, warnings


def absolute(path: str) -> str:
    """`path` from the root on, so that a run can be resumed from another folder.

    A relative path that is not in the working folder is one in the repository, as records have it.
    """
    path = Path(path).expanduser()
    within = REPOSITORY / path
    return os.path.abspath(within if within.exists() and not path.exists() else path)


def pick_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "auto | cpu | cuda | cuda:N"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"device: {name!r} is not allowed; allowed: {allowed}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {name!r} asked for, but torch sees no CUDA GPU; use cpu or auto"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def check(config: Config) -> None:
    """Refuse switches that contradict each other. Raises ConfigError."""

    def refuse(name: str, why: str) -> None:
        raise ConfigError(f"{name}: {getattr(config, name)!r} {why}")

    if config.target == config.source:
        others = " | ".join(name for name in DOMAINS if name != config.source)
        refuse("target", f"is also the source; allowed with this source: {others}")
    for name, modes in MODES_OF.items():
        if config.mode not in modes and getattr(config, name) != SWITCHES[name].default:
            refuse(name, f"is for mode{'s' * (len(modes) > 1)} {' and '.join(modes)}, not for mode "
                   f"{config.mode}; allowed here: {SWITCHES[name].default!r}")  # fmt: skip
    if config.mode in LAYERED and not config.layers:
        refuse("layers", f"is empty; mode {config.mode} needs at least one of: {LAYERS}")
    if config.mode == "random" and not config.p_zero:
        refuse("p_zero", "is missing; mode random needs 0 <= p_zero < 1")
    if config.mode == "dropout2d" and config.drop_rate is None:
        refuse("drop_rate", "is missing; mode dropout2d needs 0 <= drop_rate < 1")
    if (config.mask_unit == "block") != (config.block_size is not None):
        refuse("block_size", f"with mask_unit {config.mask_unit}; block needs a whole number from "
               "1, element and channel have none")  # fmt: skip
    if config.product and config.gradient == "clipped":
        refuse("gradient", "is not for --product; allowed with it: straight_through | zero")
    if config.product and config.binarize:
        refuse("product", "means no binarization; use --no-binarize or --no-product")
    if config.product and config.epsilon:
        refuse("epsilon", "is not for --product, whose map has no zeros to replace; allowed: 0.0")
    if config.mode == "da" and config.at_eval == "on":
        refuse(
            "at_eval", "is for mode random: a test image has no recorded map; use off | binarize"
        )
    if config.target in config.mask_sources:
        others = " | ".join(name for name in DOMAINS if name != config.target)
        refuse("mask_sources", f"has the target in it; allowed with this target: {others}")
    if len(set(config.mask_sources)) < len(config.mask_sources):
        refuse("mask_sources", "names a domain twice; allowed: each domain once")
    if (config.epochs is None) == (config.updates is None):
        refuse("epochs", f"and updates {config.updates!r}: one of them says how long to train; "
               "allowed: a whole number from 1 for one, null for the other")  # fmt: skip
    if config.nesterov and config.momentum == 0:
        refuse("nesterov", "needs a momentum above 0; use --no-nesterov or another --momentum")
    if config.accumulate > config.batch_size:
        refuse("accumulate", f"is more than batch_size {config.batch_size}")


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name: old -> new' for each switch that keeps a run from being resumed."""
    pairs = [(n, old.get(n), new.get(n)) for n in sorted({*old, *new}) if n not in WHERE]
    return [f"{n}: {a!r} -> {b!r}" for n, a, b in pairs if plain(n, a) != plain(n, b)]
