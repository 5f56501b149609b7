"""PACS and the toy data: reading, caching, sampling; and the commands `verify` and `fetch`.

    python experiments/data.py verify [PATH]                 is this folder the PACS of the papers?
    python experiments/data.py fetch [--to DIR] [--from SRC] get PACS from its public home

A PACS folder is `<root>/<domain>/<class>/<image>`. Each domain is decoded once into a uint8
`.npy` file and memory-mapped after that, so that epochs are not bound by JPEG decoding.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
import toy
from PIL import Image
from rich.console import Console
from rich.table import Table
from screen import Screen
from torch.utils.data import Dataset
from torchvision import transforms

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
SIDE = 227  # pixels: every image of PACS is a square of this side

# The official number of images per class, in the order of CLASSES: 2048, 2344, 1670, 3929.
OFFICIAL_COUNTS = {
    "art_painting": (379, 255, 285, 184, 201, 295, 449),
    "cartoon": (389, 457, 346, 135, 324, 288, 405),
    "photo": (189, 202, 182, 186, 199, 280, 432),
    "sketch": (772, 740, 753, 608, 816, 80, 160),
}

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_ROOT = REPOSITORY / "data" / "PACS"
DEFAULT_CACHE = REPOSITORY / "data" / "cache"

HUB_DATASET = "flwrlabs/pacs"  # parquet files with the columns image, domain, label

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """Data or an argument about data is not as it must be; the message names which and why."""


@dataclass(frozen=True)
class Domain:
    """All images of one domain, sorted by class and then by file name.

    images: uint8 (n, side, side, 3), RGB; a read-only memory map for PACS, an array for the toy
    labels: int64 (n,), 0 to 6, an index into CLASSES
    files: "<class>/<file>" of each image
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    files: tuple[str, ...]


# ------------------------------------------------------------------------------ finding and reading


def find_root(path: str | Path) -> Path:
    """The folder that holds the four domain folders: `path` or a usual place below it.

    Looked for: `path`, and `PACS`, `kfold`, `images` below it, one or two levels deep.

    Raises:
        DataError: no such folder; the message lists the places and the missing domains.
    """
    places = _likely_roots(path)
    best = min(places, key=lambda place: len(_missing_domains(place)))
    missing = _missing_domains(best)
    if missing:
        raise DataError(
            f"no PACS data under {path}: {best} has no folder {', '.join(missing)}; "
            f"looked for {', '.join(DOMAINS)} in {', '.join(map(str, places))} "
            f"(and in {', '.join(_ROOT_NAMES)} below, where present)"
        )
    return best


_ROOT_NAMES = ("PACS", "kfold", "images")


def _likely_roots(path: str | Path) -> list[Path]:
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"data folder {path} does not exist (or is no folder)")
    places = [path, *(path / name for name in _ROOT_NAMES)]
    places += [path / a / b for a, b in itertools.product(_ROOT_NAMES, _ROOT_NAMES)]
    return [place for place in places if place.is_dir()]


def _missing_domains(place: Path) -> list[str]:
    return [domain for domain in DOMAINS if not (place / domain).is_dir()]


def _class_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a class folder, sorted by name; and whatever else lies there, hidden not."""
    images, others = [], []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        is_image = entry.suffix.lower() in (".jpg", ".jpeg", ".png") and entry.is_file()
        (images if is_image else others).append(entry)
    return images, others


def _class_folders(folder: Path) -> set[str]:
    return {e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")}


def _list_domain(root: Path, name: str, limit: int | None) -> tuple[list[Path], np.ndarray]:
    """Image paths of a domain in their order, and their labels."""
    folder = root / name
    found = _class_folders(folder)
    for class_name in CLASSES:
        if class_name not in found:
            raise DataError(f"{folder} has no class folder {class_name}")
    extra = sorted(found - set(CLASSES))
    if extra:
        raise DataError(
            f"{folder} has a class too many: {', '.join(extra)}; "
            f"the classes of PACS are {', '.join(CLASSES)}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(CLASSES):
        images, _ = _class_files(folder / class_name)
        if not images:
            raise DataError(f"{folder / class_name} holds no image (.jpg, .jpeg or .png)")
        images = images[:limit]
        paths += images
        labels += [label] * len(images)
    return paths, np.array(labels, dtype=np.int64)


def _decode(path: Path) -> np.ndarray:
    """One image of PACS as uint8 (SIDE, SIDE, 3)."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.size != (SIDE, SIDE):
                width, height = image.size
                raise DataError(f"{path} is {width} x {height} pixels, but PACS is {SIDE} x {SIDE}")
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # a broken file makes a decoder raise almost anything
        raise DataError(f"{path} is unreadable or truncated: {error}") from error


def load_domain(
    data: str | Path, name: str, *, limit: int | None = None, cache: Path | None = None
) -> Domain:
    """Loads one domain of PACS, or of the toy data.

    Args:
        data: "toy", or a folder that `find_root` understands.
        name: one of DOMAINS.
        limit: images per class (the first in the order of names); None: all.
        cache: folder for the decoded images; None: `data/cache` of the repository.

    Raises:
        DataError: an argument out of its range; a domain or class missing, empty or too many; an
            image unreadable, truncated or not 227 x 227; a cache folder that cannot be written.
    """
    if name not in DOMAINS:
        raise DataError(f"domain {name!r} is unknown; known are {', '.join(DOMAINS)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, but must be at least 1 image per class")
    if str(data) == "toy":
        return Domain(name, *toy.load_toy(name, limit))
    root = find_root(data)
    paths, labels = _list_domain(root, name, limit)
    files = tuple(f"{path.parent.name}/{path.name}" for path in paths)
    images = _cached_images(name, paths, DEFAULT_CACHE if cache is None else Path(cache))
    return Domain(name, images, labels, files)


# -------------------------------------------------------------------------------------------- cache


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when complete, and vanishes upon an error.

    Written beside `path` and renamed, so that `path` is never half written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cached_images(name: str, paths: list[Path], cache: Path) -> np.ndarray:
    """The decoded images as a read-only memory map, made first where the cache has none."""
    # A changed, added or removed file changes the key, and with it the cache file that is used.
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        relative = "/".join(path.parts[-3:])
        digest.update(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    target = cache / f"{name}-{len(paths)}-{digest.hexdigest()[:16]}.npy"
    shape = (len(paths), SIDE, SIDE, 3)

    images = _open_cache(target, shape)
    if images is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _write_cache(target, name, paths, shape)
        except OSError as error:
            raise DataError(f"cannot write the image cache {target}: {error}") from error
        images = _open_cache(target, shape)
        if images is None:
            raise DataError(f"the image cache {target} changed while it was written")
    return images


def _open_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The memory map of a cache file, or None where it is absent or not of this shape and size."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        size = path.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(images, np.memmap) and size == images.offset + images.nbytes
    return images if whole and images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(target: Path, name: str, paths: list[Path], shape: tuple[int, ...]) -> None:
    # Plain writes instead of a writable map: a full disk is then an OSError, not a SIGBUS.
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    screen = Screen()
    screen.say(f"decoding {name}: {len(paths)} images, once, to {target}")
    with (
        _replacing(target) as file,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        screen.progress(f"decoding {name}", len(paths)) as advance,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(paths), 64):  # bounds how many decoded images wait for the disk
            block = paths[start : start + 64]
            for image in pool.map(_decode, block):
                file.write(image.tobytes())
            advance(len(block))


# ----------------------------------------------------------------------------------------- sampling


def _check_image_size(image_size: int) -> None:
    if image_size < 1:
        raise DataError(f"image_size is {image_size}, but must be at least 1 pixel")


def train_transform(image_size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Augmentation of the protocol: a PIL image to a float32 (3, image_size, image_size) tensor.

    At 224: Resize 256, RandomResizedCrop 224 (scale 0.7 to 1), horizontal flip, ImageNet
    normalization. Other sizes keep the proportion 256/224. Draws from torch's CPU generator.
    """
    _check_image_size(image_size)
    return transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224)),
            transforms.RandomResizedCrop(image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def test_transform(image_size: int) -> Callable[[Image.Image], torch.Tensor]:
    """A square PIL image to a normalized float32 (3, image_size, image_size) tensor."""
    _check_image_size(image_size)
    return transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


test_transform.__test__ = False  # type: ignore[attr-defined]  # pytest: a function, not a test

_WORD = 0xFFFFFFFFFFFFFFFF


def _mix(*values: int) -> int:
    """A 64-bit hash of integers; neighbouring inputs give unrelated outputs (SplitMix64 steps)."""
    state = 0
    for value in values:
        state = (state ^ (value & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


class UnlabelledImages(Dataset):
    """Images without their labels: [i] is a float32 (3, S, S) tensor.

    It is given the image array alone, so target labels have no way into training code.

    Args:
        images: uint8 (n, side, side, 3), RGB.
        indices: which images, in which order; int (m,), each 0 to n - 1.
        transform: PIL image to tensor; may draw from torch's CPU generator.
        seed, epoch: what a random transform draws for an image is a function of
            (seed, epoch, index of the image in `images`) alone: the same in any worker, in any
            order, after any resume. `epoch` may be set before each pass over the data; workers
            that outlive an epoch (`persistent_workers`) would not see it.

    Raises:
        DataError: images of another shape or dtype, or an index out of range.
    """

    def __init__(
        self,
        images: np.ndarray,
        indices: Iterable[int],
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images are {images.dtype} {images.shape}, but must be uint8 (n, side, side, 3)"
            )
        indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataError(
                f"indices are {indices.dtype} {indices.shape}, but must be integers (m,)"
            )
        outside = indices[(indices < 0) | (indices >= len(images))]
        if outside.size:
            raise DataError(
                f"index {outside[0]} is out of range: it must be 0 to {len(images) - 1}"
            )
        self.images = images
        self.indices = indices.astype(np.int64)
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        index = int(self.indices[i])
        image = Image.fromarray(np.array(self.images[index]))  # a copy: the map is read-only
        with torch.random.fork_rng(devices=[]):
            self.start_draws(index)
            return self.transform(image)

    def start_draws(self, index: int) -> None:
        """Seed torch's CPU generator for what a random transform draws for that image."""
        # The CPU generator alone: torch.manual_seed would reset those of the GPUs too, which
        # fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(_mix(self.seed, self.epoch, index))


class LabelledImages(UnlabelledImages):
    """Images with labels: [i] is (float32 (3, S, S) tensor, int label 0 to 6).

    Arguments, random draws and errors are those of `UnlabelledImages`, but for `domain`.
    """

    def __init__(
        self,
        domain: Domain,
        indices: Iterable[int],
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(domain.images, indices, transform, seed, epoch)
        self.labels = domain.labels[self.indices]

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(i), int(self.labels[i])


def split_holdout(domain: Domain, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a domain into training and held-out images, class by class.

    Each class gives `fraction` of its images, rounded half up, but at least 1 and never all.

    Returns:
        (training, held-out) indices into `domain.images`: int64, each sorted; a function of the
        labels, fraction and seed alone.

    Raises:
        DataError: fraction not above 0 and below 1, a negative seed, or a class of one image.
    """
    if not 0 < fraction < 1:
        raise DataError(f"holdout fraction is {fraction}, but must be above 0 and below 1")
    if seed < 0:
        raise DataError(f"seed is {seed}, but must be at least 0")
    held_out = np.zeros(len(domain.labels), dtype=bool)
    for label in np.unique(domain.labels):
        members = np.flatnonzero(domain.labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {CLASSES[label]} of {domain.name} has 1 image: too few to hold one out"
            )
        count = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
        chosen = np.random.default_rng([seed, int(label)]).permutation(members)[:count]
        held_out[chosen] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


# ------------------------------------------------------------------------------------------- verify


def verify(path: str | Path, console: Console | None = None) -> list[str]:
    """Compares a folder with the official PACS and prints a table of counts.

    Returns:
        Every problem found, one sentence each; empty when all is right.

    Raises:
        DataError: no folder with any of the four domains is found: there is nothing to compare.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    root = min(_likely_roots(path), key=lambda place: len(_missing_domains(place)))
    missing = _missing_domains(root)
    if len(missing) == len(DOMAINS):
        find_root(path)  # raises, and says where it looked
    problems = [f"{root / domain}: the domain folder is missing" for domain in missing]
    complete = not missing  # every domain and class has an image, and no class is unknown
    images: dict[tuple[str, str], list[Path]] = {}
    for domain in DOMAINS:
        if domain in missing:
            images.update({(domain, class_name): [] for class_name in CLASSES})
            continue
        found = _class_folders(root / domain)
        for extra in sorted(found - set(CLASSES)):
            problems.append(f"{root / domain / extra}: a class too many")
            complete = False
        for class_name, official in zip(CLASSES, OFFICIAL_COUNTS[domain], strict=True):
            folder = root / domain / class_name
            files, others = _class_files(folder) if class_name in found else ([], [])
            images[domain, class_name] = files
            problems += [f"{other}: neither JPEG nor PNG, the reader skips it" for other in others]
            if class_name not in found:
                problems.append(f"{folder}: the class folder is missing")
            elif len(files) != official:
                problems.append(f"{folder}: {len(files)} images, officially {official}")
            complete = complete and bool(files)

    broken = _undecodable([path for files in images.values() for path in files])
    problems += broken
    lists, list_problems = _verify_lists(root)
    problems += list_problems

    console.print(_count_table(root, images))
    console.print(f"labels: {', '.join(f'{i} {name}' for i, name in enumerate(CLASSES))}")
    console.print(
        f"official lists: {len(lists)} found"
        + (f" in {', '.join(sorted({str(path.parent) for path in lists}))}" if lists else "")
    )
    if not problems:
        console.print("all right: this is PACS")
    elif complete and not broken:
        console.print(
            "not the whole official PACS, but the reader can use it: "
            "every domain and class is there and every image is readable"
        )
    else:
        console.print("the reader cannot use this folder as it is")
    return problems


def _count_table(root: Path, images: dict[tuple[str, str], list[Path]]) -> Table:
    table = Table(title=f"images found / official, in {root}")
    table.add_column("class")
    for domain in DOMAINS:
        table.add_column(domain, justify="right")
    rows: dict[str, list[tuple[int, int]]] = {
        class_name: [(len(images[d, class_name]), OFFICIAL_COUNTS[d][label]) for d in DOMAINS]
        for label, class_name in enumerate(CLASSES)
    }
    columns = zip(*rows.values(), strict=True)
    rows["all"] = [tuple(map(sum, zip(*column, strict=True))) for column in columns]
    for name, pairs in rows.items():
        cells = [f"{n} / {m}" if n == m else f"[red]{n} / {m}[/red]" for n, m in pairs]
        table.add_row(name, *cells, end_section=name == CLASSES[-1])
    return table


def _undecodable(paths: list[Path]) -> list[str]:
    """Decodes all images; a sentence for each that is unreadable or of another size."""

    def check(path: Path) -> str | None:
        try:
            _decode(path)
        except DataError as error:
            return str(error)
        return None

    problems = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Screen().progress("reading", len(paths)) as advance,
    ):
        for problem in pool.map(check, paths):
            if problem is not None:
                problems.append(problem)
            advance(1)
    return problems


_LIST_FOLDERS = (
    "",
    "splits",
    "pacs_label",
    "PACS_label",
    "labels",
    "lists",
    "Train val splits and h5py files pre-read",  # its name in the authors' own folder
)


def _verify_lists(root: Path) -> tuple[list[Path], list[str]]:
    """The official list files near `root`, and what in them disagrees with the folder."""
    lists, problems = [], []
    for near, folder in itertools.product((root, root.parent, root.parent.parent), _LIST_FOLDERS):
        for domain, part in itertools.product(DOMAINS, ("train", "crossval", "test")):
            path = near / folder / f"{domain}_{part}_kfold.txt"
            if path.is_file():
                lists.append(path)
                problems += _list_problems(root, path)
    return lists, problems


def _list_problems(root: Path, path: Path) -> list[str]:
    """Disagreements of one list: lines `art_painting/dog/pic_001.jpg 1`, labels 1-7 or 0-6."""
    problems: list[str] = []
    entries: list[tuple[int, str, str, int]] = []  # line number, file, its class, label
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        # From the right: a file name may hold spaces. Folders above the domain do not matter.
        name, _, label = line.strip().rpartition(" ")
        parts = PurePosixPath(name.strip()).parts[-3:]
        if len(parts) < 3 or not label.isdecimal():
            problems.append(f"{path}, line {number}: not '<domain>/<class>/<file> <label>'")
        elif parts[0] not in DOMAINS or parts[1] not in CLASSES:
            problems.append(f"{path}, line {number}: unknown domain or class in {name}")
        else:
            entries.append((number, "/".join(parts), parts[1], int(label)))

    # The official lists count from 1, some copies from 0: take what more of the lines agree with.
    agreeing = [
        sum(label == CLASSES.index(c) + first for *_, c, label in entries) for first in (0, 1)
    ]
    first = 0 if agreeing[0] > agreeing[1] else 1
    missing = []
    for number, file, class_name, label in entries:
        expected = CLASSES.index(class_name) + first
        if label != expected:
            problems.append(
                f"{path}, line {number}: label {label} for {file}, "
                f"but {class_name} is {expected} where labels are {first} to {first + 6}"
            )
        if not (root / file).is_file():
            missing.append(f"{path}, line {number}: {file} does not exist")
    return problems + missing


# -------------------------------------------------------------------------------------------- fetch


_ALTERNATIVES = (
    "Instead: pass parquet files you already have with --from FILE_OR_FOLDER; or get the images "
    "from the site of the PACS authors (https://sketchx.eecs.qmul.ac.uk/downloads/) and point "
    "--data at the folder; or use the built-in drawings with --data toy"
)


def _download() -> Path:
    """Downloads the parquet files of HUB_DATASET (about 190 MB), or finds them downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(
            f"fetching {HUB_DATASET} needs two packages: pip install huggingface_hub pyarrow. "
            f"{_ALTERNATIVES}"
        ) from error
    try:
        folder = snapshot_download(
            repo_id=HUB_DATASET, repo_type="dataset", allow_patterns=["data/*.parquet"]
        )
    except Exception as error:  # network, proxy, hub and disk errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot download {HUB_DATASET} from the Hugging Face hub: {reason}. {_ALTERNATIVES}"
        ) from error
    return Path(folder)


def fetch(to: str | Path = DEFAULT_ROOT, source: str | Path | None = None) -> None:
    """Writes PACS to `<to>/<domain>/<class>/<file>`, image bytes exactly as stored.

    Images already there are kept, so an interrupted fetch goes on where it was.

    Args:
        to: folder to write to; made if absent.
        source: a parquet file or a folder of them, with the columns image (struct of bytes and
            path), domain (string) and label (0 to 6); None: downloads HUB_DATASET.

    Raises:
        DataError: no network, a package missing, no parquet file, other columns, another label
            order, an unknown domain or label, no image bytes; or a file that is there already
            with other contents (it is left alone).
    """
    to = Path(to).expanduser()
    source = _download() if source is None else Path(source).expanduser()
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"reading parquet files needs a package: pip install huggingface_hub pyarrow. "
            f"{_ALTERNATIVES}"
        ) from error
    if source.is_dir():
        sources = sorted(source.rglob("*.parquet"))
    else:
        sources = [source] if source.is_file() else []
    if not sources:
        raise DataError(f"no parquet file at {source}")

    tables = []
    for path in sources:
        try:
            tables.append(parquet.ParquetFile(path))
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{path} cannot be read as parquet: {error}") from error
        _check_schema(path, tables[-1].schema_arrow)

    written = kept = row = 0
    taken: set[str] = set()
    screen = Screen()
    total = sum(table.metadata.num_rows for table in tables)
    screen.say(f"writing {total} images to {to}")
    with screen.progress("writing", total) as advance:
        for path, table in zip(sources, tables, strict=True):
            for batch in table.iter_batches(batch_size=64, columns=["image", "domain", "label"]):
                for record in batch.to_pylist():
                    file, content = _image_file(f"{path}, row {row}", row, record, taken)
                    if _write_once(to / file, content):
                        written += 1
                    else:
                        kept += 1
                    row += 1
                advance(len(batch))
    screen.say(f"wrote {written} images, kept {kept} that were there")


def _check_schema(path: Path, schema) -> None:
    """Checks the columns, and the label order where the file records it."""
    for column in ("image", "domain", "label"):
        if column not in schema.names:
            raise DataError(
                f"{path} has no column {column}; it has {', '.join(schema.names)}, "
                "and needs image, domain and label"
            )
    try:
        # What the `datasets` library leaves in a parquet file: the features with their names.
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return
    if tuple(names) != CLASSES:
        raise DataError(
            f"{path} orders its labels {', '.join(map(str, names))}; expected {', '.join(CLASSES)}"
        )


def _image_file(where: str, row: int, record: dict, taken: set[str]) -> tuple[str, bytes]:
    """The path (relative to the root) and the bytes of one row; `taken`: the paths in use."""
    domain, label, image = record["domain"], record["label"], record["image"]
    if domain not in DOMAINS:
        raise DataError(f"{where}: domain {domain!r} is unknown; known are {', '.join(DOMAINS)}")
    if not isinstance(label, int) or not 0 <= label < len(CLASSES):
        raise DataError(f"{where}: label is {label!r}, but must be 0 to {len(CLASSES) - 1}")
    content = image.get("bytes") if isinstance(image, dict) else None
    if not content:
        raise DataError(f"{where}: the image column holds no bytes")
    if content.startswith(b"\xff\xd8\xff"):
        suffix = ".jpg"
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        suffix = ".png"
    else:
        raise DataError(f"{where}: the image is neither JPEG nor PNG")

    stored = PurePosixPath((image.get("path") or "").replace("\\", "/"))
    class_name = CLASSES[label]
    # Only the name is taken from the file; a path could lead out of the folder.
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", stored.stem).lstrip(".") or f"{row:05d}"
    in_path = [part for part in stored.parts[:-1] if part in CLASSES]
    if in_path and in_path[-1] != class_name:
        raise DataError(f"{where}: label {label} is {class_name}, but its path is {stored}")
    for copy in itertools.count():
        file = f"{domain}/{class_name}/{stem}{f'_{copy + 1}' if copy else ''}{suffix}"
        if file.lower() not in taken:  # lower: some file systems do not tell case apart
            taken.add(file.lower())
            return file, content
    raise AssertionError("unreachable: the loop above has no end")


def _write_once(path: Path, content: bytes) -> bool:
    """Writes a file whole; False where it is there already. Other contents are a DataError."""
    if path.exists():
        if path.read_bytes() == content:
            return False
        raise DataError(
            f"{path} is there already with other contents: move it away, or choose another --to"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    return True


# ------------------------------------------------------------------------------------------ command


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0: all right; 1: problems found; 2: bad input."""
    parser = argparse.ArgumentParser(description="Check or fetch the PACS data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="compare a folder with the official PACS")
    command.add_argument("path", nargs="?", default=DEFAULT_ROOT, metavar="PATH",
                         help="PACS folder (default: data/PACS)")  # fmt: skip
    command = commands.add_parser("fetch", help=f"get PACS from {HUB_DATASET}, then verify it")
    command.add_argument("--to", default=DEFAULT_ROOT, metavar="FOLDER",
                         help="where to write (default: data/PACS)")  # fmt: skip
    command.add_argument("--from", dest="source", metavar="FILE_OR_FOLDER",
                         help="local parquet file(s) instead of a download")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            fetch(options.to, options.source)
            problems = verify(options.to)
        else:
            problems = verify(options.path)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
