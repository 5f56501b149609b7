"""Finished suites without the training: whole records with figures as told, by record.py's own hand."""

import functools
from collections.abc import Callable
from pathlib import Path

import methods
import record
import suite
import torch
import yaml
from config import Config
from data import CLASSES
from torchvision.models import resnet18

SMALL = """
title: "A small study"
defaults: {preset: course-template, data: PACS, weights: imagenet, epochs: 3}
sources: [art_painting]
targets: [cartoon, sketch]
seeds: [0, 1, 2]
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


def default_accuracy(config: Config, share: float) -> float:
    """Percent right after `share` of training: a baseline that random maps raise by 2 to 4 points."""
    gain = {"random": 2 + config.seed, "da": 1 - config.seed}.get(config.mode, 0)
    return 30 + 20 * share + gain + 0.5 * config.seed


@functools.cache
def network() -> torch.nn.Module:
    with torch.device("meta"):
        return resnet18()


@functools.cache
def layer_names(config: Config) -> tuple[str, ...]:
    """The layers that training would shape, by the code that does it."""
    if not config.layers:
        return ()
    with methods.attach(network(), config) as attachment:
        return tuple(attachment.names)


def confusion(counts: list[int], accuracy: float, collapsed: bool) -> list[list[int]]:
    """About `accuracy` percent of each class right and the rest taken for the class after it."""
    if collapsed:
        return [[n if j == len(counts) - 1 else 0 for j in range(len(counts))] for n in counts]
    result = [[0] * len(counts) for _ in counts]
    for i, n in enumerate(counts):
        result[i][i] = round(n * min(100.0, max(0.0, accuracy)) / 100)
        result[i][(i + 1) % len(counts)] = n - result[i][i]
    return result


def tested(stem: str, counts: list[list[int]]) -> dict:
    correct = sum(row[i] for i, row in enumerate(counts))
    total = sum(map(sum, counts))
    values = {"correct": correct, "total": total, "accuracy": record.percent(correct, total)}
    return {f"{stem}_{k}": v for k, v in values.items()} | {f"{stem}_confusion": counts}


def write_run(
    folder: Path,
    config: Config,
    accuracy: Callable[[Config, float], float] = default_accuracy,
    *,
    collapsed: bool = False,
    sha256: str | None = "ab" * 32,
    versions: dict | None = None,
) -> Path:
    """The record of a run of `config` that reached accuracy(config, share of training done)."""
    source = record.images_per_class(config, config.source)
    held = [max(1, int(n * config.holdout + 0.5)) if config.holdout else 0 for n in source]
    training = sum(source) - sum(held)
    epochs, updates = config.length(training)
    names = layer_names(config)
    rows, done = [], 0
    for epoch in range(1, epochs + 1):
        seen = min(training, (updates - done) * config.batch_size)
        sizes = record.batch_sizes(seen, config)
        passes = sum(record.parts(size, config.accumulate) for size in sizes)
        percent = accuracy(config, epoch / epochs)
        right = round(seen * 0.9)
        row = {
            "epoch": epoch, "train_loss": 2.0 / epoch, "lr": config.lr,
            "source_train_accuracy": record.percent(right, seen), "source_train_correct": right,
            "source_train_total": seen, "train_seconds": 1.0, "images_per_second": float(seen),
            "updates": len(sizes), "passes": passes,
            "fired": {name: passes * (2 if name.endswith(".relu") else 1) for name in names},
            "density": dict.fromkeys(names, 1 - (config.p_zero or [0.6])[0]),
            "bn_untouched": {"da": config.record_mode == "eval", "dann": False}.get(config.mode),
            "seconds": 2.0,
        }  # fmt: skip
        target = record.images_per_class(config, config.target)
        row |= tested("target", confusion(target, percent, collapsed))
        if config.holdout:
            # best in the first epoch, so that selected and last differ
            row |= tested("holdout", confusion(held, 90 - epoch, False))
        if config.test_set == "source-train":
            row |= tested("invalid_test", confusion(source, 80, False))
        rows.append(row)
        done += len(sizes)
    return write(folder, config.as_dict() | {"warnings": []}, rows, names, sha256, versions)


def write(folder: Path, switches: dict, rows: list, names, sha256=None, versions=None) -> Path:
    summary = record.summarize(
        switches, rows, layers=names, classes=CLASSES,
        weights={"source": switches["weights"], "sha256": sha256},
        versions=versions or record.versions("cpu"),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    record.write_yaml(folder / "config.yaml", switches)
    record.write_json_lines(folder / "metrics.jsonl", rows)
    record.write_json(folder / "summary.json", record.sealed(summary, switches, rows))
    return folder


def write_suite(
    folder: Path, text: str = SMALL, accuracy=default_accuracy, *, without=(), **more
) -> Path:
    """A suite's folder with suite.json and a record for each run; none for the names in `without`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = suite.in_profile(yaml.safe_load(text), "full")
    plan = suite.expand(content, {}, "cpu")
    for run in plan.runs:
        if run.name not in without:
            write_run(folder / run.name, run.config, accuracy, **more)
    head = {"suite": "small", "profile": "full", "title": content["title"]}
    head |= {"command": "python experiments/suite.py small --profile full"}
    suite.Book(folder, head, plan, keep=True).write()
    return folder


def seal_again(folder: Path, change: Callable[[dict, list, dict], None]) -> None:
    """Alter a record and seal it anew, as somebody with this code could."""
    config, rows, summary = record.read(folder)
    change(config, rows, summary)
    record.write_yaml(folder / "config.yaml", config)
    record.write_json_lines(folder / "metrics.jsonl", rows)
    record.write_json(folder / "summary.json", record.sealed(summary, config, rows))
