"""A training step with shaping never waits for the device and copies nothing between device and host."""

import collections
import re
from pathlib import Path

import cuda_report
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastshape
from fastshape import BitMask
from fastshape.backends import cuda

ops = torch.ops.fastshape
LAYERS = [1, 4, 19]
# The native kernels that the profiler must see, by mode.
KERNELS = {"none": (), "random": ("shape_kernel",), "target": ("shape_kernel", "ones_kernel")}
CSRC = Path(__file__).parents[2] / "csrc"


def training_step(mode: str, device: str):
    """A training step of a ResNet-18. ``mode`` is "none" (without shaping), "random" or "target" (with a target pass)."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=7).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = torch.randn(2, 4, 3, 64, 64, device=device)
    labels = torch.arange(4, device=device)
    attached = None
    if mode != "none":
        p_zero = 0.7 if mode == "random" else None
        attached = fastshape.attach(model, LAYERS, mode=mode, p_zero=p_zero)

    def step():
        if mode == "target":
            attached.record(targets)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


# ---- the ops of a step; no GPU is needed ----


class OpCounter(TorchDispatchMode):
    """Counts the calls of each op, including those of the backward pass."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op] += 1
        return op(*args, **(kwargs or {}))


def calls_of(mode: str) -> collections.Counter:
    step = training_step(mode, "cpu")
    step()
    with OpCounter() as counter:
        step()
    return counter.calls


def test_attached_shaping_adds_these_ops_to_a_step_and_no_others():
    plain, n = calls_of("none"), len(LAYERS)
    # There is no copy, no `item` and no constant from the host. Each layer has one op forward, in place because its input is the
    # output of a convolution, and one op backward.
    shaping = {ops.shape_.default: n, ops.shape.default: n}
    added = calls_of("random") - plain
    assert added == {torch.ops.aten.randint.low_generator: n} | shaping
    target = calls_of("target")
    assert set(target) - set(plain) == {ops.pack.default, *shaping}
    assert target[ops.pack.default] == n and all(target[op] == k for op, k in shaping.items())
    # The other ops are those of the model in the target pass.
    assert not [op for op in target if "copy" in str(op) or "item" in str(op)]


# ---- the names of kernels; no GPU is needed ----


def test_kernels_that_must_be_seen_exist():
    sources = "".join(path.read_text() for path in (CSRC / "cuda").glob("*.cu"))
    defined = set(re.findall(r"__global__\s+void\s+__launch_bounds__\(.*?\)\s+(\w+)\(", sources))
    assert len(defined) == sources.count("__global__")
    assert {name for names in KERNELS.values() for name in names} <= defined
    if cuda.error() is None:
        # Names of kernels are part of the symbols of the library, so that a profiler can show them.
        compiled = cuda_report.library().read_bytes()
        assert all(name.encode() in compiled for name in defined)


# ---- on a GPU ----


def assert_never_waits(step, kernels=()):
    """torch raises for its own waits. The profiler sees all other waits, and copies."""
    for _ in range(2):  # initializes libraries and fills the allocator's cache
        step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("the step"):
            step()
        torch.cuda.synchronize()  # the profiler sees this wait, so that no event is missing
    events = profile.events()
    names = [e.name for e in events]
    # The names under which torch launches kernels differ between versions, so that only waits and our kernels are looked for.
    for part in ("cudaDeviceSynchronize", *kernels):
        assert any(part in name for name in names), f"the profiler did not see {part}"
    assert not [name for name in names if "Memcpy HtoD" in name or "Memcpy DtoH" in name]
    # The device also has an event of this name, which starts later. The host's event includes the calls of autograd's thread.
    step_event = min((e for e in events if e.name == "the step"), key=lambda e: e.time_range.start)
    start, end = step_event.time_range.start, step_event.time_range.end
    within = [e.name for e in events if start <= e.time_range.start <= end]
    assert not [name for name in within if "Synchronize" in name]


@pytest.fixture
def kernels() -> dict[str, tuple[str, ...]]:
    """The names of the kernels that the profiler must see, by mode."""
    # Asking for a GPU starts the driver, which processes that other tests fork cannot use. So do not ask at import.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    if fastshape.backend_info()["cuda"] != "native":
        return dict.fromkeys(KERNELS, ())
    return KERNELS


@pytest.mark.gpu
def test_shaping_never_waits(kernels):
    model = torch.nn.Conv2d(3, 7, 3, device="cuda")
    images = torch.randn(3, 3, 33, 33, device="cuda")
    recorded = torch.randn(4, 7, 31, 31, device="cuda")

    def step():
        z = fastshape.shape(model(images), p_zero=0.5, inplace=True)
        mask = BitMask.from_tensor(recorded).first(3)  # clears the spare bits of the last byte
        z = z + fastshape.shape(model(images), mask=mask, gradient="clipped")
        z.sum().backward()

    assert_never_waits(step, kernels["target"])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ("none", "random", "target"))
def test_attached_training_never_waits(kernels, mode):
    # If "none" also fails, shaping is not the cause.
    assert_never_waits(training_step(mode, "cuda"), kernels[mode])
