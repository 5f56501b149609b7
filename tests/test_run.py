"""The main job: three modes, what each leaves behind, and what it refuses."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import methods
import numpy as np
import pytest
import record
import run
import torch
import train as training
import yaml
from config import Config, ConfigError, resolve
from data import CLASSES, load_domain
from rich.console import Console
from screen import Screen
from torch import nn

TINY = {"data": "toy", "limit": 3, "image_size": 32, "epochs": 2, "batch_size": 8, "device": "cpu"}
TOTAL = 21  # images of each domain
SHAPED = {"baseline": {}, "random": {"layers": [1, 4]}, "da": {"layers": [4, 13]}}


def flags(**switches):
    """Switches as they are typed: {"p_zero": [0.1, 0.2]} -> ["--p-zero", "0.1", "0.2"]."""
    words = []
    for name, value in switches.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny(out, **switches):
    return flags(**TINY | switches, out=out)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return record.read_checkpoint(folder / "checkpoint.pt")["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run of each mode."""
    folder = tmp_path_factory.mktemp("runs")
    for mode, shaping in SHAPED.items():
        assert run.main(tiny(folder / mode, mode=mode, **shaping)) == 0
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose pictures nobody looks at: drawing them takes half of such a run's time."""
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    monkeypatch.setattr(run.pictures, "maps", lambda *_: None)


# --- a finished run ---


def test_a_pairing_that_lets_labels_in_is_said_with_its_share(tmp_path, no_pictures, capsys):
    """Lists sorted by class, of the same length: image i % n_target is of image i's class."""
    for pairing, apply_maps, share in (
        ("modulo", True, 100),
        ("modulo", False, 0),
        ("random", True, 0),
    ):
        folder = tmp_path / f"{pairing}-{apply_maps}"
        switches = {"mode": "da", "epochs": 1, "holdout": 0, "pairing": pairing}
        if not apply_maps:
            switches |= {"apply_maps": False, "record_mode": "train"}
        assert run.main(tiny(folder, **switches)) == 0
        said = [text for text in summary_of(folder)["warnings"] if "pairing" in text]
        assert len(said) == bool(share)
        if share:
            assert f"{share} % of the images" in said[0] and "by chance it would be 14 %" in said[0]
            assert said[0] in " ".join(capsys.readouterr().out.split())


def test_the_share_of_pairs_of_one_class_is_that_of_the_epochs_pairs():
    source, target = np.array([0, 0, 0, 1]), np.array([0, 1, 1])
    modulo = replace(Config(), pairing="modulo")
    assert training.same_class(modulo, source, target) == (25.0, pytest.approx(50 * 5 / 6))
    alike = [training.same_class(replace(Config(), seed=s), source, target)[0] for s in range(200)]
    assert 35 < np.mean(alike) < 50


@pytest.mark.parametrize("mode", SHAPED)
def test_a_run_leaves_its_record(runs, mode):
    folder = runs / mode
    names = {"config.yaml", "metrics.jsonl", "summary.json", "checkpoint.pt", "curves.png"}
    names |= {"maps.png"} if mode != "baseline" else set()
    assert {path.name for path in folder.iterdir()} == names
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    required = (
        "source target mode layers seed epochs target_correct target_total target_accuracy "
        "macro_accuracy per_class majority_rate collapsed source_accuracy seconds "
        "images_per_second versions warnings config"
    )
    summary = summary_of(folder)
    assert set(required.split()) <= set(summary)
    assert summary["target_total"] == TOTAL
    assert summary["target_accuracy"] == 100 * summary["target_correct"] / TOTAL
    assert set(summary["per_class"]) == set(CLASSES)
    assert {"fastshape", "torch", "torchvision", "python", "backend"} <= set(summary["versions"])
    assert any("not PACS" in warning for warning in summary["warnings"])
    assert summary["layers"] == SHAPED[mode].get("layers", [])


@pytest.mark.parametrize("mode", SHAPED)
def test_every_epoch_tests_the_whole_target(runs, mode):
    rows = rows_of(runs / mode)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["target_total"] == np.sum(row["target_confusion"]) == TOTAL
        assert np.sum(row["target_confusion"], axis=1).tolist() == [3] * 7
        assert row["source_train_total"] + row["holdout_total"] == TOTAL
        assert row["images_per_second"] > 0
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.002])  # int(0.8 * 2) epochs


def test_chosen_layers_were_shaped_once_per_update(runs):
    updates = 2  # of 14 images, 8 at a time: one of each class is held out
    assert [row["fired"] for row in rows_of(runs / "random")] == [
        {"conv1": updates, "layer1.1.conv1": updates}
    ] * 2
    assert rows_of(runs / "da")[0]["fired"] == {
        "layer1.1.conv1": updates,
        "layer3.0.downsample.0": updates,
    }
    assert rows_of(runs / "baseline")[0]["fired"] == {}


def test_the_modes_differ_from_the_first_epoch(runs):
    losses = {rows_of(runs / mode)[0]["train_loss"] for mode in SHAPED}
    assert len(losses) == 3


def test_the_recorded_configuration_runs_again_to_the_same_bits(runs, tmp_path, no_pictures):
    saved = runs / "da" / "config.yaml"
    switches = set(yaml.safe_load(saved.read_text())) - {"warnings"}
    assert switches == set(Config.__dataclass_fields__)
    assert run.main(["--config", str(saved), "--out", str(tmp_path / "again")]) == 0
    assert same_weights(weights_of(runs / "da"), weights_of(tmp_path / "again"))


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("mode: da\nlayers: [4]\nbatch-size: 8\nlr: 1e-3\n")
    values, _, _ = run.said(["--config", str(path), "--layers", "7", "9"])
    config, _ = resolve(values | {"data": "toy"})
    assert (config.mode, config.layers, config.batch_size, config.lr) == ("da", (7, 9), 8, 1e-3)


def test_default_folder_name(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    assert run.main(flags(**TINY | {"epochs": 1, "mode": "da"})) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("da-art_painting-sketch-4-s0-")


def test_the_screen_shows_the_result_in_plain_lines(tmp_path, capsys, no_pictures):
    assert run.main(tiny(tmp_path / "r", preset="report-a", mode="random", epochs=1)) == 0
    out = capsys.readouterr().out
    assert "warning: toy data" in out
    assert "warning: INVALID FIGURE" in out
    assert "\x1b" not in out  # no terminal here: no colours, no bars
    summary = summary_of(tmp_path / "r")
    assert f"({summary['target_correct']} of {TOTAL}, epoch 1)" in out
    # report A's mistake is shown beside the target's figure, never in its place
    assert summary["invalid_test_total"] == TOTAL
    assert (summary["target"], summary["target_total"]) == ("sketch", TOTAL)
    assert len(summary["layer_names"]) == 6


def test_a_terminal_gets_a_bar_with_speed_and_time_left():
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))
    with Screen(console).progress("epoch 1/2", 32) as advance:
        advance(16)
    shown = console.export_text()
    assert "16/32" in shown
    assert "images/s" in shown


@pytest.mark.parametrize("preset", ["course-template", "report-b"])
@pytest.mark.parametrize("mode", ["random", "da"])
def test_presets_run(preset, mode, tmp_path, no_pictures):
    assert run.main(tiny(tmp_path / "r", preset=preset, mode=mode, epochs=1)) == 0
    assert summary_of(tmp_path / "r")["source_accuracy"] is None  # nothing held out


# --- target labels ---


class Untouchable:
    """Labels that fail the test at any use."""

    def __getattribute__(self, name):
        raise AssertionError(f"target labels were used: {name}")

    def _refuse(self, *_):
        raise AssertionError("target labels were used")

    __getitem__ = __len__ = __iter__ = __array__ = __eq__ = __bool__ = _refuse
    __hash__ = object.__hash__


def with_target_labels(monkeypatch, change):
    def load(data, name, **options):
        domain = load_domain(data, name, **options)
        return replace(domain, labels=change(domain.labels)) if name == "sketch" else domain

    monkeypatch.setattr(run, "load_domain", load)


@pytest.mark.parametrize("mode", SHAPED)
def test_training_does_not_touch_target_labels(monkeypatch, tmp_path, mode):
    with_target_labels(monkeypatch, lambda labels: Untouchable())
    config, _ = resolve(TINY | {"mode": mode, "epochs": 1} | SHAPED[mode])
    experiment = run.build(config)
    trained = []

    def no_test(method, _screen):
        trained.append(method.passes)
        return {"target_confusion": [[1] * 7] * 7}

    training.train(experiment.method, experiment.images, no_test, config, tmp_path, Screen())
    assert trained == [2]
    with pytest.raises(AssertionError, match="target labels were used"):  # the trap works
        experiment.evaluate(experiment.method, Screen())


@pytest.mark.parametrize("mode", ["random", "da"])
def test_other_target_labels_give_the_same_weights(monkeypatch, runs, tmp_path, mode, no_pictures):
    with_target_labels(monkeypatch, lambda labels: (labels + 1) % 7)
    assert run.main(tiny(tmp_path / "r", mode=mode, **SHAPED[mode])) == 0
    assert same_weights(weights_of(runs / mode), weights_of(tmp_path / "r"))
    shifted = np.roll(rows_of(runs / mode)[-1]["target_confusion"], 1, axis=0)
    assert rows_of(tmp_path / "r")[-1]["target_confusion"] == shifted.tolist()


# --- order, pairs, workers ---


def images_of(config):
    return run.build(config).images


def tiny_config(**switches):
    return resolve(TINY | {"mode": "da", "layers": [4]} | switches)[0]


def test_each_epoch_uses_every_source_image_once():
    orders = [training.epoch_order(tiny_config(), epoch, 10, 7) for epoch in (1, 2)]
    for source, target in orders:
        assert sorted(source) == list(range(10))
        assert set(target) == set(range(7))  # the whole target, three of it twice
    assert not np.array_equal(orders[0][0], orders[1][0])
    assert not np.array_equal(orders[0][1], orders[1][1])


def test_random_pairs_are_independent_of_the_source_order():
    source, target = training.epoch_order(tiny_config(), 1, 50, 50)
    assert sorted(target) == list(range(50))
    assert not np.array_equal(source, target)


def test_modulo_pairs_by_position():
    source, target = training.epoch_order(tiny_config(pairing="modulo"), 1, 10, 4)
    assert target.tolist() == [i % 4 for i in source]


def test_the_last_smaller_batch_is_used_and_paired():
    batches = list(images_of(tiny_config(holdout=0)).epoch(tiny_config(holdout=0), 1, True))
    assert [len(images) for images, _, _ in batches] == [8, 8, 5]
    assert all(len(target) == len(images) for images, _, target in batches)


def test_workers_change_no_bit_and_draw_no_random_number():
    config = tiny_config()
    images = images_of(config)
    before = torch.get_rng_state()
    alone = list(images.epoch(config, 1, True))
    helped = list(images.epoch(replace(config, workers=2), 1, True))
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_target_images_are_augmented_unless_told_otherwise():
    config = tiny_config(target_transform="test")
    images = images_of(config)

    def target(config, epoch):
        order = training.epoch_order(config, epoch, len(images.source_indices), 14)[1]
        shown = torch.cat([t for _, _, t in images.epoch(config, epoch, True)])
        return shown[np.argsort(order, kind="stable")[:1]]  # the first target image that came

    plain, again = target(config, 1), target(config, 1)
    assert torch.equal(plain, again)
    assert not torch.equal(plain, target(replace(config, target_transform="train"), 1))


def test_one_image_alone_is_refused_where_batchnorm_needs_two():
    images = images_of(tiny_config(holdout=0))  # 21 images
    with pytest.raises(ConfigError, match="batch_size: 20 .*one of 21 training images alone"):
        images.check_batches(tiny_config(holdout=0, batch_size=20))
    images.check_batches(tiny_config(holdout=0, batch_size=20, image_size=64))
    with pytest.raises(ConfigError, match="accumulate 6 .*one of 21"):
        images.check_batches(tiny_config(holdout=0, accumulate=6))


# --- updates ---


def linear_method(accumulate, **switches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    config = Config(device="cpu", amp="off", batch_size=10, lr=0.1, accumulate=accumulate)
    return methods.Method(model, replace(config, **switches), torch.device("cpu"))


def batch_of_ten():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(10, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (10,), generator=generator)


@pytest.mark.parametrize("accumulate", [2, 4, 10])
def test_accumulation_weighs_every_image_alike(accumulate):
    images, labels = batch_of_ten()
    whole, split = linear_method(1), linear_method(accumulate)
    for _ in range(3):
        a, b = whole.update(images, labels), split.update(images, labels)
        assert float(a.loss_sum) == pytest.approx(float(b.loss_sum))
        assert (int(a.correct), a.images) == (int(b.correct), b.images)
    assert whole.passes == 3
    assert split.passes == 3 * accumulate
    assert torch.allclose(whole.model[1].weight, split.model[1].weight, rtol=1e-12, atol=1e-14)


def test_the_step_is_that_of_the_protocol():
    images, labels = batch_of_ten()
    method = linear_method(1)
    weight = method.model[1].weight.detach().clone().requires_grad_()
    bias = method.model[1].bias.detach().clone()
    loss = nn.functional.cross_entropy(images.flatten(1) @ weight.T + bias, labels)
    (grad,) = torch.autograd.grad(loss, weight)
    method.update(images, labels)
    grad = grad + 5e-4 * weight  # weight decay; Nesterov's first step is 1 + momentum times it
    expected = weight - 0.1 * (1 + 0.9) * grad
    assert torch.allclose(method.model[1].weight, expected, rtol=1e-12)


def test_evaluation_is_in_eval_mode_and_counts_every_image():
    config = tiny_config()
    experiment = run.build(config)
    before = {k: v.clone() for k, v in experiment.method.model.state_dict().items()}
    counts = experiment.evaluate(experiment.method, Screen())
    assert np.sum(counts["target_confusion"]) == TOTAL
    assert same_weights(before, experiment.method.model.state_dict())  # BatchNorm included
    assert not experiment.method.model.training


@pytest.mark.parametrize("mode", ["random", "da"])
def test_shaping_that_does_not_happen_stops_the_run(monkeypatch, tmp_path, mode, capsys):
    whole = methods.attach

    def detached(model, config):
        attachment = whole(model, config)
        attachment.remove()
        attachment.record = lambda *_: None
        return attachment

    monkeypatch.setattr(methods, "attach", detached)
    assert run.main(tiny(tmp_path / "r", mode=mode, **SHAPED[mode])) == 1
    assert re.search("layer .*conv1 was shaped 0 times in 2 training", capsys.readouterr().err)
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert run.main(tiny(tmp_path / "r", lr=1e30)) == 1
    assert "the training loss of epoch" in capsys.readouterr().err


def test_bfloat16_autocast_trains(tmp_path, no_pictures):
    assert run.main(tiny(tmp_path / "r", amp="bfloat16", epochs=1, mode="random", layers=[4])) == 0
    assert summary_of(tmp_path / "r")["config"]["amp"] == "bfloat16"


# --- bad input ---


REFUSED = [
    (["--target", "art_painting"], r"target: 'art_painting' is also the source"),
    (["--mode", "da", "--layers", "21"], r"layers: there is no conv 21; this model has 1 conv1, 2"),
    (["--mode", "da", "--layers", "layer9"], r"layers: there is no module 'layer9'"),
    (["--mode", "da", "--layers", "layer9.*"], r"layers: pattern 'layer9\.\*' matches no conv"),
    (["--mode", "da", "--layers", "4", "4"], r"layers: 'layer1\.1\.conv1' is named twice"),
    (["--mode", "random", "--p-zero", "1"], r"p_zero: '1' is not allowed; .*0 <= p_zero < 1"),
    (
        ["--mode", "random", "--layers", "1", "2", "--p-zero", "0.1", "0.2", "0.3"],
        r"p_zero: 3 values for 2 layers",
    ),
    (["--epochs", "none"], r"epochs: 'none' is not allowed; allowed: a whole number"),
    (["--weights", "gone.pth"], r"weights: no file .*gone\.pth; allowed: imagenet \| none"),
    (["--data", "nowhere", "--weights", "none"], r"nowhere does not exist"),
    (["--config", "gone.yaml"], r"gone\.yaml"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    start = flags(**TINY | {"out": tmp_path / "r"})
    status = run.main([*start, *arguments])
    captured = capsys.readouterr()
    assert status != 0
    assert len(captured.err.strip().splitlines()) == 1
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "r").exists()
    assert status == (1 if "gone.yaml" in message.replace("\\", "") else 2)


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--layer", "4"])  # no abbreviations
    assert caught.value.code == 2
    assert "unrecognized arguments: --layer 4" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(runs, capsys):
    folder = runs / "baseline"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run.main(tiny(folder)) == 2
    assert "already holds files; continue that run with --resume" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- real images ---

PACS = os.environ.get("FASTSHAPE_PACS", "")


@pytest.mark.skipif(not PACS, reason="set FASTSHAPE_PACS to a folder with PACS")
def test_real_images(tmp_path):
    arguments = tiny(tmp_path / "r", mode="da", layers=[4], target="cartoon", epochs=1)
    arguments += ["--data", PACS, "--weights", "none", "--cache", str(tmp_path / "cache")]
    assert run.main(arguments) == 0
    summary = summary_of(tmp_path / "r")
    assert summary["target_total"] == TOTAL
    assert not any("toy" in warning for warning in summary["warnings"])
    assert Path(summary["config"]["data"]).is_absolute()


def test_shaping_after_the_classifier_is_drawn_too(tmp_path):
    switches = {"mode": "random", "layers": "fc", "p_zero": 0.3, "epochs": 1}
    assert run.main(tiny(tmp_path / "a", **switches)) == 0
    assert (tmp_path / "a" / "summary.json").exists() and (tmp_path / "a" / "maps.png").exists()


def test_a_picture_that_fails_costs_no_result(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr(run.pictures, "curves", fail)
    assert run.main(tiny(tmp_path / "a", mode="baseline", epochs=1)) == 0
    assert (tmp_path / "a" / "summary.json").exists()
    assert "a picture could not be drawn: no ink" in capsys.readouterr().out


def test_warnings_survive_a_resume_and_a_run_from_the_record(tmp_path, no_pictures):
    switches = {"mode": "baseline", "epochs": 1, "limit": 3, "device": "cpu", "image_size": 32}
    folder = tmp_path / "a"
    assert run.main(flags(**switches, data="toy", out=folder)) == 0
    expected = summary_of(folder)["warnings"]
    assert any("toy defaults replace" in warning for warning in expected)
    (folder / "summary.json").unlink()
    assert run.main(["--resume", "--out", str(folder)]) == 0
    assert summary_of(folder)["warnings"] == expected
    again = ["--config", str(folder / "config.yaml"), "--out", str(tmp_path / "b")]
    assert run.main(again) == 0
    assert summary_of(tmp_path / "b")["warnings"] == expected
