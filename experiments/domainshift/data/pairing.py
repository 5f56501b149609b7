"""In which order an epoch takes the source images, and which image of another domain goes with each."""

from __future__ import annotations

from typing import Literal

import numpy as np

# Purposes of random numbers. Each (seed, purpose) is a stream of its own.
SOURCE_ORDER, TARGET_ORDER = 1, 2

Pairing = Literal["random", "modulo"]


def epoch_order(
    seed: int,
    epoch: int,
    n_source: int,
    n_target: int = 1,
    pairing: Pairing = "random",
    domain: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The source images of an epoch in order, and the target image beside each.

    Args:
        n_source, n_target: numbers of images.
        pairing: "random" walks through a permutation of the target that does not depend on the
            source's, and starts it again when it is used up; "modulo" puts target image
            `i % n_target` beside source image i.
        domain: number, from 0, of the domain in the target's place. Each is permuted in its own way.

    Returns:
        Two int64 arrays of n_source positions: a function of the arguments alone.
    """
    source = np.random.default_rng([seed, SOURCE_ORDER, epoch]).permutation(n_source)
    if pairing == "modulo":
        return source, source % n_target
    target = np.random.default_rng([seed, TARGET_ORDER, epoch, domain]).permutation(n_target)
    return source, target[np.arange(n_source) % n_target]


def same_class(
    seed: int, source: np.ndarray, target: np.ndarray, pairing: Pairing
) -> tuple[float, float]:
    """Percent of the pairs of epoch 1 that share a class, and the percent that chance would give.

    Args:
        source, target: int64 labels of the images to train on, in the order of the data.
    """
    ours, theirs = epoch_order(seed, 1, len(source), len(target), pairing)
    classes = 1 + max(source.max(), target.max())
    shares = [np.bincount(labels, minlength=classes) / len(labels) for labels in (source, target)]
    return 100 * float(np.mean(source[ours] == target[theirs])), 100 * float(shares[0] @ shares[1])
