"""Training on the source, and going on after a kill.

Training gets the *images* of other domains. Their labels stay in `domainshift.training.evaluation`.
Of several processes (see `domainshift.distributed`) each trains on its part of every batch, and the
first one writes.

The randomness of the data (order, pairs, augmentation) is a function of (seed, epoch), so a
checkpoint need not hold it. Maps in training draw from torch's generator, whose state it does hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from domainshift import distributed, files, finite
from domainshift.config import Config
from domainshift.data.domain import Domain
from domainshift.data.images import (
    LabelledImages,
    ShuffledImages,
    UnlabelledImages,
    test_transform,
    train_transform,
)
from domainshift.data.pairing import epoch_order
from domainshift.errors import ConfigError, NonFiniteError, RecordError, ShapingError, listing
from domainshift.lease import Lease
from domainshift.methods import Method
from domainshift.progress import Screen
from domainshift.records import results
from domainshift.records.results import percent
from domainshift.records.schema import CHECKPOINT, METRICS, Count, Row
from domainshift.records.validate import batch_sizes
from domainshift.training import checkpoint
from domainshift.training.evaluation import batches_of

TARGET_AUGMENTATION = 3  # purpose of a random stream, beside those of `domainshift.data.pairing`

# ResNet-18 divides the side by 32, so at this size its last maps have one pixel.
ONE_PIXEL = 32

Test = Callable[[int], Mapping[str, Count]]


# --- data -------------------------------------------------------------------------------------


@dataclass
class TrainingImages:
    """What training may see: labelled source images, and images of other domains without labels.

    Attributes:
        source: the labelled domain.
        source_indices: its images to train on; the others are held out.
        others: (images uint8 (n, side, side, 3), indices to use) for each of `Method.others`.
    """

    source: Domain
    source_indices: Sequence[int]
    others: Sequence[tuple[np.ndarray, Sequence[int]]] = ()

    def check_batches(self, config: Config) -> None:
        """Refuse a batch on which BatchNorm has one value per channel, or a process no image.

        Raises ConfigError.
        """
        n = len(self.source_indices)
        sizes = set(batch_sizes(n, config.batch_size))
        parts = [(size, -(-size // config.accumulate)) for size in sizes]
        start = f"batch_size: {config.batch_size} with accumulate {config.accumulate} leaves"
        if config.image_size <= ONE_PIXEL and any(p == 1 or s % p == 1 for s, p in parts):
            raise ConfigError(
                f"{start} one of {n} training images alone, and at image_size {config.image_size} "
                "BatchNorm needs two; choose another batch_size, or an image_size above 32"
            )
        least, processes = min(size % part or part for size, part in parts), distributed.size()
        if least < processes:
            raise ConfigError(
                f"{start} {least} of {n} training images for one pass of {processes} processes; "
                "choose another batch_size or fewer processes, so that each has an image"
            )

    def epoch(self, config: Config, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yields source images, labels and the images beside them, for each update of an epoch.

        Images are float32 (n, 3, S, S), this process's `distributed.parts` of a batch. The images
        beside them are of the same shape with one other domain, (n, k, 3, S, S) with k of them, and
        None with none.
        """
        source = LabelledImages(
            self.source,
            self.source_indices,
            train_transform(config.image_size),
            seed=config.seed,
            epoch=epoch,
        )
        n = len(source)
        batches = own_batches(source, epoch_order(config.seed, epoch, n)[0], config)
        others = [self.beside(config, epoch, number) for number in range(len(self.others))]
        for (images, labels), *parts in zip(batches, *others, strict=True):
            beside = None
            if parts:
                beside = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
            yield images, labels, beside

    def beside(self, config: Config, epoch: int, number: int) -> Any:
        """The images of one other domain that go with an epoch's source images, in batches."""
        transform = config.options.target_transform
        augment = test_transform if transform == "test" else train_transform
        kind = ShuffledImages if transform == "shuffled" else UnlabelledImages
        stream = np.random.SeedSequence([config.seed, TARGET_AUGMENTATION, number])
        dataset = kind(
            *self.others[number],
            augment(config.image_size),
            seed=int(stream.generate_state(1)[0] >> 1),
            epoch=epoch,
        )
        sizes, pairing = (len(self.source_indices), len(dataset)), config.options.pairing
        order = epoch_order(config.seed, epoch, *sizes, pairing, number)[1]
        return own_batches(dataset, order, config)


def own_batches(dataset: UnlabelledImages, order: np.ndarray, config: Config) -> Any:
    """`dataset` in `order` in training batches, of each this process's part of every pass."""
    batches = []
    for first in range(0, len(order), config.batch_size):
        batch = order[first : first + config.batch_size].tolist()
        parts = distributed.parts(len(batch), config.accumulate)
        batches.append([place for part in parts for place in batch[part.images]])
    return batches_of(dataset, batches, config)


# --- an epoch ---------------------------------------------------------------------------------


def train_epoch(
    method: Method, images: TrainingImages, config: Config, epoch: int, screen: Screen
) -> dict[str, Any]:
    """One pass over the source, or what is left of the training. Returns the row's fields.

    Where epochs are counted, the schedule of the learning rate steps after each in which an update was
    made: one whose every update float16 skipped does not count.

    Raises:
        NonFiniteError: a loss, the output of a shaped layer, or a weight or buffer is not finite.
        ShapingError: a chosen layer was not shaped once per pass.
    """
    n = len(images.source_indices)
    epochs, total = config.length(n)
    sizes = batch_sizes(n, config.batch_size)
    before = (epoch - 1) * len(sizes)  # updates of earlier epochs
    sizes = sizes[: total - before]
    losses = torch.zeros(len(sizes), dtype=torch.float64, device=method.device)
    correct = torch.zeros((), dtype=torch.int64, device=method.device)
    skipped = correct.clone()
    method.bn_moved = None
    fired_before, passes_before = method.fired(), method.passes
    lr = method.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    with screen.progress(f"epoch {epoch}/{epochs}", sum(sizes)) as advance:
        steps = islice(images.epoch(config, epoch), len(sizes))
        for number, (whole, batch) in enumerate(zip(sizes, steps, strict=True)):
            method.progress = (before + number) / total
            tensors = (None if t is None else t.to(method.device, non_blocking=True) for t in batch)
            try:
                step = method.update(*tensors, whole=whole)
            except FloatingPointError as error:  # of a shaped layer
                where = f"epoch {epoch}, update {number + 1}: {error}"
                raise NonFiniteError(f"{where}. {remedy(method)}") from None
            # tensors are added, not read, so that no step waits for a GPU
            losses[number] = step.loss_sum
            correct += step.correct
            skipped += step.skipped
            advance(whole)
    moved = correct.new_full((), -1) if method.bn_moved is None else method.bn_moved
    # the one time in an epoch that the host waits for the device
    counts = torch.stack([correct.double(), moved.double(), skipped.double()])
    *sums, hits, moves, skips = distributed.summed(torch.cat([losses, counts])).tolist()
    seconds = time.perf_counter() - start
    skipped_updates = round(skips / distributed.size())
    if config.updates is None and skipped_updates < len(sizes):
        method.schedule.step()
    passes = method.passes - passes_before
    fired = {name: count - fired_before[name] for name, count in method.fired().items()}
    with distributed.together():
        check_finite(method, sums, epoch)
        check_fired(fired, passes)
    return {
        "train_loss": sum(sums) / sum(sizes),
        "source_train_correct": int(hits),
        "source_train_total": sum(sizes),
        "lr": lr,
        "train_seconds": seconds,
        "updates": len(sizes),
        "skipped": skipped_updates,
        "passes": passes,
        "fired": fired,
        "density": shared_density(method),
        "bn_untouched": None if moves < 0 else not moves,
    }


def check_finite(method: Method, losses: Sequence[float], epoch: int) -> None:
    """Refuse an epoch in which a number was not finite, by a NonFiniteError that says where.

    Args:
        losses: of each update of the epoch.
    """
    faults = []
    for number, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            faults.append(f"the loss of update {number} is {loss}")
            break
    modules = [module.state_dict() for module in method.trained()]
    if names := finite.nonfinite_names(item for state in modules for item in state.items()):
        faults.append(f"at its end {listing(names)} are not finite")
    if faults:
        raise NonFiniteError(f"epoch {epoch}: {'; '.join(faults)}. {remedy(method)}")


def check_moved(method: Method, rows: Sequence[Row]) -> None:
    """Refuse a training in which float16 skipped every update, by a NonFiniteError."""
    if all(row.skipped == row.updates for row in rows):
        updates = sum(row.updates for row in rows)
        raise NonFiniteError(
            f"float16 skipped all {updates} updates, because gradients were not finite: no weight was "
            f"trained. {remedy(method)}"
        )


def remedy(method: Method) -> str:
    """What can keep the numbers of a training finite: a sentence without its full stop."""
    config, options = method.config, method.config.options
    ways = [f"lower lr ({config.lr:g})"]
    if config.amp != "off":
        ways.append(f"set amp to off (it is {config.amp})")
    if len(method.layers) > 1:
        ways.append(f"shape fewer layers ({len(method.layers)})")
    if method.layers and getattr(options, "gradient", "") == "straight_through":
        if not getattr(options, "product", False):  # which has no such gradient
            ways.append("set gradient to clipped (it is straight_through)")
    text = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return text[0].upper() + text[1:]


def check_fired(fired: Mapping[str, int], passes: int) -> None:
    """Refuse training in which a layer was not shaped once per pass, by a ShapingError.

    A module that the network calls k times in a pass is shaped k times in it.
    """
    for name, times in fired.items():
        if times < passes or times % passes:
            raise ShapingError(
                f"layer {name} was shaped {times} times in {passes} training passes: activation "
                "shaping did not happen as asked, so the figures would mean nothing"
            )


def shared_density(method: Method) -> dict[str, float]:
    """`Method.density` of the last pass, over the parts of all processes."""
    density = method.density()
    parts = torch.tensor([d * method.share for d in density.values()], dtype=torch.float64)
    return dict(zip(density, distributed.summed(parts).tolist(), strict=True))


# --- a training -------------------------------------------------------------------------------


def train(
    method: Method,
    images: TrainingImages,
    config: Config,
    folder: Path,
    origin: Mapping[str, Any],
    test: Test,
    screen: Screen,
    log: Callable[[Row], None] = lambda row: None,
    lease: Lease | None = None,
) -> list[Row]:
    """Train as long as `config` says, from the checkpoint in `folder` if there is one.

    Each epoch ends with its tests, its line of metrics.jsonl and the checkpoint, in this order. On a
    CPU the rows and the weights are the same bits however often the run was killed, times excepted.
    It may go on with another number of processes: then they are the same except for rounding.

    Args:
        origin: of `domainshift.setup.origin`.
        test: the tests after an epoch, by name. Called where `config.tests_after` asks for them.
        log: gets each new row.
        lease: of `folder`. It is confirmed before anything is written.

    Raises:
        ConfigError: batches that cannot be trained on, or a checkpoint of another training.
        RecordError: a file in `folder` cannot be read or written.
        NonFiniteError, ShapingError: see `train_epoch`.
    """
    images.check_batches(config)
    path = folder / CHECKPOINT
    torch.manual_seed(config.seed)
    with distributed.together():
        done = checkpoint.resume(path, method, origin) if path.exists() else 0
        rows = rows_until(folder, done)
    identity, versions = rows[0].run if rows else uuid4().hex, results.versions(config.device)
    with distributed.together():
        if distributed.summed(torch.tensor(done)) != done * distributed.size():
            raise RecordError(
                f"{path} is not the same file for all {distributed.size()} processes: they need one "
                "file system"
            )
        if distributed.rank() == 0:
            drop_later_rows(folder, rows)
    epochs, _ = config.length(len(images.source_indices))
    for epoch in range(done + 1, epochs + 1):
        start = time.perf_counter()
        values = train_epoch(method, images, config, epoch, screen)
        tests = dict(test(epoch)) if config.tests_after(epoch, epochs) else {}
        seconds = time.perf_counter() - start
        values |= {"seconds": seconds, "tests": tests, "run": identity, "versions": versions}
        row = Row(epoch=epoch, **values)
        with distributed.together():
            if distributed.rank() == 0:
                if lease:
                    lease.confirm()
                files.append_json_line(folder / METRICS, row.model_dump(mode="json"))
                checkpoint.save(path, method, epoch, origin)
        rows.append(row)
        if distributed.rank() == 0:
            log(row)
        screen.say(epoch_line(row, epochs))
    return rows


def rows_until(folder: Path, epoch: int) -> list[Row]:
    """The rows of metrics.jsonl up to an epoch. Raises RecordError where one is missing."""
    if epoch == 0:
        return []
    path = folder / METRICS
    try:
        rows = [Row.model_validate(v) for v in files.read_json_lines(path, torn=True)[:epoch]]
    except ValidationError as error:
        raise RecordError(f"{path} has a line that is no epoch: {error.errors()[0]}") from None
    if [row.epoch for row in rows] != list(range(1, epoch + 1)):
        raise RecordError(f"{path} does not have the {epoch} epochs of {CHECKPOINT}")
    return rows


def drop_later_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Rewrite metrics.jsonl without what a kill left after these rows: later ones, or half a line."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) != len(rows):
        files.write_bytes(path, b"".join(lines[: len(rows)]))


def epoch_line(row: Row, epochs: int) -> str:
    """What the screen shows after an epoch."""
    trained = percent(row.source_train_correct, row.source_train_total)
    parts = [f"epoch {row.epoch}/{epochs}  loss {row.train_loss:.4f}  train {trained:.2f} %"]
    for name, count in row.tests.items():
        share = percent(count.correct, count.total)
        parts.append(f"{name} {share:.2f} % ({count.correct}/{count.total})")
    left = (epochs - row.epoch) * row.seconds
    speed = row.source_train_total / row.train_seconds
    if row.skipped:
        parts.append(f"{row.skipped} of {row.updates} updates skipped")
    return "  ".join([*parts, f"{speed:.0f} images/s", f"{left:.0f} s left"])
