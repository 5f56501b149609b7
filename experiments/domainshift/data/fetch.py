"""Get PACS from its public home."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from domainshift.data.pacs import CLASSES, DOMAINS
from domainshift.errors import DataError
from domainshift.files import replacing
from domainshift.progress import Screen

HUB_DATASET = "flwrlabs/pacs"  # parquet files with the columns image, domain, label
COLUMNS = ("image", "domain", "label")
PACKAGES = "pip install huggingface_hub pyarrow"
ALTERNATIVES = (
    "Instead: pass parquet files that you have with --from FILE_OR_FOLDER; or get the images from "
    "the site of the PACS authors (https://sketchx.eecs.qmul.ac.uk/downloads/) and point --data at "
    "the folder; or use the built-in drawings with --data toy"
)


def fetch(to: Path, source: Path | None, screen: Screen) -> None:
    """Write PACS to `<to>/<domain>/<class>/<file>`, with the bytes of the images exactly as stored.

    Images that are there already are kept, so an interrupted fetch continues where it stopped.

    Args:
        to: folder to write to; made if absent.
        source: a parquet file or a folder of them, with the columns image (struct of bytes and
            path), domain (string) and label (0 to 6); None: downloads HUB_DATASET.

    Raises:
        DataError: no network, a package missing, no parquet file, other columns, another label
            order, an unknown domain or label, no image bytes; or a file that is there already with
            other contents, which is left alone.
    """
    source = download() if source is None else source
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"reading parquet files needs a package: {PACKAGES}. {ALTERNATIVES}"
        ) from error
    sources = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not sources or not sources[0].is_file():
        raise DataError(f"no parquet file at {source}")

    tables = []
    for path in sources:
        try:
            tables.append(parquet.ParquetFile(path))
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{path} cannot be read as parquet: {error}") from error
        check_schema(path, tables[-1].schema_arrow)

    written = row = 0
    taken: set[str] = set()
    total = sum(table.metadata.num_rows for table in tables)
    screen.say(f"writing {total} images to {to}")
    with screen.progress("writing", total) as advance:
        for path, table in zip(sources, tables, strict=True):
            for batch in table.iter_batches(batch_size=64, columns=list(COLUMNS)):
                for record in batch.to_pylist():
                    file, content = image_file(f"{path}, row {row}", row, record, taken)
                    written += write_once(to / file, content)
                    row += 1
                advance(len(batch))
    screen.say(f"wrote {written} images, kept {row - written} that were there")


def download() -> Path:
    """The folder of the parquet files of HUB_DATASET (about 190 MB), downloaded if it is not there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(
            f"fetching {HUB_DATASET} needs two packages: {PACKAGES}. {ALTERNATIVES}"
        ) from error
    try:
        folder = snapshot_download(
            repo_id=HUB_DATASET, repo_type="dataset", allow_patterns=["data/*.parquet"]
        )
    except Exception as error:  # network, proxy, hub and disk errors share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"cannot download {HUB_DATASET} from the Hugging Face hub: {reason}. {ALTERNATIVES}"
        ) from error
    return Path(folder)


def check_schema(path: Path, schema: Any) -> None:
    """Check the columns, and the label order where the file records it. Raises DataError."""
    for column in COLUMNS:
        if column not in schema.names:
            raise DataError(
                f"{path} has no column {column}; it has {', '.join(schema.names)}, "
                f"and needs {', '.join(COLUMNS)}"
            )
    try:
        # what the `datasets` library leaves in a parquet file: the features with their names
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return
    if tuple(names) != CLASSES:
        raise DataError(
            f"{path} orders its labels {', '.join(map(str, names))}; expected {', '.join(CLASSES)}"
        )


def image_file(
    where: str, row: int, record: Mapping[str, Any], taken: set[str]
) -> tuple[str, bytes]:
    """The path, relative to the root, and the bytes of one row. Raises DataError.

    Args:
        where: of the row, for messages.
        taken: the paths in use, in lower case; the new one is added.
    """
    domain, label, image = (record[name] for name in ("domain", "label", "image"))
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
    in_path = [part for part in stored.parts[:-1] if part in CLASSES]
    if in_path and in_path[-1] != class_name:
        raise DataError(f"{where}: label {label} is {class_name}, but its path is {stored}")
    # only the name is taken from the file, because a path could lead out of the folder
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", stored.stem).lstrip(".") or f"{row:05d}"
    names = itertools.chain([stem], (f"{stem}_{copy}" for copy in itertools.count(2)))
    files = (f"{domain}/{class_name}/{name}{suffix}" for name in names)
    file = next(file for file in files if file.lower() not in taken)
    taken.add(file.lower())  # lower case, because some file systems do not tell cases apart
    return file, content


def write_once(path: Path, content: bytes) -> bool:
    """Write a file whole; False where it is there already. Raises DataError for other contents."""
    if path.exists():
        if path.read_bytes() == content:
            return False
        raise DataError(
            f"{path} is there already with other contents: move it away, or choose another --to"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    return True
