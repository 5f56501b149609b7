"""The methods beside plain shaping, and shaping's variants: each against values worked out by hand."""

import contextlib
import json
import math

import methods
import numpy as np
import pytest
import record
import run
import torch
import train as training
from config import Config, resolve
from data import load_domain
from distributed import parts
from methods import METHODS, AdaBN, Dann, Dropout2d, Method, TargetMaps
from model import DomainHead, ReverseGradient
from screen import Screen
from test_resume import assert_same_result, result_of
from test_run import TINY, Untouchable, flags, no_pictures, with_target_labels  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from variants import Maps, random_blocks, top_fraction

import fastshape

CPU = torch.device("cpu")

# Every arm that test_run does not know, in its tiny form.
ARMS = {
    "adabn": {"mode": "adabn"},
    "dropout2d": {"mode": "dropout2d", "layers": [4], "drop_rate": 0.5},
    "dann": {"mode": "dann"},
    "bn-only": {"mode": "da", "apply_maps": False, "record_mode": "train"},
    "train-mode": {"mode": "da", "layers": [4], "record_mode": "train"},
    "product": {"mode": "da", "layers": [4], "product": True},
    "unbinarized": {"mode": "da", "layers": [4], "binarize": False},
    "top-k": {"mode": "da", "layers": [4], "top_k": 0.3},
    "epsilon": {"mode": "da", "layers": [4], "epsilon": 0.1},
    "domains": {"mode": "da", "layers": [4], "mask_sources": ["photo", "art_painting"]},
    "channel": {"mode": "random", "layers": [4], "mask_unit": "channel"},
    "block": {"mode": "random", "layers": [4], "mask_unit": "block", "block_size": 3},
    "updates": {"mode": "random", "layers": [4], "updates": 3},
}


def config_of(**switches):
    tiny = {k: v for k, v in TINY.items() if k != "epochs" or "updates" not in switches}
    return resolve(tiny | switches)[0]


def net(channels=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7),
    )  # fmt: skip


def images(n=6, seed=0, side=8):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def outputs(model, name, x):
    """What module `name` gives in a forward, attached hooks included."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    model(x)
    handle.remove()
    return seen


# --- maps per channel and per block ---


def test_a_block_is_kept_or_dropped_as_one():
    x = torch.zeros(4, 8, 7, 5)
    torch.manual_seed(3)
    mask = random_blocks(x, 0.5, 3).to_bool()
    assert mask.shape == x.shape
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):  # 7 = 3 + 3 + 1, 5 = 3 + 2
        for columns in (slice(0, 3), slice(3, 5)):
            block = mask[:, :, rows, columns].flatten(2)
            assert torch.equal(block.all(2), block.any(2))
    assert mask[:, :, 0, 0].ne(mask[:, :, 3, 3]).any()  # blocks differ from one another


@pytest.mark.parametrize("p_zero", [0.0, 0.3, 0.9])
def test_a_channel_is_kept_or_dropped_as_one(p_zero):
    torch.manual_seed(0)
    mask = random_blocks(torch.zeros(100, 64, 4, 2), p_zero, None).to_bool().flatten(2)
    assert torch.equal(mask.all(2), mask.any(2))
    assert mask.float().mean().item() == pytest.approx(1 - p_zero, abs=0.02)  # 5 sigma


def test_blocks_of_one_element_are_the_stream_of_the_op():
    x = torch.randn(2, 3, 4, 5)
    torch.manual_seed(7)
    mask = random_blocks(x, 0.4, 1)
    torch.manual_seed(7)
    assert torch.equal(fastshape.shape(x.abs() + 1, p_zero=0.4) > 0, mask.to_bool())


def test_a_layer_without_a_plane_has_channels_alone():
    torch.manual_seed(0)
    assert random_blocks(torch.zeros(9, 40), 0.5, 3).density() == pytest.approx(0.5, abs=0.14)


# --- top-K ---


def test_top_k_by_hand():
    x = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [-1.0, -2.0]]]])
    half = top_fraction(x, 0.5)
    assert half.tolist() == [[[[False, True], [True, False]], [[True, True], [False, False]]]]
    assert top_fraction(x, 0.01).flatten(2).sum(2).tolist() == [[1, 1]]  # never none
    assert top_fraction(x, 0.75)[0, 1].tolist() == [[True, True], [True, False]]
    assert top_fraction(x, 1.0).all()
    assert top_fraction(torch.arange(10.0).view(1, 1, 10), 0.25).sum() == 2  # 2.5, half to even


def test_top_k_counts_row_major_in_any_memory_format():
    x = torch.randint(0, 3, (2, 4, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(top_fraction(x, 0.3), top_fraction(last, 0.3))
    kept = top_fraction(x, 0.3).flatten(2)
    for plane, mask in zip(x.flatten(2).flatten(0, 1), kept.flatten(0, 1), strict=True):
        best = sorted(range(25), key=lambda i: (-plane[i].item(), i))[:8]
        assert mask.nonzero().flatten().tolist() == sorted(best)


# --- recorded maps, and what they do ---

SOURCE, TARGET = images(seed=1), images(seed=2)


def shaped(x=SOURCE, targets=(TARGET,), **switches):
    """The first convolution's output before shaping, on each target, and after shaping."""
    model = net()
    conv = model[0]
    config = Config(mode="da", layers=(1,), **switches)
    with methods.attach(model, config) as attachment:
        attachment.record(*targets)
        (y,) = outputs(model, "0", x)
    with torch.no_grad():
        return conv(x), [conv(t) for t in targets], y.detach(), attachment


def test_epsilon_stands_where_the_map_is_zero():
    a, (m,), y, _ = shaped(epsilon=0.25)
    values = torch.where(m > 0, 1.0, 0.25)
    assert torch.equal(y, (a > 0) * values)
    a, (m,), y, _ = shaped(epsilon=0.25, binarize=False)
    assert torch.equal(y, a * torch.where(m > 0, 1.0, 0.25))


@pytest.mark.parametrize("gradient", ["straight_through", "clipped", "zero"])
def test_the_gradient_with_an_epsilon(gradient):
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[[[2.0, 0.5], [-0.5, -2.0]]]], requires_grad=True)
    target = torch.tensor([[[[-1.0, 1.0], [-1.0, 1.0]]]])
    config = Config(mode="da", layers=(1,), epsilon=0.25, gradient=gradient)
    with methods.attach(model, config) as attachment:
        attachment.record(target)
        y = model(x)
    assert y.tolist() == [[[[0.25, 1.0], [0.0, 0.0]]]]
    if gradient == "zero":
        assert not y.requires_grad
        return
    (2 * y).sum().backward()
    expected = {"straight_through": [[0.5, 2.0], [0.5, 2.0]], "clipped": [[0.0, 2.0], [0.5, 0.0]]}
    assert x.grad.tolist() == [[expected[gradient]]]


def test_top_k_of_the_target_is_the_mask():
    a, (m,), y, attachment = shaped(top_k=0.25)
    assert torch.equal(y, ((a > 0) & top_fraction(m, 0.25)).float())
    assert attachment.density == {"0": 0.25}
    a, (m,), y, _ = shaped(top_k=0.25, product=True, binarize=False)
    assert torch.equal(y, a * (m * top_fraction(m, 0.25)))


def test_several_domains_maps_are_multiplied():
    third = images(seed=3)
    switches = {"mask_sources": ("photo", "cartoon", "art_painting")}
    a, (m1, m2, m3), y, attachment = shaped(targets=(TARGET, SOURCE, third), **switches)
    mask = (m1 > 0) & (m2 > 0) & (m3 > 0)
    assert torch.equal(y, ((a > 0) & mask).float())
    assert attachment.density["0"] == pytest.approx(mask.float().mean().item())
    a, (m1, m2), y, _ = shaped(
        targets=(TARGET, third), mask_sources=("photo", "cartoon"), product=True, binarize=False
    )
    assert torch.equal(y, a * (m1 * m2))


@pytest.mark.parametrize("switches", [{}, {"product": True, "binarize": False}])
@pytest.mark.parametrize("gradient", ["straight_through", "zero"])
def test_own_hooks_and_those_of_the_package_shape_alike(switches, gradient):
    results = []
    for kind in ("package", "own"):
        model = net()
        config = Config(mode="da", layers=(1, 2), gradient=gradient, **switches)
        attachment = methods.attach(model, config)
        assert isinstance(attachment, fastshape.Attachment)
        if kind == "own":
            attachment.remove()
            attachment = Maps(model, attachment.names, {}, config)
        attachment.record(TARGET)
        model(SOURCE).sum().backward()
        grads = [p.grad for p in model.parameters()]
        results.append((model(SOURCE), grads, attachment.fired, attachment.density))
    (y1, grads1, *rest1), (y2, grads2, *rest2) = results
    assert torch.equal(y1, y2)
    for a, b in zip(grads1, grads2, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert rest1 == rest2


@pytest.mark.parametrize("at_eval", ["off", "binarize"])
@pytest.mark.parametrize("mode", ["random", "da"])
def test_hooks_and_replacement_train_alike(mode, at_eval):
    """In float64, where rounding does not grow into another map: weights, statistics and tests after five updates."""
    results = []
    for way in ("hooks", "replace"):
        switches = {"p_zero": (0.5,)} if mode == "random" else {}
        config = Config(
            mode=mode, layers=(1, 2), at_eval=at_eval, attach=way, amp="off", lr=0.1, **switches
        )
        method = METHODS[mode](net().double(), config, CPU)
        assert set(method.attachment.method_of.values()) == {way}
        for step in range(5):
            torch.manual_seed(step)
            target = images(seed=10 + step).double() if mode == "da" else None
            method.update(images(seed=step).double(), torch.arange(6), target)
        method.recalibrate([images(seed=20).double(), images(seed=21).double()])
        logits = method.predict(images(seed=30).double())
        results.append([*method.model.state_dict().values(), logits])
    assert not torch.equal(results[0][0], net().double()[0].weight)  # they did move
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 1e-9, atol=1e-9)


@pytest.mark.parametrize("at_eval", ["off", "binarize"])
def test_own_hooks_at_test_time(at_eval):
    model = net()
    with methods.attach(
        model, Config(mode="da", layers=(1,), at_eval=at_eval, epsilon=0.5)
    ) as attachment:
        model.eval()
        (y,) = outputs(model, "0", SOURCE)
        assert attachment.fired == {"0": int(at_eval == "binarize")}
    raw = model[0](SOURCE)
    assert torch.equal(y, raw if at_eval == "off" else (raw > 0).float())


def test_random_maps_with_variants_stay_on_at_test_time_if_asked():
    model = net().eval()
    switches = {"mode": "random", "layers": (1,), "p_zero": (0.5,), "mask_unit": "channel"}
    with methods.attach(model, Config(at_eval="on", **switches)) as attachment:
        (y,) = outputs(model, "0", SOURCE)
        assert attachment.fired == {"0": 1}
        assert ((y == 0).flatten(2).all(2)).float().mean() > 0.2


# --- what a pass over target images does to BatchNorm ---


@pytest.mark.parametrize("record_mode", ["eval", "train"])
@pytest.mark.parametrize("apply_maps", [True, False])
def test_batchnorm_moves_in_train_mode_alone_and_then_all_of_it(record_mode, apply_maps):
    model = net()
    config = Config(mode="da", layers=(1,), record_mode=record_mode, apply_maps=apply_maps)
    norms = (model[1], model[4])
    before = [norm.running_mean.clone() for norm in norms]
    with methods.attach(model, config) as attachment:
        attachment.record(TARGET)
    assert model.training
    # model[4] lies behind the only shaped layer: published code ran the pass to its end
    pairs = zip(before, norms, strict=True)
    moved = [not torch.equal(mean, norm.running_mean) for mean, norm in pairs]
    assert moved == [record_mode == "train"] * 2
    if record_mode == "train":
        mean = model[0](TARGET).mean((0, 2, 3))
        torch.testing.assert_close(model[1].running_mean, 0.1 * mean, rtol=1e-5, atol=1e-7)


def test_a_pass_that_is_not_applied_and_moves_nothing_is_the_baseline(tmp_path, no_pictures):  # noqa: F811
    arms = {
        "baseline": {"mode": "baseline"},
        "nothing": {"mode": "da", "apply_maps": False, "record_mode": "eval"},
    }
    results = {}
    for name, switches in arms.items():
        folder = tmp_path / name
        assert run.main(flags(**TINY | switches | {"epochs": 1, "out": folder})) == 0
        results[name] = record.read_checkpoint(folder / "checkpoint.pt")["model"]
    for name, tensor in results["baseline"].items():
        assert torch.equal(tensor, results["nothing"][name]), name


# --- AdaBN ---


def test_adabn_tests_the_target_with_statistics_of_its_images():
    method = AdaBN(net(), Config(mode="adabn", amp="off", lr=0.1), CPU)
    method.update(SOURCE, torch.arange(6))
    conv, norm = method.model[0], method.model[1]
    source = [buffer.clone() for m in (method.model[1], method.model[4]) for buffer in m.buffers()]
    before = method.predict(TARGET)
    with method.adapted([TARGET[:3], TARGET[3:]]):
        maps = [conv(part).detach() for part in (TARGET[:3], TARGET[3:])]
        mean = (maps[0].mean((0, 2, 3)) + maps[1].mean((0, 2, 3))) / 2
        variance = (maps[0].var((0, 2, 3)) + maps[1].var((0, 2, 3))) / 2
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)
        assert not torch.equal(method.predict(TARGET), before)
    after = [buffer for m in (method.model[1], method.model[4]) for buffer in m.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(source, after, strict=True))
    assert torch.equal(method.predict(TARGET), before)


def test_adabn_trains_as_the_baseline_and_tests_the_source_as_the_baseline(tmp_path, no_pictures):  # noqa: F811
    folders = {}
    for mode in ("baseline", "adabn"):
        folders[mode] = tmp_path / mode
        assert run.main(flags(**TINY, mode=mode, out=folders[mode])) == 0
    rows, tensors = {}, {}
    for mode, folder in folders.items():
        rows[mode], tensors[mode] = result_of(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors["baseline"], tensors["adabn"], strict=True)
    )
    # and the epochs differ in the test of the target alone
    for a, b in zip(rows["baseline"], rows["adabn"], strict=True):
        differ = {name for name in a if a[name] != b[name]}
        assert differ == {"target_confusion"} | (differ & {"target_correct", "target_accuracy"})


# --- Dropout2d ---


def test_dropout2d_drops_whole_channels_and_scales_the_others():
    model = net(channels=64)
    config = Config(mode="dropout2d", layers=(1,), drop_rate=0.75, amp="off", device="cpu")
    method = Dropout2d(model, config, CPU)
    x = images(n=40)
    (y,) = outputs(model, "0", x)
    raw = F.conv2d(x, model[0].weight, model[0].bias, padding=1)
    dropped = (y == 0).flatten(2).all(2)
    assert dropped.float().mean().item() == pytest.approx(0.75, abs=0.043)  # 5 sigma of 2560
    kept = ~dropped
    assert torch.equal(y[kept], raw[kept] * 4)  # 1 / (1 - 0.75), a power of two: exact
    assert method.fired() == {"0": 1}
    model.eval()
    (y,) = outputs(model, "0", x)
    assert torch.equal(y, raw)
    assert method.fired() == {"0": 1}
    method.close()
    model.train()
    assert torch.equal(outputs(model, "0", x)[0], raw)


# --- DANN ---


@pytest.mark.parametrize(("progress", "weight"), [(0, 0.0), (0.5, 0.9866142982), (1, 0.9999092043)])
def test_the_weight_of_the_reversal(progress, weight):
    assert methods.reversal(progress) == pytest.approx(weight, abs=1e-10)


def test_the_reversal_turns_the_sign_and_scales():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = ReverseGradient.apply(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([4.0, 8.0])).sum().backward()
    assert x.grad.tolist() == [-1.0, -2.0]


def test_the_head_is_that_of_the_protocol_and_a_function_of_the_seed():
    before = torch.get_rng_state()
    head = DomainHead(512, 3)
    assert torch.equal(torch.get_rng_state(), before)
    kinds = [type(part).__name__ for part in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(part.weight.shape) for part in head if isinstance(part, nn.Linear)] == [
        (1024, 512), (1024, 1024), (1, 1024),
    ]  # fmt: skip
    assert torch.equal(head[0].weight, DomainHead(512, 3)[0].weight)
    assert not torch.equal(head[0].weight, DomainHead(512, 4)[0].weight)


class Small(nn.Module):
    """Features of three numbers, and a classifier called as in ResNet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 3, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(3, 7)

    def forward(self, x):
        return self.fc(self.avgpool(self.conv1(x)).flatten(1))


def dann(**switches):
    config = Config(mode="dann", amp="off", device="cpu", lr=0.1, **switches)
    method = Dann(Small(), config, CPU)
    torch.manual_seed(1)
    method.head = nn.Sequential(nn.Linear(3, 1))
    return method


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_loss_and_gradients_of_dann_by_hand(weight):
    method = dann(dann_weight=weight)
    method.progress = 0.1
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    loss, logits = method.loss(SOURCE, labels, TARGET)
    model, head = method.model, method.head[0]

    def features(x):
        return model.conv1(x).mean((2, 3))

    p_source = torch.sigmoid(head(features(SOURCE))).squeeze(1)
    p_target = torch.sigmoid(head(features(TARGET))).squeeze(1)
    domain = -torch.log(1 - p_source).mean() - torch.log(p_target).mean()
    classes = F.cross_entropy(model(SOURCE), labels)
    torch.testing.assert_close(loss, classes + weight * domain)
    torch.testing.assert_close(logits, model(SOURCE))

    loss.backward()
    found = [
        model.conv1.weight.grad.clone(),
        head.weight.grad.clone(),
        model.fc.weight.grad.clone(),
    ]
    reversal = 2 / (1 + math.exp(-1)) - 1
    (of_classes, of_fc) = torch.autograd.grad(
        classes, [model.conv1.weight, model.fc.weight], retain_graph=True
    )
    of_domain, of_head = torch.autograd.grad(domain, [model.conv1.weight, head.weight])
    torch.testing.assert_close(found[0], of_classes - reversal * weight * of_domain)
    torch.testing.assert_close(found[1], weight * of_head)
    torch.testing.assert_close(found[2], of_fc)


def test_heads_learn_faster_if_asked_and_the_schedule_drops_both():
    config = config_of(mode="dann", dann_lr_factor=10, epochs=1, lr=0.02)
    experiment = run.build(config)
    method = experiment.method
    body, heads = method.optimizer.param_groups
    assert (body["lr"], heads["lr"]) == (0.02, 0.2)
    named = {id(p): name for name, p in method.model.named_parameters()}
    assert {named.get(id(p), "head") for p in heads["params"]} == {"fc.weight", "fc.bias", "head"}
    every = len(list(method.model.parameters())) + len(list(method.head.parameters()))
    assert len(body["params"]) + len(heads["params"]) == every
    method.optimizer.step()
    method.schedule.step()
    assert (body["lr"], heads["lr"]) == pytest.approx((0.002, 0.02))


def test_one_batch_of_both_domains_goes_through_batchnorm():
    method = run.build(config_of(mode="dann")).method
    seen = []
    method.model.bn1.register_forward_hook(lambda m, a, y: seen.append(len(a[0])))
    x = images(n=4, side=32)
    method.update(x, torch.arange(4), x + 1)
    assert seen == [8]


def test_progress_is_the_share_of_updates_done(monkeypatch, tmp_path):
    seen = []
    update = Method.update

    def watched(self, *batch, whole):
        seen.append(self.progress)
        return update(self, *batch, whole=whole)

    monkeypatch.setattr(Method, "update", watched)
    train_arm(config_of(mode="dann"), tmp_path)  # 14 images, 8 at a time, 2 epochs
    assert seen == [0, 0.25, 0.5, 0.75]


# --- equal updates ---


def train_arm(config, folder, evaluate=None):
    experiment = run.build(config)
    evaluate = evaluate or (lambda *_: {"target_confusion": [[3] + [0] * 6] * 7})
    return training.train(experiment.method, experiment.images, evaluate, config, folder, Screen())


def test_the_same_number_of_updates_at_any_batch_size(tmp_path):
    rows = {}
    for size in (4, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        rows[size] = train_arm(config_of(updates=5, batch_size=size, lr=0.02), folder)
    # of 14 images: 4 updates an epoch, or 2
    assert [row["updates"] for row in rows[4]] == [4, 1]
    assert [row["source_train_total"] for row in rows[4]] == [14, 4]
    assert [row["updates"] for row in rows[8]] == [2, 2, 1]
    assert [row["source_train_total"] for row in rows[8]] == [14, 14, 8]
    # the rate drops after int(0.8 * 5) updates, wherever an epoch ends
    assert [row["lr"] for row in rows[4]] == pytest.approx([0.02, 0.002])
    assert [row["lr"] for row in rows[8]] == pytest.approx([0.02, 0.02, 0.002])


# --- what training sees ---


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_touches_target_labels(arm, monkeypatch, tmp_path):
    with_target_labels(monkeypatch, lambda labels: Untouchable())
    assert train_arm(config_of(**ARMS[arm]), tmp_path)[0]["updates"] == 2


@pytest.mark.parametrize("arm", ["adabn", "dann"])
def test_other_target_labels_change_the_count_alone(arm, monkeypatch, tmp_path, no_pictures):  # noqa: F811
    counts, tensors = [], []
    for shift in (0, 1):
        with_target_labels(monkeypatch, lambda labels, shift=shift: (labels + shift) % 7)
        folder = tmp_path / str(shift)
        assert run.main(flags(**TINY | ARMS[arm] | {"epochs": 1, "out": folder})) == 0
        rows, state = result_of(folder)
        counts.append(rows[0]["target_confusion"])
        tensors.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert np.roll(counts[0], 1, axis=0).tolist() == counts[1]


def test_domain_generalization_sees_no_target_image(monkeypatch):
    config = config_of(**ARMS["domains"])
    domains = {name: load_domain("toy", name, limit=3) for name in ("photo", "art_painting")}
    seen = run.build(config).images.unlabelled
    assert np.array_equal(seen[0][0], domains["photo"].images)
    assert list(seen[0][1]) == list(range(21))
    # the source's own images: those that are trained on, never the held-out ones
    assert np.array_equal(seen[1][0], domains["art_painting"].images)
    assert list(seen[1][1]) == list(run.build(config).images.source_indices)
    assert len(seen[1][1]) == 14


@pytest.mark.parametrize("mode", ["baseline", "random", "adabn", "dropout2d"])
def test_training_without_target_images_is_given_none(mode):
    assert run.build(config_of(mode=mode)).images.unlabelled == []


def test_domains_are_paired_each_in_its_own_order():
    config = config_of(**ARMS["domains"] | {"target_transform": "test"})
    shown = [t for _, _, t in run.build(config).images.epoch(config, 1, True)]
    assert [t.shape for t in shown] == [(8, 2, 3, 32, 32), (6, 2, 3, 32, 32)]
    orders = [training.epoch_order(config, 1, 14, 14, domain)[1] for domain in (0, 1)]
    assert not np.array_equal(*orders)


EXPECTED = {  # did passes over other images leave BatchNorm alone? None: there were none
    "adabn": None, "dropout2d": None, "channel": None, "dann": False, "bn-only": False,
    "train-mode": False, "top-k": True, "domains": True, "product": True,
}  # fmt: skip


@pytest.mark.parametrize("arm", EXPECTED)
def test_whether_batchnorm_was_left_alone_is_measured(arm, tmp_path):
    config = config_of(**{"epochs": 1} | ARMS[arm])
    (row,) = train_arm(config, tmp_path)
    assert row["bn_untouched"] is EXPECTED[arm]


def test_a_pass_that_breaks_its_promise_is_seen(monkeypatch, tmp_path):
    attach = methods.attach

    def careless(model, config):
        attachment = attach(model, config)
        whole = attachment.record
        first = []

        def record_and_move(*batches):
            whole(*batches)
            if first:  # once, and not in the first update
                model.bn1.running_mean[0] += 1e-6
            first.append(1)

        attachment.record = record_and_move
        return attachment

    monkeypatch.setattr(methods, "attach", careless)
    (row,) = train_arm(config_of(mode="da", layers=[4], epochs=1), tmp_path)
    assert row["bn_untouched"] is False


# --- no waiting for the device ---


class Reads(TorchDispatchMode):
    """Counts values that are brought to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "arm", ["adabn", "dropout2d", "dann", "top-k", "domains", "block", "epsilon"]
)
def test_updates_and_tests_read_nothing(arm):
    experiment = run.build(config_of(**ARMS[arm]))
    method = experiment.method
    x = images(n=4, side=32)
    target = torch.stack([x, x + 1], 1) if arm == "domains" else x + 1
    with Reads() as reads:
        float(x.sum())
        assert reads.count == 1  # the counter works
        method.update(x, torch.arange(4), target if method.uses_target else None)
        training.confusion(method, [(x, torch.arange(4))], parts(4), lambda n: None)
        assert reads.count == 1


# --- runs and resumes ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_runs_is_checked_and_resumes_to_the_same_bits(arm, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    if arm not in ("top-k", "domains", "block", "epsilon"):
        monkeypatch.setattr(run.pictures, "maps", lambda *_: drawn.append(arm))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    tiny = {k: v for k, v in TINY.items() if k != "epochs" or arm != "updates"}
    arguments = flags(**tiny | ARMS[arm])
    assert run.main([*arguments, "--out", str(whole)]) == 0
    assert record.check(whole) == []
    if arm in ("top-k", "domains", "block", "epsilon"):
        assert (whole / "maps.png").exists()
    assert bool(drawn) == (arm in ("train-mode", "product", "unbinarized", "channel", "updates"))

    save = training.save_checkpoint

    def dying(*given):
        save(*given)
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(training, "save_checkpoint", dying)
        run.main([*arguments, "--out", str(parted)])
    assert not (parted / "summary.json").exists()
    assert run.main([*arguments, "--out", str(parted), "--resume"]) == 0
    assert_same_result(parted, whole)
    heads = [record.read_checkpoint(f / "checkpoint.pt").get("head") for f in (whole, parted)]
    assert (heads[0] is not None) == (arm == "dann")
    if arm == "dann":
        assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    seals = [json.loads((f / "summary.json").read_text())["config_hash"] for f in (whole, parted)]
    assert seals[0] == seals[1]


def test_every_mode_has_a_class_of_its_own():
    assert set(METHODS) == {"baseline", "random", "da", "adabn", "dropout2d", "dann"}
    assert len(set(METHODS.values())) == 6
    assert all(issubclass(kind, Method) for kind in METHODS.values())
    assert [kind for kind in METHODS.values() if kind.uses_target] == [TargetMaps, Dann]
