"""A picture of augmented images, by the reference and by the pipeline on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from domainshift.data.device import loader
from domainshift.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    UnlabelledImages,
    train_transform,
)
from domainshift.plotting import Figure

IMAGES, EPOCHS = 12, 3  # in a picture


def draw_augmentation(
    path: Path, domain: Domain, image_size: int, seed: int, device: torch.device
) -> float:
    """Draw images of a domain as epochs see them: by the reference, and below by the device.

    Returns the largest difference of a pixel, in 255ths.
    """
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
    figure.savefig(path, dpi=110)
    return largest
