"""Writing the records of a run and reading them back. See `domainshift.records.schema`."""

from __future__ import annotations

import functools
import hashlib
import io
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from pydantic import ValidationError

import fastshape
from domainshift import distributed, files
from domainshift.config import REPOSITORY, Test, hash_of
from domainshift.errors import RecordError
from domainshift.models import Weights
from domainshift.records.schema import (
    EVALUATIONS,
    METRICS,
    TRAINING,
    VERSION,
    DomainData,
    EvaluationRecord,
    Record,
    Row,
    TrainingRecord,
    Versions,
    WeightsRecord,
)
from domainshift.setup import Setup, targets_of_training, training_key, training_setup

MANY_SKIPPED = 0.05  # part of the updates; more of them make another, shorter training
NEARLY_ALL = 0.9  # of the images called one class: the network hardly tells any apart


@dataclass(frozen=True)
class Predictions:
    """What a network said of each image of a test, in the order of the data.

    labels: int16 (n,), true classes
    predicted: int16 (n,), the largest of the logits before they were rounded
    logits: float16 (n, classes)
    features: float16 (n, d), the input of the classifier
    loss: mean cross-entropy, of the unrounded logits
    batch_loss: the same in the unit of the published reports (see `domainshift.records.schema`)
    seconds: that the test took
    """

    labels: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    loss: float
    batch_loss: float
    seconds: float


# --- figures ----------------------------------------------------------------------------------


def percent(part: int, whole: int) -> float:
    return 100.0 * part / whole


def confusion_of(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Counts of images, [true class][predicted class]."""
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).tolist()


def figures(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """All figures that follow from counts of images, [true class][predicted class].

    Returns the fields of `EvaluationRecord` from `correct` to `collapsed_to`.
    """
    counts = np.asarray(confusion)
    of_class, hits = counts.sum(1).tolist(), counts.diagonal().tolist()
    total, correct = int(counts.sum()), int(counts.trace())
    answers = [name for name, n in zip(classes, counts.sum(0).tolist(), strict=True) if n]
    per_class = {
        name: {"correct": hit, "total": n, "accuracy": percent(hit, n) if n else None}
        for name, hit, n in zip(classes, hits, of_class, strict=True)
    }
    rates = [c["accuracy"] for c in per_class.values() if c["total"]]
    return {
        "correct": correct,
        "total": total,
        "accuracy": percent(correct, total),
        "macro_accuracy": sum(rates) / len(rates),
        "per_class": per_class,
        "majority_rate": percent(max(of_class), total),
        "collapsed": len(answers) == 1,
        "collapsed_to": answers[0] if len(answers) == 1 else None,
    }


def largest_predicted_share(confusion: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The part of the images, 0 to 1, that is called the most frequent answer, and its label.

    Of answers equally frequent, the first. Of no images the part is 0.
    """
    answers = np.asarray(confusion).sum(0)
    label = int(answers.argmax())
    return int(answers[label]) / max(1, int(answers.sum())), label


# --- versions ---------------------------------------------------------------------------------


def versions(device: str) -> Versions:
    """What computes on `device`, for a record."""
    kind = torch.device(device).type
    return {
        "fastshape": fastshape.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "backend": fastshape.backend_info()[kind],
        "device": device_name(kind),
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "processes": distributed.size(),
        "commit": commit(),
    }


@functools.cache
def device_name(kind: str) -> str:
    """The GPU ("cuda") or the processor ("cpu") that computes, as it calls itself."""
    if kind == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "a CPU"


@functools.cache
def commit() -> str | None:
    """The commit that runs, with "-dirty" where files differ from it; None where git cannot tell."""
    if not (REPOSITORY / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# --- writing ----------------------------------------------------------------------------------


def seal(record: Record, rows: Sequence[Row] = ()) -> str:
    """SHA-256 of a record without its seal, and of the rows that it summarizes."""
    content = record.model_dump(mode="json", exclude={"seal"})
    return hash_of([content, [row.model_dump(mode="json") for row in rows]])


def domain_data(setup: Setup, name: str) -> DomainData:
    limit = setup.config.limit
    counts = list(setup.data.counts(name, limit))
    return DomainData(digest=setup.data.digest(name, limit), counts=counts)


def training_record(
    setup: Setup,
    rows: Sequence[Row],
    *,
    layers: Sequence[str],
    held_out: Sequence[int],
    weights: Weights,
    weights_digest: str,
    warnings: Sequence[str],
) -> TrainingRecord:
    """The sealed record of a finished training.

    Args:
        setup: of the run; its training is that of `training_setup`.
        rows: one per epoch.
        layers: names of the shaped modules.
        held_out: source images held out, per class.
        weights: the initial ones.
        weights_digest: of the trained ones.
        warnings: what a reader must know.
    """
    config, method, data, _ = training_setup(setup)
    seconds = sum(row.train_seconds for row in rows)
    images = sum(row.source_train_total for row in rows)
    last = rows[-1]
    untouched = [row.bn_untouched for row in rows]
    values = config.as_dict()
    places = {*config.names("place"), *config.options.names("place")}
    domains = {name: domain_data(setup, name) for name in method.domains(config)}
    record = TrainingRecord(
        version=VERSION,
        key=training_key(setup),
        run=last.run,
        mode=method.name,
        source=config.source,
        targets=targets_of_training(training_setup(setup)),
        seed=config.seed,
        data=data.name,
        classes=list(data.classes),
        domains=domains,
        held_out=list(held_out),
        switches=config.training_values(),
        places={name: values[name] for name in sorted(places)},
        layers=list(layers),
        epochs=len(rows),
        updates=sum(row.updates for row in rows),
        skipped=sum(row.skipped for row in rows),
        passes=sum(row.passes for row in rows),
        train_loss=last.train_loss,
        source_train_accuracy=percent(last.source_train_correct, last.source_train_total),
        fired={name: sum(row.fired[name] for row in rows) for name in last.fired},
        density=last.density,
        bn_untouched=None if None in untouched else all(untouched),
        seconds=seconds,
        images_per_second=images / seconds,
        weights=WeightsRecord(source=weights.source, sha256=weights.sha256),
        weights_digest=weights_digest,
        versions=last.versions,
        warnings=list(warnings),
    )
    return record.model_copy(update={"seal": seal(record, rows)})


def write_training(folder: Path, record: TrainingRecord) -> None:
    files.write_json(folder / TRAINING, record.model_dump(mode="json"))


def evaluation_record(
    training: TrainingRecord,
    test: Test,
    predictions: Predictions,
    *,
    domain: DomainData,
    version_of: Versions,
) -> tuple[EvaluationRecord, dict[str, bytes]]:
    """The sealed record of a test, and the files that belong beside it, by name.

    Args:
        domain: the tested domain's images.
    """
    p = predictions
    content = {
        f"{test.name}.npz": packed(labels=p.labels, predicted=p.predicted, logits=p.logits),
        f"{test.name}-features.npz": packed(features=p.features),
    }
    sums = [hashlib.sha256(data).hexdigest() for data in content.values()]
    confusion = confusion_of(p.labels, p.predicted, len(training.classes))
    record = EvaluationRecord(
        version=VERSION,
        name=test.name,
        training=training.key,
        weights_digest=training.weights_digest,
        epoch=training.epochs,
        domain=test.domain,
        images=test.images,
        at_eval=test.at_eval,
        bn=test.bn,
        digest=domain.digest,
        counts=domain.counts,
        classes=training.classes,
        confusion=confusion,
        **figures(confusion, training.classes),
        loss=p.loss,
        batch_loss=p.batch_loss,
        predictions=sums[0],
        features=sums[1],
        seconds=p.seconds,
        versions=version_of,
    )
    return record.model_copy(update={"seal": seal(record)}), content


def write_evaluation(folder: Path, record: EvaluationRecord, content: Mapping[str, bytes]) -> None:
    """Put a record in place. It comes last, so that where it is, its files are."""
    place = folder / EVALUATIONS
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise RecordError(f"cannot make folder {place}: {error.strerror}") from error
    for name, data in content.items():
        files.write_bytes(place / name, data)
    files.write_json(place / f"{record.name}.json", record.model_dump(mode="json"))


def packed(**arrays: np.ndarray) -> bytes:
    """Arrays as a compressed .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# --- reading ----------------------------------------------------------------------------------


class Training(NamedTuple):
    record: TrainingRecord
    rows: list[Row]


@dataclass(frozen=True)
class Result:
    """One evaluation with its training: what the tables of a report are made of."""

    folder: Path
    training: TrainingRecord
    rows: Sequence[Row]
    evaluation: EvaluationRecord
    holdout: EvaluationRecord | None = None  # the same test on the held-out part of the source
    invalid: EvaluationRecord | None = None  # and on its training images: no result

    @property
    def name(self) -> str:
        return f"{self.folder.name}/{self.evaluation.name}"

    @property
    def key(self) -> tuple[str, str, int]:
        """Source, target and seed."""
        return self.training.source, self.evaluation.domain, self.training.seed

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Every switch of the training and of the test, flat."""
        test = self.evaluation
        of_test = {"target": test.domain, "at_eval": test.at_eval, "bn_at_test": test.bn}
        return self.training.places | self.training.switches | of_test

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        return summary(self)

    @property
    def collapsed_share(self) -> float | None:
        """The part of the images that a collapsed run calls one class; None for another run."""
        share, _ = largest_predicted_share(self.evaluation.confusion)
        return share if share > NEARLY_ALL else None


def read_record(path: Path, kind: type[Record]) -> Any:
    """A record of some kind. Raises RecordError for a file that is not one."""
    value = files.read_json(path)
    version = value.get("version") if isinstance(value, dict) else None
    if kind in (TrainingRecord, EvaluationRecord) and version != VERSION:
        raise OtherVersion(f"{path} has version {version}; this code reads {VERSION}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise RecordError(f"{path} is no {kind.__name__}: {where}: {first['msg']}") from None


class OtherVersion(RecordError):
    """A record that an older or newer schema wrote."""


def read_rows(folder: Path) -> list[Row]:
    rows = []
    for number, value in enumerate(files.read_json_lines(folder / METRICS), 1):
        try:
            rows.append(Row.model_validate(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RecordError(
                f"{folder / METRICS}: line {number} is no epoch: {where}: {first['msg']}"
            ) from None
    return rows


def read_training(folder: Path) -> Training:
    """The record of a finished training and its epochs. Raises RecordError."""
    if not (folder / TRAINING).exists():
        raise RecordError(f"{folder} is unfinished: no {TRAINING}")
    return Training(read_record(folder / TRAINING, TrainingRecord), read_rows(folder))


def read_evaluation(folder: Path, name: str) -> EvaluationRecord:
    """The record of one test. Raises RecordError."""
    path = folder / EVALUATIONS / f"{name}.json"
    if not path.exists():
        raise RecordError(f"{folder} is unfinished: no test {name}")
    return read_record(path, EvaluationRecord)


def evaluation_names(folder: Path) -> list[str]:
    """Names of the tests that have a record in a training's folder, sorted."""
    return sorted(path.stem for path in (folder / EVALUATIONS).glob("*.json"))


def read_predictions(folder: Path, name: str) -> dict[str, np.ndarray]:
    """labels, predicted and logits of a test; features too, where that file is kept.

    Raises RecordError.
    """
    arrays: dict[str, np.ndarray] = {}
    for path in (
        folder / EVALUATIONS / f"{name}.npz",
        folder / EVALUATIONS / f"{name}-features.npz",
    ):
        if not path.exists() and path.stem.endswith("-features"):
            continue
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays |= {key: content[key] for key in content.files}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise RecordError(f"cannot read {path}: {error}") from error
    return arrays


# --- a summary --------------------------------------------------------------------------------


def best(values: Sequence[int]) -> int:
    """Position of the largest value; of equals the first."""
    return max(range(len(values)), key=values.__getitem__)


def summary(result: Result) -> dict[str, Any]:
    """The figures of one target, with what a reader must know: summary.json, and tables.

    Beside the last epoch's figures stand those of the epoch that is best on held-out source images
    (selected_*) and of the one that is best on the target (oracle_*: a choice by target labels, no
    result), where several epochs were tested. Of equals the earliest.
    """
    training, test = result.training, result.evaluation
    warnings = list(training.warnings)
    share, label = largest_predicted_share(test.confusion)
    if share > NEARLY_ALL:
        part = "every image" if test.collapsed else f"{100 * share:.1f} % of the images"
        verb = "is" if test.collapsed else "are"
        warnings.append(f"collapsed: {part} of {test.domain} {verb} called {test.classes[label]}")
    values: dict[str, Any] = {
        "source": training.source,
        "target": test.domain,
        "mode": training.mode,
        "layers": training.switches.get("layers", []),
        "layer_names": training.layers,
        "seed": training.seed,
        "epochs": training.epochs,
        "updates": training.updates,
        "passes": training.passes,
        "at_eval": test.at_eval,
        "bn_at_test": test.bn,
        **{
            f"target_{name}": getattr(test, name)
            for name in ("correct", "total", "accuracy", "loss", "batch_loss")
        },
        **{
            name: getattr(test, name)
            for name in ("macro_accuracy", "per_class", "majority_rate", "collapsed")
        },
        "source_accuracy": None,
        "source_train_accuracy": training.source_train_accuracy,
        "train_loss": training.train_loss,
    }
    for stem, record in (("source", result.holdout), ("invalid_test", result.invalid)):
        if record is not None:
            values |= {f"{stem}_{n}": getattr(record, n) for n in ("correct", "total", "accuracy")}
    values |= chosen_epochs(result)
    values |= {
        "seconds": sum(row.seconds for row in result.rows),
        "images_per_second": training.images_per_second,
        "fired": training.fired,
        "density": training.density,
        "bn_untouched": training.bn_untouched,
        "weights": training.weights.model_dump(),
        "versions": training.versions,
        "warnings": warnings,
        "training": training.key,
    }
    return values


def chosen_epochs(result: Result) -> dict[str, Any]:
    """Epoch and target accuracy by the two choices of an epoch; None where the rows do not tell."""
    name = result.evaluation.name
    tested = [row for row in result.rows if name in row.tests]
    choices: dict[str, Row | None] = {"selected": None, "oracle": None}
    if len(tested) > 1:
        choices["oracle"] = tested[best([row.tests[name].correct for row in tested])]
        held = result.holdout.name if result.holdout else ""
        if held and all(held in row.tests for row in tested):
            choices["selected"] = tested[best([row.tests[held].correct for row in tested])]
    values: dict[str, Any] = {}
    for choice, row in choices.items():
        count = row.tests[name] if row else None
        values[f"{choice}_epoch"] = row.epoch if row else None
        values[f"{choice}_target_correct"] = count.correct if count else None
        values[f"{choice}_target_total"] = count.total if count else None
        values[f"{choice}_target_accuracy"] = percent(count.correct, count.total) if count else None
    return values


def companion(test: Test | EvaluationRecord, source: str, images: str) -> str:
    """Name of the test of the source that stands beside the test of a target."""
    bn = "trained" if test.bn == "target" else test.bn
    return Test(domain=source, images=images, at_eval=test.at_eval, bn=bn).name
