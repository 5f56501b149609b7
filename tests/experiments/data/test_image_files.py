"""Images of every kind are read right, or named."""

import io
import struct
import zlib

import numpy as np
import pytest
from domainshift.data import open_data
from domainshift.data.image_files import as_rgb, decode, read_image
from domainshift.errors import DataError
from made_folders import make_squares, picture
from PIL import Image

RED, WHITE = (255, 0, 0), (255, 255, 255)
GREY, COLOURS, COLOURS_WITH_ALPHA = 0, 2, 6  # as PNG numbers them


def saved(tmp_path, image, suffix="png", **options):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return path


def pixels_of(path):
    return np.asarray(read_image(path))


def png(path, depth, colour, row, *chunks):
    """A PNG of one row of pixels. Pillow writes no grey of 2 or 4 bits, nor colours of 16."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    channels = {GREY: 1, COLOURS: 3, COLOURS_WITH_ALPHA: 4}[colour]
    header = struct.pack(">IIBBBBB", 8 * len(row) // depth // channels, 1, depth, colour, 0, 0, 0)
    content = (b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in content))
    return path


def words(*values):
    """Numbers of 16 bits as PNG has them."""
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize("suffix", ["bmp", "png", "webp"])
def test_lossless_kinds_keep_their_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, picture(1, (9, 5)), suffix, **options)
    np.testing.assert_array_equal(pixels_of(path), np.asarray(picture(1, (9, 5))))


def test_a_kind_is_told_by_content_not_by_suffix(tmp_path):
    path = saved(tmp_path, picture(1, (9, 5)))
    path = path.rename(tmp_path / "image.jpg")
    np.testing.assert_array_equal(pixels_of(path), np.asarray(picture(1, (9, 5))))


def test_grey(tmp_path):
    grey = picture(1, (9, 5)).convert("L")
    pixels = pixels_of(saved(tmp_path, grey))
    assert pixels.shape == (5, 9, 3)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.asarray(grey))


def test_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    pixels = pixels_of(saved(tmp_path, Image.fromarray(bits)))
    np.testing.assert_array_equal(pixels[..., 0], 255 * bits)


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
    pixels = pixels_of(saved(tmp_path, Image.fromarray(values)))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]  # to the nearest of 257 steps
    assert (pixels == pixels[..., :1]).all()


def test_grey_of_16_bits_in_a_wider_mode():
    """Older versions of PIL read 16 bits into 32."""
    image = Image.fromarray(np.array([[0, 257, 65535]], np.int32))
    assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 1, 255]


def test_colours_of_16_bits_are_scaled_not_clipped(tmp_path):
    row = words(0, 257, 32896, 65535, 514, 128 * 257)
    pixels = pixels_of(png(tmp_path / "image.png", 16, COLOURS, row))
    assert pixels.tolist() == [[[0, 1, 128], [255, 2, 128]]]


def test_alpha_of_16_bits_is_laid_on_white(tmp_path):
    row = words(0, 0, 0, 0, 0, 0, 0, 128 * 257, 257, 514, 771, 65535)
    pixels = pixels_of(png(tmp_path / "image.png", 16, COLOURS_WITH_ALPHA, row))
    assert pixels.tolist() == [[[255] * 3, [127] * 3, [1, 2, 3]]]


def test_ordinary_files_have_the_pixels_of_the_decoder(tmp_path):
    """All of PACS is such: a rule for another kind must not touch them."""
    image = picture(1, (33, 21))
    files = {
        "colours.jpg": (image, {}),
        "grey.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "progressive.jpg": (image, {"progressive": True}),
        "colours.png": (image, {}),
        "grey.png": (image.convert("L"), {}),
        "palette.png": (image.quantize(16), {}),
    }
    for name, (stored, options) in files.items():
        path = tmp_path / name
        stored.save(path, **options)
        with Image.open(path) as opened:
            np.testing.assert_array_equal(pixels_of(path), np.asarray(opened.convert("RGB")), name)


def test_cmyk(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", quality=100)
    assert np.abs(pixels_of(path).astype(int) - RED).max() <= 3  # JPEG


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels_of(saved(tmp_path, image)).tolist() == [[list(RED), [0, 0, 255]]]


def test_a_transparent_colour_of_a_palette_is_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path, image, transparency=1)
    assert pixels_of(path).tolist() == [[list(RED), list(WHITE)]]


def test_every_entry_of_a_palette_has_its_alpha(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, 0, 0, 255, 0, 255, 0])
    image.putdata([0, 1, 2])
    path = saved(tmp_path, image, transparency=bytes([0, 128, 255]))
    assert pixels_of(path).tolist() == [[list(WHITE), [127, 127, 255], [0, 255, 0]]]


@pytest.mark.parametrize(
    "depth, row, key, expected",
    [
        (1, bytes([0b01010101]), 0, [255] * 8),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (4, bytes([0x5A]), 5, [255, 170]),
        (8, bytes([5, 10]), 5, [255, 10]),
        (16, words(1000, 1001, 32896), 1000, [255, 4, 128]),
    ],
)
def test_a_transparent_grey_of_every_depth_is_laid_on_white(tmp_path, depth, row, key, expected):
    path = png(tmp_path / "image.png", depth, GREY, row, (b"tRNS", words(key)))
    assert pixels_of(path)[0, :, 0].tolist() == expected


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    """Pillow reads 8 bits, in which it is equal to colours that are not transparent."""
    row = words(1000, 2000, 3000, 1001, 2000, 3000)
    path = png(tmp_path / "image.png", 16, COLOURS, row, (b"tRNS", words(1000, 2000, 3000)))
    with pytest.raises(
        DataError, match=r"image.png .*its transparent colour has 16 bits a channel"
    ):
        read_image(path)


@pytest.mark.parametrize("mode, colour", [("RGB", RED), ("L", 7)])
def test_a_transparent_colour_without_a_palette_is_laid_on_white(tmp_path, mode, colour):
    path = saved(tmp_path, Image.new(mode, (2, 2), colour), transparency=colour)
    assert (pixels_of(path) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_alpha_is_laid_on_white(tmp_path, suffix):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    path = saved(tmp_path, image, suffix, **({"lossless": True} if suffix == "webp" else {}))
    assert pixels_of(path)[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_grey_with_alpha(tmp_path):
    image = Image.new("LA", (1, 1), (0, 0))
    assert pixels_of(saved(tmp_path, image)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    """Four colours in the corners tell the eight orientations apart."""
    corners = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], np.uint8)
    upright = Image.fromarray(corners.repeat(16, 0).repeat(24, 1))
    method = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
              6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    turned = upright
    if orientation > 1:  # as a camera stores it that is to be turned in the opposite way
        turned = upright.transpose(Image.Transpose[method[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pixels_of(saved(tmp_path, turned, suffix, exif=exif, quality=95))
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels[8::16, 12::24].astype(int) - corners).max() < 12


def test_a_broken_exif_block_does_not_matter(tmp_path):
    path = saved(tmp_path, picture(1, (16, 16)), "jpg", exif=b"Exif\0\0nonsense that is no TIFF")
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels_of(path), np.asarray(image.convert("RGB")))


def test_an_image_is_resized_to_a_square(tmp_path):
    pixels = decode(saved(tmp_path, Image.new("RGB", (30, 7), RED)), 10)
    assert pixels.shape == (10, 10, 3) and (pixels == RED).all()


def damaged(content, damage):
    return {
        "truncated": content[: len(content) // 2],
        "garbage": b"no image" * 50,
        "zero bytes": b"",
    }[damage]


@pytest.mark.parametrize("suffix", ["bmp", "jpg", "png", "webp"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "zero bytes"])
def test_a_broken_image_is_named_and_leaves_no_cache(tmp_path, cache, suffix, damage):
    root = make_squares(tmp_path / "squares", 32, suffix)
    path = root / "two" / "cat" / f"1.{suffix}"
    path.write_bytes(damaged(path.read_bytes(), damage))
    data = open_data(root, cache)
    with pytest.raises(DataError, match=r"two/cat/1.\w+ is unreadable or truncated") as caught:
        data.load("two")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert list(cache.glob("*.npy")) == [] and list(cache.glob(".*")) == []
    assert len(data.load("one").images) == 4  # other domains can be used


def test_another_kind_of_file_under_the_name_of_an_image(tmp_path):
    buffer = io.BytesIO()
    picture(1, (8, 8)).save(buffer, "TIFF")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"image.png is unreadable"):
        read_image(path)
