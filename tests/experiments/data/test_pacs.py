"""PACS is recognized by its domains and classes, and keeps its 227 x 227 pixels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from domainshift.data import official_counts, open_data
from domainshift.data.pacs import CLASSES, DOMAINS, OFFICIAL_COUNTS, Pacs
from domainshift.errors import DataError
from made_folders import make_squares, picture
from PIL import Image


def test_a_domain_holds_the_pixels_in_sorted_order(tiny_pacs, cache):
    data = open_data(tiny_pacs, cache)
    assert isinstance(data, Pacs) and data.name == "PACS"
    assert data.domains == DOMAINS and data.classes == CLASSES
    domain = data.load("sketch")
    assert domain.name == "sketch"
    assert domain.images.shape == (14, 227, 227, 3) and domain.images.dtype == np.uint8
    assert domain.labels.dtype == np.int64
    assert domain.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert domain.files[:3] == ("dog/pic_000.png", "dog/pic_001.png", "elephant/pic_000.png")
    for image, file in zip(domain.images, domain.files, strict=True):
        expected = np.asarray(Image.open(tiny_pacs / "sketch" / file).convert("RGB"))
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("above", ["", "PACS", "kfold", "images", "PACS/kfold", "images/PACS"])
def test_it_is_looked_for_in_the_usual_places(tmp_path, pacs_original, cache, above):
    root = tmp_path / "download" / above
    root.parent.mkdir(parents=True, exist_ok=True)
    root.symlink_to(pacs_original)
    for path in (tmp_path / "download", str(root)):
        data = open_data(path, cache)
        assert data.name == "PACS" and data.root == root


@pytest.mark.parametrize("missing", ["photo", "sketch/dog"])
def test_without_a_domain_or_class_it_is_not_pacs(tiny_pacs, cache, missing):
    shutil.rmtree(tiny_pacs / missing)
    if missing == "photo":
        data = open_data(tiny_pacs, cache)
        assert data.name == "folder PACS" and data.domains == ("art_painting", "cartoon", "sketch")
        assert data.official_counts("sketch") is None
    else:
        with pytest.raises(DataError, match=r"PACS: the classes differ .* sketch has no dog$"):
            open_data(tiny_pacs, cache)


def test_a_class_too_many(tiny_pacs, cache):
    (tiny_pacs / "photo" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"art_painting has no zebra; cartoon has no zebra; sketch"):
        open_data(tiny_pacs, cache)


def test_a_misspelt_class_folder_is_a_stray(tiny_pacs, cache):
    shutil.copytree(tiny_pacs / "photo" / "dog", tiny_pacs / "photo" / "dog ")
    data = open_data(tiny_pacs, cache)
    assert isinstance(data, Pacs) and data.classes == CLASSES
    assert data.remarks == (
        "PACS: ignored 1 entry with 2 images (folder: 1): 'photo/dog '; to see all: "
        f"python experiments/data.py verify {tiny_pacs}",
    )


def test_the_same_domains_with_other_classes_are_not_pacs(tmp_path, cache):
    data = open_data(make_squares(tmp_path / "mine", domains=DOMAINS), cache)
    assert data.name == "mine" and data.classes == ("cat", "cow")
    assert data.load("sketch").images.shape == (4, 8, 8, 3)


def test_a_folder_of_another_kind_beside_the_domains_does_not_matter(tiny_pacs, cache):
    (tiny_pacs / "splits" / "old").mkdir(parents=True)
    assert open_data(tiny_pacs, cache).name == "PACS"


def test_an_image_of_another_size(tiny_pacs, cache):
    path = tiny_pacs / "photo" / "dog" / "pic_001.jpg"
    picture(1, size=(300, 227)).save(path)
    with pytest.raises(DataError, match=r"is 300 x 227 pixels, but must be 227 x 227$") as caught:
        open_data(tiny_pacs, cache).load("photo")
    assert str(path) in str(caught.value)
    assert list(cache.glob("*.npy")) == []


def test_official_counts(tiny_pacs, cache):
    assert sum(map(sum, OFFICIAL_COUNTS.values())) == 9991
    assert [sum(OFFICIAL_COUNTS[name]) for name in DOMAINS] == [2048, 2344, 1670, 3929]
    assert official_counts("PACS", "sketch") == OFFICIAL_COUNTS["sketch"]
    assert official_counts("OfficeHome", "sketch") is official_counts("PACS", "Art") is None
    data = open_data(tiny_pacs, cache)
    assert data.official_counts("photo") == OFFICIAL_COUNTS["photo"]
    assert data.counts("photo") == (2,) * 7  # what is there
    with pytest.raises(DataError, match="domain: 'Art'"):
        data.official_counts("Art")


def test_the_real_one(pacs: Path, cache):
    data = open_data(pacs, cache)
    for name in data.domains:
        assert data.counts(name) == OFFICIAL_COUNTS[name]
        domain = data.load(name, limit=2)
        assert domain.images.shape == (14, 227, 227, 3)
        image = Image.open(data.root / name / domain.files[-1]).convert("RGB")
        np.testing.assert_array_equal(domain.images[-1], np.asarray(image))
    assert data.remarks == ()
