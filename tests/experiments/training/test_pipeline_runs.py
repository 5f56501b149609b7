"""Whole runs with the pipeline on the device: they see and learn what runs with the reference do."""

import pytest
import torch
from domainshift.data import device
from domainshift.errors import DataError
from domainshift.methods.base import Prediction
from domainshift.training import evaluation
from domainshift.training.evaluation import evaluate_all
from domainshift.training.run import build
from tiny_runs import quiet, rows_of, run, setup_of

LEVEL = 1 / 255


def images_of(pipeline, folder, monkeypatch, **switches):
    """All images of an epoch, of the BatchNorm statistics and of the tests, in order; and the counts."""
    setup = setup_of(pipeline=pipeline, **switches)
    config, tests = setup.config, setup.config.tests()
    experiment = build(setup, tests, None, folder)
    batches = [tensor for batch in experiment.images.epoch(config, 1) for tensor in batch]
    source = experiment.images
    batches += evaluation.mixed_batches(source.source.images, source.source_indices, config)

    def predict(images, start):
        batches.append(images)
        return Prediction(torch.zeros(len(images), 7), torch.zeros(len(images), 2))

    monkeypatch.setattr(experiment.method, "predict", predict)
    results = evaluate_all(experiment.method, tests, experiment.sets, 1, quiet())
    return batches, [(test, predictions.labels.tolist()) for test, predictions in results]


@pytest.mark.parametrize(
    "switches",
    (
        {"mode": "baseline", "holdout": 0.34, "test_set": "source-train"},
        {"mode": "da", "layers": 4, "target_transform": "test"},
        {"mode": "da", "layers": 4, "target_transform": "shuffled", "image_size": 64},
        {"mode": "da", "layers": 4, "mask_sources": "cartoon,photo", "target": "sketch"},
        {"mode": "adabn"},
    ),
    ids=lambda switches: "-".join(switches),
)
def test_every_batch_of_a_run_is_the_references(tmp_path, monkeypatch, switches):
    """All that the method sees in an epoch and its tests, in order, within a level."""
    reference, labels = images_of("reference", tmp_path, monkeypatch, **switches)
    batches, same = images_of("device", tmp_path, monkeypatch, **switches)
    assert same == labels and len(batches) == len(reference)
    for x, y in zip(batches, reference, strict=True):
        assert (x is None and y is None) or (x - y).abs().max() < 1.001 * LEVEL / 0.224


@pytest.mark.usefixtures("no_pictures")
def test_a_toy_run_learns_as_with_the_reference(tmp_path):
    last = {}
    for pipeline in ("reference", "device"):
        switches = {"limit": 20, "epochs": 12, "batch_size": 16, "lr": 0.02, "target": "cartoon"}
        last[pipeline] = rows_of(run(tmp_path / pipeline, pipeline=pipeline, **switches))[-1]
    a, b = (
        100 * last[name]["source_train_correct"] / last[name]["source_train_total"]
        for name in ("reference", "device")
    )
    # rounding apart, the same training: 126 images, of which a seventh is right by chance
    assert min(a, b) > 2 * 100 / 7
    assert abs(a - b) < 15


def test_a_memory_too_small_is_bad_input(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "_prepared", {})
    monkeypatch.setattr(device, "_resize_all", full)
    with pytest.raises(
        DataError, match=r"21 images of 37 x 37 pixels do not fit .* of cpu; use --pi"
    ):
        run(tmp_path / "run", pipeline="device")
