"""Image files of any size and mode as RGB squares of 8 bits.

A domain whose images are all squares of one side of at most 256 pixels keeps that side. The images of any
other domain are resized to 256 x 256 without regard to their proportions, as is usual for domain adaptation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, features

from domainshift.errors import DataError

# What decides the pixels of a file: the number of the rules here, another one where they give other
# pixels; and the libraries that decode and resize. (PNG and BMP have one reading.)
DECODER = (
    f"rules 2, Pillow {PIL.__version__}, libjpeg {features.version('jpg')}, "
    f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}, libwebp {features.version('webp')}"
)
LARGEST_SIDE = 256  # pixels
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


def decode(path: Path, side: int, exact: bool = False) -> np.ndarray:
    """One image as uint8 (side, side, 3), see `read_image`.

    Raises:
        DataError: the file is unreadable or truncated; or of another size, with `exact`.
    """
    image = read_image(path)
    if image.size != (side, side):
        if exact:
            width, height = image.size
            raise DataError(f"{path} is {width} x {height} pixels, but must be {side} x {side}")
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_image(path: Path) -> Image.Image:
    """An image as a person sees it, in RGB of 8 bits.

    It is turned as its EXIF orientation says. 16 bits are scaled to 8. What is transparent, by an alpha
    channel, a palette or a transparent colour, is laid on white.

    Raises DataError for a file that is unreadable or truncated, and for a PNG of 16 bits a channel with
    a transparent colour: Pillow reads colours in 8 bits, in which it cannot be told from others.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            if (
                image.format == "PNG"
                and image.mode in ("L", "RGB")
                and "transparency" in image.info
            ):
                # the file states the colour in its own depth, and Pillow reads the pixels in 8 bits
                depth = png_depth(path)
                if depth == 16:
                    raise ValueError("its transparent colour has 16 bits a channel; use alpha")
                if depth < 8:  # grey
                    image.info["transparency"] *= 255 // (2**depth - 1)
            return as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file makes a decoder raise almost anything
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is unreadable or truncated: {error}")


def png_depth(path: Path) -> int:
    """Bits a channel in a PNG file: 1, 2, 4, 8 or 16."""
    with open(path, "rb") as file:
        return file.read(25)[24]  # the header is the first chunk of every PNG


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits, which `convert` would clip
        values = np.asarray(image).astype(np.int64)
        grey = ((values * 255 + 32767) // 65535).clip(0, 255)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def common_side(paths: Sequence[Path]) -> int:
    """The side of the images if all are squares of one side up to LARGEST_SIDE, else LARGEST_SIDE.

    Raises DataError for a file that is no image.
    """
    sides = set()
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.add(image.size)
        except Exception as error:
            raise unreadable(path, error) from error
        width, height = image.size
        if len(sides) > 1 or width != height or width > LARGEST_SIDE:
            return LARGEST_SIDE
    return width
