"""A whole run: what it leaves, prints and refuses."""

import io
import json
import os
import shutil
import sys
import types
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from domainshift import files
from domainshift.config import Test
from domainshift.errors import ConfigError, NonFiniteError
from domainshift.lease import Lost, holder, owner_of, path_of, take
from domainshift.methods import Method
from domainshift.progress import Screen
from domainshift.records import results
from domainshift.records.schema import CHECKPOINT, CONFIG, METRICS, SUMMARY, TRAINING
from domainshift.records.validate import check
from domainshift.setup import set_up
from domainshift.training import loop as training_loop
from domainshift.training import run as training_run
from domainshift.training.curve_log import curve_log
from domainshift.training.run import closing_lines, execute
from rich.console import Console
from tiny_runs import TINY, TOTAL, assert_same_training, rows_of, run, setup_of, untimed

TARGETS = ["sketch", "cartoon", "photo"]


class Lines(Screen):
    """A screen that keeps its lines."""

    def __init__(self):
        self.file = io.StringIO()
        super().__init__(Console(file=self.file, soft_wrap=True, highlight=False))

    @property
    def lines(self):
        return self.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A finished run of random maps with a held-out part, and what it printed."""
    screen = Lines()
    folder = tmp_path_factory.mktemp("shaped") / "r"
    run(folder, screen=screen, mode="random", layers=[1, 4], holdout=0.1)
    return folder, screen.lines


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A finished baseline with three targets."""
    return run(tmp_path_factory.mktemp("several") / "r", target=TARGETS, holdout=0.1, epochs=1)


# --- what a run leaves ---


def test_a_run_leaves_its_records(shaped):
    folder, _ = shaped
    tests = ["sketch-bn-source", "art_painting-holdout-bn-source"]
    assert {path.name for path in folder.iterdir()} == {
        *(CONFIG, METRICS, CHECKPOINT, TRAINING, SUMMARY, "evaluations", "curves.png", "maps.png")
    }
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        f"{test}{end}" for test in tests for end in (".json", ".npz", "-features.npz")
    }
    assert check(folder) == []
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    training = results.read_training(folder).record
    assert training.layers == ["conv1", "layer1.1.conv1"]
    assert training.held_out == [1] * 7  # at least one of each class
    summary = files.read_json(folder / SUMMARY)
    assert (summary["target"], summary["target_total"]) == ("sketch", TOTAL)
    assert summary["source_total"] == 7


def test_a_baseline_has_no_picture_of_maps(several):
    assert (several / "curves.png").exists() and not (several / "maps.png").exists()


def test_config_is_what_was_asked_for(shaped):
    folder, _ = shaped
    saved = files.read_yaml(folder / CONFIG)
    warnings, tests = saved.pop("warnings"), saved.pop("tests")
    config = setup_of(mode="random", layers=[1, 4], holdout=0.1).config
    assert saved == config.as_dict()
    assert warnings == results.read_training(folder).record.warnings
    assert tests == [test.model_dump() for test in config.tests()]


def test_the_recorded_configuration_runs_again_to_the_same_bits(shaped, tmp_path, no_pictures):
    folder, _ = shaped
    saved = files.read_yaml(folder / CONFIG)
    del saved["warnings"], saved["tests"]
    assert_same_training(run(tmp_path / "again", **saved), folder)


def test_rows_have_the_tests_that_evaluate_asks_for(tmp_path, no_pictures):
    rows = rows_of(run(tmp_path / "r", epochs=3, evaluate="2", holdout=0))
    assert [list(row["tests"]) for row in rows] == [[], ["sketch-bn-source"], ["sketch-bn-source"]]
    evaluation = results.read_evaluation(tmp_path / "r", "sketch-bn-source")
    last = rows[-1]["tests"]["sketch-bn-source"]
    assert last == {
        name: getattr(evaluation, name) for name in ("correct", "total", "loss", "batch_loss")
    }


def test_before_the_last_epoch_targets_are_tested_as_the_run_is(tmp_path, no_pictures):
    tests = [Test(domain="sketch", bn=bn) for bn in ("trained", "source", "target")]
    switches = {"evaluate": "each", "bn_at_test": "trained", "holdout": 0}
    rows = rows_of(run(tmp_path / "r", tests=tests, **switches))
    assert [list(row["tests"]) for row in rows] == [
        ["sketch"],
        ["sketch-bn-source", "sketch-bn-target", "sketch"],
    ]


# --- a folder that is there ---


def test_a_finished_run_is_left_alone(shaped, tmp_path):
    folder = shutil.copytree(shaped[0], tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    screen = Lines()
    run(folder, resume=True, screen=screen, mode="random", layers=[1, 4], holdout=0.1)
    assert any("is finished" in line for line in screen.lines)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_finished_run_says_what_was_edited(shaped, tmp_path):
    folder = shutil.copytree(shaped[0], tmp_path / "copy")
    record = files.read_json(folder / TRAINING)
    files.write_json(folder / TRAINING, record | {"train_loss": 0.0})
    screen = Lines()
    run(folder, resume=True, screen=screen, mode="random", layers=[1, 4], holdout=0.1)
    assert any("the seal does not fit" in line for line in screen.lines)


def test_new_tests_of_a_finished_training_only_evaluate(several, tmp_path, monkeypatch):
    folder = shutil.copytree(several, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    monkeypatch.setattr("domainshift.training.run.trained", None)
    switches = {"target": TARGETS, "holdout": 0.1, "epochs": 1}
    run(folder, resume=True, **switches | {"bn_at_test": "target"})
    added = {path.stem for path in folder.rglob("*.json") if path not in before}
    assert added == {*(f"{t}-bn-target" for t in TARGETS), "art_painting-holdout"}
    kept = {path: path.read_bytes() for path in before if path.name not in (CONFIG, SUMMARY)}
    assert all(before[path] == content for path, content in kept.items())
    assert check(folder) == []
    tests = [test["bn"] for test in files.read_yaml(folder / CONFIG)["tests"]]
    assert tests == ["source"] * 4 + ["target"] * 3 + ["trained"]


def test_an_edited_evaluation_is_made_again(several, tmp_path):
    folder = shutil.copytree(several, tmp_path / "copy")
    path = folder / "evaluations" / "cartoon-bn-source.json"
    before = path.read_bytes()
    files.write_json(path, json.loads(before) | {"correct": TOTAL})
    run(folder, resume=True, target=TARGETS, holdout=0.1, epochs=1)
    again = json.loads(path.read_text())
    times = {"seconds": 0, "seal": ""}
    assert again | times == json.loads(before) | times
    assert check(folder) == []


def test_an_existing_run_is_not_overwritten(several):
    before = {path: path.read_bytes() for path in several.rglob("*.*")}
    with pytest.raises(ConfigError, match="already holds files; go on with that run by --resume"):
        run(several, target=TARGETS, holdout=0.1, epochs=1)
    assert {path: path.read_bytes() for path in several.rglob("*.*")} == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(ConfigError, match="is a file; a folder is needed"):
        run(tmp_path / "r")


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_a_run_that_is_going_on_is_refused_at_once(tmp_path, monkeypatch, resume):
    monkeypatch.setattr(training_run, "domains_of", None)  # the first slow step
    refusal = f"out: '{tmp_path}' is in use by process {os.getpid()} on .*, for . s; wait for it"
    with take(tmp_path), pytest.raises(ConfigError, match=refusal):
        run(tmp_path, resume=resume)


def test_a_refused_run_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        assert holder(tmp_path / "a" / "r").process == os.getpid()
        raise ConfigError("too small")

    monkeypatch.setattr(training_run, "build", refuse)
    with pytest.raises(ConfigError, match="too small"):
        run(tmp_path / "a" / "r")
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_a_killed_one_left_its_lease(tmp_path, no_pictures):
    with take(tmp_path) as lease:
        owner = owner_of(lease.path)
    dead = json.dumps(asdict(owner) | {"process": 2**22 + 1})
    path_of(tmp_path, 1).write_text(dead)
    screen = Lines()
    run(tmp_path, epochs=1, screen=screen)
    assert any(line.endswith("that process is gone") for line in screen.lines)
    assert not list(tmp_path.glob(".lease*"))


@pytest.mark.parametrize("held", [True, False])
def test_what_a_kill_left_half_is_removed(tmp_path, no_pictures, held):
    """Whether the run takes the lease of its folder or a suite holds it."""
    half = tmp_path / ".checkpoint.pt.17.part"
    half.touch()
    setup = setup_of(epochs=1)
    with take(tmp_path) if held else nullcontext() as lease:
        execute(
            setup,
            tests=setup.config.tests(),
            folder=tmp_path,
            resume=True,
            screen=Lines(),
            token=lease and lease.token,
        )
    assert not half.exists() and len(rows_of(tmp_path)) == 1


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path, no_pictures, monkeypatch):
    """It slept for hours, say, and another one took its folder over."""
    write = training_loop.files.append_json_line

    def taken_over(path, row):
        write(path, row)
        path_of(tmp_path, 2).touch()

    monkeypatch.setattr(training_loop.files, "append_json_line", taken_over)
    with pytest.raises(
        Lost, match="did not touch its lease for 300 s. Nothing more is written here"
    ):
        run(tmp_path, epochs=3)
    assert len(rows_of(tmp_path)) == 1


def test_nothing_to_resume_starts_from_the_beginning(tmp_path, no_pictures):
    screen = Lines()
    run(tmp_path / "new", resume=True, epochs=1, screen=screen)
    assert any("no checkpoint" in line for line in screen.lines)
    assert len(rows_of(tmp_path / "new")) == 1


def test_another_target_is_another_training_of_a_method_that_uses_it(tmp_path, no_pictures):
    switches = {"mode": "da", "layers": [4], "epochs": 1}
    folder = run(tmp_path / "r", **switches, target=["sketch"])
    with pytest.raises(ConfigError, match=r"target: \['sketch'\] -> \['cartoon'\]"):
        run(folder, resume=True, **switches, target=["cartoon"])


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"batch_size": 20, "holdout": 0}, "one of 21 training images alone"),
        ({"weights": "gone.pth"}, "gone.pth"),
        ({"log": "wandb"}, "log: 'wandb' needs a package .*: pip install wandb"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, switches, message, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "r", **switches)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


# --- the screen ---


def test_each_warning_is_printed_once(shaped):
    folder, lines = shaped
    warnings = results.read_training(folder).record.warnings
    assert warnings
    printed = [line for line in [*lines, *closing_lines(folder)] if "warning" in line]
    assert printed == [f"warning: {warning}" for warning in warnings]
    assert not any("\x1b" in line for line in lines)  # no terminal here: no colours, no bars


def test_closing_lines_of_one_target(shaped):
    folder, _ = shaped
    lines = closing_lines(folder)
    summary = files.read_json(folder / SUMMARY)
    correct = summary["target_correct"]
    assert lines[0] == ("random: art_painting -> sketch, shaped layers: conv1, layer1.1.conv1")
    assert (
        lines[1].split()
        == (
            f"target accuracy {100 * correct / TOTAL:.2f} % ({correct} of {TOTAL}, epoch 2)"
        ).split()
    )
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        *("macro accuracy", "majority rate", "collapsed", "source accuracy", "time")
    ]
    assert lines[-1] == f"record: {folder}"


def test_closing_lines_of_several_targets(several):
    lines = closing_lines(several)
    for line, target in zip(lines[1:4], TARGETS, strict=True):
        record = results.read_evaluation(several, f"{target}-bn-source")
        assert line.startswith(f"{target}-bn-source")
        assert f"{record.accuracy:.2f} %  ({record.correct} of {TOTAL})" in line
    assert lines[-1] == f"record: {several}"


def test_report_as_mistake_is_shown_as_invalid(tmp_path, no_pictures):
    screen = Lines()
    folder = run(tmp_path / "r", test_set="source-train", epochs=1, screen=screen)
    assert any(line.startswith("warning: INVALID FIGURE") for line in screen.lines)
    assert any(line.startswith("INVALID FIGURE") for line in closing_lines(folder))
    summary = files.read_json(folder / SUMMARY)
    assert summary["invalid_test_total"] == results.read_training(folder).rows[0].source_train_total
    assert (summary["target"], summary["target_total"]) == ("sketch", TOTAL)


def test_the_run_says_where_a_baseline_is_tested_otherwise(tmp_path, no_pictures):
    usual, other, adabn = Lines(), Lines(), Lines()
    run(tmp_path / "a", epochs=1, screen=usual)
    run(tmp_path / "b", epochs=1, screen=other, bn_at_test="trained")
    run(tmp_path / "c", epochs=1, screen=adabn, mode="adabn")  # which differs on purpose
    assert not any("fair comparison" in line for line in [*usual.lines, *adabn.lines])
    assert sum("bn_at_test source, this run with trained" in line for line in other.lines) == 1


def test_a_pairing_that_lets_labels_in_is_a_warning_with_its_share(tmp_path, no_pictures):
    """Lists sorted by class and of one length: image i % n_target is of image i's class."""
    switches = {"mode": "da", "layers": [4], "epochs": 1, "holdout": 0}
    for name, more, count in (
        ("maps", {"pairing": "modulo"}, 1),
        ("no-maps", {"pairing": "modulo", "apply_maps": False, "record_mode": "train"}, 0),
        ("random", {}, 0),
    ):
        folder = run(tmp_path / name, **switches | more)
        warnings = results.read_training(folder).record.warnings
        warnings = [warning for warning in warnings if warning.startswith("pairing modulo")]
        assert len(warnings) == count
        for warning in warnings:
            assert "100 % of the images" in warning and "by chance it would be 14 %" in warning


def test_a_picture_that_fails_costs_no_result(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("domainshift.training.pictures.curves", fail)
    screen = Lines()
    folder = run(tmp_path / "r", epochs=1, screen=screen)
    assert (folder / SUMMARY).exists()
    assert "warning: a picture could not be drawn: no ink" in screen.lines


def test_missing_pictures_are_drawn_when_a_run_is_finished_up(shaped, tmp_path):
    """As after a kill between the last record and the pictures."""
    folder = shutil.copytree(shaped[0], tmp_path / "copy")
    for name in (SUMMARY, "maps.png"):
        (folder / name).unlink()
    run(folder, resume=True, mode="random", layers=[1, 4], holdout=0.1)
    for name in (SUMMARY, "maps.png"):
        assert (folder / name).read_bytes() == (shaped[0] / name).read_bytes()


# --- other places for curves ---


def test_curves_go_to_the_asked_package(tmp_path, monkeypatch, shaped):
    sent, started = [], []
    fake = types.SimpleNamespace(run=None, init=lambda **options: started.append(options) or own)
    own = types.SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = set_up(TINY | {"log": "wandb"}).config
    log = curve_log(config, tmp_path / "name")
    rows = results.read_rows(shaped[0])
    for row in rows:
        log(row)
    assert [step for step, _ in sent] == [1, 2]
    assert sent[1][1]["train/loss"] == rows[1].train_loss
    assert sent[1][1]["test/sketch-bn-source/accuracy"] == pytest.approx(
        100 * rows[1].tests["sketch-bn-source"].correct / TOTAL
    )
    assert started[0]["id"] == "name" and started[0]["config"]["seed"] == 0


def test_no_log_is_the_default(tmp_path, shaped):
    log = curve_log(setup_of().config, tmp_path)
    assert log(results.read_rows(shaped[0])[0]) is None
    assert list(tmp_path.iterdir()) == []


def skip_updates(monkeypatch, skipped):
    """Stand in for float16's verdict on each update, in turn."""
    verdicts = iter(skipped)

    def overflown(self):
        return torch.tensor(bool(next(verdicts)))

    monkeypatch.setattr(Method, "overflown", overflown)


def test_a_run_that_skipped_many_updates_says_so(tmp_path, no_pictures, monkeypatch):
    skip_updates(monkeypatch, [1, 1, 1, 0])
    screen = Lines()
    folder = run(tmp_path / "r", amp="float16", epochs=2, screen=screen, step_fraction=1)
    lost = "float16 skipped 3 of 4 updates, more than 5%"
    assert f"warning: {lost}" in screen.lines
    assert lost in results.read_training(folder).record.warnings
    epochs = [line for line in screen.lines if line.startswith("epoch ")]
    assert [line.count("2 of 2 updates skipped") for line in epochs] == [1, 0]
    assert [line.count("1 of 2 updates skipped") for line in epochs] == [0, 1]


@pytest.mark.parametrize(
    ("verdicts", "rates"),
    [
        ([0, 0, 0, 0, 0, 0], [0.02, 0.002, 0.0002]),
        ([1, 1, 0, 0, 0, 0], [0.02, 0.02, 0.002]),
        ([1, 0, 0, 0, 0, 0], [0.02, 0.002, 0.0002]),
    ],
)
def test_the_schedule_waits_for_an_epoch_in_which_weights_moved(
    tmp_path, no_pictures, monkeypatch, verdicts, rates
):
    skip_updates(monkeypatch, verdicts)
    folder = run(tmp_path / "r", amp="float16", epochs=3, step_fraction=0.4)
    assert [row["lr"] for row in rows_of(folder)] == pytest.approx(rates)
    assert check(folder) == []


def test_no_word_of_skipped_updates_where_there_are_none(shaped):
    assert not any("skipped" in line for line in shaped[1])


def test_a_run_that_skipped_every_update_leaves_no_record(tmp_path, no_pictures, monkeypatch):
    skip_updates(monkeypatch, [1] * 4)
    message = (
        "^float16 skipped all 4 updates, .* Lower lr .0.02. or set amp to off .it is float16.$"
    )
    for resume in (False, True):
        with pytest.raises(NonFiniteError, match=message):
            run(tmp_path / "r", amp="float16", epochs=2, resume=resume)
    assert not (tmp_path / "r" / TRAINING).exists() and not (tmp_path / "r" / SUMMARY).exists()


def test_defaults_of_torch_in_the_caller_change_no_figure(tmp_path, no_pictures):
    switches = {"mode": "random", "layers": [1], "epochs": 1}
    expected = rows_of(run(tmp_path / "a", **switches))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            rows = rows_of(run(tmp_path / "b", **switches))
    finally:
        torch.set_default_dtype(torch.float32)
    assert untimed(rows) == untimed(expected)


@pytest.mark.parametrize(
    "state", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)]
)
def test_grad_mode_and_autocast_of_the_caller_change_no_figure(tmp_path, no_pictures, state):
    switches = {"mode": "da", "layers": [1], "epochs": 1}
    expected = rows_of(run(tmp_path / "a", **switches))
    with state:
        rows = rows_of(run(tmp_path / "b", **switches))
    assert untimed(rows) == untimed(expected)
