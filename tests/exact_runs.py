"""Runs of run.py in float64, in one process or in several that torchrun started.

    python exact_runs.py RUNS.json      [[words after run.py, stop after the first epoch?], ...]

In float32 a rounding error may carry a value over the 0 at which it is binarized, and runs part. In
float64 what differs between one process and several stays near 1e-16, so that a test can ask for
equality and mean it.
"""

import json
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import distributed
import methods
import run
import train


class Stop(Exception):
    """Stands for a kill between two epochs."""


def wide_model(*arguments):
    model, weights = run_build_model(*arguments)
    model.conv1.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model.double(), weights


def wide_head(*arguments):
    return head(*arguments).double()


def stop(*_):
    raise Stop


run_build_model, head = run.build_model, methods.DomainHead


def exact_run(words, stopped=False) -> int:
    """Exit status of a run in float64, without pictures; it may stop when its first epoch is saved."""
    with (
        mock.patch.object(run, "build_model", wide_model),
        mock.patch.object(methods, "DomainHead", wide_head),
        mock.patch.object(run.pictures, "curves"),
        mock.patch.object(run.pictures, "maps"),
        mock.patch.object(train, "epoch_line", stop if stopped else train.epoch_line),
    ):
        try:
            return run.main(words)
        except Stop:
            return 0


if __name__ == "__main__":
    distributed.join()
    for words, stopped in json.loads(Path(sys.argv[1]).read_text()):
        assert exact_run(words, stopped) == 0
    distributed.leave()
