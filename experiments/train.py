"""Training on the source, testing on the target, and coming back after a kill.

`train` is given the target's *images*; its labels stay with `Evaluation`, which only counts. Of several
processes (see `distributed`) each runs all of this on its part of every batch, and the first writes.

All randomness of the data (order, pairs, augmentation) and of the maps in tests is a function of
(seed, epoch), so a checkpoint need not hold it. The maps in training draw from torch's generator of
the device, whose state a checkpoint does hold.

Testing leaves no trace: how often, on what and with which switches a run is tested does not change
how it trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import distributed
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
from device_images import DeviceBatches
from methods import Method, check_fired
from screen import Screen
from torch import Tensor
from torch.utils.data import DataLoader

# Purposes of random numbers. Each (seed, purpose) is a stream of its own, so that target images
# are not cropped and flipped as the source images of the same number are.
SOURCE_ORDER, TARGET_ORDER, TARGET_AUGMENTATION, TEST_MAPS = 1, 2, 3, 4

# ResNet-18 divides the side by 32, so at this size its last maps have one pixel.
ONE_PIXEL = 32


class TrainingError(RuntimeError):
    """Training cannot go on."""


# --- data -------------------------------------------------------------------------------------


def epoch_order(
    config: Config, epoch: int, n_source: int, n_target: int, domain: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Which source images an epoch takes, in order, and the target image beside each.

    Returns two int64 arrays of n_source positions. Pairing "random" walks through a permutation
    of the target that is independent of the source's, again from its start when it is used up;
    "modulo" is target image `i % n_target` for source image i. `domain` counts from 0 where
    several domains stand in the target's place: each is permuted in its own way.
    """
    source = np.random.default_rng([config.seed, SOURCE_ORDER, epoch]).permutation(n_source)
    if config.pairing == "modulo":
        return source, source % n_target
    stream = [config.seed, TARGET_ORDER, epoch, domain]
    target = np.random.default_rng(stream).permutation(n_target)
    return source, target[np.arange(n_source) % n_target]


def same_class(config: Config, source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Percent of an epoch's pairs that share a class, and the percent that chance would give.

    Args:
        source, target: int64 labels of the images to train on, in the order of the data.
    """
    ours, theirs = epoch_order(config, 1, len(source), len(target))
    shares = [
        np.bincount(labels, minlength=len(CLASSES)) / len(labels) for labels in (source, target)
    ]
    return 100 * float(np.mean(source[ours] == target[theirs])), 100 * float(shares[0] @ shares[1])


Batches = DataLoader | DeviceBatches


def batches(
    dataset: UnlabelledImages, order: np.ndarray, config: Config, passes: int | None = None
) -> Batches:
    """`dataset` in `order`, config.batch_size images at a time; the last batch may be smaller.

    Args:
        passes: how many passes share a batch: it is split over the processes, pass by pass. None:
            each process has all of it.
    """
    size = config.batch_size
    parts = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    if passes is not None:
        shares = [(batch, distributed.parts(len(batch), passes)) for batch in parts]
        parts = [[i for part in mine for i in batch[part.images]] for batch, mine in shares]
    if config.pipeline == "device":
        return DeviceBatches(dataset, parts, config)
    return DataLoader(
        dataset,
        batch_sampler=parts,
        num_workers=config.workers,
        pin_memory=torch.device(config.device).type == "cuda",
        # a generator of its own: iterating must not draw from the stream that the maps use
        generator=torch.Generator(),
    )


def mixed_batches(images: np.ndarray, indices: Sequence[int], config: Config) -> Batches:
    """Images without labels in batches, as testing sees them, to measure BatchNorm on: float32.

    In a fixed random order, for a batch of one class alone has statistics of its own; without a
    smaller last batch, which would count as much as a whole one.
    """
    dataset = UnlabelledImages(images, indices, test_transform(config.image_size))
    order = epoch_order(config, 0, len(dataset), 1)[0]
    size = min(config.batch_size, len(dataset))
    return batches(dataset, order[: len(order) // size * size], config)


@dataclass
class TrainingImages:
    """What training may see: labelled source images, and other images without labels.

    Attributes:
        source: the labelled domain.
        source_indices: its images to train on (the others are held out).
        unlabelled: (images uint8 (n, side, side, 3), indices to use): those of the target; or of
            each of `mask_sources`; or nothing, for a method that asks for none.
    """

    source: Domain
    source_indices: Sequence[int]
    unlabelled: Sequence[tuple[np.ndarray, Sequence[int]]] = ()

    def check_batches(self, config: Config) -> None:
        """Refuse a batch on which BatchNorm has one value per channel, or a process no image.

        Raises ConfigError.
        """
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
        least, processes = min(size % part or part for size, part in parts), distributed.size()
        if least < processes:
            raise ConfigError(
                f"batch_size: {config.batch_size} with accumulate {config.accumulate} leaves {least} "
                f"of {n} training images for one pass of {processes} processes; choose another "
                "batch_size or fewer processes, so that each has an image"
            )

    def epoch(self, config: Config, epoch: int, with_target: bool):
        """Yields (images, labels, target images or None) for each update of an epoch.

        Of each batch this process's `distributed.parts`.
        """
        source = LabelledImages(
            self.source,
            self.source_indices,
            train_transform(config.image_size),
            seed=config.seed,
            epoch=epoch,
        )
        order = epoch_order(config, epoch, len(source), 1)[0]
        loader = batches(source, order, config, config.accumulate)
        if not with_target:
            yield from ((images, labels, None) for images, labels in loader)
            return
        others = [self.others(config, epoch, domain) for domain in range(len(self.unlabelled))]
        for (images, labels), *parts in zip(loader, *others, strict=True):
            # one domain: (n, 3, S, S); k of them: (n, k, 3, S, S)
            yield images, labels, torch.stack(parts, 1) if config.mask_sources else parts[0]

    def others(self, config: Config, epoch: int, domain: int) -> Batches:
        """The images of unlabelled domain number `domain` that go with an epoch's source images."""
        augment = train_transform if config.target_transform == "train" else test_transform
        streams = np.random.SeedSequence([config.seed, TARGET_AUGMENTATION, domain])
        dataset = UnlabelledImages(
            *self.unlabelled[domain],
            augment(config.image_size),
            seed=int(streams.generate_state(1)[0] >> 1),
            epoch=epoch,
        )
        n = len(self.source_indices)
        order = epoch_order(config, epoch, n, len(dataset), domain)[1]
        return batches(dataset, order, config, config.accumulate)

    def plain(self, config: Config) -> Batches:
        """The source's training images without labels, to measure BatchNorm on."""
        return mixed_batches(self.source.images, self.source_indices, config)


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
            # batch by batch, so that the maps of --at-eval on are drawn for the batches of one process
            loader = batches(images, np.arange(len(images)), self.config, passes=1)
            parts = [distributed.parts(n)[0] for n in record.batch_sizes(len(images), self.config)]
            adapted = nullcontext()
            if name == "target":  # its images alone: a method has no argument for labels
                adapted = method.adapted(mixed_batches(domain.images, indices, self.config))
            with adapted, screen.progress(f"  testing on {domain.name}", len(images)) as advance:
                counts[f"{name}_confusion"] = confusion(method, loader, parts, advance).tolist()
        return counts


def confusion(
    method: Method,
    loader: Batches,
    parts: Sequence[distributed.Part],
    advance: Callable[[int], None],
) -> Tensor:
    """int64 (n_classes, n_classes) counts of [true, predicted], of all processes.

    Every image counts once. On the method's device: nothing here waits for it.

    Args:
        loader: this process's images and labels, batch by batch.
        parts: which part of each batch they are.
    """
    n = len(CLASSES)
    counts = torch.zeros(n * n, dtype=torch.int64, device=method.device)
    for batch, part in zip(loader, parts, strict=True):
        images, labels = (t.to(method.device, non_blocking=True) for t in batch)
        pairs = labels * n + method.predict(images, part.start).argmax(1)
        if part.counts:
            counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        advance(part.whole)
    return distributed.summed(counts).view(n, n)


# --- training ---------------------------------------------------------------------------------


def train_epoch(
    method: Method, images: TrainingImages, config: Config, epoch: int, screen: Screen
) -> dict[str, Any]:
    """One pass over the source, or what is left of it. Returns the training part of the row.

    Raises:
        TrainingError: the loss is not finite.
        ShapingError: a chosen layer was not shaped once per pass.
    """
    n = len(images.source_indices)
    epochs, total = config.length(n)
    before = (epoch - 1) * -(-n // config.batch_size)  # updates of the epochs before
    loss_sum, correct, seen, updates = 0.0, 0, 0, 0
    method.bn_moved = None
    fired_before, passes_before = method.fired(), method.passes
    lr = method.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    steps = islice(images.epoch(config, epoch, method.uses_target), total - before)
    with screen.progress(f"epoch {epoch}/{epochs}", n) as advance:
        for whole, batch in zip(record.batch_sizes(n, config), steps, strict=False):
            method.progress = (before + updates) / total
            step = method.update(
                *(None if t is None else t.to(method.device, non_blocking=True) for t in batch),
                whole=whole,
            )
            # tensors are added, not read, so that a GPU is not waited for at each step
            loss_sum, correct = loss_sum + step.loss_sum, correct + step.correct
            seen, updates = seen + step.images, updates + 1
            advance(step.images)
    moved = correct.new_full((), -1) if method.bn_moved is None else method.bn_moved
    # the one time that the host waits for the device
    sums = distributed.summed(torch.stack([loss_sum, correct.double(), moved.double()]))
    loss_sum, correct, moved = sums.tolist()
    seconds = time.perf_counter() - start
    if config.updates is None:
        method.schedule.step()
    fired = {name: count - fired_before[name] for name, count in method.fired().items()}
    passes = method.passes - passes_before
    with distributed.together():
        if not math.isfinite(loss_sum):
            raise TrainingError(
                f"the training loss of epoch {epoch} is {loss_sum}; lower lr ({config.lr:g}), or set "
                f"amp to off (it is {config.amp})"
            )
        check_fired(fired, passes)
    density = method.density()  # of this process's part of the last pass
    shares = torch.tensor([d * method.share for d in density.values()], dtype=torch.float64)
    density = dict(zip(density, distributed.summed(shares).tolist(), strict=True))
    return {
        "train_loss": loss_sum / seen,
        "source_train_accuracy": record.percent(int(correct), seen),
        "source_train_correct": int(correct),
        "source_train_total": seen,
        "lr": lr,
        "train_seconds": seconds,
        "images_per_second": seen / seconds,
        "updates": updates,
        "passes": passes,
        "fired": fired,
        "density": density,
        "bn_untouched": None if moved < 0 else not moved,
    }


def train(
    method: Method,
    images: TrainingImages,
    evaluate: Callable[[Method, Screen], dict[str, Any]],
    config: Config,
    folder: Path,
    screen: Screen,
) -> list[dict[str, Any]]:
    """Train as long as `config` says, from the checkpoint in `folder` if there is one.

    After each epoch comes `evaluate`, then a checkpoint, then metrics.jsonl (a line per epoch).

    Returns the epochs' rows. On a CPU they and the weights are the same bits however often the
    run was interrupted, times excepted. It may go on with another number of processes: then they
    are the same but for rounding.
    """
    images.check_batches(config)
    path = folder / "checkpoint.pt"
    torch.manual_seed(config.seed)
    with distributed.together():
        rows = load_checkpoint(path, method, config) if path.exists() else []
    done = distributed.summed(torch.tensor(len(rows)))
    with distributed.together():
        if done != len(rows) * distributed.size():
            raise record.RecordError(
                f"{path} is not the same file for all {distributed.size()} processes: they need one "
                "file system"
            )
        if distributed.rank() == 0:
            record.write_json_lines(folder / "metrics.jsonl", rows)
    epochs, _ = config.length(len(images.source_indices))
    for epoch in range(len(rows) + 1, epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch} | train_epoch(method, images, config, epoch, screen)
        with tested(method, images, config, epoch):
            row |= scored(evaluate(method, screen))
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        if distributed.rank() == 0:
            save_checkpoint(path, method, config, rows)
            record.write_json_lines(folder / "metrics.jsonl", rows)
        screen.say(epoch_line(row, epochs, config))
    return rows


@contextmanager
def tested(method: Method, images: TrainingImages, config: Config, epoch: int) -> Iterator[None]:
    """Around an epoch's tests: what they draw and measure is put back."""
    seed = np.random.SeedSequence([config.seed, TEST_MAPS, epoch]).generate_state(1)[0]
    devices = [method.device] if method.device.type == "cuda" else []
    source = method.recalibrated(images.plain(config)) if config.bn_recalibration else nullcontext()
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed))
        with source:
            yield


def scored(confusions: dict[str, list[list[int]]]) -> dict[str, Any]:
    """The counts with k, n and percent of each test set beside them."""
    row: dict[str, Any] = {}
    for name, counts in confusions.items():
        result = record.figures(torch.tensor(counts), CLASSES)
        stem = name.removesuffix("_confusion")
        row |= {f"{stem}_{key}": result[key] for key in ("correct", "total", "accuracy")}
        row[name] = counts
    return row


def epoch_line(row: dict[str, Any], epochs: int, config: Config) -> str:
    line = (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
        f"train {row['source_train_accuracy']:.2f} %  "
        f"{config.target} {row['target_accuracy']:.2f} % "
        f"({row['target_correct']}/{row['target_total']})"
    )
    if "holdout_total" in row:
        line += f"  held-out {row['holdout_accuracy']:.2f} %"
    if "invalid_test_total" in row:
        line += f"  INVALID (training images) {row['invalid_test_accuracy']:.2f} %"
    left = (epochs - row["epoch"]) * row["seconds"]
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
    for parameter, moments in method.optimizer.state.items():
        if moments.get("momentum_buffer") is not None:  # its strides are those of the saving run
            moments["momentum_buffer"] = torch.empty_like(parameter).copy_(
                moments["momentum_buffer"]
            )
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
