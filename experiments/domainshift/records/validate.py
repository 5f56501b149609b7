"""What is wrong with a record: everything in it that can be computed again, is.

The rules by name are those of the audit (`domainshift.report.audit`), which adds the rules that need
several records.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from torch import nn

from domainshift.config import Config, Test, hash_of, validated
from domainshift.data import official_counts
from domainshift.data.domain import Domain
from domainshift.data.images import split_holdout
from domainshift.errors import BadInput, RecordError
from domainshift.methods import Method, method_named
from domainshift.models import bare_model, imagenet, output_shapes, weights_digest
from domainshift.records.results import (
    OtherVersion,
    Result,
    companion,
    confusion_of,
    figures,
    percent,
    read_evaluation,
    read_predictions,
    read_training,
    seal,
)
from domainshift.records.schema import (
    EVALUATIONS,
    Count,
    EvaluationRecord,
    Row,
    TrainingRecord,
    Versions,
)
from fastshape.reference import drop_threshold

Fault = tuple[str, str]  # rule, words

ROUNDING = 1e-9  # relative, of sums and products in float64

# The share of zeros in a random map may differ from p_zero by so many standard deviations, and by FEW
# draws. By Bernstein's inequality a sound map is further away with a probability below 5e-11.
DEVIATIONS, FEW = 7.0, 17.0

# float16 rounds to 11 bits; a softmax cross-entropy moves by at most twice what its logits do
LOGITS_ROUNDING, LEAST_ROUNDING = 2 * 2.0**-11, 1e-6

# A test that was made again by another machine or library, or on a GPU, rounds otherwise.
OTHER_MACHINE, OTHER_IMAGES = 0.05, 3  # part of a figure; images besides


class Problem(NamedTuple):
    """A record that no table uses."""

    name: str  # of the training's folder, and of the test
    kind: str  # unfinished | half-written | another version | edited | broken rule | another run
    lines: Sequence[str]
    rules: Sequence[str] = ()  # of the audit, one per line; none: "record"

    @property
    def fails(self) -> bool:
        """Whether it is a record of something that must not be, rather than none."""
        return self.kind in ("edited", "broken rule", "another run")


def read_result(folder: Path, name: str) -> Result | Problem:
    """One evaluation of a training, with the tests of the source beside it, unless it is unusable.

    Args:
        folder: of the training.
        name: of the test.
    """
    where = f"{folder.name}/{name}"
    try:
        training, rows = read_training(folder)
        evaluation = read_evaluation(folder, name)
        if problems := list(name_faults(name, evaluation)):
            return Problem(where, "edited", [words for _, words in problems], ["record"])
        beside = {}
        for images in ("holdout", "train"):
            other = companion(evaluation, training.source, images)
            exists = (folder / EVALUATIONS / f"{other}.json").exists()
            beside[images] = read_evaluation(folder, other) if exists else None
    except OtherVersion as error:
        return Problem(where, "another version", [short(error, folder)])
    except RecordError as error:
        kind = "unfinished" if "is unfinished" in str(error) else "half-written"
        return Problem(where, kind, [short(error, folder)])
    result = Result(folder, training, rows, evaluation, beside["holdout"], beside["train"])
    if problems := faults(result):
        rules, lines = zip(*problems, strict=True)
        return Problem(where, "edited" if "record" in rules else "broken rule", lines, rules)
    return result


def short(message: object, folder: Path) -> str:
    """A message without the path of the folder that it is about."""
    text = str(message).replace(f"{folder}/", "").replace(f"{folder}: ", "")
    return text.replace(str(folder), folder.name)


def check(folder: Path) -> list[str]:
    """What is wrong with the records in a run's folder, one line each; [] where all is well.

    Needs the records alone: neither data nor initial weights.
    """
    try:
        training, rows = read_training(folder)
    except RecordError as error:
        return [str(error)]
    lines = [words for _, words in training_faults(training, rows)]
    for path in sorted((folder / EVALUATIONS).glob("*.json")):
        try:
            record = read_evaluation(folder, path.stem)
        except RecordError as error:
            lines.append(str(error))
            continue
        faults = [
            *name_faults(path.stem, record),
            *evaluation_faults(folder, training, record),
            *count_differences(training, rows, record),
        ]
        lines += [f"{path.stem}: {words}" for _, words in faults]
    return lines


def faults(result: Result) -> list[Fault]:
    """What is wrong with a result: (rule, words) each.

    The rule is "record" where a file is not as it was written, else one of the audit's: the record is
    whole, and the run itself was not as it must be.
    """
    records = [result.evaluation, *filter(None, (result.holdout, result.invalid))]
    problems = list(
        training_faults_once(result.folder, result.training.seal, result.training, result.rows)
    )
    for record in records:
        problems += evaluation_faults(result.folder, result.training, record)
        problems += count_differences(result.training, result.rows, record)
    for images, record in (("holdout", result.holdout), ("train", result.invalid)):
        if images == "holdout" and record is None and any(result.training.held_out):
            name = companion(result.evaluation, result.training.source, images)
            problems.append(("labels", f"{name}: the test of the held-out images is missing"))
    return problems


_known: dict[tuple[Path, str], list[Fault]] = {}


def training_faults_once(
    folder: Path, sealed: str, training: TrainingRecord, rows: Sequence[Row]
) -> list[Fault]:
    """`training_faults`, computed once for all evaluations of a training."""
    key = folder, sealed + seal(training, rows)
    if key not in _known:
        _known[key] = list(training_faults(training, rows))
    return _known[key]


# --- a training -------------------------------------------------------------------------------


def config_of(training: TrainingRecord) -> Config:
    """The configuration that a record holds. Raises ConfigError for values that are not allowed."""
    values = training.places | training.switches
    return validated(values | {"target": training.targets or ["?"]}, method_of_record(training))


def method_of_record(training: TrainingRecord) -> type[Method]:
    """The record's method; the bare base class where a stranger's method file is not loaded."""
    try:
        return method_named(training.mode)
    except BadInput:
        if training.places.get("method_file") is None:
            raise
        return Method


def training_faults(training: TrainingRecord, rows: Sequence[Row]) -> Iterator[Fault]:
    """What is wrong with a training's record and its epochs."""
    if seal(training, rows) != training.seal:
        yield "record", "training.json: edited after the run: the seal does not fit"
    if not rows:
        yield "record", "metrics.jsonl: no epoch"
        return
    try:
        config = config_of(training)
    except BadInput as error:
        yield "record", f"training.json: {error}"
        return
    yield from derived_faults(training, config, rows)
    yield from weights_faults(training, config)
    data = training.domains.get(training.source)
    if data is None or len(data.counts) != len(training.classes):
        yield "record", "training.json: domains has no count of each class of the source"
        return
    right = held_out_of(tuple(data.counts), config.holdout)
    if training.held_out != right:
        yield (
            "labels",
            f"training.json: held_out is {training.held_out}; holdout {config.holdout:g} of "
            f"{data.counts} images holds out {right}",
        )
        return
    yield from row_faults(training, config, rows)
    method = method_of_record(training)
    if method.name == training.mode:  # a method of one's own may do otherwise
        untouched = method.statistics_untouched(config)
        for row in rows:
            if row.bn_untouched != untouched:
                where = f"metrics.jsonl, epoch {row.epoch}"
                yield "BatchNorm", f"{where}: bn_untouched is {row.bn_untouched}, not {untouched}"
        yield from rate_faults(config, rows)
        yield from map_faults(training, config, method, rows)
    if overlap := set(training.targets) & {training.source}:
        yield "labels", f"{', '.join(overlap)} is source and target"
    for name, data in training.domains.items():
        yield from count_faults(training, name, data.counts)


@functools.lru_cache(maxsize=256)
def held_out_of(counts: Sequence[int], fraction: float) -> list[int] | None:
    """Images per class that `split_holdout` holds out; None where it refuses the fraction."""
    if fraction == 0:
        return [0] * len(counts)
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(map(str, range(len(counts))))
    try:
        _, held = split_holdout(Domain("", labels, labels, (), names, ""), fraction, seed=0)
    except BadInput:  # a class of one image
        return None
    return np.bincount(labels[held], minlength=len(counts)).tolist()


def derived_faults(
    training: TrainingRecord, config: Config, rows: Sequence[Row]
) -> Iterator[Fault]:
    """Where fields of training.json are not what its other fields and the epochs give."""
    key = key_of(training, config)
    if key not in (None, training.key):
        yield "record", f"training.json: key is {training.key[:12]}; its fields give {key[:12]}"
    last = rows[-1]
    if min(last.source_train_total, *(row.train_seconds for row in rows)) <= 0:
        yield "record", "metrics.jsonl: an epoch without images or without time"
        return
    untouched = [row.bn_untouched for row in rows]
    seconds = sum(row.train_seconds for row in rows)
    expected = {
        "mode": config.mode,
        "source": config.source,
        "seed": config.seed,
        "epochs": len(rows),
        "updates": sum(row.updates for row in rows),
        "skipped": sum(row.skipped for row in rows),
        "passes": sum(row.passes for row in rows),
        "train_loss": last.train_loss,
        "source_train_accuracy": percent(last.source_train_correct, last.source_train_total),
        "fired": {name: sum(row.fired.get(name, 0) for row in rows) for name in last.fired},
        "density": last.density,
        "bn_untouched": None if None in untouched else all(untouched),
        "seconds": seconds,
        "versions": last.versions,
        "images_per_second": sum(row.source_train_total for row in rows) / seconds,
    }
    for name, right in expected.items():
        if getattr(training, name) != right:
            value = getattr(training, name)
            yield (
                "record",
                f"training.json: {name} is {shortened(value)}; the rest gives {shortened(right)}",
            )


def key_of(training: TrainingRecord, config: Config) -> str | None:
    """The key that a record's fields give; None where it depends on what is not here."""
    if training.places.get("method_file") is not None:
        return None
    weights = training.weights.sha256
    if config.weights in ("imagenet", "none"):
        try:
            weights = weights_digest(config.weights, config.model)
        except BadInput:  # a network that is not installed here
            return None
    parts = {
        "switches": {n: v for n, v in training.switches.items() if n != "weights"},
        "targets": training.targets,
        "images": {name: data.digest for name, data in training.domains.items()},
        "weights": weights,
        "method_file": None,
    }  # as `domainshift.setup.origin` has them
    return hash_of(parts)


def weights_faults(training: TrainingRecord, config: Config) -> Iterator[Fault]:
    """Where the initial weights are not those that the switches name."""
    source, digest = training.weights.source, training.weights.sha256
    if source != Path(config.weights).name:
        yield (
            "record",
            f"training.json: weights.source is {source!r}; the switches have {config.weights!r}",
        )
    if (digest is None) != (config.weights == "none"):
        yield "weights", f"weights.sha256 is {digest!r} of weights {config.weights!r}"
    elif config.weights == "imagenet" and not str(digest).startswith(published_hash(config.model)):
        right = published_hash(config.model)
        yield (
            "weights",
            f"weights.sha256 is {digest[:12]}; that of the imagenet weights of {config.model} begins "
            f"with {right}",
        )


@functools.cache
def published_hash(model: str) -> str:
    """How the hash of torchvision's file of ImageNet weights begins, by its name; "" if not known."""
    try:
        _, entry = imagenet(model)
    except BadInput:
        return ""
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", str(getattr(entry, "url", "")))
    return match[1] if match and not model.startswith("timm:") else ""


def row_faults(training: TrainingRecord, config: Config, rows: Sequence[Row]) -> Iterator[Fault]:
    """Where the epochs are not those that the switches ask for."""
    images = sum(training.domains[training.source].counts) - sum(training.held_out)
    epochs, updates = config.length(images)
    if len(rows) != epochs:
        yield "length", f"metrics.jsonl has {len(rows)} epochs; {updates} updates take {epochs}"
    for number, (row, sizes) in enumerate(
        zip(rows, updates_of(config, images, rows), strict=True), 1
    ):
        where = f"metrics.jsonl, epoch {number}"
        expected = [
            ("length", "epoch", number),
            ("length", "updates", len(sizes)),
            ("length", "passes", sum(passes_of(size, config.accumulate) for size in sizes)),
            ("labels", "source_train_total", sum(sizes)),
            ("record", "run", training.run),
        ]
        for rule, name, right in expected:
            if getattr(row, name) != right:
                yield rule, f"{where}: {name} is {getattr(row, name)!r}, not {right!r}"
        for rule, words in (*bounds_faults(row, config), *fired_faults(training, row)):
            yield rule, f"{where}: {words}"
        for name, count in row.tests.items():
            for words in loss_faults(count, config.batch_size):
                yield "record", f"{where}: test {name}: {words}"


def updates_of(config: Config, images: int, rows: Sequence[Row]) -> Iterator[list[int]]:
    """The images of each update, epoch by epoch."""
    done, (_, updates) = 0, config.length(images)
    for _ in rows:
        sizes = batch_sizes(min(images, (updates - done) * config.batch_size), config.batch_size)
        done += len(sizes)
        yield sizes


def bounds_faults(row: Row, config: Config) -> Iterator[Fault]:
    """Where a figure of an epoch is outside what it can be."""
    if not 0 <= row.source_train_correct <= row.source_train_total:
        text = f"source_train_correct is {row.source_train_correct}"
        yield "record", f"{text}, of source_train_total {row.source_train_total}"
    if row.train_loss < 0:
        yield "record", f"train_loss is {row.train_loss:g}; a cross-entropy is from 0"
    if not 0 < row.train_seconds <= row.seconds:
        text = f"train_seconds is {row.train_seconds:g}"
        yield "record", f"{text}; it must be above 0 and within seconds, {row.seconds:g}"
    if not 0 <= row.skipped <= row.updates:
        yield "steps", f"skipped is {row.skipped}; it must be from 0 to updates, {row.updates}"
    elif row.skipped and config.amp != "float16":
        yield "steps", f"skipped is {row.skipped}; only amp float16 skips updates, not {config.amp}"


def fired_faults(training: TrainingRecord, row: Row) -> Iterator[Fault]:
    """Where layers were not shaped once, or several times, in each pass."""
    if set(row.fired) != set(training.layers):
        yield "hooks", f"fired {sorted(row.fired)}, not {training.layers}"
    for name, times in row.fired.items():
        if times < row.passes or times % max(1, row.passes):
            yield "hooks", f"layer {name} fired {times} times in {row.passes} passes"


def rate_faults(config: Config, rows: Sequence[Row]) -> Iterator[Fault]:
    """Where a learning rate is not that of the schedule in `Method`, at the start of the epoch.

    Updates that float16 skipped do not count, nor do epochs in which it skipped all. A number of them that
    cannot be is a fault of `bounds_faults`, and none is taken off here. A training that grew has the rates of
    its new length: it may only grow while they are those of the old one.
    """
    length = config.updates or config.epochs
    step = max(1, int(config.step_fraction * length))
    done = 0  # epochs, or updates
    for number, row in enumerate(rows):
        right = config.lr * config.gamma ** (done // step)
        made = row.updates - (row.skipped if 0 <= row.skipped <= row.updates else 0)
        done += made if config.updates else made > 0
        if not math.isclose(row.lr, right, rel_tol=ROUNDING, abs_tol=1e-300):
            yield (
                "rates",
                f"metrics.jsonl, epoch {number + 1}: lr is {row.lr:g}; the switches give {right:g}",
            )


# --- maps -------------------------------------------------------------------------------------


def map_faults(
    training: TrainingRecord, config: Config, method: type[Method], rows: Sequence[Row]
) -> Iterator[Fault]:
    """Where the density of a layer's last map in an epoch is none that its maps can have."""
    names = training.layers if method.map_words else []
    try:
        shapes = output_shapes(config.model, config.image_size)
    except BadInput:  # a network that is not installed here
        return
    images = sum(training.domains[training.source].counts) - sum(training.held_out)
    known: dict[int, Mapping[str, Limits]] = {}
    for row, sizes in zip(rows, updates_of(config, images, rows), strict=True):
        where = f"metrics.jsonl, epoch {row.epoch}"
        if not sizes:  # an epoch too many
            continue
        if set(row.density) != set(names):
            yield "maps", f"{where}: density of {sorted(row.density)}, not of {names}"
            continue
        last = last_pass(sizes[-1], config.accumulate)
        if last not in known:
            known[last] = limits_of_maps(config, names, shapes, last)
        for name, limits in known[last].items():
            if wrong := limits.fault(row.density[name]):
                yield (
                    "maps",
                    f"{where}: the map after {name} has density {row.density[name]:g}; {wrong}",
                )


def last_pass(images: int, accumulate: int) -> int:
    """Images in the last pass of an update."""
    most = -(-images // accumulate)
    return images - (passes_of(images, accumulate) - 1) * most


class Limits(NamedTuple):
    """What the density of a layer's map can be."""

    elements: int  # of the map
    least: float
    most: float
    why: str

    def fault(self, density: float) -> str | None:
        ones = density * self.elements
        if not self.least * self.elements - 0.25 <= ones <= self.most * self.elements + 0.25:
            return f"it must be {self.least:.6g} to {self.most:.6g}: {self.why}"
        if abs(ones - round(ones)) > 1e-3:  # of several processes the sum is rounded
            return f"that is no whole number of its {self.elements} elements"
        return None


def limits_of_maps(
    config: Config, names: Sequence[str], shapes: Mapping[str, list], images: int
) -> dict[str, Limits]:
    """The limits of each layer whose shape is known, for the map of so many images."""
    options = config.options
    p_zero = list(getattr(options, "p_zero", ()))
    rates: Sequence[Any] = (
        p_zero * len(names) if len(p_zero) == 1 else p_zero or [None] * len(names)
    )
    limits = {}
    for name, rate in zip(names, rates, strict=False):
        if not (calls := shapes.get(name)):
            continue
        elements = images * math.prod(calls[-1])
        if rate is None:
            least, most, why = recorded_limits(config, name, calls[-1], elements)
        else:
            least, most, why = random_limits(options, rate, calls[-1], images)
        limits[name] = Limits(elements, least, most, why)
    return limits


def random_limits(
    options: Any, p_zero: float, shape: Sequence[int], images: int
) -> tuple[float, float, str]:
    """Least and most density of a random map, and why."""
    rate = drop_threshold(p_zero) / 65536  # what p_zero is rounded to
    unit = getattr(options, "mask_unit", "element")
    draws = float(images * shape[0])
    for size in shape[1:]:
        side = {"element": 1, "channel": size}.get(unit) or min(size, options.block_size or size)
        draws *= size / side
    off = DEVIATIONS * math.sqrt(rate * (1 - rate) / draws) + FEW / draws if rate else 0.0
    why = f"p_zero is {p_zero:g}, drawn for each {unit}"
    return max(0.0, 1 - rate - off), min(1.0, 1 - rate + off), why


def recorded_limits(
    config: Config, name: str, shape: Sequence[int], elements: int
) -> tuple[float, float, str]:
    """Least and most density of a recorded map, and why.

    None at all is possible: a network that collapsed passes zeros on. All is not after a convolution
    without bias or a BatchNorm, whose many outputs are never all positive; 1 is also what is
    recorded of a layer without a map. Elsewhere, as after a sigmoid, all may be positive.
    """
    options = config.options
    if top_k := getattr(options, "top_k", None):
        plane = math.prod(shape[1:])
        most = max(1, round(top_k * plane)) / plane
        exact = not options.product and len(options.mask_sources) < 2
        return most if exact else 0.0, most, f"top_k is {top_k:g}"
    if mixes_signs(config.model, name) and math.prod(shape) >= 32:
        return 0.0, 1 - 1 / elements, "1 means that no map was applied"
    return 0.0, 1.0, "it is a share"


def mixes_signs(model: str, name: str) -> bool:
    """Whether a module gives positive and negative values, or zeros, whatever comes in."""
    module = bare_model(model).get_submodule(name)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.bias is None
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def count_faults(training: TrainingRecord, domain: str, counts: Sequence[int]) -> Iterator[Fault]:
    """Where a whole domain of a known data set has another number of images."""
    official = official_counts(training.data, domain)
    if official is None or not isinstance(training.switches.get("limit"), int | None):
        return
    limit = training.switches.get("limit")
    official = [n if limit is None else min(n, limit) for n in official]
    if list(counts) != official:
        yield (
            "k of n",
            f"{domain} has {list(counts)} images of the classes; {training.data} has {official}",
        )


def batch_sizes(images: int, size: int) -> list[int]:
    """Sizes of the batches that so many images make."""
    return [min(size, images - first) for first in range(0, images, size)]


def passes_of(images: int, accumulate: int) -> int:
    """Passes that an update on so many images takes."""
    return -(-images // -(-images // accumulate))


# --- an evaluation ----------------------------------------------------------------------------


def evaluation_faults(
    folder: Path, training: TrainingRecord, record: EvaluationRecord
) -> Iterator[Fault]:
    """What is wrong with the record of a test of a training."""
    where = f"{record.name}.json"
    if seal(record) != record.seal:
        yield "record", f"{where}: edited after the run: the seal does not fit"
    expected = {
        "training": training.key,
        "weights_digest": training.weights_digest,
        "epoch": training.epochs,
        "classes": training.classes,
    }
    countable = are_counts(record.confusion, len(training.classes))
    if record.classes == training.classes and countable:
        expected |= figures(record.confusion, record.classes)
    for name, right in expected.items():
        if getattr(record, name) != right:
            yield (
                "record",
                f"{where}: {name} is {shortened(getattr(record, name))}, not {shortened(right)}",
            )
    if not countable:
        yield "record", f"{where}: confusion has no count for each pair of classes"
        return
    data = training.domains.get(record.domain)
    if data is not None and (data.digest, data.counts) != (record.digest, record.counts):
        yield "record", f"{where}: {record.domain} had other images than in training"
    if record.seconds <= 0:
        yield "record", f"{where}: seconds is {record.seconds:g}; a test takes time"
    batch_size = training.switches.get("batch_size")
    if isinstance(batch_size, int) and batch_size > 0:  # else the training is at fault
        for words in loss_faults(record, batch_size):
            yield "record", f"{where}: {words}"
        yield from file_faults(folder, record, batch_size)
    yield from count_faults(training, record.domain, record.counts)
    tested = [sum(row) for row in record.confusion]
    right = {
        "all": record.counts,
        "holdout": training.held_out,
        "train": [n - h for n, h in zip(record.counts, training.held_out, strict=False)],
    }[record.images]
    if tested != right:
        yield "k of n", f"{where}: tested on {tested} images of the classes, not {right}"
    if record.images != "all" and record.domain != training.source:
        yield "labels", f"{where}: {record.images} of {record.domain}, which is not the source"


def are_counts(confusion: Sequence[Sequence[int]], classes: int) -> bool:
    """Whether a confusion matrix is one of so many classes, with images in it."""
    square = len(confusion) == classes and all(len(row) == classes for row in confusion)
    cells = [n for row in confusion for n in row]
    return square and all(n >= 0 for n in cells) and sum(cells) > 0


def name_faults(stem: str, record: EvaluationRecord) -> Iterator[Fault]:
    """Where a record is not that of the test after which its file is called."""
    try:
        test = Test(
            domain=record.domain, images=record.images, at_eval=record.at_eval, bn=record.bn
        )
    except ValidationError as error:
        first = error.errors()[0]
        yield "record", f"{stem}.json: {first['loc'][0]} is {first['input']!r}, which is no test"
        return
    if not stem == record.name == test.name:
        yield "record", f"{stem}.json: name is {record.name!r}; what was tested is {test.name!r}"


def count_differences(
    training: TrainingRecord, rows: Sequence[Row], record: EvaluationRecord
) -> Iterator[Fault]:
    """Where the epochs have other figures of a test than its record.

    The test after the last epoch is the one in the record. It is the same to the bit unless it was
    made again by another machine, other versions or a GPU.
    """
    counts = [(row, row.tests[record.name]) for row in rows if record.name in row.tests]
    for row, count in counts:
        where = f"metrics.jsonl, epoch {row.epoch}: test {record.name}"
        if count.total != record.total:
            yield "record", f"{where}: total is {count.total}; the record has {record.total}"
        elif row is rows[-1]:
            exact = same_bits(training, row.versions, record.versions)
            for name in ("correct", "loss", "batch_loss"):
                ours, right = getattr(count, name), getattr(record, name)
                images = OTHER_IMAGES if name == "correct" else 0
                loose = OTHER_MACHINE * (record.total if images else abs(right)) + images
                if abs(ours - right) > (0 if exact else loose):
                    yield "record", f"{where}: {name} is {ours!r}; the record has {right!r}"


def same_bits(training: TrainingRecord, a: Versions, b: Versions) -> bool:
    """Whether computing again gives the same bits."""
    return a == b and str(training.places.get("device")).startswith("cpu")


def loss_faults(count: Count | EvaluationRecord, batch_size: int) -> Iterator[str]:
    """Where counts and losses of a test cannot be of one test.

    batch_loss is loss / batch_size where whole batches are tested. The images of a smaller last batch
    count for more.
    """
    n = count.total
    if not 0 <= count.correct <= n or n == 0:
        yield f"correct is {count.correct}, of total {n}"
        return
    least, most = count.loss / min(batch_size, n), count.loss / (n % batch_size or batch_size)
    slack = ROUNDING * abs(most)
    if count.loss < 0:
        yield f"loss is {count.loss:g}; a cross-entropy is from 0"
    elif not least - slack <= count.batch_loss <= most + slack:
        yield (
            f"batch_loss is {count.batch_loss:g}; a loss of {count.loss:g} over {n} images in batches "
            f"of {batch_size} gives {least:g} to {most:g}"
        )


def file_faults(folder: Path, record: EvaluationRecord, batch_size: int) -> Iterator[Fault]:
    """Where the predictions beside a record are other ones. Features may be left out, labels not."""
    for stem, right in (
        (record.name, record.predictions),
        (f"{record.name}-features", record.features),
    ):
        path = folder / EVALUATIONS / f"{stem}.npz"
        if not path.exists():
            if stem == record.name:
                yield "record", f"{path.name} is missing"
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != right:
            yield "record", f"{path.name} is not the file that the record names"
            return
    try:
        arrays = read_predictions(folder, record.name)
        confusion = confusion_of(arrays["labels"], arrays["predicted"], len(record.classes))
    except (RecordError, KeyError, ValueError) as error:
        yield "record", f"{record.name}.npz: {error}"
        return
    if confusion != record.confusion:
        yield "record", f"{record.name}.json: confusion is not that of {record.name}.npz"
        return
    for words in prediction_faults(arrays, record, batch_size):
        yield "record", f"{record.name}.json: {words}"


def prediction_faults(
    arrays: Mapping[str, np.ndarray], record: EvaluationRecord, batch_size: int
) -> Iterator[str]:
    """Where the labels, predictions and losses of a test are not those of its logits.

    Rounding keeps the order of numbers, so the largest logit is still among the largest.
    """
    labels, predicted = (arrays[name].astype(np.int64) for name in ("labels", "predicted"))
    n, logits = len(labels), arrays.get("logits", np.empty(0)).astype(np.float64)
    if (np.diff(labels) < 0).any():
        yield "the labels are not in the order of the images"
    if logits.shape != (n, len(record.classes)):
        yield f"the logits are {logits.shape}, not {(n, len(record.classes))}"
        return
    largest = logits.max(1)
    own = np.arange(n)
    if wrong := int((logits[own, predicted] < largest).sum()):
        yield f"{wrong} of {n} predictions are not the largest logit"
    if not np.isfinite(logits).all():  # beyond what float16 holds
        return
    losses = largest + np.log(np.exp(logits - largest[:, None]).sum(1)) - logits[own, labels]
    errors = np.abs(logits).max(1) * LOGITS_ROUNDING + LEAST_ROUNDING
    starts = np.arange(0, n, batch_size)
    sizes = np.diff([*starts, n])
    for name, weights in (
        ("loss", np.full(n, 1 / n)),
        ("batch_loss", np.repeat(1 / (sizes * n), sizes)),
    ):
        right, error = float(losses @ weights), float(errors @ weights)
        if abs(getattr(record, name) - right) > error:
            ours = getattr(record, name)
            yield f"{name} is {ours:g}; the logits give {right:.6g}, to within {error:.2g}"


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
