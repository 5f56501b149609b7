"""Samples: what the transforms give, and random draws that depend on seed, epoch and image alone."""

import pickle

import numpy as np
import pytest
import torch
from domainshift.data import open_data
from domainshift.data.images import (
    LabelledImages,
    ShuffledImages,
    UnlabelledImages,
    mix,
    shuffled,
    test_transform,
    train_transform,
)
from domainshift.errors import DataError
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def toy():
    return open_data("toy").load("art_painting", limit=3)


def test_labelled_images(toy):
    samples = LabelledImages(toy, [20, 0, 4], test_transform(48))
    assert len(samples) == 3
    tensor, label = samples[0]
    assert tensor.shape == (3, 48, 48) and tensor.dtype == torch.float32
    assert type(label) is int
    assert [label for _, label in samples] == [6, 0, 1]


def test_test_transform_normalizes(toy):
    tensor = UnlabelledImages(toy.images, [5], test_transform(64))[0]
    pixels = toy.images[5].astype(np.float32) / 255
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    expected = ((pixels - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-6)


def test_train_transform_is_the_protocol(toy):
    resize, crop, flip, *_ = train_transform(224).transforms
    assert resize.size == 256
    assert crop.size == (224, 224) and crop.scale == (0.7, 1.0)
    assert flip.p == 0.5
    assert train_transform(64).transforms[0].size == 73
    sample = UnlabelledImages(toy.images, [0], train_transform(64))[0]
    assert sample.shape == (3, 64, 64) and sample.dtype == torch.float32


def test_unlabelled_images_are_images_alone(toy):
    samples = UnlabelledImages(toy.images, [1, 2], test_transform(32))
    assert isinstance(samples[0], torch.Tensor)
    for name, value in vars(samples).items():
        assert value is not toy and value is not toy.labels, name


# --- random draws ---


def test_augmentation_depends_on_seed_epoch_and_index_only(toy):
    def pixels(indices, i, **where):
        return UnlabelledImages(toy.images, indices, train_transform(32), **where)[i]

    base = pixels([7, 8], 0, seed=1, epoch=2)
    assert torch.equal(base, pixels([3, 8, 7], 2, seed=1, epoch=2))  # another place, same image
    assert not torch.equal(base, pixels([7], 0, seed=2, epoch=2))
    assert not torch.equal(base, pixels([7], 0, seed=1, epoch=3))
    assert not torch.equal(base, pixels([7], 0, seed=2, epoch=1))  # the two are not interchangeable
    # two equal images at two indices: the index alone makes the difference
    twins = np.stack([toy.images[0]] * 2)
    left, right = UnlabelledImages(twins, [0, 1], train_transform(32))
    assert not torch.equal(left, right)


def patches_of(image):
    """The patches of 16 x 16 pixels of (3, S, S), row by row, as tuples of numbers."""
    parts = (
        image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    )
    return [tuple(part.tolist()) for part in parts]


def test_shuffled_images_have_the_patches_of_the_image_in_another_order(toy):
    plain = UnlabelledImages(toy.images, range(6), train_transform(64), seed=1, epoch=2)
    shuffles = ShuffledImages(toy.images, range(6), train_transform(64), seed=1, epoch=2)
    for image, moved in zip(plain, shuffles, strict=True):
        assert patches_of(moved) != patches_of(image)
        assert sorted(patches_of(moved)) == sorted(patches_of(image))


def test_the_order_of_patches_depends_on_seed_epoch_and_index_only(toy):
    def orders(indices, part, **where):
        dataset = ShuffledImages(toy.images, indices, train_transform(64), **where)
        return dataset.patch_orders(part, 64).tolist()

    base = orders([7, 8], [0], seed=1, epoch=2)
    assert base == orders([3, 8, 7], [2], seed=1, epoch=2)
    assert base + orders([8], [0], seed=1, epoch=2) == orders([7, 8], [0, 1], seed=1, epoch=2)
    others = [([7], {"seed": 2, "epoch": 2}), ([7], {"seed": 1, "epoch": 3}),
              ([8], {"seed": 1, "epoch": 2})]  # fmt: skip
    for indices, where in others:
        assert orders(indices, [0], **where) != base


def test_shuffling_by_hand():
    image = torch.arange(4.0).repeat_interleave(16).view(2, 1, 2, 16)  # one number for each patch
    image = image.expand(2, 16, 2, 16).reshape(1, 1, 32, 32)
    moved = shuffled(image, torch.tensor([[2, 0, 3, 1]]))
    assert moved[0, 0, ::16, ::16].tolist() == [[2, 0], [3, 1]]
    assert sorted(moved.unique().tolist()) == [0, 1, 2, 3] and (moved == 2).sum() == 256


def test_epoch_can_be_set(toy):
    samples = LabelledImages(toy, [3], train_transform(32), seed=5)
    samples.epoch = 4
    fresh = LabelledImages(toy, [3], train_transform(32), seed=5, epoch=4)
    assert samples.epoch == 4
    assert torch.equal(samples[0][0], fresh[0][0])


def test_callers_random_state_is_untouched(toy):
    samples = LabelledImages(toy, [0, 1], train_transform(32))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    samples[0], samples[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_mix_separates_neighbours():
    values = {mix(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(values) == 12**3
    assert len({value & 0xFFFFFFFF for value in values}) == 12**3  # torch uses the low word
    assert all(0 <= value < 2**64 for value in values)
    assert mix(-1, 0, 0) == mix(2**64 - 1, 0, 0)


# --- in other processes ---


@pytest.fixture(params=["array", "memory map"])
def samples(request, toy, tiny_pacs, cache):
    domain = toy if request.param == "array" else open_data(tiny_pacs, cache).load("photo")
    return LabelledImages(domain, range(14), train_transform(32), seed=3, epoch=1)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_do_not_change_the_pixels(samples, start):
    expected = list(DataLoader(samples, batch_size=4))
    loader = DataLoader(samples, batch_size=4, num_workers=2, multiprocessing_context=start)
    actual = list(loader)
    assert len(actual) == len(expected) == 4
    for (x, y), (other_x, other_y) in zip(expected, actual, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.mark.parametrize("kind", [UnlabelledImages, LabelledImages, ShuffledImages])
def test_a_memory_map_is_pickled_by_name(tiny_pacs, cache, kind):
    domain = open_data(tiny_pacs, cache).load("photo")
    images = domain if kind is LabelledImages else domain.images
    samples = kind(images, range(14), test_transform(32))
    content = pickle.dumps(samples)
    assert len(content) < 10_000 < domain.images.nbytes
    copy = pickle.loads(content)
    assert isinstance(copy.images, np.memmap) and not copy.images.flags.writeable
    np.testing.assert_array_equal(copy.images, domain.images)
    for sample, other in zip(samples, copy, strict=True):
        if kind is LabelledImages:
            (sample, label), (other, other_label) = sample, other
            assert label == other_label
        assert torch.equal(sample, other)


def test_a_part_of_a_memory_map_is_pickled_as_it_is(tiny_pacs, cache):
    images = open_data(tiny_pacs, cache).load("photo").images[3:5]
    copy = pickle.loads(pickle.dumps(UnlabelledImages(images, [0, 1], test_transform(32))))
    np.testing.assert_array_equal(copy.images, images)


# --- bad input ---


@pytest.mark.parametrize("index", [-1, 21])
def test_index_out_of_range(toy, index):
    with pytest.raises(DataError, match=rf"indices: {index} is not allowed; allowed: 0 to 20"):
        LabelledImages(toy, [0, index], test_transform(32))


def test_images_and_indices_of_another_kind(toy):
    transform = test_transform(32)
    with pytest.raises(DataError, match=r"images: float32 .* is not allowed; allowed: uint8"):
        UnlabelledImages(np.zeros((2, 8, 8, 3), np.float32), [0], transform)
    with pytest.raises(DataError, match=r"indices: float64"):
        UnlabelledImages(toy.images, [0.5], transform)
    assert len(UnlabelledImages(toy.images, [], transform)) == 0


def test_image_size_below_one():
    for transform in (train_transform, test_transform):
        with pytest.raises(DataError, match="image_size: 0 is not allowed; allowed: at least 1"):
            transform(0)
