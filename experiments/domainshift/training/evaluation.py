"""Testing a network: the one place that reads labels of a domain that is tested.

A test keeps no graph and takes batches of `BATCH` images, whatever the training took: without a graph
they need less memory than a training batch, and what `at_eval on` draws does not depend on the machine.

A test leaves no trace in training. It restores the random streams and the BatchNorm statistics, so
how often, on what and in which way a run is tested does not change how it trains.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional as F

from domainshift import distributed
from domainshift.config import Config, Test, hash_of
from domainshift.data import DataSet
from domainshift.data.device import loader
from domainshift.data.domain import Domain
from domainshift.data.images import UnlabelledImages, test_transform
from domainshift.data.pairing import epoch_order
from domainshift.errors import NonFiniteError
from domainshift.methods import Method
from domainshift.models import MEMORY_FORMATS
from domainshift.progress import Screen
from domainshift.records.results import Predictions
from domainshift.records.schema import Count

BATCH = 256  # images
TEST_MAPS = 4  # purpose of a random stream, beside those of `domainshift.data.pairing`


@dataclass(frozen=True)
class TestSets:
    """Which images belong to a test.

    Attributes:
        data: the data set.
        config: of the run.
        trained: indices of the source images that training reads.
        held_out: indices of those that it does not.
    """

    __test__ = False  # pytest: not a test case

    data: DataSet
    config: Config
    trained: Sequence[int]
    held_out: Sequence[int]

    def of(self, test: Test) -> tuple[Domain, Sequence[int]]:
        """The tested domain and the indices of its images."""
        domain = self.data.load(test.domain, self.config.limit)
        if test.images == "all":
            return domain, range(len(domain.images))
        return domain, self.held_out if test.images == "holdout" else self.trained

    def statistics_images(self, test: Test) -> tuple[np.ndarray, Sequence[int]]:
        """The images, without labels, on which a test measures BatchNorm, and their indices."""
        if test.bn == "target":
            domain, indices = self.of(test)
            return domain.images, indices
        return self.data.load(self.config.source, self.config.limit).images, self.trained


def evaluate(method: Method, test: Test, sets: TestSets, epoch: int, screen: Screen) -> Predictions:
    """One test of the method's network as it is. Arguments and errors: see `evaluate_all`."""
    ((_, predictions),) = evaluate_all(method, [test], sets, epoch, screen)
    return predictions


def evaluate_all(
    method: Method, tests: Iterable[Test], sets: TestSets, epoch: int, screen: Screen
) -> Iterator[tuple[Test, Predictions]]:
    """Several tests of the method's network as it is, those that share statistics one after another.

    What a test gives is a function of the weights, the test and (seed, epoch) alone, so it does not
    depend on the other tests.

    Args:
        epoch: after which the network is tested; it seeds the maps of `at_eval on`.

    Raises:
        ConfigError: a value of `at_eval` that the method does not have.
        NonFiniteError: a logit or the output of a shaped layer is not finite.
    """
    for _, group in groupby(sorted(tests, key=statistics_of), key=statistics_of):
        first, *others = group
        with method.testing(first), measured(method, first, sets, epoch):
            for test in (first, *others):
                try:
                    with random_stream(method, sets.config.seed, epoch, test.name):
                        predictions = predictions_of(method, test, sets, epoch, screen)
                except FloatingPointError as error:  # of a shaped layer
                    raise NonFiniteError(f"test {test.name} after epoch {epoch}: {error}") from None
                yield test, predictions


def statistics_of(test: Test) -> tuple[str, str, str]:
    """What the BatchNorm statistics of a test depend on; tests with equal ones share them."""
    own = f"{test.domain}/{test.images}" if test.bn == "target" else ""
    return test.at_eval, test.bn, own


def between_epochs(tests: Sequence[Test], config: Config) -> list[Test]:
    """The tests to make before the last epoch: those of a target measure BatchNorm as the run does.

    Several arms of a suite can share a training. To measure BatchNorm for each of their tests would
    take longer than the training.
    """
    return [test for test in tests if test.images != "all" or test.bn == config.bn_at_test]


@contextmanager
def measured(method: Method, test: Test, sets: TestSets, epoch: int) -> Iterator[None]:
    """Within it BatchNorm has the statistics that a test asks for.

    Raises NonFiniteError where the output of a shaped layer is not finite while they are measured.
    """
    with ExitStack() as stack:
        # the maps of the measurement have a stream of their own, which ends before the tests
        with random_stream(method, sets.config.seed, epoch, "/".join(statistics_of(test))):
            if test.bn != "trained":
                images, indices = sets.statistics_images(test)
                batches = mixed_batches(images, indices, sets.config)
                try:
                    stack.enter_context(method.recalibrated(batches))
                except FloatingPointError as error:  # of a shaped layer
                    where = f"test {test.name} after epoch {epoch}, while BatchNorm is measured"
                    raise NonFiniteError(f"{where}: {error}") from None
        yield


@contextmanager
def random_stream(method: Method, seed: int, epoch: int, name: str) -> Iterator[None]:
    """Within it torch draws from a stream of (seed, epoch, name); afterwards as if nothing was drawn."""
    words = np.random.SeedSequence([seed, TEST_MAPS, epoch, int(hash_of(name)[:16], 16)])
    devices = [method.device] if method.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(words.generate_state(1)[0]))
        yield


def mixed_batches(
    images: np.ndarray, indices: Sequence[int], config: Config
) -> Iterable[torch.Tensor]:
    """Images as testing sees them, in batches of the training's size, to measure BatchNorm on.

    In a fixed random order, because the statistics of a batch of one class are its own. A smaller
    last batch is left out, because it would count as much as a whole one.
    """
    dataset = UnlabelledImages(images, indices, test_transform(config.image_size))
    order = epoch_order(config.seed, 0, len(dataset))[0]
    size = min(config.batch_size, len(dataset))
    return batches_of(dataset, in_batches(order[: len(order) // size * size], size), config)


def batches_of(
    dataset: UnlabelledImages, parts: Sequence[Sequence[int]], config: Config
) -> Iterable:
    """Batches of a dataset, made and laid out as the switches say."""
    return loader(
        dataset,
        parts,
        pipeline=config.pipeline,
        device=torch.device(config.device),
        workers=config.workers,
        memory_format=MEMORY_FORMATS[config.memory_format],
    )


def in_batches(order: np.ndarray, size: int) -> list[list[int]]:
    return [order[first : first + size].tolist() for first in range(0, len(order), size)]


def predictions_of(
    method: Method, test: Test, sets: TestSets, epoch: int, screen: Screen
) -> Predictions:
    """What the network says of each image of a test. The host waits for the device once, at the end.

    Raises NonFiniteError where a logit or the output of a shaped layer is not finite.
    """
    domain, indices = sets.of(test)
    start, n = time.perf_counter(), len(indices)
    dataset = UnlabelledImages(domain.images, indices, test_transform(sets.config.image_size))
    batches = in_batches(np.arange(n), BATCH)
    parts = [distributed.parts(len(batch))[0] for batch in batches]
    own = [batch[part.images] for batch, part in zip(batches, parts, strict=True)]
    logits = features = None
    with torch.no_grad(), screen.progress(f"  testing on {test.name}", n) as advance:
        for images, places, part in zip(
            batches_of(dataset, own, sets.config), own, parts, strict=True
        ):
            prediction = method.predict(images.to(method.device, non_blocking=True), part.start)
            if logits is None:  # of all processes; each fills in its own part
                logits = prediction.logits.new_zeros(n, prediction.logits.shape[1])
                features = prediction.features.new_zeros(
                    n, prediction.features.shape[1], dtype=torch.float16
                )
            if part.counts:
                logits[places[0] : places[-1] + 1] = prediction.logits
                features[places[0] : places[-1] + 1] = prediction.features
            advance(part.whole)
    logits, features = (distributed.summed(t).cpu() for t in (logits, features))
    with distributed.together():
        check_finite(test, epoch, logits)
    labels = np.asarray(domain.labels[np.asarray(indices)])
    losses = F.cross_entropy(logits.double(), torch.from_numpy(labels), reduction="none")
    batches = losses.split(sets.config.batch_size)
    return Predictions(
        labels=labels.astype(np.int16),
        predicted=logits.argmax(1).numpy().astype(np.int16),
        logits=logits.half().numpy(),
        features=features.numpy(),
        loss=losses.mean().item(),
        batch_loss=torch.stack([batch.mean() for batch in batches]).sum().item() / n,
        seconds=time.perf_counter() - start,
    )


def check_finite(test: Test, epoch: int, logits: torch.Tensor) -> None:
    """Refuse a test in which a number was not finite: argmax would name a class all the same.

    Args:
        logits: float32 (n, classes). In the float16 of records, values above 65504 are infinite; that is
            no fault of the network.
    """
    if bad := int((~logits.isfinite()).any(1).sum()):
        raise NonFiniteError(
            f"test {test.name} after epoch {epoch}: the logits of {bad} of {len(logits)} images are not "
            "finite"
        )


def count_of(predictions: Predictions) -> Count:
    """The figures of a test that a row of metrics.jsonl has."""
    return Count(
        correct=int((predictions.labels == predictions.predicted).sum()),
        total=len(predictions.labels),
        loss=predictions.loss,
        batch_loss=predictions.batch_loss,
    )
