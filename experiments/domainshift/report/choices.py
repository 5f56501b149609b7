"""What choosing an arm without target labels would give: the validators, over the arms of each table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from domainshift.errors import BadInput
from domainshift.records.results import Result, read_predictions
from domainshift.report.comparisons import FIGURE, counted
from domainshift.report.statistics import mean
from domainshift.report.study import Pair, Study, Table
from domainshift.selection import VALIDATORS, Inputs, Selection, select

IMAGES = 500  # of a target that validators look at; the time of SND grows with their square
LEAST = 3  # arms, without which there is nothing to rank


class Choice(NamedTuple):
    """What a validator does on one source-target pair of a table, over its seeds.

    correlation: Spearman's, of its score with target accuracy over the arms; the mean over seeds
    chosen: the arm that it chooses most often, and in how many of the seeds
    accuracy: of what it chooses, the mean over seeds, in percent
    oracle: the arm that target labels choose most often, and in how many of the seeds
    oracle_accuracy: of what they choose; no result
    """

    table: str
    pair: Pair
    validator: str
    correlation: float | None
    chosen: tuple[str, int]
    accuracy: float
    oracle: tuple[str, int]
    oracle_accuracy: float
    seeds: int
    arms: int


class Choices(NamedTuple):
    rows: list[Choice]
    notes: list[str]  # which validators are not there, and why


def choices_of(study: Study) -> Choices:
    """Every table of at least three arms; a seed counts if all its arms have a result."""
    known: dict[str, Inputs | None] = {}
    rows, notes = [], []
    for table in study.tables:
        for pair in table.pairs:
            by_seed = [
                s for seed in seeds_of(table, pair) if (s := of_seed(table, pair, seed, known))
            ]
            rows += over_seeds(table, pair, by_seed)
    unread = sum(inputs is None for inputs in known.values())
    if unread:
        notes.append(
            f"{unread} of {counted(len(known), 'run')} not scored: their predictions are not kept or "
            "cannot be read."
        )
    scored = {row.validator for row in rows}
    if rows and (missing := [v.title for v in VALIDATORS.values() if v.title not in scored]):
        notes.append(f"{' and '.join(missing)}: not here, because {why_missing(study)}.")
    return Choices(rows, notes)


def why_missing(study: Study) -> str:
    """Why validators that need held-out source images have no row."""
    if all(result.holdout is None for result in study.used):
        return "no source image is held out (holdout 0)"
    return "not every arm has predictions on held-out source images"


def seeds_of(table: Table, pair: Pair) -> list[int]:
    """The seeds in which every arm that has this pair has a result."""
    arms = [arm for arm in table.compared if pair in arm.pairs and arm.results]
    if len(arms) < LEAST:
        return []
    seeds = {key[2] for key in arms[0].results if key[:2] == pair}
    return sorted(s for s in seeds if all((*pair, s) in arm.results for arm in arms))


def of_seed(
    table: Table, pair: Pair, seed: int, known: dict[str, Inputs | None]
) -> tuple[list[Selection], int] | None:
    """The validators' choices among the arms of one seed, and how many arms; None where none can be."""
    candidates = {}
    for arm in table.compared:
        result = arm.results.get((*pair, seed))
        if result is None:
            continue
        if result.name not in known:
            known[result.name] = inputs_of(result)
        inputs = known[result.name]
        if inputs is not None:
            candidates[arm.name] = inputs, result.summary[FIGURE]
    try:
        return (select(candidates), len(candidates)) if len(candidates) >= LEAST else None
    except BadInput:  # logits beyond what float16 holds
        return None


def inputs_of(result: Result) -> Inputs | None:
    """What is kept of a result's predictions, of some images of the target; None: not readable."""
    try:
        target = read_predictions(result.folder, result.evaluation.name)
        held = read_predictions(result.folder, result.holdout.name) if result.holdout else {}
    except BadInput:
        return None
    n = len(target["labels"])
    some = np.unique(np.linspace(0, n - 1, min(n, IMAGES)).astype(int))
    features = "features" if "features" in target and "features" in held else "logits"
    return Inputs(
        target_logits=target["logits"][some],
        target_features=target[features][some] if held else None,
        held_out_logits=held.get("logits"),
        held_out_labels=held.get("labels"),
        held_out_features=held.get(features),
    )


def over_seeds(
    table: Table, pair: Pair, by_seed: Sequence[tuple[list[Selection], int]]
) -> list[Choice]:
    """One row for each validator that has a choice in every seed."""
    rows = []
    for name, validator in VALIDATORS.items():
        own = [s for selections, _ in by_seed for s in selections if s.validator == name]
        if not own or len(own) < len(by_seed):
            continue
        correlations = [s.correlation for s in own if s.correlation is not None]
        rows.append(
            Choice(
                table=table.name,
                pair=pair,
                validator=validator.title,
                correlation=mean(correlations) if correlations else None,
                chosen=Counter(s.chosen for s in own).most_common(1)[0],
                accuracy=mean([s.accuracy for s in own]),
                oracle=Counter(s.oracle for s in own).most_common(1)[0],
                oracle_accuracy=mean([s.oracle_accuracy for s in own]),
                seeds=len(own),
                arms=by_seed[0][1],
            )
        )
    return rows
