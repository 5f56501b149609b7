"""What the folders of a suite hold, and who may write there.

The state of a training is read from its folder, each time. No file keeps the states of all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from domainshift import files
from domainshift.config import Test, differing
from domainshift.errors import ConfigError, RecordError, SuiteError
from domainshift.records.schema import (
    CHECKPOINT,
    CONFIG,
    EVALUATIONS,
    METRICS,
    SUITE,
    TRAINING,
    VERSION,
    SuiteIndex,
)
from domainshift.setup import training_setup
from domainshift.sweep.plan import Job
from domainshift.training import checkpoint
from domainshift.training.run import check_same

LOG = "log.txt"
ASIDE = ".aside"  # suffix of what was moved aside

# What a folder holds:
DONE = "done"  # the training and all tests that are asked for
NEW = "new"  # nothing
KILLED = "killed"  # a training that was begun and can go on
UNTESTED = "untested"  # a trained network that lacks tests
RETRAIN = "retrain"  # the same, without the checkpoint that tests need
BROKEN = "broken"  # a file that cannot be read
OTHER = "other"  # another training, or another version: it is never overwritten


class State(NamedTuple):
    kind: str
    why: str = ""  # in words, where something must be said


# --- what a folder holds ----------------------------------------------------------------------


def state_of(folder: Path, job: Job) -> State:
    """What the folder of a training holds. It compares keys; the audit checks the records in full."""
    try:
        if (folder / TRAINING).exists():
            return trained_state(folder, job)
        if not (folder / CONFIG).exists():
            return State(NEW)
        check_same(files.read_yaml(folder / CONFIG), training_setup(job.setup), folder / CONFIG)
    except RecordError as error:
        return State(BROKEN, str(error))
    except ConfigError as error:
        return State(OTHER, str(error))
    return State(KILLED)


def trained_state(folder: Path, job: Job) -> State:
    record = files.read_json(folder / TRAINING)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        return State(OTHER, f"{folder / TRAINING} is a record of another version")
    if record["key"] != job.key:
        own = training_setup(job.setup).config.training_values()
        differences = differing(record["switches"], own) or ["other images or initial weights"]
        return State(OTHER, f"{folder} holds another training: {'; '.join(differences)}")
    rows = (folder / METRICS).read_bytes() if (folder / METRICS).exists() else b""
    if rows.count(b"\n") != record["epochs"] or not rows.endswith(b"}\n"):
        return State(BROKEN, f"{folder / METRICS} does not have {record['epochs']} whole lines")
    missing = [test.name for test in job.tests if not tested(folder, test, record)]
    if not missing:
        return State(DONE)
    if (folder / CHECKPOINT).exists():
        return State(UNTESTED)
    return State(RETRAIN, f"not tested on {', '.join(missing)}, and the checkpoint is gone")


def tested(folder: Path, test: Test, training: Mapping[str, Any]) -> bool:
    """Whether a test of these weights has a record."""
    path = folder / EVALUATIONS / f"{test.name}.json"
    try:
        record = json.loads(path.read_bytes())
        weights = record["training"], record["weights_digest"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    own = training["key"], training["weights_digest"]
    return weights == own and path.with_suffix(".npz").exists()


def make_room(folder: Path, state: State) -> str:
    """Move a training aside that cannot go on, so that it starts again. Returns why, or ""."""
    why = state.why
    if state.kind in (KILLED, UNTESTED) and (folder / CHECKPOINT).exists():
        try:
            checkpoint.read(folder / CHECKPOINT)
        except RecordError as error:
            why = str(error)
    if why:
        for name in (CONFIG, TRAINING, METRICS, CHECKPOINT):
            if (folder / name).exists():
                os.replace(folder / name, folder / f"{name}{ASIDE}")
    return why


# --- the folder of the suite ------------------------------------------------------------------


def check_folder(out: Path, index: SuiteIndex, states: Iterable[State]) -> None:
    """Raises SuiteError where a folder holds another suite, or other trainings."""
    try:
        saved = files.read_json(out / SUITE)
        theirs = saved["suite"], saved["profile"]
    except (RecordError, KeyError, TypeError):  # none, or one that will be written again
        theirs = index.suite, index.profile
    if theirs != (index.suite, index.profile):
        raise SuiteError(
            f"out: {out} holds suite {theirs[0]}, profile {theirs[1]}; name another folder"
        )
    if others := [state.why for state in states if state.kind == OTHER]:
        raise SuiteError(
            "\n".join(others)
            + "\nnothing was run or changed; give the same switches (--set), name "
            "another --out, or move the folders away"
        )
