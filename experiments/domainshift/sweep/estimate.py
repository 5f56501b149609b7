"""How long a suite will take, by what was measured on this kind of machine before.

What a training costs is counted in forward and backward passes of one 224-pixel image, and what a
test costs in forward passes. Seconds for each of them are measured by every training that a suite
makes, and kept in one small file beside the folders of the suites.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from domainshift import files
from domainshift.config import Config, Test
from domainshift.errors import RecordError
from domainshift.methods.base import FORWARD
from domainshift.records.results import read_rows
from domainshift.setup import Setup
from domainshift.sweep.plan import Job
from domainshift.training.evaluation import between_epochs, statistics_of

RATES = "rates.json"
PIXELS = 224
NEWEST = 0.3  # the least weight of the newest measurement, so that old ones are forgotten

# Where nothing was measured: seconds per 224-pixel pass, on a GPU and on one CPU core. Guesses: 30
# epochs of 2,048 images in a minute on a GPU; on the CPU from 112-pixel trainings on two AMD cores.
GUESS = {"cuda": 1 / 1400, "cpu": 1 / 6.7, "cpu bfloat16": 1 / 15}
GUESS_START = 2.0  # seconds of a run that are neither training nor tests
IMPORTS = 8.0  # seconds until a worker has imported torch; once per worker


# --- work -------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Passes of 224-pixel images."""

    training: float  # forward and backward
    testing: float  # forward


def work_of(setup: Setup, tests: Sequence[Test]) -> Work:
    """What a training with these tests costs."""
    config, method, data, _ = setup
    source = sum(data.counts(config.source, config.limit))
    held_out = round(source * config.holdout)
    trained = source - held_out
    epochs, updates = config.length(trained)
    images = updates * config.batch_size if config.updates is not None else epochs * trained
    sizes = {"holdout": held_out, "train": trained}

    def forward(tests: Sequence[Test]) -> int:
        images = 0
        for statistics, group in groupby(sorted(tests, key=statistics_of), key=statistics_of):
            for number, test in enumerate(group):
                size = sizes.get(test.images) or sum(data.counts(test.domain, config.limit))
                images += size
                if number == 0 and statistics[1] != "trained":  # BatchNorm is measured first
                    images += trained if statistics[1] == "source" else size
        return images

    between = sum(config.tests_after(epoch, epochs) for epoch in range(1, epochs))
    tested = forward(tests) + (between and between * forward(between_epochs(tests, config)))
    scale = (config.image_size / PIXELS) ** 2
    return Work(images * method.cost(config) * scale, tested * scale)


# --- rates ------------------------------------------------------------------------------------


class Rate(BaseModel):
    """Measured seconds, by what they depend on most."""

    model_config = ConfigDict(extra="forbid")

    device: str  # name of the processor or GPU
    share: float  # threads of a worker, or the part of a GPU that it has
    model: str
    amp: str
    pixels: int
    training: float  # seconds per pass, of Work
    testing: float
    start: float  # seconds of a run that are neither training nor tests
    runs: int  # that it was measured on

    def key(self) -> tuple:
        return self.device, self.share, self.model, self.amp, self.pixels


FILE = TypeAdapter(list[Rate])


def read_rates(path: Path) -> list[Rate]:
    """The rates in a file; none where it is missing or cannot be read."""
    try:
        return FILE.validate_python(files.read_json(path))
    except (RecordError, ValidationError):
        return []


class Clock:
    """Estimates seconds, and learns from every training that was made.

    Args:
        path: of the file with rates.
        device: "cpu" or "cuda".
        name: of the processor or GPU.
        share: threads of a worker, or the part of a GPU that it has.
        size: trainings at a time.
    """

    def __init__(self, path: Path, device: str, name: str, share: float, size: int) -> None:
        self.path, self.device, self.name, self.share = path, device, name, share
        self.size = max(1, size)
        self.rates = read_rates(path)
        self.works: dict[str, Work] = {}  # by training

    def work(self, job: Job) -> Work:
        if job.name not in self.works:
            self.works[job.name] = work_of(job.setup, job.tests)
        return self.works[job.name]

    def rate(self, config: Config) -> Rate | None:
        """The measured rate that is nearest to a configuration, scaled to it."""
        same = [
            rate
            for rate in self.rates
            if (rate.device, rate.model, rate.amp) == (self.name, config.model, config.amp)
        ]
        if not same:
            return None
        nearest = min(
            same,
            key=lambda r: (
                abs(math.log(r.pixels / config.image_size)),
                abs(math.log(r.share / self.share)),
            ),
        )
        scale = nearest.share / self.share
        return nearest.model_copy(
            update={"training": nearest.training * scale, "testing": nearest.testing * scale}
        )

    def seconds(self, job: Job) -> float:
        """Of one training with its tests."""
        config, work = job.setup.config, self.work(job)
        rate = self.rate(config)
        if rate is None:
            kind = f"cpu {config.amp}" if f"{self.device} {config.amp}" in GUESS else self.device
            second = GUESS[kind] / self.share
            return GUESS_START + work.training * second + work.testing * second * FORWARD
        return rate.start + work.training * rate.training + work.testing * rate.testing

    def left(self, jobs: Iterable[Job], *, imports: bool = False) -> float:
        """Of all these, as many at a time as there is room for.

        Args:
            imports: whether the workers have yet to start.
        """
        seconds = [self.seconds(job) for job in jobs]
        if not seconds:
            return 0.0
        return max(sum(seconds) / self.size, max(seconds)) + (IMPORTS if imports else 0.0)

    def basis(self, jobs: Iterable[Job]) -> str:
        """What the estimate rests on, in words."""
        jobs = list(jobs)
        guessed = sum(self.rate(job.setup.config) is None for job in jobs)
        if not jobs or not guessed:
            return f"measured on {self.name}"
        if guessed == len(jobs):
            return f"a guess: nothing was measured on {self.name} yet"
        return f"measured on {self.name}, but guessed for {guessed} trainings"

    def learn(self, folder: Path, job: Job, seconds: float) -> None:
        """Take in a training that was made in one go.

        Args:
            seconds: that it took, with its tests and all else.
        """
        config, work, rows = job.setup.config, self.work(job), read_rows(folder)
        training = sum(row.train_seconds for row in rows)
        whole = sum(row.seconds for row in rows)
        new = Rate(
            device=self.name,
            share=self.share,
            model=config.model,
            amp=config.amp,
            pixels=config.image_size,
            training=training / work.training,
            testing=(whole - training) / max(work.testing, 1e-9),
            start=max(0.0, seconds - whole),
            runs=1,
        )
        rates = {rate.key(): rate for rate in read_rates(self.path)}
        old = rates.get(new.key())
        rates[new.key()] = new if old is None else mean(old, new)
        self.rates = list(rates.values())
        files.write_json(self.path, FILE.dump_python(self.rates))


def mean(old: Rate, new: Rate) -> Rate:
    """The mean of what was measured so far, in which the newest has at least a fixed weight."""
    weight = max(NEWEST, 1 / (old.runs + 1))
    values: dict[str, Any] = {"runs": old.runs + 1}
    for name in ("training", "testing", "start"):
        before = getattr(old, name)
        values[name] = before + weight * (getattr(new, name) - before)
    return old.model_copy(update=values)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h" if minutes < 2880 else f"{minutes / 1440:.1f} days"
