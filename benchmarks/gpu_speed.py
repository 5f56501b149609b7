"""How fast shaping is on a GPU, against what people use today. A part of benchmarks/gpu.py, which runs it:

    python benchmarks/gpu_speed.py RECORDS SECONDS

Appends a line of JSON to the file RECORDS for each thing measured, what matters most first, and begins nothing after SECONDS.
Times are of a cold cache: the contenders take turns, each with inputs that nobody has touched for longer than the L2 holds.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import fastshape
from fastshape import reference
from fastshape.backends import triton

P_ZERO = 0.5
MAP = (64, 112, 112)  # a sample's map after the first convolution of a ResNet, at 224 pixels
ROUNDS = 40
DATASHEET = {"NVIDIA H100 80GB HBM3": 3.35e12}  # bytes a second of its memory


# ---- what is measured ----


@dataclass(frozen=True)
class Case:
    mask: str  # "random" or "target"
    dtype: str
    direction: str  # "forward", "backward", "forward+backward" or "in place"
    mib: int  # x has at least as many MiB


MASKS = ("random", "target")
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = ("forward", "backward", "forward+backward", "in place")
MIB = (64, 256)
# The most wanted first: whatever is cut for want of time is cut from the end.
CASES = [
    Case(mask, dtype, direction, mib)
    for mib in MIB
    for direction in DIRECTIONS
    for mask in MASKS
    for dtype in DTYPES
]


def shape_of(case: Case) -> tuple[int, ...]:
    """(N, 64, 112, 112): the smallest N divisible by 8 with which x has the case's size."""
    sample = math.prod(MAP) * getattr(torch, case.dtype).itemsize
    return (8 * math.ceil(case.mib * 2**20 / (8 * sample)), *MAP)


def moved_bytes(case: Case) -> int:
    """What shaping must move: for each element and direction x or dy read, y or dx written, and a bit of a target's mask."""
    n, item = math.prod(shape_of(case)), getattr(torch, case.dtype).itemsize
    directions = 2 if case.direction == "forward+backward" else 1
    return directions * (2 * item * n + (n // 8 if case.mask == "target" else 0))


@dataclass
class Inputs:
    x: torch.Tensor
    grad: torch.Tensor
    mask: fastshape.BitMask | None  # None: random


def inputs_of(case: Case, device: str) -> Inputs:
    dtype, shape = getattr(torch, case.dtype), shape_of(case)
    x, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    target = case.mask == "target"
    return Inputs(x, grad, fastshape.BitMask.from_tensor(torch.randn_like(x)) if target else None)


def sets_to_rotate(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs it takes so that, when one's turn comes again, twice the cache has been read of the others."""
    return 1 + max(1, math.ceil(2 * cache_bytes / set_bytes))


# ---- contenders ----

# Each is `prepare(direction, inputs)`, which does what is not to be timed and returns the call that is.
Prepare = Callable[[str, Inputs], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    prepare: Prepare
    masks: tuple[str, ...] = MASKS
    directions: tuple[str, ...] = DIRECTIONS
    sizes: tuple[int, ...] = MIB
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here, or None

    def serves(self, case: Case) -> bool:
        return (
            case.mask in self.masks and case.direction in self.directions and case.mib in self.sizes
        )


def by_autograd(shaping: Callable) -> Prepare:
    """A contender from `shaping(x, mask)`, or `shaping(x, mask, inplace=True)`, that torch can differentiate."""

    def prepare(direction, inputs):
        x, grad, mask = inputs.x, inputs.grad, inputs.mask
        if direction == "forward":
            return lambda: shaping(x, mask)
        if direction == "in place":
            x.copy_(grad)  # the last call left zeros and ones
            return lambda: shaping(x, mask, inplace=True)
        leaf = x.detach().requires_grad_()
        if direction == "forward+backward":
            return lambda: torch.autograd.grad(shaping(leaf, mask), leaf, grad)
        y = shaping(leaf, mask)
        return lambda: torch.autograd.grad(y, leaf, grad)

    return prepare


def fastshape_shape(x, mask, inplace=False):
    p_zero = P_ZERO if mask is None else None
    return fastshape.shape(x, p_zero=p_zero, mask=mask, inplace=inplace)


def eager_reference(x, mask, shaping=reference.differentiable_shape):
    if mask is None:
        return shaping(x, fastshape.rng_state(device=x.device), None, P_ZERO)
    return shaping(x, None, mask.bits, 0.0)


@functools.cache
def _compiled():
    return torch.compile(reference.differentiable_shape, fullgraph=True, dynamic=False)


def compiled_reference(x, mask):
    return eager_reference(x, mask, _compiled())


def dropout(x, mask, inplace=False):
    return F.dropout(x, P_ZERO, inplace=inplace)


def triton_ops(direction, inputs):
    """The Triton kernels without autograd around them, whatever backend was chosen."""
    x, grad = inputs.x, inputs.grad
    bits = None if inputs.mask is None else inputs.mask.bits

    def state():
        return None if bits is not None else fastshape.rng_state(device=x.device)

    def forward_and_backward():
        drawn = state()
        y = triton.shape(x, drawn, bits, P_ZERO, True)
        return y, triton.shape(grad, drawn, bits, P_ZERO, False)

    if direction == "forward":
        return lambda: triton.shape(x, state(), bits, P_ZERO, True)
    if direction == "in place":
        x.copy_(grad)
        return lambda: triton.shape_(x, state(), bits, P_ZERO, True)
    if direction == "forward+backward":
        return forward_and_backward
    drawn = state()
    return lambda: triton.shape(grad, drawn, bits, P_ZERO, False)


def copies(direction, inputs):
    """No shaping at all: fresh copies of what is read."""
    x, grad = inputs.x, inputs.grad
    if direction == "forward+backward":
        return lambda: (x.clone(), grad.clone())
    return lambda: (grad if direction == "backward" else x).clone()


OUT_OF_PLACE = DIRECTIONS[:3]
CONTENDERS = {
    "fastshape": Contender(by_autograd(fastshape_shape)),
    "copy": Contender(copies),
    "Triton kernels": Contender(triton_ops, missing=triton.error),
    "F.dropout": Contender(by_autograd(dropout), masks=("random",)),
    # Where there is a goal for it, and at one size: each case is seconds of compiling.
    "reference, torch.compile": Contender(
        by_autograd(compiled_reference),
        directions=("forward", "forward+backward"),
        sizes=MIB[:1],
        missing=triton.error,
    ),
    "reference, eager": Contender(by_autograd(eager_reference), directions=OUT_OF_PLACE),
}


# ---- time ----


class CudaClock:
    """Time as the GPU sees it.

    Args:
        cache_bytes: of the L2.
    """

    def __init__(self, cache_bytes: int):
        self._scratch = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda")
        # How long a cycle of the waiting kernel takes is the GPU's own affair.
        torch.cuda._sleep(1000)
        start, cycles = self.mark(), 20_000_000
        torch.cuda._sleep(cycles)
        self._cycles_per_ms = cycles / self.milliseconds(start, self.mark())

    def mark(self) -> torch.cuda.Event:
        """A place in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def delay(self, milliseconds: float) -> None:
        """Have the GPU fill its cache with something else, and then wait before it does what is enqueued next."""
        self._scratch.fill_(1)
        torch.cuda._sleep(int(milliseconds * self._cycles_per_ms))

    def passed(self, mark) -> bool:
        """Whether the GPU has come to a place."""
        return mark.query()

    def milliseconds(self, start, end) -> float:
        end.synchronize()
        return start.elapsed_time(end)


def time_in_turn(
    prepared: Mapping[str, Callable[[], Callable[[], object]]], clock, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round.

    In a round each contender has one turn. The GPU waits until the host has enqueued the whole round, so that no turn
    holds time in which it waited for the host; a round where it woke too early is thrown away, and the next waits longer.

    Args:
        prepared: by name, what to call before each turn; it returns the call to time.

    Raises:
        RuntimeError: the host is too slow to ever be done in time.
    """
    times = {name: [] for name in prepared}
    wait = 2.0
    kept = []  # what a turn returned lives until the next round: memory just freed would still be in the cache
    while len(next(iter(times.values()))) < rounds:
        calls = {name: prepare() for name, prepare in prepared.items()}
        clock.delay(wait)
        awake, marks, results = clock.mark(), {}, []
        for name, call in calls.items():
            start = clock.mark()
            results.append(call())
            marks[name] = (start, clock.mark())
        late = clock.passed(awake)
        spent = {name: clock.milliseconds(*ends) for name, ends in marks.items()}
        kept = results
        if late:
            wait *= 2
            if wait > 500:
                raise RuntimeError("the host did not enqueue a round in half a second")
            continue
        for name, milliseconds in spent.items():
            times[name].append(milliseconds)
    del kept
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the values below which 20 and 80 percent lie."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}


def speed_rows(case: Case, times: Mapping[str, list[float]], datasheet: float | None) -> list[dict]:
    """One row a contender: times in ms, GB/s by the byte model (1 GB = 1e9 bytes), and how often fastshape is faster."""
    model = moved_bytes(case)
    # The copy moves what the shaping of a random map does; its rate is the memory's own.
    n, item = math.prod(shape_of(case)), getattr(torch, case.dtype).itemsize
    copied = 2 * item * n * (2 if case.direction == "forward+backward" else 1)
    copy_rate = copied / statistics.median(times["copy"]) * 1e3 if "copy" in times else None
    rows = []
    for name, values in times.items():
        rate = (copied if name == "copy" else model) / statistics.median(values) * 1e3
        rows.append(
            {
                "kind": "speed",
                **asdict(case),
                "shape": shape_of(case),
                "contender": name,
                "ms": spread(values),
                "bytes": copied if name == "copy" else model,
                "GB_per_s": rate / 1e9,
                "share_of_datasheet": rate / datasheet if datasheet else None,
                "share_of_copy": rate / copy_rate if copy_rate else None,
                "fastshape_is_faster": statistics.median(
                    theirs / ours for theirs, ours in zip(values, times["fastshape"], strict=True)
                ),
                "rounds": len(values),
            }
        )
    return rows


def run_case(case: Case, clock, device: str, cache_bytes: int, datasheet=None, rounds=ROUNDS):
    """Yields speed rows, and an error for each contender that failed."""
    torch._dynamo.reset()  # each case compiles its own code, and the number of variants is limited
    first = inputs_of(case, device)
    set_bytes = 2 * first.x.numel() * first.x.element_size()
    more = sets_to_rotate(set_bytes, cache_bytes) - 1
    turns = itertools.cycle([first, *(inputs_of(case, device) for _ in range(more))])
    prepared = {}
    for name, contender in CONTENDERS.items():
        if not contender.serves(case):
            continue
        prepare = _bound(contender.prepare, case.direction, turns)
        try:
            if problem := contender.missing():
                raise RuntimeError(problem)
            for _ in range(3):  # compiles, and has the allocator find its memory
                prepare()()
        except Exception as error:  # a contender that fails must not end the others
            yield {"kind": "error", "what": f"{name}, {case}", "error": _short(error)}
            continue
        prepared[name] = prepare
    if "fastshape" not in prepared:
        return
    yield from speed_rows(case, time_in_turn(prepared, clock, rounds), datasheet)


def _bound(prepare: Prepare, direction: str, turns: Iterable[Inputs]):
    return lambda: prepare(direction, next(turns))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


# ---- memory, and small tensors ----

SMALL = (8, 64, 7, 7)


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass of a call, each stretch of memory once."""
    seen = {}

    def keep(t):
        seen[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(seen.values())


def saved_rows(device: str):
    """What each contender keeps for the backward pass of a map of n elements."""
    x = torch.randn(32, *MAP, device=device, requires_grad=True)
    mask = fastshape.BitMask.from_tensor(x)
    for kind, given in (("random", None), ("target", mask)):
        for name, shaping in (
            ("fastshape", fastshape_shape),
            ("F.dropout", dropout),
            ("reference, eager", eager_reference),
        ):
            if name == "F.dropout" and kind == "target":
                continue
            kept = saved_bytes(lambda shaping=shaping, given=given: shaping(x, given))
            yield {
                "kind": "saved", "mask": kind, "contender": name, "n": x.numel(), "bytes": kept,
                "of_mask": kept / mask.bits.numel(),
            }  # fmt: skip


def small_calls(device: str, backward: bool = False) -> dict[str, Callable[[], object]]:
    """Calls on a tensor so small that only the launch costs: the forward pass in training, or both passes."""
    x = torch.randn(SMALL, device=device, requires_grad=True)
    mask = fastshape.BitMask.from_tensor(x)
    state, grad = fastshape.rng_state(1, device=device), torch.ones_like(x)
    forward = {
        "fastshape, random": lambda: fastshape.shape(x, p_zero=P_ZERO),
        "fastshape, random, state given": lambda: fastshape.shape(
            x, p_zero=P_ZERO, rng_state=state
        ),
        "fastshape, target": lambda: fastshape.shape(x, mask=mask),
        "F.dropout": lambda: F.dropout(x, P_ZERO),
    }
    if not backward:
        return forward
    return {
        name: lambda call=call: torch.autograd.grad(call(), x, grad)
        for name, call in forward.items()
    }


def host_times(calls: Mapping[str, Callable[[], object]], wait, calls_each=200, rounds=25):
    """Microseconds of the host for each call: many in a row, the device waited for before and not within."""
    times = {name: [] for name in calls}
    for measured in range(-3, rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls_each):
                call()
            spent = time.perf_counter() - start
            if measured >= 0:
                times[name].append(1e6 * spent / calls_each)
    wait()
    return times


def graph_times(calls: Mapping[str, Callable[[], object]], clock, calls_each=200, rounds=25):
    """Microseconds of the GPU for each call, as one of many in a captured graph that is replayed."""
    graphs = {}
    for name, call in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls_each):
                call()
    times = {name: [] for name in calls}
    for measured in range(-3, rounds):
        for name, graph in graphs.items():
            start = clock.mark()
            graph.replay()
            spent = clock.milliseconds(start, clock.mark())
            if measured >= 0:
                times[name].append(1e3 * spent / calls_each)
    return times


def overhead_rows(where: str, times: Mapping[str, list[float]]) -> list[dict]:
    """One row a contender: microseconds a call, and how many times F.dropout's."""
    dropouts = times["F.dropout"]
    return [
        {
            "kind": "overhead",
            "where": where,
            "contender": name,
            "us": spread(values),
            "of_dropout": statistics.median(
                ours / theirs for ours, theirs in zip(values, dropouts, strict=True)
            ),
        }
        for name, values in times.items()
    ]


# ---- goals ----

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "==": operator.eq}


def wanted() -> list[tuple[str, dict, list[tuple[str, str, float]]]]:
    """The figures to reach: what, the fields of the record that answers it, and what is asked of it, any of which does."""
    table = []
    for case in CASES:
        if case.direction == "in place":  # measured, but nothing was promised of it
            continue
        what = f"{case.direction}, {case.mask}, {case.dtype}, {case.mib} MiB"
        record = {"kind": "speed", **asdict(case)}
        rate = [("share_of_datasheet", ">=", 0.85), ("share_of_copy", ">=", 0.92)]
        table.append((f"{what}: memory speed", record | {"contender": "fastshape"}, rate))
        level = ">=" if case.direction == "forward" else ">"
        for name, sign, times in (
            ("reference, eager", ">=", 3),
            ("reference, torch.compile", level, 1),
            ("F.dropout", ">", 1),
        ):
            # A backward pass alone is compared with the memory alone.
            if CONTENDERS[name].serves(case) and case.direction != "backward":
                faster = [("fastshape_is_faster", sign, times)]
                table.append((f"{what}: against {name}", record | {"contender": name}, faster))
    record = {"kind": "saved", "contender": "fastshape"}
    for mask, kept in (("random", ("bytes", "==", 16)), ("target", ("of_mask", "==", 1))):
        table.append((f"saved for backward, {mask}", record | {"mask": mask}, [kept]))
    # In a graph they are to be equal: as equal as two runs of one thing come out.
    for where, most in (("eager", 1.5), ("eager, with backward", 1.5), ("graph", 1.05)):
        for name in ("fastshape, random", "fastshape, target"):
            record = {"kind": "overhead", "where": where, "contender": name}
            table.append((f"launch, {where}: {name}", record, [("of_dropout", "<=", most)]))
    return table


def goals(records: list[dict]) -> list[dict]:
    """The figures to reach, and what was measured.

    Returns:
        list of ``{what, goal, measured, reached}``; the last two are None where nothing was measured.
    """
    found = []
    for what, fields, asked in wanted():
        match = (r for r in records if all(r.get(key) == value for key, value in fields.items()))
        row = next(match, None)
        measured = row and {name: row[name] for name, _, _ in asked}
        reached = row and any(
            row[name] is not None and _COMPARE[sign](row[name], bound)
            for name, sign, bound in asked
        )
        goal = " or ".join(f"{name} {sign} {bound}" for name, sign, bound in asked)
        found.append({"what": what, "goal": goal, "measured": measured, "reached": reached})
    return found


# ---- all of it ----


def measure_all(seconds: float):
    """Yields records until everything is measured or the time is up; then says what was left out."""
    start = time.perf_counter()
    cache_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    clock = CudaClock(cache_bytes)
    datasheet = DATASHEET.get(torch.cuda.get_device_name())

    def small():
        calls, both = small_calls("cuda"), small_calls("cuda", backward=True)
        yield from overhead_rows("eager", host_times(calls, torch.cuda.synchronize))
        yield from overhead_rows("eager, with backward", host_times(both, torch.cuda.synchronize))
        yield from overhead_rows("graph", graph_times(calls, clock))

    tasks = {
        "saved for backward": lambda: saved_rows("cuda"),
        "launch overhead": small,
        **{
            str(case): lambda case=case: run_case(case, clock, "cuda", cache_bytes, datasheet)
            for case in CASES
        },
    }
    left_out = []
    for name, task in tasks.items():
        if time.perf_counter() - start > seconds:
            left_out.append(name)
            continue
        try:
            yield from task()
        except Exception as error:  # what comes after may still be measured
            yield {"kind": "error", "what": name, "error": _short(error)}
        torch.cuda.empty_cache()
    if left_out:
        yield {"kind": "left out", "why": f"{seconds:.0f} s were over", "what": left_out}


def main() -> None:
    path, seconds = sys.argv[1], float(sys.argv[2])
    with open(path, "a", buffering=1) as file:
        for record in measure_all(seconds):
            print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
