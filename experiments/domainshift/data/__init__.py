"""Data sets: PACS, the toy, and any folder `<domain>/<class>/<image>`."""

from __future__ import annotations

from pathlib import Path

from domainshift.data.domain import Domain
from domainshift.data.folder import DataSet, Folder, find_folder
from domainshift.data.pacs import NAME, OFFICIAL_COUNTS, Pacs, find_pacs
from domainshift.data.toy import Toy

__all__ = ["DataSet", "Domain", "official_counts", "open_data"]


def open_data(data: str | Path, cache: Path | None = None) -> DataSet:
    """The data set that a path names.

    Args:
        data: "toy"; or a folder: PACS if it holds the official domains and classes (see `find_pacs`),
            else the domains in it or in the only data set one level below it (see `Folder`).
        cache: folder for converted images; None: data/cache of the repository.

    Raises:
        DataError: no data set there, or one with unusable domains or classes.
    """
    if str(data) == "toy":
        return Toy()
    path = Path(data).expanduser()
    root = find_pacs(path)
    return Folder(find_folder(path), cache) if root is None else Pacs(root, cache)


def official_counts(data: str, domain: str) -> tuple[int, ...] | None:
    """Images per class of a domain of a published data set, by names; None where they are not known."""
    return OFFICIAL_COUNTS.get(domain) if data == NAME else None
