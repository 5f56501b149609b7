"""The audit finds what a record or a comparison must not be; each rule by a study that breaks it."""

import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import yaml
from domainshift import files
from domainshift.models import output_shapes
from domainshift.records import results
from domainshift.records.schema import EVALUATIONS, METRICS
from domainshift.report import audit, command
from domainshift.report.comparisons import matchups
from domainshift.report.study import read_study
from made_records import SMALL, find_cell, seal_again, write_run, write_suite
from PIL import Image


def audited(folder):
    study = read_study(folder)
    return audit.audit(study, {table.name: matchups(table) for table in study.tables})


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


@pytest.fixture
def folder(whole, tmp_path):
    """A folder of one's own to break something in."""
    return shutil.copytree(whole, tmp_path / "small")


def training(folder, arm, target="cartoon", seed=0):
    return folder / find_cell(folder, arm, target, seed).training


def test_a_sound_study_passes(whole, capsys):
    result = audited(whole)
    assert result.passes and not result.remarks
    assert result.checked["record"] == result.checked["hooks"] == 18
    assert result.checked["updates"] == 2  # random and da with the baseline
    assert command.main([str(whole), "--audit-only"]) == 0
    assert "18 records; the audit passes" in capsys.readouterr().out
    assert not (whole / "report.html").exists()


# --- a record ---------------------------------------------------------------------------------


def test_an_edited_record_is_named_and_the_audit_fails(folder, capsys):
    run = training(folder, "da", "sketch", 1)
    path = run / EVALUATIONS / "sketch.json"
    correct = files.read_json(path)["correct"]
    text = path.read_text()
    path.write_text(text.replace(f'"correct": {correct},', f'"correct": {correct + 9},', 1))
    result = audited(folder)
    assert failed(result) == {"record"}
    assert {remark.where for remark in result.failures} == {f"{run.name}/sketch"}
    assert result.checked["record"] == 18 and result.checked["hooks"] == 17
    assert command.main([str(folder), "--audit-only"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED: {run.name}/sketch: sketch.json: edited after the run" in out
    assert "the audit FAILS" in out


def test_predictions_that_were_exchanged(folder):
    one, other = (training(folder, "da", "sketch", seed) / EVALUATIONS for seed in (0, 1))
    shutil.copy(other / "sketch.npz", one / "sketch.npz")
    result = audited(folder)
    assert failed(result) == {"record"}
    assert "sketch.npz is not the file that the record names" in result.failures[0].what


def test_a_record_in_another_runs_place(folder):
    zero, one = (training(folder, "random", seed=seed) for seed in (0, 1))
    shutil.rmtree(zero)
    shutil.copytree(one, zero)
    result = audited(folder)
    assert failed(result) == {"record"}
    assert {r.where for r in result.failures} == {f"{zero.name}/cartoon", f"{zero.name}/sketch"}
    assert {r.what for r in result.failures} == {"seed is 1; suite.json has 0"}


def test_an_evaluation_of_another_training(folder):
    """Its weights are not those of the training beside it."""
    zero, one = (training(folder, "da", seed=seed) / EVALUATIONS for seed in (0, 1))
    for name in ("cartoon.json", "cartoon.npz", "cartoon-features.npz"):
        shutil.copy(one / name, zero / name)
    result = audited(folder)
    assert failed(result) == {"record"}
    assert any("weights_digest is" in r.what for r in result.failures)


def test_a_training_that_the_suite_did_not_plan(folder):
    """Everything the suite names is right, but the key is of other images, say."""
    index = files.read_json(folder / "suite.json")
    name = training(folder, "da").name
    index["trainings"][name]["key"] = "ab" * 32
    files.write_json(folder / "suite.json", index)
    (remark,) = audited(folder).failures
    assert (remark.rule, remark.where) == ("record", f"{name}/cartoon")
    assert remark.what.endswith("suite.json has abababababab")


def test_what_is_no_record_fails_nothing(folder):
    """An unfinished, cut or foreign record is in no table: it is set aside, not a failure."""
    (training(folder, "da", seed=0) / "training.json").unlink()
    cut = training(folder, "da", seed=1) / EVALUATIONS / "cartoon.json"
    cut.write_text(cut.read_text()[:400])
    seal_again(training(folder, "da", seed=2), lambda t, rows, tests: t.update(version=0))
    study = read_study(folder)
    assert [p.kind for p in study.problems] == ["unfinished", "half-written", "another version"]
    result = audited(folder)
    assert result.passes
    text = "\n".join(audit.lines(study, result))
    assert f"set aside  half-written: {training(folder, 'da', seed=1).name}/cartoon" in text


def of_rows(**values):
    return lambda rows, tests: [row.update(values) for row in rows]


def untested_class(rows, tests):
    """The first class of cartoon was not tested: 389 of its 2344 images."""
    tests["cartoon"][0] = [0] * 7


BROKEN = [
    ("da", untested_class, {"k of n"}, r"tested on \[0, .* images of the classes"),
    ("da", of_rows(bn_untouched=False), {"BatchNorm"}, "bn_untouched is False, not True"),
    ("da", of_rows(bn_untouched=None), {"BatchNorm"}, "bn_untouched is None, not True"),
    ("random", of_rows(bn_untouched=True), {"BatchNorm"}, "bn_untouched is True, not None"),
    ("da", lambda r, t: r.pop(), {"length"}, "metrics.jsonl has 2 epochs; 48 updates take 3"),
    ("da", of_rows(passes=32), {"length", "hooks"}, "passes is 32, not 16"),
    ("da", of_rows(fired={"layer1.1.conv1": 15}), {"hooks"}, "fired 15 times in 16 passes"),
    (
        "da",
        of_rows(source_train_total=4392, source_train_correct=1098),
        {"labels"},
        "source_train_total is 4392, not 2048",
    ),
]  # fmt: skip


@pytest.mark.parametrize("arm, harm, rules, words", BROKEN)
def test_an_honest_record_of_a_faulty_run(folder, arm, harm, rules, words, capsys):
    """Sealed, and all in it follows from its rows: not edited, in no table, and the rule is named."""
    run = training(folder, arm)
    write_run(run, harm=harm)
    names = {f"{run.name}/{test}" for test in ("cartoon", "sketch")
             if (run / EVALUATIONS / f"{test}.json").exists()}  # fmt: skip
    study = read_study(folder)
    broken = {problem.name for problem in study.problems}
    assert f"{run.name}/cartoon" in broken <= names
    assert all(p.kind == "broken rule" and p.fails for p in study.problems)
    assert not broken & study.results.keys() and broken == set(study.missing)
    result = audited(folder)
    assert failed(result) == rules and {r.where for r in result.failures} == broken
    assert any(re.search(words, r.what) for r in result.failures)
    assert {result.checked[rule] for rule in ("record", "k of n", "hooks", "BatchNorm")} == {18}
    assert command.main([str(folder), "--audit-only"]) == 1
    assert "edited" not in capsys.readouterr().out.replace("unedited", "")


def test_hooks_that_fired_too_often(folder):
    """A record by itself may have any multiple of the passes: a module may be called several times."""

    def twice(training, rows, tests):
        for part in (*rows, training):
            part["fired"] = {name: 2 * times for name, times in part["fired"].items()}

    seal_again(training(folder, "da"), twice)
    result = audited(folder)
    assert failed(result) == {"hooks"} and not read_study(folder).problems
    assert "layer1.1.conv1 was shaped 32 times in 16 passes of 1 call" in result.failures[0].what


def test_hooks_on_other_layers_than_the_switches_name(folder):
    def other(training, rows, tests):
        for part in (*rows, training):
            for key in ("fired", "density"):
                part[key] = {"layer4.1.conv2": part[key].pop("layer1.1.conv1")}
        training["layers"] = ["layer4.1.conv2"]

    seal_again(training(folder, "da"), other)
    result = audited(folder)
    assert [(r.rule, r.what) for r in result.failures] == [
        ("hooks", "shaped layer4.1.conv2; the switches name layer1.1.conv1")
    ]


def test_a_module_that_is_called_twice_is_shaped_twice(tmp_path):
    text = changed("tables.shaping.arms.random", layers=[2], after="relu")
    assert audited(write_suite(tmp_path / "small", text)).passes
    assert len(output_shapes("resnet18", 64)["layer1.0.relu"]) == 2
    assert len(output_shapes("resnet18", 64)["layer1.0.conv1"]) == 1


# --- several records --------------------------------------------------------------------------


def other_machine(training, rows, tests):
    training["weights"]["sha256"] = "cd" * 32
    training["versions"] |= {"commit": "c0ffee", "device": "another"}
    for row in rows:
        row["versions"] = training["versions"]


def test_an_arm_whose_runs_differ(folder):
    run = training(folder, "da", seed=2)
    write_run(run, momentum=0.8)
    index = files.read_json(folder / "suite.json")  # as if the suite had planned it
    index["trainings"][run.name]["key"] = files.read_json(run / "training.json")["key"]
    files.write_json(folder / "suite.json", index)
    result = audited(folder)
    assert failed(result) == {"arms", "confounds"}
    assert "momentum 0.9 -> 0.8" in result.failures[0].what
    assert result.failures[-1].what == "momentum 0.9 -> 0.8 (in 1 of 6 pairs of results)"


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
    assert failed(audited(write_suite(tmp_path / "small", text))) == {"updates"}


def test_other_weights_and_other_versions(folder):
    def other(training, rows, tests):
        training["weights"]["sha256"] = "cd" * 32
        training["versions"]["torch"] = rows[-1]["versions"]["torch"] = "9.9"

    for target in ("cartoon", "sketch"):
        for seed in range(3):
            seal_again(training(folder, "da", target, seed), other)
    result = audited(folder)
    assert failed(result) == {"weights"}
    assert [r.what for r in result.remarks if r.rule == "code"][0].endswith("-> 9.9")


def test_other_weights_of_one_run_alone(folder):
    """The first runs of both arms are alike."""
    first, run = training(folder, "da", "cartoon", 0), training(folder, "da", "sketch", 1)
    seal_again(run, other_machine)
    result = audited(folder)
    assert failed(result) == {"arms", "weights"}
    what = {(r.rule, r.where): r.what for r in result.failures}
    before = files.read_json(first / "training.json")["weights"]["sha256"][:12]
    assert what["weights", "shaping: da and baseline"] == (
        f"weights sha256 {before} -> {'cd' * 6} (in 1 of 6 pairs of results)"
    )
    assert what["arms", "da"] == (
        f"{first.name}/cartoon and {run.name}/sketch: weights sha256 {before} -> {'cd' * 6}"
    )
    notes = {(r.rule, r.what) for r in result.remarks if not r.fails}
    own = results.device_name("cpu")
    assert ("code", f"device {own} -> another (in 1 of 6 pairs of results)") in notes
    assert ("arms", f"device {own} in 5, another in 1 of 6 results") in notes


def test_one_seed_of_every_arm_with_other_weights(folder, capsys):
    """Each pair of runs may be compared, but a mean over the seeds is of nothing."""
    runs = {training(folder, arm, t, 1) for arm in ("baseline", "random", "da")
            for t in ("cartoon", "sketch")}  # fmt: skip
    for run in runs:
        seal_again(run, other_machine)
    result = audited(folder)
    assert failed(result) == {"arms"}
    assert {r.where for r in result.failures} == {"baseline", "random", "da"}
    assert command.main([str(folder), "--audit-only"]) == 1
    own = results.device_name("cpu")
    assert f"note: random: device {own} in 4, another in 2 of 6" in capsys.readouterr().out


def exchange_images(folder, monkeypatch, those):
    """Other pixels of sketch in some trainings, all else being right."""
    monkeypatch.setattr("domainshift.records.validate.hash_of", lambda _: "ab" * 32)
    index = files.read_json(folder / "suite.json")

    def change(training, rows, tests, exchange):
        training["key"] = "ab" * 32
        for read in [*training["domains"].items(), *((t["domain"], t) for t in tests.values())]:
            if exchange and read[0] == "sketch":
                read[1]["digest"] = "ef" * 32

    for name, planned in index["trainings"].items():
        planned["key"] = "ab" * 32
        seal_again(folder / name, partial(change, exchange=those(name)))
    files.write_json(folder / "suite.json", index)


def test_other_images_of_an_arm_are_named(folder, monkeypatch):
    """In all runs of one arm: every arm is uniform, and no pair of arms may be compared."""
    exchange_images(folder, monkeypatch, lambda name: name.startswith("random"))
    result = audited(folder)
    (remark,) = result.failures
    assert (remark.rule, remark.where) == ("data", "shaping: random and baseline")
    assert re.fullmatch(
        rf"sketch \w{{12}} -> {'ef' * 6} \(in 3 of 6 pairs of results\)", remark.what
    )
    assert result.confounds["shaping: random and baseline"] == [remark.what]


def test_other_images_of_one_run_are_named(folder, monkeypatch):
    run = training(folder, "da", "sketch", 1).name
    exchange_images(folder, monkeypatch, lambda name: name == run)
    result = audited(folder)
    assert {r.where for r in result.failures} == {"da", "shaping: da and baseline"}
    assert failed(result) == {"data"}


def test_updates_are_the_same_within_an_arm_for_one_source(tmp_path):
    """By epochs, a source of more images has more updates."""
    text = SMALL.replace("sources: [art_painting]", "sources: [art_painting, photo]")
    folder = write_suite(tmp_path / "small", text)
    study = read_study(folder)
    assert len({r.training.updates for r in study.results.values()}) == 2
    assert audited(folder).passes
    arm = next(arm for arm in study.tables[0].arms if arm.name == "da")
    key = ("photo", "sketch", 2)
    one = arm.results[key]
    fewer = replace(one, training=one.training.model_copy(update={"updates": 7}))
    remarks = list(audit.uniform(replace(arm, results={**arm.results, key: fewer})))
    first = arm.results["photo", "cartoon", 0]
    assert [(r.fails, r.what) for r in remarks] == [
        (True, f"{first.name} and {one.name}: updates 42 -> 7")
    ]


def test_an_arm_with_other_statistics_at_test_is_confounded_with_a_plain_baseline(tmp_path):
    """No fault, but to be known."""
    content = yaml.safe_load(SMALL)
    arms = content["tables"]["shaping"]["arms"]
    for arm in ("random", "da"):
        arms[arm]["bn_at_test"] = "source"
    arms["recal"] = {"mode": "baseline", "bn_at_test": "source"}
    result = audited(write_suite(tmp_path / "small", yaml.safe_dump(content)))
    assert result.passes
    assert {(r.where, r.what) for r in result.remarks} == {
        (f"shaping: {arm} and baseline", "bn_at_test trained -> source") for arm in ("random", "da")
    }


def test_without_a_suite_every_difference_is_named(tmp_path):
    """Nobody planned these comparisons, so none is a failure."""
    folder = write_suite(tmp_path / "small", changed("defaults", preset="report-b"))
    (folder / "suite.json").unlink()
    result = audited(folder)
    assert result.passes
    assert {r.what for r in result.remarks} >= {"batch_size 128 -> 256", "updates 48 -> 24"}


# --- a page of them ---------------------------------------------------------------------------


def test_a_page_names_what_cannot_be_read(folder):
    """Broken pictures and a row with NaN: the page is made, says so, and shows the rest."""
    pictures = [training(folder, "da", seed=seed) / "maps.png" for seed in range(3)]
    pictures[0].mkdir()
    pictures[1].write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.linear_gradient("L").save(pictures[2])
    broken = training(folder, "da", "sketch", 0) / METRICS
    broken.write_text(re.sub(r'"train_loss": [\d.]+', '"train_loss": NaN', broken.read_text()))
    assert command.main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    for picture in pictures[:2]:
        assert f"{picture.parent.name}: maps.png cannot be read as a picture." in text
    assert text.count("data:image/png") == 1
    assert f"Maps of {pictures[2].parent.name}" in text
    assert f"{broken.parent.name}/sketch: half-written: metrics.jsonl: line 1 is no epoch" in text
