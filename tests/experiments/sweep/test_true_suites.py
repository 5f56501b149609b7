"""Suites of true trainings: whole records, kills, and one network tested in many ways."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from domainshift import files
from domainshift.lease import holder
from domainshift.records.schema import CHECKPOINT, CONFIG, EVALUATIONS, METRICS, TRAINING
from domainshift.records.validate import check
from domainshift.report.command import main as report
from domainshift.report.study import read_study
from domainshift.sweep.command import main
from domainshift.sweep.estimate import Clock
from small_suites import TRUE, records_of, result_of, small

EXPERIMENTS = Path(files.__file__).parents[1]
RANDOM, DA = "random-art_painting-s0", "da-art_painting-cartoon-s0"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The suite TRUE, made without interruption: its YAML file and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    path = small(folder, **TRUE)
    assert main([path, "--out", str(folder / "out"), "--keep-checkpoints"]) == 0
    return path, folder / "out"


@pytest.fixture
def copy(whole, tmp_path):
    """Its arguments, and a copy of its folder."""
    path, folder = whole
    shutil.copytree(folder, tmp_path / "out")
    return [path, "--out", str(tmp_path / "out")], tmp_path / "out"


def test_true_trainings_leave_whole_records(whole):
    _, out = whole
    for name in (RANDOM, DA):
        assert check(out / name) == []
        assert (out / name / "curves.png").exists() and (out / name / "log.txt").exists()
    assert {p.stem for p in (out / RANDOM / EVALUATIONS).glob("*.json")} == {
        "cartoon-shaping-on",
        "cartoon",
    }
    study = read_study(out)
    assert not study.problems and not study.missing
    assert report([str(out), "--audit-only"]) == 0


@pytest.mark.slow
def test_the_next_suite_is_estimated_within_a_factor_of_one_and_a_half(
    whole, tmp_path, monkeypatch
):
    """What the rates of the last suite say of each training, and the seconds that they took."""
    path, out = whole
    rates = tmp_path / "rates.json"
    shutil.copy(out.parent / "rates.json", rates)
    estimates, seconds = [], []
    learn = Clock.learn

    def seen(clock, folder, job, measured):
        estimates.append(clock.seconds(job))
        seconds.append(measured)
        learn(clock, folder, job, measured)

    monkeypatch.setattr(Clock, "learn", seen)
    path = small(tmp_path, **TRUE | {"seeds": [1, 2]})
    assert main([path, "--out", str(tmp_path / "out")]) == 0
    assert len(seconds) == 4
    assert 1 / 1.5 < sum(estimates) / sum(seconds) < 1.5


def start(arguments):
    code = "import sys; from domainshift.sweep.command import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(EXPERIMENTS)},
    )


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_suite_that_is_stopped_in_mid_training_goes_on_to_the_same_bits(signum, whole, tmp_path):
    path, expected = whole
    out = tmp_path / "out"
    arguments = [path, "--out", str(out), "--only", "random*"]
    with start(arguments) as process:
        wait_until((out / RANDOM / CHECKPOINT).exists, process)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert not (out / RANDOM / TRAINING).exists()
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:  # as Ctrl-C
        assert process.returncode == 130
        again = f"python experiments/suite.py {shlex.join(arguments)}"
        assert error == f"suite.py: interrupted; to continue: {again}\n"
    assert holder(out / RANDOM) is None

    assert main(arguments) == 0
    log = (out / RANDOM / "log.txt").read_text()
    assert log.count("starting from the beginning") == 1  # and then it went on
    assert result_of(out / RANDOM) == result_of(expected / RANDOM)
    assert not (out / RANDOM / CHECKPOINT).exists()


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_worker_that_is_killed_costs_one_training(whole, tmp_path):
    path, expected = whole
    out = tmp_path / "out"
    arguments = [path, "--out", str(out)]
    with start(arguments) as process:
        wait_until((out / RANDOM / CHECKPOINT).exists, process)
        os.kill(children(process)[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{RANDOM}  FAILED: killed by SIGKILL" in output
    assert "1 of 2 trainings, 1 of 3 evaluations done" in output
    assert result_of(out / DA) == result_of(expected / DA)
    assert files.read_json(out / RANDOM / "failure.json")["status"] == -signal.SIGKILL
    assert main(arguments) == 0
    assert result_of(out / RANDOM) == result_of(expected / RANDOM)
    assert not (out / RANDOM / "failure.json").exists()


def test_a_failure_is_forgotten_once_its_training_is_whole(copy):
    """A worker killed between its last record and its answer leaves both."""
    arguments, out = copy
    files.write_json(out / RANDOM / "failure.json", {"status": -9, "lines": ["killed by SIGKILL"]})
    assert main(arguments) == 0
    assert not (out / RANDOM / "failure.json").exists()


# --- more is asked ----------------------------------------------------------------------------


def asked_more(tmp_path, **defaults):
    """The suite with one more way to test its first training."""
    arms = TRUE["tables"]["one"]["arms"]
    arms = arms | {"more": arms["random"] | {"at_eval": "binarize"}}
    return small(
        tmp_path,
        **TRUE
        | {
            "defaults": TRUE["defaults"] | defaults,
            "tables": {"one": {"title": "One", "arms": arms}},
        },
    )


def test_a_new_test_needs_no_training_where_the_checkpoint_is(copy, tmp_path, capsys):
    _, out = copy
    arguments = [asked_more(tmp_path), "--out", str(out), "--keep-checkpoints"]
    before = contents(out / RANDOM)
    assert main([*arguments, "--dry-run"]) == 0
    assert "untested " in capsys.readouterr().out
    assert main(arguments) == 0
    after = contents(out / RANDOM)
    assert "epoch" not in after[Path("log.txt")].removeprefix(before[Path("log.txt")]).decode()
    for name in (Path(TRAINING), Path(METRICS), Path(EVALUATIONS, "cartoon.npz")):
        assert after[name] == before[name]
    assert check(out / RANDOM) == []
    assert Path(EVALUATIONS, "cartoon-shaping-binarize.json") in after.keys() - before.keys()


def test_without_the_checkpoint_it_trains_again(copy, tmp_path, capsys):
    _, out = copy
    (out / RANDOM / CHECKPOINT).unlink()
    before = records_of(out / RANDOM)
    assert main([asked_more(tmp_path), "--out", str(out)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    reason = "not tested on cartoon-shaping-binarize, and the checkpoint is gone"
    assert f"{RANDOM} is trained again: {reason}" in words
    assert check(out / RANDOM) == []
    after = records_of(out / RANDOM)
    assert after.keys() - before.keys() == {"cartoon-shaping-binarize.json"}
    assert {name: after[name] for name in before} == before


# --- what is there already --------------------------------------------------------------------


@pytest.mark.parametrize("name", [TRAINING, METRICS, CONFIG, CHECKPOINT])
def test_a_training_that_is_half_written_is_made_again(name, copy, whole, capsys):
    arguments, out = copy
    if name in (CONFIG, CHECKPOINT):  # of a finished training neither is needed
        (out / DA / TRAINING).unlink()
    os.truncate(out / DA / name, 100)
    if name == CONFIG:
        (out / DA / CONFIG).write_text("a: [")
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{DA} is trained again: " in printed and f"{out / DA / name}" in printed
    assert result_of(out / DA) == result_of(whole[1] / DA)
    assert (out / DA / f"{name}.aside").exists()


def test_a_test_that_is_half_written_is_made_again(copy, whole):
    arguments, out = copy
    os.truncate(out / DA / EVALUATIONS / "cartoon.json", 100)
    assert main(arguments) == 0
    assert result_of(out / DA) == result_of(whole[1] / DA)
    assert (out / DA / "log.txt").read_text().count("epoch 1/8 ") == 1  # no training


def test_records_that_fail_the_audit_are_failures(whole, tmp_path, monkeypatch, capsys):
    """A training that just ended is checked in full; one that ended earlier is for the audit."""
    monkeypatch.setattr("domainshift.sweep.sweeping.check", lambda _: ["a rule is broken"])
    arguments = [small(tmp_path, **TRUE), "--out", str(tmp_path / "out"), "--only", "da"]
    assert main(arguments) == 1
    assert f"{DA}  FAILED: a rule is broken" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"lr": 7.0}, {"epochs": 9}])
def test_a_training_of_other_switches_is_never_overwritten(changes, copy, tmp_path, capsys):
    _, out = copy
    (out / RANDOM / TRAINING).unlink()  # killed before its end
    before = contents(out)
    path = small(tmp_path, **TRUE | {"defaults": TRUE["defaults"] | changes})
    assert main([path, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    ((name, value),) = changes.items()
    assert f"{name}: {TRUE['defaults'][name]} -> {value}" in error
    assert "nothing was run or changed; give the same switches" in error
    assert contents(out) == before


def test_other_images_are_another_training(copy, whole, capsys):
    arguments, out = copy
    training = files.read_json(out / RANDOM / TRAINING)
    files.write_json(out / RANDOM / TRAINING, training | {"key": "0" * 64})
    assert main(arguments) == 2
    assert "holds another training: other images or initial weights" in capsys.readouterr().err


@pytest.mark.slow
def test_data_and_weights_that_lie_elsewhere_are_the_same_training(
    pacs, imagenet_weights, tmp_path, capsys
):
    """What is done stays, and what was killed goes on with the paths that are given now."""
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
    assert main([*arguments, *places["old"]]) == 0
    done, killed = (out / f"baseline-art_painting-s{seed}" for seed in (0, 1))
    before, (expected, rows) = contents(done), result_of(killed)

    (killed / TRAINING).unlink()
    capsys.readouterr()
    shutil.move(tmp_path / "old", tmp_path / "gone")
    assert main([*arguments, *places["new"]]) == 0
    assert "1 of 2 trainings, 1 of 2 evaluations done; 1 trainings to" in capsys.readouterr().out
    assert contents(done) == before
    assert check(killed) == []
    for name in ("places", "switches"):  # which have the paths
        expected[TRAINING][name] = files.read_json(killed / TRAINING)[name]
    assert result_of(killed) == (expected, rows)
    index = json.loads((out / "suite.json").read_text())
    weights = {training["switches"]["weights"] for training in index["trainings"].values()}
    assert weights == {places["new"][3]}
    study = read_study(out)
    assert not study.problems and not study.missing
    assert report([str(out), "--audit-only"]) == 0
