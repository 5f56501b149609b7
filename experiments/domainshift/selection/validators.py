"""The validators: `VALIDATORS` by name, each a function from arrays to a score. Higher is better.

No validator sees a target label. Mean entropy of the answers is not among them: alone it is least, so
best, for a model that gives one confident answer to every image. `infomax` has it with a counterweight.

Scores of one validator are compared between models on the same images. Those of different validators,
or on different targets, are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from domainshift.selection.arrays import SelectionError, classes_of, matrix, same_width
from domainshift.selection.importance import PENALTY, control_variate_risk, domain_weights

TEMPERATURE = 0.05  # of SND, as published
BLOCK = 256  # rows of SND's similarities that are in memory at once


@dataclass(frozen=True)
class Inputs:
    """What is kept of a model's predictions; None: not kept.

    Logits may be in half precision. Where features are not kept, logits may take the place of all
    three kinds of features.

    target_logits: (n, classes), of target images
    target_features: (n, d), of target images
    held_out_logits: (m, classes), of source images held out from training
    held_out_labels: integers (m,), their true classes
    held_out_features: (m, d), of the same images
    source_features: (k, d), of the source's training images
    """

    target_logits: np.ndarray | None = None
    target_features: np.ndarray | None = None
    held_out_logits: np.ndarray | None = None
    held_out_labels: np.ndarray | None = None
    held_out_features: np.ndarray | None = None
    source_features: np.ndarray | None = None


# --- of the source ----------------------------------------------------------------------------


def held_out_accuracy(held_out_logits: Any, held_out_labels: Any) -> float:
    """Percent of held-out source images whose largest logit is that of their class.

    Of equal logits the first counts, and logits in half precision may be equal where those of the
    network were not. The choice is blind to the target: it assumes that what is best on the source is
    best there.

    Args:
        held_out_logits: (m, classes).
        held_out_labels: integers (m,).

    Raises:
        SelectionError: a wrong shape, no image, one class, a value that is not finite, an unknown class.
    """
    return float(100 * (1 - _errors(held_out_logits, held_out_labels).mean()))


def _errors(logits: Any, labels: Any) -> np.ndarray:
    """1 for each held-out image that is wrong and 0 for each that is right, float64 (m,)."""
    logits = matrix("held_out_logits", logits, columns=2)
    labels = classes_of("held_out_labels", labels, *logits.shape)
    return (logits.argmax(1) != labels).astype(np.float64)


# --- of the target ----------------------------------------------------------------------------


def infomax(target_logits: Any) -> float:
    """Mutual information between a target image and its answer: H(mean p) - mean H(p), in nats.

    p is the softmax of an image's logits and H the entropy. It is greatest, log(classes), for confident
    answers spread evenly over the classes. It is 0 where every image gets the same answer, be it
    confident or uniform. The target's classes are assumed to be about as frequent as each other.

    Source: Shi and Sha, arXiv 1206.6438; of clusters, Krause, Perona and Gomes (NeurIPS 2010).

    Args:
        target_logits: (n, classes).

    Raises:
        SelectionError: a wrong shape, no image, one class, a value that is not finite.
    """
    logits = matrix("target_logits", target_logits, columns=2)
    p = special.softmax(logits, axis=1)
    return float(special.entr(p.mean(0)).sum() - special.entr(p).sum(1).mean())


def bnm(target_logits: Any) -> float:
    """Nuclear norm of the (n, classes) matrix of softmax answers, divided by sqrt(n * classes).

    The nuclear norm, the sum of the singular values, grows with confidence and with the number of
    classes that are answered. Published is the norm divided by n (the loss is its negative); for one
    target and so one n the two rank models alike. The divisor here is the greatest norm that n >= classes
    rows can have. So the score is 1 for confident answers spread evenly over the classes, 1 / classes
    for uniform ones and 1 / sqrt(classes) for one confident answer to every image, and repeating all
    images does not change it.

    Source: Cui et al., arXiv 2003.12237; as a validator, Musgrave, Belongie and Lim, arXiv 2208.07360.

    Args:
        target_logits: (n, classes).

    Raises:
        SelectionError: a wrong shape, no image, one class, a value that is not finite.
    """
    logits = matrix("target_logits", target_logits, columns=2)
    values = np.linalg.svd(special.softmax(logits, axis=1), compute_uv=False)
    return float(values.sum() / np.sqrt(logits.size))


def snd(target_logits: Any) -> float:
    """Soft Neighborhood Density of the softmax answers to target images, in nats.

    See `neighborhood_density` for the definition, and for its failure: it is greatest for a model that
    gives every image the same answer.

    Source: Saito et al., arXiv 2108.10860, which takes softmax answers and temperature 0.05.

    Args:
        target_logits: (n, classes), n >= 2.

    Raises:
        SelectionError: a wrong shape, fewer than two images, one class, a value that is not finite.
    """
    logits = matrix("target_logits", target_logits, columns=2, rows=2)
    return neighborhood_density(special.softmax(logits, axis=1))


def neighborhood_density(
    vectors: Any, temperature: float = TEMPERATURE, block: int = BLOCK
) -> float:
    """Mean entropy of each vector's similarities to the others, in nats.

    Vectors are scaled to length 1. The softmax of vector i's inner products with all the others, itself
    excluded, divided by the temperature, says how likely each is its neighbour. Its entropy is high
    where many are equally near, in a dense cluster, and at most log(n - 1).

    It fails where a model maps every image to one point: log(n - 1), the greatest density there is. It
    rests on the assumption that a model trained well on the source brings images of one class together,
    and it cannot tell whether the images that it finds together are of one class. Read it beside
    `infomax` or `bnm`, where such a model is among the worst.

    Source: Saito et al., arXiv 2108.10860. Memory grows with block * n, time with n^2.

    Args:
        vectors: (n, d), softmax answers or features, n >= 2; one of length 0 is 0 like all others.
        temperature: above 0.
        block: rows of the similarities that are in memory at once; the result does not depend on it.

    Raises:
        SelectionError: a wrong shape, fewer than two vectors, a value that is not finite, a temperature
            or block that is not allowed.
    """
    vectors = matrix("vectors", vectors, rows=2)
    if not 0 < temperature < np.inf:
        raise SelectionError(f"temperature: {temperature} is not allowed; allowed: above 0, finite")
    if block < 1:
        raise SelectionError(f"block: {block} is not allowed; allowed: 1 or more")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    starts = range(0, len(vectors), block)
    total = sum(_entropies(vectors, s, s + block, temperature).sum() for s in starts)
    return float(total / len(vectors))


def _entropies(vectors: np.ndarray, start: int, stop: int, temperature: float) -> np.ndarray:
    """Entropy of the neighbours of vectors[start:stop]."""
    scores = vectors[start:stop] @ vectors.T
    scores /= temperature
    own = np.arange(len(scores)), np.arange(start, start + len(scores))
    scores[own] = -np.inf
    scores -= scores.max(1, keepdims=True)
    likely = np.exp(scores)
    scores[own] = 0.0  # its likelihood is 0, and 0 * -inf is none
    total = likely.sum(1)
    return np.log(total) - np.einsum("ij,ij->i", likely, scores) / total


# --- of both ----------------------------------------------------------------------------------


def dev(
    held_out_logits: Any,
    held_out_labels: Any,
    held_out_features: Any,
    target_features: Any,
    source_features: Any = None,
    penalty: float = PENALTY,
) -> float:
    """Deep Embedded Validation: minus the estimated share of target images that are wrong.

    Held-out source images are weighted by how much denser the target is than the source at their
    features (`domain_weights`). Their weighted mean error, with a control variate
    (`control_variate_risk`), estimates the error on the target. Published is this risk, where lower is
    better. It is right if the domains differ in how frequent features are but not in what they mean, and
    if the source covers the target. Where a classifier tells the domains apart with ease, a few images
    carry all the weight: the estimate is then of little worth, and may lie below 0 or above 1.

    Source: You, Wang, Long and Jordan (ICML 2019), arXiv 2606.04665. Their domain classifier is a small
    network whose weight decay is chosen on held-out rows; this one is a logistic regression of fixed
    penalty, so that the same arrays give the same score.

    Args:
        held_out_logits: (m, classes), m >= 2.
        held_out_labels: integers (m,).
        held_out_features: (m, d); logits may take the place of all features.
        target_features: (n, d).
        source_features: (k, d), of training images, to fit the domain classifier; None: the held-out ones.
        penalty: of the domain classifier, above 0.

    Raises:
        SelectionError: a wrong shape, no or one held-out image, one class, a value that is not finite, an
            unknown class, a penalty that is not allowed.
    """
    errors = _errors(held_out_logits, held_out_labels)
    held_out = matrix("held_out_features", held_out_features, rows=2)
    if len(held_out) != len(errors):
        raise SelectionError(
            f"held_out_features: {len(held_out)} rows are not allowed; "
            f"allowed: {len(errors)}, as held_out_logits has"
        )
    target = matrix("target_features", target_features)
    same_width("target_features", target, "held_out_features", held_out)
    source = held_out
    if source_features is not None:
        source = matrix("source_features", source_features)
        same_width("source_features", source, "held_out_features", held_out)
    return -control_variate_risk(domain_weights(source, target, held_out, penalty), errors)


# --- all of them ------------------------------------------------------------------------------


class Validator(NamedTuple):
    """A way to score a model without target labels.

    name: in `VALIDATORS`
    title: for people
    function: its arguments are named as the fields of `Inputs`
    needs: fields of `Inputs` without which there is no score
    uses: fields that it takes where they are kept
    unit: of the score
    source: where it was published; "" for common practice
    """

    name: str
    title: str
    function: Callable[..., float]
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    unit: str
    source: str

    def lacks(self, inputs: Inputs) -> list[str]:
        """Fields that it needs and that are not kept; empty where it can score."""
        return [name for name in self.needs if getattr(inputs, name) is None]

    def score(self, inputs: Inputs) -> float:
        """The score of a model; higher is better. Raises SelectionError, also for what it lacks."""
        if missing := self.lacks(inputs):
            kept = [f.name for f in fields(inputs) if getattr(inputs, f.name) is not None]
            raise SelectionError(
                f"inputs: {', '.join(kept) or 'nothing'} is not enough for {self.name}; "
                f"needed as well: {', '.join(missing)}"
            )
        return self.function(**{n: getattr(inputs, n) for n in (*self.needs, *self.uses)})


VALIDATORS: dict[str, Validator] = {
    validator.name: validator
    for validator in (
        Validator(
            name="held-out",
            title="Held-out source accuracy",
            function=held_out_accuracy,
            needs=("held_out_logits", "held_out_labels"),
            uses=(),
            unit="percent",
            source="",
        ),
        Validator(
            name="im",
            title="InfoMax (IM)",
            function=infomax,
            needs=("target_logits",),
            uses=(),
            unit="nats",
            source="Shi and Sha, arXiv 1206.6438",
        ),
        Validator(
            name="bnm",
            title="Batch nuclear norm (BNM)",
            function=bnm,
            needs=("target_logits",),
            uses=(),
            unit="share of the greatest norm",
            source="Cui et al., arXiv 2003.12237",
        ),
        Validator(
            name="snd",
            title="Soft Neighborhood Density (SND)",
            function=snd,
            needs=("target_logits",),
            uses=(),
            unit="nats",
            source="Saito et al., arXiv 2108.10860",
        ),
        Validator(
            name="dev",
            title="Deep Embedded Validation (DEV)",
            function=dev,
            needs=("held_out_logits", "held_out_labels", "held_out_features", "target_features"),
            uses=("source_features",),
            unit="minus the share that is wrong",
            source="You et al. (ICML 2019), arXiv 2606.04665",
        ),
    )
}
