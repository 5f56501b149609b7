"""A picture of augmented images, by the reference and by the pipeline on the device."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from domainshift.data.device import loader
from domainshift.data.domain import Domain
from domainshift.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UnlabelledImages,
    train_transform,
)
from domainshift.errors import DataError
from domainshift.files import write_bytes
from domainshift.plotting import Figure
from domainshift.torch_defaults import own_defaults

IMAGES, EPOCHS = 12, 3  # in a picture


@own_defaults()
def draw_augmentation(
    path: Path, domain: Domain, image_size: int, seed: int, device: torch.device
) -> float:
    """Draw images of a domain as epochs see them: by the reference, and below by the device.

    Returns the largest difference of a pixel, in 255ths. Raises DataError for a path without the suffix
    .png or .pdf, and RecordError where it cannot be written.
    """
    if path.suffix not in (".png", ".pdf"):
        raise DataError(f"path: {str(path)!r} is not allowed; allowed: a file .png or .pdf")
    rows = np.linspace(0, len(domain.images) - 1, IMAGES).astype(int)
    figure = Figure(figsize=(IMAGES, 2.1 * EPOCHS + 0.5), layout="constrained")
    grid = figure.subplots(2 * EPOCHS, IMAGES, squeeze=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    largest = 0.0
    for epoch in range(1, EPOCHS + 1):
        dataset = UnlabelledImages(domain.images, rows, train_transform(image_size), seed, epoch)
        batches = {}
        for line, pipeline in enumerate(("reference", "device"), 2 * epoch - 2):
            batches[pipeline], *_ = loader(
                dataset, [list(range(IMAGES))], pipeline=pipeline, device=device
            )
            images = (batches[pipeline].cpu() * std + mean).clamp(0, 1)
            grid[line, 0].set_ylabel(f"epoch {epoch}\n{pipeline}", fontsize=8)
            for axes, image in zip(grid[line], images, strict=True):
                axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
        difference = (batches["reference"].cpu() - batches["device"].cpu()).abs() * std
        largest = max(largest, 255 * float(difference.max()))
    figure.suptitle(
        f"{domain.name}, {image_size} x {image_size}, seed {seed}: largest difference of a pixel "
        f"{largest:.2f} of 255"
    )
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=110)
    write_bytes(path, content.getvalue())
    return largest
