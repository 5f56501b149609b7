"""The drawn pictures: a function of domain, class and index, in four clearly different styles."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from domainshift.data import drawing
from domainshift.data.drawing import CLASSES, DOMAINS, IMAGES_PER_CLASS, SIDE, draw

EXPERIMENTS = Path(drawing.__file__).parents[2]


def pictures(domain, count):
    """The first `count` pictures of every class: uint8 (7 * count, SIDE, SIDE, 3)."""
    return np.stack([draw(domain, name, index) for name in CLASSES for index in range(count)])


def digest():
    return hashlib.sha256(b"".join(pictures(name, 2).tobytes() for name in DOMAINS)).hexdigest()


def test_names_are_those_of_pacs():
    assert DOMAINS == ("art_painting", "cartoon", "photo", "sketch")
    assert CLASSES == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_picture_is_an_rgb_square_unlike_all_others(domain):
    images = [draw(domain, name, i) for name in CLASSES for i in (0, 1, IMAGES_PER_CLASS - 1)]
    assert {(image.shape, image.dtype.name) for image in images} == {((SIDE, SIDE, 3), "uint8")}
    assert len({image.tobytes() for image in images}) == 21


def test_a_picture_does_not_depend_on_what_was_drawn_before():
    first = draw("cartoon", "horse", 3)
    pictures("cartoon", 2)
    np.testing.assert_array_equal(draw("cartoon", "horse", 3), first, strict=True)


def test_same_bits_in_another_process():
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_drawing; print(test_drawing.digest())"
    # Another hash seed, so that an order taken from a set or a hash would show.
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(EXPERIMENTS)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == digest()


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = draw("photo", "dog", 3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(draw("photo", "dog", 3), first)


def test_sketch_is_thin_grey_lines_on_white():
    images = pictures("sketch", 5).astype(int)
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    drawn = (images[..., 0] < 200).mean(axis=(1, 2))
    assert drawn.min() > 0.005  # something is drawn
    assert (images[..., 0] < 128).mean(axis=(1, 2)).max() < 0.20  # and nothing is filled
    assert (images[..., 0] == 255).mean(axis=(1, 2)).min() > 0.70


def test_cartoon_is_flat_where_painting_and_photo_are_textured():
    def flat(domain):  # share of pixels that equal their right-hand neighbour
        images = pictures(domain, 5)
        return (images[:, :, 1:] == images[:, :, :-1]).all(-1).mean(axis=(1, 2))

    assert flat("cartoon").min() > 0.60
    assert flat("art_painting").max() < 0.10
    assert flat("photo").max() < 0.10


def test_cartoon_has_black_outlines():
    assert (pictures("cartoon", 5).max(-1) < 40).mean(axis=(1, 2)).min() > 0.02
