"""The mask of the largest values of a map, against a stable sort and against torch.topk with a scatter."""

import functools

import pytest
import torch

import fastshape
from fastshape import reference

# Maps in layer 1 and after the last layer of ResNet-18, and in layer 1 of ResNet-50.
SIZES = {"layer 1": (16, 64, 56, 56), "last": (64, 512, 7, 7), "wide": (32, 256, 56, 56)}
FRACTION = 0.25


def stable_sort(rows: torch.Tensor, count: int) -> torch.Tensor:
    return reference.pack_top(rows, rows.shape[1], count)


def topk_and_scatter(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Leaves open which of equal values it takes."""
    largest = rows.topk(count, sorted=False).indices
    mask = torch.zeros(rows.shape, dtype=torch.bool).scatter_(1, largest, True)
    return torch.ops.fastshape.pack(mask)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("values", ("normal", "after a ReLU"))
@pytest.mark.parametrize("by", ("channel", "sample"))
@pytest.mark.parametrize("contender", (stable_sort, topk_and_scatter), ids=lambda f: f.__name__)
def test_largest_values(against, size, values, by, contender):
    x = torch.randn(SIZES[size], generator=torch.Generator().manual_seed(0))
    if values == "after a ReLU":
        x.relu_()
    top_k = fastshape.top_k(FRACTION, by)
    rows = x.flatten(2).flatten(0, 1) if by == "channel" else x.flatten(1)
    against(
        functools.partial(top_k, x),
        functools.partial(contender, rows, max(1, round(FRACTION * rows.shape[1]))),
        moved_bytes=x.element_size() * x.numel() + x.numel() // 8,
        rounds=5,
        warmup_rounds=1,
    )
