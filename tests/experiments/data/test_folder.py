"""Any folder <domain>/<class>/<image> is a data set."""

import os
import shutil

import numpy as np
import pytest
from domainshift.data import open_data
from domainshift.errors import DataError
from made_folders import OFFICE_CLASSES, OFFICE_DOMAINS, make_office, make_squares, picture
from PIL import Image


def test_names_and_counts_are_read_from_the_folder(office, cache):
    data = open_data(office, cache)
    assert data.name == "OfficeHome"
    assert data.domains == OFFICE_DOMAINS and data.classes == OFFICE_CLASSES
    assert data.counts("Real World") == (2,) * 5 and data.counts("Art", limit=1) == (1,) * 5
    assert data.official_counts("Art") is None
    assert dict(data.defaults) == {} and data.remarks == ()
    assert not cache.exists()  # nothing was decoded


def test_images_of_any_size_become_squares_of_256(office, cache):
    domain = open_data(office, cache).load("Clipart")
    assert domain.name == "Clipart" and domain.classes == OFFICE_CLASSES
    assert domain.images.shape == (10, 256, 256, 3) and domain.images.dtype == np.uint8
    assert domain.labels.dtype == np.int64 and domain.labels.tolist() == sorted([0, 1, 2, 3, 4] * 2)
    assert domain.files[:3] == ("Alarm_Clock/00001.jpg", "Alarm_Clock/00002.jpg", "Bed/00001.jpg")
    for image, file in zip(domain.images, domain.files, strict=True):
        with Image.open(office / "Clipart" / file) as original:
            expected = original.resize((256, 256), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(expected))


@pytest.mark.parametrize("side, stored", [(8, 8), (256, 256), (257, 256)])
def test_squares_of_one_side_up_to_256_keep_it(tmp_path, cache, side, stored):
    root = make_squares(tmp_path / "squares", side, "bmp")
    domain = open_data(root, cache).load("one")
    assert domain.images.shape == (4, stored, stored, 3)
    if side == stored:
        np.testing.assert_array_equal(domain.images[3], np.asarray(picture(11, (side, side))))


def test_images_of_one_size_that_are_no_squares_become_256(tmp_path, cache):
    root = make_squares(tmp_path / "rectangles")
    for path in root.rglob("*.png"):
        picture(0, (9, 8)).save(path)
    assert open_data(root, cache).load("one").images.shape == (4, 256, 256, 3)


def test_one_other_square_makes_all_of_its_domain_256(tmp_path, cache):
    root = make_squares(tmp_path / "squares")
    picture(0, (9, 9)).save(root / "two" / "cow" / "1.png")
    data = open_data(root, cache)
    assert data.load("one").images.shape == (4, 8, 8, 3)
    assert data.load("two").images.shape == (4, 256, 256, 3)
    assert data.load("two", limit=1).images.shape == (2, 256, 256, 3)  # whatever the limit leaves


def test_images_are_a_read_only_memory_map(office, cache):
    images = open_data(office, cache).load("Art").images
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_every_load_gives_the_same_arrays(office, cache):
    data = open_data(office, cache)
    assert data.load("Art").images is data.load("Art").images
    assert data.load("Art", 50).images is data.load("Art").images  # 50 leave nothing out
    assert data.load("Art", 1).images is not data.load("Art").images


def test_limit_takes_the_first_of_each_class(office, cache):
    data = open_data(office, cache)
    whole, one = data.load("Product"), data.load("Product", limit=1)
    assert one.files == whole.files[::2] and one.labels.tolist() == list(range(5))
    np.testing.assert_array_equal(one.images, whole.images[::2])


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one(office, cache, limit):
    data = open_data(office, cache)
    for ask in (data.load, data.counts, data.digest):
        with pytest.raises(DataError, match=f"^limit: {limit} is not allowed; allowed: at least 1"):
            ask("Art", limit)


def test_unknown_domain(office, cache):
    data = open_data(office, cache)
    message = (
        "domain: 'art' is not a domain of OfficeHome; allowed: Art | Clipart | Product | Real World"
    )
    for ask in (data.load, data.counts, data.digest, data.check_domain):
        with pytest.raises(DataError, match=f"^{message.replace('|', '[|]')}$"):
            ask("art")


# --- where the domains are ---


def test_one_folder_may_wrap_the_domains(tmp_path, cache):
    make_office(tmp_path / "download" / "OfficeHomeDataset_10072016")
    (tmp_path / "download" / "licence.txt").write_text("free")
    data = open_data(tmp_path / "download", cache)
    assert data.name == "OfficeHomeDataset_10072016" and data.domains == OFFICE_DOMAINS


def test_several_data_sets_below_a_folder(tmp_path, cache):
    for name in ("VLCS", "Office"):
        make_squares(tmp_path / "all" / name)
    with pytest.raises(DataError, match=r"all' holds several data sets \(Office, VLCS\)"):
        open_data(tmp_path / "all", cache)


def test_lists_beside_the_domains_are_no_domains(tmp_path, cache):
    root = make_squares(tmp_path / "domain_net", domains=("clipart", "infograph"))
    (root / "clipart_train.txt").write_text("clipart/cat/0.png 0\n")
    (root / "splits").mkdir()
    (root / "splits" / "infograph_test.txt").write_text("infograph/cat/0.png 0\n")
    data = open_data(root, cache)
    assert data.domains == ("clipart", "infograph") and data.remarks == ()


def test_a_relative_folder_has_its_name(office, cache, monkeypatch):
    monkeypatch.chdir(office)
    assert open_data(".", cache).name == "OfficeHome"


@pytest.mark.parametrize("name", ["PACS", "toy"])
def test_another_folder_never_has_the_name_of_a_known_data_set(tmp_path, cache, name):
    assert open_data(make_squares(tmp_path / name), cache).name == f"folder {name}"


def test_a_folder_that_is_not_there(tmp_path, cache):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(
            DataError, match=rf"^data: '.*{name}' is not a folder; allowed: toy, or"
        ):
            open_data(tmp_path / name, cache)


def test_a_folder_without_a_data_set(tmp_path, office, cache):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", office / "Art"):
        with pytest.raises(
            DataError, match=r"holds no data set; allowed: toy, or a folder <domain>"
        ):
            open_data(folder, cache)


# --- what is wrong with the domains or classes ---


def test_one_domain(tmp_path, cache):
    root = make_squares(tmp_path / "lonely", domains=("only",))
    with pytest.raises(DataError, match=r"lonely has one domain, only; at least two are needed$"):
        open_data(root, cache)


def test_classes_that_differ_between_domains(office, cache):
    shutil.rmtree(office / "Art" / "Fork")
    (office / "Product" / "Zebra").mkdir()
    with pytest.raises(
        DataError, match=r"differ between domains: Art has no Fork, Zebra; Clipart has"
    ):
        open_data(office, cache)


def test_many_missing_classes_are_counted(tmp_path, cache):
    root = make_squares(tmp_path / "many", classes=[f"c{i}" for i in range(9)])
    for i in range(1, 9):
        shutil.rmtree(root / "two" / f"c{i}")
    with pytest.raises(DataError, match=r"two has no c1, c2, c3, c4, c5 and 3 more$"):
        open_data(root, cache)


def test_a_class_without_an_image(office, cache):
    for file in (office / "Art" / "Mug").iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"Art/Mug holds no image \(.bmp, .jpeg, .jpg, .png, .webp\)$"
    ):
        open_data(office, cache)


def test_a_domain_whose_classes_are_all_empty_is_not_overlooked(office, cache):
    for file in (office / "Art").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match=r"Art/Alarm_Clock holds no image"):
        open_data(office, cache)


def test_a_folder_that_cannot_be_read(office, cache, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("domainshift.data.folder.os.scandir", denied)
    with pytest.raises(DataError, match=r"^cannot read folder .*OfficeHome.*: Permission denied$"):
        open_data(office, cache)


# --- other files ---


def test_suffixes_in_any_case(office, cache):
    mug = office / "Art" / "Mug"
    (mug / "00001.jpg").rename(mug / "00001.JPG")
    (mug / "00002.jpg").rename(mug / "00002.Jpeg")
    assert open_data(office, cache).load("Art").files[6:8] == ("Mug/00001.JPG", "Mug/00002.Jpeg")


def test_hidden_and_system_files_are_ignored_and_named(office, cache):
    mug = office / "Art" / "Mug"
    for folder in (office / ".git", office / "__MACOSX" / "Art", office / "Art" / "@eaDir"):
        folder.mkdir(parents=True)
        (folder / "00001.jpg").write_bytes(b"left by a system")
    for name in ("._00001.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini"):
        (mug / name).write_bytes(b"left by a file manager")
    data = open_data(office, cache)
    assert data.domains == OFFICE_DOMAINS and data.classes == OFFICE_CLASSES
    assert data.counts("Art") == (2,) * 5
    assert [stray.path for stray in data.strays] == [
        "__MACOSX", "Art/@eaDir", "Art/Mug/.DS_Store", "Art/Mug/._00001.jpg",
        "Art/Mug/Desktop.ini", "Art/Mug/Thumbs.db", "Art/Mug/desktop.ini",
    ]  # fmt: skip
    assert {stray.kind for stray in data.strays} == {"hidden or system entry"}
    assert [stray.images for stray in data.strays] == [1, 1, 0, 0, 0, 0, 0]


def test_other_files_are_counted_and_named_once(office, cache):
    for i in range(5):
        (office / "Art" / "Mug" / f"note{i}.txt").write_text("not an image")
    (office / "Art" / "Mug" / "more").mkdir()
    (office / "Art" / "list.csv").write_text("not an image")
    (remark,) = open_data(office, cache).remarks
    assert remark == (
        "OfficeHome: ignored 7 entries with 0 images (folder: 1, other file: 6): 'Art/Mug/more', "
        "'Art/Mug/note0.txt', 'Art/Mug/note1.txt', 'Art/Mug/note2.txt', 'Art/Mug/note3.txt' and 2 "
        f"more; to see all: python experiments/data.py verify {office}"
    )


def strays_of(root, cache):
    """Each stray of a data set, and what is said of it."""
    data = open_data(root, cache)
    assert data.counts(data.domains[0]) == (2,) * len(data.classes)
    data.digest(data.domains[0])
    return {path: (kind, images) for path, kind, images in data.strays}


def test_a_data_set_without_strays_says_nothing(office, cache):
    assert strays_of(office, cache) == {} and open_data(office, cache).remarks == ()


def test_links_that_lead_nowhere(office, cache):
    for place in ("Gone", "Art/Zebra", "Art/Mug/00003.jpg"):
        (office / place).symlink_to("/nowhere/at/all")
    (office / "Art" / "Mug" / "circle.png").symlink_to("circle.png")
    (office / "Art" / "Mug" / "whole.jpg").symlink_to(office / "Art" / "Mug" / "00001.jpg")
    (office / "Art" / "Mug" / "00002.jpg").unlink()
    assert strays_of(office, cache) == {
        "Gone": ("broken link", 0),
        "Art/Zebra": ("broken link", 0),
        "Art/Mug/00003.jpg": ("broken link", 1),
        "Art/Mug/circle.png": ("broken link", 1),
    }


@pytest.mark.parametrize(
    "name, kind",
    [("Mug ", "folder"), (" Mug", "folder"), ("__MACOSX", "hidden or system entry"),
     ("@eaDir", "hidden or system entry"), (".cut", "hidden or system entry")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["Art", "Art/Mug"])
def test_stray_folders_are_named_with_their_images(office, cache, name, kind, place):
    shutil.copytree(office / "Art" / "Bed", office / place / name / "deeper")
    data = open_data(office, cache)
    assert data.classes == OFFICE_CLASSES
    assert strays_of(office, cache) == {f"{place}/{name}": (kind, 2)}
    assert f"ignored 1 entry with 2 images ({kind}: 1): '{place}/{name}'; to" in data.remarks[0]


def test_images_in_subfolders_of_a_class_and_in_no_class(office, cache):
    shutil.copytree(office / "Art" / "Bed", office / "Art" / "Mug" / "a" / "b")
    for place in (office, office / "Art"):
        picture(1).save(place / "cover.png")
    picture(1).save(office / "Art" / "Mug" / "moving.gif")
    assert strays_of(office, cache) == {
        "cover.png": ("image in no class", 1),
        "Art/cover.png": ("image in no class", 1),
        "Art/Mug/a": ("folder", 2),
        "Art/Mug/moving.gif": ("image in another format", 1),
    }


def test_images_beside_the_domains(office, cache):
    """Folders without classes hold lists and documents, or images that no run reads."""
    shutil.copytree(office / "Art" / "Bed", office / "flat")
    (office / "documents").mkdir()
    (office / "documents" / "licence.txt").write_text("free")
    (office / ".git" / "deep").mkdir(parents=True)
    (office / "__MACOSX").mkdir()
    assert strays_of(office, cache) == {
        "__MACOSX": ("hidden or system entry", 0),
        "flat": ("folder", 2),
    }


def named_in_latin_1(path):
    """A file or folder, under a name with a byte that UTF-8 does not have."""
    name = os.fsdecode(b"caf\xe9" + path.suffix.encode())
    try:
        return path.rename(path.with_name(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")


def test_names_that_are_not_utf8(office, cache):
    shutil.copytree(office / "Art" / "Bed", office / "Art" / "Sofa")
    named_in_latin_1(office / "Art" / "Sofa")
    shutil.copy(office / "Art" / "Mug" / "00001.jpg", office / "Art" / "Mug" / "00003.jpg")
    named_in_latin_1(office / "Art" / "Mug" / "00003.jpg")
    assert strays_of(office, cache) == {
        "Art/Mug/caf\udce9.jpg": ("name not in UTF-8", 1),
        "Art/caf\udce9": ("name not in UTF-8", 2),
    }
    (remark,) = open_data(office, cache).remarks
    assert remark.isprintable() and r"'Art/caf\udce9'" in remark


@pytest.mark.parametrize("linked", [False, True])
def test_a_data_set_whose_own_name_is_not_utf8(office, cache, linked):
    root = named_in_latin_1(office)
    if linked:
        office.symlink_to(root)
        root = office
    with pytest.raises(DataError, match=r"^data: .* is not allowed; allowed: a path in UTF-8$"):
        open_data(root, cache)


def test_strays_are_named_where_something_is_missing(office, cache):
    (office / "Art" / "Mug").rename(office / "Art" / "Mug ")
    with pytest.raises(DataError, match=r"Art has no Mug; ignored 1 entry with 2 .*'Art/Mug '$"):
        open_data(office, cache)
    (office / "Art" / "Mug").mkdir()
    with pytest.raises(DataError, match=r"Art/Mug holds no image .*; ignored .*'Art/Mug '$"):
        open_data(office, cache)
    for domain in OFFICE_DOMAINS[1:]:
        (office / domain).rename(office / f"{domain} ")
    with pytest.raises(DataError, match=r"one domain, Art; at least two .*; ignored .*'Clipart '"):
        open_data(office, cache)
