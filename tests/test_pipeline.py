"""The pipeline on the device makes the reference's training and test images, a batch at a time."""

import gc
import json
from dataclasses import replace

import config as configuration
import device_images
import numpy as np
import pictures
import pytest
import record
import run
import torch
import train as training
from config import resolve
from data import LabelledImages, UnlabelledImages, load_domain, test_transform, train_transform
from device_images import DeviceBatches, crops, resized
from PIL import Image
from screen import Screen

TINY = {"data": "toy", "limit": 3, "image_size": 32, "epochs": 2, "batch_size": 8, "device": "cpu"}
TIMES = {"seconds", "train_seconds", "images_per_second"}
LEVEL = 1 / 255


def config_of(**switches):
    return resolve(TINY | {"pipeline": "device"} | switches)[0]


def main(out, **switches):
    words = [f"--{k.replace('_', '-')} {v}" for k, v in (TINY | switches | {"out": out}).items()]
    return run.main(" ".join(words).split())


def result_of(folder):
    """Rows without times, and all tensors of the checkpoint that training moves."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    state = record.read_checkpoint(folder / "checkpoint.pt")
    momenta = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    return rows, [*state["model"].values(), *momenta, state["cpu_rng"]]


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    monkeypatch.setattr(run.pictures, "maps", lambda *_: None)


@pytest.fixture(scope="module")
def toy():
    return load_domain("toy", "photo")


def noise(n, side):
    """uint8 (n, side, side, 3): every rounding is met in it, and no error hides."""
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def both(dataset, config):
    """The dataset by the reference and by the device pipeline, in a shuffled order."""
    order = np.random.default_rng(1).permutation(len(dataset))
    batches = [
        list(training.batches(dataset, order, replace(config, pipeline=pipeline)))
        for pipeline in ("reference", "device")
    ]
    assert [len(b[0]) for b in batches[0]] == [len(b[0]) for b in batches[1]]
    return batches


# --- what is resampled ---


@pytest.mark.parametrize("size", (32, 96, 117))
def test_a_box_is_resized_as_by_pil_bit_for_bit(size):
    """Columns first, then rows, both rounded: said to PIL by two calls, as its own order varies."""
    side = 110
    rng = np.random.default_rng(2)
    images = noise(60, side)
    height, width = rng.integers(1, side + 1, (2, len(images)))
    height[:3], width[:3] = (side, size if size < side else 1, side), (side, side, 1)
    top, left = (rng.integers(0, side - length + 1) for length in (height, width))
    flip = rng.integers(0, 2, len(images))
    box = [torch.from_numpy(v) for v in (top, left, height, width, flip)]
    stored = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 1, 3, 2)))
    result = resized(stored, size, *box).permute(0, 1, 3, 2).numpy()
    for image, t, x, h, w, turned, actual in zip(
        images, top, left, height, width, flip, result, strict=True
    ):
        cut = Image.fromarray(image[t : t + h, x : x + w])
        bilinear = Image.Resampling.BILINEAR
        expected = np.asarray(cut.resize((size, h), bilinear).resize((size, size), bilinear))
        np.testing.assert_array_equal(actual, expected[:, ::-1] if turned else expected)


def test_a_size_too_small_for_exact_sums_is_refused():
    with pytest.raises(device_images.DataError, match="image_size is 32, but must be at least 34"):
        device_images.taps(500, 32)


@pytest.mark.parametrize("size", (32, 96, 224))
def test_crops_and_flips_are_those_of_the_reference(size):
    n = 4000
    dataset = UnlabelledImages(noise(n, 1), range(n), train_transform(size), seed=3, epoch=7)
    resize, crop, flip, *_ = dataset.transform.transforms
    blank = torch.empty(3, resize.size, resize.size)
    expected = []
    state = torch.get_rng_state()
    actual = crops(dataset, list(range(n)))
    assert torch.equal(torch.get_rng_state(), state)  # random maps draw from that stream
    for index in range(n):
        dataset.start_draws(index)
        box = crop.get_params(blank, crop.scale, crop.ratio)
        expected.append([*box, int(torch.rand(1) < flip.p)])
    torch.set_rng_state(state)
    # torch's uniform_ may round a product where this processor has no fused multiply-add
    different = (actual != np.array(expected)).any(1)
    assert different.mean() <= 1e-3
    whole = (actual[:, 2:4] == resize.size).all(1)
    assert whole.any() and not actual[whole][:, :2].any()  # ten tries in vain are among them


# --- whole transforms ---


@pytest.mark.parametrize("size", (32, 64, 80))
def test_training_images_are_the_references_within_one_level(toy, size):
    """Each pipeline is within 1/2 level of the exact value before the last rounding: 1 apart."""
    config = config_of(image_size=size)
    dataset = LabelledImages(toy, range(0, 280, 3), train_transform(size), seed=4, epoch=2)
    reference, device = both(dataset, config)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(reference, device, strict=True))
    reference, device = (torch.cat([b[0] for b in batches]) for batches in (reference, device))
    assert device.dtype == torch.float32 and device.is_contiguous()
    _, _, _, _, normalize = dataset.transform.transforms
    levels = (device - reference).abs() * torch.tensor(normalize.std).view(3, 1, 1) / LEVEL
    assert levels.max() < 1.001
    # most have PIL's columns first too, and then nothing differs
    assert (levels.flatten(1).amax(1) == 0).float().mean() > 0.6
    assert (reference.diff(dim=-1) != 0).any()


@pytest.mark.parametrize("size", (32, 64, 80))
def test_test_images_are_the_references_bit_for_bit(toy, size):
    dataset = UnlabelledImages(toy.images, range(5, 60), test_transform(size))
    reference, device = both(dataset, config_of(image_size=size))
    assert all(torch.equal(a, b) for a, b in zip(reference, device, strict=True))


def test_pacs_as_well(pacs, tmp_path):
    domain = load_domain(pacs, "art_painting", limit=3, cache=tmp_path)
    config = config_of(data=str(pacs), image_size=224)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for transform, levels in ((train_transform, 1.001), (test_transform, 0)):
        reference, device = both(LabelledImages(domain, range(21), transform(224)), config)
        for (a, _), (b, _) in zip(reference, device, strict=True):
            assert ((a - b).abs() * std / LEVEL).max() <= levels


def test_statistics_of_independent_draws_agree():
    """Mean and deviation of a pixel, area, aspect and flips: other seeds, the same distribution."""
    n, size = 2000, 32
    ramp = np.linspace(20, 235, 48).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1, None]), -1)
    images = np.broadcast_to(picture, (n, *picture.shape)).copy()
    reference = UnlabelledImages(images, range(n), train_transform(size), seed=1)
    device = UnlabelledImages(images, range(n), train_transform(size), seed=2)
    a = torch.stack([reference[i] for i in range(n)])[..., ::8, ::8].flatten(1).double()
    b = torch.cat(list(DeviceBatches(device, [range(n)], config_of())))
    b = b[..., ::8, ::8].flatten(1).double()
    # 48 pixels: 5 standard errors of a difference of means, one in a million and a half each
    error = (a.var(0) / n + b.var(0) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    fourth = [((x - x.mean(0)) ** 4).mean(0) for x in (a, b)]
    error = sum((m - x.var(0) ** 2) / n for m, x in zip(fourth, (a, b), strict=True)).sqrt()
    assert ((a.var(0) - b.var(0)).abs() < 5 * error).all()

    # the boxes: two-sample Kolmogorov-Smirnov, 1.95 sqrt(2/n) is its 0.1 % point
    _, crop, _, *_ = reference.transform.transforms
    blank = torch.empty(3, 37, 37)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = np.array([crop.get_params(blank, crop.scale, crop.ratio) for _ in range(n)])
    ours = crops(device, range(n))
    assert abs(ours[:, 4].mean() - 0.5) < 4 * np.sqrt(0.25 / n)
    for value in (lambda c: c[:, 2] * c[:, 3], lambda c: c[:, 2] / c[:, 3], lambda c: c[:, 0]):
        x, y = np.sort(value(drawn)), np.sort(value(ours))
        at = np.concatenate([x, y])
        apart = np.searchsorted(x, at, "right") - np.searchsorted(y, at, "right")
        assert np.abs(apart).max() / n < 1.95 * np.sqrt(2 / n)


def test_a_batch_depends_on_seed_epoch_and_image_alone(toy):
    def made(parts, **where):
        dataset = UnlabelledImages(toy.images, range(40), train_transform(32), **where)
        return torch.cat(list(DeviceBatches(dataset, parts, config_of())))

    first = made([range(8), range(8, 12)], seed=1, epoch=1)
    assert torch.equal(made([range(12)], seed=1, epoch=1), first)
    assert torch.equal(made([[11, 0, 5]], seed=1, epoch=1), first[[11, 0, 5]])
    assert not torch.equal(made([range(12)], seed=1, epoch=2), first)
    assert not torch.equal(made([range(12)], seed=2, epoch=1), first)


def test_autocast_around_it_rounds_nothing(toy):
    """BatchNorm is measured anew with a loader that is read under autocast."""
    dataset = UnlabelledImages(toy.images, range(8), train_transform(32))
    loader = DeviceBatches(dataset, [range(8)], config_of())
    (plain,) = loader
    device_images._prepared.clear()
    with torch.autocast("cpu", torch.bfloat16):
        (within,) = loader
    assert torch.equal(within, plain)


def test_images_stay_on_the_device_as_long_as_they_are_used(toy):
    images = toy.images.copy()
    before = set(device_images._prepared)
    list(DeviceBatches(UnlabelledImages(images, [0], test_transform(32)), [[0]], config_of()))
    (key,) = set(device_images._prepared) - before
    stored = device_images._prepared[key]
    assert stored.dtype == torch.uint8 and stored.shape == (280, 32, 3, 32)
    list(DeviceBatches(UnlabelledImages(images, [0], test_transform(32)), [[0]], config_of()))
    assert device_images._prepared[key] is stored
    del images
    gc.collect()
    assert key not in device_images._prepared


# --- whole runs ---


@pytest.mark.parametrize(
    "mode",
    (
        {"mode": "baseline", "holdout": 0.34, "test_set": "source-train"},
        {"mode": "da", "layers": 4, "target_transform": "test"},
        {"mode": "da", "layers": 4, "mask_sources": "cartoon,photo", "target": "sketch"},
        {"mode": "adabn"},
    ),
    ids=lambda switches: "-".join(switches),
)
def test_every_batch_of_a_run_is_the_references(mode, monkeypatch):
    """All that the method sees in an epoch and its tests, in order, within a level."""
    seen = {}
    for pipeline in ("reference", "device"):
        config = config_of(pipeline=pipeline, **mode)
        experiment = run.build(config)
        seen[pipeline] = list(experiment.images.epoch(config, 1, experiment.method.uses_target))
        seen[pipeline].append(tuple(experiment.images.plain(config)))
        shown = []
        monkeypatch.setattr(
            experiment.method,
            "predict",
            lambda images, start, shown=shown: shown.append(images) or torch.zeros(len(images), 7),
        )
        seen[f"counts {pipeline}"] = experiment.evaluate(experiment.method, Screen())
        seen[pipeline].append(tuple(shown))
    assert seen["counts device"] == seen["counts reference"]
    for a, b in zip(seen["reference"], seen["device"], strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or (x - y).abs().max() < 1.001 * LEVEL / 0.224


def test_a_run_stopped_and_resumed_ends_the_same(tmp_path, monkeypatch, no_pictures):
    switches = {"pipeline": "device", "mode": "random", "layers": "1 4", "at_eval": "on"}
    assert main(tmp_path / "whole", **switches) == 0
    save = training.save_checkpoint

    def dies(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", dies)
    assert main(tmp_path / "parts", **switches) == run.INTERRUPTED
    monkeypatch.setattr(training, "save_checkpoint", save)
    assert run.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    (rows, tensors), (others, other) = (result_of(tmp_path / name) for name in ("whole", "parts"))
    assert rows == others and len(rows) == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors, other, strict=True))


def test_a_toy_run_learns_as_with_the_reference(tmp_path, no_pictures):
    last = {}
    for pipeline in ("reference", "device"):
        folder = tmp_path / pipeline
        switches = {"limit": 20, "epochs": 4, "batch_size": 16, "lr": 0.02, "target": "cartoon"}
        assert main(folder, pipeline=pipeline, **switches) == 0
        last[pipeline] = result_of(folder)[0][-1]
    a, b = last["reference"], last["device"]
    # rounding apart, the same training: 126 images, of which a seventh is right by chance
    assert min(a["source_train_accuracy"], b["source_train_accuracy"]) > 2 * 100 / 7
    assert abs(a["source_train_accuracy"] - b["source_train_accuracy"]) < 15


def test_memory_too_small_names_the_way_out(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_images, "_resize_all", full)
    assert main(tmp_path / "run", pipeline="device") == run.BAD_INPUT
    said = capsys.readouterr().err
    assert "21 images of 37 x 37 pixels do not fit into the memory of cpu" in said
    assert "--pipeline reference" in said


# --- switches ---


def test_what_auto_means_on_each_device(monkeypatch):
    automatic = {"pipeline": "auto", "memory_format": "auto"}
    config = config_of(**automatic)
    assert (config.pipeline, config.memory_format) == ("reference", "contiguous")
    monkeypatch.setattr(configuration, "pick_device", lambda _: torch.device("cuda"))
    on_cuda = config_of(**automatic)
    assert (on_cuda.pipeline, on_cuda.memory_format) == ("device", "channels_last")
    assert config_of(pipeline="reference").pipeline == "reference"
    assert replace(on_cuda, amp=config.amp).hash() == config.hash()


@pytest.mark.parametrize(
    "mode",
    (
        {"mode": "random", "layers": [1, 4], "gradient": "clipped"},
        {"mode": "random", "layers": [1, 4], "mask_unit": "block", "block_size": 2},
        {"mode": "da", "layers": [4]},
        {"mode": "da", "layers": [4], "mask_sources": ["cartoon", "photo"]},
        {"mode": "dann"},
    ),
    ids=lambda switches: "-".join(map(str, switches)),
)
def test_channels_last_all_the_way(mode):
    config = config_of(memory_format="channels_last", image_size=64, **mode)
    experiment = run.build(config)
    method = experiment.method
    conv = dict(method.model.named_modules())["layer1.0.conv1"]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    strides = []
    conv.register_forward_hook(lambda _m, _i, output: strides.append(output.stride()))
    images, *rest = next(iter(experiment.images.epoch(config, 1, method.uses_target)))
    assert images.is_contiguous(memory_format=torch.channels_last)
    step = method.update(images, *rest)
    assert torch.isfinite(step.loss_sum)
    assert all(stride[1] == 1 for stride in strides) and strides


def test_a_run_goes_on_in_another_memory_format(tmp_path, no_pictures):
    """The optimizer's fused kernel wants momenta laid out as their weights are."""
    assert main(tmp_path / "run", epochs=1) == 0
    config = config_of(memory_format="channels_last", epochs=1)
    experiment = run.build(config)
    training.load_checkpoint(tmp_path / "run" / "checkpoint.pt", experiment.method, config)
    saved = record.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["optimizer"]["state"]
    state = experiment.method.optimizer.state
    assert len(state) == len(saved)
    for (weight, moments), before in zip(state.items(), saved.values(), strict=True):
        assert moments["momentum_buffer"].stride() == weight.stride()
        assert torch.equal(moments["momentum_buffer"], before["momentum_buffer"])


def test_the_picture_shows_both(tmp_path):
    path = tmp_path / "augmentation.png"
    pictures.main([str(path), "--data", "toy", "--image-size", "64", "--device", "cpu"])
    with Image.open(path) as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20


# --- on a GPU ---


@pytest.mark.gpu
def test_on_a_gpu_it_makes_the_same_bits_and_waits_for_nothing(toy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    dataset = LabelledImages(toy, range(50), train_transform(64), seed=1, epoch=1)
    parts = [range(32), range(32, 50)]
    expected = list(DeviceBatches(dataset, parts, config_of(image_size=64)))
    loader = DeviceBatches(dataset, parts, config_of(image_size=64, device="cuda"))
    list(loader)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        actual = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (a, b) in zip(expected, actual, strict=True):
        assert a.device.type == "cuda" and a.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.cpu(), images) and torch.equal(b.cpu(), labels)
