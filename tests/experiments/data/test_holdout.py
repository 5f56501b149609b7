"""The held-out part of a domain."""

import numpy as np
import pytest
import torch
from domainshift.data import Domain
from domainshift.data.images import split_holdout
from domainshift.errors import DataError


def make_domain(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    classes = ("dog", "elephant", "giraffe", "guitar")[: len(counts)]
    return Domain("photo", images, labels, tuple(map(str, range(len(labels)))), classes, "")


def test_it_is_stratified_and_a_partition():
    domain = make_domain(10, 25, 4, 2)
    train, held_out = split_holdout(domain, 0.1, seed=0)
    assert train.dtype == held_out.dtype == np.int64
    assert np.bincount(domain.labels[held_out]).tolist() == [1, 3, 1, 1]
    assert sorted([*train, *held_out]) == list(range(41))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    _, nearly_all = split_holdout(domain, 0.99, seed=0)
    assert np.bincount(domain.labels[nearly_all]).tolist() == [9, 24, 3, 1]


def test_it_depends_on_the_seed_alone():
    domain = make_domain(40, 40)
    _, first = split_holdout(domain, 0.25, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)
    np.testing.assert_array_equal(split_holdout(domain, 0.25, seed=1)[1], first)
    assert split_holdout(domain, 0.25, seed=2)[1].tolist() != first.tolist()
    assert (first[:10] + 40).tolist() != first[10:].tolist()  # classes are drawn independently


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(
        DataError, match=f"holdout: {fraction} is not allowed; allowed: 0 < holdout"
    ):
        split_holdout(make_domain(5, 5), fraction, seed=0)


def test_negative_seed_and_lone_image():
    with pytest.raises(DataError, match="seed: -1 is not allowed; allowed: at least 0"):
        split_holdout(make_domain(5), 0.5, seed=-1)
    with pytest.raises(DataError, match="class elephant of photo has 1 image"):
        split_holdout(make_domain(5, 1), 0.5, seed=0)
