"""A training step with shaping never waits for the device, and copies nothing from or to the host."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastshape
from fastshape import BitMask

ops = torch.ops.fastshape
LAYERS = [1, 4, 19]


def training_step(mode: str, device: str):
    """A step of training a ResNet-18: ``mode`` "none" (not shaped), "random" or "target" (its target pass too)."""
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


# ---- what a step asks for: no GPU is needed to see that ----


class Counted(TorchDispatchMode):
    """Counts the ops that are called, backward passes included."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op] += 1
        return op(*args, **(kwargs or {}))


def calls_of(mode: str) -> collections.Counter:
    step = training_step(mode, "cpu")
    step()
    with Counted() as counted:
        step()
    return counted.calls


def test_attached_shaping_adds_these_ops_to_a_step_and_no_others():
    plain, n = calls_of("none"), len(LAYERS)
    # No copy, no `item`, no constant made on the host. One op a layer forward, in place, as these are outputs of
    # convolutions; one backward.
    shaping = {ops.shape_.default: n, ops.shape.default: n}
    added = calls_of("random") - plain
    assert added == {torch.ops.aten.randint.low_generator: n} | shaping
    target = calls_of("target")
    assert set(target) - set(plain) == {ops.pack.default, *shaping}
    assert target[ops.pack.default] == n and all(target[op] == k for op, k in shaping.items())
    # The rest is the model's own: its target pass.
    assert not [op for op in target if "copy" in str(op) or "item" in str(op)]


# ---- what happens on a GPU ----


def assert_never_waits(step, kernels=()):
    """Waits that torch knows of raise; the profiler sees those of everybody else, and copies."""
    for _ in range(2):  # libraries start, the allocator finds its memory
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
        torch.cuda.synchronize()  # which the profiler sees: the events are all there
    events = profile.events()
    names = [e.name for e in events]
    for seen in ("cudaDeviceSynchronize", "cudaLaunchKernel", *kernels):
        assert any(seen in name for name in names), f"the profiler did not see {seen}"
    assert not [name for name in names if "Memcpy HtoD" in name or "Memcpy DtoH" in name]
    # The device has an event of this name as well, later. The host's spans all calls, those of autograd's thread too.
    step_event = min((e for e in events if e.name == "the step"), key=lambda e: e.time_range.start)
    start, end = step_event.time_range.start, step_event.time_range.end
    within = [e.name for e in events if start <= e.time_range.start <= end]
    assert not [name for name in within if "Synchronize" in name]


@pytest.fixture
def kernels() -> dict[str, tuple[str, ...]]:
    """By what the step has: names of the kernels that must be seen."""
    # Asked for here and not at import: asking starts the driver, and other tests fork.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    if fastshape.backend_info()["cuda"] != "native":
        return dict.fromkeys(("none", "random", "target"), ())
    return {"none": (), "random": ("shape_kernel",), "target": ("shape_kernel", "pack_kernel")}


@pytest.mark.gpu
def test_shaping_waits_for_nothing(kernels):
    model = torch.nn.Conv2d(3, 7, 3, device="cuda")
    images = torch.randn(3, 3, 33, 33, device="cuda")
    recorded = torch.randn(4, 7, 31, 31, device="cuda")

    def step():
        z = fastshape.shape(model(images), p_zero=0.5, inplace=True)
        mask = BitMask.from_tensor(recorded).first(3)  # its last byte has spare bits to clear
        z = z + fastshape.shape(model(images), mask=mask, gradient="clipped")
        z.sum().backward()

    assert_never_waits(step, kernels["target"])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ("none", "random", "target"))
def test_attached_training_waits_for_nothing(kernels, mode):
    # "none" says whose fault a failure of the others is.
    assert_never_waits(training_step(mode, "cuda"), kernels[mode])
