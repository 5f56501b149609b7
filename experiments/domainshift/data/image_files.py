"""Image files of any size and mode as RGB squares of 8 bits.

A domain whose images are all squares of one side of at most 256 pixels keeps that side. The images of any
other domain are resized to 256 x 256 without regard to their proportions, as is usual for domain adaptation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from domainshift.errors import DataError

CONVERSION = 1  # number of the rules here: another one where they give other pixels for a file
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
    """An image in RGB, upright. Grey of 16 bits is scaled to 8; transparent pixels are laid on white.

    Raises DataError for a file that is unreadable or truncated.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file makes a decoder raise almost anything
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is unreadable or truncated: {error}")


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, for which `convert` would clip
        grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
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
