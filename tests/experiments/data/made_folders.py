"""Small data sets of noise, in the layouts of the real ones."""

import io

import numpy as np
from domainshift.data.pacs import CLASSES, DOMAINS
from PIL import Image


def picture(number, size=(227, 227)):
    """A noisy, hence unique, image."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number, kind):
    buffer = io.BytesIO()
    picture(number).save(buffer, kind)
    return buffer.getvalue()


def make_pacs(root, per_class=2):
    """A tiny PACS: JPEG in the first three domains, PNG sketches."""
    number = 0
    for domain in DOMAINS:
        for class_name in CLASSES:
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for i in range(per_class):
                suffix = "png" if domain == "sketch" else "jpg"
                picture(number).save(folder / f"pic_{i:03d}.{suffix}")
                number += 1
    return root


OFFICE_DOMAINS = ("Art", "Clipart", "Product", "Real World")
OFFICE_CLASSES = ("Alarm_Clock", "Bed", "Fork", "Mug", "TV")


def make_office(root, per_class=2):
    """A tiny Office-Home: other names, another number of classes, every image of a size of its own."""
    number = 0
    for domain in OFFICE_DOMAINS:
        for class_name in OFFICE_CLASSES:
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for i in range(per_class):
                picture(number, (40 + number, 90 - number)).save(folder / f"{i + 1:05d}.jpg")
                number += 1
    return root


def make_squares(root, side=8, suffix="png", domains=("one", "two"), classes=("cat", "cow")):
    """Two images of one side in each class."""
    for d, domain in enumerate(domains):
        for c, class_name in enumerate(classes):
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for i in range(2):
                picture(100 * d + 10 * c + i, (side, side)).save(folder / f"{i}.{suffix}")
    return root
