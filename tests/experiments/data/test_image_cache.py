"""Images are converted once; the cache follows the files, and is whole or absent."""

import os

import numpy as np
import PIL
import pytest
from domainshift.data import folder, image_files, open_data
from domainshift.errors import DataError
from made_folders import make_squares, picture
from PIL import features


def test_second_load_decodes_nothing(tiny_pacs, cache, monkeypatch):
    first = open_data(tiny_pacs, cache).load("photo")
    assert len(list(cache.glob("*.npy"))) == 1
    monkeypatch.setattr(folder, "decode", lambda path, *_: pytest.fail(f"decoded {path} again"))
    again = open_data(tiny_pacs, cache).load("photo")
    np.testing.assert_array_equal(first.images, again.images)


def test_a_changed_image_is_decoded_again(tiny_pacs, cache):
    open_data(tiny_pacs, cache).load("sketch")
    picture(1234).save(tiny_pacs / "sketch" / "dog" / "pic_000.png")
    changed = open_data(tiny_pacs, cache).load("sketch")
    np.testing.assert_array_equal(changed.images[0], np.asarray(picture(1234)))


@pytest.mark.parametrize("how", ["overwritten", "exchanged"])
def test_a_replaced_image_of_the_same_size_and_time_is_decoded_again(tmp_path, cache, how):
    root = make_squares(tmp_path / "bitmaps", suffix="bmp")
    path = root / "one" / "cat" / "0.bmp"
    os.utime(path, (10**9, 10**9))
    open_data(root, cache).load("one")
    size, new = path.stat().st_size, path if how == "overwritten" else tmp_path / "new.bmp"
    picture(77, (8, 8)).save(new)
    os.utime(new, (10**9, 10**9))
    new.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 10**9)
    pixels = open_data(root, cache).load("one").images[0]
    np.testing.assert_array_equal(pixels, np.asarray(picture(77, (8, 8))))


def test_another_decoder_decodes_again(tiny_pacs, cache, monkeypatch):
    """JPEG has more than one reading, so an update of the decoder can change the pixels."""
    before = open_data(tiny_pacs, cache).load("photo")
    monkeypatch.setattr(folder, "DECODER", "of another version")
    monkeypatch.setattr(folder, "decode", lambda *_: np.zeros((227, 227, 3), np.uint8))
    after = open_data(tiny_pacs, cache).load("photo")
    assert before.images.any() and not after.images.any()
    assert after.digest == before.digest  # it is of the files


def test_the_decoder_has_a_version():
    assert f"Pillow {PIL.__version__}" in image_files.DECODER
    assert f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}" in image_files.DECODER


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage", "empty", "other_shape", "pickle"])
def test_a_damaged_cache_is_rebuilt(tiny_pacs, cache, damage):
    expected = np.array(open_data(tiny_pacs, cache).load("photo").images)
    (file,) = cache.glob("*.npy")
    content = file.read_bytes()
    if damage == "other_shape":
        np.save(file, np.zeros((14, 4, 4, 3), np.uint8))
    elif damage == "pickle":
        np.save(file, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(
            {
                "cut": content[:-1],
                "longer": content + b"x",
                "garbage": b"\0" * len(content),
                "empty": b"",
            }[damage]
        )
    before = sorted(cache.iterdir())
    np.testing.assert_array_equal(open_data(tiny_pacs, cache).load("photo").images, expected)
    assert file.read_bytes() == content
    assert sorted(cache.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tiny_pacs, cache, monkeypatch):
    data = open_data(tiny_pacs, cache)
    data.digest("photo")
    before = sorted(cache.iterdir())

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DataError, match=r"^cannot write the image cache .*No space left"):
        data.load("photo")
    data.digest("sketch")  # is read again another time
    assert sorted(cache.iterdir()) == before


def test_a_cache_folder_that_is_a_file(tiny_pacs, cache):
    cache.write_text("in the way")
    with pytest.raises(DataError, match=r"^cannot write the image cache"):
        open_data(tiny_pacs, cache).load("photo")
