"""Images per second of the experiments' training loop, with and without shaping, and of their input pipelines alone.

The images are the toy's, resized to the side of the step benchmarks. The speed does not depend on their content.
"""

from pathlib import Path

import pytest
from domainshift.progress import Screen
from domainshift.setup import set_up
from domainshift.training.loop import train_epoch
from domainshift.training.run import build
from test_step_speed import BATCH, SIDE

PER_CLASS = 8  # images of each of the seven classes
MODES = {
    "baseline": {},  # against itself: shows how exact a ratio is
    "random": {"layers": [1, 4], "p_zero": 0.5},
    "da": {"layers": 4},
}


def experiment(mode: str, pipeline: str = "reference"):
    values = {"data": "toy", "limit": PER_CLASS, "holdout": 0, "epochs": 1, "device": "cpu"}
    values |= {"image_size": SIDE, "batch_size": BATCH, "mode": mode, "pipeline": pipeline}
    # the network and precision of the step benchmarks
    values |= {"model": "resnet18", "weights": "none", "amp": "off"}
    setup = set_up(values | MODES[mode])
    return build(setup, setup.config.tests(), None, Path()), setup.config


def epoch(mode: str):
    """A call that trains an epoch, and the number of its images."""
    built, config = experiment(mode)
    screen, n = Screen(), len(built.images.source_indices)
    return lambda: train_epoch(built.method, built.images, config, 1, screen), n


@pytest.mark.parametrize("mode", MODES)
def test_epoch(against, benchmark, mode):
    ours, n = epoch(mode)
    against(ours, epoch("baseline")[0], moved_bytes=0, rounds=5, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = 1e3 * n / benchmark.extra_info["ours_ms"]


@pytest.mark.parametrize("pipeline", ("reference", "device"))
def test_pipeline(benchmark, pipeline):
    """The batches of an epoch, augmented and normalized, without a network."""
    built, config = experiment("baseline", pipeline)

    def batches():
        return sum(len(images) for images, _, _ in built.images.epoch(config, 1))

    n = benchmark.pedantic(batches, rounds=5, warmup_rounds=1)
    assert n == len(built.images.source_indices)
    benchmark.extra_info["images_per_second"] = n / benchmark.stats.stats.median
