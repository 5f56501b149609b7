"""What experiments ask of a data set; and any folder `<domain>/<class>/<image>` as a data set.

Images become RGB squares of 8 bits once, in a cache folder (see `image_files`). A digest of the files of a
domain names what is in the cache, so exchanged or re-encoded images are other data; the decoder is in the
name too. Whatever lies in the folder and is not read is a stray: it is named, and counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from domainshift.data.domain import Domain
from domainshift.data.image_files import DECODER, SUFFIXES, common_side, decode
from domainshift.errors import DataError, listing
from domainshift.files import replacing
from domainshift.progress import Screen

DATA_FOLDER = Path(__file__).resolve().parents[3] / "data"  # of the repository
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
DIGEST = 1  # number of the way in which `content_digest` is made: records hold its digests


class DataSet:
    """Labelled images of several domains with the same classes.

    Attributes:
        name: for records and messages.
        domains, classes: their names, in alphabetical order; a label is an index into `classes`.
        defaults: values of switches that suit this data set.
        remarks: warnings that every record over it carries.
    """

    name: str
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    defaults: Mapping[str, Any] = MappingProxyType({})
    remarks: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._domains: dict[tuple[str, int | None], Domain] = {}

    def load(self, domain: str, limit: int | None = None) -> Domain:
        """The images of a domain. Every call gives the same arrays.

        Args:
            limit: images per class, the first in the order of names; None: all.

        Raises:
            DataError: an unknown domain, a limit below 1, an unreadable image, or a cache folder that
                cannot be written.
        """
        selection = self._selection(domain, limit)
        if selection not in self._domains:
            self._domains[selection] = self._read(*selection)
        return self._domains[selection]

    def counts(self, domain: str, limit: int | None = None) -> tuple[int, ...]:
        """Images of each class. No image is read. Raises DataError like `load`."""
        self.check_domain(domain)
        if limit is not None and limit < 1:
            raise DataError(f"limit: {limit} is not allowed; allowed: at least 1 image per class")
        return tuple(n if limit is None else min(n, limit) for n in self._sizes(domain))

    def digest(self, domain: str, limit: int | None = None) -> str:
        """SHA-256, in hex, of what decides the pixels and labels of `load`, but for the decoder's version.

        Raises DataError like `load`.
        """
        return self._digest(*self._selection(domain, limit))

    def official_counts(self, domain: str) -> tuple[int, ...] | None:
        """Images per class in the published data set, where that is known."""
        return None

    def check_domain(self, domain: str) -> None:
        """Raises DataError for a domain that the data set does not have."""
        if domain not in self.domains:
            raise DataError(
                f"domain: {domain!r} is not a domain of {self.name}; "
                f"allowed: {' | '.join(self.domains)}"
            )

    def _selection(self, domain: str, limit: int | None) -> tuple[str, int | None]:
        """The arguments, checked. A limit that leaves nothing out becomes None."""
        whole = self.counts(domain, limit) == self._sizes(domain)
        return domain, None if whole else limit

    def _sizes(self, domain: str) -> tuple[int, ...]:
        """Images of each class of a known domain."""
        raise NotImplementedError(f"{type(self).__name__} must define _sizes: DataSet is abstract")

    def _read(self, domain: str, limit: int | None) -> Domain:
        """The images of a known domain. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} must define _read: DataSet is abstract")

    def _digest(self, domain: str, limit: int | None) -> str:
        """Hex hash of the images of a known domain."""
        raise NotImplementedError(f"{type(self).__name__} must define _digest: DataSet is abstract")


class Folder(DataSet):
    """A folder `<root>/<domain>/<class>/<image>`.

    Whatever is no image of a class is ignored with a remark: `strays` has it all (see `find_strays`).

    Args:
        root: the folder that holds the domains.
        cache: folder for converted images; None: data/cache of the repository.
        domains: which domains; None: all.
        name: of the data set; None: that of the folder.

    Raises:
        DataError: fewer than two domains, classes that differ between them, or a class without an image.
    """

    side: int | None = None  # pixels, where all images must be squares of one known side

    def __init__(
        self,
        root: Path,
        cache: Path | None = None,
        domains: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.cache = DATA_FOLDER / "cache" if cache is None else Path(cache)
        self.name = folder_name(root) if name is None else name
        self.domains = tuple(domain_folders(root) if domains is None else domains)
        self.classes = common_classes(root, self.domains)
        self._files: dict[str, list[list[str]]] = {
            domain: [] for domain in self.domains
        }  # by class
        self._stored: dict[tuple[str, int | None], tuple[int, str]] = {}
        for domain, by_class in self._files.items():
            for class_name in self.classes:
                folder = root / domain / class_name
                images = class_files(folder)
                if not images:
                    what = f"{folder} holds no image ({', '.join(SUFFIXES)})"
                    raise DataError(what + besides(root, self.domains))
                by_class.append(images)
        self.strays = find_strays(root, self.domains)
        if self.strays:
            command = f"python experiments/data.py verify {shlex.quote(str(root))}"
            self.remarks = (f"{self.name}: {ignored(self.strays)}; to see all: {command}",)

    def paths(self, domain: str, limit: int | None = None) -> list[Path]:
        """The image files of a domain, class by class."""
        folder = self.root / domain
        return [
            folder / name / file
            for name, files in zip(self.classes, self._files[domain], strict=True)
            for file in files[:limit]
        ]

    def stored_side(self, domain: str) -> int:
        """The side, in pixels, of the squares that the images of a domain are converted to."""
        return self._side_and_digest(domain, None)[0]

    def _sizes(self, domain: str) -> tuple[int, ...]:
        return tuple(map(len, self._files[domain]))

    def _digest(self, domain: str, limit: int | None) -> str:
        return self._side_and_digest(domain, limit)[1]

    def _side_and_digest(self, domain: str, limit: int | None) -> tuple[int, str]:
        """What images are converted to, and the digest of their files and that side.

        Finding them reads every file. So the cache folder keeps both for as long as the names, sizes
        and times of all files of the domain stay the same.
        """
        if (domain, limit) in self._stored:
            return self._stored[domain, limit]
        paths, folder = self.paths(domain), self.root / domain
        stamp = hashlib.sha256(f"{DIGEST} {limit} {self.side} ".encode())
        stamp.update(os.fsencode(folder.resolve()) + b"\n")
        for path in paths:
            stamp.update(file_stamp(path).encode())
        memo = self.cache / f"{domain}-{stamp.hexdigest()[:32]}.digest"
        try:
            side, digest = memo.read_text().split()
            result = int(side), digest
        except (OSError, ValueError):
            side = self.side or common_side(paths)
            result = side, content_digest(folder, self.paths(domain, limit), side)
            with suppress(DataError):  # the next one reads the files again
                self._write_cache(memo, [" ".join(map(str, result)).encode()])
        self._stored[domain, limit] = result
        return result

    def _read(self, domain: str, limit: int | None) -> Domain:
        side, digest = self._side_and_digest(domain, limit)
        paths = self.paths(domain, limit)
        shape = (len(paths), side, side, 3)
        key = hashlib.sha256(f"{digest} {DECODER}".encode()).hexdigest()
        cached = self.cache / f"{domain}-{len(paths)}-{key[:16]}.npy"
        images = open_cache(cached, shape)
        if images is None:
            self._write_cache(cached, self._converted(domain, paths, side, cached))
            images = open_cache(cached, shape)
            if images is None:
                raise DataError(f"the image cache {cached} changed while it was written")
        return Domain(
            name=domain,
            images=images,
            labels=np.repeat(np.arange(len(self.classes)), self.counts(domain, limit)),
            files=tuple(f"{path.parent.name}/{path.name}" for path in paths),
            classes=self.classes,
            digest=digest,
        )

    def _converted(
        self, domain: str, paths: Sequence[Path], side: int, cached: Path
    ) -> Iterator[bytes]:
        """The content of an .npy file of the converted images, piece by piece."""
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), side, side, 3)}
        np.lib.format.write_array_header_1_0(header, shape)
        yield header.getvalue()
        screen, exact = Screen(), self.side is not None
        screen.say(f"decoding {domain}: {len(paths)} images, once, to {cached}")
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            screen.progress(f"decoding {domain}", len(paths)) as advance,
        ):
            for start in range(0, len(paths), 64):  # bounds how many images wait for the disk
                block = paths[start : start + 64]
                for image in pool.map(lambda path: decode(path, side, exact), block):
                    yield image.tobytes()
                advance(len(block))

    def _write_cache(self, target: Path, pieces: Iterable[bytes]) -> None:
        """Write a file of the cache, whole or not at all. Raises DataError."""
        # plain writes instead of a writable map: a full disk is then an OSError, not a SIGBUS
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                for piece in pieces:
                    file.write(piece)
        except OSError as error:
            raise DataError(
                f"cannot write the image cache {target}: {error}; --cache names another folder"
            ) from error


# --- what lies in a folder --------------------------------------------------------------------


def find_folder(path: Path) -> Path:
    """The folder of the domains: `path`, or the only folder below it that has domains.

    Raises:
        DataError: no such folder, or several.
    """
    if has_domains(path):
        return path
    below = [path / name for name in subfolders(path) if has_domains(path / name)]
    if len(below) != 1:
        names = ", ".join(folder.name for folder in below)
        content = f"several data sets ({names})" if below else "no data set"
        raise DataError(
            f"data: {str(path)!r} holds {content}; allowed: toy, or a folder <domain>/<class>/<image>"
        )
    return below[0]


def folder_name(root: Path) -> str:
    """The name of a folder as that of a data set. PACS and toy mean the known data sets alone."""
    name = root.resolve().name
    return f"folder {name}" if name.lower() in ("pacs", "toy") else name


def has_domains(root: Path) -> bool:
    """Whether there is an image two folders below `root`."""
    folders = (
        root / domain / name for domain in subfolders(root) for name in subfolders(root / domain)
    )
    return any(class_files(folder) for folder in folders)


def domain_folders(root: Path) -> list[str]:
    """The folders below `root` that hold folders: lists and documents may lie in others."""
    return [name for name in subfolders(root) if subfolders(root / name)]


def common_classes(root: Path, domains: Sequence[str]) -> tuple[str, ...]:
    """The classes of the domains, in alphabetical order.

    Raises DataError for fewer than two domains, or for classes that differ between them.
    """
    if len(domains) < 2:
        what = f"{root} has one domain, {', '.join(domains)}; at least two are needed"
        raise DataError(what + besides(root, domains))
    classes = {domain: set(subfolders(root / domain)) for domain in domains}
    union = set().union(*classes.values())
    differences = [
        f"{domain} has no {listing(sorted(union - names))}"
        for domain, names in classes.items()
        if names != union
    ]
    if differences:
        what = f"{root}: the classes differ between domains: {'; '.join(differences)}"
        raise DataError(what + besides(root, domains))
    return tuple(sorted(union))


def entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, in the order of names. Raises DataError."""
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error


def subfolders(folder: Path) -> list[str]:
    """The folders in a folder that can be domains or classes."""
    return [entry.name for entry in entries(folder) if is_proper_folder(entry)]


def class_files(folder: Path) -> list[str]:
    """The images in the folder of a class."""
    return [entry.name for entry in entries(folder) if is_image(entry)]


def is_image(entry: os.DirEntry) -> bool:
    return looks_like_image(entry.name) and is_utf8(entry.name) and is_file(entry)


def is_proper_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder of data: not a hidden one, a system's, or one with a misspelt name."""
    name = entry.name
    return not of_system(name) and is_utf8(name) and name == name.strip() and is_folder(entry)


def is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle, or to where we may not look
        return False


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def looks_like_image(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    return name.lower().endswith(suffixes) and not of_system(name)


def of_system(name: str) -> bool:
    """Whether a name is that of a hidden file, or of one that a system leaves in folders."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_utf8(text: str) -> bool:
    """Whether a name or path has a meaning as text: Python has stand-ins for bytes without one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- strays -----------------------------------------------------------------------------------

FOLDER, BROKEN_LINK, NOT_UTF8 = "folder", "broken link", "name not in UTF-8"
IN_NO_CLASS, OTHER_FORMAT = "image in no class", "image in another format"
OF_SYSTEM, OTHER = "hidden or system entry", "other file"
OTHER_SUFFIXES = (".avif", ".gif", ".heic", ".jfif", ".jp2", ".ppm", ".tif", ".tiff")


class Stray(NamedTuple):
    """Something in a data set that is ignored.

    path: below the root of the data set, with slashes
    kind: one of the names above
    images: image files that are ignored with it, by their suffixes
    """

    path: str
    kind: str
    images: int


def find_strays(root: Path, domains: Sequence[str]) -> list[Stray]:
    """What lies in `root` and is no image of a class of `domains`.

    Lists and documents may lie beside the domains. Only images, folders with images, folders of a
    system and broken links are strays there, and hidden entries are none.

    Raises DataError for a folder that cannot be read.
    """
    strays = []
    for entry in entries(root):
        if entry.name in domains or entry.name.startswith("."):
            continue
        stray, odd = stray_of(root, entry), is_folder(entry) and not is_proper_folder(entry)
        if stray.images or stray.kind == BROKEN_LINK or odd:
            strays.append(stray)
    for domain in domains:
        for entry in entries(root / domain):
            if is_proper_folder(entry):
                others = [e for e in entries(Path(entry.path)) if not is_image(e)]
                strays += [stray_of(root, other) for other in others]
            else:
                strays.append(stray_of(root, entry))
    return strays


def stray_of(root: Path, entry: os.DirEntry) -> Stray:
    name = entry.name
    if of_system(name):
        kind = OF_SYSTEM
    elif not is_utf8(name):
        kind = NOT_UTF8
    elif is_folder(entry):
        kind = FOLDER
    elif not is_file(entry):
        kind = BROKEN_LINK
    elif looks_like_image(name):
        kind = IN_NO_CLASS
    else:
        kind = OTHER_FORMAT if looks_like_image(name, OTHER_SUFFIXES) else OTHER
    files = names_below(entry.path) if is_folder(entry) else [name]
    images = sum(looks_like_image(file, SUFFIXES + OTHER_SUFFIXES) for file in files)
    return Stray(Path(entry.path).relative_to(root).as_posix(), kind, images)


def names_below(folder: str) -> Iterator[str]:
    """The names of the files in a folder, at any depth."""
    return (name for _, _, files in os.walk(folder) for name in files)


def ignored(strays: Sequence[Stray]) -> str:
    """One line: how many strays of each kind, how many images, and the first names."""
    counts = Counter(stray.kind for stray in strays)
    kinds = ", ".join(f"{kind}: {n}" for kind, n in counts.items())
    images = sum(stray.images for stray in strays)
    what = f"{len(strays)} {'entry' if len(strays) == 1 else 'entries'}"
    what += f" with {images} {'image' if images == 1 else 'images'}"
    return f"ignored {what} ({kinds}): {listing([repr(stray.path) for stray in strays])}"


def besides(root: Path, domains: Sequence[str]) -> str:
    """The end of an error's message: the strays, one of which may be what is missing."""
    strays = find_strays(root, domains)
    return f"; {ignored(strays)}" if strays else ""


# --- the cache ------------------------------------------------------------------------------


def file_stamp(path: Path) -> str:
    """Class, name, size and times of an image file. Raises DataError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    # st_ctime too, because two files that are renamed into each other's place keep their st_mtime
    times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
    return f"{path.parent.name}/{path.name}\0{stat.st_size}\0{times}\n"


def content_digest(folder: Path, paths: Sequence[Path], side: int) -> str:
    """SHA-256, in hex, of the names and bytes of files and of the side that they are converted to."""
    digest = hashlib.sha256(f"{DIGEST} {side}\n".encode())
    with Screen().progress(f"reading {folder.name}", len(paths)) as advance:
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{len(content)}\n".encode() + content)
            advance(1)
    return digest.hexdigest()


def open_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The memory map of a cache file, or None where it is absent or not of this shape and size."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        size = path.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(images, np.memmap) and size == images.offset + images.nbytes
    return images if whole and images.shape == shape and images.dtype == np.uint8 else None
