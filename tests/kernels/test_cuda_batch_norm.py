"""Shape + BatchNorm2d + ReLU on a GPU: bits and sums of the reference, and correct with streams, graphs and autocast."""

import math

import pytest
import torch
from tensors import DTYPES, as_bits, awkward
from torch import nn
from torch.library import opcheck

import fastshape
from fastshape import reference
from fastshape.backends import cuda

pytestmark = pytest.mark.gpu
ops = torch.ops.fastshape

STATE = torch.tensor([1234567, 2**32 - 2])
MASKS = ("random", "bits", "none")
FORMATS = (torch.contiguous_format, torch.channels_last)
# Channels and planes that fill vectors and that do not; planes of one and of several chunks; one row and many rows.
SHAPES = (
    (2, 64, 28, 28), (3, 20, 7, 7), (5, 3, 14, 14), (1, 1, 3, 5), (2, 8, 112, 5), (4, 24, 1, 1), (2, 100, 33, 31),
    (3, 2, 160, 161),
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu():
    # Asking for a GPU starts the driver, which processes that other tests fork cannot use. So do not ask at import.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    if fastshape.backend_info()["cuda"] != "native":
        pytest.skip(
            f"the CUDA kernels do not serve CUDA: {cuda.error() or 'another backend was chosen'}"
        )


def a_map(shape, dtype, memory_format, seed=0, offset=0):
    """A map on the CPU, and its copy on the GPU, `offset` elements after an aligned address."""
    x = awkward(math.prod(shape), dtype, seed).view(shape).contiguous(memory_format=memory_format)
    storage = torch.zeros(x.numel() + 16, dtype=dtype, device="cuda")
    x_gpu = storage.as_strided(x.size(), x.stride(), offset)
    return x, x_gpu.copy_(x)


def eighths(shape, dtype, memory_format):
    """Gradients that are eighths of small integers. Their sums are exact in any order."""
    grad = torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(3)).to(dtype) / 8
    return grad.contiguous(memory_format=memory_format)


def a_mask(kind, n):
    """(rng_state, bits)"""
    bits = reference.pack(awkward(n, torch.float32, seed=9)) if kind == "bits" else None
    return (STATE if kind == "random" else None), bits


def a_layer(channels, affine=True, dtype=torch.float32):
    """weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(channels)
    weight, bias = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
    running = [torch.rand(channels, generator=generator) for _ in range(2)]
    return (weight, bias, *running) if affine else (None, None, *running)


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


def assert_equal_numbers(actual, expected):
    """Equal bits, except that any NaN equals any other."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    same = as_bits(actual) == as_bits(expected)
    assert (same | (actual.isnan() & expected.isnan())).all()


# ---- equal numbers ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "misaligned"))
def test_forward(dtype, kind, memory_format, offset):
    for case, shape in enumerate(SHAPES):
        x, x_gpu = a_map(shape, dtype, memory_format, offset=offset)
        masks = a_mask(kind, x.numel())
        layer = a_layer(shape[1], affine=case % 3 != 1)
        training, relu, clipped = case % 4 != 3, case % 2 == 0, case % 3 == 0
        numbers = (training, 0.1, 1e-5, relu, clipped)
        for inplace in (False, True):
            expected_layer = [None if t is None else t.clone() for t in layer]
            expected = reference.shaped_batch_norm(x, *masks, 0.37, *expected_layer, *numbers)
            now = on_gpu(*layer)
            if inplace:
                arguments = (x_gpu, *on_gpu(*masks), 0.37, *now, *numbers)
                actual = (x_gpu, *ops.shaped_batch_norm_(*arguments))
            else:
                actual = ops.shaped_batch_norm(x_gpu, *on_gpu(*masks), 0.37, *now, *numbers)
                assert torch.equal(as_bits(x_gpu.cpu()), as_bits(x))
            assert_equal_numbers(actual[0], expected[0])
            assert torch.equal(actual[1].cpu(), expected[1])
            assert torch.equal(actual[2].cpu(), expected[2])
            assert_equal_numbers(actual[3], expected[3])
            for a, b in zip(now[2:], expected_layer[2:], strict=True):
                assert_equal_numbers(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_backward(dtype, kind, memory_format):
    """The sums are exact, so that all bits must be equal."""
    for case, shape in enumerate(SHAPES):
        x, _ = a_map(shape, dtype, memory_format)
        masks = a_mask(kind, x.numel())
        layer = a_layer(shape[1], affine=case % 3 != 1, dtype=(torch.float32, dtype)[case % 2])
        training, relu = case % 4 != 3, case % 2 == 0
        _, ones, _, statistics = reference.shaped_batch_norm(
            x, *masks, 0.37, *layer, training, 0.1, 1e-5, relu, False
        )
        grad = eighths(shape, dtype, memory_format)
        inputs = (grad, ones, statistics, *masks)
        arguments = (training, relu)
        expected = reference.shaped_batch_norm_backward(*inputs, 0.37, *layer[:2], *arguments, True)
        for needs_x in (True, False):
            actual = ops.shaped_batch_norm_backward(
                *on_gpu(*inputs), 0.37, *on_gpu(*layer[:2]), *arguments, needs_x
            )
            for k in range(0 if needs_x else 1, 3):
                assert_equal_numbers(actual[k], expected[k])
            assert needs_x or actual[0].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_sums_are_within_their_bound_and_the_same_at_every_call(dtype, memory_format):
    for shape in (*SHAPES, (32, 64, 56, 56)):
        x, x_gpu = a_map(shape, dtype, memory_format)
        layer = on_gpu(*a_layer(shape[1], dtype=torch.float64))
        _, ones, _, statistics = ops.shaped_batch_norm(
            x_gpu, STATE.cuda(), None, 0.3, *layer, True, 0.1, 1e-5, False, False
        )
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(shape, generator=generator).to(dtype)
        grad = grad.contiguous(memory_format=memory_format).cuda()
        arguments = (ones, statistics, STATE.cuda(), None, 0.3, *layer[:2], True, False, True)
        first = ops.shaped_batch_norm_backward(grad, *arguments)
        exact = grad.double().sum((0, 2, 3))
        unit = 2**-53 * grad.numel() + (0 if dtype == torch.float64 else 64 * 2**-24)
        bound = unit * grad.double().abs().sum((0, 2, 3))
        assert ((first[2] - exact).abs() <= bound).all()  # d(bias): the sum over zeros and ones
        for _ in range(3):
            again = ops.shaped_batch_norm_backward(grad, *arguments)
            assert all(
                torch.equal(as_bits(a), as_bits(b)) for a, b in zip(first, again, strict=True)
            )


def test_a_map_without_elements():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.empty(shape, device="cuda")
        layer = on_gpu(*a_layer(3))
        before = [t.clone() for t in layer]
        _, ones, _, statistics = ops.shaped_batch_norm(
            x, None, None, 0.0, *layer, True, 0.1, 1e-5, True, False
        )
        assert all(torch.equal(a, b) for a, b in zip(layer, before, strict=True))
        dx, _, grad_bias = ops.shaped_batch_norm_backward(
            x, ones, statistics, None, None, 0.0, *layer[:2], True, True, True
        )
        assert dx.shape == shape and (grad_bias == 0).all()


@pytest.mark.slow
def test_more_than_2_31_elements():
    side = 26_755  # a plane with an odd number of elements, about a third of 2^31
    m = side * side
    if torch.cuda.mem_get_info()[0] < 4 * 2 * 3 * m:
        pytest.skip("needs 17 GB of free GPU memory")
    x = torch.ones(1, 3, side, side, dtype=torch.float16, device="cuda")
    x.view(-1)[-5:] = -1
    weight, bias = torch.ones(2, 3, dtype=torch.float64, device="cuda")
    ones, _, statistics = ops.shaped_batch_norm_(
        x, None, None, 0.0, weight, bias, None, None, True, 0.1, 1e-5, False, False
    )
    mean = torch.tensor([1, 1, (m - 5) / m], dtype=torch.float64)
    assert torch.equal(statistics[0].cpu(), mean)
    zero, one = (1 + (a - mean) * statistics[1].cpu() for a in (0, 1))
    for channel in range(3):
        plane = x[0, channel].view(-1)[[0, m // 2, -6, -1]].cpu()
        last = zero if channel == 2 else one
        assert torch.equal(plane, torch.stack([*one[channel].expand(3), last[channel]]).half())
    grad = torch.ones_like(x)
    dx, _, grad_bias = ops.shaped_batch_norm_backward(
        grad, ones, statistics, None, None, 0.0, weight, bias, False, False, True
    )
    assert (grad_bias == m).all()
    for channel in range(3):
        scale = statistics[1, channel].float().half()
        assert dx[0, channel, 0, 0] == scale and dx[0, channel, -1, -1] == scale


# ---- streams, graphs, autocast ----


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck(memory_format):
    x = torch.randn(2, 3, 4, 5, device="cuda").contiguous(memory_format=memory_format)
    bits = torch.ones(15, dtype=torch.uint8, device="cuda")
    for x_gpu in (x, x.half()):
        for masks in ((STATE.cuda(), None), (None, bits), (None, None)):
            layer = on_gpu(*a_layer(3))
            numbers = (True, 0.1, 1e-5, True)
            for clipped in (False, True):
                arguments = (*masks, 0.3, *layer, *numbers, clipped)
                opcheck(ops.shaped_batch_norm.default, (x_gpu, *arguments))
                opcheck(ops.shaped_batch_norm_.default, (x_gpu.clone(), *arguments))
            _, ones, _, statistics = ops.shaped_batch_norm(
                x_gpu, *masks, 0.3, *layer, *numbers, False
            )
            arguments = (x_gpu, ones, statistics, *masks, 0.3, *layer[:2], True, True)
            for needs_x in (False, True):
                opcheck(ops.shaped_batch_norm_backward.default, (*arguments, needs_x))


def a_step(x, state, layer, grad):
    """Forward and backward: y, dx, d(weight), d(bias)."""
    y, ones, _, statistics = ops.shaped_batch_norm(
        x, state, None, 0.5, *layer, True, 0.1, 1e-5, True, False
    )
    arguments = (ones, statistics, state, None, 0.5, *layer[:2], True, True, True)
    return y, *ops.shaped_batch_norm_backward(grad, *arguments)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_captured_graph_reads_the_state_and_moves_the_running_statistics_at_replay(memory_format):
    x, x_gpu = a_map((4, 24, 14, 14), torch.float16, memory_format)
    grad = eighths(x.shape, torch.float16, memory_format)
    layer, state = on_gpu(*a_layer(24)), STATE.cuda()
    grad_gpu = grad.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        a_step(x_gpu, state, layer, grad_gpu)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = a_step(x_gpu, state, layer, grad_gpu)
    for seed in (1, 2, 3):
        state.copy_(torch.tensor([seed, 0]))
        expected_layer = [t.cpu() for t in layer]
        graph.replay()
        at = torch.tensor([seed, 0])
        y, ones, _, statistics = reference.shaped_batch_norm(
            x, at, None, 0.5, *expected_layer, True, 0.1, 1e-5, True, False
        )
        expected = reference.shaped_batch_norm_backward(
            grad, ones, statistics, at, None, 0.5, *expected_layer[:2], True, True, True
        )
        for a, b in zip(outputs, (y, *expected), strict=True):
            assert_equal_numbers(a, b)
        for a, b in zip(layer, expected_layer, strict=True):
            assert torch.equal(a.cpu(), b)


def test_side_stream():
    x, x_gpu = a_map((16, 64, 56, 56), torch.float32, torch.contiguous_format)
    layer, grad = (
        on_gpu(*a_layer(64)),
        eighths(x.shape, torch.float32, torch.contiguous_format).cuda(),
    )
    expected = a_step(x_gpu, STATE.cuda(), on_gpu(*a_layer(64)), grad)
    state = STATE.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(x_gpu, -1.0)
        torch.cuda._sleep(50_000_000)  # on any other stream, the kernels would read -1
        late.copy_(x_gpu)
        actual = a_step(late, state, layer, grad)
    stream.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(as_bits(a), as_bits(b))


def test_a_step_never_waits():
    _, x_gpu = a_map((4, 24, 14, 14), torch.float32, torch.channels_last)
    layer, state = on_gpu(*a_layer(24)), STATE.cuda()
    a_step(x_gpu, state, layer, x_gpu)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        a_step(x_gpu, state, layer, x_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("inplace", (False, True))
def test_module_after_a_convolution_under_autocast(dtype, memory_format, inplace):
    """The convolution returns float16 and gets the right gradient. The parameters of the layer stay float32."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 24, 3, bias=False, device="cuda").to(memory_format=memory_format)
    module = fastshape.ShapedBatchNorm2d(24, p_zero=0.3, relu=True, inplace=inplace, device="cuda")
    images = torch.randn(4, 3, 18, 18, device="cuda").contiguous(memory_format=memory_format)
    state, maps = STATE.cuda(), []
    conv.register_forward_hook(lambda _, __, z: maps.append(z.detach().clone()))
    with torch.autocast("cuda", dtype):
        y = module(conv(images), rng_state=state)
    (z,) = maps
    assert y.dtype == z.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    layer = [t.detach().cpu().clone() for t in (module.weight, module.bias)]
    running = [torch.zeros(24), torch.ones(24)]
    expected, ones, _, statistics = reference.shaped_batch_norm(
        z.cpu(), STATE, None, 0.3, *layer, *running, True, 0.1, 1e-5, True, False
    )
    assert_equal_numbers(y.detach(), expected)
    assert torch.equal(module.running_mean.cpu(), running[0])
    assert torch.equal(module.running_var.cpu(), running[1])
    grad = eighths(y.shape, dtype, memory_format)
    y.backward(grad.cuda())
    dx, grad_weight, grad_bias = reference.shaped_batch_norm_backward(
        grad, ones, statistics, STATE, None, 0.3, *layer, True, True, True
    )
    assert torch.equal(module.weight.grad.cpu(), grad_weight)
    assert torch.equal(module.bias.grad.cpu(), grad_bias)
    with torch.autocast("cuda", dtype):
        (of_conv,) = torch.autograd.grad(conv(images), conv.weight, dx.cuda())
    torch.testing.assert_close(conv.weight.grad, of_conv, rtol=1e-3, atol=1e-3)


def test_statistics_on_another_device_are_an_error():
    x, ones = torch.zeros(2, 3, 4, 4, device="cuda"), torch.zeros(12, dtype=torch.uint8).cuda()
    others = ["cpu"] + ["cuda:1"] * (torch.cuda.device_count() > 1)
    for device in others:
        statistics = torch.zeros(2, 3, dtype=torch.float64, device=device)
        with pytest.raises(RuntimeError, match="statistics must be .* on the device of grad"):
            ops.shaped_batch_norm_backward(
                x, ones, statistics, None, None, 0.0, None, None, True, True, True
            )
