"""Batches: from a DataLoader, or the same transforms for whole batches on the device that trains.

The device keeps the uint8 images. Crops and flips are those that `images.train_transform` draws: the same
numbers, from the same seeds. Pixels are PIL's. PIL resizes with an antialiased triangle filter whose
weights are multiples of 2**-22. It takes columns first and then rows, and rounds to uint8 after each pass.
Here a pass is one batched matrix product. A weight is split into two parts of 11 bits, so that all products
and sums are whole numbers below 2**24, which float32 and TF32 hold exactly in any order of summing. So test
images equal the reference's bit for bit, and so do training images where PIL takes columns first. Pillow 13
takes rows first for boxes that shrink more in height than in width. There the two orders round differently:
each result is within 1/2 of the exact value before its last rounding, so they differ by at most 1 of 255.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from domainshift.data.images import LabelledImages, ShuffledImages, UnlabelledImages, shuffled
from domainshift.errors import DataError

HALF = 11  # bits of each part of a weight
CHUNK = 64  # images that are resized at a time when a domain comes to the device
TRIES = 10  # of RandomResizedCrop to draw a box within the image
MOST_TAPS = 32  # so many low parts, times 255, add up to less than 2**24

# (id of an image array, side, device) -> its images on the device, for as long as the array lives
_prepared: dict[tuple[int, int, torch.device], Tensor] = {}


def loader(
    dataset: UnlabelledImages,
    parts: Sequence[Sequence[int]],
    *,
    pipeline: str,
    device: torch.device,
    workers: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> DataLoader | DeviceBatches:
    """Batches of a dataset: float32 (n, 3, S, S) images, with int64 (n,) labels where it has them.

    Args:
        parts: positions in `dataset` of each batch.
        pipeline: "device" makes batches on `device`; "reference" makes them image by image on the CPU.
        workers: processes of the reference pipeline beside this one.
        memory_format: of the images.

    Raises:
        DataError: the images do not fit into the device's memory.
    """
    if pipeline == "device":
        return DeviceBatches(dataset, parts, device, memory_format)
    return DataLoader(
        dataset,
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=partial(collate, memory_format=memory_format),
        pin_memory=device.type == "cuda",
        # a generator of its own: iterating must not draw from the stream that the maps use
        generator=torch.Generator(),
    )


def collate(samples: list, memory_format: torch.memory_format) -> Any:
    """Samples as one batch, its images in a memory format."""
    images, *labels = batch if isinstance(batch := default_collate(samples), list) else [batch]
    images = images.contiguous(memory_format=memory_format)
    return [images, *labels] if labels else images


class DeviceBatches:
    """Batches of a dataset, made on the device, in place of a DataLoader over it.

    Args:
        dataset: of square images, with `images.train_transform` or `images.test_transform`.
        parts: positions in `dataset` of each batch.
        device, memory_format: of the batches.

    Iterating copies a small array or two per batch to the device and waits for nothing. Only the first pass
    over a domain also copies and resizes its images.

    Raises:
        DataError: the images do not fit into the device's memory.
    """

    def __init__(
        self,
        dataset: UnlabelledImages,
        parts: Sequence[Sequence[int]],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.dataset = dataset
        self.parts = parts
        self.device = device
        self.memory_format = memory_format

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        labelled = isinstance(self.dataset, LabelledImages)
        resize, *random, _, normalize = self.dataset.transform.transforms
        images = prepared(self.dataset.images, resize.size, self.device)
        scale, mean, std = constants(tuple(normalize.mean), tuple(normalize.std), self.device)
        for part in self.parts:
            columns = [self.dataset.indices[part]]
            if labelled:
                columns.append(self.dataset.labels[part])
            if random:
                columns.extend(crops(self.dataset, part).T)
            columns = self.on_device(
                torch.from_numpy(np.stack(columns).astype(np.int64, copy=False))
            )
            # a caller may have autocast on, which would round here
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                batch = images.index_select(0, columns[0])
                if random:
                    batch = resized(batch, random[0].size[0], *columns[-5:])
                batch = ((batch / scale - mean) / std).permute(0, 2, 1, 3)
                if isinstance(self.dataset, ShuffledImages):
                    orders = self.dataset.patch_orders(part, batch.shape[-1])
                    batch = shuffled(batch, self.on_device(orders))
                batch = batch.contiguous(memory_format=self.memory_format)
            yield (batch, columns[1]) if labelled else batch

    def on_device(self, numbers: Tensor) -> Tensor:
        """Numbers of a batch, copied to the device without waiting for it."""
        if self.device.type != "cuda":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)


@lru_cache(maxsize=4)
def constants(mean: tuple, std: tuple, device: torch.device) -> Sequence[Tensor]:
    """255, the mean and the deviation of each channel: float32 (1 or 3, 1)."""
    # tensors, because CUDA multiplies by the inverse of a number; kept, because copying them waits
    return [torch.tensor(values, device=device).view(-1, 1) for values in ((255.0,), mean, std)]


def crops(dataset: UnlabelledImages, part: Sequence[int]) -> np.ndarray:
    """What the training transform draws for those positions of `dataset`: int64 (n, 5).

    The columns are top, left, height, width and flip (0 or 1). RandomResizedCrop and
    RandomHorizontalFlip make a dozen calls per image. Here one call per image draws the same numbers
    from torch's generator, and arithmetic on all images at once replaces the rest.
    """
    resize, crop, flip, *_ = dataset.transform.transforms
    side, n = resize.size, len(part)
    pairs = torch.empty(n, TRIES + 2, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        for row, index in zip(pairs, dataset.indices[part], strict=True):
            dataset.start_draws(int(index))
            # 64 bits each: two numbers of the generator, the first in the upper half
            row.random_(-(2**63), None)
    pairs = pairs.numpy().view(np.uint64)
    numbers = np.stack([pairs >> 32, pairs & 0xFFFFFFFF], -1).reshape(n, -1)
    uniform = (numbers & 0xFFFFFF) * 2.0**-24

    def between(uniform: np.ndarray, bounds: Tensor) -> Tensor:
        """As float32 `uniform_` computes it: it does not round the product before the sum."""
        low, span = bounds[0].double(), (bounds[1] - bounds[0]).double()
        return (torch.from_numpy(uniform) * span + low).float()

    # a try takes two numbers; one that fits takes two more
    scale = between(uniform[:, : 2 * TRIES : 2], torch.tensor(crop.scale))
    ratio = between(uniform[:, 1 : 2 * TRIES : 2], torch.tensor(crop.ratio).log()).exp()
    area, ratio = side * side * scale.double().numpy(), ratio.double().numpy()
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (0 < width) & (width <= side) & (0 < height) & (height <= side)
    image, success, first = np.arange(n), fits.any(1), fits.argmax(1)
    # where no try fits, the whole image, because a square's ratio is 1
    height, width = (np.where(success, t[image, first], side).astype(int) for t in (height, width))
    after = np.where(success, 2 * first + 2, 2 * TRIES)
    top = np.where(success, numbers[image, after].astype(int) % (side - height + 1), 0)
    left = np.where(success, numbers[image, after + 1].astype(int) % (side - width + 1), 0)
    flipped = uniform[image, after + 2 * success] < flip.p
    return np.stack([top, left, height, width, flipped], 1).astype(np.int64)


# --- resampling -------------------------------------------------------------------------------


def taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """PIL's bilinear filter from `length` pixels to `size`.

    Returns:
        For each output pixel the first input pixel with a weight, int64 (size,); and the weights of
        it and the next ones in units of 2**-22, int64 (size, k). Weights beyond `length` are 0.

    Raises:
        DataError: `length` is more than about 15 times `size`.
    """
    scale = length / size
    support = max(scale, 1.0)  # enlarging interpolates between two pixels
    k = 2 * math.ceil(support) + 1
    if k > MOST_TAPS:
        raise DataError(
            f"image_size: {size} is not allowed; allowed: at least {length // 15 + 1} for these images"
        )
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum(np.trunc(center - support + 0.5), 0)
    end = np.minimum(np.trunc(center + support + 0.5), length)
    pixel = first[:, None] + np.arange(k)
    weights = np.maximum(1 - np.abs((pixel - center[:, None] + 0.5) * (1 / support)), 0)
    weights[pixel >= end[:, None]] = 0
    total = np.cumsum(weights, 1)[:, -1:]  # added one by one, as PIL does
    return first.astype(np.int64), np.trunc(weights / total * 2**22 + 0.5).astype(np.int64)


@lru_cache(maxsize=16)
def tap_table(least: int, most: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`taps` of every length from `least` to `most`, stacked."""
    firsts, weights = zip(*(taps(n, size) for n in range(least, most + 1)), strict=True)
    k = weights[-1].shape[1]
    weights = [np.pad(w, ((0, 0), (0, k - w.shape[1]))) for w in weights]
    return tuple(torch.from_numpy(np.stack(t)).to(device) for t in (firsts, weights))


def matrices(
    side: int, size: int, least: int, start: Tensor, length: Tensor, flip: Tensor | None = None
) -> Tensor:
    """float32 (n, 2 size, side): each resizes `length` of `side` pixels, from `start` on, to `size`.

    The first `size` rows are the upper halves of the weights, the others the lower halves. All are
    whole numbers.

    Args:
        least: no length is less.
        start, length: int64 (n,) of pixels; start + length <= side.
        flip: int64 (n,); 1 mirrors the output.
    """
    firsts, weights = tap_table(least, side, size, length.device)
    first, weight = firsts[length - least] + start[:, None], weights[length - least]
    if flip is not None:
        mirrored = flip.bool()[:, None]
        first = torch.where(mirrored, first.flip(1), first)
        weight = torch.where(mirrored[..., None], weight.flip(1), weight)
    n, _, k = weight.shape
    halves = torch.cat([weight >> HALF, weight & 2**HALF - 1], 1).float()
    pixel = first.repeat(1, 2)[..., None] + torch.arange(k, device=first.device)
    result = halves.new_zeros(n, 2 * size, side + k)  # taps beyond the side weigh 0 and are cut off
    return result.scatter_(2, pixel, halves)[..., :side]


def rounded(high: Tensor, low: Tensor) -> Tensor:
    """(2**11 high + low) / 2**22, rounded half up: from weights times pixels to pixels."""
    high = low.mul(2**-HALF).floor_().add_(high)
    return high.add_(2 ** (HALF - 1)).mul_(2**-HALF).floor_()


def resized(
    images: Tensor,
    size: int,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    flip: Tensor | None = None,
    least: int = 1,
) -> Tensor:
    """A box of each image, resized as PIL does it, then mirrored where `flip` is 1.

    Args:
        images: uint8 (n, side, 3, side): row, channel, column.
        top, left, height, width: int64 (n,) of pixels, on the device, within the image.
        flip: int64 (n,); 1 exchanges left and right.
        least: no height or width is less.

    Returns:
        float32 (n, size, 3, size) of whole numbers 0 to 255.
    """
    n, side = images.shape[:2]
    columns = matrices(side, size, least, left, width, flip)
    x = images.view(n, side * 3, side).float() @ columns.mT
    x = rounded(x[..., :size], x[..., size:]).view(n, side, 3 * size)
    y = matrices(side, size, least, top, height) @ x
    return rounded(y[:, :size], y[:, size:]).view(n, size, 3, size)


def prepared(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    """All images on the device, resized: uint8 (n, size, 3, size). Kept for as long as `images` lives.

    Raises:
        DataError: the device's memory does not hold them.
    """
    key = id(images), size, device
    if key not in _prepared:
        try:
            _prepared[key] = _resize_all(images, size, device)
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{len(images)} images of {size} x {size} pixels do not fit into the memory of "
                f"{device}; use --pipeline reference, which keeps none there"
            ) from error
        weakref.finalize(images, _prepared.pop, key, None)
    return _prepared[key]


def _resize_all(images: np.ndarray, size: int, device: torch.device) -> Tensor:
    side = images.shape[1]
    result = torch.empty(len(images), size, 3, size, dtype=torch.uint8, device=device)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].transpose(0, 1, 3, 2)
        chunk = torch.from_numpy(np.ascontiguousarray(chunk)).to(device)
        zero = torch.zeros(len(chunk), dtype=torch.int64, device=device)
        whole = torch.full_like(zero, side)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result[start : start + CHUNK] = resized(
                chunk, size, zero, zero, whole, whole, least=side
            )
    return result
