"""Train ResNet-18 on one PACS domain and test it on another, with or without shaping.

    python experiments/run.py --target sketch --mode da --layers 4

The same on two GPUs, or with --device cpu on two processors, with the numbers of one:

    torchrun --nproc-per-node 2 experiments/run.py --target sketch --mode da --layers 4

Each run leaves a folder: config.yaml (run it again with --config), metrics.jsonl (a line per
epoch), summary.json, checkpoint.pt, curves.png and, for a shaped run, maps.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distributed
import pictures
import record
import torch
from config import MEMORY_FORMATS, SWITCHES, WHERE, Config, ConfigError, Rule, resolve
from data import CLASSES, DataError, Domain, load_domain, split_holdout
from methods import METHODS, Method, ShapingError
from model import Weights, WeightsError, build_model
from rich.console import Console
from screen import Screen
from train import Evaluation, TrainingError, TrainingImages, check_same, same_class, train

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses


def parser() -> argparse.ArgumentParser:
    """One option for each switch of `Config`. Values stay text here: `resolve` reads them."""
    result = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,  # an abbreviation changes its meaning when a switch is added
        argument_default=argparse.SUPPRESS,  # so that only what was said is in the result
    )
    result.add_argument("--config", metavar="FILE", help="yaml file of switches; flags override it")
    result.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out: with the same flags, or with --out alone and, where they lie "
        "elsewhere now, --data and --weights",
    )
    for name, switch in SWITCHES.items():
        rule: Rule = switch.metadata["rule"]
        option = "--" + name.replace("_", "-")
        if rule.flag:
            result.add_argument(
                option, action=argparse.BooleanOptionalAction, help=switch.metadata["help"]
            )
            continue
        result.add_argument(
            option,
            nargs="+" if rule.many else None,
            metavar="|".join(rule.choices) or option[2:].upper(),
            help=switch.metadata["help"],
        )
    return result


def said(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str], bool]:
    """What the user said: switch values of the yaml file and of the flags, and --resume.

    With them the warnings of the run that wrote the file: how its values came about is not in them.
    """
    flags = vars(parser().parse_args(arguments))
    resume = flags.pop("resume", False)
    file = flags.pop("config", None)
    values = {} if file is None else record.read_yaml(Path(file))
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    values |= flags
    if resume and "out" in flags and file is None and not set(flags) - {*WHERE, "data", "weights"}:
        saved = Path(flags["out"]) / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"out: {flags['out']!r} holds no run to resume (no config.yaml)")
        values = record.read_yaml(saved) | flags
    warnings = values.pop("warnings", [])
    return values, [str(warning) for warning in warnings], resume


def open_folder(config: Config, resume: bool, screen: Screen) -> Path:
    """The run folder, not yet made. Raises ConfigError where another run would be overwritten."""
    folder = Path(config.out or Path("runs") / config.run_name)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {str(folder)!r} is a file; a folder is needed")
    saved, checkpoint = folder / "config.yaml", folder / "checkpoint.pt"
    if not resume:
        # temporary files, which a kill can leave, are hidden
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(
                f"out: {str(folder)!r} already holds files; continue that run with --resume, or "
                "name another folder with --out"
            )
    elif saved.is_file():
        switches = record.read_yaml(saved)
        switches.pop("warnings", None)
        check_same(switches, config, saved)
    if resume and not checkpoint.exists():
        screen.say(f"no checkpoint in {folder} yet: starting from the beginning")
    return folder


@dataclass
class Experiment:
    """Everything a run needs, built and checked before anything is written."""

    method: Method
    weights: Weights
    images: TrainingImages
    evaluate: Evaluation
    target: Domain
    warnings: list[str]  # of what was built, for the record


def build(config: Config) -> Experiment:
    """Data, model and method of a run.

    Raises ConfigError, DataError or WeightsError for what cannot be.
    """
    device = torch.device(config.device)
    model, weights = build_model(config.weights, len(CLASSES), config.seed)
    model.to(device, memory_format=MEMORY_FORMATS[config.memory_format])
    method = METHODS[config.mode](model, config, device)

    domains = {
        name: load_domain(config.data, name, limit=config.limit, cache=config.cache)
        for name in dict.fromkeys((config.source, config.target, *config.mask_sources))
    }
    source, target = domains[config.source], domains[config.target]
    training, held_out = range(len(source.images)), []
    if config.holdout > 0:
        training, held_out = split_holdout(source, config.holdout, config.seed)
    # training gets other domains' images alone, and those only that the method asks for; the
    # target's labels go to the evaluation
    unlabelled, warnings = [], list(weights.warnings)
    if method.uses_target:
        for name in config.mask_sources or (config.target,):
            others = domains[name].images
            chosen = training if name == config.source else range(len(others))
            unlabelled.append((others, chosen))
            if config.pairing == "modulo" and config.apply_maps and config.mode == "da":
                labels = source.labels[training], domains[name].labels[chosen]
                alike, chance = same_class(config, *labels)
                warnings.append(
                    f"pairing modulo: {alike:.0f} % of the images are shaped by a map of {name} of their own "
                    f"class, by chance it would be {chance:.0f} %: both lists are sorted by class, so its "
                    "labels have a part in training"
                )
    images = TrainingImages(source, training, unlabelled)
    images.check_batches(config)
    sets = {"target": (target, range(len(target.images)))}
    if len(held_out):
        sets["holdout"] = (source, held_out)
    if config.test_set == "source-train":
        sets["invalid_test"] = (source, training)
    return Experiment(method, weights, images, Evaluation(sets, config), target, warnings)


def run(config: Config, warnings: list[str], resume: bool, screen: Screen) -> Path:
    """One run, from its switches to its finished folder, which is returned."""
    with distributed.together():
        folder = open_folder(config, resume, screen)
        distributed.take_device(config.device)
    config = replace(config, out=str(folder))
    finished = folder / "summary.json"
    if resume and finished.is_file():
        screen.say(f"this run is finished; its summary, from {finished}:")
        for problem in record.check(folder):
            screen.warn(problem)
        for line in record.summary_lines(json.loads(finished.read_text()), folder):
            screen.say(line)
        return folder

    # one process of a machine before the others, which then find the images decoded
    with distributed.together():
        experiment = build(config) if distributed.first_here() else None
    with distributed.together():
        experiment = experiment or build(config)
    method = experiment.method
    warnings = list(dict.fromkeys(warnings + experiment.warnings))
    for warning in warnings:
        screen.warn(warning)
    epochs, updates = config.length(len(experiment.images.source_indices))
    screen.say(
        f"{config.mode}: {config.source} ({len(experiment.images.source_indices)} images) -> "
        f"{config.target} ({len(experiment.target.images)}), {epochs} epochs ({updates} updates) on "
        f"{config.device}, shaped layers: {', '.join(method.layer_names) or 'none'}"
    )
    saved = folder / "config.yaml"
    with distributed.together():
        if distributed.rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise record.RecordError(
                    f"cannot make folder {folder}: {error.strerror}"
                ) from error
            if not saved.exists():
                record.write_yaml(saved, config.as_dict() | {"warnings": warnings})

    rows = train(method, experiment.images, experiment.evaluate, config, folder, screen)
    method.close()
    if distributed.rank() > 0:
        return folder
    # as it was first written: a resumed run may have another device or folder
    switches = record.read_yaml(saved)
    summary = record.summarize(
        switches,
        rows,
        layers=method.layer_names,
        classes=CLASSES,
        weights={"source": experiment.weights.source, "sha256": experiment.weights.sha256},
        versions=record.versions(config.device),
    )
    try:
        pictures.curves(folder / "curves.png", rows, config)
        if method.layer_names and config.mode != "dropout2d":
            pictures.maps(
                folder / "maps.png", method.model, config, experiment.images, method.layer_names
            )
    except (ValueError, RuntimeError, TypeError) as error:  # no picture is worth a result
        screen.warn(f"a picture could not be drawn: {error}")
    # last, for it says that the run is finished
    record.write_json(finished, record.sealed(summary, switches, rows))
    for line in record.summary_lines(summary, folder):
        screen.say(line)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 1 the run failed, 130 interrupted."""
    first = distributed.rank() == 0
    screen = Screen() if first else Screen(Console(quiet=True))
    name = "run.py" if first else f"run.py (process {distributed.rank()})"
    try:
        with distributed.together():
            with contextlib.ExitStack() as quiet:
                if not first:  # argparse prints help and what is wrong by itself: once is enough
                    quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
                values, earlier, resume = said(sys.argv[1:] if arguments is None else arguments)
            config, warnings = resolve(values)
        warnings = list(dict.fromkeys(earlier + warnings))
        run(config, warnings, resume, screen)
    except (ConfigError, DataError, WeightsError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (record.RecordError, TrainingError, ShapingError, distributed.Lost) as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if first:
            print("run.py: interrupted; the same command with --resume continues", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    distributed.join()
    status = main()
    if status == 0:  # after an error others may be waiting for this process
        distributed.leave()
    sys.exit(status)
