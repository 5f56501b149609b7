"""A whole run: the training, or what is left of it, then every test that has no record yet.

Everything is built and checked before anything is written. See `domainshift.records.schema` for what
lies in a run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainshift import distributed, files
from domainshift.config import Config, Test, preset_values
from domainshift.data.domain import Domain
from domainshift.data.images import split_holdout
from domainshift.data.pairing import same_class
from domainshift.errors import ConfigError, RecordError
from domainshift.lease import Busy, Lease, on_behalf, take
from domainshift.methods import Method, method_named
from domainshift.models import MEMORY_FORMATS, Weights, build_model, state_digest
from domainshift.progress import Screen
from domainshift.records import results
from domainshift.records.results import MANY_SKIPPED, Predictions, Result, Training
from domainshift.records.schema import CHECKPOINT, CONFIG, SUMMARY, TRAINING, Count, Row
from domainshift.records.validate import check, evaluation_faults, read_result
from domainshift.setup import (
    Setup,
    digests,
    origin,
    targets_of_training,
    training_key,
    training_setup,
)
from domainshift.torch_defaults import own_defaults
from domainshift.training import checkpoint
from domainshift.training.curve_log import curve_log
from domainshift.training.evaluation import TestSets, between_epochs, count_of, evaluate_all
from domainshift.training.loop import TrainingImages, check_moved, train

CURVES, MAPS = "curves.png", "maps.png"


@own_defaults()
def execute(
    setup: Setup,
    *,
    tests: Sequence[Test],
    folder: Path,
    resume: bool,
    screen: Screen,
    token: str | None = None,
) -> None:
    """Train, or go on with the training in `folder`, and make every test that has no valid record.

    Args:
        setup: what is asked for. Its training may be that of another method (see `training_setup`).
        tests: which tests the folder must have afterwards, that of the first target first.
        resume: whether `folder` may hold an earlier part of this run.
        token: of the lease of `folder` that a suite holds for this run; None: it takes its own.

    Raises:
        BadInput: the folder holds another run, another process writes to it, or something that is
            asked for cannot be.
        Failure: the run started and cannot go on.
    """
    shared = training_setup(setup)
    with distributed.together():
        distributed.take_device(setup.config.device)
        content = Content.of(folder, shared, tests, resume)
    if content.finished:
        say_finished(folder, content.training, screen)
        return
    with ExitStack() as stack:
        lease = None
        with distributed.together():
            if distributed.rank() == 0:
                lease = stack.enter_context(leased(folder, token, screen))
        with distributed.together():  # another process may have written here meanwhile
            content = Content.of(folder, shared, tests, resume)
        if resume and content.training is None and not (folder / CHECKPOINT).exists():
            screen.say(f"no checkpoint in {folder} yet: starting from the beginning")
        run(setup, shared, content, folder, lease, screen)


def run(
    setup: Setup,
    shared: Setup,
    content: Content,
    folder: Path,
    lease: Lease | None,
    screen: Screen,
) -> None:
    """`execute`, once the folder is this run's. `lease` is None except in process 0."""
    training, tests, missing = content.training, content.tests, content.missing
    # one process of a machine first: the others then find the images decoded
    with distributed.together():
        if distributed.first_here():
            domains_of(shared, tests)
    with distributed.together():
        experiment = build(shared, tests, training, folder)
        check_checkpoint(shared, experiment.method, tests, training, folder)
    announce(setup, experiment, missing, training, screen)
    with distributed.together():
        if distributed.rank() == 0:
            write_config(folder, setup, tests, experiment.warnings, content.saved)
    with closing(experiment.method) as method:
        last: dict[Test, Predictions] = {}  # of the last epoch
        if fresh := training is None:
            training = trained(shared, experiment, tests, last, folder, lease, screen)
        others = [test for test in missing if test not in last]
        epoch = training.record.epochs
        later = evaluate_all(method, others, experiment.sets, epoch, screen)
        for test, predictions in chain(last.items(), later):
            write_evaluation(shared, training, test, predictions, folder, lease)
    if distributed.rank() == 0:
        draw(experiment, training.rows, tests, folder, fresh, screen)
        write_summary(folder, tests)


# --- what a folder holds ----------------------------------------------------------------------


@dataclass
class Content:
    """What a run's folder holds, and what of this run is to do.

    Attributes:
        saved: the content of config.yaml; {} without one.
        tests: those that the folder must have, earlier ones too.
        training: the finished one.
        missing: the tests without a valid record.
        finished: whether nothing is to do.
    """

    saved: dict[str, Any]
    tests: list[Test]
    training: Training | None
    missing: list[Test]
    finished: bool

    @classmethod
    def of(cls, folder: Path, shared: Setup, tests: Sequence[Test], resume: bool) -> Content:
        """Raises BadInput where the folder holds another run."""
        saved = open_folder(folder, shared, resume)
        tests = list(dict.fromkeys([*saved_tests(saved), *tests]))
        training = finished_training(folder, training_key(shared))
        missing = untested(folder, shared, training, tests)
        finished = training is not None and not missing and (folder / SUMMARY).is_file()
        return cls(saved, tests, training, missing, finished)


def open_folder(folder: Path, shared: Setup, resume: bool) -> dict[str, Any]:
    """The content of the folder's config.yaml; {} where there is none.

    Raises ConfigError where another run would be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {str(folder)!r} is a file; a folder is needed")
    if not resume:
        # temporary files, which a kill can leave, are hidden
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(
                f"out: {str(folder)!r} already holds files; go on with that run by --resume, or name "
                "another folder with --out"
            )
        return {}
    path = folder / CONFIG
    if not path.is_file():
        return {}
    saved = files.read_yaml(path)
    check_same(saved, shared, path)
    return saved


def check_same(saved: Mapping[str, Any], shared: Setup, path: Path) -> None:
    """Raises ConfigError, which names what differs, unless saved switches train what `shared` does."""
    method = method_named(str(saved.get("mode")))
    own = shared.config.training_values()
    own.pop("weights")  # another path may hold the same ones; the checkpoint compares their hash
    old = {name: saved.get(name) for name in own} | {"mode": method.trains_as or method.name}
    if targets := targets_of_training(shared):
        old["target"], own["target"] = saved.get("target"), targets
    if differences := checkpoint.switch_differences(old, own):
        raise ConfigError(
            f"{path} is of another configuration ({'; '.join(differences)}); use those values, or "
            "another --out"
        )


def saved_tests(saved: Mapping[str, Any]) -> list[Test]:
    return [Test.model_validate(test) for test in saved.get("tests") or []]


def finished_training(folder: Path, key: str) -> Training | None:
    """The record of a training in `folder`, if it is finished and has this key."""
    if not (folder / TRAINING).is_file():
        return None
    training = results.read_training(folder)
    if training.record.key == key:
        return training
    if not (folder / CHECKPOINT).is_file():
        raise ConfigError(
            f"{folder / TRAINING} is of another training (its images, weights or length differ), and "
            f"{CHECKPOINT} is missing; use another --out"
        )
    return None  # the checkpoint names what differs, or goes on to more epochs


def untested(
    folder: Path, shared: Setup, training: Training | None, tests: Sequence[Test]
) -> list[Test]:
    """The tests that have no valid record of these weights.

    Raises ConfigError where a valid one is of other images.
    """
    if training is None:
        return list(tests)
    missing, old = [], {}
    for test in tests:
        try:
            record = results.read_evaluation(folder, test.name)
        except RecordError:
            missing.append(test)
            continue
        if any(evaluation_faults(folder, training.record, record)):
            missing.append(test)
        else:
            old[test.domain] = record.digest
    if differences := checkpoint.image_differences(old, digests(shared, old)):
        raise ConfigError(
            f"{folder} has tests on other images ({'; '.join(differences)}); use the same images, or "
            "another --out"
        )
    return missing


@contextmanager
def leased(folder: Path, token: str | None, screen: Screen) -> Iterator[Lease]:
    """The lease of a folder, which is made where it is missing and, while still empty, removed again.

    What a kill left half is removed. Raises RecordError or ConfigError.
    """
    if token is not None:
        lease = on_behalf(folder, token)
        remove_halves(folder)
        yield lease
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lease = take(folder)
        except Busy as error:
            raise ConfigError(f"out: {error}; wait for it, or name another folder") from None
        except OSError as error:
            raise RecordError(f"out: cannot write to {folder}: {error.strerror}") from error
        with lease:
            if lease.before:
                screen.say(f"{folder} was in use by {lease.before}; that process is gone")
            remove_halves(folder)
            yield lease
    finally:
        for path in made:
            with suppress(OSError):  # it holds files, or is not there
                path.rmdir()


def remove_halves(folder: Path) -> None:
    """Remove the files that a kill left half written."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def write_config(
    folder: Path, setup: Setup, tests: Sequence[Test], warnings: Sequence[str], saved: Mapping
) -> None:
    """config.yaml as it was first written, with the places, the length and all tests up to now."""
    config = setup.config
    values = config.as_dict()
    if saved:
        newer = {*config.names("place"), *config.options.names("place"), "epochs"}
        values = dict(saved) | {name: values[name] for name in newer & values.keys()}
    values |= {"tests": [test.model_dump() for test in tests]}
    values.setdefault("warnings", list(warnings))
    if values != saved:
        files.write_yaml(folder / CONFIG, values)


def check_checkpoint(
    shared: Setup,
    method: Method,
    tests: Sequence[Test],
    training: Training | None,
    folder: Path,
) -> None:
    """Give a network the weights of a finished training, or see that an unfinished one can go on.

    Raises BadInput, before anything in the folder is changed.
    """
    path = folder / CHECKPOINT
    if training is not None:
        own = made_of(shared, tests)
        checkpoint.load_weights(path, method, training.record.weights_digest, own)
    elif path.exists():
        checkpoint.check(checkpoint.read(path), path, method, made_of(shared, tests))


def made_of(shared: Setup, tests: Sequence[Test]) -> dict[str, Any]:
    """`origin`, with the images of the tested domains: what a checkpoint says of itself."""
    return origin(shared) | {"tested": digests(shared, (test.domain for test in tests))}


# --- building ---------------------------------------------------------------------------------


@dataclass
class Experiment:
    """Everything that a run needs, built and checked before anything is written."""

    method: Method
    weights: Weights
    images: TrainingImages
    sets: TestSets
    held_out: list[int]  # source images held out, per class
    log: Callable[[Row], None]
    warnings: list[str]


def domains_of(shared: Setup, tests: Sequence[Test]) -> dict[str, Domain]:
    """The domains that training or a test reads. Raises DataError."""
    config = shared.config
    names = (*shared.method.domains(config), *(test.domain for test in tests))
    return {name: shared.data.load(name, config.limit) for name in dict.fromkeys(names)}


def build(
    shared: Setup, tests: Sequence[Test], training: Training | None, folder: Path
) -> Experiment:
    """Images, network and method of a run.

    Args:
        training: the finished one, whose weights the network will get.

    Raises BadInput for what cannot be.
    """
    config, data = shared.config, shared.data
    domains = domains_of(shared, tests)
    device = torch.device(config.device)
    # the weights of a finished training are in its checkpoint: nothing else is read for a test
    start = config.weights if training is None else "none"
    model, weights = build_model(config.model, start, len(data.classes), config.seed)
    model.to(device, memory_format=MEMORY_FORMATS[config.memory_format])
    method = shared.method(model, config, device)

    source = domains[config.source]
    training_images, held_out = np.arange(len(source.images)), np.arange(0)
    if config.holdout > 0:
        training_images, held_out = split_holdout(source, config.holdout, config.seed)
    # training gets the images of other domains alone, and only those that the method asks for
    others, warnings = [], [*shared.warnings, *weights.warnings]
    for name in method.others(config):
        own = training_images if name == config.source else np.arange(len(domains[name].images))
        others.append((domains[name].images, own))
        warnings += pairing_warnings(shared, source, training_images, domains[name], own)
    images = TrainingImages(source, training_images, others)
    images.check_batches(config)
    return Experiment(
        method=method,
        weights=weights,
        images=images,
        sets=TestSets(data, config, training_images, held_out),
        held_out=np.bincount(source.labels[held_out], minlength=len(data.classes)).tolist(),
        log=curve_log(config, folder),
        warnings=list(dict.fromkeys(warnings)),
    )


def pairing_warnings(
    shared: Setup, source: Domain, ours: np.ndarray, other: Domain, theirs: np.ndarray
) -> list[str]:
    """How far a pairing by position lets labels of another domain decide which map an image gets."""
    config, method = shared.config, shared.method
    maps = bool(method.map_words and method.layer_names(config))
    if not maps or config.options.pairing != "modulo":
        return []
    alike, chance = same_class(
        config.seed, source.labels[ours], other.labels[theirs], config.options.pairing
    )
    return [
        f"pairing modulo: {alike:.0f} % of the images are shaped by a map of {other.name} of their own "
        f"class; by chance it would be {chance:.0f} %. Both lists are sorted by class, so the labels of "
        f"{other.name} have a part in training"
    ]


def announce(
    setup: Setup,
    experiment: Experiment,
    missing: Sequence[Test],
    training: Training | None,
    screen: Screen,
) -> None:
    """What the run will do, its warnings, and how a baseline of its preset is tested otherwise."""
    config, images = setup.config, experiment.images
    warnings = [*training.record.warnings, *setup.warnings] if training else experiment.warnings
    for warning in dict.fromkeys(warnings):
        screen.warn(warning)
    # a method that is a baseline tested otherwise differs on purpose
    if setup.method.trains_as is None and (difference := unlike_baseline(config)):
        screen.say(difference)
    what = f"{config.mode}: {config.source} ({len(images.source_indices)} images)"
    names = ", ".join(test.name for test in missing) or "nothing"
    if training:
        screen.say(f"{what} is trained; tests to make: {names}")
        return
    epochs, updates = config.length(len(images.source_indices))
    layers = ", ".join(experiment.method.layers) or "none"
    screen.say(
        f"{what}, epochs: {epochs}, updates: {updates}, on {config.device}, autocast {config.amp}, shaped "
        f"layers: {layers}; tests: {names}"
    )


def unlike_baseline(config: Config) -> str:
    """In one line, how BatchNorm is treated otherwise than in a baseline of the preset; "": alike."""
    default = Config.model_fields
    try:
        values = preset_values(config.preset, default["mode"].default)
    except ConfigError:  # the preset has no baseline
        return ""
    usual = values.get("bn_at_test", default["bn_at_test"].default)
    if config.bn_at_test == usual:
        return ""
    return (
        f"a baseline of preset {config.preset} is tested with bn_at_test {usual}, this run with "
        f"{config.bn_at_test}: for a fair comparison give the baseline --bn-at-test "
        f"{config.bn_at_test}"
    )


# --- training and testing ---------------------------------------------------------------------


def trained(
    shared: Setup,
    experiment: Experiment,
    tests: Sequence[Test],
    last: dict[Test, Predictions],
    folder: Path,
    lease: Lease | None,
    screen: Screen,
) -> Training:
    """Train, write the record, and leave the predictions of the last epoch's tests in `last`."""
    method, config = experiment.method, shared.config
    epochs, _ = config.length(len(experiment.images.source_indices))

    def test(epoch: int) -> dict[str, Count]:
        wanted = tests if epoch == epochs else between_epochs(tests, config)
        last.clear()
        last.update(evaluate_all(method, wanted, experiment.sets, epoch, screen))
        return {test.name: count_of(predictions) for test, predictions in last.items()}

    parts = made_of(shared, tests)
    rows = train(
        method, experiment.images, config, folder, parts, test, screen, experiment.log, lease
    )
    with distributed.together():
        check_moved(method, rows)
    skipped, updates = (sum(getattr(row, n) for row in rows) for n in ("skipped", "updates"))
    if skipped > MANY_SKIPPED * updates:
        lost = f"float16 skipped {skipped} of {updates} updates, more than {MANY_SKIPPED:.0%}"
        experiment.warnings.append(lost)
        screen.warn(lost)
    record = results.training_record(
        shared,
        rows,
        layers=method.layers,
        held_out=experiment.held_out,
        weights=experiment.weights,
        weights_digest=state_digest(method.model.state_dict()),
        warnings=experiment.warnings,
    )
    with distributed.together():
        if distributed.rank() == 0:
            lease.confirm()
            results.write_training(folder, record)
    return Training(record, rows)


def write_evaluation(
    shared: Setup,
    training: Training,
    test: Test,
    predictions: Predictions,
    folder: Path,
    lease: Lease | None,
) -> None:
    with distributed.together():
        if distributed.rank() == 0:
            lease.confirm()
            record, content = results.evaluation_record(
                training.record,
                test,
                predictions,
                domain=results.domain_data(shared, test.domain),
                version_of=results.versions(shared.config.device),
            )
            results.write_evaluation(folder, record, content)


# --- what people read -------------------------------------------------------------------------


def draw(
    experiment: Experiment,
    rows: Sequence[Row],
    tests: Sequence[Test],
    folder: Path,
    fresh: bool,
    screen: Screen,
) -> None:
    """The pictures, all after a training, else those that are missing. No picture is worth a result."""
    method = experiment.method
    wanted = {CURVES: True, MAPS: bool(method.map_words and method.layers)}
    wanted = {n: w and (fresh or not (folder / n).exists()) for n, w in wanted.items()}
    if not any(wanted.values()):
        return
    from domainshift.training import pictures  # matplotlib is slow to import

    try:
        if wanted[CURVES]:
            records = [results.read_evaluation(folder, test.name) for test in tests]
            pictures.curves(folder / CURVES, rows, method, records)
        if wanted[MAPS]:
            pictures.maps(folder / MAPS, method, experiment.images)
    except (ValueError, RuntimeError, TypeError) as error:
        screen.warn(f"a picture could not be drawn: {error}")


def write_summary(folder: Path, tests: Sequence[Test]) -> None:
    """summary.json of the first target. It comes last, because it says that the run is finished."""
    result = read_result(folder, tests[0].name)
    if not isinstance(result, Result):
        raise RecordError(f"{folder}: {'; '.join(result.lines)}")
    files.write_json(folder / SUMMARY, result.summary)


def say_finished(folder: Path, training: Training, screen: Screen) -> None:
    screen.say(f"the run in {folder} is finished")
    for warning in training.record.warnings:
        screen.warn(warning)
    for problem in check(folder):
        screen.warn(problem)


def closing_lines(folder: Path) -> list[str]:
    """The few lines that close a run on the screen: several for one target, one for each of several."""
    tests = [test for test in saved_tests(files.read_yaml(folder / CONFIG)) if test.images == "all"]
    outcomes = [read_result(folder, test.name) for test in tests]
    rows = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    lines = [
        f"{outcome.name}: {line}"
        for outcome in outcomes
        if not isinstance(outcome, Result)
        for line in outcome.lines
    ]
    if rows:
        summary = rows[0].summary
        lines += (
            target_lines(summary)
            if len(outcomes) == 1
            else [several_title(summary), *map(target_line, rows)]
        )
        lines += source_lines(summary)
    return [*lines, f"record: {folder}"]


def shaped(summary: Mapping[str, Any]) -> str:
    return f"shaped layers: {', '.join(summary['layer_names']) or 'none'}"


def several_title(summary: Mapping[str, Any]) -> str:
    return f"{summary['mode']}: {summary['source']}, epoch {summary['epochs']}, {shaped(summary)}"


def target_line(result: Result) -> str:
    """One test of several, in one line."""
    test = result.evaluation
    collapsed = f", COLLAPSED to {test.collapsed_to}" if test.collapsed else ""
    return (
        f"{test.name:<16} {test.accuracy:.2f} %  ({test.correct} of {test.total}), macro "
        f"{test.macro_accuracy:.2f} %, majority {test.majority_rate:.2f} %{collapsed}"
    )


def target_lines(summary: Mapping[str, Any]) -> list[str]:
    """The only test of a run, in several lines."""
    return [
        f"{summary['mode']}: {summary['source']} -> {summary['target']}, {shaped(summary)}",
        f"target accuracy  {summary['target_accuracy']:.2f} %  "
        f"({summary['target_correct']} of {summary['target_total']}, epoch {summary['epochs']})",
        f"macro accuracy   {summary['macro_accuracy']:.2f} %",
        f"majority rate    {summary['majority_rate']:.2f} %",
        f"collapsed        {'YES' if summary['collapsed'] else 'no'}",
    ]


def source_lines(summary: Mapping[str, Any]) -> list[str]:
    """The source's figures and the time of a run."""
    lines = []
    if summary["source_accuracy"] is not None:
        lines.append(
            f"source accuracy  {summary['source_accuracy']:.2f} %  "
            f"({summary['source_correct']} of {summary['source_total']} held out)"
        )
    if "invalid_test_total" in summary:
        lines.append(
            f"INVALID FIGURE   {summary['invalid_test_accuracy']:.2f} %  "
            f"({summary['invalid_test_correct']} of {summary['invalid_test_total']} trained on)"
        )
    if summary["selected_epoch"] is not None:
        lines.append(
            f"selected         {summary['selected_target_accuracy']:.2f} %  on the target at epoch "
            f"{summary['selected_epoch']}, the best on held-out source images"
        )
    return [
        *lines,
        f"time             {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} training "
        "images/s",
    ]
