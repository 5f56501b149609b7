"""Profiles time and memory of a training step: unshaped, and shaped in each way, side by side.

python benchmarks/profile_step.py --save .benchmarks/profile.csv --trace replace-1-4 .benchmarks/trace.json

Each round times one step of every way without the profiler and then profiles one. Times are self times; on a GPU they are
those of the kernels. An op belongs to the group of its outermost range that has a group: the ops that a convolution calls are
counted as convolution.
"""

import argparse
import platform
import statistics
import time
from collections import Counter
from pathlib import Path

import contenders
import cpuinfo
import table
import torch
from test_step_speed import BATCH, LAYERS, SIDE, Step, attached, hooked, network, target_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

FEW, ALL = LAYERS["conv 1 and 4"], LAYERS["all 17"]
WAYS = {
    "unshaped": lambda **size: Step(network(), **size),
    "replace-1-4": lambda **size: Step(attached(FEW, "replace"), **size),
    "hooks-1-4": lambda **size: Step(attached(FEW, "hooks"), **size),
    "replace-17": lambda **size: Step(attached(ALL, "replace"), **size),
    "target-4": target_step,  # target pass and training, by replacement
    "reference-1-4": lambda **size: Step(hooked(contenders.eager_reference, FEW), **size),
}
STEP, RECORDING = "training step", "recording pass"
OTHER, BETWEEN = "other ops", "between ops"
# group: parts of the names of its ops and ranges
GROUPS = {
    RECORDING: (RECORDING,),
    "optimizer": ("Optimizer.",),
    "shaping": ("fastshape::", "_ShapedBatchNorm", "_StraightThrough", "_Differentiable"),
    "convolution": ("aten::conv", "ConvolutionBackward"),
    "BatchNorm": ("aten::batch_norm", "BatchNormBackward"),
    "ReLU": ("aten::relu", "ReluBackward"),
    BETWEEN: (STEP,),
}
MEASURES = [(group, unit) for group in (*GROUPS, OTHER) for unit in ("ms", "calls")]
MEASURES.remove((BETWEEN, "calls"))
MEASURES += [("allocations", "calls"), ("allocations", "MB"), (STEP, "ms")]


def is_op(name: str) -> bool:
    return "::" in name and "autograd::" not in name


def profile_once(step, device: str) -> tuple[Counter, Counter, profile]:
    """Profile one step.

    Returns:
        Its measures except the time of the whole step; the number of calls of each op, including nested ones; the profile.
    """
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        with record_function(STEP):
            step()
        synchronize(device)
    measures, ops = Counter(), Counter()

    def visit(event, group, within_op):
        name = event.name
        if group in (None, BETWEEN, OTHER):
            groups = (g for g, words in GROUPS.items() if any(word in name for word in words))
            group = next(groups, OTHER)
        if not cuda:
            measures[group, "ms"] += event.self_cpu_time_total / 1e3
        elif not event.is_user_annotation:  # a named range has no kernels of its own
            measures[group, "ms"] += event.self_device_time_total / 1e3
        if is_op(name):
            ops[name] += 1
            measures[group, "calls"] += not within_op
        for child in event.cpu_children:
            visit(child, group, within_op or is_op(name))

    for event in profiler.events():
        if event.device_type == DeviceType.CPU and event.cpu_parent is None:
            visit(event, None, False)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == kind and event.nbytes() > 0:
            measures["allocations", "calls"] += 1
            measures["allocations", "MB"] += event.nbytes() / 1e6
    return measures, ops, profiler


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(step, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def with_named_recording(step: Step) -> Step:
    if step.record is not None:
        step.record = record_function(RECORDING)(step.record)
    return step


def profile_ways(
    batch: int, side: int, steps: int, device: str
) -> tuple[list[dict], dict[str, Counter]]:
    """Profile all ways in turn, `steps` times after one round to warm up.

    Returns:
        One row per measure, with its name, its unit and the median for each way; and the calls of each op, by way.
    """
    with torch.device(device):
        trainings = {
            way: with_named_recording(make(batch=batch, side=side)) for way, make in WAYS.items()
        }
    runs, ops = {way: [] for way in trainings}, {}
    for _ in range(1 + steps):
        for way, step in trainings.items():
            whole = seconds(step, device)
            measures, ops[way], _ = profile_once(step, device)
            measures[STEP, "ms"] = 1e3 * whole
            runs[way].append(measures)
    rows = []
    for name, unit in MEASURES:
        values = {way: statistics.median(m[name, unit] for m in runs[way][1:]) for way in trainings}
        digits = 0 if unit == "calls" else 1
        rows.append(
            {"what": name, "unit": unit} | {w: f"{v:.{digits}f}" for w, v in values.items()}
        )
    return rows, ops


def differences(ops: Counter, unshaped: Counter) -> str:
    """The ops with another number of calls than in the unshaped step, and the differences."""
    difference = Counter(ops)
    difference.subtract(unshaped)
    return ", ".join(f"{n:+d} {name}" for name, n in sorted(difference.items()) if n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=BATCH, help="images (default: %(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of each way (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="CSV to write")
    parser.add_argument(
        "--trace",
        nargs=2,
        metavar=("WAY", "FILE"),
        help=f"Chrome trace of one of {', '.join(WAYS)}",
    )
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.trace and arguments.trace[0] not in WAYS:
        parser.error(f"--trace: {arguments.trace[0]!r} is not allowed; allowed: {', '.join(WAYS)}")
    if arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} must be at least 1")
    size = {"batch": arguments.batch, "side": arguments.side}
    rows, ops = profile_ways(**size, steps=arguments.steps, device=device)
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name()
    else:
        processor = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    about = table.facts(processor, time.strftime("%Y-%m-%d"), torch.device(device).type)
    about |= size | {"steps": arguments.steps}
    table.show(rows, about)
    for way in list(WAYS)[1:]:
        print(f"\n{way}, ops beyond the unshaped step: {differences(ops[way], ops['unshaped'])}")
    if arguments.save:
        table.save(arguments.save, rows, about)
    if arguments.trace:
        way, path = arguments.trace
        with torch.device(device):
            step = with_named_recording(WAYS[way](**size))
        step()
        profile_once(step, device)[-1].export_chrome_trace(path)


if __name__ == "__main__":
    main()
