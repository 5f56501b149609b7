"""What training sees and refuses: order, pairs, batches, labels, hooks, the loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from domainshift.data.pairing import epoch_order
from domainshift.errors import ConfigError, NonFiniteError, RecordError, ShapingError, WeightsError
from domainshift.methods import METHODS, Method
from domainshift.records.schema import CHECKPOINT, METRICS
from domainshift.records.validate import check
from domainshift.setup import origin
from domainshift.training.loop import remedy, train
from domainshift.training.run import build
from tiny_runs import TOTAL, quiet, rows_of, run, same_tensors, setup_of, state_of

import fastshape

pytestmark = pytest.mark.usefixtures("no_pictures")

SHAPED = {
    "baseline": {"mode": "baseline"},
    "random": {"mode": "random", "layers": [1, 4]},
    "da": {"mode": "da", "layers": [4, 13]},
}


def built(tmp_path, **switches):
    setup = setup_of(**switches)
    return setup, build(setup, setup.config.tests(), None, tmp_path)


# --- rows ---


def test_chosen_layers_are_shaped_once_per_update(tmp_path):
    names = {"random": ["conv1", "layer1.1.conv1"], "da": ["layer1.1.conv1"]}
    for mode, layers in names.items():
        rows = rows_of(run(tmp_path / mode, mode=mode, layers=[1, 4][-len(layers) :], holdout=0.3))
        assert [row["epoch"] for row in rows] == [1, 2]
        for row in rows:  # 14 images, 8 at a time
            assert row["fired"] == dict.fromkeys(layers, 2)
            assert (row["updates"], row["source_train_total"]) == (2, 14)
        assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.002])  # int(0.8 * 2) epochs


def test_updates_cut_the_last_epoch_short(tmp_path):
    rows = rows_of(run(tmp_path / "r", epochs=None, updates=4, holdout=0))
    assert [(row["updates"], row["source_train_total"]) for row in rows] == [(3, TOTAL), (1, 8)]


def test_the_modes_differ_from_the_first_epoch(tmp_path):
    losses = {
        rows_of(run(tmp_path / mode, **switches, epochs=1))[0]["train_loss"]
        for mode, switches in SHAPED.items()
    }
    assert len(losses) == 3


# --- target labels ---


class Untouchable:
    """Labels that fail the test at any use."""

    def __getattribute__(self, name):
        raise AssertionError(f"target labels were used: {name}")

    def _refuse(self, *_):
        raise AssertionError("target labels were used")

    __getitem__ = __len__ = __iter__ = __array__ = __eq__ = __bool__ = _refuse
    __hash__ = object.__hash__


def with_labels_of_sketch(monkeypatch, change):
    kind = type(setup_of().data)
    load = kind.load

    def changed(self, name, limit=None):
        domain = load(self, name, limit)
        return replace(domain, labels=change(domain.labels)) if name == "sketch" else domain

    monkeypatch.setattr(kind, "load", changed)


@pytest.mark.parametrize("mode", [*SHAPED, "dann", "dropout2d", "mixstyle"])
def test_training_does_not_touch_labels_of_the_target(monkeypatch, tmp_path, mode):
    with_labels_of_sketch(monkeypatch, lambda labels: Untouchable())
    setup, experiment = built(tmp_path, epochs=1, **SHAPED.get(mode, {"mode": mode}))
    parts = origin(setup)
    trained = []

    def no_test(epoch):
        trained.append(experiment.method.passes)
        return {}

    arguments = experiment.method, experiment.images, setup.config, tmp_path, parts
    train(*arguments, no_test, quiet())
    assert trained == [2]
    from domainshift.training.evaluation import evaluate

    test = setup.config.tests()[0]
    with pytest.raises(AssertionError, match="target labels were used"):  # the trap works
        evaluate(experiment.method, test, experiment.sets, 1, quiet())


@pytest.mark.parametrize("mode", ["random", "da"])
def test_other_labels_of_the_target_give_the_same_weights(monkeypatch, tmp_path, mode):
    plain = run(tmp_path / "plain", **SHAPED[mode], epochs=1)
    with_labels_of_sketch(monkeypatch, lambda labels: (labels + 1) % 7)
    other = tmp_path / "other"
    with pytest.raises(RecordError, match="labels are not in the order"):  # the record shows it
        run(other, **SHAPED[mode], epochs=1)
    assert same_tensors(state_of(plain), state_of(other))
    assert rows_of(plain)[0]["tests"] != rows_of(other)[0]["tests"]


# --- order, pairs, workers ---


def test_each_epoch_uses_every_source_image_once(tmp_path):
    setup, experiment = built(tmp_path, holdout=0, mode="da", layers=[4])
    epochs = [list(experiment.images.epoch(setup.config, epoch)) for epoch in (1, 2)]
    for batches in epochs:
        assert [len(images) for images, _, _ in batches] == [8, 8, 5]
        assert all(len(target) == len(images) for images, _, target in batches)
        labels = torch.cat([labels for _, labels, _ in batches])
        assert torch.bincount(labels).tolist() == [3] * 7
    order = [torch.cat([labels for _, labels, _ in batches]).tolist() for batches in epochs]
    assert order[0] != order[1]


ARMS = {name: {"mode": name} for name in METHODS} | {
    "random, all layers, shaped in tests": {
        "mode": "random",
        "layers": [1, 4, 13],
        "at_eval": "on",
    },
    "da, recorded in training mode": {"mode": "da", "layers": [4], "record_mode": "train"},
    "da, other pairs": {"mode": "da", "layers": [4], "pairing": "modulo"},
    "da, other target": {"mode": "da", "layers": [4], "target": "photo"},
}


@pytest.fixture(scope="module")
def baseline_images(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return images_of(tmp_path_factory.mktemp("arms"), monkeypatch, mode="baseline")


def images_of(tmp_path, monkeypatch, **switches):
    """Source images and labels of each update of a run, as the method gets them."""
    seen, update = [], Method.update

    def recorded(self, images, labels, *others, **options):
        seen.extend((images.clone(), labels.clone()))
        return update(self, images, labels, *others, **options)

    monkeypatch.setattr(Method, "update", recorded)
    run(tmp_path / "run", holdout=0.3, **switches)
    return seen


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_of_one_seed_see_the_same_crops_in_the_same_order(
    tmp_path, monkeypatch, baseline_images, arm
):
    assert len(baseline_images) == 8  # images and labels of two epochs of two updates
    assert same_tensors(images_of(tmp_path, monkeypatch, **ARMS[arm]), baseline_images)


def test_another_seed_sees_other_crops(tmp_path, monkeypatch, baseline_images):
    other = images_of(tmp_path, monkeypatch, mode="baseline", seed=1)
    assert not any(map(torch.equal, other[::2], baseline_images[::2]))


def test_workers_change_no_bit_and_draw_no_random_number(tmp_path):
    setup, experiment = built(tmp_path, mode="da", layers=[4])
    before = torch.get_rng_state()
    alone = list(experiment.images.epoch(setup.config, 1))
    config = setup.config.model_copy(update={"workers": 2})
    helped = list(experiment.images.epoch(config, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_target_images_are_augmented_unless_the_switch_says_otherwise(tmp_path):
    def first_target(transform, epoch):
        setup, experiment = built(tmp_path, mode="da", layers=[4], target_transform=transform)
        images, config = experiment.images, setup.config
        order = epoch_order(config.seed, epoch, len(images.source_indices), TOTAL)[1]
        targets = torch.cat([target for _, _, target in images.epoch(config, epoch)])
        return targets[np.argsort(order, kind="stable")[:1]]

    assert torch.equal(first_target("test", 1), first_target("test", 1))
    assert not torch.equal(first_target("test", 1), first_target("train", 1))
    assert torch.equal(first_target("train", 1), first_target("train", 1))


def test_several_domains_stand_beside_the_source(tmp_path):
    switches = {"mode": "da", "layers": [4], "mask_sources": ["cartoon", "art_painting"]}
    setup, experiment = built(tmp_path, holdout=0.3, **switches)
    cartoon, source = experiment.images.others
    assert len(cartoon[1]) == TOTAL
    assert list(source[1]) == list(experiment.images.source_indices)  # never what is held out
    for images, _, others in experiment.images.epoch(setup.config, 1):
        assert others.shape == (len(images), 2, 3, 32, 32)


# --- refused ---


def test_one_image_alone_is_refused_where_batchnorm_needs_two(tmp_path):
    setup, experiment = built(tmp_path, holdout=0)

    def check(**switches):
        experiment.images.check_batches(setup.config.model_copy(update=switches))

    with pytest.raises(ConfigError, match="batch_size: 20 .*one of 21 training images alone"):
        check(batch_size=20)
    check(batch_size=20, image_size=64)
    with pytest.raises(ConfigError, match="accumulate 6 .*one of 21"):
        check(accumulate=6)


def test_too_few_images_for_the_processes_are_refused(tmp_path, monkeypatch):
    setup, experiment = built(tmp_path, holdout=0)
    monkeypatch.setattr("domainshift.distributed.size", lambda: 6)
    with pytest.raises(ConfigError, match="leaves 5 of 21 training images .* of 6 processes"):
        experiment.images.check_batches(setup.config)


@pytest.mark.parametrize("mode", ["random", "da"])
def test_shaping_that_does_not_happen_stops_the_run(monkeypatch, tmp_path, mode):
    kind = type(built(tmp_path, **SHAPED[mode])[1].method)
    attach = kind.attach.__func__

    def detached(cls, model, config):
        attachment = attach(cls, model, config)
        attachment.remove()
        return attachment

    monkeypatch.setattr(fastshape.Attachment, "record", lambda *_: None)
    monkeypatch.setattr(kind, "attach", classmethod(detached))
    with pytest.raises(ShapingError, match="conv1 was shaped 0 times in 2 training passes"):
        run(tmp_path / "r", **SHAPED[mode])
    assert not (tmp_path / "r" / CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        NonFiniteError, match="epoch 1: the loss of update 2 is nan; at its end conv1"
    ):
        run(tmp_path / "r", lr=1e30)
    assert not (tmp_path / "r" / METRICS).exists()


def poison(monkeypatch, act, update=2):
    """Do `act(method)` before an update of the first epoch."""
    own, count = Method.update, [0]

    def poisoned(self, *arguments, **named):
        count[0] += 1
        if count[0] == update:
            act(self)
        return own(self, *arguments, **named)

    monkeypatch.setattr(Method, "update", poisoned)


@torch.no_grad()
def spoil(tensor):
    tensor.view(-1)[0] = math.nan


def test_a_nan_that_binarization_hides_stops_the_run(tmp_path, monkeypatch):
    """The map has 0 where the activation is NaN: loss, logits and accuracies stay finite."""
    poison(monkeypatch, lambda method: spoil(method.model.conv1.weight))
    expected = r"^epoch 1, update 2: layer 'conv1': \d+ of \d+ values of its output are not finite. Lower lr"
    with pytest.raises(NonFiniteError, match=expected):
        run(tmp_path / "r", **SHAPED["random"])
    assert not (tmp_path / "r").exists() or not (tmp_path / "r" / METRICS).exists()


def test_maps_of_the_experiments_own_look_too(tmp_path, monkeypatch):
    poison(monkeypatch, lambda method: spoil(method.model.conv1.weight))
    expected = "^epoch 1, update 2: layer 'conv1': .* not finite. Lower lr"
    with pytest.raises(NonFiniteError, match=expected):
        run(tmp_path / "r", **SHAPED["random"], mask_unit="channel")


def test_a_recorded_map_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """In the pass over target images alone."""
    record = fastshape.Attachment.record

    def poisoned(self, images):
        record(self, images * (math.nan if self.fired["layer1.1.conv1"] == 1 else 1))

    monkeypatch.setattr(fastshape.Attachment, "record", poisoned)
    with pytest.raises(
        NonFiniteError, match="^epoch 1, update 2: layer 'layer1.1.conv1': .* are not finite"
    ):
        run(tmp_path / "r", **SHAPED["da"])


@pytest.mark.parametrize("name", ["bn1.running_mean", "fc.bias"])
def test_a_buffer_or_weight_that_is_not_finite_is_named(tmp_path, monkeypatch, name):
    """Even where no loss shows it: it changes after the last update."""

    def later(self):
        if self.passes:
            spoil(self.model.state_dict()[name])
        return {}

    monkeypatch.setattr(Method, "fired", later)
    with pytest.raises(NonFiniteError, match=f"epoch 1: at its end {name} are not finite"):
        run(tmp_path / "r")


def test_logits_that_are_not_finite_stop_a_test(tmp_path, monkeypatch):
    own = Method.predict

    def poisoned(self, images, start=0):
        prediction = own(self, images, start)
        spoil(prediction.logits)
        return prediction

    monkeypatch.setattr(Method, "predict", poisoned)
    expected = "test sketch-bn-source after epoch 1: the logits of 1 of 21 images are not finite"
    with pytest.raises(NonFiniteError, match=expected):
        run(tmp_path / "r", epochs=1)
    assert not (tmp_path / "r" / METRICS).exists()


def test_logits_beyond_float16_are_no_fault(tmp_path, monkeypatch):
    """Records keep them in float16, as infinities."""
    own = Method.predict

    def large(self, images, start=0):
        prediction = own(self, images, start)
        return prediction._replace(logits=prediction.logits * 1e8)

    monkeypatch.setattr(Method, "predict", large)
    folder = run(tmp_path / "r", epochs=1)
    assert check(folder) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = built(tmp_path)[1].method.model.state_dict()
    spoil(state["layer1.0.conv1.weight"])
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match="not finite, in layer1.0.conv1.weight"):
        run(tmp_path / "r", weights=str(tmp_path / "bad.pt"))
    assert not (tmp_path / "r").exists()


def state_with(tmp_path, name, change):
    """The path of a network's weights, one of which is changed."""
    state = built(tmp_path)[1].method.model.state_dict()
    state[name] = change(state[name])
    torch.save(state, tmp_path / "changed.pt")
    return str(tmp_path / "changed.pt")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var"])
def test_weights_without_a_fraction_or_complex_ones_are_refused(tmp_path, name, dtype):
    path = state_with(tmp_path, name, lambda tensor: tensor.to(dtype))
    kind = str(dtype).removeprefix("torch.")
    message = rf"{name} has dtype {kind} \(1 keys\); allowed: float16 \| bfloat16 \| float32"
    with pytest.raises(WeightsError, match=message):
        run(tmp_path / "r", weights=path)
    assert not (tmp_path / "r").exists()


def test_counters_of_batches_may_be_whole_or_not_but_not_complex(tmp_path):
    name = "bn1.num_batches_tracked"
    for dtype in (torch.int32, torch.float32):
        built(tmp_path, weights=state_with(tmp_path, name, lambda t, d=dtype: t.to(d)))
    with pytest.raises(WeightsError, match=f"{name} has dtype complex64"):
        built(tmp_path, weights=state_with(tmp_path, name, lambda t: t.to(torch.complex64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_converted(tmp_path, dtype):
    built(tmp_path, weights=state_with(tmp_path, "bn1.weight", lambda tensor: tensor.to(dtype)))


def test_weights_that_float32_cannot_hold_are_refused(tmp_path):
    path = state_with(tmp_path, "bn1.weight", lambda tensor: tensor.double() * 1e39)
    message = r"changed.pt holds numbers that are not finite in float32, in bn1.weight$"
    with pytest.raises(WeightsError, match=message):
        run(tmp_path / "r", weights=path)
    assert not (tmp_path / "r").exists()


# --- advice ---

RANDOM = {"mode": "random", "layers": [1, 4]}


@pytest.mark.parametrize(
    ("switches", "advice"),
    [
        ({}, "Lower lr (0.02)"),
        ({"amp": "bfloat16"}, "Lower lr (0.02) or set amp to off (it is bfloat16)"),
        (
            RANDOM,
            "Lower lr (0.02), shape fewer layers (2) or set gradient to clipped (it is "
            "straight_through)",
        ),
        (
            RANDOM | {"amp": "bfloat16", "gradient": "clipped"},
            "Lower lr (0.02), set amp to off (it is bfloat16) or shape fewer layers (2)",
        ),
        (
            {"mode": "da", "layers": [4]},
            "Lower lr (0.02) or set gradient to clipped (it is straight_through)",
        ),
        ({"mode": "da", "layers": [4], "product": True}, "Lower lr (0.02)"),
        ({"mode": "dropout2d"}, "Lower lr (0.02)"),
    ],
)
def test_advice_names_what_can_help_this_run(tmp_path, switches, advice):
    assert remedy(built(tmp_path, **switches)[1].method) == advice


@pytest.mark.parametrize("memory_format", ("contiguous", "channels_last"))
def test_bfloat16_trains_in_both_memory_formats(tmp_path, memory_format, monkeypatch):
    strides, update = [], Method.update

    def seen(self, *arguments, **named):
        strides.append(self.model.layer1[0].conv1.weight.stride(1))
        return update(self, *arguments, **named)

    monkeypatch.setattr(Method, "update", seen)
    switches = {"amp": "bfloat16", "memory_format": memory_format, "mode": "random", "layers": [4]}
    run(tmp_path / "r", **switches, epochs=1)
    assert set(strides) == {1 if memory_format == "channels_last" else 9}


@pytest.mark.parametrize(
    "switches",
    [
        {"mode": "random", "layers": [1, 4], "gradient": "clipped"},
        {"mode": "random", "layers": [1, 4], "mask_unit": "block", "block_size": 2},
        {"mode": "da", "layers": [4]},
        {"mode": "da", "layers": [4], "mask_sources": ["cartoon", "photo"]},
        {"mode": "dann"},
    ],
    ids=lambda switches: "-".join(map(str, switches)),
)
def test_channels_last_all_the_way(tmp_path, switches):
    more = {"memory_format": "channels_last", "image_size": 64, "pipeline": "device"}
    setup, experiment = built(tmp_path, **switches, **more)
    method = experiment.method
    conv = method.model.get_submodule("layer1.0.conv1")
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    strides = []
    conv.register_forward_hook(lambda _m, _i, output: strides.append(output.stride()))
    images, *rest = next(iter(experiment.images.epoch(setup.config, 1)))
    assert images.is_contiguous(memory_format=torch.channels_last)
    step = method.update(images, *rest)
    assert torch.isfinite(step.loss_sum)
    assert all(stride[1] == 1 for stride in strides) and strides
