"""Runs of a second or two, and what must be equal in two of them."""

import torch
from domainshift import files
from domainshift.progress import Screen
from domainshift.records.schema import CHECKPOINT, METRICS
from domainshift.setup import set_up
from domainshift.training import checkpoint
from domainshift.training.run import execute
from rich.console import Console

TINY = {
    "data": "toy",
    "limit": 3,
    "image_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "device": "cpu",
    "model": "resnet18-slim",
    "weights": "none",
    "amp": "off",
    "lr": 0.02,
}
TOTAL = 21  # images of each domain
OF_THE_RUN = {
    "seconds",
    "train_seconds",
    "run",
    "versions",
}  # what two equal trainings need not share

# Shaping that draws in every pass, tests too, is the hardest to resume; recorded maps come next.
SHAPED = {
    "random": {"mode": "random", "layers": [1, 4], "p_zero": 0.3, "at_eval": "on"},
    "da": {
        **{"mode": "da", "layers": [4], "record_mode": "train"},
        **{"amp": "bfloat16", "memory_format": "channels_last"},
    },
}


def quiet():
    return Screen(Console(quiet=True))


def setup_of(**switches):
    return set_up(TINY | switches)


def run(folder, *, resume=False, tests=None, screen=None, **switches):
    """One run in a folder, with the tests of its switches if no others are given."""
    setup = setup_of(**switches)
    tests = setup.config.tests() if tests is None else tests
    execute(setup, tests=tests, folder=folder, resume=resume, screen=screen or quiet())
    return folder


def words_of(switches):
    """Switches as they are typed: {"p_zero": [0.1, 0.2]} -> ["--p-zero", "0.1", "0.2"]."""
    words = []
    for name, value in switches.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def rows_of(folder):
    return files.read_json_lines(folder / METRICS)


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in OF_THE_RUN} for row in rows]


def weights_of(folder):
    return checkpoint.read(folder / CHECKPOINT)["model"]


def state_of(folder):
    """All tensors that training moves: weights, momenta and the random stream."""
    state = checkpoint.read(folder / CHECKPOINT)
    momenta = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    return [*state["model"].values(), *momenta, state["cpu_rng"]]


def same_tensors(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_training(folder, expected):
    assert untimed(rows_of(folder)) == untimed(rows_of(expected))
    assert same_tensors(state_of(folder), state_of(expected))
