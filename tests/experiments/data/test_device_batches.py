"""The pipeline on the device makes the reference's training and test images, a batch at a time."""

import gc
import multiprocessing

import numpy as np
import pytest
import torch
from domainshift.data import device as device_module
from domainshift.data import open_data
from domainshift.data.device import DeviceBatches, crops, loader, resized, taps
from domainshift.data.images import (
    LabelledImages,
    ShuffledImages,
    UnlabelledImages,
    test_transform,
    train_transform,
)
from domainshift.errors import DataError
from PIL import Image

CPU = torch.device("cpu")
LEVEL = 1 / 255
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def toy():
    return open_data("toy").load("photo", 40)


def noise(n, side):
    """uint8 (n, side, side, 3): every rounding occurs in it, and no error hides."""
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def parts_of(dataset, size=8):
    """A shuffled order in batches, the last of which may be smaller."""
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    return [order[first : first + size] for first in range(0, len(order), size)]


def both(dataset):
    """The batches of the reference and those of the device pipeline."""
    batches = [
        list(loader(dataset, parts_of(dataset), pipeline=pipeline, device=CPU))
        for pipeline in ("reference", "device")
    ]
    assert [len(b[0]) for b in batches[0]] == [len(b[0]) for b in batches[1]]
    return batches


# --- resampling ---


@pytest.mark.parametrize("size", (32, 96, 117))
def test_a_box_is_resized_as_by_pil_bit_for_bit(size):
    """Columns first, then rows, both rounded: two calls of PIL, because its own order varies."""
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
    for image, t, x, h, w, mirrored, actual in zip(
        images, top, left, height, width, flip, result, strict=True
    ):
        cut = Image.fromarray(image[t : t + h, x : x + w])
        bilinear = Image.Resampling.BILINEAR
        expected = np.asarray(cut.resize((size, h), bilinear).resize((size, size), bilinear))
        np.testing.assert_array_equal(actual, expected[:, ::-1] if mirrored else expected)


def test_a_size_too_small_for_exact_sums_is_refused():
    with pytest.raises(DataError, match="image_size: 32 is not allowed; allowed: at least 34 for"):
        taps(500, 32)


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
    dataset = LabelledImages(toy, range(0, 280, 3), train_transform(size), seed=4, epoch=2)
    reference, device = both(dataset)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(reference, device, strict=True))
    reference, device = (torch.cat([b[0] for b in batches]) for batches in (reference, device))
    assert device.dtype == torch.float32 and device.is_contiguous()
    levels = (device - reference).abs() * STD / LEVEL
    assert levels.max() < 1.001
    # most have PIL's columns first too, and then nothing differs
    assert (levels.flatten(1).amax(1) == 0).float().mean() > 0.6
    assert (reference.diff(dim=-1) != 0).any()


@pytest.mark.parametrize("size", (32, 64, 80))
def test_test_images_are_the_references_bit_for_bit(toy, size):
    dataset = UnlabelledImages(toy.images, range(5, 60), test_transform(size))
    reference, device = both(dataset)
    assert all(torch.equal(a, b) for a, b in zip(reference, device, strict=True))


def test_pacs_as_well(pacs, tmp_path):
    domain = open_data(pacs, tmp_path).load("art_painting", limit=3)
    for transform, levels in ((train_transform, 1.001), (test_transform, 0)):
        reference, device = both(LabelledImages(domain, range(21), transform(224)))
        for (a, _), (b, _) in zip(reference, device, strict=True):
            assert ((a - b).abs() * STD / LEVEL).max() <= levels


def test_and_a_folder_of_other_sizes(office, cache):
    domain = open_data(office, cache).load("Real World")
    for transform, levels in ((train_transform, 1.001), (test_transform, 0)):
        reference, device = both(LabelledImages(domain, range(10), transform(96)))
        for (a, labels), (b, same) in zip(reference, device, strict=True):
            assert ((a - b).abs() * STD / LEVEL).max() <= levels
            assert torch.equal(labels, same)


def test_statistics_of_independent_draws_agree():
    """Mean and deviation of a pixel, area, aspect and flips: other seeds, the same distribution."""
    n, size = 2000, 32
    ramp = np.linspace(20, 235, 48).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1, None]), -1)
    images = np.broadcast_to(picture, (n, *picture.shape)).copy()
    reference = UnlabelledImages(images, range(n), train_transform(size), seed=1)
    device = UnlabelledImages(images, range(n), train_transform(size), seed=2)
    a = torch.stack([reference[i] for i in range(n)])[..., ::8, ::8].flatten(1).double()
    b = torch.cat(list(DeviceBatches(device, [range(n)], CPU)))
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


# --- batches ---


def test_a_batch_depends_on_seed_epoch_and_image_alone(toy):
    def batches(parts, **where):
        dataset = UnlabelledImages(toy.images, range(40), train_transform(32), **where)
        return torch.cat(list(DeviceBatches(dataset, parts, CPU)))

    first = batches([range(8), range(8, 12)], seed=1, epoch=1)
    assert torch.equal(batches([range(12)], seed=1, epoch=1), first)
    assert torch.equal(batches([[11, 0, 5]], seed=1, epoch=1), first[[11, 0, 5]])
    assert not torch.equal(batches([range(12)], seed=1, epoch=2), first)
    assert not torch.equal(batches([range(12)], seed=2, epoch=1), first)


def test_autocast_around_it_rounds_nothing(toy):
    """BatchNorm is measured again with a loader that is read under autocast."""
    dataset = UnlabelledImages(toy.images, range(8), train_transform(32))
    batches = DeviceBatches(dataset, [range(8)], CPU)
    (plain,) = batches
    device_module._prepared.clear()
    with torch.autocast("cpu", torch.bfloat16):
        (within,) = batches
    assert torch.equal(within, plain)


def test_images_stay_on_the_device_as_long_as_they_are_used(toy):
    images = toy.images.copy()
    before = set(device_module._prepared)
    list(DeviceBatches(UnlabelledImages(images, [0], test_transform(32)), [[0]], CPU))
    (key,) = set(device_module._prepared) - before
    stored = device_module._prepared[key]
    assert stored.dtype == torch.uint8 and stored.shape == (280, 32, 3, 32)
    list(DeviceBatches(UnlabelledImages(images, [0], test_transform(32)), [[0]], CPU))
    assert device_module._prepared[key] is stored
    del images
    gc.collect()
    assert key not in device_module._prepared


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pipeline", ["reference", "device"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_both_pipelines_obey_the_memory_format(toy, pipeline, workers, memory_format, labelled):
    kind, images = (LabelledImages, toy) if labelled else (UnlabelledImages, toy.images)
    dataset = kind(images, range(10), test_transform(32))
    batches = loader(
        dataset,
        parts_of(dataset),
        pipeline=pipeline,
        device=CPU,
        workers=workers,
        memory_format=memory_format,
    )
    assert len(batches) == 2
    for batch, part in zip(batches, parts_of(dataset), strict=True):
        images = batch
        if labelled:
            images, labels = batch
            assert labels.dtype == torch.int64
            assert labels.tolist() == toy.labels[part].tolist()
        assert images.is_contiguous(memory_format=memory_format)
        expected = [dataset.transform(Image.fromarray(toy.images[i])) for i in part]
        assert torch.equal(images, torch.stack(expected))


@pytest.fixture
def spawn():
    """Workers get what they need pickled, as on macOS, on Windows and from Python 3.14 on."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_spawned_workers_make_the_same_batches(tiny_pacs, cache, spawn):
    images = open_data(tiny_pacs, cache).load("photo").images
    dataset = ShuffledImages(images, range(14), train_transform(32), seed=1, epoch=2)
    here, there = (
        loader(
            dataset,
            parts_of(dataset),
            pipeline="reference",
            device=CPU,
            workers=workers,
            memory_format=torch.channels_last,
        )
        for workers in (0, 2)
    )
    for batch, other in zip(here, there, strict=True):
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, other)


@pytest.mark.parametrize("pipeline", ["reference", "device"])
def test_a_loader_draws_no_random_number(toy, pipeline):
    """Random maps draw from torch's stream, and what they draw must not depend on a loader."""
    dataset = UnlabelledImages(toy.images, range(20), train_transform(32))
    before = torch.get_rng_state()
    list(loader(dataset, parts_of(dataset), pipeline=pipeline, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_memory_too_small_names_the_way_out(toy, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_module, "_resize_all", full)
    dataset = UnlabelledImages(toy.images.copy(), [0], train_transform(32))
    with pytest.raises(DataError) as caught:
        list(DeviceBatches(dataset, [[0]], CPU))
    assert "280 images of 37 x 37 pixels do not fit into the memory of cpu" in str(caught.value)
    assert "--pipeline reference" in str(caught.value)


@pytest.mark.gpu
def test_on_a_gpu_it_makes_the_same_bits_and_waits_for_nothing(toy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    dataset = LabelledImages(toy, range(50), train_transform(64), seed=1, epoch=1)
    parts = [range(32), range(32, 50)]
    expected = list(DeviceBatches(dataset, parts, CPU))
    batches = DeviceBatches(dataset, parts, torch.device("cuda"), torch.channels_last)
    list(batches)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        actual = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (a, b) in zip(expected, actual, strict=True):
        assert a.device.type == "cuda" and a.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.cpu(), images) and torch.equal(b.cpu(), labels)
