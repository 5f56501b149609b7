"""The reference transforms for whole batches on the training device, from uint8 images that stay there.

The crops and flips are those that `data.train_transform` draws: the same numbers, from the same seeds. The pixels are
PIL's. PIL resizes by an antialiased triangle filter whose weights are multiples of 2**-22, columns first and then
rows, and rounds to uint8 after each of these passes. Here a pass is one batched matrix product. A weight is split in
two parts of 11 bits, so that all products and sums are whole numbers below 2**24: float32 holds them exactly, in any
order of summing and in TF32 as well. So test images are the reference's bit for bit, and so are training images where
PIL takes columns first. Pillow 13 takes rows first for some boxes, which shrink more in height than in width: there
an image has rounding errors of its own, as each of the two is within 1/2 before the last rounding, so that they lie at
most 1 of 255 apart.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from config import MEMORY_FORMATS, Config
from data import DataError, LabelledImages, UnlabelledImages
from torch import Tensor

HALF = 11  # bits of each part of a weight
CHUNK = 64  # images that are resized at a time when a domain comes to the device
TRIES = 10  # of RandomResizedCrop to find a box within the image
MOST_TAPS = 32  # so many low parts, times 255, add up to less than 2**24

# (id of an image array, side, device) -> its images on the device; gone when the array is
_prepared: dict[tuple[int, int, torch.device], Tensor] = {}


class DeviceBatches:
    """Batches of a dataset, made on the device, in place of a DataLoader over it.

    Args:
        dataset: of square images, with `data.train_transform` or `data.test_transform`.
        parts: positions in `dataset` of each batch.
        config: its `device` and `memory_format` are those of the images.

    Iterating copies one small array per batch to the device and waits for nothing, the first pass
    over a domain excepted: that copies and resizes it.

    Raises:
        DataError: the images do not fit into the device's memory.
    """

    def __init__(
        self, dataset: UnlabelledImages, parts: Sequence[Sequence[int]], config: Config
    ) -> None:
        self.dataset = dataset
        self.parts = parts
        self.device = torch.device(config.device)
        self.memory_format = MEMORY_FORMATS[config.memory_format]

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
            columns = torch.from_numpy(np.stack(columns).astype(np.int64, copy=False))
            if self.device.type == "cuda":
                columns = columns.pin_memory().to(self.device, non_blocking=True)
            # a caller may have autocast on, which would round here
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                batch = images.index_select(0, columns[0])
                if random:
                    batch = resized(batch, random[0].size[0], *columns[-5:])
                batch = ((batch / scale - mean) / std).permute(0, 2, 1, 3)
                batch = batch.contiguous(memory_format=self.memory_format)
            yield (batch, columns[1]) if labelled else batch


@lru_cache(maxsize=4)
def constants(mean: tuple, std: tuple, device: torch.device) -> Sequence[Tensor]:
    """255, the mean and the deviation of each channel, float32 (1 or 3, 1)."""
    # tensors, as CUDA multiplies by the inverse of a number; kept, as copying them waits
    return [torch.tensor(values, device=device).view(-1, 1) for values in ((255.0,), mean, std)]


def crops(dataset: UnlabelledImages, part: Sequence[int]) -> np.ndarray:
    """What the training transform draws for those positions of `dataset`: int64 (n, 5).

    The columns are top, left, height, width and flip (0 or 1). RandomResizedCrop and
    RandomHorizontalFlip make a dozen calls for an image; here torch's generator gives the same
    numbers in one, and arithmetic on all images at once makes of them what those calls make.
    """
    resize, crop, flip, *_ = dataset.transform.transforms
    side, n = resize.size, len(part)
    pairs = torch.empty(n, TRIES + 2, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        for row, index in zip(pairs, dataset.indices[part], strict=True):
            dataset.start_draws(int(index))
            row.random_(
                -(2**63), None
            )  # 64 bits each: two numbers of the generator, the first on top
    pairs = pairs.numpy().view(np.uint64)
    numbers = np.stack([pairs >> 32, pairs & 0xFFFFFFFF], -1).reshape(n, -1)
    uniform = (numbers & 0xFFFFFF) * 2.0**-24

    def between(uniform: np.ndarray, bounds: Tensor) -> Tensor:
        """As float32 `uniform_` does it: the product is not rounded before the sum is."""
        low, span = bounds[0].double(), (bounds[1] - bounds[0]).double()
        return (torch.from_numpy(uniform) * span + low).float()

    # a try takes two numbers; one that fits takes two more
    scale = between(uniform[:, : 2 * TRIES : 2], torch.tensor(crop.scale))
    ratio = between(uniform[:, 1 : 2 * TRIES : 2], torch.tensor(crop.ratio).log()).exp()
    area, ratio = side * side * scale.double().numpy(), ratio.double().numpy()
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (0 < width) & (width <= side) & (0 < height) & (height <= side)
    image, found, first = np.arange(n), fits.any(1), fits.argmax(1)
    # where none fits, the whole image, for a square's ratio is 1
    height, width = (np.where(found, t[image, first], side).astype(int) for t in (height, width))
    after = np.where(found, 2 * first + 2, 2 * TRIES)
    top = np.where(found, numbers[image, after].astype(int) % (side - height + 1), 0)
    left = np.where(found, numbers[image, after + 1].astype(int) % (side - width + 1), 0)
    flipped = uniform[image, after + 2 * found] < flip.p
    return np.stack([top, left, height, width, flipped], 1).astype(np.int64)


# --- resampling -------------------------------------------------------------------------------


def taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """PIL's bilinear filter from `length` pixels to `size`.

    Returns:
        For each output pixel the first input pixel that counts, int64 (size,), and the weights of
        that one and those after it in units of 2**-22, int64 (size, k); beyond `length` they are 0.

    Raises:
        DataError: `length` is more than about 15 times `size`.
    """
    scale = length / size
    support = max(scale, 1.0)  # enlarging interpolates between two pixels
    k = 2 * math.ceil(support) + 1
    if k > MOST_TAPS:
        raise DataError(f"image_size is {size}, but must be at least {length // 15 + 1} here")
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
    """`taps` of every length from `least` to `most`, one after the other."""
    firsts, weights = zip(*(taps(n, size) for n in range(least, most + 1)), strict=True)
    k = weights[-1].shape[1]
    weights = [np.pad(w, ((0, 0), (0, k - w.shape[1]))) for w in weights]
    return tuple(torch.from_numpy(np.stack(t)).to(device) for t in (firsts, weights))


def matrices(
    side: int, size: int, least: int, start: Tensor, length: Tensor, flip: Tensor | None = None
) -> Tensor:
    """float32 (n, 2 size, side): from `side` pixels to `size`, by the pixels from `start` on.

    Rows are the weights' upper halves, then their lower ones, all whole numbers.

    Args:
        least: no length is less.
        start, length: int64 (n,) of pixels; start + length <= side.
        flip: int64 (n,); 1 turns the output around.
    """
    firsts, weights = tap_table(least, side, size, length.device)
    first, weight = firsts[length - least] + start[:, None], weights[length - least]
    if flip is not None:
        turned = flip.bool()[:, None]
        first = torch.where(turned, first.flip(1), first)
        weight = torch.where(turned[..., None], weight.flip(1), weight)
    n, _, k = weight.shape
    halves = torch.cat([weight >> HALF, weight & 2**HALF - 1], 1).float()
    pixel = first.repeat(1, 2)[..., None] + torch.arange(k, device=first.device)
    result = halves.new_zeros(n, 2 * size, side + k)  # taps beyond the side weigh 0 and are cut off
    return result.scatter_(2, pixel, halves)[..., :side]


def rounded(high: Tensor, low: Tensor) -> Tensor:
    """(2**11 high + low) / 2**22, rounded half up: from weights times pixels to pixels."""
    return (
        low.mul(2**-HALF).floor_().add_(high).add_(2 ** (HALF - 1)).mul_(2**-HALF).floor_()
    )  # fmt: skip


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
    """A box of each image, resized as PIL does it, then flipped.

    Args:
        images: uint8 (n, side, 3, side): row, channel, column.
        top, left, height, width: int64 (n,) of pixels, on the device, within the image.
        flip: int64 (n,); 1 mirrors left and right.
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
    """All images on the device, resized: uint8 (n, size, 3, size); kept as long as `images` live.

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
            resize = resized(chunk, size, zero, zero, whole, whole, least=side)
        result[start : start + CHUNK] = resize
    return result
