"""Files that are whole or absent.

Every file is written beside its final place and then renamed over it. A reader, a kill or a full
disk meets the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import yaml

from domainshift.errors import RecordError

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, durably.

    After an error `path` is what it was before, and no temporary file is left. Errors pass through.
    """
    # processes of two machines or containers can have one number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:16]}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. Raises RecordError (disk full, no permission, ...)."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        state = "the old one is untouched" if path.exists() else "it was not written"
        raise RecordError(f"cannot write {path}: {error.strerror or error}; {state}") from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON. NaN is refused: JSON has none. Raises RecordError."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise RecordError(f"cannot write {path}: {error}") from error
    write_bytes(path, text.encode())


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by a mapping as YAML, in its order. Raises RecordError."""
    write_bytes(path, yaml.safe_dump(dict(value), sort_keys=False).encode())


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a file of JSON lines, durably. Raises RecordError.

    A crash can leave a torn last line, which `read_json_lines` skips where it is told to.
    """
    try:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with open(path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot write {path}: {error}") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(
            f"cannot read {path}: {getattr(error, 'strerror', 0) or error}"
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecordError."""
    try:
        value = yaml.load(read_text(path), YAML_LOADER)
    except yaml.YAMLError as error:
        raise RecordError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RecordError(f"cannot read {path}: it holds no mapping such as `mode: random`")
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises RecordError."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise RecordError(f"cannot read {path}: half-written, or not JSON ({error})") from error


def read_json_lines(path: Path, *, torn: bool = False) -> list[Any]:
    """The values in a file of JSON lines. Raises RecordError that names the line.

    Args:
        torn: skip a last line that a crash cut short.
    """
    lines = read_text(path).split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if torn and number == len(lines):
                continue
            where = f"line {number} is half-written, or not JSON ({error})"
            raise RecordError(f"cannot read {path}: {where}") from error
    return rows


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises RecordError."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
