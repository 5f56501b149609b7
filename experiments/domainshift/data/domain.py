"""All images of one domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Domain:
    """All images of one domain, sorted by class and then by file name.

    name: of the domain
    images: uint8 (n, side, side, 3), RGB; may be a read-only memory map
    labels: int64 (n,), indices into `classes`
    files: "<class>/<file>" of each image
    classes: names of the classes
    digest: hex hash of the content, see `DataSet.digest`
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...]
    classes: tuple[str, ...]
    digest: str
