"""The digest of a domain follows the content of its files, and reads them once."""

import os
import shutil
from pathlib import Path

import pytest
from domainshift.data import image_files, open_data
from domainshift.data.toy import Toy
from made_folders import make_squares, picture
from PIL import Image


@pytest.fixture
def squares(tmp_path):
    return make_squares(tmp_path / "squares")


@pytest.fixture
def digest(squares, cache):
    """The digest of a domain of the squares, as a fresh process has it."""
    return lambda domain="one", limit=None: open_data(squares, cache).digest(domain, limit)


def test_it_is_a_sha256_of_the_domain_alone(squares, digest):
    before = digest("one"), digest("two")
    assert all(len(d) == 64 and int(d, 16) for d in before) and before[0] != before[1]
    picture(77, (8, 8)).save(squares / "two" / "cat" / "0.png")
    assert digest("one") == before[0] and digest("two") != before[1]


def test_exchanged_pixels_have_another_digest(squares, digest):
    before = digest()
    path = squares / "one" / "cat" / "0.png"
    stat = path.stat()
    picture(77, (8, 8)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest() != before


def test_two_images_in_each_others_place_have_another_digest(tmp_path, cache):
    """Files of one size and one time: only their contents differ."""
    root = make_squares(tmp_path / "bitmaps", suffix="bmp")
    first, second = (root / "one" / name / "0.bmp" for name in ("cat", "cow"))
    for path in (first, second):
        os.utime(path, ns=(10**18, 10**18))
    before = open_data(root, cache).digest("one")
    first.rename(tmp_path / "kept.bmp")
    second.rename(first)
    (tmp_path / "kept.bmp").rename(second)
    assert open_data(root, cache).digest("one") != before


def test_a_reencoded_image_has_another_digest(squares, digest):
    before = digest()
    path = squares / "one" / "cat" / "0.png"
    with Image.open(path) as image:
        image.load()
    image.save(path, compress_level=0)
    assert digest() != before


@pytest.mark.parametrize("change", ["remove", "rename", "move", "add"])
def test_the_files_of_the_domain_are_part_of_it(squares, digest, change):
    before = digest()
    path = squares / "one" / "cat" / "0.png"
    if change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(path.with_name("0a.png"))  # the order stays the same
    elif change == "move":
        path.rename(squares / "one" / "cow" / "00.png")
    else:
        shutil.copy(path, path.with_name("9.png"))
    assert digest() != before


def test_the_stored_side_is_part_of_it(squares, digest):
    """One image of another size changes how all are stored, those of the limit too."""
    before = digest(limit=1)
    picture(0, (9, 9)).save(squares / "one" / "cat" / "1.png")
    assert digest(limit=1) != before


def test_a_limit_has_a_digest_of_its_own_unless_it_leaves_nothing_out(digest):
    assert digest(limit=1) != digest()
    assert digest(limit=2) == digest(limit=99) == digest()


def test_the_place_of_the_folder_does_not_matter(squares, digest, tmp_path, cache):
    other = Path(shutil.copytree(squares, tmp_path / "elsewhere" / "copy"))
    assert open_data(other, cache).digest("one") == digest()


def test_a_loaded_domain_carries_it(squares, digest, cache):
    assert open_data(squares, cache).load("one").digest == digest()
    assert open_data(squares, cache).load("one", 1).digest == digest(limit=1)


def test_a_second_call_reads_no_image(squares, digest, cache, monkeypatch):
    before = [digest(), digest("two", 1)]

    def read(path, *_, **__):
        pytest.fail(f"read {path} again")

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(image_files.Image, "open", read)
    assert [digest(), digest("two", 1)] == before


@pytest.mark.parametrize("content", ["", "nonsense", "8"])
def test_a_damaged_memo_is_written_again(digest, cache, content):
    before = digest()
    (memo,) = cache.iterdir()
    whole = memo.read_text()
    memo.write_text(content)
    assert digest() == before and memo.read_text() == whole


def test_the_toy_has_digests_too():
    toy = Toy()
    digests = [toy.digest("photo", 1), toy.digest("photo", 2), toy.digest("sketch", 1)]
    assert len(set(digests)) == 3 and all(len(d) == 64 for d in digests)
    assert toy.load("photo", 1).digest == digests[0] == Toy().digest("photo", 1)
