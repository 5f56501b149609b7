"""From the values that a user gives to a checked setup, and the key of its training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domainshift import files
from domainshift.config import REPOSITORY, Config, hash_of, resolve
from domainshift.data import DataSet, open_data
from domainshift.data.folder import is_utf8
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, Method, load_method_file, method_named
from domainshift.models import output_shapes, weights_digest

NO_DATA = "no --data given and no data/PACS folder: the toy data set is used"


class Setup(NamedTuple):
    """A configuration with the method and the data set that it names."""

    config: Config
    method: type[Method]
    data: DataSet
    warnings: list[str]  # what the record must carry


def set_up(values: Mapping[str, Any], data: DataSet | None = None) -> Setup:
    """Resolve the values that a user gave.

    Args:
        values: by switch, as text, as YAML has them or as numpy does; `-` and `_` in names are alike.
        data: the data set, where the caller has opened it already.

    Raises BadInput, which names the switch, the value and what is allowed.
    """
    given = {str(name).replace("-", "_"): without_numpy(value) for name, value in values.items()}
    for name in ("data", "cache", "method_file"):
        if not isinstance(given.get(name), str | Path | None):
            raise ConfigError(f"{name}: {given[name]!r} is not allowed; allowed: a path")
    for name in ("data", "cache", "method_file", "weights", "out"):  # which go into config.yaml
        if not is_path_in_utf8(value := given.get(name)):
            raise ConfigError(f"{name}: {value!r} is not allowed; allowed: a path in UTF-8")
    if given.get("method_file") is not None:
        load_method_file(Path(given["method_file"]))
    method = method_named(str(given.get("mode", Config.model_fields["mode"].default)))
    warnings = []
    if given.get("data") is None:
        given["data"] = default_data()
        warnings += [NO_DATA] if given["data"] == "toy" else []
    if data is None:
        cache = given.get("cache")
        data = open_data(given["data"], None if cache is None else Path(cache))
    refuse_switches_of_others(given, method)
    config, more = resolve(given | {"mode": method.name}, method, data)
    # both raise ConfigError: for layers that the network lacks, for images that it does not take
    method.layer_names(config)
    output_shapes(config.model, config.image_size)
    return Setup(config, method, data, warnings + more)


def is_path_in_utf8(value: Any) -> bool:
    """Whether text or a path names a file in UTF-8; values of other types are left to other checks."""
    text = str(value)
    return not isinstance(value, str | Path) or bool(text and is_utf8(text) and "\0" not in text)


def without_numpy(value: Any) -> Any:
    """A value with Python's own numbers, text and lists in place of numpy's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [without_numpy(v) for v in value] if isinstance(value, list | tuple) else value


def refuse_switches_of_others(given: Mapping[str, Any], method: type[Method]) -> None:
    """Raises ConfigError for a switch that other methods have, and names them."""
    own = {*Config.names(), *method.Options.names()}
    for name in given:
        having = [n for n, other in METHODS.items() if name in other.Options.names()]
        if name not in own and having:
            raise ConfigError(f"{name}: mode {method.name} has no such switch; it is of mode "
                              f"{' | '.join(having)}")  # fmt: skip


def default_data() -> str:
    folder = REPOSITORY / "data" / "PACS"
    return str(folder) if folder.is_dir() else "toy"


def training_setup(setup: Setup) -> Setup:
    """The setup whose training this one shares: that of AdaBN is the baseline's."""
    method = setup.method
    if method.trains_as is None:
        return setup
    shared = method_named(method.trains_as)
    config = setup.config.model_copy(
        update={"mode": shared.name, "options": shared.Options(**shared_options(setup, shared))}
    )
    return setup._replace(config=config, method=shared)


def shared_options(setup: Setup, method: type[Method]) -> dict[str, Any]:
    own = setup.config.options
    return {n: getattr(own, n) for n in method.Options.names() if n in own.names()}


def targets_of_training(setup: Setup) -> list[str]:
    """The targets whose unlabelled images training sees; none where it reads other domains for them."""
    domains = setup.method.domains(setup.config)
    return [name for name in setup.config.target if name in domains]


def origin(setup: Setup) -> dict[str, Any]:
    """What decides the weights of a training, by name: the parts of its key.

    Switches of testing and of place are not in it, nor are paths: images, initial weights and a
    method's own file enter by their content.

    Returns `switches` (of role training, without the path of the weights), `targets` (domains whose
    unlabelled images training sees), `images` (digests by domain), `weights` and `method_file`
    (digests).
    """
    shared = training_setup(setup)
    config, method, *_ = shared
    switches = config.training_values()
    weights = switches.pop("weights")
    file = config.method_file
    return {
        "switches": switches,
        "targets": targets_of_training(shared),
        "images": digests(shared, method.domains(config)),
        "weights": known_digest(weights, config.model, stamp(config.weights)),
        "method_file": None if file is None else files.digest(Path(file)),
    }


def digests(setup: Setup, domains: Iterable[str]) -> dict[str, str]:
    """What stands for the images of domains, by name. Raises DataError."""
    return {name: setup.data.digest(name, setup.config.limit) for name in dict.fromkeys(domains)}


def training_key(setup: Setup) -> str:
    """Hex hash of everything that decides the weights of a training."""
    return hash_of(origin(setup))


def stamp(path: str) -> tuple[int, int] | None:
    """Size and time of a file, which tell whether it must be read again; None where there is none."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def known_digest(weights: str, model: str, _: tuple[int, int] | None) -> str | None:
    path = REPOSITORY / weights
    return weights_digest(str(path) if path.is_file() else weights, model)


def run_name(setup: Setup) -> str:
    """A folder name that reads well and differs whenever what is trained may differ."""
    config = setup.config
    layers = "+".join(str(name) for name in getattr(config.options, "layers", ()))
    layers = "".join(c if c.isalnum() or c in "+._" else "_" for c in layers)[:40]
    targets = "+".join(targets_of_training(setup))
    parts = [config.mode, config.source, targets, layers, f"s{config.seed}"]
    return "-".join(part for part in [*parts, training_key(setup)[:6]] if part)
