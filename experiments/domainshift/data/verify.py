"""Whether a folder is a usable data set, and whether it is the PACS of the papers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.table import Table
from rich.text import Text

from domainshift.data import open_data, pacs
from domainshift.data.folder import BROKEN_LINK, OF_SYSTEM, Stray, ignored
from domainshift.data.image_files import decode, read_image
from domainshift.errors import DataError
from domainshift.progress import Screen


def verify(path: Path, screen: Screen) -> list[str]:
    """Print the images of each class and domain, and compare a folder like PACS with the official one.

    Returns:
        Every problem, one sentence each.

    Raises:
        DataError: no data set there. A folder with only some domains or classes of PACS is one.
    """
    root = pacs.likely_root(path)
    # one domain is not enough: other data sets have a domain called sketch or photo too
    if len(pacs.missing_domains(root)) <= len(pacs.DOMAINS) - 2:
        return verify_pacs(root, screen)
    return verify_folder(path, screen)


def verify_folder(path: Path, screen: Screen) -> list[str]:
    data = open_data(path)
    counts = {domain: data.counts(domain) for domain in data.domains}
    title = f"{data.name}: images in {data.root}"
    screen.console.print(
        table(title, data.domains, data.classes, lambda d, c: counts[d][data.classes.index(c)])
    )
    lost = say_strays(data.root, data.strays, screen)
    broken = unreadable([p for domain in data.domains for p in data.paths(domain)], None, screen)
    if not broken:
        screen.say(("" if lost else "all right: ") + "every image is readable")
        sides = [f"{domain} {data.stored_side(domain)}" for domain in data.domains]
        screen.say(f"pixels of a side, as they are stored: {', '.join(sides)}")
    return lost + broken


def verify_pacs(root: Path, screen: Screen) -> list[str]:
    images, strays, problems, usable = pacs.compare(root)
    broken = unreadable([path for files in images.values() for path in files], pacs.SIDE, screen)
    lists = pacs.official_lists(root)
    problems += broken + [problem for path in lists for problem in pacs.list_problems(root, path)]
    problems += say_strays(root, strays, screen)

    official = {
        (domain, name): count
        for domain, counts in pacs.OFFICIAL_COUNTS.items()
        for name, count in zip(pacs.CLASSES, counts, strict=True)
    }
    title = f"images there / official, in {root}"
    screen.console.print(
        table(
            title,
            pacs.DOMAINS,
            pacs.CLASSES,
            lambda *place: len(images[place]),
            lambda *place: official[place],
        )
    )
    screen.say(f"labels: {', '.join(f'{i} {name}' for i, name in enumerate(pacs.CLASSES))}")
    folders = ", ".join(sorted({str(path.parent) for path in lists}))
    screen.say(f"official lists: {len(lists)}" + (f" in {folders}" if lists else ""))
    if not problems:
        screen.say(f"all right: this is {pacs.NAME}")
    elif usable and not broken:
        screen.say(
            f"not the whole official {pacs.NAME}, but usable: "
            "every domain and class is there and every image is readable"
        )
    else:
        screen.say("not usable as it is")
    return problems


def say_strays(root: Path, strays: Sequence[Stray], screen: Screen) -> list[str]:
    """Print every stray. Returns a problem for each that may have been meant as images of the data set."""
    if strays:
        screen.warn(ignored(strays))
    problems = []
    for path, kind, images in strays:
        line = f"{str(root / path)!r} is ignored: {kind}" + f", images: {images}" * bool(images)
        if kind == BROKEN_LINK or (images and kind != OF_SYSTEM):
            problems.append(line)
        else:
            screen.say(line)
    return problems


def table(
    title: str,
    domains: Sequence[str],
    classes: Sequence[str],
    count: Callable[[str, str], int],
    official: Callable[[str, str], int] | None = None,
) -> Table:
    """Images by class and domain, and their sums. All names are plain text, brackets too."""
    result = Table(title=Text(title))
    result.add_column("class")
    for domain in domains:
        result.add_column(Text(domain), justify="right")

    def cell(domain: str, names: Sequence[str]) -> Text:
        n = sum(count(domain, name) for name in names)
        if official is None:
            return Text(str(n))
        expected = sum(official(domain, name) for name in names)
        return Text(f"{n} / {expected}", style="" if n == expected else "red")

    for name in classes:
        cells = [cell(domain, [name]) for domain in domains]
        result.add_row(Text(name), *cells, end_section=name == classes[-1])
    result.add_row("all", *(cell(domain, classes) for domain in domains))
    return result


def unreadable(paths: Sequence[Path], side: int | None, screen: Screen) -> list[str]:
    """Decode all images: a sentence for each that is unreadable, or not of this side."""

    def problem(path: Path) -> str | None:
        try:
            read_image(path) if side is None else decode(path, side, exact=True)
        except DataError as error:
            return str(error)
        return None

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        screen.progress("reading", len(paths)) as advance,
    ):
        problems = []
        for sentence in pool.map(problem, paths):
            problems += [sentence] if sentence else []
            advance(1)
    return problems
