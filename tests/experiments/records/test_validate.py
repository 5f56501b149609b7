"""Everything in a record that can be computed again is, and what differs is named."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from domainshift import command, files
from domainshift.config import validated
from domainshift.distributed import parts
from domainshift.methods import method_named
from domainshift.records import results
from domainshift.records.results import read_evaluation, read_training, seal
from domainshift.records.schema import EVALUATIONS, METRICS, TRAINING, VERSION, Count
from domainshift.records.validate import (
    check,
    count_differences,
    held_out_of,
    last_pass,
    limits_of_maps,
    loss_faults,
    prediction_faults,
    rate_faults,
    read_result,
)
from domainshift.training import pictures

import fastshape

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
    ({"change_row": (1, {"run": "another"})}, r"epoch 1: run is 'another', not '\w{32}'"),
    ({"change_row": (1, {"skipped": 1}), "skipped": 0}, r"skipped is 0; the rest gives 1"),
    ({"versions": {}}, r"versions is {}; the rest gives"),
    ({"drop": True}, r"metrics.jsonl has 1 epochs; 4 updates take 2"),
    (
        {"held_out": [0] * 7},
        r"held_out is \[0, .*\]; holdout 0.1 of \[3, .*\] images holds out \[1, ",
    ),
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
    alone, beside = resealed_evaluation(folder, correct=more)
    assert f"correct is {more}, not {record.correct}" in alone
    assert f"epoch 2: test {TEST}: correct is {record.correct}; the record has {more}" in beside
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


# --- a training that grew, schedules and maps -------------------------------------------------


def test_a_training_that_grew_has_the_rates_of_its_length(tmp_path):
    """Five epochs drop the rate after four; six do so too, so five may grow to six."""
    words = (
        "--data toy --limit 2 --image-size 64 --batch-size 14 --device cpu --weights none --mode "
        "baseline --amp off --preset course-template --target sketch"
    ).split()
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", lambda *_: None)
        assert command.main([*words, "--epochs", "5", "--out", str(folder)]) == 0
        more = ["--epochs", "6", "--resume", "--out", str(folder)]
        assert command.main([*words, *more]) == 0
    _, rows = read_training(folder)
    assert [row.lr for row in rows] == pytest.approx([0.01] * 4 + [0.001] * 2)
    assert check(folder) == []


def config_with(**values):
    method = method_named(values.get("mode", "baseline"))
    return validated({"epochs": 30, "lr": 0.1, "gamma": 0.5, "step_fraction": 0.8} | values, method)


@pytest.mark.parametrize(
    "values, epochs, rates",
    [
        ({"epochs": 3}, [(3, 0)] * 3, [0.1, 0.1, 0.05]),  # int(0.8 * 3) = 2 epochs
        ({"epochs": 3, "amp": "float16"}, [(3, 2)] * 3, [0.1, 0.1, 0.05]),
        # an epoch whose every update was skipped does not count
        ({"epochs": 3, "amp": "float16"}, [(3, 3), (3, 1), (3, 0)], [0.1, 0.1, 0.1]),
        ({"epochs": 1}, [(3, 0)], [0.1]),
        # int(0.8 * 10) = 8 updates that moved the weights
        ({"epochs": None, "updates": 10}, [(3, 0), (3, 0), (3, 0), (1, 0)], [0.1, 0.1, 0.1, 0.05]),
        ({"epochs": None, "updates": 10}, [(3, 2), (3, 0), (3, 0), (1, 0)], [0.1] * 4),
        ({"mode": "dann", "dann_lr_factor": 3.0, "epochs": 3}, [(3, 0)] * 3, [0.1, 0.1, 0.05]),
        ({"epochs": 3, "gamma": 1.0}, [(3, 0)] * 3, [0.1, 0.1, 0.1]),
    ],
)
def test_rates_follow_from_the_schedule(finished, values, epochs, rates):
    """epochs: updates of each, and how many of them float16 skipped."""
    _, rows = read_training(finished)
    config = config_with(**values)
    made = [
        rows[0].model_copy(update={"lr": rate, "updates": updates, "skipped": skipped})
        for rate, (updates, skipped) in zip(rates, epochs, strict=True)
    ]
    assert list(rate_faults(config, made)) == []
    wrong = [made[0].model_copy(update={"lr": rates[0] * 1.001}), *made[1:]]
    ((rule, text),) = rate_faults(config, wrong)
    assert rule == "rates" and "lr is 0.1001; the switches give 0.1" in text


@pytest.mark.parametrize("unit", ["element", "channel", "block"])
@pytest.mark.parametrize("p_zero", [0.01, 0.5, 0.9])
def test_random_maps_are_within_the_limits_of_chance(unit, p_zero):
    """Three images of a small layer, where chance moves most."""
    config = config_with(
        mode="random", p_zero=p_zero, mask_unit=unit, block_size=3 if unit == "block" else None
    )
    shape, torch_state = (16, 7, 7), torch.random.get_rng_state()
    limits = limits_of_maps(config, ["layer"], {"layer": [shape]}, 3)["layer"]
    side = {"element": 1, "channel": None, "block": 3}[unit]
    for _ in range(50):
        density = fastshape.random_blocks((3, *shape), p_zero, side).density()
        assert limits.fault(density) is None
    torch.random.set_rng_state(torch_state)
    if unit == "element" and p_zero == 0.5:
        assert 0.3 < limits.least < limits.most < 0.7


@pytest.mark.parametrize(
    "images, accumulate, expected", [(8, 1, 8), (8, 3, 2), (7, 3, 1), (5, 5, 1)]
)
def test_images_of_the_last_pass(images, accumulate, expected):
    assert last_pass(images, accumulate) == expected == parts(images, accumulate)[-1].whole


# --- tests of the last epoch, losses and logits -----------------------------------------------


def test_the_last_epoch_has_the_figures_of_the_record(folder):
    record, rows = read_training(folder)
    for name, value in (("correct", 0), ("loss", 9.0), ("batch_loss", 9.0), ("total", 3)):
        counts = rows[-1].tests | {TEST: rows[-1].tests[TEST].model_copy(update={name: value})}
        problems = resealed_training(folder, change_row=(2, {"tests": counts}))
        assert any(f"epoch 2: test {TEST}: {name} is {value}" in line for line in problems)


def test_a_test_that_was_made_again_elsewhere_may_round_otherwise(folder):
    record, rows = read_training(folder)
    there = read_evaluation(folder, TEST)
    versions = there.versions | {"device": "another"}
    loss = there.loss * 1.001
    count = rows[-1].tests[TEST]
    rows[-1] = rows[-1].model_copy(
        update={"tests": {TEST: count.model_copy(update={"loss": loss, "correct": there.correct})}}
    )
    assert list(count_differences(record, rows, there))
    elsewhere = there.model_copy(update={"versions": versions})
    assert list(count_differences(record, rows, elsewhere)) == []
    far = there.model_copy(update={"versions": versions, "loss": loss * 2})
    assert any("loss is" in words for _, words in count_differences(record, rows, far))


def test_losses_that_are_not_those_of_the_logits(folder):
    record = read_evaluation(folder, TEST)
    problems = resealed_evaluation(folder, loss=record.loss + 0.1)
    assert any(re.search(r"loss is \S+; the logits give", line) for line in problems)
    problems = resealed_evaluation(folder, loss=record.loss, batch_loss=record.batch_loss * 1.1)
    assert any(re.search(r"batch_loss is \S+; the logits give", line) for line in problems)


@pytest.mark.parametrize(
    "loss, batch_loss, total, sound",
    [
        (2.0, 0.25, 16, True),  # whole batches of 8
        (2.0, 0.2501, 16, False),
        (2.0, 0.3, 21, True),  # five images in the last batch: 0.25 to 0.4
        (2.0, 0.41, 21, False),
        (2.0, 0.24, 21, False),
        (2.0, 0.5, 4, True),
        (2.0, 0.25, 4, False),
        (-2.0, -0.25, 16, False),
    ],
)
def test_the_loss_in_the_reports_unit_is_within_its_bounds(loss, batch_loss, total, sound):
    count = Count(correct=1, total=total, loss=loss, batch_loss=batch_loss)
    assert (list(loss_faults(count, 8)) == []) == sound


def test_predictions_that_are_not_the_largest_logit(folder):
    record = read_evaluation(folder, TEST)
    arrays = results.read_predictions(folder, TEST)
    labels, predicted = arrays["labels"], arrays["predicted"]
    logits = np.eye(7, dtype=np.float16)[(predicted + 1) % 7]
    faults = list(prediction_faults(arrays | {"logits": logits}, record, 8))
    assert f"{len(labels)} of {len(labels)} predictions are not the largest logit" in faults
    (fault, *_) = prediction_faults(arrays | {"labels": labels[::-1]}, record, 8)
    assert fault == "the labels are not in the order of the images"
    assert list(prediction_faults(arrays, record, 8)) == []


@pytest.mark.parametrize("counts, fraction", [((3, 3), 0.1), ((25, 5, 2), 0.1), ((4, 9), 0.5)])
def test_held_out_images_are_those_of_the_split(counts, fraction):
    held = held_out_of(counts, fraction)
    assert held == [min(max(int(fraction * n + 0.5), 1), n - 1) for n in counts]


def test_a_class_that_gets_nearly_every_answer_is_a_collapse(folder):
    result = read_result(folder, TEST)
    for confusion, words in (
        ([[20, 1], [7, 0]], "collapsed: 96.4 % of the images of sketch are called"),
        ([[20, 0], [7, 0]], "collapsed: every image of sketch is called"),
        ([[20, 3], [7, 0]], None),  # exactly 90 %
    ):
        matrix = [row + [0] * 5 for row in confusion] + [[0] * 7] * 5
        figures = results.figures(matrix, result.evaluation.classes)
        test = result.evaluation.model_copy(update=figures | {"confusion": matrix})
        warnings = results.summary(replace(result, evaluation=test))["warnings"]
        assert (
            any(words in line for line in warnings)
            if words
            else not any("collapsed" in w for w in warnings)
        )


def test_the_largest_share_of_the_predictions():
    assert results.largest_predicted_share([[3, 1], [4, 0]]) == (7 / 8, 0)
    assert results.largest_predicted_share([[1, 1], [1, 1]]) == (0.5, 0)
    assert results.largest_predicted_share([[0, 2], [0, 5]]) == (1.0, 1)
