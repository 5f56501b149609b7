"""The toy data set: the pictures of `drawing`, with the domains and classes of PACS."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from domainshift.data import drawing
from domainshift.data.domain import Domain
from domainshift.data.folder import DataSet


class Toy(DataSet):
    """Drawn pictures of 64 x 64 pixels. It needs no folder and no download."""

    name = "toy"
    domains = drawing.DOMAINS
    classes = drawing.CLASSES
    # a small network, pre-trained on drawn photos (see toy_pretraining), learns this in half a minute
    defaults = {
        "model": "resnet18-slim",
        "weights": str(Path(__file__).with_name("toy_weights.pt")),
        "image_size": 64,
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.01,
    }
    remarks = ("toy data: drawn images, not PACS; nothing here compares with a report",)

    def _sizes(self, domain: str) -> tuple[int, ...]:
        return (drawing.IMAGES_PER_CLASS,) * len(drawing.CLASSES)

    def _digest(self, domain: str, limit: int | None) -> str:
        return self.load(domain, limit).digest

    def _read(self, domain: str, limit: int | None) -> Domain:
        return drawn(domain, self.counts(domain, limit)[0])


@lru_cache(maxsize=64)  # a worker process draws a domain once for all its runs
def drawn(domain: str, count: int) -> Domain:
    """The first `count` pictures of each class of a domain. Fewer are the first of more."""
    places = [(name, index) for name in drawing.CLASSES for index in range(count)]
    images = np.stack([drawing.draw(domain, name, index) for name, index in places])
    images.flags.writeable = False
    return Domain(
        name=domain,
        images=images,
        labels=np.repeat(np.arange(len(drawing.CLASSES), dtype=np.int64), count),
        files=tuple(f"{name}/{name}_{index:03d}.png" for name, index in places),
        classes=drawing.CLASSES,
        digest=hashlib.sha256(images).hexdigest(),
    )
