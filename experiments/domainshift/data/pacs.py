"""PACS (Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017): what is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from domainshift.data.folder import (
    DATA_FOLDER,
    Folder,
    Stray,
    class_files,
    find_strays,
    is_utf8,
    subfolders,
)
from domainshift.errors import DataError

NAME = "PACS"
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
SIDE = 227  # pixels: every image is a square of this side

# The official number of images per class, in the order of CLASSES: 2048, 2344, 1670, 3929.
OFFICIAL_COUNTS = {
    "art_painting": (379, 255, 285, 184, 201, 295, 449),
    "cartoon": (389, 457, 346, 135, 324, 288, 405),
    "photo": (189, 202, 182, 186, 199, 280, 432),
    "sketch": (772, 740, 753, 608, 816, 80, 160),
}

DEFAULT_ROOT = DATA_FOLDER / "PACS"

ROOT_NAMES = ("PACS", "kfold", "images")
LIST_FOLDERS = (
    "",
    "splits",
    "pacs_label",
    "PACS_label",
    "labels",
    "lists",
    "Train val splits and h5py files pre-read",  # its name in the authors' own folder
)


class Pacs(Folder):
    """The folder `<root>/<domain>/<class>/<image>` of PACS, whose images keep their 227 x 227 pixels."""

    side = SIDE

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        super().__init__(root, cache, DOMAINS, NAME)

    def official_counts(self, domain: str) -> tuple[int, ...]:
        self.check_domain(domain)
        return OFFICIAL_COUNTS[domain]


def find_pacs(path: Path) -> Path | None:
    """The folder with the domains and classes of PACS: `path`, or a usual place below it.

    The places are `PACS`, `kfold` and `images`, one or two levels below `path`.

    Raises DataError if `path` is no folder.
    """
    root = likely_root(path)
    complete = all(
        (root / domain).is_dir() and subfolders(root / domain) == list(CLASSES)
        for domain in DOMAINS
    )
    return root if complete else None


def likely_root(path: Path) -> Path:
    """Of the places of `find_pacs` the one that holds the most domains of PACS."""
    if not path.is_dir():
        raise DataError(
            f"data: {str(path)!r} is not a folder; allowed: toy, or a folder of domains"
        )
    if not is_utf8(f"{path}{path.resolve()}"):  # both go into records, which are text
        raise DataError(f"data: {str(path)!r} is not allowed; allowed: a path in UTF-8")
    places = [path, *(path / name for name in ROOT_NAMES)]
    places += [path / a / b for a, b in itertools.product(ROOT_NAMES, ROOT_NAMES)]
    return min((place for place in places if place.is_dir()), key=lambda p: len(missing_domains(p)))


def missing_domains(root: Path) -> list[str]:
    return [domain for domain in DOMAINS if not (root / domain).is_dir()]


# --- comparison with the official data set ----------------------------------------------------


class Comparison(NamedTuple):
    """How a folder differs from the official data set."""

    images: dict[tuple[str, str], list[Path]]  # by domain and class
    strays: list[Stray]
    problems: list[str]  # a sentence each
    usable: bool  # whether a run can read the folder: all domains and classes, and no other class


def compare(root: Path) -> Comparison:
    """The domains, classes and numbers of files below `root` beside the official ones."""
    missing = missing_domains(root)
    problems = [f"{root / domain}: the domain folder is missing" for domain in missing]
    images, usable = {}, not missing
    for domain in DOMAINS:
        names = [] if domain in missing else subfolders(root / domain)
        others = sorted(set(names) - set(CLASSES))
        problems += [f"{root / domain / other}: not a class of {NAME}" for other in others]
        for class_name, official in zip(CLASSES, OFFICIAL_COUNTS[domain], strict=True):
            folder = root / domain / class_name
            files = class_files(folder) if class_name in names else []
            images[domain, class_name] = [folder / file for file in files]
            if class_name not in names and domain not in missing:
                problems.append(f"{folder}: the class folder is missing")
            elif class_name in names and len(files) != official:
                problems.append(f"{folder}: {len(files)} images, officially {official}")
            usable = usable and bool(files) and not others
    strays = find_strays(root, [domain for domain in DOMAINS if domain not in missing])
    return Comparison(images, strays, problems, usable)


def official_lists(root: Path) -> list[Path]:
    """The official list files in `root` and in the usual places near it."""
    return [
        path
        for near, folder in itertools.product((root, root.parent, root.parent.parent), LIST_FOLDERS)
        for domain, part in itertools.product(DOMAINS, ("train", "crossval", "test"))
        if (path := near / folder / f"{domain}_{part}_kfold.txt").is_file()
    ]


def list_problems(root: Path, path: Path) -> Iterator[str]:
    """Where a list disagrees with the folder or its own name. Lines: `art_painting/dog/pic_001.jpg 1`."""
    rows: list[tuple[str, str, str, int]] = []  # where, file, class, label
    own = next(domain for domain in DOMAINS if path.name.startswith(f"{domain}_"))
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        # from the right, because a file name may hold spaces; folders above the domain do not matter
        name, _, label = line.strip().rpartition(" ")
        parts = PurePosixPath(name.strip()).parts[-3:]
        if len(parts) < 3 or not label.isdecimal():
            yield f"{where}: not '<domain>/<class>/<file> <label>'"
        elif parts[0] not in DOMAINS or parts[1] not in CLASSES:
            yield f"{where}: unknown domain or class in {name}"
        else:
            if parts[0] != own:
                yield f"{where}: {'/'.join(parts)} is not of {own}, the domain of the list"
            rows.append((where, "/".join(parts), parts[1], int(label)))

    # the official lists count from 1 and some copies from 0: whichever more of the lines agree with
    agreeing = [sum(label == CLASSES.index(c) + first for *_, c, label in rows) for first in (0, 1)]
    first = 0 if agreeing[0] > agreeing[1] else 1
    for where, file, class_name, label in rows:
        expected = CLASSES.index(class_name) + first
        if label != expected:
            yield (
                f"{where}: label {label} for {file}, "
                f"but {class_name} is {expected} where labels are {first} to {first + 6}"
            )
        if not (root / file).is_file():
            yield f"{where}: {file} does not exist"
