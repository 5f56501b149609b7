"""Counts the instructions of one call on a very small map, where only the overhead of a call matters. It needs valgrind.

python benchmarks/instructions.py --save .benchmarks/instructions.csv      # takes minutes: torch starts slowly in valgrind

The counts depend on the versions of Python, torch and the compiler. They hardly depend on the machine or its load.
Valgrind has no AVX-512, so the AVX2 kernels run; on a map this small they hardly contribute.
"""

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import contenders
import table
import torch
from contenders import P_ZERO, BatchNormReLU
from test_shape_speed import ConvolutionOutput
from torch.utils.benchmark import Timer

import fastshape

SIZE = (1, 8, 2, 2)
CALLS = 20  # counted calls of each case
NOTHING = "nothing"  # the cost of counting itself, which is subtracted from the other cases


def cases() -> dict[str, Callable[[], object]]:
    """The calls to count: forward, and forward + backward with gradients for the map and all parameters."""
    x, grad = torch.randn(SIZE), torch.randn(SIZE)
    weight = torch.zeros((), requires_grad=True)

    def step(block, parameters=()):
        def call():
            y = block(ConvolutionOutput.apply(weight, x.detach_()))
            torch.autograd.grad(y, [weight, *parameters], grad)

        return call

    def module_step(block):
        return step(block, tuple(block.parameters()))

    shaped = fastshape.ShapedBatchNorm2d(SIZE[1], p_zero=P_ZERO, relu=True, inplace=True)
    return {
        NOTHING: lambda: None,
        "F.dropout": lambda: contenders.dropout(x),
        "fastshape.shape": lambda: contenders.fastshape_shape(x),
        "no op, forward + backward": step(lambda z: z),
        "F.dropout, forward + backward": step(contenders.dropout),
        "fastshape.shape, forward + backward": step(contenders.fastshape_shape),
        "BatchNorm + ReLU, forward + backward": module_step(BatchNormReLU(SIZE[1])),
        "ShapedBatchNorm2d, forward + backward": module_step(shaped),
    }


def turns(warm_up: int) -> Iterator[Callable[[], object]]:
    """The calls of the counted statement: nothing during its warm-up, then each case CALLS times. All cases are warm."""
    calls = cases()
    for _ in range(3):
        for call in calls.values():
            call()
    return chain(repeat(calls[NOTHING], warm_up), *(repeat(call, CALLS) for call in calls.values()))


def instruction_counts() -> dict[str, int]:
    """Instructions per call of each case, counted in one process."""
    folder = str(Path(__file__).parent)
    # Timer warms up with as many calls as it counts, at most 10, and starts the first `python` on PATH.
    setup = f"import sys; sys.path.insert(0, {folder!r}); import instructions; turns = instructions.turns({min(CALLS, 10)})"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = list(cases())
    stats = Timer("next(turns)()", setup).collect_callgrind(
        number=CALLS, repeats=len(names), collect_baseline=False
    )
    counts = {name: s.counts() / CALLS for name, s in zip(names, stats, strict=True)}
    nothing = counts.pop(NOTHING)
    return {name: round(count - nothing) for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    rows = [
        {"call": name, "instructions": str(count)} for name, count in instruction_counts().items()
    ]
    about = table.facts(platform.machine(), time.strftime("%Y-%m-%d"))
    table.show(rows, about)
    if arguments.save:
        table.save(arguments.save, rows, about)


if __name__ == "__main__":
    main()
