"""Which checkpoints a run goes on from, which it refuses, and how it grows."""

import hashlib
import shutil

import pytest
import torch
from domainshift.errors import BadInput, ConfigError, RecordError
from domainshift.models import state_digest
from domainshift.records import results
from domainshift.records.schema import CHECKPOINT, CONFIG, SUMMARY, TRAINING
from domainshift.records.validate import check
from domainshift.setup import origin
from domainshift.training import checkpoint
from domainshift.training.run import build
from tiny_runs import (
    SHAPED,
    assert_same_training,
    rows_of,
    run,
    same_tensors,
    setup_of,
    state_of,
    untimed,
)

pytestmark = pytest.mark.usefixtures("no_pictures")

# --- the digest of weights ---


def test_digest_covers_names_dtypes_shapes_bytes_and_order():
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(3)
    state = {"a": a, "b": b}
    digest = state_digest(state)
    assert digest == state_digest({"a": a.clone(), "b": b.clone()})
    others = [
        {"c": a, "b": b},
        {"a": a.view(3, 2), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a + 1, "b": b},
        {"a": a, "b": b + 1},
        {"b": b, "a": a},
    ]
    digests = {state_digest(other) for other in others}
    assert len(digests) == len(others) and digest not in digests


def test_digest_is_that_of_the_documented_bytes():
    expected = hashlib.sha256(b"w torch.int16 (2,)\n\x01\x00\x02\x00").hexdigest()
    assert state_digest({"w": torch.tensor([1, 2], dtype=torch.int16)}) == expected


def test_digest_is_of_values_and_not_of_their_layout():
    x = torch.randn(2, 3, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert state_digest({"x": x}) == state_digest({"x": last})
    state_digest({"x": x.bfloat16()})  # numpy has no bfloat16


# --- resuming ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("domainshift.training.run.draw", lambda *_: None)
        return run(tmp_path_factory.mktemp("finished") / "r", epochs=1, step_fraction=1)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def unfinished(copied):
    """A copy of it as a kill after the epoch leaves it."""
    (copied / TRAINING).unlink()
    return copied


def resumed(folder, **switches):
    return run(folder, resume=True, **{"epochs": 1, "step_fraction": 1} | switches)


def test_other_switches_are_refused_by_name(unfinished):
    before = (unfinished / CHECKPOINT).read_bytes()
    for remove in (None, CONFIG):  # the checkpoint knows its switches by itself
        if remove:
            (unfinished / remove).unlink()
        with pytest.raises(ConfigError, match=r"another .*\(lr: 0.02 -> 0.5; seed: 0 -> 1\)"):
            resumed(unfinished, seed=1, lr=0.5, workers=1)
    assert (unfinished / CHECKPOINT).read_bytes() == before


def other_images(monkeypatch, *domains):
    """Reverse the digests of domains; returns the message about the first one."""
    data = setup_of().data
    kind, digest = type(data), type(data).digest

    def changed(self, name, limit=None):
        own = digest(self, name, limit)
        return own[::-1] if name in domains else own

    monkeypatch.setattr(kind, "digest", changed)
    new = setup_of().data.digest(domains[0], 3)
    return rf"the images of {domains[0]} are others \({new[::-1][:12]} -> {new[:12]}\)"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_images_are_refused_by_name(unfinished, monkeypatch):
    message = other_images(monkeypatch, "art_painting")
    with pytest.raises(ConfigError, match=message):
        resumed(unfinished)


def test_other_images_of_a_tested_domain_are_refused_by_name(unfinished, monkeypatch):
    """Also where training does not read them, and there are no records of tests yet."""
    shutil.rmtree(unfinished / "evaluations")
    before = contents(unfinished)
    message = other_images(monkeypatch, "sketch", "photo")
    for target in ("sketch", ["sketch", "photo"], "cartoon"):
        with pytest.raises(ConfigError, match=message):
            resumed(unfinished, target=target, epochs=2)
    assert contents(unfinished) == before


@pytest.mark.parametrize("lost", [None, SUMMARY, "evaluations"])
def test_a_finished_run_is_not_tested_on_other_images(copied, monkeypatch, lost):
    if lost == SUMMARY:
        (copied / lost).unlink()
    elif lost:
        shutil.rmtree(copied / lost)
    before = contents(copied)
    message = other_images(monkeypatch, "sketch")
    for target in ("sketch", "cartoon"):
        with pytest.raises(ConfigError, match=message):
            resumed(copied, target=target)
    assert contents(copied) == before


def test_without_a_checkpoint_the_tests_know_their_images(copied, monkeypatch):
    """As a suite leaves a finished training, and as an earlier version of it did."""
    (copied / CHECKPOINT).unlink()
    message = "has tests on other images .*" + other_images(monkeypatch, "sketch")
    with pytest.raises(ConfigError, match=message):
        resumed(copied)


def test_a_checkpoint_that_knows_no_tested_images_is_gone_on_from(unfinished):
    state = checkpoint.read(unfinished / CHECKPOINT)
    del state["origin"]["tested"]
    torch.save(state, unfinished / CHECKPOINT)
    resumed(unfinished, target="cartoon", epochs=2)
    tested = checkpoint.read(unfinished / CHECKPOINT)["origin"]["tested"]
    assert sorted(tested) == ["art_painting", "cartoon", "sketch"]
    assert check(unfinished) == []


def test_a_finished_training_is_tested_on_a_further_target_whose_images_changed(
    copied, monkeypatch
):
    other_images(monkeypatch, "cartoon")  # since the other tests, which did not read them
    resumed(copied, target="cartoon")
    assert "cartoon-bn-source" in results.evaluation_names(copied)


def test_other_weights_are_refused_by_name(unfinished, tmp_path):
    path = tmp_path / "start.pt"
    torch.save(checkpoint.read(unfinished / CHECKPOINT)["model"], path)
    with pytest.raises(ConfigError, match=r"of another training \(weights: "):
        resumed(unfinished, weights=str(path))


def test_a_broken_checkpoint_is_refused(unfinished):
    path = unfinished / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RecordError, match="cannot read checkpoint"):
        resumed(unfinished)
    assert len(path.read_bytes()) == 1000


def test_an_exchanged_checkpoint_is_refused(copied, tmp_path):
    """Weights that training.json does not name are not tested."""
    state = checkpoint.read(copied / CHECKPOINT)
    state["model"]["fc.bias"] += 1
    torch.save(state, copied / CHECKPOINT)
    before = results.evaluation_names(copied)
    with pytest.raises(BadInput, match="checkpoint.pt was exchanged: the hash of its weights"):
        resumed(copied, target="cartoon")
    assert results.evaluation_names(copied) == before


def test_a_missing_checkpoint_cannot_be_tested_further(copied):
    (copied / CHECKPOINT).unlink()
    with pytest.raises(BadInput, match="checkpoint.pt is missing"):
        resumed(copied, target="cartoon")


def test_a_finished_training_is_not_trained_over(copied):
    """Without its checkpoint, another training would begin from the start and overwrite it."""
    (copied / CHECKPOINT).unlink()
    with pytest.raises(ConfigError, match="training.json is of another training"):
        resumed(copied, epochs=2)


# --- more epochs ---


def test_a_run_grows_to_that_of_more_epochs(copied, tmp_path):
    """step_fraction 1: the learning rate does not drop in the epochs of either run."""
    longer = run(tmp_path / "longer", epochs=3, step_fraction=1)
    resumed(copied, epochs=3)
    assert same_tensors(state_of(copied), state_of(longer))
    rows = [[row | {"tests": None} for row in untimed(rows_of(f))] for f in (copied, longer)]
    assert rows[0] == rows[1]  # but for the test after what was the last epoch
    assert check(copied) == []
    assert results.read_training(copied).record.epochs == 3
    a, b = (results.read_evaluation(f, "sketch-bn-source") for f in (copied, longer))
    assert (a.confusion, a.predictions) == (b.confusion, b.predictions)


def test_growth_is_refused_where_the_learning_rate_has_dropped(tmp_path):
    folder = run(tmp_path / "r", epochs=3, step_fraction=0.5)
    before = (folder / CHECKPOINT).read_bytes()
    with pytest.raises(
        ConfigError, match="epochs: 8 in place of 3 .* drops every 4 epochs in place"
    ):
        run(folder, resume=True, epochs=8, step_fraction=0.5)
    assert (folder / CHECKPOINT).read_bytes() == before
    assert check(folder) == []


def test_a_run_does_not_shrink(tmp_path):
    folder = run(tmp_path / "r", epochs=2, step_fraction=1)
    with pytest.raises(ConfigError, match="epochs: 1 is less than the 2 that are trained"):
        run(folder, resume=True, epochs=1, step_fraction=1)


def test_growth_is_refused_where_the_method_follows_progress(tmp_path):
    switches = {"mode": "dann", "step_fraction": 1}
    folder = run(tmp_path / "r", epochs=1, **switches)
    with pytest.raises(
        ConfigError, match="dann does in an epoch depends on the length of training"
    ):
        run(folder, resume=True, epochs=2, **switches)


def test_a_run_goes_on_in_another_memory_format(unfinished, tmp_path):
    """The optimizer's fused kernel needs momenta that are laid out as their weights are."""
    setup = setup_of(epochs=1, step_fraction=1, memory_format="channels_last")
    method = build(setup, setup.config.tests(), None, tmp_path).method
    path = unfinished / CHECKPOINT
    assert checkpoint.resume(path, method, origin(setup)) == 1
    before = checkpoint.read(path)["optimizer"]["state"]
    state = method.optimizer.state
    assert len(state) == len(before) > 0
    for (weight, moments), saved in zip(state.items(), before.values(), strict=True):
        assert moments["momentum_buffer"].stride() == weight.stride()
        assert torch.equal(moments["momentum_buffer"], saved["momentum_buffer"])


def test_a_stopped_run_on_the_device_pipeline_ends_the_same(tmp_path, monkeypatch):
    switches = SHAPED["random"] | {"pipeline": "device"}
    whole = run(tmp_path / "whole", **switches)
    save = checkpoint.save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_and_die)
        run(tmp_path / "parts", **switches)
    run(tmp_path / "parts", resume=True, **switches)
    assert_same_training(tmp_path / "parts", whole)
