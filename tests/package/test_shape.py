"""shape(): values and gradients of the backend in use equal the reference bit for bit."""

import pytest
import torch
from tensors import DTYPES, SIZES, as_bits, assert_same_bits, awkward

import fastshape
from fastshape import BitMask, reference

MASKS = ("random", "target", "none")


def mask_arguments(kind: str, x: torch.Tensor, p_zero: float = 0.37) -> dict:
    if kind == "random":
        return {"p_zero": p_zero, "rng_state": torch.tensor([1234567, 2**32 - 2])}
    if kind == "target":
        target = awkward(x.numel(), torch.float32, seed=9)
        return {"mask": target.as_strided(x.shape, x.stride())}
    return {}


def reference_arguments(arguments: dict) -> tuple:
    bits = BitMask.from_tensor(arguments["mask"]).bits if "mask" in arguments else None
    return arguments.get("rng_state"), bits, arguments.get("p_zero", 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("binarize", (True, False))
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
def test_equals_reference_bit_for_bit(dtype, kind, binarize, inplace, gradient):
    for n in SIZES:
        x = awkward(n, dtype)
        arguments = mask_arguments(kind, x)
        expected_x = x.clone().requires_grad_()
        expected = reference.differentiable_shape(
            expected_x, *reference_arguments(arguments), binarize, gradient
        )
        actual_x = x.clone().requires_grad_()
        actual = fastshape.shape(
            actual_x.clone() if inplace else actual_x,
            binarize=binarize,
            gradient=gradient,
            inplace=inplace,
            **arguments,
        )
        assert_same_bits(actual, expected)
        grad = awkward(n, dtype, seed=5)
        expected.backward(grad)
        actual.backward(grad)
        assert_same_bits(actual_x.grad, expected_x.grad)


@pytest.mark.parametrize("count", (1, 2, 3))
def test_thread_count_and_simd_change_nothing(simd, threads, count):
    threads(count)
    for dtype in DTYPES:
        x = awkward(200_003, dtype)
        for kind in MASKS:
            arguments = mask_arguments(kind, x)
            rng_state, bits, p_zero = reference_arguments(arguments)
            for binarize in (True, False):
                y = fastshape.shape(x, binarize=binarize, **arguments)
                assert_same_bits(y, reference.shape(x, rng_state, bits, p_zero, binarize))
                expected = reference.shape_clipped(x, rng_state, bits, p_zero, binarize)
                actual = torch.ops.fastshape.shape_clipped(x, rng_state, bits, p_zero, binarize)
                assert_same_bits(actual[0], expected[0])
                assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("p_zero", (0, 1 / 65536, 0.5, 1 - 1 / 65536))
def test_extreme_probabilities(p_zero):
    x, state = awkward(1000, torch.float32), fastshape.rng_state(3)
    y = fastshape.shape(x, p_zero=p_zero, rng_state=state)
    assert_same_bits(y, reference.shape(x, state, None, p_zero, True))
    if p_zero == 0:
        assert torch.equal(y, (x > 0).float())


def test_values_by_hand():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-1.0, 2.0, 0.0, -0.0, nan, inf, -inf, 1e-45])
    assert fastshape.shape(x).tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert fastshape.shape(x, mask=mask).tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    kept = fastshape.shape(
        torch.tensor([3.0, inf, nan, -2.0]), mask=torch.tensor([1.0, 0, 0, 0]), binarize=False
    )
    assert kept.tolist() == [3, 0, 0, 0] and not torch.signbit(kept).any()


def test_gradients_by_hand():
    def gradient_of(gradient, **arguments):
        x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0], requires_grad=True)
        y = fastshape.shape(x, gradient=gradient, mask=torch.tensor([1.0, 1, 0, 1, 1]), **arguments)
        y.backward(torch.tensor([1.0, 2, 3, 4, 5]))
        return x.grad.tolist()

    assert gradient_of("straight_through") == [1, 2, 0, 4, 5]
    assert gradient_of("clipped") == [0, 2, 0, 4, 0]
    assert gradient_of("straight_through", binarize=False) == [1, 2, 0, 4, 5]


@pytest.mark.parametrize("inplace", (False, True))
def test_gradient_zero_detaches_the_result(inplace):
    weight = torch.randn(8, requires_grad=True)
    y = fastshape.shape(weight * 1, p_zero=0.5, gradient="zero", inplace=inplace)
    assert not y.requires_grad
    other = torch.randn(8, requires_grad=True)
    (y * other).sum().backward()
    assert weight.grad is None and other.grad is not None


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("inplace", (False, True))
def test_channels_last_is_kept_and_numbered_in_memory_order(kind, inplace):
    x = awkward(2 * 5 * 6 * 7, torch.float32).view(2, 6, 7, 5).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    arguments = mask_arguments(kind, x)
    expected_x, actual_x = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = reference.differentiable_shape(
        expected_x, *reference_arguments(arguments), True, "clipped"
    )
    actual = fastshape.shape(actual_x.clone(), gradient="clipped", inplace=inplace, **arguments)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(actual, expected)
    # The gradient has the other memory format. The mask must still belong to the right elements.
    grad = torch.randn(x.shape)
    expected.backward(grad)
    actual.backward(grad)
    assert torch.equal(actual_x.grad, expected_x.grad)


def test_a_mask_of_one_memory_format_serves_the_other():
    x, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = (x > 0).float() * (target > 0)
    for x_format in (torch.contiguous_format, torch.channels_last):
        for target_format in (torch.contiguous_format, torch.channels_last):
            mask = BitMask.from_tensor(target.contiguous(memory_format=target_format))
            y = fastshape.shape(x.contiguous(memory_format=x_format), mask=mask)
            assert torch.equal(y, expected)


@pytest.mark.parametrize("inplace", (False, True))
def test_other_strides_are_numbered_as_if_contiguous(inplace):
    base = torch.randn(40, 60)
    state = fastshape.rng_state(8)
    views = (lambda b: b.t(), lambda b: b[:, ::3], lambda b: b[5:, 7:], lambda b: b[::2].t())
    for view in views:
        expected = fastshape.shape(view(base).contiguous(), p_zero=0.4, rng_state=state)
        storage = base.clone()
        y = fastshape.shape(view(storage), p_zero=0.4, rng_state=state, inplace=inplace)
        assert torch.equal(y, expected)
        if inplace:
            assert torch.equal(view(storage), expected)
            untouched = torch.ones_like(base, dtype=torch.bool)
            view(untouched).fill_(False)
            assert torch.equal(storage[untouched], base[untouched])
        else:
            assert torch.equal(storage, base)
        leaf = view(base).detach().requires_grad_()
        fastshape.shape(leaf, p_zero=0.4, rng_state=state).sum().backward()
        kept = BitMask.random(leaf.shape, 0.4, rng_state=state).to_bool()
        assert torch.equal(leaf.grad, kept.float())


def test_input_is_a_slice_of_a_larger_tensor():
    # The slice is not aligned to a vector, and its neighbours must not change.
    storage = torch.full((1000,), 7.0)
    x = storage[3:900]
    fastshape.shape(x, p_zero=0.5, inplace=True)
    assert torch.equal(storage[:3], torch.full((3,), 7.0)) and torch.equal(
        storage[900:], torch.full((100,), 7.0)
    )
    assert set(x.tolist()) == {0.0, 1.0}


def test_expanded_gradient():
    x = torch.randn(4, 5, requires_grad=True)
    fastshape.shape(x, mask=torch.ones(4, 5)).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 5))


def test_zero_dimensions_and_empty():
    assert fastshape.shape(torch.tensor(2.0)).item() == 1
    assert fastshape.shape(torch.tensor(2.0), p_zero=1 - 1 / 65536).item() == 0
    for shape in ((0,), (0, 3), (2, 0, 4, 4)):
        x = torch.empty(shape, requires_grad=True)
        y = fastshape.shape(x, p_zero=0.5)
        y.sum().backward()
        assert y.shape == shape and x.grad.shape == shape


def test_input_changes_only_in_place():
    x = awkward(1000, torch.float32)
    before = as_bits(x).clone()
    fastshape.shape(x, p_zero=0.5)
    assert torch.equal(as_bits(x), before)
    y = fastshape.shape(x, p_zero=0.5, inplace=True)
    assert y.data_ptr() == x.data_ptr() and not torch.equal(as_bits(x), before)


def test_each_call_draws_a_new_mask_and_a_seed_repeats_it():
    x = torch.ones(1000)
    torch.manual_seed(0)
    first, second = fastshape.shape(x, p_zero=0.5), fastshape.shape(x, p_zero=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(fastshape.shape(x, p_zero=0.5), first)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(fastshape.shape(x, p_zero=0.5, generator=generator), first)


def saved_bytes(function, *inputs) -> int:
    sizes = {}

    def keep(t):
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*inputs)
    return sum(sizes.values())


def test_saved_for_backward():
    x = torch.randn(8, 1000, requires_grad=True)
    mask = BitMask.from_tensor(torch.randn(8, 1000))
    assert saved_bytes(lambda: fastshape.shape(x, p_zero=0.5)) == 16
    assert saved_bytes(lambda: fastshape.shape(x, mask=mask)) == 1000
    assert saved_bytes(lambda: fastshape.shape(x)) == 0
    assert saved_bytes(lambda: fastshape.shape(x, p_zero=0.5, gradient="clipped")) == 1000
    assert saved_bytes(lambda: fastshape.shape(x, mask=mask, gradient="clipped")) == 1000


@pytest.mark.slow
@pytest.mark.skipif(
    fastshape.backend_info()["cpu"] == "reference",
    reason="the reference needs tens of bytes per element, more memory than most machines have",
)
def test_more_than_2_31_elements():
    n = 2**31 + 77
    x = torch.ones(n, dtype=torch.float16)
    x[-5:] = -1
    state = torch.tensor([5, 2**32 - 1000])
    fastshape.shape(x, p_zero=0.5, rng_state=state, inplace=True)
    # Draws are numbered by element, so that the tail equals a small mask with a later offset.
    start = n // 8 * 8 - 8000
    expected = reference.random_mask(torch.tensor([5, state[1] + start // 8]), n - start, 0.5)
    expected[-5:] = False
    assert torch.equal(x[start:].bool(), expected)
    middle = slice(2**31 - 800, 2**31 + 8)
    offset = torch.tensor([5, state[1] + middle.start // 8])
    assert torch.equal(x[middle].bool(), reference.random_mask(offset, 808, 0.5))
    mask = BitMask.from_tensor(x)
    assert mask.numel() == n and torch.equal(mask.bits[start // 8 :], reference.pack(x[start:]))
