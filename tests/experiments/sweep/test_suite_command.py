"""The command: what it runs, skips, says and writes, with a stand-in for the training."""

import multiprocessing
import re
import shutil
import sys

import pytest
from domainshift import files
from domainshift.records.schema import CHECKPOINT, CONFIG, EVALUATIONS, METRICS, TRAINING
from domainshift.sweep.command import main
from domainshift.sweep.estimate import IMPORTS, duration
from paper_data import on_paper
from small_suites import small


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "suite: a name is needed; there are answer, controls, report-a, report-b, study, toy"),
        (
            ["nothing"],
            "no suite 'nothing'; there are answer, controls, report-a, report-b, study, toy, or",
        ),
        (["no/such.yaml"], "cannot read no/such.yaml"),
        (["study", "--profile", "huge"], "profile: 'huge' is not allowed; allowed: full | mini"),
        (["study", "--only", "x*"], "--only: no table, arm or training matches 'x*'"),
        (["study", "--set", "seed=3"], "seed is not for an arm"),
        (["study", "--set", "sizes=3"], "--set: 'sizes=3' is not allowed; allowed: SWITCH=VALUE"),
        (["study", "--set", "device=tpu"], "device: 'tpu' is not allowed; allowed: auto | cpu"),
        (["study", "--per-device", "2", "--set", "device=cpu"], "--per-device is for GPUs"),
        (["study", "--jobs", "0"], "--jobs: '0' is not allowed; allowed: a whole number from 1"),
        (["study", "--job", "2"], "unrecognized arguments: --job 2"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    weights = ["--weights", "none"]
    with on_paper():
        assert main([*arguments, *weights, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()


# --- what is run ------------------------------------------------------------------------------


def test_everything_is_made_once(stand, capsys):
    assert stand.main("--jobs", "3") == 0
    assert stand.started == {name: 1 for name in stand.names}
    assert stand.done == set(stand.names)
    printed = capsys.readouterr().out
    assert "0 of 12 trainings, 0 of 12 evaluations done; 12 trainings to do, 3 at a time" in printed
    assert "[12/12] " in printed and "cartoon 50.00 % (1/2)  100 s" in printed
    assert f"12 of 12 trainings, 12 of 12 evaluations done: {stand.out / 'suite.json'}" in printed
    assert stand.main() == 0
    assert stand.started == {name: 1 for name in stand.names}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_worker_serves_many_trainings(stand, jobs):
    stand.tell("sleep", 0.1)
    assert stand.main("--jobs", str(jobs)) == 0
    assert stand.most_at_once() == len(stand.processes) == jobs


def test_a_failure_is_recorded_and_the_rest_is_made(stand, capsys):
    bad = stand.names[4]
    stand.tell("fail", 1, bad)
    assert stand.main() == 1
    assert stand.done == {*stand.names} - {bad}
    assert stand.failure(bad) == ["one", "the last words"]
    assert len(stand.processes) == 1
    out = capsys.readouterr().out
    assert "FAILED: the last words" in out and f"failed: {bad} (" in out
    assert "11 of 12 trainings, 11 of 12 evaluations done" in out

    stand.tell("fail", None, bad)
    assert stand.main() == 0  # tried again, and alone
    assert stand.started == {name: 1 + (name == bad) for name in stand.names}
    assert stand.failure(bad) is None


def test_the_index_is_written_once_per_start(stand, monkeypatch):
    """What is done, the folders say: the bytes that a suite writes grow as its trainings do."""
    written = []
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda p, v: (written.append(p.name), write(p, v)))
    assert stand.main() == 0
    assert written.count("suite.json") == 1
    sizes = (stand.out.parent / "rates.json").stat().st_size
    assert sizes < 1000


def test_only_runs_what_it_names_and_the_index_has_all(stand):
    assert stand.main("--only", "*-s1") == 0
    chosen = {name for name in stand.names if name.endswith("-s1")}
    assert len(chosen) == 6 and set(stand.started) == stand.done == chosen
    assert set(files.read_json(stand.out / "suite.json")["trainings"]) == set(stand.names)
    assert stand.main("--only", "one") == 0  # the table
    assert stand.done == set(stand.names)


def test_the_index_is_what_the_report_needs(stand):
    assert stand.main() == 0
    index = files.read_json(stand.out / "suite.json")
    assert index["command"].startswith("python experiments/suite.py /")
    assert index["command"].endswith("/stand.yaml --profile full --set device=cpu")
    assert (index["format"], index["suite"], index["profile"]) == (2, "stand", "full")
    (one,) = index["tables"]
    assert (one["name"], one["title"], one["baseline"]) == ("one", "One", "r0.0")
    assert one["arms"][0] == {
        "name": "r0.0",
        "cells": [
            {
                "source": "art_painting",
                "target": "cartoon",
                "seed": seed,
                "training": f"r0.0-art_painting-s{seed}",
                "test": "cartoon",
            }
            for seed in (0, 1)
        ],
    }
    training = index["trainings"]["r0.0-art_painting-s1"]
    switches = {"mode": "random", "layers": [1], "p_zero": [0.0], "seed": 1, "device": "cpu"}
    assert switches.items() <= training["switches"].items()
    assert training["key"] == next(
        job.key for job in stand.plan.jobs if job.name.endswith("s1") and "0.0" in job.name
    )
    assert [test["domain"] for test in training["tests"]] == ["cartoon"]


# --- a dry run --------------------------------------------------------------------------------


def test_a_dry_run_lists_and_touches_nothing(stand, capsys):
    assert stand.main("--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines if line.startswith("new ")] == stand.names
    assert all(line.endswith("(cartoon)") for line in lines if line.startswith("new "))
    assert not stand.out.parent.exists() and not stand.started
    assert "12 trainings to do" in lines[-1] and "a guess: nothing was measured" in lines[-1]


def test_the_estimate_follows_what_was_measured(stand, capsys):
    assert stand.main("--only", "*-s0") == 0
    capsys.readouterr()
    assert stand.main("--dry-run") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "6 of 12 trainings, 6 of 12 evaluations done; 6 trainings to do" in line
    assert "measured on " in line
    # the stand-in says 100 s each, and all its trainings cost alike
    assert f"about {duration(6 * 100 + IMPORTS)} (" in line


def test_another_suite_learns_from_the_last_one(stand, capsys, tmp_path):
    """Its folder lies beside the first one, where the rates are."""
    assert stand.main() == 0
    capsys.readouterr()
    words = [word if word != str(stand.out) else f"{stand.out}-2" for word in stand.words]
    with on_paper():
        assert main([*words, "--dry-run", "--jobs", "2", "--only", "one"]) == 0
    assert "a guess" not in capsys.readouterr().out


def test_a_laptop_tells_how_long_a_gpu_would_take(capsys, tmp_path):
    with on_paper():
        out = ["--out", str(tmp_path / "out"), "--weights", "none"]
        assert main(["study", "--dry-run", "--set", "device=cuda", *out]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "0 of 280 trainings, 0 of 810 evaluations done" in line and "1 at a time on cuda" in line


# --- several at once --------------------------------------------------------------------------


def test_two_processes_share_a_suite(stand):
    """Each training is made once, whoever makes it, and both end when all is done."""
    stand.tell("sleep", 0.2)
    context = multiprocessing.get_context("fork")  # with the stand-in in place
    both = [context.Process(target=lambda: sys.exit(stand.main())) for _ in range(2)]
    [process.start() for process in both]
    [process.join(60) for process in both]
    assert [process.exitcode for process in both] == [0, 0]
    assert stand.done == set(stand.names)
    assert stand.started == {name: 1 for name in stand.names}
    assert stand.most_at_once() == 2


# --- records that are there already -----------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda t: t | {"key": "k", "switches": {"lr": 7.0}},
            r"holds another training: .*lr: 7.0 -> 0.001",
        ),
        (lambda t: t | {"version": 1}, r"is a record of another version"),
    ],
)
def test_another_record_is_never_overwritten(stand, harm, message, capsys):
    assert stand.main("--only", "*-s0") == 0
    path = stand.out / stand.names[0] / TRAINING
    files.write_json(path, harm(files.read_json(path)))
    before, started = contents(stand.out), stand.started
    for how in ([], ["--dry-run"]):
        assert stand.main(*how) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and str(path.parent) in error
    assert contents(stand.out) == before and stand.started == started


def test_a_folder_of_another_suite_is_refused(stand, tmp_path, capsys):
    assert stand.main("--only", stand.names[0]) == 0
    before = contents(stand.out)
    with on_paper():
        assert main([small(tmp_path), "--out", str(stand.out)]) == 2
    assert "holds suite stand, profile full" in capsys.readouterr().err
    assert contents(stand.out) == before


@pytest.mark.parametrize(
    "name, reason",
    [
        (METRICS, "metrics.jsonl does not have 1 whole lines"),
        (TRAINING, "training.json: half-written, or not JSON"),
        (f"{EVALUATIONS}/cartoon.json", "not tested on cartoon, and the checkpoint is gone"),
    ],
)
def test_what_is_half_written_is_named_and_made_again(stand, name, reason, capsys):
    assert stand.main() == 0
    folder = stand.out / stand.names[3]
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] + b"{")
    assert stand.main() == 0
    assert stand.started == {n: 1 + (n == stand.names[3]) for n in stand.names}
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: {stand.names[3]} is trained again: " in printed and reason in printed
    assert (folder / f"{TRAINING}.aside").exists()


def test_a_new_test_without_a_checkpoint_trains_again(stand, capsys):
    assert stand.main() == 0
    folder = stand.out / stand.names[2]
    shutil.rmtree(folder / EVALUATIONS)
    assert stand.main("--dry-run") == 0
    assert "retrain " in capsys.readouterr().out
    assert stand.main() == 0
    assert stand.started == {n: 1 + (n == stand.names[2]) for n in stand.names}
    reason = "not tested on cartoon, and the checkpoint is gone"
    assert f"{stand.names[2]} is trained again: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_finished_trainings_go_unless_they_are_kept(stand, keep):
    for job in stand.plan.jobs:
        (stand.orders / stand.key(job) / "record" / CHECKPOINT).touch()
        (stand.orders / stand.key(job) / "record" / CONFIG).touch()
    assert stand.main(*(["--keep-checkpoints"] if keep else [])) == 0
    assert len(list(stand.out.rglob(CHECKPOINT))) == (12 if keep else 0)
    assert len(list(stand.out.rglob(CONFIG))) == 12
