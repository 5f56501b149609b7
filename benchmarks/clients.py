"""Networks that shape by hand against the same with fastshape (tests/clients): lines, time of a step, bytes for backward.

    python benchmarks/clients.py [--steps 30]

Both run in one process and in turn; times are medians, as ratios. Lines are those of code without blank lines, comments and
documentation.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
import tokenize
from io import StringIO
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "clients"))
import by_hand
import ported

PARTS = {  # what by_hand has for each client
    "hooks with globals": ("random_hook", "hooks_with_globals"),
    "a module in forward": ("StraightThrough", "ShapingLayer", "module_in_forward"),
    "two passes": ("StraightThrough", "TwoPasses", "two_passes"),
}
IMAGES = 16, 3, 112, 112


def lines(*objects) -> int:
    """Lines that hold code."""
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    rows = set()
    for index, thing in enumerate(objects):
        tokens = list(tokenize.generate_tokens(StringIO(inspect.getsource(thing)).readline))
        for before, token in zip([None, *tokens], tokens, strict=False):
            is_text = token.type == tokenize.STRING and (before is None or before.type in skipped)
            if token.type not in skipped and not is_text:
                rows |= {(index, row) for row in range(token.start[0], token.end[0] + 1)}
    return len(rows)


def stepper(make):
    net, forward, *_ = make()
    x, target = torch.randn(2, *IMAGES)
    labels = torch.randint(0, 5, (IMAGES[0],))

    def step():
        net.zero_grad()
        by_hand.loss(forward(x, target), labels).backward()

    return step


def saved_bytes(step) -> int:
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    flags = parser.parse_args()
    columns = (
        "lines",
        "lines here",
        "time, by hand = 1",
        "replace",
        "bytes, by hand = 1",
        "replace",
    )
    print(f"{'':22}" + "".join(f"{c:>20}" for c in columns))
    for name, make in by_hand.CLIENTS.items():
        steps = [
            stepper(make),
            stepper(ported.CLIENTS[name]),
            stepper(lambda make=ported.CLIENTS[name]: make("replace")),
        ]
        kept = [saved_bytes(step) for step in steps]
        times = [[] for _ in steps]
        for _ in range(flags.steps):
            for step, own in zip(steps, times, strict=True):
                start = time.perf_counter()
                step()
                own.append(time.perf_counter() - start)
        hand, hooks, replace = map(statistics.median, times)
        row = [
            str(lines(*(getattr(by_hand, part) for part in PARTS[name]))),
            str(lines(ported.CLIENTS[name])),
            f"{hooks / hand:.2f}", f"{replace / hand:.2f}",
            f"{kept[1] / kept[0]:.2f}", f"{kept[2] / kept[0]:.2f}",
        ]  # fmt: skip
        print(f"{name:22}" + "".join(f"{value:>20}" for value in row), flush=True)


if __name__ == "__main__":
    main()
