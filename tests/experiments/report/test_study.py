"""Reading a suite's folder: gaps stay gaps, and every record that no table uses is named."""

import shutil

import pytest
from domainshift import files
from domainshift.records.schema import EVALUATIONS, METRICS, TRAINING, VERSION
from domainshift.report import command, contents
from domainshift.report.comparisons import Verdict
from domainshift.report.study import read_study
from domainshift.report.switches import departures
from made_records import (
    EXACT,
    cell,
    comparison,
    exact,
    find_cell,
    line,
    report_of,
    seal_again,
    write_suite,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("study") / "small", EXACT, exact)


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of one's own to break something in."""
    return shutil.copytree(folder, tmp_path / "small")


def name_of(folder, arm, target, seed):
    one = find_cell(folder, arm, target, seed)
    return f"{one.training}/{one.test}"


def aside(folder):
    return "\n".join(contents.set_aside(read_study(folder)))


# --- what is missing --------------------------------------------------------------------------


def test_a_missing_seed_is_missing(tmp_path):
    folder = write_suite(tmp_path / "gap", EXACT, exact, without=[("random", "sketch", 2)])
    built = report_of(folder)
    c = comparison(built, "random minus baseline", "sketch")
    assert c.missing == [("art_painting", "sketch", 2)]
    assert (c.seeds, c.estimate.mean) == ([0, 1], 4)
    assert c.sentence.endswith("; 1 missing")
    mean = line(built, "random", None).comparison
    assert mean.left_out == [("art_painting", "cartoon", 2)]
    assert (mean.seeds, mean.gaps) == ([0, 1], "1 missing, 1 left out")
    assert cell(built, "random", "sketch", "Seeds") == "2 of 3; missing: 2"
    assert cell(built, "random", "sketch", "Minus baseline").endswith("; 1 missing")
    assert cell(built, "random", "cartoon", "Minus baseline") == "+4.7 ± 3.5"  # nothing lost
    assert (
        cell(built, "random", None, "Seeds") == "5 of 6 runs; 1 left out, whose seeds lack others"
    )
    name = name_of(folder, "random", "sketch", 2)
    assert contents.set_aside(built.study) == [f"{name}: unfinished: not tested yet"]
    assert contents.progress(built.study) == "17 of 18 runs done, 1 missing"


def test_a_training_that_is_not_there_is_missing(tmp_path):
    gone = [("da", "sketch", 1)]
    folder = write_suite(tmp_path / "gap", EXACT, exact, without=gone)
    assert aside(folder) == f"{name_of(folder, *gone[0])}: missing"


def test_a_mean_difference_over_other_pairs_names_them(tmp_path):
    """Its line is of both targets, and the figures beside it are means over both."""
    gone = [("da", "cartoon", seed) for seed in (1, 2)]
    folder = write_suite(tmp_path / "gap", EXACT, exact, without=gone)
    built = report_of(folder)
    assert cell(built, "baseline", None, "Last epoch") == "45.0 ± 0.0"
    assert cell(built, "da", None, "Minus baseline") == (
        "+0.0 ± 3.5; 2 missing, 1 left out; over art_painting → sketch"
    )
    assert cell(built, "da", "sketch", "Minus baseline") == "+0.0 ± 3.5"
    assert cell(built, "random", None, "Minus baseline") == "+4.7 ± 2.9"
    assert command.main([str(folder)]) == 0
    assert "+0.0 (2 missing)" in (folder / "report.tex").read_text()
    lines = (folder / "report.csv").read_text().splitlines()
    of_da = next(line for line in lines if ",da,mean,mean," in line)
    assert ",art_painting-sketch," in of_da
    assert not any(",art_painting-cartoon" in line for line in lines if ",da,mean" in line)


def test_a_mean_difference_over_some_of_several_pairs(tmp_path):
    text = EXACT.replace("[cartoon, sketch]", "[cartoon, photo, sketch]")
    gone = [("da", "cartoon", seed) for seed in range(3)]
    built = report_of(write_suite(tmp_path / "gap", text, exact, without=gone))
    assert cell(built, "da", None, "Minus baseline").endswith("; 3 missing; over 2 of 3 pairs")


def test_an_arm_without_runs(tmp_path):
    gone = [("da", target, seed) for target in ("cartoon", "sketch") for seed in range(3)]
    built = report_of(write_suite(tmp_path / "gap", EXACT, exact, without=gone))
    assert cell(built, "da", "cartoon", "Last epoch") == "missing"
    assert cell(built, "da", None, "Seeds") == "0 of 6 runs"
    compared = [(c.name, c.verdict) for c in built.comparisons.primary if c.arm.name == "da"]
    assert compared == [("da minus baseline", Verdict.NOTHING)] * 2


@pytest.mark.parametrize("seeds, expected", [((0, 2), "45.0"), ((0, 1, 2), "incomplete")])
def test_a_mean_over_pairs_is_over_all_of_them(tmp_path, seeds, expected):
    """Cartoon alone would be 40, sketch alone 50: a mean over what is there would say anything."""
    gone = [("baseline", "cartoon", seed) for seed in seeds]
    built = report_of(write_suite(tmp_path / "gap", EXACT, exact, without=gone))
    assert cell(built, "baseline", None, "Last epoch") == expected


def test_nothing_is_finished(copy, capsys):
    for path in copy.glob(f"*/{TRAINING}"):
        path.unlink()
    assert command.main([str(copy)]) == 0
    assert "0 of 18 runs done, 18 missing" in capsys.readouterr().out
    text = (copy / "report.md").read_text()
    assert "# A small study" in text and "No run is finished." in text
    assert "unfinished" in text


# --- what cannot be used ----------------------------------------------------------------------


def test_broken_records_are_named_and_nothing_else_is_lost(copy):
    random = [copy / find_cell(copy, "random", "cartoon", seed).training for seed in range(3)]
    half = random[0] / METRICS
    half.write_text(half.read_text()[:-30])
    old = random[1] / TRAINING
    old.write_text(old.read_text().replace(f'"version": {VERSION}', '"version": 77'))
    failed = copy / find_cell(copy, "da", "cartoon", 2).training
    shutil.rmtree(failed)
    failed.mkdir()
    failure = {"status": 1, "lines": ["run.py: failed: <no room>"]}
    files.write_json(failed / "failure.json", failure)
    one = copy / find_cell(copy, "da", "cartoon", 0).training
    shutil.copytree(one, copy / "stray")
    assert command.main([str(copy)]) == 0
    text = aside(copy)
    assert f"{random[0].name}/cartoon: half-written: cannot read metrics.jsonl: line 3" in text
    assert f"{random[1].name}/sketch: another version" in text and "version 77" in text
    assert f"{failed.name}: failed: run.py: failed: <no room>" in text
    assert "stray/cartoon: finished, but suite.json does not have it" in text
    page = (copy / "report.html").read_text()
    assert "failed: run.py: failed: &lt;no room&gt;" in page
    built = report_of(copy)
    assert cell(built, "random", "cartoon", "Seeds") == "1 of 3; missing: 0, 1"
    assert cell(built, "da", "sketch", "Minus baseline") == "+0.0 ± 5.0"
    assert contents.progress(built.study) == "13 of 18 runs done, 1 failed, 4 missing"


def test_a_test_of_the_held_out_images_that_is_gone_is_named(copy):
    one = find_cell(copy, "da", "cartoon", 0)
    (copy / one.training / EVALUATIONS / "art_painting-holdout.json").unlink()
    (problem,) = read_study(copy).problems
    assert (problem.name, problem.kind) == (f"{one.training}/{one.test}", "broken rule")


def test_a_run_taken_out_of_its_table_is_named(copy):
    name = name_of(copy, "da", "sketch", 1)
    index = files.read_json(copy / "suite.json")
    for arm in index["tables"][0]["arms"]:
        arm["cells"] = [c for c in arm["cells"] if f"{c['training']}/{c['test']}" != name]
    files.write_json(copy / "suite.json", index)
    assert aside(copy) == f"{name}: finished, but no table of suite.json has it"


# --- suite.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("tables.0.name", 1, "tables.0.name"),
        ("tables.0.note", {"a": "b"}, "tables.0.note"),
        ("tables.0.title", [1, 2], "tables.0.title"),
        ("tables.0.published", [3], "tables.0.published.0"),
        ("tables.0.baseline", ["b"], "tables.0.baseline"),
        ("tables.0.baseline", "nobody", "table shaping: baseline: no arm 'nobody'"),
        ("tables.0.compare", [["da", "nobody"]], "table shaping: compare: no arm 'nobody'"),
        (
            "tables.0.compare",
            [["da", "da"]],
            "compare: 'da' with itself is not allowed; allowed: two",
        ),
        ("tables.0.published", ["report-B report T99"], "published: 'report-B report T99' is not"),
        ("tables.0.arms.2.cells", [], "table shaping: arm 'da' has no cells; allowed: one or more"),
        ("tables.0.arms.2.name", "random", "table shaping: two arms are called 'random'"),
        ("tables.0.arms.1.cells.0.training", "x" * 300, "at most 200 bytes"),
        ("tables.0.arms.1.cells.0.training", "../x", "allowed: the name of a folder"),
        ("tables.0.arms.1.cells.0.seed", 1, "seed 1 is random"),  # twice, of two trainings
        ("tables.0.title", "a\0b", r"tables.0.title: 'a\x00b' is not allowed"),
        ("tables.0.arms.1.name", "a\x1bb", "tables.0.arms.1.name: "),
        ("tables.0.arms.1.name", "\ud800", "tables.0.arms.1.name: "),
        ("title", "\0", "title: "),
        ("command", "python \0", "command: "),
        ("margin", 1e308, "margin: 1e+308 is not allowed; allowed: above 0, at most 100"),
        ("primary", [["da", "nobody"]], "primary: no arm 'nobody'"),
        ("tables.0.arms.1.cells.0.seed", "first", "tables.0.arms.1.cells.0.seed"),
        ("tables", None, "tables"),
        ("title", None, "title"),
        ("trainings", 3, "trainings"),
        ("format", 1, "format"),
    ],
)
def test_a_suite_json_of_wrong_types_is_refused_by_place(
    folder, tmp_path, path, value, words, capsys
):
    index = place = files.read_json(folder / "suite.json")
    *first, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in first:
        place = place[key]
    place[last] = value
    files.write_json(tmp_path / "suite.json", index)
    assert command.main([str(tmp_path), "--audit-only"]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_table_whose_only_arm_has_no_cells_is_refused(folder, tmp_path, capsys):
    index = files.read_json(folder / "suite.json")
    index |= {"primary": [], "tables": [index["tables"][0] | {"baseline": None}]}
    index["tables"][0]["arms"] = [{"name": "baseline", "cells": []}]
    files.write_json(tmp_path / "suite.json", index)
    assert command.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "arm 'baseline' has no cells" in error and len(error.splitlines()) == 1


def test_primary_arms_that_share_no_target_are_refused(folder, tmp_path, capsys):
    """They would leave the family, and make the others' verdicts easier."""
    index = files.read_json(folder / "suite.json")
    arm = index["tables"][0]["arms"][2]
    arm["cells"] = [
        cell | {"target": "photo"} for cell in arm["cells"] if cell["target"] == "cartoon"
    ]
    files.write_json(tmp_path / "suite.json", index)
    assert command.main([str(tmp_path)]) == 2
    assert "primary: 'da' and 'baseline' share no source and target" in capsys.readouterr().err


def test_two_tables_of_one_name_are_refused(folder, tmp_path, capsys):
    index = files.read_json(folder / "suite.json")
    index["tables"] *= 2
    files.write_json(tmp_path / "suite.json", index)
    assert command.main([str(tmp_path)]) == 2
    assert "tables: two are called 'shaping'; allowed: one" in capsys.readouterr().err


@pytest.mark.parametrize("text, words", [("{", "half-written"), ("[]", "no SuiteIndex")])
def test_a_foreign_index(tmp_path, text, words, capsys):
    (tmp_path / "suite.json").write_text(text)
    assert command.main([str(tmp_path), "--audit-only"]) == 2
    assert words in capsys.readouterr().err


# --- without suite.json -----------------------------------------------------------------------


@pytest.fixture
def loose(copy):
    (copy / "suite.json").unlink()
    return copy


def test_without_suite_json(loose, folder):
    built = report_of(loose)
    (table,) = built.study.tables
    assert {arm.name for arm in table.arms} == {"baseline", "random", "da"}
    ours = comparison(built, "da minus baseline").estimate
    assert ours == comparison(report_of(folder), "da minus baseline").estimate
    assert built.sections[0].command.startswith("no suite.json")


def test_without_suite_json_arms_are_called_by_what_differs(tmp_path):
    text = EXACT.replace(
        "      da: {mode: da, layers: [4]}",
        "      da: {mode: da, layers: [9], epochs: 2}\n      adabn: {mode: adabn}",
    )
    folder = write_suite(tmp_path / "s", text, lambda *_: 40)
    (folder / "suite.json").unlink()
    assert {arm.name for arm in read_study(folder).tables[0].arms} == {
        "baseline, epochs 3", "adabn, epochs 3", "random, epochs 3", "da, epochs 2, layers 9",
    }  # fmt: skip


def test_a_copied_record_without_suite_json_is_named(loose, capsys):
    study = read_study(loose)
    one = next(arm for arm in study.tables[0].arms if arm.name == "da").one
    shutil.copytree(one.folder, loose / f"{one.folder.name}-copy")
    study = read_study(loose)
    (line,) = contents.set_aside(study)
    copied = f"{one.folder.name}-copy/{one.evaluation.name}"
    assert line == f"{copied}: finished, but {one.name} has its switches, domains and seed"
    assert contents.progress(study) == "18 of 18 runs done"
    arm = next(arm for arm in study.tables[0].arms if arm.name == "da")
    assert len(arm.results) == len(arm.planned) == 6
    assert copied not in arm.planned.values()
    sentences = contents.build(study).findings["The choice of the epoch"]
    assert sentences and all("average of 18 runs" in text for text in sentences)
    assert command.main([str(loose), "--audit-only"]) == 0
    assert f"set aside  {line}" in capsys.readouterr().out


def test_a_method_whose_file_is_not_here_is_called_by_its_name(copy):
    """Its records are read like all others, and the report has no words of its own for it."""

    def rename(training, rows, tests):
        training["mode"] = training["switches"]["mode"] = "mine"
        training["places"]["method_file"] = "mine.py"
        training["layers"], training["bn_untouched"] = [], None
        for row in rows:
            row |= {"fired": {}, "density": {}, "bn_untouched": None}
        training |= {"fired": {}, "density": {}}

    for name in {
        find_cell(copy, "da", t, s).training for t in ("cartoon", "sketch") for s in range(3)
    }:
        seal_again(copy / name, rename)
    assert command.main([str(copy)]) == 0
    assert cell(report_of(copy), "da", "cartoon", "Last epoch") == "40.0 ± 2.0"
    (copy / "suite.json").unlink()
    arms = {arm.name.partition(",")[0] for arm in read_study(copy).tables[0].arms}
    assert arms == {"baseline", "random", "mine"}


# --- protocols --------------------------------------------------------------------------------


def test_how_runs_depart_from_their_protocol(folder):
    study = read_study(folder)
    assert departures(study.used[0]) == [
        "limit 50 (protocol: none)", "holdout 0.1 (protocol: 0)", "epochs 3 (protocol: 30)",
    ]  # fmt: skip
