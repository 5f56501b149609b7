"""The order of an epoch, and the image of another domain beside each source image."""

import numpy as np
import pytest
from domainshift.data.pairing import epoch_order, same_class


def test_each_epoch_uses_every_source_image_once():
    orders = [epoch_order(0, epoch, 10, 7) for epoch in (1, 2)]
    for source, target in orders:
        assert source.dtype == target.dtype == np.int64
        assert sorted(source) == list(range(10))
        assert set(target) == set(range(7))  # the whole target, three of it twice
    assert not np.array_equal(orders[0][0], orders[1][0])
    assert not np.array_equal(orders[0][1], orders[1][1])


def test_random_pairs_are_independent_of_the_source_order():
    source, target = epoch_order(0, 1, 50, 50)
    assert sorted(target) == list(range(50))
    assert not np.array_equal(source, target)


def test_modulo_pairs_by_position():
    source, target = epoch_order(0, 1, 10, 4, "modulo")
    assert target.tolist() == [i % 4 for i in source]


def test_domains_and_seeds_are_permuted_each_in_its_own_way():
    first, other_domain = (epoch_order(0, 1, 14, 14, domain=domain) for domain in (0, 1))
    assert np.array_equal(first[0], other_domain[0])
    assert not np.array_equal(first[1], other_domain[1])
    other_seed = epoch_order(1, 1, 14, 14)
    assert not np.array_equal(first[0], other_seed[0])
    assert not np.array_equal(first[1], other_seed[1])


def test_the_source_order_does_not_depend_on_the_target():
    orders = [
        epoch_order(3, 2, 20)[0],
        *(epoch_order(3, 2, 20, 9, p)[0] for p in ("random", "modulo")),
    ]
    assert np.array_equal(orders[0], orders[1]) and np.array_equal(orders[0], orders[2])


def test_orders_stay_what_they_were():
    """Records of earlier runs were made with these streams."""
    source, target = epoch_order(0, 1, 6, 4)
    assert source.tolist() == [0, 5, 4, 1, 3, 2]
    assert target.tolist() == [1, 3, 0, 2, 1, 3]


def test_the_share_of_pairs_of_one_class_is_that_of_the_epochs_pairs():
    source, target = np.array([0, 0, 0, 1]), np.array([0, 1, 1])
    assert same_class(0, source, target, "modulo") == (25.0, pytest.approx(50 * 5 / 6))
    alike = [same_class(seed, source, target, "random")[0] for seed in range(200)]
    assert 35 < np.mean(alike) < 50
