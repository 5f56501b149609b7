"""Train on one domain and test on others, with or without activation shaping: the command run.py.

    python experiments/run.py --target sketch --mode da --layers 4
    python experiments/run.py --target sketch cartoon photo --mode random    # one training, three tests

On two GPUs, with the numbers of one but for rounding:

    torchrun --nproc-per-node 2 experiments/run.py --target sketch --mode da --layers 4

A run leaves a folder: config.yaml (run it again with --config), metrics.jsonl, training.json,
evaluations/, summary.json, checkpoint.pt, curves.png and, for a shaped run, maps.png.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse import ActionYesNo, ArgumentParser
from rich.console import Console

from domainshift import distributed, files
from domainshift.config import Config, Switches, Test, choices, preset_values, role
from domainshift.errors import BadInput, ConfigError, Failure
from domainshift.methods import METHODS, blamed, load_method_file, method_named
from domainshift.progress import Screen, show_any_name
from domainshift.records.schema import CONFIG

if TYPE_CHECKING:  # --help needs no torch, which takes seconds to import
    from domainshift.setup import Setup

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses

GROUPS = {
    "method": "method",
    "data": "data",
    "testing": "testing",
    "network": "network",
    "optimization": "optimization",
    "machine": "where it runs",
}


# --- the command line -------------------------------------------------------------------------


def parser(mode: str = "baseline", preset: str | None = None) -> ArgumentParser:
    """One option for each switch. Values stay text: `set_up` reads them.

    Args:
        mode, preset: whose values the help shows beside the defaults.
    """
    preset = preset or Config.model_fields["preset"].default
    result = ArgumentParser(
        prog="run.py",
        description="Train on one domain and test on others, with or without activation shaping. Methods: "
        + listing()
        + ".",
        allow_abbrev=False,  # an abbreviation changes its meaning when a switch is added
        exit_on_error=False,
    )
    start = result.add_argument_group("start")
    start.add_argument(
        "--config", metavar="FILE", default="none", help="YAML file of switches; flags override it"
    )
    start.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, which names all other switches; add --target or a switch of "
        "testing to test it further, --epochs to train it longer",
    )
    own = preset_values(preset, mode)
    groups = {name: result.add_argument_group(title) for name, title in GROUPS.items()}
    for name in Config.names():
        field = Config.model_fields[name]
        add_switch(groups[field.json_schema_extra["group"]], Config, name, own, preset)
    known = set(Config.names())
    for method in METHODS.values():
        names = [name for name in method.Options.names() if name not in known]
        if not names:
            continue
        known |= set(names)
        group = result.add_argument_group(f"switches of {methods_with(names)}")
        for name in names:
            add_switch(group, method.Options, name, own, preset)
    return result


def listing() -> str:
    return ", ".join(f"{name} ({method.title})" for name, method in METHODS.items())


def methods_with(names: Sequence[str]) -> str:
    """The methods that have one of these switches, in words."""
    having = [n for n, method in METHODS.items() if set(names) & set(method.Options.names())]
    return f"method {having[0]}" if len(having) == 1 else f"methods {', '.join(having)}"


def add_switch(
    group: Any, kind: type[Switches], name: str, own: Mapping[str, Any], preset: str
) -> None:
    field = kind.model_fields[name]
    option = "--" + name.replace("_", "-")
    text = field.description.replace("%", "%%")
    if name in own and own[name] != field.default:
        text += f"; preset {preset}: {words(own[name])}"
    if field.annotation is bool:
        group.add_argument(
            option, action=ActionYesNo(no_prefix="no-"), default=field.default, help=text
        )
        return
    several = isinstance(field.default, tuple) or "tuple" in str(field.annotation)
    metavar = "|".join(choices(field.annotation)) or name.upper()
    group.add_argument(
        option,
        nargs="+" if several else None,
        metavar=metavar,
        default=words(field.default),
        help=text,
    )


def words(value: Any) -> Any:
    """A default as a user would type it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else value


class Request(NamedTuple):
    """What a user asks for."""

    values: dict[str, Any]  # switches by name
    tests: list[Test]  # beyond those of the switches, from the file of an earlier run
    resume: bool


def request(arguments: Sequence[str]) -> Request:
    """Read the command line and the file that it names.

    Raises ConfigError for words that are no switches, and RecordError for an unreadable file.
    """
    flags = vars(parse(arguments))
    resume, file = bool(flags.pop("resume", False)), flags.pop("config", None)
    if not resume:
        if file is None:
            return Request(flags, [], False)
        values = saved_values(Path(file))
        values.pop("out", None)  # the file's folder is another run's
        tests = values.pop("tests")
        return Request(values | flags, [] if retested(flags) else tests, False)
    if flags.get("out") is None:
        raise ConfigError("resume: needs --out FOLDER, the folder of the run to go on with")
    if file is not None:
        raise ConfigError("config: not with --resume, which reads the file in the run's folder")
    values = resumed_values(Path(flags["out"]))
    tests = values.pop("tests")
    if "updates" in flags:
        values.pop("epochs", None)
    if "epochs" in flags:
        values.pop("updates", None)
    return Request(values | flags, tests, True)


def parse(arguments: Sequence[str]) -> Any:
    """The flags that were given, as text, in a namespace. --help exits."""
    mode = value_of(arguments, "--mode") or Config.model_fields["mode"].default
    file = value_of(arguments, "--method-file")
    if file is not None:
        load_method_file(Path(file))
    try:
        name = method_named(mode).name
        known = parser(name, value_of(arguments, "--preset"))
    except ConfigError:  # said once more, and better, when all switches are read
        known = parser()
    try:
        return known.parse_args(list(arguments), defaults=False)
    except Exception as error:  # argparse.ArgumentError, in several wrappings
        raise ConfigError(" ".join(str(error).split())) from None


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """The value that follows an option, where it is given."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def resumed_values(folder: Path) -> dict[str, Any]:
    """The switches and `tests` of the run in a folder, or of the runs of several targets below it."""
    if (folder / CONFIG).is_file():
        return saved_values(folder / CONFIG)
    runs = [saved_values(path) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    targets = [target for values in runs for target in values.get("target") or []]
    if not runs or {path.parent.name for path in folder.glob(f"*/{CONFIG}")} != set(targets):
        raise ConfigError(f"out: {str(folder)!r} holds no run to resume (no {CONFIG})")
    return runs[0] | {"target": targets, "tests": []}


def saved_values(path: Path) -> dict[str, Any]:
    """The switches in the config.yaml of a run, and its `tests`; warnings follow from the switches.

    Raises ConfigError for a file that cannot be read, or holds something else.
    """
    values = {str(name).replace("-", "_"): value for name, value in files.read_yaml(path).items()}
    values.pop("warnings", None)
    tests = values.get("tests") or []
    try:
        values["tests"] = [Test.model_validate(test) for test in tests]
    except (ValueError, TypeError):
        raise ConfigError(
            f"{path}: tests: {tests!r} is not allowed; allowed: a list of tests as a run writes it"
        ) from None
    return values


def retested(flags: Mapping[str, Any]) -> bool:
    """Whether flags say how to test, so that the tests of an earlier run are not asked for."""
    method = method_named(flags["mode"]) if "mode" in flags else None
    kinds = [Config, *([method.Options] if method else [m.Options for m in METHODS.values()])]
    return any(
        role(kind, name) == "testing" for name in flags for kind in kinds if name in kind.names()
    )


# --- the runs ---------------------------------------------------------------------------------


def setups_of(values: Mapping[str, Any]) -> list[Setup]:
    """One setup for each training: several where the method trains once for each target."""
    from domainshift.setup import set_up, targets_of_training

    setup = set_up(values)
    config = setup.config
    if len(targets_of_training(setup)) < 2:
        return [setup]
    base = Path(config.out) if config.out else None
    if base is not None and (base / CONFIG).exists():
        return [setup]  # the folder is that of one training, which will be refused by name
    setups = []
    for target in config.target:
        place = {} if base is None else {"out": str(base / target)}
        setups.append(set_up({**values, "target": [target], **place}, setup.data))
    return setups


def run(request: Request, screen: Screen) -> None:
    """Everything that a request asks for: trainings, tests, closing lines."""
    from domainshift.setup import run_name
    from domainshift.training.run import closing_lines, execute

    with distributed.together(), blamed():
        setups = setups_of(request.values)
    for setup in setups:
        folder = Path(setup.config.out or Path("runs") / run_name(setup))
        earlier = request.tests if len(setups) == 1 else []
        tests = list(dict.fromkeys([*setup.config.tests(), *earlier]))
        with blamed():
            execute(setup, tests=tests, folder=folder, resume=request.resume, screen=screen)
        if distributed.rank() == 0:
            for line in closing_lines(folder):
                screen.say(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 the run failed, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    show_any_name()
    distributed.join()
    first = distributed.rank() == 0
    screen = Screen() if first else Screen(Console(quiet=True))
    name = "run.py" if first else f"run.py (process {distributed.rank()})"
    try:
        with distributed.together(), contextlib.ExitStack() as quiet:
            if not first:  # help is printed once
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            asked = request(arguments)
            if asked.values.get("layers") in (["list"], "list"):
                for line in layers_of(asked.values):
                    screen.say(line)
                return 0
        run(asked, screen)
    except BadInput as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except Failure as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if first:
            print("run.py: interrupted; --resume --out FOLDER goes on with it", file=sys.stderr)
        return INTERRUPTED
    distributed.leave()
    return 0


def layers_of(values: Mapping[str, Any]) -> list[str]:
    """--layers list: the layers that can be shaped, with their numbers and shapes."""
    from domainshift.models import layer_lines
    from domainshift.setup import set_up

    setup = set_up({n: v for n, v in values.items() if n in Config.names() and n != "mode"})
    return layer_lines(setup.config.model, setup.config.image_size, values.get("after", "conv"))
