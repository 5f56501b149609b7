"""A whole run in two processes: the numbers of one, each image counted once, each line printed once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from domainshift.records import results
from domainshift.records.schema import CHECKPOINT, SUMMARY
from domainshift.records.validate import check
from domainshift.training import checkpoint
from exact_runs import exact_run
from tiny_runs import OF_THE_RUN, TINY, rows_of, words_of

pytestmark = pytest.mark.slow

CLOSE = 1e-6  # of the largest number beside it; a mistake in a part changes more than 1e-3
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# 14 training images, 21 of the target and 7 held out
SWITCHES = {name: value for name, value in TINY.items() if name != "epochs"}
SWITCHES |= {"batch_size": 10, "updates": 2, "holdout": 0.1, "limit": 3}
RUNS = {
    # passes of 4, 4, 3 and 3 images
    "baseline": {"batch_size": 8, "accumulate": 2, "test_set": "source-train"},
    "random": {
        **{"mode": "random", "layers": [1, 4], "p_zero": 0.3, "at_eval": "on"},
        **{"batch_size": 5, "updates": 5},
    },
    "da": {"mode": "da", "layers": [4, 13], "updates": 3},
}
RESUMED = "random"


def words(out, name):
    return words_of(SWITCHES | RUNS[name] | {"out": out})


def in_two_processes(*command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Every run in two processes; one of them stopped; one that one process began."""
    folder = tmp_path_factory.mktemp("two")
    assert exact_run(words(folder / "by-one-then-two", RESUMED), stopped=True) == 0
    runs = [[words(folder / name, name), False] for name in RUNS]
    runs.append([words(folder / "by-two-then-one", RESUMED), True])
    runs.append([["--resume", *words(folder / "by-one-then-two", RESUMED)], False])
    (folder / "runs.json").write_text(json.dumps(runs))
    done = in_two_processes(Path(__file__).parent / "exact_runs.py", folder / "runs.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")

    def get(name):
        if not (folder / name).exists():
            assert exact_run(words(folder / name, name)) == 0
        return folder / name

    return get


def assert_same_run(folder, expected):
    """Equal except for the order in which float64 numbers are added."""
    for row, right in zip(rows_of(folder), rows_of(expected), strict=True):
        for key in right.keys() - OF_THE_RUN:
            if key == "tests":
                assert row[key].keys() == right[key].keys()
                for name, count in right[key].items():
                    assert row[key][name]["correct"] == count["correct"]
                    assert row[key][name]["loss"] == pytest.approx(count["loss"], rel=CLOSE)
            elif key in ("train_loss", "density"):
                assert row[key] == pytest.approx(right[key], rel=CLOSE), key
            else:
                assert row[key] == right[key], key
    own, other = (checkpoint.read(f / CHECKPOINT) for f in (folder, expected))
    for name, tensor in other["model"].items():
        bound = CLOSE * tensor.abs().max().item()
        torch.testing.assert_close(own["model"][name], tensor, rtol=0, atol=bound, msg=name)
    assert torch.equal(own["cpu_rng"], other["cpu_rng"])
    assert own["origin"] == other["origin"]
    names = results.evaluation_names(expected)
    assert results.evaluation_names(folder) == names
    for name in names:
        a, b = (results.read_predictions(f, name) for f in (folder, expected))
        assert a["labels"].tolist() == b["labels"].tolist()
        assert a["predicted"].tolist() == b["predicted"].tolist()
        for key in ("logits", "features"):
            np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=1e-3)  # float16


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_numbers_of_one(name, by_two, by_one):
    assert_same_run(by_two / name, by_one(name))
    assert check(by_two / name) == []
    for folder, processes in ((by_two / name, 2), (by_one(name), 1)):
        assert results.read_training(folder).record.versions["processes"] == processes


def test_resumed_by_more_processes(by_two, by_one):
    assert_same_run(by_two / "by-one-then-two", by_one(RESUMED))


def test_resumed_by_fewer_processes(by_two, by_one):
    folder = by_two / "by-two-then-one"
    assert len(rows_of(folder)) == 1 and not (folder / SUMMARY).exists()
    assert exact_run(["--resume", *words(folder, RESUMED)]) == 0
    assert_same_run(folder, by_one(RESUMED))


def test_an_uneven_test_set_is_counted_once(by_two):
    """Also where the last batch has fewer images than there are processes: 21 = 10 + 10 + 1."""
    for name, test, images in (
        ("da", "sketch-bn-source", 21),
        ("da", "art_painting-holdout-bn-source", 7),
        ("baseline", "art_painting-train-bn-source", 14),
    ):
        confusion = results.read_evaluation(by_two / name, test).confusion
        assert [sum(row) for row in confusion] == [images // 7] * 7


def test_the_command(tmp_path):
    """As users start it. Each line is printed once, and the record says what BatchNorm saw."""
    switches = TINY | {"mode": "da", "layers": [4], "epochs": 1, "out": tmp_path / "two"}
    program = tmp_path / "command.py"
    program.write_text("from domainshift.command import main\nraise SystemExit(main())\n")
    done = in_two_processes(program, *words_of(switches))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("epoch 1/1  loss") == 1
    assert done.stdout.count("record: ") == 1
    assert done.stdout.count("2 processes on CPUs: each normalizes") == 1
    assert check(tmp_path / "two") == []
