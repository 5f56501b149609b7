"""Errors for bad input to fastshape: their types, and that they name the argument, the value and the allowed range."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastshape
from fastshape import BitMask, ShapedBatchNorm2d, reference, rng_state, shape
from fastshape.rng import realised_rate

x = torch.randn(3, 4)
nan = float("nan")


@pytest.mark.parametrize("p_zero", (1, 1.0, -0.1, 1.5, nan, float("inf")))
def test_p_zero_outside_its_range(p_zero):
    with pytest.raises(ValueError, match=rf"p_zero={p_zero}: must be in \[0, 1\)"):
        shape(x, p_zero=p_zero)
    with pytest.raises(ValueError, match="p_zero"):
        BitMask.random((3,), p_zero)
    with pytest.raises(ValueError, match="p_zero"):
        fastshape.ActivationShaping(p_zero)


@pytest.mark.parametrize("p_zero", ("0.5", True, [0.5], np.bool_(True), torch.tensor(0.5)))
def test_p_zero_of_a_wrong_type(p_zero):
    with pytest.raises(TypeError, match="p_zero=.*must be a number"):
        shape(x, p_zero=p_zero)


def test_modules_and_long_values_given_by_mistake_are_not_printed_whole():
    for value in (torch.nn.Conv2d(3, 4, 3), torch.nn.Parameter(torch.randn(9)), ["long"] * 999):
        with pytest.raises(TypeError) as caught:
            shape(x, p_zero=value)
        assert len(str(caught.value)) < 150
        with pytest.raises(TypeError) as caught:
            rng_state(value)
        assert len(str(caught.value)) < 150
    with pytest.raises(TypeError, match=r"^p_zero=Conv2d\(\.\.\.\): must be a number"):
        shape(x, p_zero=torch.nn.Conv2d(3, 4, 3))


# A rate is a multiple of 1/65536. 0.5/65536 rounds to 0, and 65535.5/65536 to 1: ties go to even.
@pytest.mark.parametrize(
    ("p_zero", "becomes"),
    (
        (5e-324, 0),
        (1e-9, 0),
        (np.float32(1e-6), 0),
        (0.5 / 65536, 0),
        (Fraction(1, 10**30), 0),
        (65535.5 / 65536, 1),
        (1 - 1e-6, 1),
        (1 - 2**-53, 1),
    ),
)
def test_p_zero_that_would_be_rounded_to_0_or_1(p_zero, becomes):
    message = rf"p_zero={p_zero}: would be rounded to {becomes}, because a rate is a multiple of 1/65536; allowed are 0 and"
    for refuses in (
        lambda: shape(x, p_zero=p_zero),
        lambda: BitMask.random((3,), p_zero),
        lambda: fastshape.ActivationShaping(p_zero),
        lambda: fastshape.ShapedBatchNorm2d(3, p_zero=p_zero),
        lambda: realised_rate(p_zero),
    ):
        with pytest.raises(ValueError, match=message):
            refuses()


@pytest.mark.parametrize(
    ("p_zero", "rate"),
    (
        (0, 0.0),
        (np.nextafter(0.5 / 65536, 1), 1 / 65536),
        (1e-5, 1 / 65536),
        (1.5 / 65536, 2 / 65536),
        (0.5, 0.5),
        (np.float32(0.25), 0.25),
        (0.7, 45875 / 65536),
        (np.nextafter(65535.5 / 65536, 0), 65535 / 65536),
    ),
)
def test_realised_rate_is_the_threshold_of_the_draws(p_zero, rate):
    assert realised_rate(p_zero) == rate and isinstance(realised_rate(p_zero), float)
    draws = 2**16 * 8
    mask = BitMask.random((draws,), p_zero, rng_state=rng_state(5))
    assert mask == BitMask.random((draws,), rate, rng_state=rng_state(5))
    assert reference.drop_threshold(p_zero) == rate * 65536
    assert (mask.density() < 1) == (rate > 0) and mask.density() > 0


@pytest.mark.parametrize("make", (fastshape.ActivationShaping, lambda: ShapedBatchNorm2d(3)))
def test_attributes_are_checked_when_they_are_set(make):
    module = make()
    for name, value, error, message in (
        ("p_zero", 2, ValueError, r"p_zero=2: must be in \[0, 1\)"),
        ("p_zero", nan, ValueError, "p_zero=nan"),
        ("p_zero", 1e-9, ValueError, "p_zero=1e-09: would be rounded to 0"),
        ("p_zero", "0.5", TypeError, "p_zero='0.5': must be a number"),
        ("p_zero", np.float64(1.5), ValueError, "p_zero=1.5"),
        ("gradient", "x", ValueError, "gradient='x': allowed are straight_through, clipped, zero"),
        ("gradient", None, ValueError, "gradient=None: allowed are"),
        ("at_eval", True, ValueError, "at_eval=True: allowed are off, binarize, on"),
        ("inplace", "no", TypeError, "inplace='no': must be True or False"),
        ("inplace", 1, TypeError, "inplace=1: must be True or False"),
        (
            "inplace",
            torch.tensor(True),
            TypeError,
            r"inplace=Tensor\(\.\.\.\): must be True or False",
        ),
    ):
        before = getattr(module, name)
        with pytest.raises(error, match=message):
            setattr(module, name, value)
        assert getattr(module, name) == before
    other = "binarize" if isinstance(module, fastshape.ActivationShaping) else "relu"
    with pytest.raises(TypeError, match=f"{other}='no': must be True or False"):
        setattr(module, other, "no")
    for name, value, kept in (
        ("p_zero", np.float32(0.25), 0.25),
        ("p_zero", np.int64(0), 0.0),
        ("p_zero", None, None),
        ("gradient", np.str_("zero"), "zero"),
        ("at_eval", "on", "on"),
        ("inplace", np.bool_(True), True),
        (other, False, False),
    ):
        setattr(module, name, value)
        assert getattr(module, name) == kept and type(getattr(module, name)) is type(kept)
    module.note, module.child = "anything", torch.nn.ReLU()  # what is no setting is not checked
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.extra_repr() == module.extra_repr() and copied.at_eval == "on"
        with pytest.raises(ValueError, match="at_eval"):
            copied.at_eval = "maybe"


def test_a_rate_that_is_set_is_the_rate_of_the_next_call():
    module = fastshape.ActivationShaping(0.1)
    ones = torch.ones(2**16)
    for p_zero in (0.5, np.float64(0.9), 0.0):
        module.p_zero = p_zero
        assert module(ones).mean().item() == pytest.approx(1 - p_zero, abs=0.02)


@pytest.mark.parametrize(
    "dtype", (torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64), ids=str
)
def test_x_of_a_dtype_that_cannot_be_shaped(dtype):
    with pytest.raises(TypeError, match=f"x: dtype {dtype}.*float16, bfloat16, float32, float64"):
        shape(torch.zeros(3, dtype=dtype))


def test_x_that_is_no_dense_tensor():
    with pytest.raises(TypeError, match="x: must be a tensor, not list"):
        shape([1.0])
    with pytest.raises(TypeError, match="x: layout torch.sparse_coo"):
        shape(torch.eye(3).to_sparse())


def test_mask_of_another_shape():
    for mask in (torch.ones(4, 3), BitMask.from_tensor(torch.ones(4, 3))):
        with pytest.raises(ValueError, match=r"mask has shape \(4, 3\), x \(3, 4\)"):
            shape(x, mask=mask)


def test_mask_of_another_device():
    mask = torch.ones(3, 4, device="meta")
    with pytest.raises(ValueError, match="mask is on meta, x on cpu"):
        shape(x, mask=BitMask(torch.zeros(2, dtype=torch.uint8, device="meta"), (3, 4)))
    with pytest.raises(ValueError, match="mask is on meta, x on cpu"):
        shape(x, mask=mask)


@pytest.mark.parametrize(
    "mask", (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.complex64))
)
def test_mask_of_another_dtype(mask):
    with pytest.raises(TypeError, match="mask: must be a BitMask or a tensor of"):
        shape(x, mask=mask)


def test_mask_of_a_wrong_type():
    with pytest.raises(TypeError, match="mask: must be a BitMask or a tensor of.*not str"):
        shape(x, mask="sketch")


def test_arguments_that_exclude_each_other():
    with pytest.raises(ValueError, match="p_zero and mask"):
        shape(x, p_zero=0.5, mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="go with p_zero"):
        shape(x, rng_state=rng_state(1))
    with pytest.raises(ValueError, match="go with p_zero"):
        shape(x, mask=torch.ones(3, 4), generator=torch.Generator())
    with pytest.raises(ValueError, match="not both"):
        shape(x, p_zero=0.5, rng_state=rng_state(1), generator=torch.Generator())
    with pytest.raises(ValueError, match="not both"):
        rng_state(1, generator=torch.Generator())


def test_unknown_gradient():
    with pytest.raises(
        ValueError, match="gradient='exact': allowed are straight_through, clipped, zero"
    ):
        shape(x, gradient="exact")
    with pytest.raises(ValueError, match="gradient='exact'"):
        fastshape.ActivationShaping(gradient="exact")
    with pytest.raises(ValueError, match="at_eval='maybe': allowed are off, binarize, on"):
        fastshape.ActivationShaping(at_eval="maybe")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    (
        (torch.zeros(2), TypeError, "int64 tensor .*not torch.float32"),
        ([1, 2], TypeError, "not list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \(2,\), not \(3,\)"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "rng_state is on meta, x on cpu",
        ),
    ),
)
def test_rng_state_of_a_wrong_type_shape_or_device(state, error, message):
    with pytest.raises(error, match=message):
        shape(x, p_zero=0.5, rng_state=state)


@pytest.mark.parametrize("seed", (1.5, True, "1"))
def test_seed_of_a_wrong_type(seed):
    with pytest.raises(TypeError, match="seed="):
        rng_state(seed)


def test_seed_that_does_not_fit():
    with pytest.raises(ValueError, match="must fit 64 bits"):
        rng_state(2**64)


def test_in_place_on_a_leaf_loses_nothing():
    leaf = torch.randn(5, requires_grad=True)
    before = leaf.detach().clone()
    for gradient in ("straight_through", "clipped", "zero"):
        with pytest.raises(RuntimeError, match="leaf that requires a gradient"):
            shape(leaf, p_zero=0.5, gradient=gradient, inplace=True)
        assert torch.equal(leaf, before)


@pytest.mark.skipif(
    fastshape.backend_info()["cpu"] == "reference", reason="the reference reads any strides"
)
def test_ops_check_their_arguments():
    ops, state = torch.ops.fastshape, rng_state(1)
    with pytest.raises(RuntimeError, match="dense"):
        ops.shape(torch.randn(1, 8).expand(8, 8), None, None, 0.0, True)
    with pytest.raises(RuntimeError, match="2 bytes for 12 elements"):
        ops.shape(x, None, torch.zeros(1, dtype=torch.uint8), 0.0, True)
    with pytest.raises(RuntimeError, match="rng_state must be"):
        ops.shape(x, state.int(), None, 0.5, True)
    with pytest.raises(RuntimeError, match="p_zero must be in"):
        ops.shape(x, state, None, 1.0, True)
    with pytest.raises(RuntimeError, match="cannot be shaped"):
        ops.shape(x.long(), None, None, 0.0, True)
    with pytest.raises(RuntimeError, match="n must not be negative"):
        ops.pack_random(state, -1, 0.5)
