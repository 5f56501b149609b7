"""The audit finds what a record or a comparison must not be; each rule by a study that breaks it."""

import re
from dataclasses import replace

import audit
import pytest
import record
import report
import yaml
from config import resolve
from made_records import SMALL, seal_again, write, write_run, write_suite
from PIL import Image
from study import read_run, read_study


def audited(folder):
    return audit.audit(read_study(folder))


def failed(result) -> set[str]:
    return {remark.rule for remark in result.failures}


def changed(path, **keys) -> str:
    """SMALL with other values at a place such as "defaults" or "tables.shaping.arms.da"."""
    content = yaml.safe_load(SMALL)
    place = content
    for key in path.split("."):
        place = place[key]
    place.update(keys)
    return yaml.safe_dump(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("audit") / "small")


def test_a_sound_study_passes(whole, capsys):
    result = audited(whole)
    assert result.passes and not result.remarks
    assert result.checked["record"] == result.checked["hooks"] == 18
    assert result.checked["updates"] == 2  # random and da with the baseline
    assert audit.main([str(whole)]) == 0
    assert "18 records; the audit passes" in capsys.readouterr().out


# --- a record ---------------------------------------------------------------------------------


def test_an_edited_record_is_named_and_the_audit_fails(tmp_path, capsys):
    folder = write_suite(tmp_path / "small")
    path = folder / "da-art_painting-sketch-s1" / "summary.json"
    text = path.read_text()
    correct = record.read_json(path)["target_correct"]
    path.write_text(
        text.replace(f'"target_correct": {correct},', f'"target_correct": {correct + 9},')
    )
    result = audited(folder)
    assert failed(result) == {"record"}
    assert {remark.where for remark in result.failures} == {"da-art_painting-sketch-s1"}
    assert result.checked["record"] == 18 and result.checked["hooks"] == 17
    assert audit.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: da-art_painting-sketch-s1: edited after the run" in out
    assert "the audit FAILS" in out


def test_a_record_in_another_runs_place(tmp_path):
    folder = write_suite(tmp_path / "small")
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        content = (folder / "random-art_painting-cartoon-s1" / name).read_bytes()
        (folder / "random-art_painting-cartoon-s0" / name).write_bytes(content)
    result = audited(folder)
    assert [(r.rule, r.where, r.what) for r in result.failures] == [
        ("record", "random-art_painting-cartoon-s0", "seed is 1; suite.json has 0")
    ]


def test_what_is_no_record_fails_nothing(tmp_path):
    """An unfinished, cut or foreign record is in no table: it is set aside, not a failure."""
    folder = write_suite(tmp_path / "small")
    (folder / "da-art_painting-cartoon-s0" / "summary.json").unlink()
    cut = folder / "da-art_painting-cartoon-s1" / "summary.json"
    cut.write_text(cut.read_text()[:400])

    def older(config, rows, summary):
        summary["record_version"] = 0

    seal_again(folder / "da-art_painting-cartoon-s2", older)
    study = read_study(folder)
    kinds = {problem.name[-2:]: problem.kind for problem in study.problems}
    assert kinds == {"s0": "unfinished", "s1": "half-written", "s2": "another version"}
    assert audit.audit(study).passes
    text = "\n".join(audit.lines(study, audit.audit(study)))
    assert "set aside  half-written: da-art_painting-cartoon-s1" in text


def test_hooks_that_fired_too_often(tmp_path):
    """record.py takes any multiple of the passes, for a module may be called several times."""
    folder = write_suite(tmp_path / "small")

    def twice(config, rows, summary):
        for row in rows:
            row["fired"] = {name: 2 * times for name, times in row["fired"].items()}
        summary["fired"] = {name: 2 * times for name, times in summary["fired"].items()}

    seal_again(folder / "da-art_painting-cartoon-s0", twice)
    assert record.check(folder / "da-art_painting-cartoon-s0") == []
    result = audited(folder)
    assert failed(result) == {"hooks"}
    assert "layer1.1.conv1 was shaped 32 times in 16 passes of 1 call" in result.failures[0].what


def test_hooks_on_other_layers_than_the_switches_name(tmp_path):
    folder = write_suite(tmp_path / "small")

    def other(config, rows, summary):
        for part in (*rows, summary):
            for key in ("fired", "density"):
                part[key] = {"layer4.1.conv2": part[key].pop("layer1.1.conv1")}
        summary["layer_names"] = ["layer4.1.conv2"]

    seal_again(folder / "da-art_painting-cartoon-s0", other)
    result = audited(folder)
    assert failed(result) == {"hooks"}
    assert result.failures[0].what == "shaped layer4.1.conv2; the switches name layer1.1.conv1"


@pytest.mark.parametrize(
    "switches, expected",
    [
        ({"layers": [1, 8, 20]}, ["conv1", "layer2.0.downsample.0", "layer4.1.conv2"]),
        (
            {"layers": "all", "every": 6},
            ["layer2.0.conv1", "layer3.0.conv2", "layer4.0.downsample.0"],
        ),
        ({"layers": 2, "after": "relu"}, ["layer1.0.relu"]),
        ({"layers": "layer1.?.bn1", "after": "bn"}, ["layer1.0.bn1", "layer1.1.bn1"]),
        ({"layers": "layer2.1.conv2"}, ["layer2.1.conv2"]),
    ],
)
def test_the_layers_that_switches_name(tmp_path, switches, expected):
    """By hand, and by the code that shapes them, which the made records ask."""
    said = {"mode": "random", "p_zero": 0.5, "data": "PACS", "epochs": 1, "limit": 20}
    config, _ = resolve(said | {"preset": "course-template", "device": "cpu"} | switches)
    run = read_run(write_run(tmp_path / "run", config))
    assert audit.layers_of(run) == expected == list(run.layers)
    assert list(audit.hooks(run)) == []


def untested_class(config, rows):
    """The target's first class was not tested: 389 of the 2344 images of cartoon."""
    for row in rows:
        row["target_confusion"][0] = [0] * 7
        correct = sum(counts[i] for i, counts in enumerate(row["target_confusion"]))
        row |= {"target_correct": correct, "target_total": 2344 - 389}
        row["target_accuracy"] = record.percent(correct, 2344 - 389)


def of_rows(**values):
    return lambda config, rows: [row.update(values) for row in rows]


BROKEN = [
    (
        "da",
        untested_class,
        {"k of n"},
        r"epoch 1: tested on \[0, .* images of the classes; cartoon",
    ),
    ("da", of_rows(bn_untouched=False), {"BatchNorm"}, "bn_untouched is False, not True"),
    ("da", of_rows(bn_untouched=None), {"BatchNorm"}, "bn_untouched is None, not True"),
    ("baseline", of_rows(bn_untouched=True), {"BatchNorm"}, "bn_untouched is True, not None"),
    ("da", lambda c, rows: rows.pop(), {"length"}, "metrics.jsonl has 2 epochs; 48 updates take 3"),
    ("da", of_rows(passes=32), {"length", "hooks"}, "passes is 32, not 16"),
    ("da", of_rows(fired={"layer1.1.conv1": 15}), {"hooks"}, "fired 15 times in 16 passes"),
    (
        "da",
        of_rows(source_train_total=4392, source_train_correct=1098, source_train_accuracy=25.0),
        {"labels"},
        "source_train_total is 4392, not 2048",
    ),
    ("da", lambda c, _: c.update(mask_sources=["cartoon"]), {"labels"}, "mask_sources has cartoon"),
    ("da", lambda c, _: c.update(holdout=0.1), {"labels"}, "0 images are held out, but holdout is"),
]


@pytest.mark.parametrize("mode, harm, rules, words", BROKEN)
def test_an_honest_record_of_a_faulty_run(tmp_path, mode, harm, rules, words, capsys):
    """Sealed, and all in it follows from its rows: not edited, in no table, and the rule is named."""
    folder = write_suite(tmp_path / "small")
    name = f"{mode}-art_painting-cartoon-s0"
    config, rows, summary = record.read(folder / name)
    harm(config, rows)
    about = summary["layer_names"], summary["weights"]["sha256"], summary["versions"]
    write(folder / name, config, rows, *about)
    study = read_study(folder)
    (problem,) = study.problems
    assert problem.kind == "broken rule" and problem.fails
    assert name not in study.runs and name in study.missing
    result = audit.audit(study)
    assert failed(result) == rules and {r.where for r in result.failures} == {name}
    assert any(re.search(words, r.what) for r in result.failures)
    assert {result.checked[rule] for rule in ("record", "k of n", "hooks", "BatchNorm")} == {18}
    assert audit.main([str(folder)]) == 1
    assert "edited" not in capsys.readouterr().out.replace("unedited", "")
    assert record.check(folder / name)  # for suite.py and run.py it is no whole record


# --- several records --------------------------------------------------------------------------


def test_an_arm_whose_runs_differ(tmp_path):
    folder = write_suite(tmp_path / "small")
    config, _ = resolve({"preset": "course-template", "mode": "da", "layers": 4, "epochs": 3,
                         "data": "PACS", "target": "cartoon", "momentum": 0.8, "device": "cpu",
                         "seed": 2})  # fmt: skip
    write_run(folder / "da-art_painting-cartoon-s2", config)
    result = audited(folder)
    assert failed(result) == {"arms", "confounds"}
    assert "momentum 0.9 -> 0.8" in result.failures[0].what
    assert result.failures[-1].what == "momentum 0.9 -> 0.8 (in 1 of 6 pairs of runs)"


def test_a_difference_that_no_arm_states(tmp_path):
    """Preset report-b runs target maps at batch 256, which nobody who reads the arms would know."""
    folder = write_suite(tmp_path / "small", changed("defaults", preset="report-b"))
    result = audited(folder)
    assert failed(result) == {"confounds", "updates"}
    what = {(r.rule, r.what) for r in result.failures}
    assert what == {("confounds", "batch_size 128 -> 256"), ("updates", "updates 48 -> 24")}
    assert all(r.where == "shaping: da and baseline" for r in result.failures)


def test_a_difference_that_an_arm_states_is_named_and_passes(tmp_path):
    text = changed("defaults", epochs=None, updates=32)
    content = yaml.safe_load(text)
    content["tables"]["shaping"]["arms"]["da"]["batch_size"] = 64
    result = audited(write_suite(tmp_path / "small", yaml.safe_dump(content)))
    assert result.passes
    assert [(r.rule, r.what) for r in result.remarks] == [("confounds", "batch_size 128 -> 64")]


def test_a_stated_batch_size_does_not_excuse_unequal_updates(tmp_path):
    text = changed("tables.shaping.arms.da", batch_size=64)
    result = audited(write_suite(tmp_path / "small", text))
    assert failed(result) == {"updates"}


def test_other_weights_and_other_versions(tmp_path):
    folder = write_suite(tmp_path / "small")
    for run in [path for path in folder.iterdir() if path.name.startswith("da-")]:
        config, rows, summary = record.read(run)

        def other(config, rows, summary):
            summary["weights"]["sha256"] = "cd" * 32
            summary["versions"]["torch"] = "9.9"

        seal_again(run, other)
    result = audited(folder)
    assert failed(result) == {"weights"}
    assert [r.what for r in result.remarks if r.rule == "code"][0].endswith("-> 9.9")


def other_machine(config, rows, summary):
    summary["weights"]["sha256"] = "cd" * 32
    summary["versions"] |= {"commit": "c0ffee", "device": "another"}


def test_other_weights_of_one_run_alone(tmp_path):
    """The first runs of both arms are alike."""
    folder = write_suite(tmp_path / "small")
    seal_again(folder / "da-art_painting-sketch-s1", other_machine)
    result = audited(folder)
    assert failed(result) == {"arms", "weights"}
    what = {(r.rule, r.where): r.what for r in result.failures}
    assert what["weights", "shaping: da and baseline"] == (
        f"weights sha256 {'ab' * 6} -> {'cd' * 6} (in 1 of 6 pairs of runs)"
    )
    assert what["arms", "da"] == (
        "da-art_painting-cartoon-s0 and da-art_painting-sketch-s1: "
        f"weights sha256 {'ab' * 6} -> {'cd' * 6}"
    )
    notes = {(r.rule, r.what) for r in result.remarks if not r.fails}
    assert ("code", "device cpu -> another (in 1 of 6 pairs of runs)") in notes
    assert ("arms", "device cpu in 5, another in 1 of 6 runs") in notes


def test_one_seed_of_every_arm_with_other_weights(tmp_path, capsys):
    """Each pair of runs may be compared, but a mean over the seeds is of nothing."""
    folder = write_suite(tmp_path / "small")
    for run in folder.glob("*-s1"):
        seal_again(run, other_machine)
    result = audited(folder)
    assert failed(result) == {"arms"}
    assert {r.where for r in result.failures} == {"baseline", "random", "da"}
    assert audit.main([str(folder)]) == 1
    assert "note: random: device cpu in 4, another in 2 of 6 runs" in capsys.readouterr().out


def test_updates_are_the_same_within_an_arm_for_one_source(tmp_path):
    """By epochs, a source of more images has more updates."""
    text = SMALL.replace("sources: [art_painting]", "sources: [art_painting, photo]")
    study = read_study(write_suite(tmp_path / "small", text))
    assert len({r.summary["updates"] for r in study.runs.values()}) == 2
    assert audit.audit(study).passes
    arm = next(arm for arm in study.tables[0].arms if arm.name == "da")
    key = ("photo", "sketch", 2)
    fewer = replace(arm.runs[key], summary=dict(arm.runs[key].summary, updates=7))
    found = list(audit.uniform(replace(arm, runs={**arm.runs, key: fewer})))
    assert [(r.fails, r.what) for r in found] == [
        (True, "da-photo-cartoon-s0 and da-photo-sketch-s2: updates 42 -> 7")
    ]


def test_a_recalibrated_arm_is_confounded_with_a_plain_baseline(tmp_path):
    """Preset fastshape measures BatchNorm anew for the shaped arms: no fault, but to be known."""
    text = changed("defaults", preset="fastshape")
    content = yaml.safe_load(text)
    content["tables"]["shaping"]["arms"]["recal"] = {"mode": "baseline", "bn_recalibration": True}
    result = audited(write_suite(tmp_path / "small", yaml.safe_dump(content)))
    assert result.passes
    assert {(r.where, r.what) for r in result.remarks} == {
        (f"shaping: {arm} and baseline", "bn_recalibration False -> True")
        for arm in ("random", "da")
    }


def test_without_a_suite_every_difference_is_named(tmp_path):
    """Nobody planned these comparisons, so none is a failure."""
    folder = write_suite(tmp_path / "small", changed("defaults", preset="report-b"))
    (folder / "suite.json").unlink()
    result = audited(folder)
    assert result.passes
    assert {r.what for r in result.remarks} >= {"batch_size 128 -> 256", "updates 48 -> 24"}


WRONG_TYPES = [
    ("tables.0.name", 1, "suite.json: tables 1: name: 1"),
    ("tables.0.note", {"a": "b"}, "suite.json: tables 1: note: {'a': 'b'}"),
    ("tables.0.title", [1, 2], "suite.json: tables 1: title: [1, 2]"),
    ("tables.0.published", [3], "suite.json: tables 1: published 1: 3"),
    ("tables.0.baseline", ["b"], "suite.json: tables 1: baseline: ['b']"),
    ("tables.0.arms.1.runs.0.seed", "0", "suite.json: tables 1: arms 2: runs 1: seed: '0'"),
    ("tables", None, "not as suite.py writes it"),
    ("title", None, "suite.json: title: None"),
    ("runs.da-art_painting-cartoon-s0", 3, "suite.json: runs: da-art_painting-cartoon-s0: 3"),
]


@pytest.mark.parametrize("path, value, words", WRONG_TYPES)
def test_a_suite_json_of_wrong_types_is_refused_by_place(
    whole, tmp_path, path, value, words, capsys
):
    index = place = record.read_json(whole / "suite.json")
    *first, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in first:
        place = place[key]
    place[last] = value
    record.write_json(tmp_path / "suite.json", index)
    assert audit.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"], ["nowhere"]])
def test_bad_input(arguments, capsys):
    assert audit.main(arguments) == 2
    assert capsys.readouterr().err


def test_an_empty_folder_and_a_foreign_index(tmp_path, capsys):
    assert audit.main([str(tmp_path)]) == 2
    assert "holds neither suite.json nor the record of a run" in capsys.readouterr().err
    for text, words in (('{"format": 99}', "has format 99"), ("{", "half-written"),
                        ('{"format": 1}', "not as suite.py writes it"), ("[]", "not as suite.py")):  # fmt: skip
        (tmp_path / "suite.json").write_text(text)
        assert audit.main([str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


# --- a page of them ---------------------------------------------------------------------------


def test_a_page_names_what_cannot_be_read(tmp_path):
    """Broken pictures and a row with NaN: the page is made, says so, and shows the rest."""
    folder = write_suite(tmp_path / "small")
    pictures = [folder / f"da-art_painting-cartoon-s{seed}" / "maps.png" for seed in range(3)]
    pictures[0].mkdir()
    pictures[1].write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.linear_gradient("L").save(pictures[2])
    broken = folder / "da-art_painting-sketch-s0" / "metrics.jsonl"
    broken.write_text(re.sub(r'"train_loss": [\d.]+', '"train_loss": NaN', broken.read_text()))
    assert report.main([str(folder)]) == audit.FAILED
    text = (folder / "report.html").read_text()
    for picture in pictures[:2]:
        assert f"{picture.parent.name}: maps.png cannot be read as a picture." in text
    assert text.count("data:image/png") == 1
    assert "Maps of da-art_painting-cartoon-s2" in text
    assert "da-art_painting-sketch-s0: edited: cannot be computed again: ValueError" in text
