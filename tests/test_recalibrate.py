"""BatchNorm statistics for testing: measured anew on source images, shaped as in testing, and put back."""

import pytest
import record
import run
import torch
from config import Config, ConfigError, resolve
from methods import Method, RandomMaps
from test_run import no_pictures, rows_of, same_weights, tiny, weights_of  # noqa: F401
from torch import nn

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = IMAGES.split(4)


def model():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7)]
    return nn.Sequential(*parts)


def trained(method_class, **switches):
    config = Config(mode="random", layers=(1,), p_zero=(0.5,), amp="off", **switches)
    method = method_class(model(), config, torch.device("cpu"))
    method.update(IMAGES, torch.arange(12) % 7)
    return method


def test_statistics_are_plain_means_over_the_batches():
    method = trained(Method)
    norm, conv = method.model[1], method.model[0]
    weights = [p.clone() for p in method.model.parameters()]
    before = torch.get_rng_state()
    method.recalibrate(BATCHES)
    maps = [conv(batch).detach() for batch in BATCHES]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variance = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, method.model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("at_eval", ("off", "binarize", "on"))
def test_maps_are_shaped_as_in_testing(at_eval):
    method = trained(RandomMaps, at_eval=at_eval)
    shaped_mean = method.model[1].running_mean.clone()
    fired = method.fired()["0"]
    method.recalibrate(BATCHES)
    conv = method.model[0]
    unshaped = nn.functional.conv2d(IMAGES, conv.weight, conv.bias).detach()
    seen = {"off": unshaped, "binarize": (unshaped > 0).float()}
    if at_eval in seen:  # batches of one size: the mean of their means is the mean
        mean = seen[at_eval].mean((0, 2, 3))
        torch.testing.assert_close(method.model[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(method.model[1].running_mean, shaped_mean)
    assert method.fired()["0"] == fired + (0 if at_eval == "off" else len(BATCHES))


@pytest.mark.parametrize(
    "mode, test",
    [
        ("baseline", {"bn_recalibration": True}),
        ("da", {"bn_recalibration": True}),  # whose target pass reads the statistics
        ("random", {"bn_recalibration": False, "at_eval": "on"}),  # whose tests draw maps
        ("random", {"bn_recalibration": True, "at_eval": "on", "test_set": "source-train"}),
    ],
)
def test_testing_leaves_no_trace_in_training(mode, test, tmp_path, no_pictures, monkeypatch):  # noqa: F811
    tested, predict = [], Method.predict

    def seen(*arguments):
        tested[-1].append(predict(*arguments))
        return tested[-1][-1]

    monkeypatch.setattr(Method, "predict", seen)
    plain = {"bn_recalibration": False}
    folders = [tmp_path / "plain", tmp_path / "tested"]
    for folder, switches in zip(folders, (plain, plain | test), strict=True):
        tested.append([])
        assert run.main(tiny(folder, mode=mode, **switches)) == 0
    assert not any(torch.equal(a, b) for a, b in zip(*tested, strict=False))  # other tests
    a, b = folders
    assert [row["train_loss"] for row in rows_of(a)] == [row["train_loss"] for row in rows_of(b)]
    assert same_weights(weights_of(a), weights_of(b))
    states = [record.read_checkpoint(folder / "checkpoint.pt")["cpu_rng"] for folder in folders]
    assert torch.equal(*states)


def test_the_presets_of_the_reports_do_not_and_ours_does():
    data = {"data": "toy"}
    for preset in ("course-template", "report-a", "report-b"):
        assert not resolve(data | {"preset": preset, "mode": "random"})[0].bn_recalibration
    for mode in ("random", "da"):
        assert resolve(data | {"mode": mode})[0].bn_recalibration
    assert not resolve(data)[0].bn_recalibration
    assert resolve(data | {"bn_recalibration": True})[0].mode == "baseline"
    with pytest.raises(
        ConfigError, match="bn_recalibration: True is for modes baseline and random"
    ):
        resolve(data | {"mode": "adabn", "bn_recalibration": True})
