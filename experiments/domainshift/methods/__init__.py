'''The methods: `METHODS` by name, and files with a method of your own.

A method of your own is one class in one file, for `--method-file my_method.py --mode label-smoothing`:

    """Label smoothing (Szegedy et al., arXiv 1512.00567)."""

    from domainshift.config import Probability, Switches, switch
    from domainshift.methods import Method


    class SmoothOptions(Switches):
        smoothing: Probability = switch(0.1, "probability that is spread over all classes")


    class Smooth(Method):
        name = "label-smoothing"
        title = "smoothed labels"
        Options = SmoothOptions

        def loss(self, images, labels, target_images):
            from torch.nn import functional as F

            logits = self.model(images)
            smoothing = self.config.options.smoothing
            return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits

A method that trains on target images too states `uses_target = True` and derives its options from
`TargetOptions`. To make a method part of the project, add its file to this folder and its class to
the registry below. torch is imported inside functions, because --help reads the methods without it.
'''

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType

from domainshift.config import Config, Switches, absolute
from domainshift.errors import BadInput, ConfigError, Failure
from domainshift.methods.adabn import AdaBN
from domainshift.methods.base import Method, Prediction, Step, TargetOptions
from domainshift.methods.dann import Dann
from domainshift.methods.dropout import Dropout2d
from domainshift.methods.mixstyle import MixStyle
from domainshift.methods.shaping import RandomMaps, RescaledMaps, TargetMaps

__all__ = [
    "METHODS",
    "Method",
    "Prediction",
    "Step",
    "TargetOptions",
    "blamed",
    "load_method_file",
    "method_named",
    "method_of",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Method,
        RandomMaps,
        TargetMaps,
        AdaBN,
        Dropout2d,
        RescaledMaps,
        MixStyle,
        Dann,
    )
}

FUNCTIONS = (
    "loss", "update", "predict", "testing", "recalibrated", "fired", "density", "close",
    "state_dict", "load_state_dict", "check", "domains", "cost", "words",
)  # fmt: skip
# How many arguments they are called with, `self` among them.
ARGUMENTS = {"loss": 4, "check": 2, "settle": 2, "domains": 1, "cost": 1, "words": 1}

RESERVED = ("resume", "config", "help")  # words of the command line that are no switches


def method_named(name: str) -> type[Method]:
    """The method with this name or alias. Raises ConfigError, which lists all names."""
    for method in METHODS.values():
        if name in (method.name, *method.aliases):
            return method
    raise ConfigError(f"mode: {name!r} is not allowed; allowed: {' | '.join(METHODS)}")


def method_of(config: Config) -> type[Method]:
    """The method of a configuration, loaded from its file if it has one. Raises ConfigError."""
    if config.method_file is not None:
        load_method_file(Path(config.method_file))
    return method_named(config.mode)


# --- files with a method ----------------------------------------------------------------------

_loaded: dict[Path, tuple[str, str]] = {}  # digest of the file and name of the method, by path


def load_method_file(path: Path) -> type[Method]:
    """Import a Python file that defines exactly one subclass of `Method`, and register that.

    A file that is loaded again is imported again only if it has changed.

    Raises ConfigError: the file cannot be read, or raises; it has no such class, or several; the class
    lacks something that a method must have; a name of it belongs to another method or switch.
    """
    path = Path(absolute(str(path)))
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"method_file: cannot read {path}: {error.strerror}") from None
    earlier, name = _loaded.get(path, ("", ""))
    if earlier == digest:
        return METHODS[name]
    METHODS.pop(name, None)
    _loaded.pop(path, None)
    module = _import(path, digest)
    try:
        method = _only_method(module)
        _check_method(method)
    except ConfigError as error:
        raise ConfigError(f"method_file: {path}: {error}") from None
    METHODS[method.name] = method
    _loaded[path] = digest, method.name
    return method


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # never from a cache, which may hold the file as it was a moment ago
        return self.source_to_code(self.get_data(self.path), self.path)


def _import(path: Path, digest: str) -> ModuleType:
    name = f"_method_file_{digest[:16]}"
    loader = _Loader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # pydantic looks up annotations there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        words = " ".join(str(error).split())
        raise ConfigError(
            f"method_file: {path}: {type(error).__name__} on line {line}: {words}"
        ) from error
    return module


def _only_method(module: ModuleType) -> type[Method]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    methods = [kind for kind in classes if issubclass(kind, Method)]
    if len(methods) == 1:
        return methods[0]
    if methods:
        names = ", ".join(kind.__name__ for kind in methods)
        raise ConfigError(f"defines {len(methods)} subclasses of Method ({names}); allowed: one")
    near = [kind for kind in classes if not issubclass(kind, Switches)]
    lacks = "".join(
        f"; class {kind.__name__} is none and lacks {_listing(missing)}"
        for kind in near[:1]
        if (missing := [name for name in FUNCTIONS if not hasattr(kind, name)])
    )
    raise ConfigError(f"defines no subclass of domainshift.methods.Method{lacks}")


def _check_method(method: type[Method]) -> None:
    own = vars(method)
    missing = [n for n in ("name", "title") if not isinstance(own.get(n), str) or not own[n]]
    missing += [n for n in FUNCTIONS if not callable(getattr(method, n, None))]
    if missing:
        raise ConfigError(f"class {method.__name__} lacks {_listing(missing)}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", method.name):
        raise ConfigError(
            f"name {method.name!r} is not allowed; allowed: a-z, 0-9 and - (it names folders)"
        )
    if not isinstance(method.aliases, tuple):
        raise ConfigError(f"aliases {method.aliases!r} is not allowed; allowed: a tuple of words")
    for function, count in ARGUMENTS.items():
        try:
            inspect.signature(getattr(method, function)).bind(*range(count))
        except TypeError as error:
            raise ConfigError(f"{method.__name__}.{function}: {error}") from None
    for name in (method.name, *method.aliases):
        if any(name in (other.name, *other.aliases) for other in METHODS.values()):
            raise ConfigError(f"name {name!r} is that of an existing method; choose another")
    options = method.Options
    if not (isinstance(options, type) and issubclass(options, Switches)):
        raise ConfigError(f"class {method.__name__} lacks `Options`, a subclass of Switches")
    if method.uses_target and not issubclass(options, TargetOptions):
        raise ConfigError("uses_target needs Options that derive from TargetOptions")
    for name in options.names():
        if name in (*Config.names(), *RESERVED):
            raise ConfigError(f"option {name!r} is a switch of every method; choose another name")
        if "role" not in (options.model_fields[name].json_schema_extra or {}):
            raise ConfigError(f"option {name!r} is not made by switch(default, help)")


@contextmanager
def blamed() -> Iterator[None]:
    """Within it an error in the code of a method file is a ConfigError that names file and line."""
    try:
        yield
    except (BadInput, Failure):
        raise
    except Exception as error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if Path(frame.filename) in _loaded:
                words = " ".join(str(error).split())
                raise ConfigError(
                    f"method_file: {frame.filename}: {type(error).__name__} on line {frame.lineno}: {words}"
                ) from error
        raise


def _listing(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
