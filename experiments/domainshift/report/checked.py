"""What suite.json must be beyond its types, so that a report can be made of it: else a SuiteError."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from domainshift.errors import SuiteError
from domainshift.records.claims import LARGEST_MARGIN, arms_of_claim
from domainshift.records.schema import SUITE, SuiteIndex, TableIndex
from domainshift.report import published

LONGEST = 200  # bytes of a folder's name
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
SURROGATE = re.compile(r"[\ud800-\udfff]")  # a byte of a file's name that is no text
OF_FILES = re.compile(r"(^command|\.(source|target|domain|targets\.\d+))$")  # where it may be


def check(index: SuiteIndex) -> None:
    """Raises SuiteError, in one line, for the first fault of a suite.json of the right types."""
    for fault in faults(index):
        raise SuiteError(f"{SUITE}: {' '.join(fault.split())}")


def faults(index: SuiteIndex) -> Iterator[str]:
    values = index.model_dump(exclude={"trainings": {"__all__": {"switches"}}})
    for place, text in texts(values):
        if CONTROL.search(text) or (SURROGATE.search(text) and not OF_FILES.search(place)):
            yield f"{place}: {short(text)} is not allowed; allowed: text without control characters"
    if index.margin is not None and index.margin > LARGEST_MARGIN:
        yield f"margin: {index.margin:g} is not allowed; allowed: above 0, at most {LARGEST_MARGIN}"
    cells = [(t, a, c) for t in index.tables for a in t.arms for c in a.cells]
    trainings = dict.fromkeys([*index.trainings, *(cell.training for *_, cell in cells)])
    for name in trainings:
        if len(name.encode()) > LONGEST or "/" in name or name in ("", ".", ".."):
            yield (
                f"training {short(name)} is not allowed; "
                f"allowed: the name of a folder, of at most {LONGEST} bytes"
            )
    if name := twice(table.name for table in index.tables):
        yield f"tables: two are called {name!r}; allowed: one"
    known = {arm.name for table in index.tables for arm in table.arms}
    rows = published.rows()
    for table in index.tables:
        for fault in faults_of_table(table, known, rows):
            yield f"table {table.name}: {fault}"
    of_arm: dict[tuple, tuple] = {}
    for table, arm, cell in cells:
        key = (arm.name, cell.source, cell.target, cell.seed)
        first = of_arm.setdefault(key, (cell.training, cell.test))
        if first != (cell.training, cell.test):
            what = f"{cell.source} to {cell.target}, seed {cell.seed}"
            yield (
                f"table {table.name}: arm {arm.name}: {what} is {'/'.join(first)} and "
                f"{cell.training}/{cell.test}; allowed: one of them"
            )
    pairs: dict[str, set[tuple[str, str]]] = {}
    for _, arm, cell in cells:
        pairs.setdefault(arm.name, set()).add((cell.source, cell.target))
    for arm, reference in index.primary:
        for name in (arm, reference):
            if name not in known:
                yield f"primary: no arm {name!r}"
        if not pairs.get(arm, set()) & pairs.get(reference, set()):
            yield f"primary: {arm!r} and {reference!r} share no source and target; allowed: arms that do"
    yield from faults_of_claims(index, known)


def faults_of_table(
    table: TableIndex, known: Iterable[str], rows: Iterable[published.Row]
) -> Iterator[str]:
    if name := twice(arm.name for arm in table.arms):
        yield f"two arms are called {name!r}; allowed: one"
    for arm in table.arms:
        if not arm.cells:
            yield f"arm {arm.name!r} has no cells; allowed: one or more"
    if table.baseline not in {None, *known}:
        yield f"baseline: no arm {table.baseline!r}"
    for pair in table.compare:
        if pair[0] == pair[1]:
            yield f"compare: {pair[0]!r} with itself is not allowed; allowed: two different arms"
        for name in pair:
            if name not in known:
                yield f"compare: no arm {name!r}"
    for label in table.published:
        if not any(published.is_called(row, label) for row in rows):
            yield (
                f"published: {label!r} is not allowed; allowed: how the source and note of a row of "
                f"{published.PATH.name} begin"
            )


def faults_of_claims(index: SuiteIndex, known: Iterable[str]) -> Iterator[str]:
    """As `domainshift.sweep.plan` refuses them in a suite."""
    tested = {c.target for table in index.tables for arm in table.arms for c in arm.cells}
    for number, claim in index.claims.items():
        for name in arms_of_claim(claim):
            if name not in known:
                yield f"claim {number}: no arm {name!r}"
        for target in claim.targets or ():
            if target not in tested:
                allowed = " | ".join(sorted(tested))
                yield f"claim {number}: targets: no arm is tested on {target!r}; allowed: {allowed}"


def twice(names: Iterable[str]) -> str | None:
    """A name that occurs twice."""
    return next((name for name, n in Counter(names).items() if n > 1), None)


def short(text: str) -> str:
    return reprlib.repr(text)


def texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value of mappings and lists, the keys too, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts(key, f"{place}: a key" if place else "a key")
            yield from texts(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from texts(inner, f"{place}.{i}")
