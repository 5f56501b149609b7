"""The drawn data set: deterministic, seven classes in four clearly different styles."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import data
import numpy as np
import pytest
import toy

EXPERIMENTS = Path(toy.__file__).parent


def test_names_are_those_of_pacs():
    assert toy.DOMAINS == data.DOMAINS
    assert toy.CLASSES == data.CLASSES


@pytest.mark.parametrize("name", toy.DOMAINS)
def test_layout(name):
    images, labels, files = toy.load_toy(name, limit=2)
    assert images.shape == (14, 64, 64, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [label for label in range(7) for _ in range(2)]
    assert [file.split("/")[0] for file in files] == [toy.CLASSES[label] for label in labels]
    assert len(set(files)) == 14
    assert len({image.tobytes() for image in images}) == 14  # no picture twice


def test_forty_images_per_class_by_default_and_at_most(monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda *which: np.zeros((64, 64, 3), np.uint8))  # quicker
    for limit, count in ((None, 40), (1000, 40), (39, 39)):
        images, labels, files = toy.load_toy("sketch", limit)
        assert np.bincount(labels).tolist() == [count] * 7
        assert len(images) == len(set(files)) == 7 * count


def test_limit_does_not_change_the_pictures():
    few, few_labels, few_files = toy.load_toy("cartoon", limit=2)
    more, more_labels, more_files = toy.load_toy("cartoon", limit=5)
    for label in range(7):
        np.testing.assert_array_equal(
            few[few_labels == label], more[more_labels == label][:2], strict=True
        )
    assert set(few_files) < set(more_files)


def test_same_bits_in_another_process():
    program = (
        "import hashlib, toy\n"
        "bits = b''.join(toy.load_toy(name, 2)[0].tobytes() for name in toy.DOMAINS)\n"
        "print(hashlib.sha256(bits).hexdigest())"
    )
    # Another hash seed, so that an order taken from a set or a hash would show.
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=EXPERIMENTS,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = b"".join(toy.load_toy(name, 2)[0].tobytes() for name in toy.DOMAINS)
    assert other == hashlib.sha256(here).hexdigest()


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = toy.draw("photo", "dog", 3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(toy.draw("photo", "dog", 3), first)


def test_sketch_is_thin_grey_lines_on_white():
    images = toy.load_toy("sketch", 5)[0].astype(int)
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    dark = (images[..., 0] < 128).mean(axis=(1, 2))
    white = (images[..., 0] == 255).mean(axis=(1, 2))
    assert dark.min() > 0.005  # something is drawn
    assert dark.max() < 0.20  # and nothing is filled
    assert white.min() > 0.70


def test_cartoon_is_flat_where_painting_and_photo_are_textured():
    def flat(name):  # share of pixels that equal their right-hand neighbour
        images = toy.load_toy(name, 5)[0]
        return (images[:, :, 1:] == images[:, :, :-1]).all(-1).mean(axis=(1, 2))

    assert flat("cartoon").min() > 0.60
    assert flat("art_painting").max() < 0.10
    assert flat("photo").max() < 0.10


def test_cartoon_has_black_outlines():
    images = toy.load_toy("cartoon", 5)[0]
    assert (images.max(-1) < 40).mean(axis=(1, 2)).min() > 0.02


def test_unknown_domain_and_limit_are_refused():
    with pytest.raises(ValueError, match=r"domain 'paint' is unknown; known are art_painting"):
        toy.load_toy("paint")
    with pytest.raises(ValueError, match=r"limit is 0, but must be at least 1"):
        toy.load_toy("photo", limit=0)
