"""A run killed at any moment and resumed ends as an uninterrupted one, bit for bit."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import record
import run
import torch

RUN = Path(run.__file__)
TINY = [
    *("--data", "toy", "--limit", "3", "--image-size", "32", "--epochs", "2", "--batch-size", "8"),
    *("--device", "cpu"),
]
# Shaping that draws at every pass, tests included, is the hardest to continue; so is recording.
MODES = {
    "random": ["--mode", "random", "--layers", "1", "4", "--at-eval", "on", "--p-zero", "0.3"],
    "da": ["--mode", "da", "--layers", "4", "--record-mode", "train"],
}
TIMES = {"seconds", "train_seconds", "images_per_second"}


def result_of(folder):
    """What must not depend on interruptions: rows without times, weights, momenta, generator."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    state = record.read_checkpoint(folder / "checkpoint.pt")
    momenta = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    return rows, [*state["model"].values(), *momenta, state["cpu_rng"]]


def assert_same_result(folder, expected):
    rows, tensors = result_of(folder)
    expected_rows, expected_tensors = result_of(expected)
    assert rows == expected_rows
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected_tensors, strict=True))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    monkeypatch.setattr(run.pictures, "maps", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by mode, made once when first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    def get(mode):
        if not (folder / mode).exists():
            assert run.main([*TINY, *MODES[mode], "--out", str(folder / mode)]) == 0
        return folder / mode

    return get


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


@pytest.mark.parametrize("mode", MODES)
def test_stopped_at_each_write_and_resumed(mode, whole, tmp_path, monkeypatch):
    """Dies before or after putting each file in place, again and again, each time resumed."""
    expected = whole(mode)
    arguments = [*TINY, *MODES[mode], "--out", str(tmp_path / "r"), "--resume"]
    replace = os.replace
    deaths = []

    def dying(source, target):
        # dies once at every file of every epoch, in turn before and after the file is in place
        key = (Path(target).name, done())
        if key in deaths:
            return replace(source, target)
        deaths.append(key)
        if len(deaths) % 2:
            replace(source, target)
        raise Killed

    def done():
        path = tmp_path / "r" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    monkeypatch.setattr(record.os, "replace", dying)
    for _ in range(40):
        try:
            assert run.main(arguments) == 0
            break
        except Killed:
            pass
    # config, metrics at the start, checkpoint and metrics of each epoch, summary
    assert len(deaths) >= 7
    assert_same_result(tmp_path / "r", expected)


def start(folder, *more):
    """The run as a process of its own."""
    command = [sys.executable, str(RUN), *TINY, *MODES["random"], "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def checkpoint_part(folder):
    return folder / ".checkpoint.pt.part"


def test_killed_and_resumed(whole, tmp_path):
    folder = tmp_path / "r"
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
    # killed while the first checkpoint is being written, or when it has just been
    kill_when(start(folder), lambda: checkpoint.exists() or checkpoint_part(folder).exists())
    # killed in the middle of the second epoch
    kill_when(start(folder, "--resume"), lambda: '"epoch": 1' in metrics.read_text())
    # half a line, as a kill could leave in a plain file
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "train_l')
    last = start(folder, "--resume")
    out, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out  # it went on and did not start again
    assert_same_result(folder, whole("random"))
    assert not list(folder.glob(".*"))
    assert json.loads((folder / "summary.json").read_text())["target_total"] == 21


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of two epochs that was stopped after the first."""
    folder = tmp_path / "stopped"
    write = record.write_checkpoint

    def write_and_die(path, state):
        write(path, state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_checkpoint", write_and_die)
        with pytest.raises(Killed):
            run.main([*TINY, *MODES["random"], "--out", str(folder)])
    return folder


def test_a_full_disk_stops_the_run_and_keeps_its_checkpoint(stopped, whole):
    before = (stopped / "checkpoint.pt").read_bytes()

    def small_files():  # in the child: no file may grow over a megabyte, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [sys.executable, str(RUN), *TINY, *MODES["random"], "--out", str(stopped), "--resume"]
    done = subprocess.run(
        command, preexec_fn=small_files, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "checkpoint.pt: File too large; the old one is untouched" in done.stderr
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert not list(stopped.glob(".*"))
    assert run.main([*TINY, *MODES["random"], "--out", str(stopped), "--resume"]) == 0
    assert_same_result(stopped, whole("random"))


def test_resume_with_the_folder_alone(stopped, whole):
    assert run.main(["--resume", "--out", str(stopped)]) == 0
    assert_same_result(stopped, whole("random"))


def test_other_switches_are_refused_and_named(stopped, capsys):
    before = (stopped / "checkpoint.pt").read_bytes()
    other = [*TINY, *MODES["random"], "--seed", "1", "--lr", "0.5", "--workers", "1"]
    for remove in (None, "config.yaml"):  # the checkpoint alone knows its configuration too
        if remove:
            (stopped / remove).unlink()
        assert run.main([*other, "--out", str(stopped), "--resume"]) == 2
        error = capsys.readouterr().err
        assert "is of another configuration (lr: 0.02 -> 0.5; seed: 0 -> 1)" in error
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_a_broken_checkpoint_is_refused(stopped, capsys):
    path = stopped / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert run.main(["--resume", "--out", str(stopped)]) == 1
    assert "cannot read checkpoint" in capsys.readouterr().err
    assert len(path.read_bytes()) == 1000


def test_a_finished_run_says_so(whole, capsys):
    folder = whole("random")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert run.main(["--resume", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "this run is finished" in out
    assert "of 21, epoch 2)" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_to_resume_starts_from_the_beginning(tmp_path, capsys):
    arguments = [*TINY, "--epochs", "1", "--out", str(tmp_path / "new"), "--resume"]
    assert run.main(arguments) == 0
    assert "no checkpoint" in capsys.readouterr().out


def test_nothing_to_resume_in_a_folder_alone(tmp_path, capsys):
    assert run.main(["--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
