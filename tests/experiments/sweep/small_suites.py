"""Suites of one table, to change a key of."""

import yaml

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
