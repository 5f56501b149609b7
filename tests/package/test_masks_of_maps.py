"""Masks of recorded maps and of blocks, against values worked out by hand."""

import copy
import pickle

import pytest
import torch
from tensors import DTYPES, awkward

import fastshape
from fastshape import BitMask, above, majority, random_blocks, top_k


def test_above():
    x = torch.tensor([[0.5, 0.6, float("nan"), -1.0]])
    assert above(0.5)(x).to_bool().tolist() == [[False, True, False, False]]
    assert above(0)(x) == BitMask.from_tensor(x)


def test_top_k_by_hand():
    x = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [-1.0, -2.0]]]])
    half = top_k(0.5)(x).to_bool()
    assert half.tolist() == [[[[False, True], [True, False]], [[True, True], [False, False]]]]
    assert top_k(0.01)(x).to_bool().flatten(2).sum(2).tolist() == [[1, 1]]  # never none
    assert top_k(0.75)(x).to_bool()[0, 1].tolist() == [[True, True], [True, False]]
    assert top_k(1.0)(x).to_bool().all()
    assert top_k(0.25)(torch.arange(10.0).view(1, 1, 10)).to_bool().sum() == 2  # 2.5, half to even
    sample = top_k(0.5, by="sample")(x).to_bool()
    assert sample.tolist() == [[[[True, True], [True, True]], [[False, False], [False, False]]]]


@pytest.mark.parametrize("by", ("sample", "channel"))
def test_top_k_counts_row_major_in_any_memory_format(by):
    x = torch.randint(0, 3, (2, 4, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    last = x.contiguous(memory_format=torch.channels_last)
    mask = top_k(0.3, by)(x)
    assert mask == top_k(0.3, by)(last)
    dims = 1 if by == "sample" else 2
    rows = x.flatten(dims).flatten(0, dims - 1), mask.to_bool().flatten(dims).flatten(0, dims - 1)
    for row, kept in zip(*rows, strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[: round(0.3 * len(row))]
        assert kept.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("by", ("sample", "channel"))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.int64), ids=str)
def test_top_k_equals_a_stable_sort(by, dtype):
    x = awkward(4 * 6 * 7 * 9, torch.float32).view(6, 4, 7, 9).transpose(0, 1)
    x = x.nan_to_num().clamp(-9, 9).round().to(dtype) if dtype == torch.int64 else x.to(dtype)
    rows = x.flatten(2 if by == "channel" else 1)
    count = round(0.3 * rows.shape[-1])
    largest = rows.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    expected = torch.zeros(rows.shape, dtype=torch.bool).scatter_(-1, largest, True).view(x.shape)
    mask = top_k(0.3, by)(x)
    assert mask.memory_format == "contiguous" and torch.equal(mask.to_bool(), expected)
    if dtype.is_floating_point:
        assert top_k(0.3, by)(x.requires_grad_()) == mask


@pytest.mark.parametrize(
    "x",
    (
        torch.zeros(1, 2, dtype=torch.complex64),
        torch.zeros(1, 2).to(torch.float8_e5m2),
        torch.zeros(1, 2).to_sparse(),
    ),
)
def test_maps_that_top_k_refuses(x):
    with pytest.raises(TypeError, match="x: .*must be dense, and of float16"):
        fastshape.top_k(0.5, by="sample")(x)


def test_top_k_of_a_map_without_elements():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        assert top_k(0.5)(torch.empty(shape)).shape == shape
    with pytest.raises(IndexError):
        top_k(0.5)(torch.empty(2, 3))  # no planes
    assert top_k(0.5, "sample")(torch.randn(2, 6)).to_bool().sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (((0,), "fraction=0: must be in"), ((1.5,), "fraction=1.5"), ((0.5, "batch"), "by='batch'")),
)
def test_top_k_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_k(*arguments)


def test_majority():
    rows = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()
    masks = [BitMask.from_bool(row) for row in rows]
    assert majority(masks).to_bool().tolist() == [True, True, True, False]
    assert majority(masks[:2]).to_bool().tolist() == [True, False, False, False]  # more than half
    assert majority(masks[:1]) == masks[0]
    with pytest.raises(ValueError, match="at least one"):
        majority([])
    with pytest.raises(ValueError, match=r"shapes \(4,\), \(2,\): must be equal"):
        majority([masks[0], BitMask.from_bool(rows[0, :2])])


@pytest.mark.parametrize("function", (above(0.3), top_k(0.25, "sample")))
def test_they_are_copied_and_saved(function):
    x = torch.randn(2, 3, 4, 4)
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert other == function and other(x) == function(x)
    assert fastshape.attach(
        torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), 1, mode="target", to_mask=function
    )


# ---- random masks of blocks ----


def test_a_block_is_kept_or_dropped_as_one():
    x = torch.zeros(4, 8, 7, 5)
    torch.manual_seed(3)
    mask = random_blocks(x.shape, 0.5, 3).to_bool()
    assert mask.shape == x.shape
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):  # 7 = 3 + 3 + 1, 5 = 3 + 2
        for columns in (slice(0, 3), slice(3, 5)):
            block = mask[:, :, rows, columns].flatten(2)
            assert torch.equal(block.all(2), block.any(2))
    assert mask[:, :, 0, 0].ne(mask[:, :, 3, 3]).any()  # blocks differ from one another


@pytest.mark.parametrize("p_zero", [0.0, 0.3, 0.9])
def test_a_channel_is_kept_or_dropped_as_one(p_zero):
    torch.manual_seed(0)
    mask = random_blocks((100, 64, 4, 2), p_zero, None).to_bool().flatten(2)
    assert torch.equal(mask.all(2), mask.any(2))
    assert mask.float().mean().item() == pytest.approx(1 - p_zero, abs=0.02)  # 5 sigma


def test_blocks_of_one_element_are_the_stream_of_the_op():
    x = torch.randn(2, 3, 4, 5)
    torch.manual_seed(7)
    mask = random_blocks(x.shape, 0.4, 1)
    torch.manual_seed(7)
    assert torch.equal(fastshape.shape(x.abs() + 1, p_zero=0.4) > 0, mask.to_bool())


def test_a_layer_without_a_plane_has_only_channels():
    torch.manual_seed(0)
    assert random_blocks((9, 40), 0.5, 3).density() == pytest.approx(0.5, abs=0.14)


@pytest.mark.parametrize("side", (1, 2, None))
def test_the_map_of_a_part_is_the_part_of_the_map(side):
    x = torch.zeros(7, 3, 5, 4)
    torch.manual_seed(1)
    whole = random_blocks(x.shape, 0.5, side).to_bool()
    state = torch.get_rng_state()
    for start in (0, 3):
        torch.manual_seed(1)
        assert torch.equal(
            random_blocks(x[start:].shape, 0.5, side, first_sample=start).to_bool(), whole[start:]
        )
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("shape", "side", "message"),
    (((4,), 1, "must be \\(N, C, ...\\)"), ((4, 4), 0, "side=0"), ((4, 4), True, "side=True")),
)
def test_blocks_that_are_none(shape, side, message):
    with pytest.raises(ValueError, match=message):
        random_blocks(shape, 0.5, side)
