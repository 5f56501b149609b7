"""Images of one domain as samples: transforms, random draws that can be repeated, and a held-out part."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from domainshift.config import PATCH
from domainshift.data.domain import Domain
from domainshift.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PATCH_ORDER = 5  # purpose of a random stream, beside those of `domainshift.data.pairing`

_WORD = 0xFFFFFFFFFFFFFFFF


# --- transforms -------------------------------------------------------------------------------


def train_transform(image_size: int) -> transforms.Compose:
    """Augmentation of the protocol: a square PIL image to a float32 (3, image_size, image_size) tensor.

    At 224: Resize 256, RandomResizedCrop 224 (scale 0.7 to 1), horizontal flip, ImageNet
    normalization. Other sizes keep the proportion 256/224. It draws from torch's CPU generator.

    Raises DataError for an image_size below 1.
    """
    _check_image_size(image_size)
    return transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224)),
            transforms.RandomResizedCrop(image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def test_transform(image_size: int) -> transforms.Compose:
    """A square PIL image to a normalized float32 (3, image_size, image_size) tensor.

    Raises DataError for an image_size below 1.
    """
    _check_image_size(image_size)
    return transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest: a function, not a test


def _check_image_size(image_size: int) -> None:
    if image_size < 1:
        raise DataError(f"image_size: {image_size} is not allowed; allowed: at least 1 pixel")


# --- samples ----------------------------------------------------------------------------------


def mix(*values: int) -> int:
    """A 64-bit hash of integers (SplitMix64 steps). Neighbouring inputs give unrelated outputs."""
    state = 0
    for value in values:
        state = (state ^ (value & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


class UnlabelledImages(Dataset):
    """Images without their labels: [i] is a float32 (3, S, S) tensor.

    It gets the image array alone, so target labels have no way into training code.

    Args:
        images: uint8 (n, side, side, 3), RGB.
        indices: which images, in which order; int (m,), each 0 to n - 1.
        transform: PIL image to tensor; may draw from torch's CPU generator.
        seed, epoch: what a random transform draws for an image is a function of (seed, epoch,
            index of the image in `images`) alone: the same in any worker, in any order and after
            any resume.

    Raises:
        DataError: images of another shape or dtype, or an index out of range.
    """

    def __init__(
        self,
        images: np.ndarray,
        indices: Iterable[int],
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images: {images.dtype} {images.shape} is not allowed; "
                "allowed: uint8 (n, side, side, 3)"
            )
        indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataError(
                f"indices: {indices.dtype} {indices.shape} is not allowed; allowed: integers (m,)"
            )
        outside = indices[(indices < 0) | (indices >= len(images))]
        if outside.size:
            raise DataError(
                f"indices: {outside[0]} is not allowed; allowed: 0 to {len(images) - 1}"
            )
        self.images = images
        self.indices = indices.astype(np.int64)
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        index = int(self.indices[i])
        image = Image.fromarray(np.array(self.images[index]))  # a copy: the map is read-only
        with torch.random.fork_rng(devices=[]):
            self.start_draws(index)
            return self.transform(image)

    def start_draws(self, index: int) -> None:
        """Seed torch's CPU generator for what a random transform draws for that image."""
        # The CPU generator alone: torch.manual_seed would reset those of the GPUs too, which
        # fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(mix(self.seed, self.epoch, index))

    def __getstate__(self) -> dict[str, Any]:
        """A memory map goes to a spawned worker as the name of its file, not as gigabytes of pixels."""
        state = self.__dict__.copy()
        # a slice of a map is a memmap too, but only a whole one has the mmap itself as its base
        if isinstance(self.images, np.memmap) and isinstance(self.images.base, mmap.mmap):
            state["images"] = self.images.filename, self.images.shape, self.images.offset
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.images, tuple):
            file, shape, offset = self.images
            self.images = np.memmap(file, np.uint8, "r", offset, shape)


class LabelledImages(UnlabelledImages):
    """Images with labels: [i] is (float32 (3, S, S) tensor, int label).

    Arguments, random draws and errors are those of `UnlabelledImages`, but for `domain`.
    """

    def __init__(
        self,
        domain: Domain,
        indices: Iterable[int],
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(domain.images, indices, transform, seed, epoch)
        self.labels = domain.labels[self.indices]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return super().__getitem__(i), int(self.labels[i])


class ShuffledImages(UnlabelledImages):
    """Images whose patches of `PATCH` x `PATCH` pixels are in random order, after the transform.

    Colours and the texture within a patch stay, and what the image shows does not. Single pixels in
    random order would be noise, on which the activations of a network spread twice as wide.

    Arguments, random draws and errors are those of `UnlabelledImages`. The order of the patches too is
    a function of (seed, epoch, index of the image in `images`), from a stream of its own.
    """

    def __getitem__(self, i: int) -> Tensor:
        image = super().__getitem__(i)
        return shuffled(image[None], self.patch_orders([i], image.shape[-1]))[0]

    def patch_orders(self, part: Iterable[int], side: int) -> Tensor:
        """Which patch comes to each place, for those positions of the dataset: int64 (n, patches)."""
        keys = [mix(self.seed, self.epoch, int(index)) for index in self.indices[list(part)]]
        patches = (side // PATCH) ** 2
        orders = [np.random.default_rng([key, PATCH_ORDER]).permutation(patches) for key in keys]
        return torch.from_numpy(np.stack(orders))


def shuffled(images: Tensor, orders: Tensor) -> Tensor:
    """Images (n, C, S, S) with patch `orders[i, k]` of image i in place k, row by row; contiguous.

    Args:
        orders: int64 (n, (S / PATCH) ** 2), on the device of the images; S is a multiple of PATCH.
    """
    n, channels, side, _ = images.shape
    grid = side // PATCH
    patches = images.reshape(n, channels, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, grid * grid, channels, PATCH, PATCH)
    patches = patches[torch.arange(n, device=images.device)[:, None], orders]
    patches = patches.view(n, grid, grid, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(images.shape)


def split_holdout(domain: Domain, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a domain into training and held-out images, class by class.

    Each class gives `fraction` of its images, rounded half up, but at least 1 and never all.

    Returns:
        (training, held-out) indices into `domain.images`: int64, each sorted; a function of the
        labels, fraction and seed alone.

    Raises:
        DataError: fraction not above 0 and below 1, a negative seed, or a class of one image.
    """
    if not 0 < fraction < 1:
        raise DataError(f"holdout: {fraction} is not allowed; allowed: 0 < holdout < 1")
    if seed < 0:
        raise DataError(f"seed: {seed} is not allowed; allowed: at least 0")
    held_out = np.zeros(len(domain.labels), dtype=bool)
    for label in np.unique(domain.labels):
        members = np.flatnonzero(domain.labels == label)
        if len(members) < 2:
            raise DataError(
                f"holdout: {fraction} is not allowed, because class {domain.classes[label]} of "
                f"{domain.name} has 1 image; allowed: 0"
            )
        count = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
        chosen = np.random.default_rng([seed, int(label)]).permutation(members)[:count]
        held_out[chosen] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
