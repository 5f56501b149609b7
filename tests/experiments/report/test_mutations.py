"""Which rule finds which field: every field of the records of one training is changed in turn.

Records are sealed again after the change, and what the epochs decide is computed anew, as somebody with
this code could. A field found by a rule says so, by either of two with "or". `FIELDS` holds in both directions: a rule that stops finding a field fails
this test, and so does a field that is found and stands there as unguarded, or that is not there.
"""

import copy
from typing import get_origin

import pytest
from domainshift import files
from domainshift.records import results
from domainshift.records.schema import (
    EVALUATIONS,
    METRICS,
    TRAINING,
    Count,
    DomainData,
    EvaluationRecord,
    Row,
    TrainingRecord,
    WeightsRecord,
)
from domainshift.report import audit
from domainshift.report.comparisons import matchups
from domainshift.report.study import read_study
from made_records import find_cell, seal_again, write_suite
from pydantic import BaseModel

SUITE = """
title: "Two seeds of two methods"
defaults: {preset: course-template, weights: imagenet, epochs: 3, amp: "off", limit: 20, holdout: 0.1,
           evaluate: each}
sources: [art_painting]
targets: [sketch]
seeds: [0, 1]
tables:
  one:
    title: "One"
    baseline: random-4
    arms:
      random-4: {mode: random, layers: [4], p_zero: 0.5}
      random-10: {mode: random, layers: [10], p_zero: 0.5}
profiles: {full: {}}
"""
TEST = "sketch"

# of a training, of its second epoch (of three), and of its test
TRAINING_FIELDS = {
    "version": "set aside: another version",
    "key": "record",
    "run": "record",
    "mode": "record",
    "source": "record",
    "targets": "record",
    "seed": "record",
    "data": "remark: data",
    "classes": "record",
    "domains.digest": "record",
    "domains.counts": "labels or record",
    "held_out": "labels",
    "switches": "record or arms",
    "places": "unguarded: where it was computed changes no figure but in its last bits",
    "layers": "hooks",
    "epochs": "record",
    "updates": "record",
    "skipped": "record",
    "passes": "record",
    "train_loss": "record",
    "source_train_accuracy": "record",
    "fired": "record",
    "density": "record",
    "bn_untouched": "record",
    "seconds": "record",
    "images_per_second": "record",
    "weights.source": "record",
    "weights.sha256": "weights",
    "weights_digest": "record",
    "versions": "record",
    "warnings": "unguarded: words about data and weights that are not here",
    "seal": "record",
}
ROW_FIELDS = {
    "epoch": "length",
    "train_loss": "unguarded: training again alone can tell it; below zero: record",
    "source_train_correct": "unguarded: training again alone can tell it; beyond the total: record",
    "source_train_total": "labels",
    "lr": "rates",
    "train_seconds": "unguarded: nobody else measured it; none, or more than the epoch's: record",
    "seconds": "unguarded: nobody else measured it; less than of training: record",
    "updates": "length",
    "skipped": "steps",
    "passes": "length",
    "fired": "hooks",
    "density": "maps",
    "bn_untouched": "BatchNorm",
    "run": "record",
    "versions": "remark: code",
    "tests.correct": "unguarded: of earlier weights, which are not kept; beyond the total: record",
    "tests.total": "record",
    "tests.loss": "unguarded: as tests.correct; what batch_loss excludes: record",
    "tests.batch_loss": "unguarded: as tests.correct; what loss excludes: record",
}
EVALUATION_FIELDS = {
    "version": "set aside: another version",
    "name": "record",
    "training": "record",
    "weights_digest": "record",
    "epoch": "record",
    "domain": "record",
    "images": "record",
    "at_eval": "record",
    "bn": "record",
    "digest": "data",
    "counts": "k of n",
    "classes": "record",
    "confusion": "record",
    "correct": "record",
    "total": "record",
    "accuracy": "record",
    "macro_accuracy": "record",
    "per_class": "record",
    "majority_rate": "record",
    "collapsed": "record",
    "collapsed_to": "record",
    "loss": "record",
    "batch_loss": "record",
    "predictions": "record",
    "features": "record",
    "seconds": "unguarded: nobody else measured it; none: record",
    "versions": "remark: code",
    "seal": "record",
}
FIELDS = {
    **{f"training {name}": rule for name, rule in TRAINING_FIELDS.items()},
    **{f"row {name}": rule for name, rule in ROW_FIELDS.items()},
    **{f"evaluation {name}": rule for name, rule in EVALUATION_FIELDS.items()},
}
NESTED = {"domains": DomainData, "weights": WeightsRecord, "tests": Count}


def fields_of(kind: type[BaseModel]) -> list[str]:
    """The fields of a record, those of the records inside it as "outer.inner"."""
    names = []
    for name in kind.model_fields:
        inner = NESTED.get(name)
        names += [f"{name}.{n}" for n in inner.model_fields] if inner else [name]
    return names


def test_every_field_is_in_the_table():
    kinds = {"training": TrainingRecord, "row": Row, "evaluation": EvaluationRecord}
    schema = {f"{word} {name}" for word, kind in kinds.items() for name in fields_of(kind)}
    assert schema == FIELDS.keys()


# --- what a field is changed to ---------------------------------------------------------------


def others(value, optional=False):
    """Other values of the same type: one that is near, an empty one, and None where it is allowed."""
    if isinstance(value, bool):
        values = [not value]
    elif isinstance(value, int):
        values = [value + 1, 0]
    elif isinstance(value, float):
        values = [value * 1.01 + 0.001, 0.0]
    elif isinstance(value, str):
        values = ["0" * len(value), "other"]
    elif isinstance(value, list):
        values = [[other, *value[1:]] for first in value[:1] for other in others(first)[:1]]
        values += [value[:-1]] if value else [["other"]]
    elif isinstance(value, dict):
        values = each_entry(value)[:2] + [{}]
    else:
        values = [True, "other", 1.0]  # where there was none
    return [v for v in [*values, *([None] if optional else [])] if v != value]


def each_entry(value: dict) -> list[dict]:
    """A dict with another value of one of its entries, for each of them."""
    return [value | {key: other} for key, v in value.items() for other in others(v)[:1]]


# where few values are allowed, or each entry matters
OTHERS = {
    "switches": lambda value: [*each_entry(value), {}],
    "places": lambda value: [value | {"cache": "/elsewhere"}, value | {"workers": 4}, {}],
    "images": lambda value: ["holdout", "train"],
    "at_eval": lambda value: ["binarize", "on", "other"],
    "bn": lambda value: ["source", "target", "other"],
}


def mutations(record: dict, kind: type[BaseModel], name: str):
    """Copies of a record that differ in one field, as the schema allows them."""
    outer, _, inner = name.partition(".")
    for place in places_of(record, outer) if inner else [None]:
        owner = record if place is None else place(record)
        field = inner or name
        model = NESTED[outer] if inner else kind
        optional = type(None) in getattr(model.model_fields[field].annotation, "__args__", ())
        known = OTHERS.get(name)
        for value in known(owner[field]) if known else others(owner[field], optional):
            changed = copy.deepcopy(record)
            (changed if place is None else place(changed))[field] = value
            try:
                kind.model_validate(changed)
            except ValueError:
                continue
            yield changed


def places_of(record: dict, outer: str):
    """Where the inner records are: in a dict of them by name, or directly."""
    kind = TrainingRecord if outer in TrainingRecord.model_fields else Row
    if get_origin(kind.model_fields[outer].annotation) is dict:
        return [lambda r, key=key: r[outer][key] for key in record[outer]]
    return [lambda r: r[outer]]


# --- what the audit says ----------------------------------------------------------------------


def found(folder) -> str:
    """The rules that fail, else the remarks and what is set aside, else nothing."""
    study = read_study(folder)
    result = audit.audit(study, {table.name: matchups(table) for table in study.tables})
    if result.failures:
        return ", ".join(dict.fromkeys(remark.rule for remark in result.failures))
    if study.problems:
        return f"set aside: {study.problems[0].kind}"
    # that two arms differ is no news of the field
    rules = dict.fromkeys(remark.rule for remark in result.remarks if remark.rule != "arms")
    return f"remark: {', '.join(rules)}" if rules else "nothing"


def derived(training: dict, rows: list[dict]) -> None:
    """What training.json says of its epochs, computed anew."""
    last, seconds = rows[-1], sum(row["train_seconds"] for row in rows)
    training |= {n: last[n] for n in ("train_loss", "density", "versions")}
    training |= {n: sum(row[n] for row in rows) for n in ("updates", "skipped", "passes")}
    training |= {
        "fired": {n: sum(row["fired"].get(n, 0) for row in rows) for n in last["fired"]},
        "source_train_accuracy": results.percent(
            last["source_train_correct"], last["source_train_total"]
        ),
        "bn_untouched": None
        if None in (flags := [row["bn_untouched"] for row in rows])
        else all(flags),
        "seconds": seconds,
        "images_per_second": sum(row["source_train_total"] for row in rows) / seconds,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("mutations") / "small", SUITE)


@pytest.fixture(scope="module")
def run(folder):
    return folder / find_cell(folder, "random-4", TEST, 0).training


def outcomes(folder, run, what: str) -> list[str]:
    """What the audit says of every change of a field."""
    word, name = what.split(" ")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    content = {
        "training": (files.read_json(run / TRAINING), TrainingRecord),
        "row": (files.read_json_lines(run / METRICS)[1], Row),
        "evaluation": (files.read_json(run / EVALUATIONS / f"{TEST}.json"), EvaluationRecord),
    }
    record, kind = content[word]
    answers = []
    for changed in mutations(record, kind, name):

        def change(training, rows, tests, changed=changed):
            if word == "row":
                rows[1] = changed
                derived(training, rows)
            elif word == "training":
                training.update(changed)
            else:
                tests[TEST].update(changed)

        seal_again(run, change, seals=name != "seal", follow=False)
        answers.append(found(folder))
        for path, data in before.items():
            path.write_bytes(data)
    return answers


def test_the_records_as_they_are_pass(folder):
    assert found(folder) == "nothing"


@pytest.mark.parametrize("what", FIELDS)
def test_the_rule_that_finds_a_changed_field(folder, run, what):
    rule, answers = FIELDS[what], outcomes(folder, run, what)
    assert answers, "no change of it is a record"
    if rule.startswith("unguarded: "):
        assert answers[0] == "nothing"
        return
    for answer in answers:
        assert {answer, *answer.split(", ")} & set(rule.split(" or ")), answers
