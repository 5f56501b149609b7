"""Instructions that one call costs on a map so small that nothing else does: counted by callgrind, which needs valgrind.

python benchmarks/instructions.py --save .benchmarks/instructions.csv      # minutes: torch starts slowly in valgrind

The counts depend on the versions of Python, torch and the compiler, and hardly on the machine or on what else it does.
Valgrind has no AVX-512: what is counted there are the AVX2 kernels, of which a map this small sees next to nothing.
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
CALLS = 20  # of each case are counted
NOTHING = "nothing"  # what counting itself costs, taken off the others


def cases() -> dict[str, Callable[[], object]]:
    """What is counted: forward, and forward + backward with a gradient for the map and for all parameters."""
    x, grad = torch.randn(SIZE), torch.randn(SIZE)
    weight = torch.zeros((), requires_grad=True)

    def trained(block, parameters=()):
        def call():
            y = block(ConvolutionOutput.apply(weight, x.detach_()))
            torch.autograd.grad(y, [weight, *parameters], grad)

        return call

    def trained_module(block):
        return trained(block, tuple(block.parameters()))

    shaped = fastshape.ShapedBatchNorm2d(SIZE[1], p_zero=P_ZERO, relu=True, inplace=True)
    return {
        NOTHING: lambda: None,
        "F.dropout": lambda: contenders.dropout(x),
        "fastshape.shape": lambda: contenders.fastshape_shape(x),
        "no op, forward + backward": trained(lambda z: z),
        "F.dropout, forward + backward": trained(contenders.dropout),
        "fastshape.shape, forward + backward": trained(contenders.fastshape_shape),
        "BatchNorm + ReLU, forward + backward": trained_module(BatchNormReLU(SIZE[1])),
        "ShapedBatchNorm2d, forward + backward": trained_module(shaped),
    }


def turns(warm_up: int) -> Iterator[Callable[[], object]]:
    """What the counted statement calls: nothing while it warms up, then every case CALLS times, each warm by now."""
    made = cases()
    for _ in range(3):
        for call in made.values():
            call()
    return chain(repeat(made[NOTHING], warm_up), *(repeat(call, CALLS) for call in made.values()))


def counted() -> dict[str, int]:
    """Instructions of one call of each case, all in one process."""
    folder = str(Path(__file__).parent)
    # Timer warms up by as many calls as it counts, at most 10, and starts the first `python` that it finds.
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
        parser.error("there is no valgrind here")
    rows = [{"call": name, "instructions": str(count)} for name, count in counted().items()]
    about = table.facts(platform.machine(), time.strftime("%Y-%m-%d"))
    table.show(rows, about)
    if arguments.save:
        table.save(arguments.save, rows, about)


if __name__ == "__main__":
    main()
