"""The published figures that a table stands beside: published.csv, and which of its rows is meant."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from domainshift.config import REPOSITORY
from domainshift.data import official_counts
from domainshift.methods import METHODS
from domainshift.records.results import Result
from domainshift.report.switches import PROTOCOL_DATA, mode_of

PATH = REPOSITORY / "experiments" / "published.csv"

PRESETS = {"report-A": "report-a", "report-B": "report-b"}  # what a source's runs ran
UNSTATED = {"report-A": 0.2}  # p_zero of rows that give none: its text says so
KINDS = {"conv": "Conv2d", "bn": "BatchNorm2d", "relu": "ReLU"}
ORDINALS = {2: "2nd", 3: "3rd"}

Row = Mapping[str, str]


class Published(NamedTuple):
    """A published figure.

    accuracy: percent
    status: "valid", or why it is not
    also: other figures that the same source gives for the same thing
    doubts: what is not known of it
    preset: what its run was, and one that repeats it must be
    """

    accuracy: float
    status: str
    note: str
    also: Sequence[str]
    doubts: Sequence[str] = ()
    preset: str = "course-template"


def rows() -> list[Row]:
    """The rows of published.csv."""
    with open(PATH, newline="") as file:
        return list(csv.DictReader(file))


def find(result: Result, labels: Sequence[str], among: Sequence[Row]) -> Published | None:
    """The published figure of what a result repeats, on its target; None if there is none.

    Args:
        labels: how "source note" of the rows in question begins, "report-B report T3" for example;
            an earlier one wins.
        among: `rows()`.
    """
    config = result.config
    if config["source"] != "art_painting" or not config.get("apply_maps", True):
        return None
    names, mode = names_of_layers(result), mode_of(result)
    matching = [
        row for row in among
        if row["method"].lower() == mode
        and row["target"] == config["target"]
        and row["layers"] in names
        and same_p_zero(row, config.get("p_zero"), len(result.training.layers))
    ]  # fmt: skip
    matching.sort(key=lambda row: not row["p_zero"])  # a row that gives its p_zero comes first
    rows = [row for label in labels for row in matching if is_called(row, label)]
    if not rows:
        return None
    first, *others = rows
    texts = {f"{row['accuracy']} ({row['note']})": row["accuracy"] for row in others}
    also = [text for text, value in texts.items() if float(value) != float(first["accuracy"])]
    preset = PRESETS.get(first["source"], "course-template")
    accuracy = float(first["accuracy"])
    return Published(accuracy, first["status"], first["note"], also, doubts(first), preset)


def doubts(row: Row) -> list[str]:
    """What is not known of a row: the p_zero of its run, or how a test on its target could give it."""
    images = sum(official_counts(PROTOCOL_DATA, row["target"]))
    p_zero = row["p_zero"] or str(UNSTATED.get(row["source"], ""))
    has_p_zero = "p_zero" in METHODS[row["method"].lower()].Options.model_fields
    lines = []
    if has_p_zero and not re.match(r"\d", p_zero):
        lines.append("its p0 is not stated")
    if not possible(row["accuracy"], images):
        lines.append(f"no k of the {images} images of {row['target']} gives it")
    return lines


def possible(accuracy: str, images: int) -> bool:
    """Whether some k of n images is this many percent, rounded or cut off to the decimals it has."""
    unit = 10.0 ** -len(accuracy.partition(".")[2])
    near = int(float(accuracy) * images / 100)
    return any(
        -unit / 2 - 1e-9 <= 100 * k / images - float(accuracy) < unit for k in (near, near + 1)
    )


def is_called(row: Row, label: str) -> bool:
    """Whether a row's "source note" begins with `label`. "report T2/T3: ..." is of both tables."""
    both = re.match(r"report (T\d+)/(T\d+)", row["note"])
    notes = [f"report {table}" for table in both.groups()] if both else [row["note"]]
    # "report T1" is not the beginning of "report T10"
    return any(re.match(rf"{re.escape(label)}(?!\w)", f"{row['source']} {note}") for note in notes)


def names_of_layers(result: Result) -> set[str]:
    """The ways in which published rows write the layers of a result."""
    config = result.config
    names = {"+".join(result.training.layers)}
    if config.get("layers") == ["all"]:
        n = ORDINALS.get(config["every"], f"{config['every']}th")
        names.add(f"every {n} {KINDS[config['after']]}")
    return names


def same_p_zero(row: Row, ours: Sequence[float] | None, layers: int) -> bool:
    """Whether a row has our p_zero. Of a constant that it does not give, any constant is one."""
    theirs = row["p_zero"]
    if ours is None:
        return not theirs
    ours = list(ours) * (layers if len(ours) == 1 else 1)
    if theirs.startswith("const"):
        return len(set(ours)) == 1
    if not theirs:
        return row["source"] in UNSTATED and set(ours) == {UNSTATED[row["source"]]}
    values: list[Any] = [float(p) for p in theirs.split("|")]
    return values * (layers if len(values) == 1 else 1) == ours
