"""Training on the source, testing on the target, and coming back after a kill.

`train` is given the target's *images*; its labels stay with `Evaluation`, which only counts.

All randomness of the data (order, pairs, augmentation) is a function of (seed, epoch), so a
checkpoint need not hold it. The maps draw from torch's generator of the device, whose state a
checkpoint does hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from config import Config, ConfigError, differing
from data import (
    CLASSES,
    Domain,
    LabelledImages,
    UnlabelledImages,
    test_transform,
    train_transform,
)
from methods import Method, check_fired
from screen import Screen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Purposes of random numbers. Each (seed, purpose) is a stream of its own, so that target images
# are not cropped and flipped as the source images of the same number are.
SOURCE_ORDER, TARGET_ORDER, TARGET_AUGMENTATION = 1, 2, 3

# ResNet-18 divides the side by 32, so at this size its last maps have one pixel.
ONE_PIXEL = 32


class TrainingError(RuntimeError):
    """Training cannot go on."""


# --- data -------------------------------------------------------------------------------------


def epoch_order(config: Config, epoch: int, n_source: int, n_target: int) -> tuple:
    """Which source images an epoch takes, in order, and the target image beside each.

    Returns two int64 arrays of n_source positions. Pairing "random" walks through a permutation
    of the target that is independent of the source's, again from its start when it is used up;
    "modulo" is target image `i % n_target` for source image i.
    """
    source = np.random.default_rng([config.seed, SOURCE_ORDER, epoch]).permutation(n_source)
    if config.pairing == "modulo":
        return source, source % n_target
    target = np.random.default_rng([config.seed, TARGET_ORDER, epoch]).permutation(n_target)
    return source, target[np.arange(n_source) % n_target]


def batches(dataset: Dataset, order: np.ndarray, config: Config) -> DataLoader:
    """`dataset` in `order`, config.batch_size images at a time; the last batch may be smaller."""
    size = config.batch_size
    return DataLoader(
        dataset,
        batch_sampler=[order[i : i + size].tolist() for i in range(0, len(order), size)],
        num_workers=config.workers,
        pin_memory=torch.device(config.device).type == "cuda",
        # a generator of its own: iterating must not draw from the stream that the maps use
        generator=torch.Generator(),
    )


@dataclass
class TrainingImages:
    """What training may see: labelled source images, and target images alone.

    Attributes:
        source: the labelled domain.
        source_indices: its images to train on (the others are held out).
        target_images: uint8 (n, side, side, 3).
    """

    source: Domain
    source_indices: Sequence[int]
    target_images: np.ndarray

    def check_batches(self, config: Config) -> None:
        """Refuse a batch on which BatchNorm has one value per channel. Raises ConfigError."""
        n = len(self.source_indices)
        last = n % config.batch_size or min(n, config.batch_size)
        sizes = {last, min(n, config.batch_size)}
        parts = [(size, -(-size // config.accumulate)) for size in sizes]
        alone = any(part == 1 or size % part == 1 for size, part in parts)
        if alone and config.image_size <= ONE_PIXEL:
            raise ConfigError(
                f"batch_size: {config.batch_size} with accumulate {config.accumulate} leaves one "
                f"of {n} training images alone, and at image_size {config.image_size} BatchNorm "
                "needs two; choose another batch_size, or an image_size above 32"
            )

    def epoch(self, config: Config, epoch: int, with_target: bool):
        """Yields (images, labels, target images or None) for each update of an epoch."""
        source = LabelledImages(
            self.source,
            self.source_indices,
            train_transform(config.image_size),
            seed=config.seed,
            epoch=epoch,
        )
        everyone = range(len(self.target_images))
        order, target_order = epoch_order(config, epoch, len(source), len(everyone))
        loader = batches(source, order, config)
        if not with_target:
            yield from ((images, labels, None) for images, labels in loader)
            return
        augment = train_transform if config.target_transform == "train" else test_transform
        streams = np.random.SeedSequence([config.seed, TARGET_AUGMENTATION])
        target = UnlabelledImages(
            self.target_images,
            everyone,
            augment(config.image_size),
            seed=int(streams.generate_state(1)[0] >> 1),
            epoch=epoch,
        )
        pairs = zip(loader, batches(target, target_order, config), strict=True)
        yield from ((images, labels, target) for (images, labels), target in pairs)

    def plain(self, config: Config):
        """Yields the source's training images in batches, as testing sees them: float32."""
        images = UnlabelledImages(
            self.source.images, self.source_indices, test_transform(config.image_size)
        )
        # In a fixed random order, for a batch of one class alone has statistics of its own; without
        # a smaller last batch, which would count as much as a whole one.
        order = epoch_order(config, 0, len(images), 1)[0]
        size = min(config.batch_size, len(images))
        return batches(images, order[: len(order) // size * size], config)


# --- testing ----------------------------------------------------------------------------------


class Evaluation:
    """The test sets of a run: the only holder of target labels.

    Args:
        sets: name -> (domain, indices of its images to test on).
    """

    def __init__(self, sets: dict[str, tuple[Domain, Sequence[int]]], config: Config) -> None:
        self.sets = sets
        self.config = config

    def __call__(self, method: Method, screen: Screen) -> dict[str, list[list[int]]]:
        """Confusion counts [true][predicted] by test set, under the name `<set>_confusion`."""
        counts = {}
        for name, (domain, indices) in self.sets.items():
            images = LabelledImages(domain, indices, test_transform(self.config.image_size))
            loader = batches(images, np.arange(len(images)), self.config)
            with screen.progress(f"  testing on {domain.name}", len(images)) as advance:
                counts[f"{name}_confusion"] = confusion(method, loader, advance).tolist()
        return counts


def confusion(method: Method, loader: DataLoader, advance: Callable[[int], None]) -> Tensor:
    """int64 (n_classes, n_classes) counts of [true, predicted], over every image of `loader`."""
    n = len(CLASSES)
    counts = torch.zeros(n * n, dtype=torch.int64)
    for images, labels in loader:
        predicted = method.predict(images.to(method.device, non_blocking=True)).argmax(1).cpu()
        counts += torch.bincount(labels * n + predicted, minlength=n * n)
        advance(len(labels))
    return counts.view(n, n)


# --- training ---------------------------------------------------------------------------------


def train_epoch(
    method: Method, images: TrainingImages, config: Config, epoch: int, screen: Screen
) -> dict[str, Any]:
    """One pass over the source. Returns the training part of the epoch's row.

    Raises:
        TrainingError: the loss is not finite.
        ShapingError: a chosen layer was not shaped once per pass.
    """
    n = len(images.source_indices)
    loss_sum, correct = 0.0, 0
    fired_before, passes = method.fired(), method.passes
    lr = method.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    with screen.progress(f"epoch {epoch}/{config.epochs}", n) as advance:
        for batch in images.epoch(config, epoch, method.uses_target):
            step = method.update(
                *(None if t is None else t.to(method.device, non_blocking=True) for t in batch)
            )
            # tensors are added, not read, so that a GPU is not waited for at each step
            loss_sum, correct = loss_sum + step.loss_sum, correct + step.correct
            advance(step.images)
    loss_sum, correct = float(loss_sum), int(correct)
    seconds = time.perf_counter() - start
    method.schedule.step()
    if not math.isfinite(loss_sum):
        raise TrainingError(
            f"the training loss of epoch {epoch} is {loss_sum}; lower lr ({config.lr:g}), or set "
            f"amp to off (it is {config.amp})"
        )
    fired = {name: count - fired_before[name] for name, count in method.fired().items()}
    check_fired(fired, method.passes - passes)
    return {
        "train_loss": loss_sum / n,
        "source_train_accuracy": record.percent(correct, n),
        "source_train_correct": correct,
        "source_train_total": n,
        "lr": lr,
        "train_seconds": seconds,
        "images_per_second": n / seconds,
        "fired": fired,
    }


def train(
    method: Method,
    images: TrainingImages,
    evaluate: Callable[[Method, Screen], dict[str, Any]],
    config: Config,
    folder: Path,
    screen: Screen,
) -> list[dict[str, Any]]:
    """Train for config.epochs epochs, from the checkpoint in `folder` if there is one.

    After each epoch comes `evaluate`, then a checkpoint, then metrics.jsonl (a line per epoch).

    Returns the epochs' rows. On a CPU they and the weights are the same bits however often the
    run was interrupted, times excepted.
    """
    images.check_batches(config)
    path = folder / "checkpoint.pt"
    torch.manual_seed(config.seed)
    rows = load_checkpoint(path, method, config) if path.exists() else []
    record.write_json_lines(folder / "metrics.jsonl", rows)
    for epoch in range(len(rows) + 1, config.epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch} | train_epoch(method, images, config, epoch, screen)
        if config.bn_recalibration:
            method.recalibrate(images.plain(config))
        row |= scored(evaluate(method, screen))
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        save_checkpoint(path, method, config, rows)
        record.write_json_lines(folder / "metrics.jsonl", rows)
        screen.say(epoch_line(row, config))
    return rows


def scored(confusions: dict[str, list[list[int]]]) -> dict[str, Any]:
    """The counts with k, n and percent of each test set beside them."""
    row: dict[str, Any] = {}
    for name, counts in confusions.items():
        result = record.figures(torch.tensor(counts), CLASSES)
        stem = name.removesuffix("_confusion")
        row |= {f"{stem}_{key}": result[key] for key in ("correct", "total", "accuracy")}
        row[name] = counts
    return row


def epoch_line(row: dict[str, Any], config: Config) -> str:
    line = (
        f"epoch {row['epoch']}/{config.epochs}  loss {row['train_loss']:.4f}  "
        f"train {row['source_train_accuracy']:.2f} %  "
        f"{config.target} {row['target_accuracy']:.2f} % "
        f"({row['target_correct']}/{row['target_total']})"
    )
    if "holdout_total" in row:
        line += f"  held-out {row['holdout_accuracy']:.2f} %"
    if "invalid_test_total" in row:
        line += f"  INVALID (training images) {row['invalid_test_accuracy']:.2f} %"
    left = (config.epochs - row["epoch"]) * row["seconds"]
    return f"{line}  {row['images_per_second']:.0f} images/s  {left:.0f} s left"


# --- checkpoints ------------------------------------------------------------------------------


def save_checkpoint(path: Path, method: Method, config: Config, rows: list[dict]) -> None:
    """Everything that a resumed run needs, in one file. Raises record.RecordError."""
    state = method.state_dict() | {
        "config": config.as_dict(),
        "rows": rows,
        "cpu_rng": torch.get_rng_state(),
    }
    if method.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(method.device)
    record.write_checkpoint(path, state)


def load_checkpoint(path: Path, method: Method, config: Config) -> list[dict[str, Any]]:
    """Set `method` and the random streams to where the checkpoint left them; returns its rows.

    Raises ConfigError for a checkpoint of another configuration, naming what differs.
    """
    state = record.read_checkpoint(path)
    check_same(state["config"], config, path)
    method.load_state_dict(state)
    torch.set_rng_state(state["cpu_rng"])
    if method.device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], method.device)
    return state["rows"]


def check_same(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raises ConfigError unless `saved` switches compute the same run as `config`."""
    different = differing(saved, config.as_dict())
    if different:
        raise ConfigError(
            f"{path} is of another configuration ({'; '.join(different)}); "
            "use those values, or another --out"
        )
