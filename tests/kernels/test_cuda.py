"""The CUDA kernels on a GPU: equal to the reference bit for bit, and correct with streams, graphs and several devices."""

import pytest
import torch
from tensors import DTYPES, as_bits, assert_same_bits, awkward
from torch.library import opcheck

import fastshape
from fastshape import BitMask, reference
from fastshape.backends import cuda

pytestmark = pytest.mark.gpu
ops = torch.ops.fastshape

STATE = torch.tensor([1234567, 2**32 - 2])
MASKS = ("random", "bits", "none")
# Sizes around a mask byte, a tile of 256 elements and a step of several tiles. The large ones make blocks loop.
COUNTS = {
    "small": (0, 1, 9, 255, 256, 257, 1023, 1025, 3001),
    "large": (32768, 100_003, 3_000_001),
}


@pytest.fixture(autouse=True)
def gpu():
    # Asking for a GPU starts the driver, which processes that other tests fork cannot use. So do not ask at import.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    if fastshape.backend_info()["cuda"] != "native":
        pytest.skip(
            f"the CUDA kernels do not serve CUDA: {cuda.error() or 'another backend was chosen'}"
        )


def mask_arguments(kind: str, n: int) -> tuple:
    """(rng_state, bits) on the CPU."""
    if kind == "random":
        return STATE, None
    if kind == "bits":
        return None, reference.pack(awkward(n, torch.float32, seed=9))
    return None, None


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


# ---- equal bits ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("binarize", (True, False))
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "misaligned"))
@pytest.mark.parametrize("counts", COUNTS)
def test_ops_equal_the_reference(dtype, kind, binarize, offset, counts):
    for n in COUNTS[counts]:
        x = awkward(n, dtype)
        masks = mask_arguments(kind, n)
        expected, expected_within = reference.shape_clipped(x, *masks, 0.37, binarize)
        masks = on_gpu(*masks)
        storage = torch.full((n + 64,), 7, dtype=dtype, device="cuda")
        x_gpu = storage[16 + offset : 16 + offset + n]
        x_gpu.copy_(x)
        before = storage.clone()
        assert_same_bits(ops.shape(x_gpu, *masks, 0.37, binarize).cpu(), expected)
        y, within = ops.shape_clipped(x_gpu, *masks, 0.37, binarize)
        assert_same_bits(y.cpu(), expected)
        assert torch.equal(within.cpu(), expected_within)
        assert torch.equal(as_bits(storage), as_bits(before))
        within = ops.shape_clipped_(x_gpu, *masks, 0.37, binarize)
        assert_same_bits(x_gpu.cpu(), expected)
        assert torch.equal(within.cpu(), expected_within)
        x_gpu.copy_(x)
        ops.shape_(x_gpu, *masks, 0.37, binarize)
        assert_same_bits(x_gpu.cpu(), expected)
        for guard in (slice(0, 16 + offset), slice(16 + offset + n, None)):
            assert torch.equal(storage[guard], before[guard])


@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "misaligned"))
@pytest.mark.parametrize("counts", COUNTS)
def test_pack_and_unpack_equal_the_reference(offset, counts):
    for n in COUNTS[counts]:
        for dtype in (*DTYPES, torch.bool, torch.uint8):
            x = awkward(n, torch.float32) > 0
            x = awkward(n, dtype) if dtype.is_floating_point else x.to(dtype)
            x_gpu = torch.cat([x[:0], torch.zeros(offset, dtype=dtype), x]).cuda()[offset:]
            bits = ops.pack(x_gpu)
            assert torch.equal(bits.cpu(), reference.pack(x))
        shifted = torch.cat([bits.new_zeros(offset), bits])[offset:]
        assert torch.equal(ops.unpack(shifted, n).cpu(), reference.unpack(bits.cpu(), n))


@pytest.mark.parametrize("p_zero", (0.0, 1e-9, 0.3, 0.999, 1 - 1e-9))
@pytest.mark.parametrize("seed", (3, -1))
@pytest.mark.parametrize("offset", (0, 2**32 - 3, -3), ids=("0", "2^32-3", "2^64-3"))
def test_pack_random_equals_the_reference(p_zero, seed, offset):
    state = torch.tensor([seed, offset])
    for n in (0, 1, 8, 65, 100_003):
        bits = ops.pack_random(state.cuda(), n, p_zero)
        assert torch.equal(bits.cpu(), reference.pack_random(state, n, p_zero))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", (1, 7, 49, 3136))
def test_pack_top_equals_the_reference(dtype, row):
    """The last group of rows is incomplete unless a row is a whole number of bytes."""
    for x in (awkward(101 * row, dtype), awkward(101 * row, dtype, seed=1).relu()):
        for count in {1, row // 2, row}:
            bits = ops.pack_top(x.cuda(), row, count)
            assert torch.equal(bits.cpu(), reference.pack_top(x, row, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
@pytest.mark.parametrize("inplace", (False, True))
def test_values_and_gradients(dtype, kind, memory_format, gradient, inplace):
    x = awkward(3 * 5 * 17 * 19, dtype).view(3, 5, 17, 19).contiguous(memory_format=memory_format)
    rng_state, bits = mask_arguments(kind, x.numel())
    expected_x = x.clone().requires_grad_()
    expected = reference.differentiable_shape(expected_x, rng_state, bits, 0.37, True, gradient)
    x = x.cuda().requires_grad_()
    arguments = {}
    if kind == "random":
        arguments = {"p_zero": 0.37, "rng_state": rng_state.cuda()}
    elif kind == "bits":
        name = "contiguous" if memory_format == torch.contiguous_format else "channels_last"
        arguments = {"mask": BitMask(bits.cuda(), x.shape, name)}
    x_gpu = x.clone() if inplace else x
    y = fastshape.shape(x_gpu, gradient=gradient, inplace=inplace, **arguments)
    assert_same_bits(y.cpu(), expected)
    grad = awkward(x.numel(), dtype, seed=5).view(x.shape)  # contiguous, also for a channels_last x
    expected.backward(grad)
    y.backward(grad.cuda())
    assert torch.equal(as_bits(x.grad.cpu()), as_bits(expected_x.grad))


@pytest.mark.slow
def test_more_than_2_31_elements():
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.ones(n, dtype=torch.float16, device="cuda")
    x[-5:] = -1
    state = torch.tensor([5, 2**32 - 1000])
    y, within = ops.shape_clipped(x, state.cuda(), None, 0.5, True)
    # Draws are numbered by element, so that any stretch equals a small mask with a later offset.
    for start in (0, 2**31 - 800, n // 8 * 8 - 8000):
        stop = min(start + 9000, n)
        at = torch.tensor([5, state[1] + start // 8])
        mask = reference.random_mask(at, stop - start, 0.5)
        expected = mask & (x[start:stop] > 0).cpu()
        assert torch.equal(y[start:stop].bool().cpu(), expected)
        stretch = within[start // 8 : (stop + 7) // 8].cpu()
        assert torch.equal(reference.unpack(stretch, stop - start), mask)
    bits = ops.pack(y)
    assert torch.equal(bits[-1000:].cpu(), reference.pack(y[8 * (bits.numel() - 1000) :].cpu()))


# ---- streams, graphs, compilation, devices ----


@pytest.mark.parametrize("name", ("shape", "shape_", "shape_clipped", "shape_clipped_"))
def test_opcheck(name):
    x = torch.randn(2, 3, 4, 5, device="cuda")
    bits = torch.ones(15, dtype=torch.uint8, device="cuda")
    for tensor in (x, x.half().contiguous(memory_format=torch.channels_last)):
        for masks in ((STATE.cuda(), None), (None, bits), (None, None)):
            opcheck(getattr(ops, name).default, (tensor, *masks, 0.3, True))


def test_opcheck_of_bits():
    opcheck(ops.pack.default, (torch.randn(65, device="cuda"),))
    opcheck(ops.pack_random.default, (STATE.cuda(), 65, 0.3))
    opcheck(ops.unpack.default, (torch.ones(9, dtype=torch.uint8, device="cuda"), 65))


@pytest.mark.parametrize("own_generator", (False, True))
def test_a_captured_graph_draws_a_new_mask_at_each_replay(own_generator):
    x = torch.ones(100_003, device="cuda", requires_grad=True)
    generator = torch.Generator("cuda").manual_seed(4) if own_generator else None

    def step():
        y = fastshape.shape(x, p_zero=0.5, generator=generator)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return y, grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if own_generator:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        y, grad = step()
    outputs = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, grad) and 0.49 < y.mean() < 0.51
        assert not any(torch.equal(y, earlier) for earlier in outputs)
        outputs.append(y.detach().clone())


def test_a_captured_graph_reads_the_state_at_each_replay():
    x, state = torch.ones(1000, device="cuda"), STATE.cuda()
    fastshape.shape(x, p_zero=0.5, rng_state=state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastshape.shape(x, p_zero=0.5, rng_state=state)
    for seed in (1, 2):
        state.copy_(torch.tensor([seed, 0]))
        graph.replay()
        expected = reference.random_mask(torch.tensor([seed, 0]), 1000, 0.5)
        assert torch.equal(y.bool().cpu(), expected)


def test_side_stream():
    n, state = 2**22, STATE.cuda()
    expected = fastshape.shape(torch.ones(n), p_zero=0.5, rng_state=STATE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.full((n,), -1.0, device="cuda")
        torch.cuda._sleep(50_000_000)  # on any other stream, the kernel would read -1
        x.fill_(1)
        y = fastshape.shape(x, p_zero=0.5, rng_state=state)
    stream.synchronize()
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compile(mode):
    torch._dynamo.reset()
    mask = BitMask.from_tensor(torch.randn(64, 33, device="cuda"))

    def function(x, state):
        y = fastshape.shape(x * 2, p_zero=0.5, rng_state=state)
        return y + fastshape.shape(x, mask=mask, gradient="clipped") + fastshape.shape(x, p_zero=0)

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for seed in range(4):
        state = fastshape.rng_state(seed, device="cuda")
        a = torch.randn(64, 33, device="cuda", requires_grad=True)
        b = a.detach().clone().requires_grad_()
        expected, actual = function(a, state), compiled(b, state)
        assert torch.equal(actual, expected)
        expected.sum().backward()
        actual.sum().backward()
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_function_draws_a_new_mask_at_each_call(mode):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastshape.shape(x * 2, p_zero=0.5), mode=mode)
    x = torch.ones(10_000, device="cuda")
    outputs = [compiled(x).clone() for _ in range(4)]
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    conv = torch.nn.Conv2d(3, 4, 3, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        z = conv(torch.randn(2, 3, 8, 8, device="cuda"))
        y = fastshape.shape(z, p_zero=0.5)
    assert y.dtype == z.dtype == dtype
    y.float().sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_deterministic_algorithms():
    x, state = torch.randn(10_007, device="cuda"), STATE.cuda()
    torch.use_deterministic_algorithms(True)
    try:
        first = fastshape.shape(x, p_zero=0.5, rng_state=state)
        assert torch.equal(first, fastshape.shape(x, p_zero=0.5, rng_state=state))
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_for_backward():
    x = torch.randn(8, 1000, device="cuda", requires_grad=True)
    mask = BitMask.from_tensor(torch.randn(8, 1000, device="cuda"))
    for arguments, expected in (({"p_zero": 0.5}, 16), ({"mask": mask}, 1000)):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            fastshape.shape(x, **arguments)
        assert sum(t.numel() * t.element_size() for t in saved.values()) == expected


def test_tensors_on_several_devices_are_errors():
    x, state = torch.randn(16), STATE
    with pytest.raises(RuntimeError, match="x must be a CUDA tensor"):
        ops.shape(x, state.cuda(), None, 0.5, True)
    with pytest.raises(RuntimeError, match="rng_state must be a contiguous int64 CUDA tensor"):
        ops.shape(x.cuda(), state, None, 0.5, True)
    with pytest.raises(RuntimeError, match="bits must be a contiguous uint8 CUDA tensor"):
        ops.shape(x.cuda(), None, torch.zeros(2, dtype=torch.uint8), 0.0, True)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, state = awkward(100_003, torch.float32), STATE
    expected = reference.shape(x, state, None, 0.5, True)
    assert torch.cuda.current_device() == 0
    leaf = x.to("cuda:1").requires_grad_()
    y = fastshape.shape(leaf, p_zero=0.5, rng_state=state.to("cuda:1"))
    assert y.device == leaf.device and torch.cuda.current_device() == 0
    assert_same_bits(y.cpu(), expected)
    y.sum().backward()
    assert torch.equal(leaf.grad.cpu().bool(), reference.random_mask(state, x.numel(), 0.5))
    with pytest.raises(RuntimeError, match="on the device of x"):
        ops.shape(x.to("cuda:1"), state.to("cuda:0"), None, 0.5, True)
