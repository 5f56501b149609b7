"""The published figures that a table stands beside: published.csv, and which of its rows is meant."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data import OFFICIAL_COUNTS
from study import Run

PATH = Path(__file__).resolve().parent / "published.csv"

METHODS = {"baseline": "baseline", "random": "random", "da": "DA"}
UNSTATED = {"report-A": 0.2}  # p0 of rows that give none: its text says so
KINDS = {"conv": "Conv2d", "bn": "BatchNorm2d", "relu": "ReLU"}
ORDINALS = {2: "2nd", 3: "3rd"}


class Published(NamedTuple):
    """A published figure."""

    accuracy: float  # percent
    status: str  # "valid", or why it is not
    note: str
    also: Sequence[str]  # other figures that the same source gives for the same thing
    doubts: Sequence[str] = ()  # what is not known of it


def rows() -> list[dict[str, str]]:
    with open(PATH, newline="") as file:
        return list(csv.DictReader(file))


def find(run: Run, labels: Sequence[str], among: Sequence[dict[str, str]]) -> Published | None:
    """The published figure of what `run` repeats, on its target; None if there is none.

    Args:
        labels: how "source note" of the rows in question begins, "report-B report T3" say; an
            earlier one wins.
        among: `rows()`.
    """
    config = run.config
    if config["source"] != "art_painting" or not config["apply_maps"]:
        return None
    matching = [
        row for row in among
        if row["method"] == METHODS.get(config["mode"])
        and row["target"] == config["target"]
        and row["layers"] in names_of_layers(run)
        and same_p_zero(row, config["p_zero"], len(run.layers))
    ]  # fmt: skip
    matching.sort(
        key=lambda row: not row["p_zero"]
    )  # a row that gives its p0 before one that does not
    found = [row for label in labels for row in matching if is_called(row, label)]
    if not found:
        return None
    first = found[0]
    others = {f"{row['accuracy']} ({row['note']})": row["accuracy"] for row in found[1:]}
    also = [text for text, value in others.items() if float(value) != float(first["accuracy"])]
    return Published(float(first["accuracy"]), first["status"], first["note"], also, doubts(first))


def doubts(row: dict[str, str]) -> list[str]:
    """What is not known of a row: the p0 of its run, or how a test on its target could give it."""
    images = sum(OFFICIAL_COUNTS[row["target"]])
    found = []
    p_zero = row["p_zero"] or str(UNSTATED.get(row["source"], ""))
    if row["method"] == "random" and not re.match(r"\d", p_zero):
        found.append("its p0 is not stated")
    if not possible(row["accuracy"], images):
        found.append(f"no k of the {images} images of {row['target']} gives it")
    return found


def possible(accuracy: str, images: int) -> bool:
    """Whether some k of n images is this many percent, rounded or cut off to the decimals it has."""
    unit = 10.0 ** -len(accuracy.partition(".")[2])
    near = int(float(accuracy) * images / 100)
    return any(
        -unit / 2 - 1e-9 <= 100 * k / images - float(accuracy) < unit for k in (near, near + 1)
    )


def is_called(row: dict[str, str], label: str) -> bool:
    """Whether a row's "source note" begins with `label`. A note "report T2/T3: ..." is of both tables."""
    both = re.match(r"report (T\d+)/(T\d+)", row["note"])
    notes = [f"report {table}" for table in both.groups()] if both else [row["note"]]
    # "report T1" is not the beginning of "report T10"
    return any(re.match(rf"{re.escape(label)}(?!\w)", f"{row['source']} {note}") for note in notes)


def names_of_layers(run: Run) -> set[str]:
    """The ways in which published rows write the layers of a run."""
    config = run.config
    names = {"+".join(run.layers)}
    if config["layers"] == ["all"]:
        n = ORDINALS.get(config["every"], f"{config['every']}th")
        names.add(f"every {n} {KINDS[config['after']]}")
    return names


def same_p_zero(row: dict[str, str], ours: list[float] | None, layers: int) -> bool:
    """Whether a row has our p0. Of a constant that it does not give, any constant is one."""
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
