"""Shape + BatchNorm + ReLU as one op: every CPU backend against the reference.

y, the bits, the statistics and the running statistics must be equal bit for bit. So must dx, if the sums of gradients are equal.
The sums of gradients are rounded. The native kernels add up at most 64 numbers in the dtype's accumulator and continue in
float64. So a sum of terms t is off by at most 64 eps sum(abs(t)), where eps is half of float32's.
"""

import pytest
import torch
from tensors import DTYPES, as_bits, assert_same_bits, awkward

from fastshape import reference

ops = torch.ops.fastshape
STATE = torch.tensor([-77, 2**32 - 3])
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (N, C, H, W): planes and channels below, at and above a step of 32, also with sizes that are no multiple of 8.
SIZES = (
    (1, 1, 1, 2),
    (3, 1, 5, 5),
    (2, 3, 1, 1),
    (5, 8, 2, 2),
    (2, 20, 3, 5),
    (3, 64, 7, 7),
    (2, 33, 14, 14),
    (4, 70, 56, 3),
    (2, 5, 112, 61),
    (70, 40, 3, 3),
)
EPS32 = 2.0**-24


def draw(size, dtype, memory_format, seed=0):
    n = torch.Size(size).numel()
    return awkward(n, dtype, seed).view(size).contiguous(memory_format=FORMATS[memory_format])


def mask_arguments(kind, x):
    if kind == "random":
        return STATE, None, 0.37
    if kind == "bits":
        return None, reference.pack(awkward(x.numel(), torch.float32, seed=9)), 0.0
    return None, None, 0.0


def parameters(channels, dtype, affine=True):
    """weight, bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(channels)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = torch.randn(4, channels, generator=generator, dtype=dtype)
    if channels > 2:
        weight[1] = 0  # scale 0
    return *((weight, bias) if affine else (None, None)), mean, var.abs()


def forward(implementation, x, mask, weight, bias, mean, var, training, relu, clipped):
    mean, var = (None if t is None else t.clone() for t in (mean, var))
    results = implementation(x, *mask, weight, bias, mean, var, training, 0.1, 1e-5, relu, clipped)
    return (*results, mean, var)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", ("random", "bits", "none"))
def test_forward(simd, dtype, memory_format, kind):
    for number, size in enumerate(SIZES):
        x = draw(size, dtype, memory_format)
        weight, bias, mean, var = parameters(size[1], dtype, affine=number % 3 > 0)
        for training, relu, clipped in (
            (True, True, False),
            (True, False, True),
            (False, True, True),
        ):
            call = (x, mask_arguments(kind, x), weight, bias, mean, var, training, relu, clipped)
            expected = forward(reference.shaped_batch_norm, *call)
            actual = forward(ops.shaped_batch_norm, *call)
            inplace = x.clone()
            saved = forward(ops.shaped_batch_norm_, inplace, *call[1:])
            for results in (actual, (inplace, *saved)):
                for a, b in zip(results, expected, strict=True):
                    if b.dtype == torch.uint8:
                        assert torch.equal(a, b), size
                    else:
                        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", ("random", "bits", "none"))
def test_backward(simd, dtype, memory_format, kind):
    for number, size in enumerate(SIZES):
        x = draw(size, dtype, memory_format)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
        grad = grad.contiguous(memory_format=FORMATS[memory_format])
        weight, bias, mean, var = parameters(size[1], dtype, affine=number % 3 > 0)
        mask = mask_arguments(kind, x)
        for training, relu in ((True, True), (True, False), (False, True)):
            _, ones, _, statistics, *_ = forward(
                reference.shaped_batch_norm, x, mask, weight, bias, mean, var, training, relu, False
            )
            call = (grad, ones, statistics, *mask, weight, bias, training, relu, True)
            expected = reference.shaped_batch_norm_backward(*call)
            actual = ops.shaped_batch_norm_backward(*call)
            assert actual[0].stride() == x.stride() and actual[0].dtype == dtype
            # The error bound of the sums, and the bounds that follow from it.
            eps = EPS32 if dtype != torch.float64 else 2.0**-53
            slack = 65 * eps * grad.double().abs().sum((0, 2, 3))
            scale, xhat, _ = reference._table(statistics, weight, bias)
            xhat = torch.stack(xhat).abs().amax(0)
            if weight is not None:
                rounding = 2 * eps
                for a, b, bound in zip(
                    actual[1:], expected[1:], (xhat * slack, slack), strict=True
                ):
                    assert a.dtype == weight.dtype
                    assert ((a - b).abs() <= bound + rounding * b.abs()).all(), size
            shift = scale.abs() * (1 + xhat**2) * slack / (x.numel() // size[1])
            half_step = torch.finfo(dtype).eps
            bound = (
                2 * shift.view(1, -1, 1, 1)
                + 2 * half_step * expected[0].abs().double()
                + torch.finfo(dtype).tiny
            )
            bound = bound + 4 * eps * (scale.abs().view(1, -1, 1, 1) * grad.double().abs())
            assert ((actual[0].double() - expected[0].double()).abs() <= bound).all(), size
            without_x = ops.shaped_batch_norm_backward(*call[:-1], False)
            assert without_x[0].numel() == 0
            assert all(torch.equal(a, b) for a, b in zip(without_x[1:], actual[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_backward_bit_for_bit_where_sums_are_exact(simd, dtype, memory_format):
    """Sums of small integers are exact, so that all bits must be equal."""
    for size in SIZES:
        x = draw(size, dtype, memory_format)
        grad = torch.randint(-3, 4, x.shape, generator=torch.Generator().manual_seed(5)).to(x)
        grad = grad.contiguous(memory_format=FORMATS[memory_format])
        weight, bias, mean, var = parameters(size[1], dtype)
        for kind in ("random", "bits", "none"):
            mask = mask_arguments(kind, x)
            for training in (True, False):
                _, ones, _, statistics, *_ = forward(
                    reference.shaped_batch_norm,
                    x,
                    mask,
                    weight,
                    bias,
                    mean,
                    var,
                    training,
                    True,
                    False,
                )
                call = (grad, ones, statistics, *mask, weight, bias, training, True, True)
                for a, b in zip(
                    ops.shaped_batch_norm_backward(*call),
                    reference.shaped_batch_norm_backward(*call),
                    strict=True,
                ):
                    assert torch.equal(as_bits(a), as_bits(b)), (size, kind, training)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_threads_change_nothing(threads, memory_format):
    x = draw((6, 40, 33, 37), torch.float32, memory_format)
    grad = torch.randn_like(x)
    weight, bias, mean, var = parameters(40, torch.float32)
    runs = []
    for count in (1, 2, 5):
        threads(count)
        mask = mask_arguments("random", x)
        y, ones, _, statistics, *running = forward(
            ops.shaped_batch_norm, x, mask, weight, bias, mean, var, True, True, False
        )
        back = ops.shaped_batch_norm_backward(
            grad, ones, statistics, *mask, weight, bias, True, True, True
        )
        runs.append((y, statistics, *running, *back))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert_same_bits(a, b)


def test_by_hand():
    """One channel with four elements, two of them ones: mean 1/2, var 1/4. With eps 0, invstd is 2 and y is bias -+ weight."""
    x = torch.tensor([-1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    keep = torch.tensor([0b0111], dtype=torch.uint8)
    weight, bias = torch.tensor([3.0]), torch.tensor([1.0])
    mean, var = torch.tensor([0.0]), torch.tensor([1.0])
    y, ones, _, statistics = ops.shaped_batch_norm(
        x, None, keep, 0.0, weight, bias, mean, var, True, 0.5, 0.0, True, False
    )
    assert ones.tolist() == [0b0110]
    assert statistics.flatten().tolist() == [0.5, 2.0]
    assert y.flatten().tolist() == [0.0, 4.0, 4.0, 0.0]  # ReLU makes 1 - 3 = -2 a zero
    assert mean.item() == 0.25
    assert var.item() == pytest.approx((1 + 1 / 3) / 2)  # the unbiased variance is 1/4 * 4/3

    grad = torch.tensor([100.0, 1.0, 2.0, 100.0]).view(1, 1, 2, 2)
    dx, grad_weight, grad_bias = ops.shaped_batch_norm_backward(
        grad, ones, statistics, None, keep, 0.0, weight, bias, True, True, True
    )
    # The closed ReLU passes no gradient: dy = (0, 1, 2, 0), xhat = (-1, 1, 1, -1).
    assert grad_bias.item() == 3.0 and grad_weight.item() == 3.0
    # dx = 6 (dy - 3/4 - xhat 3/4), masked by (1, 1, 1, 0).
    assert dx.flatten().tolist() == [0.0, -3.0, 3.0, 0.0]


def test_the_chain_of_modules():
    """The op equals shape, nn.BatchNorm2d and ReLU one after the other, in float64."""
    torch.manual_seed(0)
    for memory_format in FORMATS.values():
        x = torch.randn(4, 6, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
        x.requires_grad_()
        norm = torch.nn.BatchNorm2d(6, dtype=torch.float64)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        running = norm.running_mean.clone(), norm.running_var.clone()
        y = torch.relu(norm(reference.differentiable_shape(x, STATE, None, 0.4)))
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(y, (x, norm.weight, norm.bias), grad)
        weight, bias = norm.weight.detach(), norm.bias.detach()
        actual, ones, _, statistics = ops.shaped_batch_norm(
            x.detach(), STATE, None, 0.4, weight, bias, *running, True, 0.1, 1e-5, True, False
        )
        torch.testing.assert_close(actual, y.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            running, (norm.running_mean, norm.running_var), rtol=1e-14, atol=1e-15
        )
        gradients = ops.shaped_batch_norm_backward(
            grad, ones, statistics, STATE, None, 0.4, weight, bias, True, True, True
        )
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-13)


def test_opcheck():
    x = draw((2, 5, 4, 3), torch.float32, "channels_last")
    weight, bias, mean, var = parameters(5, torch.float32)
    for mask in (mask_arguments("random", x), mask_arguments("bits", x)):
        call = (x, *mask, weight, bias, mean, var, True, 0.1, 1e-5, True, True)
        torch.library.opcheck(ops.shaped_batch_norm, call)
        torch.library.opcheck(ops.shaped_batch_norm_, (x.clone(), *call[1:]))
        torch.library.opcheck(ops.shaped_batch_norm, (*call[:6], None, None, *call[8:]))
        _, ones, _, statistics = ops.shaped_batch_norm(*call)
        call = (torch.randn_like(x), ones, statistics, *mask, weight, bias, True, True, True)
        torch.library.opcheck(ops.shaped_batch_norm_backward, call)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"x": torch.zeros(3, 4)}, "4 dimensions"),
        ({"bias": None}, "both or neither"),
        ({"running_var": None}, "both or neither"),
        (
            {"weight": torch.zeros(4)},
            "weight must be contiguous, on the device of x, with 3 numbers",
        ),
        ({"running_mean": None, "running_var": None, "training": False}, "needed"),
        ({"x": torch.zeros(1, 3, 4, 4)[:, :, ::2]}, "dense in memory"),
    ),
)
def test_unsuitable_arguments_are_errors(kernels, change, message):
    call = {
        "x": torch.zeros(2, 3, 4, 4),
        "rng_state": None,
        "bits": None,
        "p_zero": 0.0,
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "relu": True,
        "clipped": False,
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.shaped_batch_norm(*call.values())


def test_unsuitable_statistics_are_errors(kernels):
    x, ones = torch.zeros(2, 3, 4, 4), torch.zeros(12, dtype=torch.uint8)
    for statistics in (torch.zeros(2, 4).double(), torch.zeros(2, 3), torch.zeros(3, 2).double().T):
        message = rf"statistics must be .* of 6 numbers, .*; it has {statistics.numel()} numbers"
        with pytest.raises(RuntimeError, match=message):
            ops.shaped_batch_norm_backward(
                x, ones, statistics, None, None, 0.0, None, None, True, True, True
            )


def test_no_elements():
    x = torch.zeros(0, 3, 4, 4)
    running = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    y, ones, _, statistics = ops.shaped_batch_norm(
        x, None, None, 0.0, None, None, *running, True, 0.1, 1e-5, True, False
    )
    assert y.shape == x.shape and ones.numel() == 0 and statistics.shape == (2, 3)
    assert running[0].tolist() == [1.0, 2.0, 3.0]
    dx, *_ = ops.shaped_batch_norm_backward(
        x, ones, statistics, None, None, 0.0, None, None, True, True, True
    )
    assert dx.shape == x.shape
