"""Finished suites without the training: whole records with given figures, by the writers of records."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import yaml
from domainshift import files
from domainshift.config import REPOSITORY, Config, Test
from domainshift.data import official_counts
from domainshift.models import output_shapes
from domainshift.records import results
from domainshift.records.results import Predictions
from domainshift.records.schema import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    TRAINING,
    Cell,
    ClaimIndex,
    Count,
    EvaluationRecord,
    Row,
    SuiteIndex,
    TrainingIndex,
    TrainingRecord,
)
from domainshift.records.validate import batch_sizes, last_pass, passes_of, published_hash
from domainshift.report import contents
from domainshift.report.study import read_study
from domainshift.report.tables import COLUMNS
from domainshift.setup import (
    Setup,
    known_digest,
    set_up,
    stamp,
    training_key,
    training_setup,
)
from domainshift.sweep.plan import Job, Setups, expand
from domainshift.sweep.schema import FULL, Suite
from torch.nn import functional as F

SMALL = """
title: "A small study"
defaults: {preset: course-template, weights: imagenet, epochs: 3, amp: "off"}
sources: [art_painting]
targets: [cartoon, sketch]
seeds: [0, 1, 2]
primary: [[random, baseline], [da, baseline]]
margin: 3.0
tables:
  shaping:
    title: "Random maps and target maps"
    note: "A note."
    published: [report-B report T2]
    baseline: baseline
    arms:
      baseline: {mode: baseline}
      random: {mode: random, layers: [10], p_zero: 0.5}
      da: {mode: da, layers: [4]}
profiles: {full: {}}
"""

# 50 images a class, so that an even percentage is a whole number of each
EXACT = SMALL.replace("epochs: 3,", "epochs: 3, limit: 50, holdout: 0.1, evaluate: each,")
GAINS = {"baseline": (0, 0, 0), "random": (4, 4, 6), "da": (0, 2, -2)}

Accuracy = Callable[[Config, Test, float], float]


def default_accuracy(config: Config, test: Test, share: float) -> float:
    """Percent right after `share` of training: a baseline that random maps raise by 2 to 4 points."""
    gain = {"random": 2 + config.seed, "da": 1 - config.seed}.get(config.mode, 0)
    return 30 + 20 * share + gain + 0.5 * config.seed


def exact(config: Config, test: Test, share: float) -> float:
    """Best in the first epoch, as the held-out images are; the last is 40 for the baseline."""
    return 46 - 6 * int(share) + GAINS[config.mode][config.seed] + (test.domain == "sketch") * 10


# --- a data set without images ----------------------------------------------------------------


class Pacs:
    """What a run asks of the official data set, without its images."""

    name = "PACS"
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    domains = ("art_painting", "cartoon", "photo", "sketch")
    defaults = {}
    remarks = ()

    def counts(self, domain: str, limit: int | None = None) -> list[int]:
        return [n if limit is None else min(n, limit) for n in official_counts(self.name, domain)]

    def digest(self, domain: str, limit: int | None = None) -> str:
        return hashlib.sha256(f"{domain} {limit}".encode()).hexdigest()


def setup_of(**values) -> Setup:
    return set_up({"data": "PACS", "device": "cpu"} | values, Pacs())


# --- one training with its tests --------------------------------------------------------------


def confusion(counts: list[int], accuracy: float, collapsed: bool = False) -> list[list[int]]:
    """About `accuracy` percent of each class right and the rest taken for the class after it."""
    if collapsed:
        return [[n if j == len(counts) - 1 else 0 for j in range(len(counts))] for n in counts]
    result = [[0] * len(counts) for _ in counts]
    for i, n in enumerate(counts):
        result[i][i] = round(n * min(100.0, max(0.0, accuracy)) / 100)
        result[i][(i + 1) % len(counts)] = n - result[i][i]
    return result


def made_predictions(
    confusion: list[list[int]], batch_size: int = 128, shift: float = 0.0
) -> Predictions:
    """Predictions with this confusion, whose largest logit is 1 + shift and the others shift."""
    return predictions_of(tuple(map(tuple, confusion)), batch_size, shift)


@functools.lru_cache(maxsize=512)
def predictions_of(
    confusion: tuple[tuple[int, ...], ...], batch_size: int, shift: float
) -> Predictions:
    counts = np.array(confusion, dtype=np.int64)
    labels, predicted = (
        np.repeat(index.ravel(), counts.ravel()).astype(np.int16)
        for index in np.indices(counts.shape)
    )
    logits = torch.eye(len(counts), dtype=torch.float64)[predicted.astype(np.int64)] + shift
    losses = F.cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none")
    means = [part.mean() for part in losses.split(batch_size)]
    half = logits.half().numpy()
    return Predictions(
        labels, predicted, half, half[:, :1], loss=losses.mean().item(),
        batch_loss=torch.stack(means).sum().item() / len(losses), seconds=0.5,
    )  # fmt: skip


def chance(key: str, part: int) -> float:
    """A number from 0 to 1 that another training does not have."""
    return int(key[8 * part : 8 * part + 8], 16) / 16**8


def learning_rate(config: Config, epoch: int, updates_before: int) -> float:
    """At the start of an epoch, stepped as `StepLR` does."""
    rate, done = config.lr, updates_before if config.updates else epoch - 1
    step = max(1, int(config.step_fraction * (config.updates or config.epochs)))
    for _ in range(done // step):
        rate *= config.gamma
    return rate


def densities(method: type, config: Config, layers: Sequence[str], images: int) -> dict[str, float]:
    """As near 1 - p_zero as the elements of a map allow; of recorded maps near 0.4."""
    p_zero = list(getattr(config.options, "p_zero", (0.6,)))
    rates = p_zero * len(layers) if len(p_zero) == 1 else p_zero
    shapes = output_shapes(config.model, config.image_size)
    elements = {name: images * math.prod(shapes[name][-1]) for name in layers}
    return {
        name: round((1 - rate) * elements[name]) / elements[name]
        for name, rate in zip(layers, rates, strict=True)
        if method.map_words
    }


def made_weights(config: Config) -> SimpleNamespace:
    """What a record says of the initial weights."""
    sha256 = known_digest(config.weights, config.model, stamp(config.weights))
    sha256 = {"none": None, "imagenet": f"{published_hash(config.model):0<64}"}.get(
        config.weights, sha256
    )
    return SimpleNamespace(source=Path(config.weights).name, sha256=sha256)


def made_versions(config: Config) -> dict:
    """Those of this machine, of a commit without changes."""
    return results.versions(config.device) | {"commit": "c0" * 20}


def write_run(
    folder: Path,
    setup: Setup | None = None,
    tests: list[Test] | None = None,
    accuracy: Accuracy = default_accuracy,
    *,
    collapsed: bool = False,
    harm: Callable[[list[dict], dict], object] = lambda rows, tests: None,
    **values,
) -> list[str]:
    """A training that reached accuracy(config, test, share of training done), and its tests.

    Args:
        setup: what was run; default: `values` on top of what `folder` holds, if it holds a run.
        tests: default: those whose records are in `folder`, else those of the setup.
        harm: changes the rows and the confusion matrices, by name of the test, before the records
            are made of them.

    Returns the names of the tests of targets.
    """
    saved = files.read_yaml(folder / CONFIG) if (folder / CONFIG).exists() else {}
    setup = setup or setup_of(**(saved | values))
    asked = setup.config.as_dict()
    shared = training_setup(setup)
    config, method, data, _ = shared
    places = sorted((folder / EVALUATIONS).glob("*.json"))
    tests = tests or [tested_by(files.read_json(path)) for path in places] or setup.config.tests()
    source = data.counts(config.source, config.limit)
    held = [max(1, int(n * config.holdout + 0.5)) if config.holdout else 0 for n in source]
    images = sum(source) - sum(held)
    counts = {
        test.name: {
            "all": data.counts(test.domain, config.limit),
            "holdout": held,
            "train": [n - h for n, h in zip(source, held, strict=True)],
        }[test.images]
        for test in tests
    }

    def tested(test: Test, epoch: int) -> list[list[int]]:
        if test.images == "all":
            return confusion(counts[test.name], accuracy(config, test, epoch / epochs), collapsed)
        # the held-out images are best in the first epoch, so that selected and last differ
        return confusion(counts[test.name], 90 - epoch if test.images == "holdout" else 80)

    def predictions(matrix: list[list[int]]) -> Predictions:
        return made_predictions(matrix, config.batch_size, chance(key, 1))

    def count(test: Test, epoch: int) -> Count:
        matrix = tested(test, epoch)
        p = predictions(matrix)
        total = len(p.labels)
        return Count(correct=correct_of(matrix), total=total, loss=p.loss, batch_loss=p.batch_loss)

    key = training_key(setup)
    epochs, updates = config.length(images)
    layers = method.layer_names(config)
    rows, done = [], 0
    for epoch in range(1, epochs + 1):
        seen = min(images, (updates - done) * config.batch_size)
        sizes = batch_sizes(seen, config.batch_size)
        lr = learning_rate(config, epoch, done)
        done += len(sizes)
        passes = sum(passes_of(size, config.accumulate) for size in sizes)
        rows.append({
            "epoch": epoch, "train_loss": (2.0 + chance(key, 0)) / epoch, "lr": lr,
            "source_train_correct": round(seen * 0.9), "source_train_total": seen,
            "train_seconds": 1.0, "seconds": 2.0, "updates": len(sizes), "skipped": 0, "passes": passes,
            "run": folder.name, "versions": made_versions(config),
            # a block of ResNet-18 calls its one ReLU twice
            "fired": {name: passes * (2 if name.endswith(".relu") else 1) for name in layers},
            "density": densities(
                method, config, layers, last_pass(sizes[-1], config.accumulate)
            ),
            "bn_untouched": method.statistics_untouched(config),
            "tests": {
                test.name: count(test, epoch) for test in tests
            } if config.tests_after(epoch, epochs) and config.evaluate != "last" else {},
        })  # fmt: skip
    matrices = {test.name: tested(test, epochs) for test in tests}
    harm(rows, matrices)
    rows = [Row.model_validate(row) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    training = results.training_record(
        shared, rows, layers=layers, held_out=held, warnings=setup.warnings,
        weights=made_weights(config),
        weights_digest=hashlib.sha256(folder.name.encode()).hexdigest(),
    )  # fmt: skip
    files.write_yaml(folder / CONFIG, asked)
    write_rows(folder, rows)
    results.write_training(folder, training)
    for test in tests:
        record, content = results.evaluation_record(
            training, test, predictions(matrices[test.name]),
            domain=results.domain_data(setup, test.domain), version_of=training.versions,
        )  # fmt: skip
        results.write_evaluation(folder, record, content)
    return [test.name for test in tests if test.images == "all"]


def tested_by(record: dict) -> Test:
    return Test.model_validate({name: record[name] for name in Test.model_fields})


def correct_of(confusion: list[list[int]]) -> int:
    return sum(row[i] for i, row in enumerate(confusion))


def write_rows(folder: Path, rows: list[Row]) -> None:
    lines = (json.dumps(row.model_dump(mode="json")) for row in rows)
    (folder / METRICS).write_text("".join(f"{line}\n" for line in lines))


def seal_again(
    folder: Path,
    change: Callable[[dict, list, dict], object],
    *,
    seals: bool = True,
    follow: bool = True,
) -> None:
    """Alter records and seal them again, as somebody with this code could.

    change(training, rows, evaluations by name) works on plain dicts, in place.

    Args:
        seals: false: leave the seals as `change` leaves them.
        follow: the evaluations name the training's key.
    """
    training = files.read_json(folder / TRAINING)
    rows = files.read_json_lines(folder / METRICS)
    places = {path.stem: path for path in (folder / EVALUATIONS).glob("*.json")}
    tests = {name: files.read_json(path) for name, path in places.items()}
    change(training, rows, tests)
    rows = [Row.model_validate(row) for row in rows]
    write_rows(folder, rows)
    if seals:
        training["seal"] = results.seal(TrainingRecord.model_validate(training), rows)
    files.write_json(folder / TRAINING, training)
    for name, test in tests.items():
        if follow:
            test["training"] = training["key"]
        if seals:
            test["seal"] = results.seal(EvaluationRecord.model_validate(test))
        files.write_json(places[name], test)


# --- suites -----------------------------------------------------------------------------------


def index_of(text: str) -> tuple[SuiteIndex, list[Job]]:
    """suite.json of a suite in YAML, on the data set without images, and its trainings."""
    suite = Suite.model_validate(yaml.safe_load(text)).in_profile(FULL)
    with mock.patch.object(Setups, "data_of", lambda *_: Pacs()):
        plan = expand(suite, {"data": "PACS"}, "cpu")
    trainings = {
        job.name: TrainingIndex(key=job.key, switches=job.values, tests=job.tests)
        for job in plan.jobs
    }
    index = SuiteIndex(
        suite="small", profile=FULL, title=suite.title, tables=plan.tables, trainings=trainings,
        command="python experiments/suite.py small --profile full",
        primary=suite.primary, margin=suite.margin,
        claims={number: ClaimIndex(**claim.given()) for number, claim in suite.claims.items()},
    )  # fmt: skip
    return index, plan.jobs


def write_suite(
    folder: Path,
    text: str = SMALL,
    accuracy: Accuracy = default_accuracy,
    *,
    without: Sequence[tuple] = (),
    **more,
) -> Path:
    """A suite's folder with suite.json and all its records.

    Args:
        without: (arm, target, seed) or (arm, target, seed, source) of the cells whose records are
            left out, a training with them if none of its tests is left.
        more: for `write_run`.
    """
    index, jobs = index_of(text)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "suite.json", index.model_dump(mode="json"))
    kept = {
        (cell.training, cell.test)
        for table in index.tables
        for arm in table.arms
        for cell in arm.cells
        if not any(key in without for key in keys_of(arm.name, cell))
    }
    for job in jobs:
        tests = [t for t in job.tests if t.images != "all" or (job.name, t.name) in kept]
        if any(test.images == "all" for test in tests):
            write_run(folder / job.name, job.setup, tests, accuracy, **more)
    return folder


def keys_of(arm: str, cell: Cell) -> list[tuple]:
    key = arm, cell.target, cell.seed
    return [key, (*key, cell.source)]


def only(name: str, tables: list[str], **keys) -> str:
    """A suite of the repository with these tables alone, one seed of few images."""
    path = REPOSITORY / "experiments" / "suites" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content["tables"] = {t: content["tables"][t] | keys for t in tables}
    content["defaults"] |= {"limit": 8, "epochs": 1, "updates": None}
    content |= {"seeds": [0], "primary": [], "claims": {}}  # these may be about other tables
    return yaml.safe_dump(content, sort_keys=False)


# --- what a report says -----------------------------------------------------------------------


def report_of(folder: Path) -> contents.Report:
    return contents.build(read_study(folder))


def find_cell(folder: Path, arm: str, target: str, seed: int) -> Cell:
    index = SuiteIndex.model_validate(files.read_json(folder / "suite.json"))
    cells = (c for t in index.tables for a in t.arms if a.name == arm for c in a.cells)
    return next(c for c in cells if (c.target, c.seed) == (target, seed))


def comparison(report, name, target=None):
    """A comparison of a report: the primary one on a target, or the exploratory one."""
    both = [*report.comparisons.primary, *report.comparisons.exploratory]
    return next(c for c in both if c.name == name and target in (None, c.target))


def line(report, arm, target):
    lines = [x for section in report.sections for x in section.lines]
    return next(x for x in lines if x.arm.name == arm and (x.pair or ("", None))[1] == target)


def cell(report, arm, target, heading):
    column = next(c for c in COLUMNS if c.heading.startswith(heading))
    return column.text(line(report, arm, target))
