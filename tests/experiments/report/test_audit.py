"""The audit finds what a record or a comparison must not be; each rule by a study that breaks it."""

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from domainshift import files
from domainshift.config import preset
from domainshift.models import output_shapes
from domainshift.records import results, validate
from domainshift.records.schema import EVALUATIONS, METRICS, TrainingRecord
from domainshift.report import audit, command, published
from domainshift.report.comparisons import matchups
from domainshift.report.study import read_study
from domainshift.report.switches import VARIED, departures
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
            part["density"]["layer4.1.conv2"] = 0.5
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


OTHER_WEIGHTS = "f37072fd" + "cd" * 28  # torchvision's file is known by its first 8 digits alone


def other_machine(training, rows, tests):
    training["weights"]["sha256"] = OTHER_WEIGHTS
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
        training["weights"]["sha256"] = OTHER_WEIGHTS
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
        f"weights sha256 {before} -> {OTHER_WEIGHTS[:12]} (in 1 of 6 pairs of results)"
    )
    assert what["arms", "da"] == (
        f"{first.name}/cartoon and {run.name}/sketch: weights sha256 {before} -> {OTHER_WEIGHTS[:12]}"
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


def exchange_images(folder, those):
    """Other pixels of sketch in some trainings, all else being right."""
    index = files.read_json(folder / "suite.json")

    def change(training, rows, tests):
        for read in [*training["domains"].items(), *((t["domain"], t) for t in tests.values())]:
            if read[0] == "sketch":
                read[1]["digest"] = "ef" * 32
        record = TrainingRecord.model_validate(training)
        training["key"] = validate.key_of(record, validate.config_of(record))

    for name in filter(those, index["trainings"]):
        seal_again(folder / name, change)
        index["trainings"][name]["key"] = files.read_json(folder / name / "training.json")["key"]
    files.write_json(folder / "suite.json", index)


def test_other_images_of_an_arm_are_named(folder):
    """In all runs of one arm: every arm is uniform, and no pair of arms may be compared."""
    exchange_images(folder, lambda name: name.startswith("random"))
    result = audited(folder)
    (remark,) = result.failures
    assert (remark.rule, remark.where) == ("data", "shaping: random and baseline")
    assert re.fullmatch(
        rf"sketch \w{{12}} -> {'ef' * 6} \(in 3 of 6 pairs of results\)", remark.what
    )
    assert result.confounds["shaping: random and baseline"] == [remark.what]


def test_other_images_of_one_run_are_named(folder):
    run = training(folder, "da", "sketch", 1).name
    exchange_images(folder, lambda name: name == run)
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


# --- what passed and must not -----------------------------------------------------------------


def each_row(**values):
    """Other values in all epochs, and in the record of the training as far as it has them."""

    def change(training, rows, tests):
        for part in (*rows, training):
            part.update({n: v for n, v in values.items() if n in part})

    return change


@pytest.mark.parametrize("density", [1.0, 0.0, 0.51, 0.5 + 1e-9])
def test_random_maps_that_were_never_applied(folder, density):
    """p_zero 0.5: a density of 1, one that chance does not give, and one of half an element."""
    run = training(folder, "random")
    seal_again(run, each_row(density={"layer2.1.conv2": density}))
    result = audited(folder)
    assert failed(result) == {"maps"}
    assert "epoch 1: the map after layer2.1.conv2 has density" in result.failures[0].what


def test_recorded_maps_that_were_never_applied(folder):
    seal_again(training(folder, "da"), each_row(density={"layer1.1.conv1": 1.0}))
    result = audited(folder)
    assert failed(result) == {"maps"}
    assert "1 means that no map was applied" in result.failures[0].what


def test_a_network_that_collapsed_passes_with_a_remark(folder):
    """Zeros before a convolution are zeros behind it: a sound record may have density 0 there."""
    run = training(folder, "da")
    seal_again(run, each_row(density={"layer1.1.conv1": 0.0}))
    result = audited(folder)
    assert result.passes
    (remark,) = result.remarks
    assert remark.text == (
        f"{run.name}: the recorded map after layer1.1.conv1 passed nothing on in 3 epochs, first in "
        "epoch 1"
    )


@pytest.mark.parametrize("rates", [[1e-3, 1e-3, 1e-3], [7.0, 7.0, 7.0]])
def test_a_learning_rate_that_never_dropped_or_is_another(folder, rates):
    def change(training, rows, tests):
        for row, rate in zip(rows, rates, strict=True):
            row["lr"] = rate

    seal_again(training(folder, "da"), change)
    result = audited(folder)
    assert failed(result) == {"rates"}
    assert re.search(r"epoch \d: lr is \S+; the switches give", result.failures[0].what)


def epochs_of(run):
    return files.read_json_lines(run / METRICS)


def take_epochs(other, **own):
    """The epochs of another training, with a few fields of one's own."""

    def change(training, rows, tests):
        for row, taken in zip(rows, epochs_of(other), strict=True):
            row.update(taken | own)
        training["train_loss"] = rows[-1]["train_loss"]
        training["run"] = rows[-1]["run"]

    return change


def test_epochs_of_another_seed(folder):
    zero, one = (training(folder, "random", seed=seed) for seed in (0, 1))
    seal_again(one, take_epochs(zero, run="a run of its own"))
    result = audited(folder)
    assert failed(result) == {"copies"}
    assert result.failures[0].what == (
        f"seed 1, source art_painting: losses in every epoch equal to {zero.name}, which has seed 0, "
        "source art_painting"
    )


def test_a_run_that_is_two_trainings(folder):
    zero, one = (training(folder, "random", seed=seed) for seed in (0, 1))
    (run,) = {row["run"] for row in epochs_of(zero)}
    seal_again(one, each_row(run=run))
    result = audited(folder)
    assert failed(result) == {"copies"}
    assert result.failures[0].what == f"run {run[:8]} is also that of {zero.name}"


def test_predictions_and_weights_of_another_seed(folder):
    zero, one = (training(folder, "random", seed=seed) for seed in (0, 1))

    def change(training, rows, tests):
        training["weights_digest"] = files.read_json(zero / "training.json")["weights_digest"]
        for name, test in tests.items():
            digest = training["weights_digest"]
            test.update(files.read_json(zero / EVALUATIONS / f"{name}.json"))
            test.update(weights_digest=digest, training=training["key"])

    for path in (zero / EVALUATIONS).glob("*.npz"):
        shutil.copy(path, one / EVALUATIONS)
    seal_again(one, change)
    result = audited(folder)
    assert failed(result) == {"copies"}
    words = " ".join(r.what for r in result.failures)
    assert "weights_digest equal to" in words and "predictions equal to" in words


def test_arms_that_are_truly_equal_pass_and_are_named(tmp_path):
    """Of one seed, and set apart by a switch without effect."""
    text = changed("tables.shaping.arms.da", mode="random", layers=[10], gradient="clipped")
    folder = write_suite(tmp_path / "small", text)
    for seed in range(3):
        (run,) = {row["run"] for row in epochs_of(training(folder, "da", seed=seed))}
        other = training(folder, "random", seed=seed)
        seal_again(training(folder, "da", seed=seed), take_epochs(other, run=run))
    result = audited(folder)
    assert result.passes
    assert result.limits == [
        "da and random: equal losses in every epoch, to the bit, for 3 of their seeds and sources: what "
        "sets these arms apart did not change how the source was learned."
    ]


@pytest.mark.parametrize("commit, fails", [("c0" * 20, True), ("c0" * 20 + "-dirty", False)])
def test_equal_trainings_with_unequal_losses(folder, commit, fails):
    """Without a suite one key may be there twice. A dirty tree may have had another code."""
    (folder / "suite.json").unlink()
    run = training_of_mode(folder, "da")
    again = shutil.copytree(run, run.parent / "again")

    def of_commit(training, rows, tests):
        for part in (*rows, training, *tests.values()):
            part["versions"]["commit"] = commit

    def other_losses(training, rows, tests):
        of_commit(training, rows, tests)
        rows[0]["train_loss"] += 0.1

    seal_again(run, of_commit)
    seal_again(again, other_losses)
    result = audited(folder)
    repeats = [r for r in result.remarks if r.rule == "repeats"]
    assert [r.fails for r in repeats] == [fails]
    assert "has the same key, versions and device, and other losses" in repeats[0].what


def training_of_mode(folder, mode):
    """The first training of a mode, where no suite.json names it."""
    paths = sorted(folder.glob("*/training.json"))
    return next(path.parent for path in paths if files.read_json(path)["mode"] == mode)


def test_a_holdout_that_is_short_of_images(tmp_path):
    text = changed("defaults", holdout=0.1)
    folder = write_suite(tmp_path / "small", text)
    run = training(folder, "da")

    def short(rows, tests):
        for name in tests:
            if "holdout" in name:
                tests[name] = [[max(0, n - 3) if n else 0 for n in row] for row in tests[name]]

    def fewer(training, rows, tests):
        training["held_out"] = [n - 3 for n in training["held_out"]]

    write_run(run, harm=short)
    seal_again(run, fewer)
    result = audited(folder)
    assert "labels" in failed(result)
    assert any("holds out [38, " in r.what for r in result.failures)


def test_imagenet_weights_of_another_hash(folder):
    def other(training, rows, tests):
        training["weights"]["sha256"] = "ab" * 32

    seal_again(training(folder, "da"), other)
    result = audited(folder)
    assert failed(result) == {"weights"}
    assert result.failures[0].what == (
        "weights.sha256 is abababababab; that of the imagenet weights of resnet18 begins with f37072fd"
    )


def of_versions(first_epoch=1, **values):
    """Another commit or device from an epoch on, and in what follows it."""

    def change(training, rows, tests):
        for part in (*rows[first_epoch - 1 :], training, *tests.values()):
            part["versions"].update(values)

    return change


def test_what_computed_the_figures_is_a_limit_where_it_is_not_one(folder):
    assert audited(folder).limits == []
    run = training(folder, "da")
    seal_again(run, of_versions(commit="ab" * 20 + "-dirty", device="a GPU", torch="9.9"))
    result = audited(folder)
    assert result.passes
    n, own = len(list(folder.glob("*/training.json"))), results.device_name("cpu")
    text = "\n".join(result.limits)
    commits = f"one commit: c0c0c0c0c0c0 in {n - 1}, abababababab-dirty in 1 of {n} trainings."
    assert f"Not all was computed with {commits}" in text
    assert f"one device: {own} in {n - 1}, a GPU in 1 of {n} trainings." in text
    assert "with one torch: " in text
    assert f"1 of {n} trainings ran with uncommitted changes" in text


def test_a_run_that_was_resumed_by_another_commit(folder):
    run = training(folder, "da")
    seal_again(run, of_versions(2, commit="ab" * 20))
    result = audited(folder)
    assert result.passes
    assert f"Resumed with other versions: {run.name} from epoch 2 on." in result.limits
    words = f"{run.name}: from epoch 2 on commit {'c0' * 20} -> {'ab' * 20}"
    assert words in [r.text for r in result.remarks]


def skipping(counts):
    def change(training, rows, tests):
        for row, n in zip(rows, counts, strict=True):
            row["skipped"] = n
        training["skipped"] = sum(counts)

    return change


@pytest.mark.parametrize(
    "amp, counts, words",
    [
        ("off", [1, 0, 0], "skipped is 1; only amp float16 skips updates, not off"),
        ("float16", [17, 0, 0], "skipped is 17; it must be from 0 to updates, 16"),
    ],
)
def test_skipped_updates_that_cannot_be(tmp_path, amp, counts, words):
    folder = write_suite(tmp_path / "small", changed("defaults", amp=amp))
    seal_again(training(folder, "da"), skipping(counts))
    result = audited(folder)
    assert failed(result) == {"steps"}
    assert words in result.failures[0].what


def test_skipped_updates_are_a_limit(tmp_path):
    folder = write_suite(tmp_path / "small", changed("defaults", amp="float16"))
    many, few = training(folder, "da"), training(folder, "random")
    seal_again(many, skipping([2, 1, 0]))  # of 48
    seal_again(few, skipping([2, 0, 0]))
    result = audited(folder)
    assert result.passes
    n = len(list(folder.glob("*/training.json")))
    assert result.limits == [
        f"float16 skipped 5 of {48 * n} updates ({100 * 5 / (48 * n):.2g} %), in 2 of {n} trainings.",
        f"Trainings that skipped more than 5 % of their updates: {many.name} 6.2 %.",
    ]


def test_places_never_fail_an_audit(folder):
    """Another folder, pipeline, layout or log: where it was computed, not what."""
    run = training(folder, "da")
    write_run(run, cache="/elsewhere", workers=3, memory_format="channels_last", log="tensorboard")
    index = files.read_json(folder / "suite.json")
    for planned in index["trainings"].values():
        planned["switches"]["cache"] = "/here"
    files.write_json(folder / "suite.json", index)
    result = audited(folder)
    assert result.passes and not result.remarks


# --- not the protocol -------------------------------------------------------------------------

REPORT_B = {"preset": "report-b", "target": "cartoon", "weights": "imagenet", "amp": "off"}
RANDOM = REPORT_B | {"mode": "random"}


@pytest.mark.parametrize(
    "switches, expected",
    [
        (RANDOM, []),
        (RANDOM | {"layers": [4], "p_zero": 0.2}, []),  # what the published rows vary
        (RANDOM | {"amp": "float16"}, []),
        (
            RANDOM | {"gradient": "straight_through"},
            ["gradient straight_through (protocol: zero)"],
        ),
        (RANDOM | {"at_eval": "off"}, ["at_eval off (protocol: on)"]),
        (RANDOM | {"bn_at_test": "source"}, ["bn_at_test source (protocol: trained)"]),
        (RANDOM | {"momentum": 0.5}, ["momentum 0.5 (protocol: 0.9)"]),
        (REPORT_B | {"mode": "da", "layers": [4]}, []),
        (
            REPORT_B | {"mode": "da", "layers": [4], "pairing": "random"},
            ["pairing random (protocol: modulo)"],
        ),
        # this preset sets no switch of a method, and nobody published one under it
        (RANDOM | {"preset": "course-template", "gradient": "clipped"}, []),
        (REPORT_B | {"preset": "course-template", "mode": "adabn"}, []),
    ],
)
def test_every_switch_is_held_against_the_protocol(tmp_path, switches, expected):
    (name,) = write_run(tmp_path / "run", **switches)
    assert departures(validate.read_result(tmp_path / "run", name)) == expected


def test_the_protocol_of_another_report(tmp_path):
    """A straight-through run of the common preset is not what report B's 61.63 is of."""
    switches = RANDOM | {"preset": "course-template", "layers": [1], "p_zero": 0.7}
    (name,) = write_run(tmp_path / "run", **switches)
    result = validate.read_result(tmp_path / "run", name)
    assert departures(result, protocol="report-b") == [
        "gradient straight_through (protocol: zero)",
        "at_eval off (protocol: on)",
    ]


def test_published_rows_of_one_protocol_vary_what_is_left_out():
    rows = [row for row in published.rows() if row["method"] == "random"]
    for source in ("report-A", "report-B"):
        own = [row for row in rows if row["source"] == source]
        assert len({row["layers"] for row in own}) > 1 and len({row["p_zero"] for row in own}) > 1
    assert set(VARIED) == {"layers", "after", "every", "p_zero"}
    methods = {row["method"].lower() for row in published.rows()} - {"baseline"}
    assert methods == set(preset("report-b")["modes"])
