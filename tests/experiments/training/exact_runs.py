"""Runs in float64 on a network without BatchNorm, in one process or in several that torchrun started.

    python exact_runs.py RUNS.json      [[words after run.py, stop after the first epoch?], ...]

In float32 a rounding error can carry a value over the 0 at which it is binarized, and then two runs
part. In float64 the difference between one process and several stays near 1e-16. On CPUs BatchNorm
would normalize by the part of each process, so GroupNorm takes its place.
"""

import json
import sys
from pathlib import Path
from unittest import mock

from domainshift import command, distributed
from domainshift.training import evaluation, loop, run
from torch import nn


class Stop(Exception):
    """Stands for a kill between two epochs."""


build_model = run.build_model


def wide_model(*arguments):
    model, weights = build_model(*arguments)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.GroupNorm(4, module.num_features))
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model.double(), weights


def stop(*_):
    raise Stop


def exact_run(words, stopped=False):
    """Exit status of a run without pictures; with `stopped` it ends when its first epoch is saved.

    Tests take batches of 10, so that the last image of 21 is alone.
    """
    with (
        mock.patch.object(run, "build_model", wide_model),
        mock.patch.object(run, "draw"),
        mock.patch.object(evaluation, "BATCH", 10),
        mock.patch.object(distributed, "join"),
        mock.patch.object(distributed, "leave"),
        mock.patch.object(loop, "epoch_line", stop if stopped else loop.epoch_line),
    ):
        try:
            return command.main(words)
        except Stop:
            return 0


if __name__ == "__main__":
    distributed.join()
    for words, stopped in json.loads(Path(sys.argv[1]).read_text()):
        assert exact_run(words, stopped) == 0
    distributed.leave()
