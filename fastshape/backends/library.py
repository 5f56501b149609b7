"""The compiled files fastshape._C and fastshape._C_cuda: how they load, and which sources they were built from.

Only the standard library is needed here, because setup.py runs this file for `source_digest`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REMEDY = "pip install -U setuptools pybind11 ninja && pip install --no-build-isolation -e ."

_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")


@functools.cache
def source_digest(root: Path) -> str | None:
    """Identifies the C++ and CUDA sources of the source tree `root`: 16 hex digits; None if `root` is no source tree."""
    folder = root / "csrc"
    if not ((root / "setup.py").is_file() and folder.is_dir()):
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def load(name: str):
    """The compiled module fastshape.`name`, from the folder of the package.

    Python itself would also take the file of another fastshape, if that one is installed as editable.

    Raises:
        ModuleNotFoundError: there is no such file.
        ImportError: the file cannot be loaded, or is none of fastshape's.
    """
    full_name = f"fastshape.{name}"
    spec = PathFinder.find_spec(full_name, [str(PACKAGE)])
    if spec is None and full_name not in sys.modules:
        raise ModuleNotFoundError(f"there is no {name} in {PACKAGE}", name=full_name)
    try:
        if spec is not None and is_cut_short(Path(spec.origin)):
            raise EOFError(f"{spec.origin} is cut short")
        module = importlib.import_module(full_name)
        if missing := {"register_ops", "build_facts"} - vars(module).keys():
            raise AttributeError(f"it has no {', '.join(sorted(missing))}")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        raise ImportError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return module


def is_cut_short(file: Path) -> bool:
    """Whether the end of a shared library is missing, as after a full disk. To load it would kill the process."""
    with open(file, "rb") as content:
        header = content.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False  # no 64-bit little-endian ELF file: the loader refuses it or knows it better
    # The table of sections is the last part of the file.
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return file.stat().st_size < offset + size * count


def is_stale(module) -> bool:
    """Whether the package lies in a source tree, and the module was built from other sources than that tree has."""
    try:
        sources = source_digest(PACKAGE.parent)
    except OSError:  # sources that cannot be read were not changed by this user
        return False
    return sources is not None and module.build_facts().get("sources") != sources


def shadowed() -> Path | None:
    """The folder of another fastshape that Python can import and that has kernels, or None."""
    specs = [PathFinder.find_spec("fastshape", [entry]) for entry in sys.path]
    for finder in sys.meta_path:  # the finders of editable installations are among them
        if hasattr(finder, "find_spec"):
            specs.append(finder.find_spec("fastshape", None))
    for spec in specs:
        folder = Path(spec.origin).resolve().parent if spec and spec.origin else PACKAGE
        if folder != PACKAGE and any(
            (folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES
        ):
            return folder
    return None
