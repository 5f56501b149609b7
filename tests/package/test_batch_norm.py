"""ShapedBatchNorm2d equals the chain of reference shaping, nn.BatchNorm2d and ReLU."""

import copy
import itertools
import pickle

import pytest
import torch
from tensors import DTYPES, awkward
from torch import nn
from torch.library import opcheck

import fastshape
from fastshape import BitMask, ShapedBatchNorm2d, reference

ops = torch.ops.fastshape
FORMATS = (torch.contiguous_format, torch.channels_last)
MASKS = ("random", "target", "none")
GRADIENTS = ("straight_through", "clipped", "zero")
N, C, H, W = 3, 5, 4, 7
M = N * H * W


def unit(dtype):
    """The unit roundoff: the largest relative error of rounding."""
    return torch.finfo(dtype).eps / 2


def a_map(dtype=torch.float32, memory_format=torch.contiguous_format, seed=0, size=(N, C, H, W)):
    x = awkward(N * C * H * W, torch.float64, seed)[: torch.Size(size).numel()].view(size)
    return x.to(dtype).contiguous(memory_format=memory_format)


def a_mask(kind, seed=0):
    """Mask arguments for a module's forward and for `reference.differentiable_shape`, for both memory formats."""
    if kind == "random":
        state = fastshape.rng_state(seed)
        return {"rng_state": state}, lambda x: {"rng_state": state, "p_zero": 0.3}
    if kind == "none":
        return {}, lambda x: {}
    mask = torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(seed + 100)) > 0

    def bits(x):
        return {"bits": reference.pack(torch.empty_like(x).copy_(mask))}

    return {"mask": BitMask.from_bool(mask)}, bits


def per_channel(t):
    return t.detach().double().view(1, C, 1, 1)


def affine(bn, seed=0):
    """Weights of both signs, so that ReLU closes for zeros in some channels and for ones in others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return bn


class Chain(nn.Module):
    """The chain of modules that ShapedBatchNorm2d must equal, in one dtype."""

    def __init__(self, bn, gradient, relu):
        super().__init__()
        self.bn, self.gradient, self.relu = bn, gradient, relu

    def forward(self, x, **mask):
        if self.gradient == "zero":
            x = x.detach()
        y = self.bn(reference.differentiable_shape(x, gradient=self.gradient, **mask))
        return y.relu() if self.relu else y


def run(module, x, dy, **arguments):
    """y, dL/dx, dL/dweight, dL/dbias."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x, **arguments)
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad for p in module.parameters())


def test_by_hand():
    """One channel of four elements, with eps such that the deviation is 1."""
    module = ShapedBatchNorm2d(1, eps=0.75, relu=True)
    nn.init.constant_(module.weight, 2.0)
    nn.init.constant_(module.bias, 0.5)
    x = torch.tensor([1.0, -1.0, 2.0, 3.0]).view(1, 1, 2, 2).requires_grad_()
    mask = torch.tensor([True, True, False, True]).view(1, 1, 2, 2)
    y = module(x, mask)  # the binary map is 1 0 0 1, with mean 1/2 and var 1/4
    assert y.flatten().tolist() == [
        1.5,
        0.0,
        0.0,
        1.5,
    ]  # a one gives 0.5 + 2 (1 - 1/2); a zero gives 0.5 - 2 / 2, which ReLU makes 0
    assert module.running_mean.item() == pytest.approx(0.9 * 0 + 0.1 * 0.5)
    assert module.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 0.25 * 4 / 3)
    assert module.num_batches_tracked.item() == 1

    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2))
    assert module.bias.grad.item() == 5.0  # 1 + 4, because ReLU closes for the zeros
    assert module.weight.grad.item() == 2.5  # 5 (1 - 1/2)
    # 2 (dy - 5/4 - xhat 2.5/4), where xhat is 1/2 for a one and -1/2 for a zero, whose dy is 0; 0 where the mask is 0
    assert x.grad.flatten().tolist() == [-1.125, -1.875, 0.0, 4.875]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("training", (True, False))
def test_equals_the_chain_within_rounding(dtype, kind, gradient, training):
    """Compares with the chain in float64 and with the chain in the same dtype.

    u is the unit roundoff of the dtype, and v that of the arithmetic: float32, or float64 for float64. The error of y is u + v,
    because the exact y is rounded to float32 and to the dtype. dx is M (scale dy + shift) with scale = weight / sqrt(var + eps).
    Its error has 2 v of the product, for the rounding of scale and product; v of shift, which is at most |dx| + scale |dy|; v
    for the sum and u for dx itself. Running statistics, dweight and dbias are exact except for the rounding to their dtype. The
    chain of torch also rounds the mean (1), M squares and their sum (M + 1), var + eps, its root and the division (half of that,
    and 3), and scale, shift, product and sum (4).
    """
    u, v = unit(dtype), unit(torch.float64 if dtype == torch.float64 else torch.float32)
    subnormal = torch.finfo(dtype).smallest_normal * u  # half their distance
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    for memory_format, relu in itertools.product(FORMATS, (False, True)):
        module = affine(ShapedBatchNorm2d(
            C, dtype=of_parameters, p_zero=0.3 if kind == "random" else None, gradient=gradient, relu=relu, at_eval="on"
        ))  # fmt: skip
        module.running_mean.uniform_(0.2, 0.8)
        module.running_var.uniform_(0.1, 0.3)
        module.train(training)
        chain = Chain(nn.BatchNorm2d(C, dtype=of_parameters), gradient, relu).train(training)
        chain.bn.load_state_dict(module.state_dict())
        exact = copy.deepcopy(chain).double()

        x = a_map(dtype, memory_format)
        dy = (
            torch.randn(x.shape, dtype=torch.float64)
            .to(dtype)
            .contiguous(memory_format=memory_format)
        )
        here, there = a_mask(kind)
        y, dx, dweight, dbias = run(module, x, dy, **here)
        right = run(exact, x.double(), dy.double(), **there(x))
        assert y.dtype == dtype and y.stride() == x.stride()

        shaped = reference.differentiable_shape(x.double(), **there(x))
        mean, var = shaped.mean((0, 2, 3)), shaped.var((0, 2, 3), correction=0)
        if not training:
            mean, var = exact.bn.running_mean, exact.bn.running_var
        tiny = 1e-14  # the rounding errors of float64, relative to the largest term
        spread = (var + exact.bn.eps).rsqrt()
        scale = per_channel(exact.bn.weight.abs() * spread)
        terms = per_channel(exact.bn.bias.abs()) + (1 + per_channel(mean)) * scale
        error = (y.double() - right[0]).abs()
        assert (error <= (u + v) * right[0].abs() + subnormal + tiny * terms).all()
        error = (y.double() - run(chain, x, dy, **there(x))[0].double()).abs()
        assert (error <= (M / 2 + 12) * v * terms + 2 * u * right[0].abs() + 2 * subnormal).all()

        sums = dy.double().abs().sum((0, 2, 3))
        if gradient == "zero":
            assert dx is right[1] is None
        else:
            term, size = scale * dy.double().abs(), right[1].abs()
            rest = tiny * scale * per_channel(sums / M * (1 + spread**2))
            error = (dx.double() - right[1]).abs()
            assert (error <= v * (3 * term + 2 * size) + u * size + subnormal + rest).all()
        rounding = unit(of_parameters)
        for actual, expected, most in ((dweight, right[2], sums * spread), (dbias, right[3], sums)):
            assert ((actual - expected).abs() <= rounding * expected.abs() + tiny * most).all()
        for actual, expected in zip(module.buffers(), exact.bn.buffers(), strict=True):
            assert ((actual - expected).abs() <= rounding * expected.abs() + tiny).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
def test_float64_gradients(kind, gradient):
    """Autograd's gradients of the reference formulas are equal up to 1e-10, relative."""
    module = affine(ShapedBatchNorm2d(C, p_zero=0.3 if kind == "random" else None, relu=True,
                                      gradient=gradient).double())  # fmt: skip
    bn = nn.BatchNorm2d(C).double()
    bn.load_state_dict(module.state_dict())
    x, dy = torch.randn(2, N, C, H, W, dtype=torch.float64).unbind()
    here, there = a_mask(kind)
    actual = run(module, x, dy, **here)
    expected = run(Chain(bn, gradient, True), x, dy, **there(x))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10 * e.abs().max().item())


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("training", (False, True))
def test_gradcheck_of_weight_and_bias(relu, training):
    module = affine(ShapedBatchNorm2d(C, at_eval="on", relu=relu).double()).train(training)
    x = torch.randn(N, C, H, W, dtype=torch.float64)

    def function(weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(
        function, tuple(p.detach().requires_grad_() for p in module.parameters())
    )


@pytest.mark.parametrize("options", (
    {}, {"momentum": 0.3}, {"momentum": None}, {"affine": False}, {"track_running_stats": False},
    {"momentum": None, "affine": False}, {"affine": False, "track_running_stats": False}, {"eps": 0.01},
))  # fmt: skip
@pytest.mark.parametrize("p_zero", (None, 0.4))
def test_steps_then_evaluation_as_nn_batch_norm(options, p_zero):
    module = ShapedBatchNorm2d(C, p_zero=p_zero, at_eval="on", dtype=torch.float64, **options)
    bn = nn.BatchNorm2d(C, dtype=torch.float64, **options)
    for step in range(6):
        if step == 4:
            module.eval(), bn.eval()
        x = a_map(torch.float64, seed=step)
        state = fastshape.rng_state(step)
        shaped = reference.shape(x, None if p_zero is None else state, None, p_zero or 0.0, True)
        expected = bn(shaped)
        actual = module(x, rng_state=None if p_zero is None else state)
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item()
        )
        for name, right in bn.named_buffers():
            torch.testing.assert_close(
                dict(module.named_buffers())[name], right, rtol=1e-14, atol=0
            )


def test_tracking_switched_off():
    """If it is switched off after construction, evaluation uses the statistics, but they do not move."""
    module, bn = ShapedBatchNorm2d(C, at_eval="on"), nn.BatchNorm2d(C)
    module.track_running_stats = bn.track_running_stats = False
    x = a_map()
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), bn.train(training)((x > 0).float()))
    for actual, expected in zip(module.buffers(), bn.buffers(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("relu", (False, True))
def test_at_eval(relu):
    x, mask = a_map(), torch.randn(N, C, H, W)
    module = affine(ShapedBatchNorm2d(C, p_zero=0.5, relu=relu))
    module(x)
    module.eval()
    bn = nn.BatchNorm2d(C).eval()
    bn.load_state_dict(module.state_dict())

    def through(t):
        return bn(t).relu() if relu else bn(t)

    before = copy.deepcopy(module.state_dict())
    assert torch.equal(module(x).nan_to_num(), through(x).nan_to_num())
    assert torch.equal(module(x, mask).nan_to_num(), through(x).nan_to_num())
    module.at_eval = "binarize"
    binary = (x > 0).float()
    assert torch.allclose(module(x), through(binary)) and torch.allclose(module(x, mask), module(x))
    module.at_eval = "on"
    assert torch.allclose(module(x, mask), through(binary * (mask > 0)))
    assert len({module(x).sum().item() for _ in range(4)}) > 1  # a new mask each time
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


# ---- as a replacement of nn.BatchNorm2d ----


@pytest.mark.parametrize("options", ({}, {"affine": False}, {"track_running_stats": False}))
def test_checkpoints_can_be_exchanged(options):
    module, bn = ShapedBatchNorm2d(C, p_zero=0.3, **options), nn.BatchNorm2d(C, **options)
    assert isinstance(module, nn.BatchNorm2d)
    assert list(module.state_dict()) == list(bn.state_dict())
    module(a_map())
    bn.load_state_dict(module.state_dict())
    other = ShapedBatchNorm2d(C, **options)
    other.load_state_dict(bn.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])


def test_from_batch_norm_shares_everything():
    bn = affine(nn.BatchNorm2d(C, eps=0.1, momentum=None)).eval()
    module = ShapedBatchNorm2d.from_batch_norm(bn, p_zero=0.25, relu=True, gradient="clipped")
    for name, value in [*bn.named_parameters(), *bn.named_buffers()]:
        assert getattr(module, name) is value
    assert (module.eps, module.momentum, module.p_zero, module.relu) == (0.1, None, 0.25, True)
    assert not module.training and module.affine and module.track_running_stats
    optimizer = torch.optim.SGD(bn.parameters(), lr=1.0)
    before = bn.weight.clone()
    module.train()(a_map()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before) and bn.num_batches_tracked.item() == 1


def test_weight_without_bias():
    try:
        bn = nn.BatchNorm2d(C, bias=False)
    except TypeError:
        pytest.skip("this torch has no BatchNorm without bias")
    module = ShapedBatchNorm2d.from_batch_norm(bn)
    assert list(ShapedBatchNorm2d(C, bias=False).state_dict()) == list(bn.state_dict())
    x = torch.randn(N, C, H, W)
    module(x).square().sum().backward()
    actual, module.weight.grad = module.weight.grad, None
    bn((x > 0).float()).square().sum().backward()
    torch.testing.assert_close(actual, bn.weight.grad)


class Custom(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(("bn", "message"), (
    (nn.SyncBatchNorm(C), "must be a torch.nn.BatchNorm2d, not SyncBatchNorm, whose statistics are those of all"),
    (nn.BatchNorm1d(C), "not BatchNorm1d"),
    (Custom(C), "not Custom"),
))  # fmt: skip
def test_other_norms_are_errors(bn, message):
    with pytest.raises(TypeError, match=message):
        ShapedBatchNorm2d.from_batch_norm(bn)


def test_copies():
    module = affine(ShapedBatchNorm2d(C, p_zero=0.3, relu=True, gradient="clipped"))
    x = a_map()
    state = fastshape.rng_state(1)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, rng_state=state), copy.deepcopy(module)(x, rng_state=state))
        assert other.weight is not module.weight
    assert repr(module).endswith(
        "p_zero=0.3, gradient='clipped', at_eval='off', relu=True, inplace=False)"
    )


def test_mixed_precision():
    conv, module = nn.Conv2d(3, C, 3), affine(ShapedBatchNorm2d(C, p_zero=0.3, relu=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(conv(torch.randn(2, 3, 8, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32 == conv.weight.grad.dtype
    assert conv.weight.grad.abs().sum() > 0


def test_random_masks_are_those_of_shape():
    x, state = torch.randn(N, C, H, W), fastshape.rng_state(7)
    module = ShapedBatchNorm2d(C, p_zero=0.6)
    y = module(x, rng_state=state)
    shaped = fastshape.shape(x, p_zero=0.6, rng_state=state) > 0
    assert torch.equal(y > y.amin((0, 2, 3), keepdim=True), shaped)
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first) and not torch.equal(module(x), first)
    draw = [module(x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draw)


def test_strides_of_no_memory_format():
    x = torch.randn(N, C, H, 2 * W)[..., ::2]
    module = ShapedBatchNorm2d(C, p_zero=0.5, relu=True)
    state = fastshape.rng_state(1)
    y = module(x, rng_state=state)
    assert y.is_contiguous() and torch.equal(y, module(x.contiguous(), rng_state=state))
    x = x.requires_grad_()
    module(x, rng_state=state).sum().backward()
    assert x.grad.shape == x.shape
    # the gradient has another memory format than x
    first, second = (
        torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(2)) for _ in "ab"
    )
    first.requires_grad_(), second.requires_grad_()
    dy = torch.randn(N, C, H, W)
    module(first, rng_state=state).backward(dy)
    module(second, rng_state=state).backward(dy.contiguous(memory_format=torch.channels_last))
    assert torch.equal(first.grad, second.grad)


# ---- tensors saved for backward ----


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("inplace", (False, True))
def test_saved_bytes(kind, gradient, inplace):
    """Bits and numbers per channel, but no float tensor of the size of the map."""
    size = (8, 16, 16, 16)
    n = torch.Size(size).numel()
    saved = {}
    module = ShapedBatchNorm2d(
        16, p_zero=0.3 if kind == "random" else None, gradient=gradient, relu=True, inplace=inplace
    )
    mask = BitMask.random(size, 0.5) if kind == "target" else None
    x = torch.randn(size, requires_grad=True) * 1.0

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x, mask)
    assert y.requires_grad
    floats = sum(t.numel() for t in saved.values() if t.is_floating_point())
    assert floats == 4 * 16  # mean, deviation, weight, bias
    bits = sum(t.numel() for t in saved.values() if t.dtype == torch.uint8)
    assert bits == n // 8 * (1 + (gradient == "clipped" or kind == "target"))
    states = [t for t in saved.values() if t.dtype == torch.int64]
    assert sum(t.nbytes for t in states) == (
        16 if kind == "random" and gradient != "clipped" else 0
    )


# ---- in place ----


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_place_writes_into_a_conv_output(gradient, memory_format):
    conv = nn.Conv2d(3, C, 3).to(memory_format=memory_format)
    image = torch.randn(2, 3, 8, 8).contiguous(memory_format=memory_format)
    module = affine(ShapedBatchNorm2d(C, p_zero=0.3, gradient=gradient, relu=True))
    results = []
    for inplace in (False, True):
        module.inplace = inplace
        conv.zero_grad(), module.zero_grad()
        z = conv(image)
        version = z._version
        y = module(z, rng_state=fastshape.rng_state(1))
        assert (y.data_ptr() == z.data_ptr()) == inplace
        assert (z._version > version) == inplace
        assert (y is z) == (inplace and gradient != "zero")  # "zero" detaches y
        y.square().sum().backward()
        parameters = (*conv.parameters(), *module.parameters())
        results.append([y, *(None if p.grad is None else p.grad.clone() for p in parameters)])
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_in_place_on_an_x_that_backward_needs_raises():
    module = ShapedBatchNorm2d(C, inplace=True)
    x = torch.randn(N, C, H, W, requires_grad=True)
    y = module(x.exp())  # the backward of exp needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_leaf_and_on_a_view():
    module = ShapedBatchNorm2d(C, inplace=True)
    leaf = torch.randn(N, C, H, W, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace=True: input is a leaf"):
        module(leaf)
    base = torch.randn(N * C * H * W, requires_grad=True) * 1.0
    before = base.detach().clone()
    module(base.view(N, C, H, W)).square().sum().backward()
    assert torch.equal(base, before)
    with torch.no_grad():
        assert module(leaf).data_ptr() == leaf.data_ptr()


# ---- errors, and behaviour that equals torch's ----


@pytest.mark.parametrize(("error", "message", "arguments"), (
    (ValueError, "p_zero=1.0: must be in", {"p_zero": 1.0}),
    (ValueError, "gradient='none': allowed are straight_through, clipped, zero", {"gradient": "none"}),
    (ValueError, "at_eval='random': allowed are off, binarize, on", {"at_eval": "random"}),
))  # fmt: skip
def test_bad_settings_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        ShapedBatchNorm2d(C, **arguments)


state = fastshape.rng_state(1)


@pytest.mark.parametrize(("error", "message", "input", "arguments"), (
    (ValueError, "expected 4D input", (C, H, W), {}),
    (ValueError, "input has 4 channels, num_features is 5", (N, 4, H, W), {}),
    (ValueError, "Expected more than 1 value per channel when training", (1, C, 1, 1), {}),
    (ValueError, "mask has shape", (N, C, H, W), {"mask": torch.ones(N, C, H, 1)}),
    (TypeError, "mask: must be a BitMask or a tensor", (N, C, H, W), {"mask": 1}),
    (TypeError, "rng_state: must be an int64 tensor", (N, C, H, W), {"rng_state": torch.ones(2)}),
    (ValueError, "go with a random mask", (N, C, H, W), {"rng_state": state, "mask": torch.ones(N, C, H, W)}),
    (ValueError, "give one of them", (N, C, H, W), {"rng_state": state, "generator": torch.Generator()}),
))  # fmt: skip
def test_bad_calls_are_named(error, message, input, arguments):
    with pytest.raises(error, match=message):
        ShapedBatchNorm2d(C, p_zero=0.5)(torch.randn(input), **arguments)


def test_more_errors():
    with pytest.raises(TypeError, match="dtype torch.int64 cannot be shaped"):
        ShapedBatchNorm2d(C)(torch.ones(N, C, H, W, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps=0.0: must be positive"):
        ShapedBatchNorm2d(C, eps=0.0)(torch.randn(N, C, H, W))
    with pytest.raises(ValueError, match="go with a random mask: set p_zero"):
        ShapedBatchNorm2d(C)(torch.randn(N, C, H, W), rng_state=state)
    with pytest.raises(NotImplementedError, match="fastshape has no vmap rule"):
        torch.func.vmap(ShapedBatchNorm2d(C, track_running_stats=False))(torch.randn(2, N, C, H, W))


def test_one_value_per_channel_is_enough_with_running_statistics():
    module = ShapedBatchNorm2d(C, at_eval="on").eval()
    module(torch.randn(1, C, 1, 1))
    module = ShapedBatchNorm2d(C, at_eval="on", track_running_stats=False).eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1, C, 1, 1))


@pytest.mark.parametrize("size", ((0, C, H, W), (N, C, 0, W)))
@pytest.mark.parametrize("relu", (False, True))
def test_empty_batch_is_as_in_torch(size, relu):
    module, bn = ShapedBatchNorm2d(C, p_zero=0.5, relu=relu), nn.BatchNorm2d(C)
    x = torch.empty(size, requires_grad=True)
    y, expected = module(x), bn(x.detach())
    assert y.shape == expected.shape
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(module.weight.grad, bn.weight.grad)
    for a, b in zip(module.buffers(), bn.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_an_error():
    module = ShapedBatchNorm2d(C)
    x = torch.randn(N, C, H, W, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="ShapedBatchNorm2d cannot be differentiated"):
        grad.sum().backward()


def test_func_grad():
    module = affine(ShapedBatchNorm2d(C, p_zero=0.3, relu=True, track_running_stats=False))
    x = torch.randn(N, C, H, W)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(
            module, parameters, (x,), {"rng_state": state}
        ).square().sum()  # fmt: skip

    grads = torch.func.grad(loss)(parameters)
    module(x, rng_state=state).square().sum().backward()
    for name, p in module.named_parameters():
        assert torch.equal(grads[name], p.grad)


def test_deterministic():
    """Counts are integers and sums have a fixed order, so that threads and runs make no difference."""
    module = affine(ShapedBatchNorm2d(8, p_zero=0.3, relu=True))
    x, dy = torch.randn(2, 4, 8, 33, 35).unbind()
    first = run(module, x, dy, rng_state=state)
    for _ in range(3):
        for a, b in zip(run(module, x, dy, rng_state=state), first, strict=True):
            assert torch.equal(a, b)


# ---- torch.compile and opcheck ----


@pytest.mark.parametrize("training", (True, False))
def test_compile_fullgraph(training):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = affine(ShapedBatchNorm2d(C, p_zero=0.3, relu=True, inplace=True, at_eval="on")).train(
        training
    )
    module = copy.deepcopy(eager)
    compiled = torch.compile(lambda x, s: module(x * 2, rng_state=s), fullgraph=True, dynamic=True)
    for rows in (2, 3, 5):
        x = torch.randn(rows, C, H, W)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        s = fastshape.rng_state(rows)
        expected, actual = eager(a * 2, rng_state=s), compiled(b, s)
        assert torch.equal(actual, expected)
        weight = torch.randn(x.shape)
        (expected * weight).sum().backward()
        (actual * weight).sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    for p, q in zip(eager.parameters(), module.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(eager.buffers(), module.buffers(), strict=True):
        assert torch.equal(p, q)
    drawing = torch.compile(module, fullgraph=True)
    assert not torch.equal(drawing(x), drawing(x))


def samples(name):
    """Arguments of an op: all mask sources, dtypes and memory formats."""
    x = torch.randn(2, 3, 4, 5)
    mask = torch.randint(256, (15,), dtype=torch.uint8)
    for dtype, memory_format in zip(DTYPES, (*FORMATS, *FORMATS), strict=True):
        t = x.to(dtype).contiguous(memory_format=memory_format)
        weight, bias, mean, var = torch.rand(4, 3)
        for arguments in (
            (t, state, None, 0.3, weight, bias, mean, var, True, 0.1, 1e-5, True, False),
            (t, None, mask, 0.0, weight, bias, None, None, True, 0.1, 1e-5, False, True),
            (t, None, None, 0.0, None, None, mean, var, False, 0.0, 1e-5, True, False),
        ):
            if name != "shaped_batch_norm_backward":
                yield arguments
                continue
            _, ones, _, statistics = ops.shaped_batch_norm.default(*arguments)
            _, *source, weight, bias, _, _, training, _, _, relu, _ = arguments
            yield (t, ones, statistics, *source, weight, bias, training, relu, dtype != DTYPES[0])


@pytest.mark.parametrize(
    "name", ("shaped_batch_norm", "shaped_batch_norm_", "shaped_batch_norm_backward")
)
def test_opcheck(name):
    for arguments in samples(name):
        opcheck(getattr(ops, name).default, arguments)


# ---- SyncBatchNorm ----


def children(module):
    return [name for name, _ in module.named_children()]


@pytest.mark.parametrize("place", (lambda m: m, nn.Sequential, lambda m: nn.ModuleDict({"a": m})))
@pytest.mark.parametrize("relu", (False, True))
def test_conversion_to_sync_batch_norm_is_refused(place, relu):
    module = ShapedBatchNorm2d(C, relu=relu)
    model = place(module)
    message = r"ShapedBatchNorm2d cannot become a SyncBatchNorm.*fastshape\.ActivationShaping.*method='hooks'"
    with pytest.raises(RuntimeError, match=message):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert module in list(model.modules()) and type(module) is ShapedBatchNorm2d
    module.qconfig = None  # an attribute that the conversion looks for
    with pytest.raises(RuntimeError, match=message):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def test_conversion_of_what_replaces_it():
    chain = nn.Sequential(fastshape.ActivationShaping(0.3), nn.BatchNorm2d(C), nn.ReLU())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(chain)
    assert [type(m).__name__ for m in converted] == ["ActivationShaping", "SyncBatchNorm", "ReLU"]


def test_refusal_of_the_conversion_hinders_nothing_else():
    module = ShapedBatchNorm2d(C, p_zero=0.5)
    assert children(module) == [] and list(module.children()) == []
    assert children(pickle.loads(pickle.dumps(module))) == children(copy.deepcopy(module)) == []
    visited = []
    nn.Sequential(module).eval().apply(visited.append)
    assert module in visited and not module.training
    assert not hasattr(module, "qconfig")
    module.extra = nn.Linear(1, 1)
    assert children(module) == ["extra"]


def test_compiled_code_may_ask_for_children():
    module = nn.Sequential(ShapedBatchNorm2d(C, p_zero=0.5))

    def function(x):
        module.train()
        return module(x) * len(list(module[0].children()))

    x = a_map()
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, torch.zeros_like(y))
