"""Errors for bad input to fastshape: their types, and that they name the argument, the value and the allowed range."""

import pytest
import torch

import fastshape
from fastshape import BitMask, rng_state, shape

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


@pytest.mark.parametrize("p_zero", ("0.5", True, [0.5]))
def test_p_zero_of_a_wrong_type(p_zero):
    with pytest.raises(TypeError, match="p_zero=.*must be a number"):
        shape(x, p_zero=p_zero)


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
