"""Measures the speed of shaping on a GPU, alone, with BatchNorm and in a training step, against common alternatives.

benchmarks/gpu.py runs it:

    python benchmarks/gpu_speed.py RECORDS SECONDS

It appends a line of JSON to the file RECORDS for each measurement, the most important first, and starts none after SECONDS.
Times are measured with a cold cache: the contenders take turns, each with inputs that are no longer in the L2 cache.
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
from torch import nn

import fastshape
from fastshape import reference
from fastshape.backends import triton

P_ZERO = 0.5
MAP = (64, 112, 112)  # one sample after the first convolution of a ResNet, for 224 pixels
ROUNDS = 40
DATASHEET = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}  # memory: bytes per second


# ---- cases ----


@dataclass(frozen=True)
class Case:
    mask: str  # "random" or "target"
    dtype: str
    direction: str  # "forward", "backward", "forward+backward" or "in place"
    mib: int  # x has at least this size in MiB


MASKS = ("random", "target")
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = ("forward", "backward", "forward+backward", "in place")
MIB = (64, 256)
# The most important cases first, because a lack of time cuts the last ones.
CASES = [
    Case(mask, dtype, direction, mib)
    for mib in MIB
    for direction in DIRECTIONS
    for mask in MASKS
    for dtype in DTYPES
]


def shape_of(case: Case) -> tuple[int, ...]:
    """(N, 64, 112, 112) with the smallest N divisible by 8 for which x has the size of the case."""
    sample = math.prod(MAP) * getattr(torch, case.dtype).itemsize
    return (8 * math.ceil(case.mib * 2**20 / (8 * sample)), *MAP)


def moved_bytes(case: Case) -> int:
    """The bytes that shaping must move: per direction, it reads x or dy, writes y or dx and reads the bits of a target mask."""
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
    """The number of input sets to rotate: between two uses of a set, the others fill the cache twice."""
    return 1 + max(1, math.ceil(2 * cache_bytes / set_bytes))


# ---- contenders ----

# `prepare(direction, inputs)` does the work that is not timed and returns the call to time.
Prepare = Callable[[str, Inputs], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    prepare: Prepare
    masks: tuple[str, ...] = MASKS
    directions: tuple[str, ...] = DIRECTIONS
    sizes: tuple[int, ...] = MIB
    missing: Callable[[], str | None] = lambda: None  # the reason why it cannot run here, or None

    def serves(self, case: Case) -> bool:
        return (
            case.mask in self.masks and case.direction in self.directions and case.mib in self.sizes
        )


def by_autograd(shaping: Callable) -> Prepare:
    """A contender from a differentiable `shaping(x, mask)`, which may also take ``inplace=True``."""

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
    """The Triton kernels without autograd, for any chosen backend."""
    x, grad = inputs.x, inputs.grad
    bits = None if inputs.mask is None else inputs.mask.bits

    def state():
        return None if bits is not None else fastshape.rng_state(device=x.device)

    def forward_and_backward():
        rng_state = state()
        y = triton.shape(x, rng_state, bits, P_ZERO, True)
        return y, triton.shape(grad, rng_state, bits, P_ZERO, False)

    if direction == "forward":
        return lambda: triton.shape(x, state(), bits, P_ZERO, True)
    if direction == "in place":
        x.copy_(grad)
        return lambda: triton.shape_(x, state(), bits, P_ZERO, True)
    if direction == "forward+backward":
        return forward_and_backward
    rng_state = state()
    return lambda: triton.shape(grad, rng_state, bits, P_ZERO, False)


def copies(direction, inputs):
    """No shaping: fresh copies of the inputs."""
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
    # Only the cases that have a goal, and one size: each case takes seconds to compile.
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
    """Measures time on the GPU.

    Args:
        cache_bytes: size of the L2 cache.
    """

    def __init__(self, cache_bytes: int):
        self._scratch = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda")
        # The duration of a cycle of the waiting kernel depends on the GPU.
        torch.cuda._sleep(1000)
        start, cycles = self.mark(), 20_000_000
        torch.cuda._sleep(cycles)
        self._cycles_per_ms = cycles / self.milliseconds(start, self.mark())

    def mark(self) -> torch.cuda.Event:
        """An event at the current position of the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def delay(self, milliseconds: float) -> None:
        """Make the GPU overwrite its cache and then wait before the work that is enqueued next."""
        self._scratch.fill_(1)
        torch.cuda._sleep(int(milliseconds * self._cycles_per_ms))

    def passed(self, mark) -> bool:
        """Whether the GPU has reached a mark."""
        return mark.query()

    def milliseconds(self, start, end) -> float:
        end.synchronize()
        return start.elapsed_time(end)


def time_in_turn(
    contenders: Mapping[str, Callable[[], Callable[[], object]]], clock, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round.

    In a round each contender has one turn. The GPU waits until the host has enqueued the whole round, so that no turn
    includes time in which the GPU waited for the host. If the GPU starts too early, the round is discarded and the next one
    waits longer.

    Args:
        contenders: by name, a function that is called before each turn and returns the call to time.

    Raises:
        RuntimeError: the host cannot enqueue a round within half a second.
    """
    times = {name: [] for name in contenders}
    wait = 2.0
    last_results = []  # results live until the next round, because memory that was just freed is still in the cache
    while len(next(iter(times.values()))) < rounds:
        calls = {name: prepare() for name, prepare in contenders.items()}
        clock.delay(wait)
        awake, marks, results = clock.mark(), {}, []
        for name, call in calls.items():
            start = clock.mark()
            results.append(call())
            marks[name] = (start, clock.mark())
        late = clock.passed(awake)
        durations = {name: clock.milliseconds(*ends) for name, ends in marks.items()}
        last_results = results
        if late:
            wait *= 2
            if wait > 500:
                raise RuntimeError("the host did not enqueue a round in half a second")
            continue
        for name, milliseconds in durations.items():
            times[name].append(milliseconds)
    del last_results
    return times


def spread(values: list[float]) -> dict[str, float]:
    """The median and the 20th and 80th percentiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[1], "p80": cuts[7]}


def speed_rows(case: Case, times: Mapping[str, list[float]], datasheet: float | None) -> list[dict]:
    """One row per contender: times in ms, GB/s by the byte model (1 GB = 1e9 bytes) and the speed-up of fastshape."""
    model = moved_bytes(case)
    # A copy moves as many bytes as shaping with a random mask; its rate is the speed of the memory.
    n, item = math.prod(shape_of(case)), getattr(torch, case.dtype).itemsize
    copy_bytes = 2 * item * n * (2 if case.direction == "forward+backward" else 1)
    copy_rate = copy_bytes / statistics.median(times["copy"]) * 1e3 if "copy" in times else None
    rows = []
    for name, values in times.items():
        rate = (copy_bytes if name == "copy" else model) / statistics.median(values) * 1e3
        rows.append(
            {
                "kind": "speed",
                **asdict(case),
                "shape": shape_of(case),
                "contender": name,
                "ms": spread(values),
                "bytes": copy_bytes if name == "copy" else model,
                "GB_per_s": rate / 1e9,
                "share_of_datasheet": rate / datasheet if datasheet else None,
                "share_of_copy": rate / copy_rate if copy_rate else None,
                "fastshape_is_faster": _times_faster(values, times["fastshape"]),
                "rounds": len(values),
            }
        )
    return rows


def run_case(case: Case, clock, device: str, cache_bytes: int, datasheet=None, rounds=ROUNDS):
    """Yields speed rows, and an error for each contender that fails."""
    torch._dynamo.reset()  # each case compiles its own code, but torch limits the number of variants
    first = inputs_of(case, device)
    set_bytes = 2 * first.x.numel() * first.x.element_size()
    more = sets_to_rotate(set_bytes, cache_bytes) - 1
    turns = itertools.cycle([first, *(inputs_of(case, device) for _ in range(more))])
    contenders = {}
    for name, contender in CONTENDERS.items():
        if not contender.serves(case):
            continue
        prepare = _bound(contender.prepare, case.direction, turns)
        try:
            if problem := contender.missing():
                raise RuntimeError(problem)
            for _ in range(3):  # compiles the code and fills the allocator's cache
                prepare()()
        except Exception as error:  # a contender that fails must not end the others
            yield {"kind": "error", "what": f"{name}, {case}", "error": _short(error)}
            continue
        contenders[name] = prepare
    if "fastshape" not in contenders:
        return
    yield from speed_rows(case, time_in_turn(contenders, clock, rounds), datasheet)


def _bound(prepare: Prepare, direction: str, turns: Iterable[Inputs]):
    return lambda: prepare(direction, next(turns))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


# ---- memory, and small tensors ----

SMALL = (8, 64, 7, 7)


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward pass of a call. A tensor that is saved twice counts once."""
    sizes = {}

    def keep(t):
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(sizes.values())


def saved_rows(device: str):
    """Bytes that each contender saves for the backward pass of a map of n elements."""
    x = torch.randn(32, *MAP, device=device, requires_grad=True)
    mask = fastshape.BitMask.from_tensor(x)
    for kind, mask_argument in (("random", None), ("target", mask)):
        for name, shaping in (
            ("fastshape", fastshape_shape),
            ("F.dropout", dropout),
            ("reference, eager", eager_reference),
        ):
            if name == "F.dropout" and kind == "target":
                continue
            size = saved_bytes(lambda shaping=shaping, argument=mask_argument: shaping(x, argument))
            yield {
                "kind": "saved", "mask": kind, "contender": name, "n": x.numel(), "bytes": size,
                "of_mask": size / mask.bits.numel(),
            }  # fmt: skip


def small_calls(device: str, backward: bool = False) -> dict[str, Callable[[], object]]:
    """Calls on a tensor so small that only the launch takes time: the forward pass in training, or both passes."""
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
    """Microseconds of host time per call, over many calls in a row. The host waits for the device only before them."""
    times = {name: [] for name in calls}
    for index in range(-3, rounds):  # three rounds to warm up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls_each):
                call()
            seconds = time.perf_counter() - start
            if index >= 0:
                times[name].append(1e6 * seconds / calls_each)
    wait()
    return times


def graph_times(calls: Mapping[str, Callable[[], object]], clock, calls_each=200, rounds=25):
    """Microseconds of GPU time per call, over many calls in a captured graph that is replayed."""
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
    for index in range(-3, rounds):  # three rounds to warm up
        for name, graph in graphs.items():
            start = clock.mark()
            graph.replay()
            milliseconds = clock.milliseconds(start, clock.mark())
            if index >= 0:
                times[name].append(1e3 * milliseconds / calls_each)
    return times


def overhead_rows(where: str, times: Mapping[str, list[float]]) -> list[dict]:
    """One row per contender: microseconds per call, and their ratio to F.dropout's."""
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


# ---- shape + BatchNorm2d + ReLU ----


@dataclass(frozen=True)
class BatchNormCase:
    shape: tuple[int, int, int, int]
    dtype: str
    memory_format: str  # "contiguous_format" or "channels_last"

    def fields(self) -> dict:
        """The fields of its records, as JSON keeps them."""
        return asdict(self) | {"shape": list(self.shape)}


# The outputs of convolutions of a ResNet-18 for 224 pixels: the largest map, and two whose planes do not fill a tile.
BATCH_NORM_SHAPES = ((32, 64, 112, 112), (32, 256, 14, 14), (32, 512, 7, 7))
MEMORY_FORMATS = ("contiguous_format", "channels_last")
BATCH_NORM_CASES = [
    BatchNormCase(shape, dtype, memory_format)
    for shape in BATCH_NORM_SHAPES
    for dtype in ("float32", "float16")
    for memory_format in MEMORY_FORMATS
]
BATCH_NORM_DIRECTIONS = ("forward", "backward")


def batch_norm_bytes(case: BatchNormCase, direction: str) -> int:
    """The bytes that shaping with BatchNorm must move for a random mask.

    Forward reads x, writes y, and writes, counts and looks up one bit per element. Backward reads dy and the bits twice, because
    dx needs the sums over all of dy, and writes dx.
    """
    n, item = math.prod(case.shape), getattr(torch, case.dtype).itemsize
    maps, bits = (2, 3) if direction == "forward" else (3, 2)
    return maps * item * n + bits * n // 8


def fused_batch_norm(channels: int) -> nn.Module:
    return fastshape.ShapedBatchNorm2d(channels, p_zero=P_ZERO, relu=True)


def unshaped_batch_norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def compiled_batch_norm(channels: int) -> nn.Module:
    return torch.compile(unshaped_batch_norm(channels), fullgraph=True, dynamic=False)


BATCH_NORM_CONTENDERS = {
    "fastshape": fused_batch_norm,
    "unshaped": unshaped_batch_norm,
    "unshaped, torch.compile": compiled_batch_norm,
}


def batch_norm_inputs(case: BatchNormCase, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x, which requires a gradient, and dL/dy."""
    memory_format = getattr(torch, case.memory_format)
    x, grad = (
        torch.randn(case.shape, device=device, dtype=getattr(torch, case.dtype)).contiguous(
            memory_format=memory_format
        )
        for _ in range(2)
    )
    return x.requires_grad_(), grad


def prepare_batch_norm(direction: str, module: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    """Does the work that is not timed and returns the call to time."""
    if direction == "forward":
        return lambda: module(x)
    y = module(x)
    return lambda: torch.autograd.grad(y, (x, *module.parameters()), grad)


def run_batch_norm_case(case: BatchNormCase, clock, device: str, cache_bytes: int, rounds=ROUNDS):
    """Yields a row per direction and contender, and an error for each contender that fails."""
    torch._dynamo.reset()
    first = batch_norm_inputs(case, device)
    set_bytes = 2 * first[0].numel() * first[0].element_size()
    more = sets_to_rotate(set_bytes, cache_bytes) - 1
    turns = itertools.cycle([first, *(batch_norm_inputs(case, device) for _ in range(more))])
    modules = {}
    for name, make in BATCH_NORM_CONTENDERS.items():
        try:
            module = make(case.shape[1]).to(device)
            for direction in BATCH_NORM_DIRECTIONS * 3:
                prepare_batch_norm(direction, module, *next(turns))()
        except Exception as error:  # a contender that fails must not end the others
            yield {"kind": "error", "what": f"{name}, {case}", "error": _short(error)}
            continue
        modules[name] = module
    if "fastshape" not in modules:
        return
    for direction in BATCH_NORM_DIRECTIONS:
        contenders = {
            name: lambda module=module, direction=direction: prepare_batch_norm(
                direction, module, *next(turns)
            )
            for name, module in modules.items()
        }
        times = time_in_turn(contenders, clock, rounds)
        size = batch_norm_bytes(case, direction)
        for name, values in times.items():
            yield {
                "kind": "batch norm", **case.fields(), "direction": direction, "contender": name, "ms": spread(values),
                "bytes": size if name == "fastshape" else None,
                "GB_per_s": size / statistics.median(values) / 1e6 if name == "fastshape" else None,
                "fastshape_is_faster": _times_faster(values, times["fastshape"]), "rounds": rounds,
            }  # fmt: skip


def _times_faster(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


# ---- a training step ----

STEP_CONTENDERS = ("replace", "hooks", "unshaped", "unshaped, torch.compile")
MAIN_PATH = [n for n in range(1, 21) if n not in (8, 13, 18)]  # without the downsample convolutions


def training_step(contender: str, memory_format: str, device: str, batch: int, side: int):
    """An update of a ResNet-18 under bfloat16 autocast. "replace" and "hooks" shape all 17 layers of its main path."""
    from torchvision.models import resnet18  # torchvision may be missing

    torch.manual_seed(0)
    layout = getattr(torch, memory_format)
    model = resnet18(num_classes=7).to(device, memory_format=layout)
    if contender in ("replace", "hooks"):
        fastshape.attach(model, MAIN_PATH, p_zero=P_ZERO, method=contender)
    forward = torch.compile(model) if contender == "unshaped, torch.compile" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
    labels = torch.randint(7, (batch,), device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def step_rows(
    memory_format: str, clock, device: str, names=STEP_CONTENDERS, batch=32, side=224, rounds=15, warm_up=3,
):  # fmt: skip
    """Yields a row per contender: milliseconds per step, the host's work included, and the speed-up of "replace"."""
    torch._dynamo.reset()
    steps = {}
    for name in names:
        try:
            step = training_step(name, memory_format, device, batch, side)
            for _ in range(warm_up):  # compiles the code and fills the allocator's cache
                step()
        except Exception as error:
            what = f"step, {name}, {memory_format}"
            yield {"kind": "error", "what": what, "error": _short(error)}
            continue
        steps[name] = step
    if "replace" not in steps:
        return
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock.mark()
            step()
            times[name].append(clock.milliseconds(start, clock.mark()))
    for name, values in times.items():
        yield {
            "kind": "step", "memory_format": memory_format, "contender": name, "ms": spread(values),
            "fastshape_is_faster": _times_faster(values, times["replace"]), "rounds": rounds,
        }  # fmt: skip


# ---- goals ----

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "==": operator.eq}


def requirements() -> list[tuple[str, dict, list[tuple[str, str, float]]]]:
    """What each goal is about, the fields of its record, and its conditions, one of which must hold."""
    table = []
    for case in CASES:
        if case.direction == "in place":  # measured, but without a goal
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
            # A backward pass alone is compared only with the speed of the memory.
            if CONTENDERS[name].serves(case) and case.direction != "backward":
                faster = [("fastshape_is_faster", sign, times)]
                table.append((f"{what}: against {name}", record | {"contender": name}, faster))
    # Shaping with BatchNorm makes fewer passes over the map than BatchNorm alone.
    others = [name for name in BATCH_NORM_CONTENDERS if name != "fastshape"]
    for case, way, name in itertools.product(BATCH_NORM_CASES, BATCH_NORM_DIRECTIONS, others):
        what = f"BatchNorm {way}, {case.shape}, {case.dtype}, {case.memory_format}: against {name}"
        record = {"kind": "batch norm", **case.fields(), "direction": way, "contender": name}
        table.append((what, record, [("fastshape_is_faster", ">", 1)]))
    for memory_format in MEMORY_FORMATS:
        record = {"kind": "step", "memory_format": memory_format, "contender": "unshaped"}
        what = f"training step, {memory_format}: against unshaped"
        table.append((what, record, [("fastshape_is_faster", ">", 1)]))
    record = {"kind": "saved", "contender": "fastshape"}
    for mask, size in (("random", ("bytes", "==", 16)), ("target", ("of_mask", "==", 1))):
        table.append((f"saved for backward, {mask}", record | {"mask": mask}, [size]))
    # In a graph the times should be equal, up to the difference between two runs of the same call.
    for where, most in (("eager", 1.5), ("eager, with backward", 1.5), ("graph", 1.05)):
        for name in ("fastshape, random", "fastshape, target"):
            record = {"kind": "overhead", "where": where, "contender": name}
            table.append((f"launch, {where}: {name}", record, [("of_dropout", "<=", most)]))
    return table


def goals(records: list[dict]) -> list[dict]:
    """All goals with the measured values.

    Returns:
        list of ``{what, goal, measured, reached}``; the last two are None without a measurement.
    """
    rows = []
    for what, fields, conditions in requirements():
        match = (r for r in records if all(r.get(key) == value for key, value in fields.items()))
        row = next(match, None)
        measured = row and {name: row[name] for name, _, _ in conditions}
        reached = row and any(
            row[name] is not None and _COMPARE[sign](row[name], bound)
            for name, sign, bound in conditions
        )
        goal = " or ".join(f"{name} {sign} {bound}" for name, sign, bound in conditions)
        rows.append({"what": what, "goal": goal, "measured": measured, "reached": reached})
    return rows


# ---- everything ----


def tasks_in_order(first: dict, shaping: Callable, batch_norm: Callable, step: Callable) -> dict:
    """All tasks by name, the most important first. A lack of time cuts large maps and steps that take long to compile."""

    def shaping_of(mib):
        return {str(case): functools.partial(shaping, case) for case in CASES if case.mib == mib}

    def steps(kind, names):
        return {
            f"training step, {kind}, {memory_format}": functools.partial(step, memory_format, names)
            for memory_format in MEMORY_FORMATS
        }

    return {
        **first,
        **steps("eager", STEP_CONTENDERS[:3]),
        **shaping_of(MIB[0]),
        **{str(case): functools.partial(batch_norm, case) for case in BATCH_NORM_CASES},
        **shaping_of(MIB[1]),
        **steps("compiled", ("replace", "unshaped, torch.compile")),
    }


def measure_all(seconds: float):
    """Yields records until everything is measured or the time is up, then one with what is missing."""
    start = time.perf_counter()
    cache_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    clock = CudaClock(cache_bytes)
    datasheet = DATASHEET.get(torch.cuda.get_device_name())

    def small():
        calls, both = small_calls("cuda"), small_calls("cuda", backward=True)
        yield from overhead_rows("eager", host_times(calls, torch.cuda.synchronize))
        yield from overhead_rows("eager, with backward", host_times(both, torch.cuda.synchronize))
        yield from overhead_rows("graph", graph_times(calls, clock))

    tasks = tasks_in_order(
        first={"saved for backward": lambda: saved_rows("cuda"), "launch overhead": small},
        shaping=lambda case: run_case(case, clock, "cuda", cache_bytes, datasheet),
        batch_norm=lambda case: run_batch_norm_case(case, clock, "cuda", cache_bytes),
        step=lambda memory_format, names: step_rows(memory_format, clock, "cuda", names),
    )
    left_out = []
    for name, task in tasks.items():
        if time.perf_counter() - start > seconds:
            left_out.append(name)
            continue
        try:
            yield from task()
        except Exception as error:  # the next tasks may still succeed
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
