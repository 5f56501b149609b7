"""What is wrong with a record: everything in it that can be computed again, is.

The rules by name are those of the audit (`domainshift.report.audit`), which adds the rules that need
several records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from domainshift.config import Config, hash_of, validated
from domainshift.data import official_counts
from domainshift.errors import BadInput, RecordError
from domainshift.methods import Method, method_named
from domainshift.models import weights_digest
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
from domainshift.records.schema import EVALUATIONS, EvaluationRecord, Row, TrainingRecord

Fault = tuple[str, str]  # rule, words


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
        lines += [
            f"{path.stem}: {words}" for _, words in evaluation_faults(folder, training, record)
        ]
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
    for images, record in (("holdout", result.holdout), ("train", result.invalid)):
        wanted = (
            result.training.switches["holdout"] > 0 if images == "holdout" else record is not None
        )
        if wanted and record is None:
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
    yield from derived_faults(training, rows)
    yield from row_faults(training, config, rows)
    method = method_of_record(training)
    untouched = method.statistics_untouched(config)
    if method.name == training.mode and training.bn_untouched != untouched:
        yield "BatchNorm", f"bn_untouched is {training.bn_untouched}, not {untouched}"
    if len(training.held_out) != len(training.classes) or (sum(training.held_out) > 0) != (
        config.holdout > 0
    ):
        held = f"{sum(training.held_out)} images are held out"
        yield "labels", f"{held}, but holdout is {config.holdout:g}"
    if overlap := set(training.targets) & {training.source}:
        yield "labels", f"{', '.join(overlap)} is source and target"
    for name, data in training.domains.items():
        yield from count_faults(training, name, data.counts)


def derived_faults(training: TrainingRecord, rows: Sequence[Row]) -> Iterator[Fault]:
    """Where fields of training.json are not what its other fields and the epochs give."""
    weights = training.weights.sha256
    if training.switches["weights"] in ("imagenet", "none"):
        weights = weights_digest(training.switches["weights"], training.switches["model"])
    if training.places.get("method_file") is None:
        parts = {
            "switches": {n: v for n, v in training.switches.items() if n != "weights"},
            "targets": training.targets,
            "images": {name: data.digest for name, data in training.domains.items()},
            "weights": weights,
            "method_file": None,
        }  # as `domainshift.setup.origin` has them
        key = hash_of(parts)
        if key != training.key:
            yield "record", f"training.json: key is {training.key[:12]}; its fields give {key[:12]}"
    last = rows[-1]
    untouched = [row.bn_untouched for row in rows]
    seconds = sum(row.train_seconds for row in rows)
    expected = {
        "mode": training.switches["mode"],
        "source": training.switches["source"],
        "seed": training.switches["seed"],
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


def row_faults(training: TrainingRecord, config: Config, rows: Sequence[Row]) -> Iterator[Fault]:
    """Where the epochs are not those that the switches ask for."""
    images = sum(training.domains[training.source].counts) - sum(training.held_out)
    epochs, updates = config.length(images)
    if len(rows) != epochs:
        yield "length", f"metrics.jsonl has {len(rows)} epochs; {updates} updates take {epochs}"
    done = 0
    for number, row in enumerate(rows, 1):
        seen = min(images, (updates - done) * config.batch_size)
        sizes = batch_sizes(seen, config.batch_size)
        done += len(sizes)
        expected = [
            ("length", "epoch", number),
            ("length", "updates", len(sizes)),
            ("length", "passes", sum(passes_of(size, config.accumulate) for size in sizes)),
            ("labels", "source_train_total", seen),
        ]
        for rule, name, right in expected:
            if getattr(row, name) != right:
                yield (
                    rule,
                    f"metrics.jsonl, epoch {number}: {name} is {getattr(row, name)!r}, not {right!r}",
                )
        if row.run != training.run:
            yield (
                "record",
                f"metrics.jsonl, epoch {number} is of run {row.run[:8]}, training.json of run "
                f"{training.run[:8]}",
            )
        if set(row.fired) != set(training.layers):
            yield (
                "hooks",
                f"metrics.jsonl, epoch {number}: fired {sorted(row.fired)}, not {training.layers}",
            )
        for name, times in row.fired.items():
            if times < row.passes or times % row.passes:
                yield (
                    "hooks",
                    (
                        f"metrics.jsonl, epoch {number}: layer {name} fired {times} times in "
                        f"{row.passes} passes"
                    ),
                )


def count_faults(training: TrainingRecord, domain: str, counts: Sequence[int]) -> Iterator[Fault]:
    """Where a whole domain of a known data set has another number of images."""
    official = official_counts(training.data, domain)
    if official is None:
        return
    limit = training.switches["limit"]
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
    } | figures(record.confusion, record.classes)
    for name, right in expected.items():
        if getattr(record, name) != right:
            yield (
                "record",
                f"{where}: {name} is {shortened(getattr(record, name))}, not {shortened(right)}",
            )
    if (
        record.domain in training.domains
        and training.domains[record.domain].digest != record.digest
    ):
        yield "record", f"{where}: {record.domain} had other images than in training"
    yield from file_faults(folder, record)
    yield from count_faults(training, record.domain, record.counts)
    tested = [sum(row) for row in record.confusion]
    right = {
        "all": record.counts,
        "holdout": training.held_out,
        "train": [n - h for n, h in zip(record.counts, training.held_out, strict=True)],
    }[record.images]
    if tested != right:
        yield "k of n", f"{where}: tested on {tested} images of the classes, not {right}"
    if record.images != "all" and record.domain != training.source:
        yield "labels", f"{where}: {record.images} of {record.domain}, which is not the source"


def file_faults(folder: Path, record: EvaluationRecord) -> Iterator[Fault]:
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


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
