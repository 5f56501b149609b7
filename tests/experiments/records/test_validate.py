"""Everything in a record that can be computed again is, and what differs is named."""

import re
import shutil

import numpy as np
import pytest
from domainshift import command, files
from domainshift.records import results
from domainshift.records.results import read_evaluation, read_training, seal
from domainshift.records.schema import EVALUATIONS, METRICS, TRAINING, VERSION
from domainshift.records.validate import check, read_result
from domainshift.training import pictures

TEST = "sketch-bn-source"
WORDS = (
    "--data toy --limit 3 --image-size 32 --epochs 2 --batch-size 8 --device cpu --weights none "
    "--mode da --layers 4 --accumulate 3 --evaluate each --amp off"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, without its pictures."""
    folder = tmp_path_factory.mktemp("validate") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", lambda *_: None)
        patch.setattr(pictures, "maps", lambda *_: None)
        assert command.main([*WORDS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_record_as_it_was_written_is_sound(folder):
    assert check(folder) == []
    (folder / "checkpoint.pt").unlink()  # records are kept without it
    (folder / EVALUATIONS / f"{TEST}-features.npz").unlink()  # and without features
    moved = folder.rename(folder.parent / "elsewhere")
    assert check(moved) == []
    result = read_result(moved, TEST)
    assert result.key == ("art_painting", "sketch", 0)
    assert result.holdout.total == 7


def digits(text):
    """Where a digit is that is no part of a word or a hash."""
    return [m.start() for m in re.finditer(r"(?<![\w.])\d", text)]


@pytest.mark.parametrize("name", [METRICS, TRAINING, f"{EVALUATIONS}/{TEST}.json"])
def test_one_other_digit_is_noticed(folder, name):
    path = folder / name
    whole = path.read_text()
    places = digits(whole)
    assert len(places) > 5
    for at in places[:: max(1, len(places) // 40)]:
        other = "2" if whole[at] == "1" else "1"
        path.write_text(whole[:at] + other + whole[at + 1 :])
        assert check(folder), whole[max(0, at - 40) : at + 20]
    path.write_text(whole)
    assert check(folder) == []


def resealed_training(folder, change_row=None, drop=False, **fields):
    """The training's record with changed fields or rows, under a seal of its own."""
    record, rows = read_training(folder)
    rows = rows[:1] if drop else rows
    if change_row:
        number, values = change_row
        rows[number - 1] = rows[number - 1].model_copy(update=values)
    follows = {
        "epochs": len(rows),
        "updates": sum(row.updates for row in rows),
        "passes": sum(row.passes for row in rows),
        "fired": {n: sum(row.fired.get(n, 0) for row in rows) for n in rows[-1].fired},
        "bn_untouched": all(row.bn_untouched for row in rows),
        "seconds": sum(row.train_seconds for row in rows),
        "source_train_accuracy": results.percent(
            rows[-1].source_train_correct, rows[-1].source_train_total
        ),
    }
    images = sum(row.source_train_total for row in rows)
    follows["images_per_second"] = images / follows["seconds"]
    record = record.model_copy(update=follows | fields)
    record = record.model_copy(update={"seal": seal(record, rows)})
    (folder / METRICS).unlink()
    for row in rows:
        files.append_json_line(folder / METRICS, row.model_dump(mode="json"))
    results.write_training(folder, record)
    return check(folder)


LAYER = "layer1.1.conv1"
WRONG = [
    ({"change_row": (1, {"fired": {LAYER: 5}})}, rf"epoch 1: layer {LAYER} fired 5 times in 6 p"),
    ({"change_row": (1, {"fired": {LAYER: 13}})}, r"fired 13 times in 6 passes"),
    ({"change_row": (1, {"fired": {}})}, r"epoch 1: fired \[\], not \['layer1"),
    ({"change_row": (1, {"updates": 3})}, r"epoch 1: updates is 3, not 2"),
    ({"change_row": (1, {"passes": 2})}, r"epoch 1: passes is 2, not 6"),
    ({"change_row": (2, {"bn_untouched": False})}, r"bn_untouched is False, not True"),
    ({"change_row": (1, {"source_train_total": 13})}, r"source_train_total is 13, not 14"),
    ({"change_row": (2, {"epoch": 3})}, r"epoch 2: epoch is 3, not 2"),
    ({"change_row": (1, {"run": "another"})}, r"epoch 1 is of run another, training.json of run"),
    ({"change_row": (1, {"skipped": 1}), "skipped": 0}, r"skipped is 0; the rest gives 1"),
    ({"versions": {}}, r"versions is {}; the rest gives"),
    ({"drop": True}, r"metrics.jsonl has 1 epochs; 4 updates take 2"),
    ({"held_out": [0] * 7}, r"0 images are held out, but holdout is 0.1"),
    ({"targets": ["art_painting"]}, r"art_painting is source and target"),
    ({"seed": 1}, r"seed is 1; the rest gives 0"),
    ({"train_loss": 0.5}, r"train_loss is 0.5; the rest gives"),
    ({"key": "0" * 64}, r"key is 000000000000; its fields give"),
]


@pytest.mark.parametrize(("changes", "problem"), WRONG)
def test_a_seal_of_its_own_does_not_help_a_wrong_training(folder, changes, problem):
    problems = resealed_training(folder, **changes)
    assert any(re.search(problem, line) for line in problems), problems
    assert not any(line.startswith("training.json: edited") for line in problems)


def resealed_evaluation(folder, **fields):
    record = read_evaluation(folder, TEST).model_copy(update=fields)
    record = record.model_copy(update={"seal": seal(record)})
    results.write_evaluation(folder, record, {})
    return check(folder)


def test_a_seal_of_its_own_does_not_help_a_wrong_evaluation(folder):
    record = read_evaluation(folder, TEST)
    more = record.correct + 1
    (problem,) = resealed_evaluation(folder, correct=more)
    assert f"correct is {more}, not {record.correct}" in problem
    confusion = [list(row) for row in record.confusion]
    confusion[0][0] += 1
    problems = resealed_evaluation(folder, confusion=confusion, correct=record.correct)
    assert any(f"confusion is not that of {TEST}.npz" in line for line in problems)
    assert any("tested on [4, 3, 3" in line for line in problems)


def test_an_evaluation_of_other_weights(folder):
    problems = resealed_evaluation(folder, weights_digest="0" * 64)
    assert any("weights_digest is '0000" in line for line in problems)


def test_predictions_of_another_run(folder):
    path = folder / EVALUATIONS / f"{TEST}.npz"
    arrays = results.read_predictions(folder, TEST)
    np.savez_compressed(
        path, **{n: arrays[n] for n in ("labels", "predicted", "logits")} | {"x": 1}
    )
    (problem,) = check(folder)
    assert f"{TEST}.npz is not the file that the record names" in problem
    path.unlink()
    assert any(f"{TEST}.npz is missing" in line for line in check(folder))


@pytest.mark.parametrize("name", [METRICS, TRAINING, f"{EVALUATIONS}/{TEST}.json"])
def test_a_half_written_record(folder, name):
    path = folder / name
    path.write_text(path.read_text()[:-20])
    (problem,) = check(folder)
    assert re.search(f"cannot read .*{re.escape(path.name)}.*half-written", problem)
    assert read_result(folder, TEST).kind == "half-written"


def test_an_unfinished_run(folder):
    (folder / TRAINING).unlink()
    assert "is unfinished: no training.json" in check(folder)[0]
    assert read_result(folder, TEST).kind == "unfinished"


@pytest.mark.parametrize("version", [None, 0, VERSION + 1])
def test_a_record_of_another_version(folder, version):
    record = files.read_json(folder / TRAINING) | {"version": version}
    files.write_json(folder / TRAINING, record)
    assert read_result(folder, TEST).kind == "another version"
    assert f"has version {version}; this code reads {VERSION}" in check(folder)[0]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (METRICS, r'"train_loss": [\d.]+', '"train_loss": NaN'),
        (TRAINING, r'"seconds": [\d.]+', '"seconds": Infinity'),
        (METRICS, r'"fired": \{.*?\}', '"fired": ["layer1.1.conv1"]'),
        (TRAINING, r'"seed": 0', '"sead": 0'),
        (TRAINING, r'"lr": [\d.]+', '"lr": "fast"'),
        (f"{EVALUATIONS}/{TEST}.json", r'"total": \d+', '"total": []'),
    ],
)
def test_nonsense_is_a_problem_and_no_crash(folder, name, old, new):
    path = folder / name
    text, count = re.subn(old, new, path.read_text())
    path.write_text(text)
    assert count and check(folder)
    assert read_result(folder, TEST).lines


def test_choices_of_an_epoch_stand_beside_the_last(folder):
    result = read_result(folder, TEST)
    correct = [row.tests[TEST].correct for row in result.rows]
    summary = result.summary
    assert summary["target_correct"] == correct[-1]
    assert summary["oracle_target_correct"] == max(correct)
    assert summary["oracle_epoch"] == correct.index(max(correct)) + 1
    held = [row.tests["art_painting-holdout-bn-source"].correct for row in result.rows]
    assert summary["selected_epoch"] == held.index(max(held)) + 1
