"""The toy is a data set of drawn pictures."""

import numpy as np
import pytest
from domainshift.data import drawing, open_data
from domainshift.data.pacs import CLASSES, DOMAINS
from domainshift.errors import DataError


@pytest.fixture
def toy():
    return open_data("toy")


def test_it_needs_no_folder_and_has_the_names_of_pacs(toy):
    assert (toy.name, toy.domains, toy.classes) == ("toy", DOMAINS, CLASSES)
    assert toy.official_counts("photo") is None


def test_its_switches_and_its_warning(toy):
    assert toy.defaults["image_size"] == drawing.SIDE
    (remark,) = toy.remarks
    assert "not PACS" in remark


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_its_pictures_class_after_class(toy, name):
    domain = toy.load(name, limit=2)
    assert domain.images.shape == (14, 64, 64, 3) and domain.images.dtype == np.uint8
    assert domain.labels.dtype == np.int64
    assert domain.labels.tolist() == [label for label in range(7) for _ in range(2)]
    assert domain.classes == CLASSES and domain.name == name
    assert [file.split("/")[0] for file in domain.files] == [CLASSES[i] for i in domain.labels]
    assert len(set(domain.files)) == 14
    for i, image in enumerate(domain.images):
        np.testing.assert_array_equal(image, drawing.draw(name, CLASSES[i // 2], i % 2))


def test_limit_does_not_change_the_pictures(toy):
    few, more = toy.load("cartoon", limit=2), toy.load("cartoon", limit=5)
    for label in range(7):
        np.testing.assert_array_equal(
            few.images[few.labels == label], more.images[more.labels == label][:2], strict=True
        )
    assert set(few.files) < set(more.files)


def test_all_of_a_class_by_default_and_at_most(monkeypatch):
    monkeypatch.setattr(drawing, "draw", lambda *which: np.zeros((64, 64, 3), np.uint8))  # quicker
    monkeypatch.setattr(drawing, "IMAGES_PER_CLASS", 41)  # of which no other test has drawn
    for limit, count in ((None, 41), (1000, 41), (40, 40)):
        toy = open_data("toy")
        assert toy.counts("sketch", limit) == (count,) * 7
        domain = toy.load("sketch", limit)
        assert np.bincount(domain.labels).tolist() == [count] * 7
        assert len(domain.images) == len(set(domain.files)) == 7 * count


def test_pictures_are_drawn_once_in_a_process_and_cannot_be_changed(toy, monkeypatch):
    images = toy.load("photo", 1).images
    monkeypatch.setattr(drawing, "draw", lambda *which: pytest.fail("drawn again"))
    assert open_data("toy").load("photo", 1).images is images
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_unknown_domain_and_limit_are_refused(toy):
    with pytest.raises(DataError, match=r"domain: 'paint' is not a domain of toy; allowed: art_p"):
        toy.load("paint")
    with pytest.raises(DataError, match=r"limit: 0 is not allowed; allowed: at least 1"):
        toy.load("photo", limit=0)
