"""Suites of one table, to change a key of, and what their records say."""

import yaml
from domainshift import files
from domainshift.records.schema import EVALUATIONS, METRICS, TRAINING

SMALL = {
    "title": "small",
    "defaults": {"data": "toy", "weights": "none"},
    "sources": ["art_painting"],
    "targets": ["cartoon"],
    "seeds": [0],
    "tables": {"one": {"title": "One", "arms": {"baseline": {"mode": "baseline"}}}},
}


def small(folder, **changes):
    """A suite file; `changes` replace keys of SMALL."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return str(path)


def table(**keys):
    return {"title": "T", "arms": {"a": {"mode": "random", "layers": 1, "p_zero": 0.5}}} | keys


GRID = {"arms": {}, "switches": {"mode": "random", "layers": 1}, "grid": {"p_zero": [0.1, 0.2]}}

TIMES = {"seconds", "train_seconds", "images_per_second", "run", "versions", "seal"}

TRUE = SMALL | {
    "defaults": {
        "preset": "course-template",
        "data": "toy",
        "weights": "none",
        "model": "resnet18-slim",
        "limit": 3,
        "image_size": 32,
        "epochs": 8,
        "batch_size": 8,
        "lr": 0.02,
        "evaluate": "each",
    },
    "tables": {
        "one": {
            "title": "One",
            "arms": {
                # maps that draw while testing too are the hardest to continue
                "random": {"mode": "random", "layers": [1, 4], "p_zero": 0.3, "at_eval": "on"},
                "random-off": {"mode": "random", "layers": [1, 4], "p_zero": 0.3},
                "da": {"mode": "da", "layers": 4, "record_mode": "train"},
            },
        }
    },
}


def untimed(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def records_of(folder):
    """By name of the file."""
    paths = [folder / TRAINING, *(folder / EVALUATIONS).glob("*.json")]
    return {path.name: untimed(files.read_json(path)) for path in paths}


def result_of(folder):
    """What must not depend on interruptions."""
    return records_of(folder), [untimed(row) for row in files.read_json_lines(folder / METRICS)]
