"""Suites: what they expand to, how their runs are scheduled, and what survives a kill."""

import csv
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import audit
import pytest
import record
import run as run_py
import suite
import workers
import yaml
from config import resolve
from made_records import write
from stand_in import Stand
from study import read_study

SUITE_PY = Path(suite.__file__)
SUITES = sorted(path.stem for path in suite.SUITES.glob("*.yaml"))
PACS, WEIGHTS = "/data/PACS", "/data/weights.pth"  # never opened here
TIMES = {"seconds", "train_seconds", "images_per_second"}


@functools.cache
def plan_of(name, profile="full"):
    content = suite.in_profile(suite.read_suite(name), profile)
    return suite.expand(content, {"data": PACS, "weights": WEIGHTS}, "cpu")


def cells(plan, table):
    """(arm, cell) of each cell of a table."""
    (found,) = [t for t in plan.tables if t["name"] == table]
    return [(arm["name"], cell) for arm in found["arms"] for cell in arm["runs"]]


def configs(plan, table):
    """Configuration by arm, of a table's first cell of each arm."""
    runs = {run.name: run.config for run in plan.runs}
    return {arm: runs[cell["run"]] for arm, cell in reversed(cells(plan, table))}


# --- the suites -------------------------------------------------------------------------------


def test_the_suites_are_those_of_the_study():
    assert SUITES == ["controls", "report-a", "report-b", "study"]


@pytest.mark.parametrize("profile", ["full", "mini"])
@pytest.mark.parametrize("name", SUITES)
def test_every_run_of_a_suite_says_to_run_py_what_it_is(name, profile, monkeypatch):
    """The words of each run, read as run.py reads them, come to its configuration."""
    plan, parser = plan_of(name, profile), run_py.parser()
    monkeypatch.setattr(run_py, "parser", lambda: parser)
    for run in plan.runs:
        values, _, resume = run_py.said(run.words)
        assert resolve(values)[0].as_dict() == run.config.as_dict() and not resume
    assert len({run.name for run in plan.runs}) == len({run.config.hash() for run in plan.runs})
    seeds = [run.config.seed for run in plan.runs]
    assert seeds == sorted(seeds)  # a suite that is cut short has whole tables of fewer seeds


@pytest.mark.parametrize("name", SUITES)
def test_mini_is_a_miniature_of_full(name):
    full, mini = plan_of(name), plan_of(name, "mini")
    assert [(t["name"], [a["name"] for a in t["arms"]]) for t in full.tables] == [
        (t["name"], [a["name"] for a in t["arms"]]) for t in mini.tables
    ]
    assert {run.config.seed for run in full.runs} == {0, 1, 2, 3, 4}
    assert {run.config.seed for run in mini.runs} == {0, 1}
    assert all(run.config.limit is None and run.config.image_size == 224 for run in full.runs)
    assert all(run.config.limit == 8 and run.config.image_size == 64 for run in mini.runs)
    assert 50 * sum(map(suite.work, (r.config for r in mini.runs))) < sum(
        suite.work(r.config) for r in full.runs
    )


@pytest.mark.parametrize("name", SUITES)
def test_titles_and_notes_are_true_in_every_profile(name):
    """What a profile changes is counted by the report, and not written by hand."""
    for table in plan_of(name).tables:
        words = f"{table['title']} {table['note'] or ''}"
        found = re.findall(r"(?i)[\d,]+ (?:updates|images|epochs|seeds)|batch(?: size)? \d+", words)
        assert not found, (table["name"], found)


def test_the_study_says_by_what_its_layers_were_chosen():
    (note,) = [t["note"] for t in plan_of("study").tables if t["name"] == "methods"]
    assert "target labels" in note and "an oracle" in note


@pytest.mark.parametrize("profile", ["full", "mini"])
@pytest.mark.parametrize("name", SUITES)
def test_arms_are_compared_at_equal_updates_and_batches(name, profile):
    """Each table's arms and its baseline see as many updates, of as many images."""
    plan = plan_of(name, profile)
    runs = {run.name: run.config for run in plan.runs}
    of_arm = {a["name"]: a["runs"] for table in plan.tables for a in table["arms"]}
    for table in plan.tables:
        arms = [a["runs"] for a in table["arms"]] + [of_arm.get(table["baseline"], [])]
        budgets = {}
        for cell in (c for arm in arms for c in arm):
            config = runs[cell["run"]]
            images = sum(record.images_per_class(config, config.source))
            budget = (config.batch_size, config.length(images)[1], config.holdout)
            budgets.setdefault(cell["source"], set()).add(budget)
        assert all(len(found) == 1 for found in budgets.values()), (table["name"], budgets)


# --- published rows ---------------------------------------------------------------------------

MODES = {"baseline": "baseline", "random": "random", "DA": "da"}
CONVS = (
    "conv1 layer1.0.conv1 layer1.0.conv2 layer1.1.conv1 layer1.1.conv2 layer2.0.conv1 "
    "layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv1 layer2.1.conv2 layer3.0.conv1 "
    "layer3.0.conv2 layer3.0.downsample.0 layer3.1.conv1 layer3.1.conv2 layer4.0.conv1 "
    "layer4.0.conv2 layer4.0.downsample.0 layer4.1.conv1 layer4.1.conv2"
).split()
KINDS = {"Conv2d": "conv", "BatchNorm2d": "bn", "ReLU": "relu"}

# Rows whose run cannot be known: (source, what p_zero says, how the note begins) -> the p_zero that
# is run for them, and why.
NOT_RECORDED = {
    ("report-A", "", "log final"): (0.2, "the log does not say; 0.2 is what the text says"),
    ("report-B", "const 0.7?", "report T9"): (0.7, "not stated; where the falling p0 begins"),
    ("report-B", "const (value not recorded)", "training log"): (0.7, "the log of that row"),
}


def published():
    path = Path(suite.__file__).parent / "published.csv"
    rows = csv.DictReader(path.read_text().splitlines())
    return [row for row in rows if row["source"] in ("report-A", "report-B")]


def begins(about, tag):
    return re.match(rf"{re.escape(tag)}(?!\w)", about)  # report T1 does not begin report T10


def asked(row):
    """(mode, layers, p_zero) that a published row is of."""
    layers = row["layers"]
    if every := re.fullmatch(r"every (\d)(?:rd|th|nd) (\w+)", layers):
        layers = (KINDS[every[2]], "all", int(every[1]))
    else:
        layers = tuple(layers.split("+")) if layers else ()
    p_zero = row["p_zero"]
    for (source, words, note), (value, _) in NOT_RECORDED.items():
        if row["method"] == "random" and (row["source"], p_zero) == (source, words):
            assert row["note"].startswith(note)
            p_zero = str(value)
    return MODES[row["method"]], layers, tuple(float(p) for p in p_zero.split("|") if p)


def ran(config):
    """The same of a run. Every third convolution is what the published rows list by name."""
    if not config.layers:
        layers = ()
    elif config.layers != ("all",):
        layers = tuple(CONVS[number - 1] for number in config.layers)
    elif (config.after, config.every) == ("conv", 3):
        layers = tuple(CONVS[2::3])
    else:
        layers = (config.after, "all", config.every)
    return config.mode, layers, config.p_zero or ()


@pytest.mark.parametrize("row", published(), ids=lambda r: f"{r['source']} {r['note'][:24]}")
def test_every_published_row_has_its_run(row):
    plan = plan_of(row["source"].lower())
    runs = {run.name: run.config for run in plan.runs}
    about = f"{row['source']} {row['note']}"
    claiming = [t for t in plan.tables if any(begins(about, tag) for tag in t["published"] or [])]
    found = [
        runs[cell["run"]]
        for table in claiming
        for arm in table["arms"]
        for cell in arm["runs"]
        if (cell["source"], cell["target"], cell["seed"]) == ("art_painting", row["target"], 0)
        and ran(runs[cell["run"]]) == asked(row)
        and runs[cell["run"]].batch_size == resolve(
            {"preset": row["source"].lower(), "mode": MODES[row["method"]], "data": PACS}
        )[0].batch_size
    ]  # fmt: skip
    assert found, f"no run of {[t['name'] for t in claiming]} is {asked(row)} on {row['target']}"
    for config in found:
        assert config.preset == row["source"].lower() and config.epochs == 30
        assert config.test_set == ("source-train" if row["status"] == "invalid" else "target")
        if row["method"] == "DA":
            assert config.product and config.record_mode == "train" and config.pairing == "modulo"


def test_all_published_rows_are_looked_at_and_no_assumption_is_idle():
    rows = published()
    assert len(rows) == 134
    unknown = [r for r in rows if r["method"] == "random" and not r["p_zero"][:3].strip("const ")]
    assert len(unknown) == 9 + 1 + 1
    words = {(r["source"], r["p_zero"]) for r in unknown}
    assert words == {(source, p_zero) for source, p_zero, _ in NOT_RECORDED}


@pytest.mark.parametrize("name", SUITES)
def test_every_tag_of_a_table_is_of_published_rows(name):
    rows = csv.DictReader((SUITE_PY.parent / "published.csv").read_text().splitlines())
    abouts = [f"{row['source']} {row['note']}" for row in rows]
    for table in plan_of(name).tables:
        for tag in table["published"] or []:
            assert any(begins(about, tag) for about in abouts), (table["name"], tag)


def test_decreasing_p_zero_is_the_reports_formula():
    arms = configs(plan_of("report-b"), "decreasing-p-zero")
    falling = [round(0.9682 * math.exp(-0.324 * k), 2) for k in range(1, 8)]
    assert list(arms["random-conv1to7-falling"].p_zero) == falling
    assert arms["random-conv1to7-falling"].layers == (1, 2, 3, 4, 5, 6, 7)


def test_report_b_adapts_to_every_target():
    plan = plan_of("report-b")
    for table in ("da-positions", "da-combinations"):
        targets = {}
        for arm, cell in cells(plan, table):
            targets.setdefault(arm, set()).add(cell["target"])
        assert all(found == {"cartoon", "sketch", "photo"} for found in targets.values())


def test_controls_change_one_thing_each():
    plan = plan_of("controls")
    base = configs(plan, "template")["baseline"]
    assert (base.preset, base.batch_size, base.epochs) == ("course-template", 128, 30)

    record_arms = configs(plan, "record")
    assert not record_arms["bn-only"].apply_maps and record_arms["bn-only"].record_mode == "train"
    assert record_arms["da-conv4-record-train"].record_mode == "train"
    assert record_arms["da-conv4"].record_mode == "eval"
    binarize = configs(plan, "binarize-only")
    assert binarize["binarize-conv1"].p_zero == binarize["binarize-conv10"].p_zero == (0.0,)
    at_test = configs(plan, "at-test").values()
    assert {(c.at_eval, c.bn_recalibration) for c in at_test} == {
        (how, again) for how in ("off", "binarize", "on") for again in (False, True)
    }
    for table in ("gradient-random", "gradient-da"):
        gradients = [c.gradient for c in configs(plan, table).values()]
        assert sorted(gradients) == ["clipped", "straight_through", "zero"]
    for size in (64, 128, 256):
        for config in configs(plan, f"batch-{size}").values():
            assert (config.batch_size, config.length(2048)[1]) == (size, 480)


def test_study_is_all_pairs_all_methods_five_seeds():
    plan = plan_of("study")
    found = cells(plan, "methods")
    assert len(found) == 8 * 12 * 5 == len({cell["run"] for _, cell in found})
    modes = {c.mode for c in configs(plan, "methods").values()}
    assert modes == {"baseline", "random", "da", "adabn", "dropout2d", "dann"}
    assert len({(c["source"], c["target"]) for _, c in found}) == 12
    again = configs(plan, "methods")["baseline-recal"]  # as the shaped arms are tested
    assert again.mode == "baseline" and again.bn_recalibration
    tuned = configs(plan, "dann-tuned")["dann-tuned"]
    assert (tuned.mode, tuned.updates, tuned.dann_lr_factor) == ("dann", 5000, 10.0)


# --- reading a suite --------------------------------------------------------------------------

SMALL = {
    "title": "small",
    "defaults": {"data": "toy"},
    "sources": ["art_painting"],
    "targets": ["cartoon"],
    "seeds": [0],
    "tables": {"one": {"title": "One", "arms": {"baseline": {"mode": "baseline"}}}},
    "profiles": {"full": {}},
}


def small(tmp_path, **changes):
    """A suite file; `changes` replace keys of SMALL."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return str(path)


def expanded(path, profile="full", **forced):
    content = suite.in_profile(suite.read_suite(path), profile)
    return suite.expand(content, forced, "cpu")


def table(**keys):
    return {"title": "T", "arms": {"a": {"mode": "random", "layers": 1, "p_zero": 0.5}}} | keys


GRID = {"arms": {}, "switches": {"mode": "random", "layers": 1}, "grid": {"p_zero": [0.1, 0.2]}}

BAD = {
    "unknown key of the suite": ({"runs": []}, r"small.yaml: unknown key 'runs'; allowed: title"),
    "unknown key of a table": (
        {"tables": {"one": table(layers=3)}},
        r"table one: unknown key 'layers'; allowed: title, note",
    ),
    "unknown key of a profile": (
        {"profiles": {"full": {"seed": 3}}},
        r"profile full: unknown key 'seed'; allowed: defaults",
    ),
    "a profile of a table that is not there": (
        {"profiles": {"full": {"tables": {"two": {}}}}},
        r"no table 'two'; there are one",
    ),
    "a missing key": ({"tables": {"one": {"arms": {}}}}, r"table one: the key 'title' is missing"),
    "unknown switch": (
        {"tables": {"one": table(switches={"p_zeros": 0.3})}},
        r"table one, arm a: p_zeros: no such switch",
    ),
    "a value out of range": (
        {"tables": {"one": table(arms={"a": {"mode": "random", "p_zero": 1}})}},
        r"table one, arm a: p_zero: 1 is not allowed; allowed: 0 <= p_zero < 1",
    ),
    "a seed in an arm": (
        {"tables": {"one": table(switches={"seed": 1})}},
        r"table one, arm a: seed is not for an arm",
    ),
    "one seed twice": ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is not allowed; allowed: a list of"),
    "a seed that is no number": ({"seeds": [1, "1"]}, r"seeds: '1' is not allowed; allowed: whole"),
    "a baseline that is a list": (
        {"tables": {"one": table(baseline=["b"])}},
        r"small.yaml: table one: baseline: \['b'\] is not allowed; allowed: text",
    ),
    "a table whose name is a number": (
        {"tables": {1: table()}},
        r"small.yaml: tables: 1 is not allowed as a name; allowed: text",
    ),
    "a note that is a mapping": (
        {"tables": {"one": table(note={"a": "b"})}},
        r"table one: note: \{'a': 'b'\} is not allowed; allowed: text",
    ),
    "a title that is a list": ({"title": [1, 2]}, r"small.yaml: title: \[1, 2\] is not allowed"),
    "a table's title that is a number": (
        {"tables": {"one": table(title=3)}},
        r"table one: title: 3 is not allowed; allowed: text",
    ),
    "a note of a profile": (
        {"profiles": {"full": {"tables": {"one": {"note": 3}}}}, "tables": {"one": table()}},
        r"profile full: table one: note: 3 is not allowed; allowed: text",
    ),
    "a name that is a list": (
        {"tables": {"one": table(**GRID, name=["r"])}},
        r"table one: name: \['r'\] is not allowed; allowed: text",
    ),
    "a layer that is not there": (
        {"tables": {"one": table(arms={"a": {"mode": "da", "layers": [99]}})}},
        r"table one, arm a: layers: there is no conv 99; this model has 1 conv1, 2 layer1.0.conv1",
    ),
    "a layer of a grid that is not there": (
        {
            "tables": {
                "one": table(arms={}, grid={"layers": [1, "x"]}, name="r{layers}")
                | {"switches": {"mode": "random", "p_zero": 0.5}}
            }
        },
        r"table one, arm rx: layers: there is no module 'x'; this model has conv1, bn1",
    ),
    "three p_zero for one layer": (
        {
            "tables": {
                "one": table(
                    switches={"p_zero": [0.1, 0.2, 0.3]},
                    arms={"a": {"mode": "random", "layers": 1}},
                )
            }
        },
        r"table one, arm a: p_zero: 3 values for 1 layers; give one, or one a layer",
    ),
    "two equal arms of one name": (
        {
            "tables": {
                "one": table(**GRID | {"arms": {"r-0.1": {"p_zero": 0.1}}}, name="r-{p_zero}")
            }
        },
        r"table one, arm r-0.1: two arms of this table have that name",
    ),
    "one value of a grid twice": (
        {"tables": {"one": table(**GRID | {"grid": {"p_zero": [0.1, 0.10]}}, name="r-{p_zero}")}},
        r"table one, arm r-0.1: two arms of this table have that name",
    ),
    "no tables": ({"tables": {}}, r"tables: there is none"),
    "a tag that is no list": (
        {"tables": {"one": table(published="report-B report T3")}},
        r"table one: published: 'report-B report T3' is not allowed; allowed: a list",
    ),
    "a tag of no published row": (
        {"tables": {"one": table(published=["report-Z T3"])}},
        r"table one: published: no row of published.csv is called 'report-Z T3'",
    ),
    "seeds that are no list": ({"seeds": 3}, r"seeds: 3 is not allowed"),
    "no arms": ({"tables": {"one": table(arms={})}}, r"table one: has no runs"),
    "no pair": ({"targets": ["art_painting"]}, r"table one: has no runs"),
    "a grid without a name": ({"tables": {"one": table(**GRID)}}, r"'grid' and 'name' are given"),
    "a grid of one value": (
        {"tables": {"one": table(grid={"p_zero": 0.5}, name="r")}},
        r"table one: grid: p_zero: 0.5 is not allowed; allowed: a list",
    ),
    "a name without its value": (
        {"tables": {"one": table(**GRID, name="r-{p}")}},
        r"name 'r-\{p\}': 'p' is no switch of the grid",
    ),
    "a name that leaves its folder": (
        {"tables": {"one": table(arms={"../a": {}})}},
        r"'../a' cannot name a folder",
    ),
    "a baseline that is not there": (
        {"tables": {"one": table(baseline="b")}},
        r"table one: baseline: no arm 'b'",
    ),
    "something else to compare": (
        {"tables": {"one": table(compare=["a", "b"])}},
        r"table one: compare: 'a' is not allowed; allowed: a list of \[arm, reference\]",
    ),
    "an arm to compare with itself": (
        {"tables": {"one": table(compare=[["a", "a"]])}},
        r"table one: compare: \['a', 'a'\] is not allowed",
    ),
    "an arm to compare that is not there": (
        {"tables": {"one": table(compare=[["a", "b"]])}},
        r"table one: compare: no arm 'b'",
    ),
    "two runs of one name in a table": (
        {"tables": {"one": table(**GRID, name="r")}},
        r"two runs are called r-art_painting-cartoon-s0: table one, arm r and table one, arm r; "
        r"p_zero: \[0.1\] -> \[0.2\]",
    ),
    "two runs of one name in two tables": (
        {"tables": {"one": table(), "two": table(switches={"gradient": "zero"})}},
        r"two runs are called a-art_painting-cartoon-s0: table one, arm a and table two, arm a; "
        r"gradient: 'straight_through' -> 'zero'",
    ),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_a_bad_suite_is_refused_by_name(changes, message, tmp_path, capsys):
    out = tmp_path / "out"
    for how in ([], ["--dry-run"]):
        assert suite.main([small(tmp_path, **changes), "--out", str(out), *how]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and "Traceback" not in error
        assert len(error.splitlines()) == 1 and error.startswith("suite.py: error: ")
        assert not out.exists()


def test_a_key_given_twice_is_refused(tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text("title: a\ntables:\n  x: {}\n  y: {}\n  x: {}\n")
    assert suite.main([str(path)]) == 2
    assert "s.yaml: 'x' is there twice, in lines 3 and 5" in capsys.readouterr().err
    path.write_text("? [a]\n: b\n")
    assert suite.main([str(path)]) == 2
    assert "s.yaml: line 1: ['a'] is not allowed as a key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no suite 'nothing'; there are controls, report-a, report-b, study, or"),
        (["no/such.yaml"], "cannot read no/such.yaml"),
        (["study", "--profile", "huge"], "no profile 'huge'; there are full, mini"),
        (["study", "--only", "x*"], "--only: no run and no table matches 'x*'"),
        (["study", "--set", "seed=3"], "seed is not for an arm"),
        (["study", "--set", "sizes=3"], "--set: 'sizes=3' is not allowed; allowed: SWITCH=VALUE"),
        (["study", "--set", "device=tpu"], "device: 'tpu' is not allowed; allowed: auto | cpu"),
        (["study", "--data", "/no/PACS"], "/no/PACS"),
        (["study", "--data", "toy", "--weights", "/no.pth"], "weights: no file /no.pth"),
        (["study", "--per-device", "2", "--set", "device=cpu"], "--per-device is for GPUs"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert suite.main([*arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_run_of_two_tables_is_run_once(tmp_path):
    again = table(arms={"a": {}, "b": {}}, switches=table()["arms"]["a"])
    plan = expanded(small(tmp_path, tables={"one": table(), "two": again}))
    assert [run.name for run in plan.runs] == ["a-art_painting-cartoon-s0"]
    named = [cell["run"] for name in ("one", "two") for _, cell in cells(plan, name)]
    assert named == ["a-art_painting-cartoon-s0"] * 3


def test_later_values_win_and_null_is_none(tmp_path):
    path = small(
        tmp_path,
        defaults={"data": "toy", "epochs": 2, "batch_size": 4, "lr": 0.5, "momentum": 0.1},
        tables={
            "one": table(
                switches={"mode": "baseline", "batch_size": 6, "lr": 0.25},
                arms={"a": {"lr": 0.125, "momentum": None}},
            )
        },
        profiles={"full": {"defaults": {"epochs": 3}, "seeds": [7], "targets": ["photo"]}},
    )
    (run,) = expanded(path, gamma="0.75").runs
    config = run.config
    assert run.name == "a-art_painting-photo-s7"
    assert (config.epochs, config.batch_size, config.lr) == (3, 6, 0.125)
    assert (config.momentum, config.gamma, config.seed) == (0.9, 0.75, 7)


def test_what_auto_would_come_to_is_settled_where_runs_go(tmp_path):
    content = suite.in_profile(suite.read_suite(small(tmp_path)), "full")
    for device, amp in (("cpu", "off"), ("cuda", "float16")):  # no GPU is needed to plan for one
        (run,) = suite.expand(content, {}, device).runs
        assert run.config.amp == amp == run.said["amp"] and run.said["device"] == device


WORK = [  # in passes through 8 images forward and back; a test of 8 is a third of one
    ({"mode": "baseline"}, 3 + 3 / 3),
    ({"mode": "baseline", "bn_recalibration": True}, 3 + 2 * 3 / 3),
    ({"mode": "random", "layers": [1], "p_zero": 0.5}, 3 + 3 / 3),
    ({"mode": "dropout2d", "layers": [1], "drop_rate": 0.5}, 3 + 3 / 3),
    ({"mode": "da", "layers": [4]}, 3 * 4 / 3 + 3 / 3),
    ({"mode": "da", "layers": [4], "mask_sources": ["photo", "sketch"]}, 3 * 5 / 3 + 3 / 3),
    ({"mode": "dann"}, 3 * 2 + 3 / 3),
    ({"mode": "adabn"}, 3 + 2 * 3 / 3),
    ({"mode": "baseline", "test_set": "source-train"}, 3 + 2 * 3 / 3),
]


@pytest.mark.parametrize("switches, passes", WORK)
def test_what_a_run_costs_follows_from_what_its_method_does(switches, passes):
    said = {"preset": "course-template", "data": PACS, "limit": 8, "epochs": 3, "device": "cpu"}
    config, _ = resolve(said | {"target": "cartoon", "image_size": 112} | switches)
    images = 8 * 7  # of every domain, at a quarter of the pixels
    assert suite.work(config) == pytest.approx(passes * images / 4)


# --- scheduling, with a stand-in for run.py ---------------------------------------------------


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """Twelve runs, by a program that only pretends to train."""
    return Stand(tmp_path, monkeypatch, runs=12)


def statuses(out):
    return {
        name: r["state"] for name, r in suite.record.read_json(out / "suite.json")["runs"].items()
    }


def test_all_runs_are_run_and_then_none(stand, capsys):
    assert suite.main([*stand.words, "--jobs", "3"]) == 0
    assert stand.started == {name: 1 for name in stand.names}
    assert set(statuses(stand.out).values()) == {"done"}
    printed = capsys.readouterr().out
    assert "12 runs, 0 done, 12 to do, 3 at a time on cpu" in printed
    assert "[12/12] " in printed and "50.00 % (1/2)" in printed
    assert suite.main(stand.words) == 0
    assert stand.started == {name: 1 for name in stand.names}


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_than_jobs_at_a_time(stand, jobs):
    stand.tell("sleep", 0.1)
    assert suite.main([*stand.words, "--jobs", str(jobs)]) == 0
    assert stand.most_at_once() == jobs


def test_a_failure_is_recorded_and_the_rest_runs(stand, capsys):
    bad = stand.names[4]
    stand.tell("fail", "3", bad)
    assert suite.main(stand.words) == 1
    assert statuses(stand.out) == {
        name: "failed" if name == bad else "done" for name in stand.names
    }
    index = json.loads((stand.out / "suite.json").read_text())
    assert index["runs"][bad]["problem"] == ["one", "the last words"]
    out = capsys.readouterr().out
    assert "FAILED: the last words" in out and f"failed: {bad} (" in out
    assert "11 of 12 runs are done" in out

    stand.tell("fail", None, bad)
    assert suite.main(stand.words) == 0  # tried again, and alone
    assert stand.started == {name: 1 + (name == bad) for name in stand.names}
    assert json.loads((stand.out / "suite.json").read_text())["runs"][bad]["problem"] is None


def test_a_run_that_is_killed_is_named_so(stand):
    stand.tell("fail", "-9", stand.names[0])
    assert suite.main([*stand.words, "--only", stand.names[0]]) == 1
    problem = json.loads((stand.out / "suite.json").read_text())["runs"][stand.names[0]]["problem"]
    assert problem[-1] == "killed by SIGKILL"


def test_exit_status_0_without_a_record_is_a_failure(stand):
    stand.tell("fail", "0", stand.names[0])
    assert suite.main([*stand.words, "--only", stand.names[0]]) == 1
    problem = json.loads((stand.out / "suite.json").read_text())["runs"][stand.names[0]]["problem"]
    assert problem == ["ended well, but left no whole record"]


def test_only_runs_what_it_names_and_the_index_has_all(stand):
    assert suite.main([*stand.words, "--only", "*-s1"]) == 0
    chosen = {name for name in stand.names if name.endswith("-s1")}
    assert 0 < len(chosen) < 12 and set(stand.started) == chosen
    assert statuses(stand.out) == {n: "done" if n in chosen else "missing" for n in stand.names}
    assert suite.main([*stand.words, "--only", "one"]) == 0  # the table
    assert set(statuses(stand.out).values()) == {"done"}


def test_a_table_is_run_with_the_baseline_of_another():
    plan = plan_of("report-b")
    (table,) = [t for t in plan.tables if t["name"] == "p-zero-conv1"]
    assert table["baseline"] not in [arm["name"] for arm in table["arms"]]
    modes = [run.config.mode for run in suite.chosen(plan, "p-zero-conv1")]
    cells = sum(len(arm["runs"]) for arm in table["arms"])
    assert (modes.count("random"), modes.count("baseline")) == (cells, cells // len(table["arms"]))


def test_a_table_is_run_with_the_arms_it_is_compared_with(tmp_path):
    other = {"title": "O", "arms": {"b": {"mode": "baseline"}}}
    plan = expanded(small(tmp_path, tables={"one": table(compare=[["a", "b"]]), "two": other}))
    assert {run.name[0] for run in suite.chosen(plan, "one")} == {"a", "b"}


def test_a_laptop_tells_how_long_a_gpu_would_take(capsys):
    assert suite.main(["study", "--dry-run", "--set", "device=cuda"]) == 0
    assert "510 runs, 0 done, 510 to do, 1 at a time on cuda" in capsys.readouterr().out


def test_the_index_is_what_the_report_needs(stand):
    assert suite.main(stand.words) == 0
    index = json.loads((stand.out / "suite.json").read_text())
    assert index["command"].startswith("python experiments/suite.py /")
    assert index["command"].endswith("/stand.yaml --profile full --set device=cpu")
    assert (index["format"], index["suite"], index["profile"]) == (1, "stand", "full")
    (one,) = index["tables"]
    assert (one["name"], one["title"], one["baseline"]) == ("one", "One", "r0.0")
    assert one["arms"][0] == {
        "name": "r0.0",
        "runs": [
            {"source": "art_painting", "target": "cartoon", "seed": seed, "run": name}
            for seed, name in enumerate(stand.names[:: len(stand.names) // 2])
        ],
    }
    switches = {"mode": "random", "layers": [1], "p_zero": [0.0], "seed": 0, "device": "cpu"}
    assert switches.items() <= index["runs"][stand.names[0]]["switches"].items()


def test_dry_run_lists_and_touches_nothing(stand, capsys):
    assert suite.main([*stand.words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[-1] for line in lines if line.startswith("new ")]
    assert listed == stand.names and not stand.out.exists() and not stand.started
    assert "12 to do" in lines[-1] and "a guess, no run is finished here" in lines[-1]


def test_the_estimate_follows_what_was_measured(stand, capsys):
    half = "*-s0"
    assert suite.main([*stand.words, "--only", half]) == 0
    capsys.readouterr()
    assert suite.main([*stand.words, "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "12 runs, 6 done, 6 to do" in line and "by the 6 finished here" in line
    # the stand-in's records say 1000 s each, and all its runs cost alike
    seconds = 6 * (1000 + suite.START_SECONDS)
    assert f"about {suite.duration(seconds)} (" in line


def test_two_processes_share_a_suite(stand):
    """Each run is run once, whoever runs it, and both end when all is done."""
    stand.tell("sleep", 0.2)
    results = []
    both = [threading.Thread(target=lambda: results.append(suite.main(stand.words))) for _ in "ab"]
    [thread.start() for thread in both]
    [thread.join() for thread in both]
    assert results == [0, 0]
    assert set(statuses(stand.out).values()) == {"done"}
    assert stand.started == {name: 1 for name in stand.names}
    assert stand.most_at_once() == 2


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import suite; from pathlib import Path\n"
        "held = suite.lock(Path(sys.argv[2]), 'a'); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(SUITE_PY.parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert suite.lock(tmp_path, "a") is None
        suite.lock(tmp_path, "b").close()
        process.kill()
        process.wait()
    with suite.lock(tmp_path, "a") as held:
        assert held is not None and suite.lock(tmp_path, "a") is None


def test_a_lock_outlives_the_suite_while_its_run_writes(stand):
    """Where a run survives the suite, its folder stays locked: nobody else writes there."""
    stand.tell("sleep", 1.0)
    held = suite.lock(stand.out, stand.names[0])
    pool = workers.Local([{}])
    (stand.out / stand.names[0]).mkdir()
    run = stand.plan.runs[0]
    pool.start(workers.Job(run.name, run.words, stand.out / run.name, held))
    held.close()
    assert suite.lock(stand.out, stand.names[0]) is None
    pool.active[0][1].wait()
    suite.lock(stand.out, stand.names[0]).close()


def test_a_run_whose_suite_is_gone_already_does_not_begin():
    done = subprocess.run(
        workers.COMMAND, env=os.environ | {workers.PARENT: "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "who started this is gone\n")


def test_slots_divide_cores_and_take_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slots = workers.slots("cpu", jobs=3, per_device=1, gpus=0, cores=8)
    assert slots == [{"OMP_NUM_THREADS": "2"}] * 3
    assert workers.slots("cpu", jobs=None, per_device=1, gpus=0, cores=8) == [
        {"OMP_NUM_THREADS": "8"}
    ]
    slots = workers.slots("cuda", jobs=None, per_device=2, gpus=2, cores=2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots] == ["0", "1", "0", "1"]
    assert {s["OMP_NUM_THREADS"] for s in slots} == {"1"}
    assert len(workers.slots("cuda", jobs=3, per_device=2, gpus=2, cores=2)) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    slots = workers.slots("cuda", jobs=None, per_device=1, gpus=2, cores=2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots] == ["5", "7"]


def test_runs_are_bound_per_gpu(stand, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stand.tell("sleep", 0.1)
    pool = workers.Local(workers.slots("cuda", jobs=None, per_device=2, gpus=2, cores=2))
    waiting, ended = list(stand.plan.runs), 0
    while waiting or ended < 12:
        while waiting and pool.room():
            run = waiting.pop()
            (stand.out / run.name).mkdir(parents=True)
            held = suite.lock(stand.out, run.name)
            pool.start(workers.Job(run.name, run.words, stand.out / run.name, held))
        ended += len(pool.finished(1))
    assert stand.most_at_once() == 4
    assert stand.most_at_once(gpu="0") == stand.most_at_once(gpu="1") == 2


# --- records that are there already -----------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda c: c | {"lr": 7.0}, r"is of another configuration: lr: 7.0 -> "),
        (lambda c: c | {"colour": 3}, r"is a record of another version: colour"),
        (lambda c: {k: v for k, v in c.items() if k != "lr"}, r"another version: lr"),
    ],
)
def test_another_record_is_never_overwritten(stand, harm, message, capsys):
    assert suite.main([*stand.words, "--only", "*-s0"]) == 0
    path = stand.out / stand.names[0] / "config.yaml"
    record.write_yaml(path, harm(record.read_yaml(path)))
    before, started = contents(stand.out), stand.started
    assert suite.main(stand.words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and str(path.parent) in error
    assert contents(stand.out) == before and stand.started == started


def test_a_folder_of_another_suite_is_refused(stand, tmp_path, capsys):
    assert suite.main([*stand.words, "--only", stand.names[0]]) == 0
    before = contents(stand.out)
    assert suite.main([small(tmp_path), "--out", str(stand.out)]) == 2
    assert "holds suite stand, profile full" in capsys.readouterr().err
    assert contents(stand.out) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_half_written_record_is_named_and_made_anew(stand, name, capsys):
    assert suite.main(stand.words) == 0
    folder = stand.out / stand.names[3]
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] + b"\xff\x00{")
    assert suite.main(stand.words) == 0
    assert stand.started == {n: 1 + (n == stand.names[3]) for n in stand.names}
    printed = capsys.readouterr().out
    assert f"{stand.names[3]}: half-written, moved aside and made anew:" in printed
    assert f"cannot read {folder / name}" in printed
    assert (folder / "summary.json.broken").exists()


# --- true runs --------------------------------------------------------------------------------

TRUE = SMALL | {
    "defaults": {"data": "toy", "limit": 3, "image_size": 32, "epochs": 8, "batch_size": 8},
    "tables": {
        "one": {
            "title": "One",
            "arms": {
                # maps that draw while testing too are the hardest to continue
                "random": {"mode": "random", "layers": [1, 4], "p_zero": 0.3, "at_eval": "on"},
                "da": {"mode": "da", "layers": 4, "record_mode": "train"},
            },
        }
    },
}


def result_of(folder):
    """What must not depend on interruptions."""
    summary = record.read_json(folder / "summary.json")
    drop = {*TIMES, "seal", "config"}  # config has the folder's name
    rows = [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in record.read_json_lines(folder / "metrics.jsonl")
    ]
    return {k: v for k, v in summary.items() if k not in drop}, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The suite TRUE, run without interruption: its yaml file and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    path = small(folder, **TRUE)
    assert suite.main([path, "--out", str(folder / "out"), "--keep-checkpoints"]) == 0
    return path, folder / "out"


RANDOM, DA = "random-art_painting-cartoon-s0", "da-art_painting-cartoon-s0"


@pytest.mark.slow
def test_true_runs_leave_whole_records(whole):
    _, out = whole
    for name in (RANDOM, DA):
        assert record.check(out / name) == []
        assert (out / name / "curves.png").exists() and (out / name / "log.txt").exists()
    assert statuses(out) == {RANDOM: "done", DA: "done"}


def start(arguments):
    return subprocess.Popen(
        [sys.executable, str(SUITE_PY), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_suite_stopped_in_mid_run_continues_to_the_same_bits(signum, whole, tmp_path):
    path, expected = whole
    out = tmp_path / "out"
    arguments = [path, "--out", str(out), "--only", "random*"]
    with start(arguments) as process:
        metrics = out / RANDOM / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert not (out / RANDOM / "summary.json").exists()
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:  # as Ctrl-C
        assert process.returncode == 130
        again = f"python experiments/suite.py {shlex.join(arguments)}"
        assert error == f"suite.py: interrupted; to continue: {again}\n"
    if sys.platform == "linux":  # the run ended with the suite: its lock is free
        deadline = time.monotonic() + 5
        while (held := suite.lock(out, RANDOM)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held.close()

    assert suite.main(arguments) == 0
    log = (out / RANDOM / "log.txt").read_text()
    assert log.count("starting from the beginning") == 1  # and then resumed
    assert result_of(out / RANDOM) == result_of(expected / RANDOM)
    assert not (out / RANDOM / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_true_record_that_is_half_written_is_resumed(whole, tmp_path, capsys):
    """Only the summary is cut: it is made anew from the checkpoint, and nothing is trained."""
    path, expected = whole
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(expected), str(out)], check=True)
    summary = out / DA / "summary.json"
    os.truncate(summary, 100)
    assert suite.main([path, "--out", str(out)]) == 0
    assert (
        "half-written, moved aside and made anew: summary.json cannot read"
        in capsys.readouterr().out
    )
    assert result_of(out / DA) == result_of(expected / DA)
    assert (out / DA / "log.txt").read_text().count("epoch 1/8 ") == 1


@pytest.mark.slow
def test_an_edited_record_is_refused(whole, tmp_path, capsys):
    path, expected = whole
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(expected), str(out)], check=True)
    summary = record.read_json(out / DA / "summary.json")
    record.write_json(out / DA / "summary.json", summary | {"target_accuracy": 99.0})
    before = contents(out)
    assert suite.main([path, "--out", str(out)]) == 2
    assert f"{out / DA}: edited after the run: the seal does not fit" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["NaN", "broken rule"])
def test_a_record_that_is_not_to_be_used_is_refused_in_a_dry_run_too(whole, tmp_path, capsys, harm):
    path, expected = whole
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(expected), str(out)], check=True)
    config, rows, summary = record.read(out / DA)
    if harm == "NaN":
        words = "cannot be computed again: ValueError"
        lines = [json.dumps(row | {"train_loss": math.nan}) for row in rows]
        (out / DA / "metrics.jsonl").write_text("\n".join(lines))
    else:
        words = "bn_untouched is True, not False"
        rows = [row | {"bn_untouched": True} for row in rows]
        write(out / DA, config, rows, summary["layer_names"])
    before = contents(out)
    for how in ([], ["--dry-run"]):
        assert suite.main([path, "--out", str(out), *how]) == 2
        error = capsys.readouterr().err
        assert f"{out / DA}: " in error and words in error and "Traceback" not in error
    assert contents(out) == before


@pytest.mark.slow
def test_data_and_weights_that_lie_elsewhere_are_the_same_run(
    pacs, imagenet_weights, tmp_path, capsys
):
    """What is done stays, what was killed goes on with the paths now given; so does one run alone."""
    places = {}
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
        data, weights = tmp_path / place / "PACS", tmp_path / place / "r18.pth"
        data.symlink_to(pacs)
        weights.symlink_to(imagenet_weights)
        places[place] = ["--data", str(data), "--weights", str(weights)]
    tiny = {"limit": 2, "image_size": 32, "epochs": 2, "batch_size": 7, "device": "cpu"}
    path = small(tmp_path, defaults=tiny | {"cache": str(tmp_path / "cache")}, seeds=[0, 1])
    out = tmp_path / "out"
    arguments = [path, "--out", str(out), "--keep-checkpoints"]
    assert suite.main([*arguments, *places["old"]]) == 0
    done, killed = (out / f"baseline-art_painting-cartoon-s{seed}" for seed in (0, 1))
    before, expected = contents(done), result_of(killed)

    def as_it_was(folder):
        """Its first paths are in it still: the record is of the data and weights that it began with."""
        assert record.check(folder) == [] and result_of(folder) == expected
        assert record.read_yaml(folder / "config.yaml")["weights"] == places["old"][3]

    (killed / "summary.json").unlink()
    capsys.readouterr()
    assert suite.main([*arguments, *places["new"]]) == 0
    assert "2 runs, 1 done, 1 to do" in capsys.readouterr().out
    assert contents(done) == before
    as_it_was(killed)
    index = record.read_json(out / "suite.json")
    assert {about["switches"]["weights"] for about in index["runs"].values()} == {places["new"][3]}
    study = read_study(out)
    assert not study.problems and not study.missing and audit.audit(study).passes

    (killed / "summary.json").unlink()
    alone = ["--resume", "--out", str(killed), "--device", "cpu"]
    shutil.move(tmp_path / "old", tmp_path / "gone")
    assert run_py.main([*alone, *places["new"]]) == 0
    as_it_was(killed)
    assert run_py.main([*alone, "--data", "toy"]) == 2  # another run
    assert "data: " in capsys.readouterr().err
