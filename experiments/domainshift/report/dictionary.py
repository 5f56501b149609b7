"""The data dictionary of the records, from their schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from domainshift.records import schema

RECORDS = {
    schema.Row: "a line of metrics.jsonl",
    schema.TrainingRecord: schema.TRAINING,
    schema.EvaluationRecord: f"{schema.EVALUATIONS}/NAME.json",
    schema.SuiteIndex: schema.SUITE,
}


def dictionary() -> str:
    """Every field of every record with its type and its description, as Markdown."""
    parts: dict[type[BaseModel], str] = {}
    for record, where in RECORDS.items():
        parts[record] = where
        for part in parts_of(record):
            parts.setdefault(part, "")
    text = ["# Records", "", inspect.getdoc(schema) or "", ""]
    text += ["A switch's meaning stands in `python experiments/run.py --help`.", ""]
    for record, where in parts.items():
        text += [f"## {record.__name__}{f': {where}' if where else ''}", ""]
        text += [
            inspect.getdoc(record) or "",
            "",
            "| Field | Type | Meaning |",
            "| --- | --- | --- |",
        ]
        for name, field in record.model_fields.items():
            cells = (f"`{name}`", f"`{type_text(field.annotation)}`", field.description or "")
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)


def parts_of(record: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The records inside a record, outer ones first."""
    for field in record.model_fields.values():
        for part in classes_in(field.annotation):
            yield part
            yield from parts_of(part)


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from classes_in(inner)


def type_text(annotation: Any) -> str:
    """A type as Python writes it, without the modules it comes from."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b\w+\.", "", text.replace("NoneType", "None"))
