"""A run that is killed at any moment and resumed ends as an uninterrupted one, bit for bit."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from domainshift import files
from domainshift.errors import RecordError
from domainshift.records.schema import CHECKPOINT, CONFIG, METRICS, SUMMARY, TRAINING
from domainshift.records.validate import check
from domainshift.training import checkpoint, loop
from tiny_runs import SHAPED, TINY, assert_same_training, rows_of, run, words_of

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by mode; each is made when a test first asks for it."""
    folder = tmp_path_factory.mktemp("whole")

    def get(mode):
        if not (folder / mode).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("domainshift.training.run.draw", lambda *_: None)
                run(folder / mode, **SHAPED[mode])
        return folder / mode

    return get


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


@pytest.mark.parametrize("mode", SHAPED)
def test_death_at_each_write(mode, whole, tmp_path, monkeypatch):
    """Each write kills the run once, in turn before and after the file is in place or half of it."""
    expected = whole(mode)
    replace, append, deaths = os.replace, files.append_json_line, []

    def epochs():
        path = tmp_path / "r" / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def dies(name):
        key = name, epochs()
        if key in deaths:
            return False
        deaths.append(key)
        return True

    def dying_replace(source, target):
        if not dies(Path(target).name):
            replace(source, target)
            return
        if len(deaths) % 2:
            replace(source, target)
        raise Killed

    def dying_append(path, row):
        if not dies("append"):
            append(path, row)
            return
        with open(path, "a") as file:
            file.write(json.dumps(row)[:40])
        raise Killed

    monkeypatch.setattr(files.os, "replace", dying_replace)
    monkeypatch.setattr(files, "append_json_line", dying_append)
    for _ in range(40):
        try:
            run(tmp_path / "r", resume=True, **SHAPED[mode])
            break
        except Killed:
            pass
    names = {name for name, _ in deaths}
    assert {"config.yaml", "append", METRICS, CHECKPOINT, TRAINING, SUMMARY} <= names
    assert any(name.endswith(".npz") for name in names)
    assert_same_training(tmp_path / "r", expected)
    assert check(tmp_path / "r") == []
    assert not list((tmp_path / "r").glob(".*"))


def start(folder, *, limits=None, **more):
    """A run as a process of its own."""
    program = "import sys; from domainshift.command import main; sys.exit(main())"
    switches = TINY | SHAPED["random"] | {"out": folder} | more
    resume = ["--resume"] if (folder / CONFIG).exists() else []
    command = [sys.executable, "-c", program, *resume, *words_of(switches)]
    # as many threads as the uninterrupted run, which this process made: they decide the order of sums
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | threads
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=limits,
    )


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_sigkill(whole, tmp_path):
    folder = tmp_path / "r"
    metrics, state = folder / METRICS, folder / CHECKPOINT
    # while the first checkpoint is being written, or just after
    kill_when(start(folder), lambda: state.exists() or list(folder.glob(".checkpoint*")))
    # in the second epoch, or in its tests
    kill_when(start(folder), lambda: state.exists() and metrics.exists())
    with open(metrics, "a") as file:  # half a line, as a kill can leave it
        file.write('{"epoch": 2, "train_l')
    last = start(folder)
    out, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out  # it went on and did not start again
    assert_same_training(folder, whole("random"))
    assert not list(folder.glob(".*"))
    assert files.read_json(folder / SUMMARY)["target_total"] == 21


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of two epochs that was stopped after the first."""
    folder, save = tmp_path / "stopped", checkpoint.save

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(folder, **SHAPED["random"])
    return folder


def test_full_disk(stopped, whole):
    before = (stopped / CHECKPOINT).read_bytes()
    limit = len(before) // 2

    def small_files():  # in the child: no file may grow over the limit, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(stopped, limits=small_files)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in error
    assert "checkpoint.pt: File too large; the old one is untouched" in error
    assert (stopped / CHECKPOINT).read_bytes() == before
    assert not list(stopped.glob(".*"))
    run(stopped, resume=True, **SHAPED["random"])
    assert_same_training(stopped, whole("random"))


def test_a_row_without_its_checkpoint_is_dropped(stopped, whole):
    """The row of an epoch comes before its checkpoint, so a kill between them leaves the row."""
    with open(stopped / METRICS, "a") as file:
        file.write(json.dumps(rows_of(stopped)[0] | {"epoch": 2, "train_loss": 9.0}) + "\n")
    run(stopped, resume=True, **SHAPED["random"])
    assert_same_training(stopped, whole("random"))


def test_a_missing_row_is_refused(stopped):
    (stopped / METRICS).write_text("")
    with pytest.raises(
        RecordError, match="metrics.jsonl does not have the 1 epochs of checkpoint.pt"
    ):
        run(stopped, resume=True, **SHAPED["random"])


def test_rows_are_not_in_the_checkpoint(stopped):
    assert "rows" not in checkpoint.read(stopped / CHECKPOINT)


def test_metrics_are_appended(whole, tmp_path, monkeypatch):
    """Each epoch adds a line to the file that is there."""
    files_seen, append = [], loop.files.append_json_line

    def seen(path, row):
        append(path, row)
        files_seen.append(path.stat().st_ino)

    monkeypatch.setattr(loop.files, "append_json_line", seen)
    run(tmp_path / "r", **SHAPED["random"])
    assert len(files_seen) == 2 and len(set(files_seen)) == 1
