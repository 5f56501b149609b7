"""fastshape with opcheck, torch.compile, autocast, torch.func, copies and processes."""

import copy
import io
import multiprocessing

import pytest
import test_batch_norm
import torch
from tensors import DTYPES
from torch.library import opcheck

import fastshape
from fastshape import _ops

ops = torch.ops.fastshape


def samples(name: str):
    """Arguments of an op: all mask sources, dtypes and memory formats, and awkward sizes."""
    state = fastshape.rng_state(3)
    if name == "pack":
        return [(torch.randn(n).to(d),) for n in (0, 1, 65) for d in DTYPES] + [
            (torch.ones(9, dtype=torch.bool),)
        ]
    if name == "pack_random":
        return [(state, n, 0.3) for n in (0, 1, 65)]
    if name == "pack_top":
        sizes = ((65, 13, 5), (1, 1, 1), (64, 16, 0), (0, 7, 2))
        return [(torch.randn(n).to(d), row, count) for n, row, count in sizes for d in DTYPES]
    if name == "unpack":
        return [(torch.randint(256, ((n + 7) // 8,), dtype=torch.uint8), n) for n in (0, 1, 65)]
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    xs = [torch.randn(shape).to(d) for shape in ((), (65,), (0, 3)) for d in DTYPES] + [last]
    calls = []
    for x in xs:
        bits = torch.ones((x.numel() + 7) // 8, dtype=torch.uint8)
        calls += [
            (x, state, None, 0.3, True),
            (x, None, bits, 0.0, False),
            (x, None, None, 0.0, True),
        ]
    return calls


@pytest.mark.parametrize(
    "name",
    (
        "shape",
        "shape_",
        "shape_clipped",
        "shape_clipped_",
        "pack",
        "pack_random",
        "pack_top",
        "unpack",
    ),
)
def test_opcheck(name):
    for arguments in samples(name):
        opcheck(getattr(ops, name).default, arguments)


def test_every_op_is_opchecked():
    tests = (test_opcheck, test_batch_norm.test_opcheck)
    names = {name for test in tests for name in test.pytestmark[0].args[1]}
    assert names == set(_ops.SCHEMAS)


def shape_product(x, gradient="straight_through", inplace=False):
    return fastshape.shape(x * 2, p_zero=0.5, gradient=gradient, inplace=inplace)


@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
@pytest.mark.parametrize("inplace", (False, True))
def test_compile_fullgraph_with_dynamic_sizes(gradient, inplace):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(shape_product, fullgraph=True, dynamic=True)
    for rows in (5, 17, 40):
        x = torch.ones(rows, 33, requires_grad=True)
        first, second = compiled(x, gradient, inplace), compiled(x, gradient, inplace)
        assert not torch.equal(first, second), (
            "the compiled function must draw a new mask at each call"
        )
        if gradient != "zero":
            first.sum().backward()
            value = first.detach() if gradient == "straight_through" else torch.zeros_like(x)
            assert torch.equal(x.grad, 2 * value)  # x * 2 is 2, for which the clipped gradient is 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compile_equals_eager_for_a_given_state():
    torch._dynamo.reset()

    def function(x, state, mask):
        y = fastshape.shape(x, p_zero=0.5, rng_state=state) + fastshape.shape(
            x, mask=mask, binarize=False
        )
        return y + fastshape.shape(x)

    compiled = torch.compile(function, fullgraph=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 5, 7).contiguous(memory_format=memory_format)
        mask = fastshape.BitMask.from_tensor(
            torch.randn(2, 3, 5, 7).contiguous(memory_format=memory_format)
        )
        for seed in (1, 2):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            state = fastshape.rng_state(seed)
            expected, actual = function(a, state, mask), compiled(b, state, mask)
            assert torch.equal(actual, expected)
            weight = torch.randn(x.shape)
            (expected * weight).sum().backward()
            (actual * weight).sum().backward()
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_keeps_the_dtype_of_x(dtype):
    conv = torch.nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype=dtype):
        z = conv(torch.randn(2, 3, 8, 8))
        y = fastshape.shape(z, p_zero=0.5)
        assert y.dtype == z.dtype == dtype
        assert fastshape.shape(z.float(), p_zero=0.5).dtype == torch.float32
    y.float().sum().backward()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ("random", "target"))
def test_gradcheck_without_binarize(kind):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 7)
    state = fastshape.rng_state(1)

    def function(x):
        if kind == "random":
            return fastshape.shape(x, p_zero=0.4, rng_state=state, binarize=False)
        return fastshape.shape(x, mask=mask, binarize=False)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
def test_double_backward_is_the_derivative_of_the_backward_formula(gradient):
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    v = torch.randn(50, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(50)
    y = fastshape.shape(x, mask=mask, gradient=gradient)
    (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
    weight = torch.randn(50, dtype=torch.float64)
    (second,) = torch.autograd.grad((grad * weight).sum(), v)
    passes = (mask > 0) & (x.abs() <= 1) if gradient == "clipped" else mask > 0
    assert torch.equal(second, weight * passes)


def test_func_grad_works_and_vmap_is_an_error():
    x = torch.randn(4, 5)
    grad = torch.func.grad(lambda x: fastshape.shape(x, mask=torch.ones(4, 5)).sum())(x)
    assert torch.equal(grad, torch.ones(4, 5))
    with pytest.raises(NotImplementedError, match="fastshape has no vmap rule"):
        torch.func.vmap(
            lambda row: fastshape.shape(row, p_zero=0.5, rng_state=fastshape.rng_state(1))
        )(x)
    with pytest.raises(NotImplementedError, match="fastshape has no vmap rule"):
        torch.func.vmap(lambda row: fastshape.shape(row))(x.requires_grad_())


def test_no_grad_and_inference_mode():
    x = torch.randn(10, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not fastshape.shape(x, p_zero=0.5).requires_grad
    with torch.no_grad():
        fastshape.shape(x, p_zero=0.5, inplace=True)
    assert set(x.tolist()) <= {0.0, 1.0}


def test_in_place_marks_x_as_changed():
    w = torch.randn(10, requires_grad=True)
    z = w.exp()  # the backward of exp needs its output
    version = z._version
    fastshape.shape(z, p_zero=0.5, inplace=True)
    assert z._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
def test_in_place_on_a_view_of_an_activation(gradient):
    x = torch.randn(24, requires_grad=True)
    z = x.clone()
    mask = torch.randn(3, 8)
    y = fastshape.shape(z.view(3, 8), mask=mask, gradient=gradient, inplace=True)
    expected = ((x > 0).view(3, 8) & (mask > 0)).float()
    assert torch.equal(y, expected) and torch.equal(z.view(3, 8), expected)
    z.sum().backward()
    passes = (mask > 0) & (x.view(3, 8).abs() <= 1) if gradient == "clipped" else mask > 0
    assert torch.equal(x.grad, passes.float().view(24))


def test_a_state_that_changes_before_backward_is_an_error():
    x, state = torch.randn(10, requires_grad=True), fastshape.rng_state(1)
    y = fastshape.shape(x, p_zero=0.5, rng_state=state)
    state[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_module():
    module = fastshape.ActivationShaping(p_zero=0.5, gradient="clipped")
    x = torch.randn(100)
    assert set(module(x).tolist()) == {0.0, 1.0}
    assert module.eval()(x) is x
    module.at_eval = "binarize"
    assert torch.equal(module(x), (x > 0).float())
    module.at_eval = "on"
    assert not torch.equal(module(x), (x > 0).float())
    mask = torch.randn(100)
    assert torch.equal(module.train()(x, mask), ((x > 0) & (mask > 0)).float())
    assert "p_zero=0.5" in repr(module)


def test_module_is_copied_and_saved():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), fastshape.ActivationShaping(p_zero=0.25))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(8, 4)
    for other in (copy.deepcopy(module), loaded):
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        assert torch.equal(other(x), expected)
    assert list(module.state_dict()) == ["0.weight", "0.bias"]


class Shaped(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return fastshape.shape(torch.ones(70_000), p_zero=0.5, rng_state=fastshape.rng_state(i))


@pytest.mark.parametrize("context", ("fork", "spawn"))
def test_dataloader_workers(context):
    here = [Shaped()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        Shaped(), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    for expected, actual in zip(here, loader, strict=True):
        assert torch.equal(actual, expected)


def _shape_in_child(queue):
    torch.set_num_threads(1)
    queue.put(
        int(
            fastshape.shape(torch.ones(300_000), p_zero=0.5, rng_state=fastshape.rng_state(1)).sum()
        )
    )


def test_fork_after_threads_were_used():
    expected = int(
        fastshape.shape(torch.ones(300_000), p_zero=0.5, rng_state=fastshape.rng_state(1)).sum()
    )
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_shape_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0
