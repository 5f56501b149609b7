"""What every method does: updates, its schedule, recalibration, tests that leave no trace."""

import copy

import pytest
import torch
from domainshift.config import Test
from domainshift.errors import ConfigError
from domainshift.methods import METHODS, Method
from domainshift.methods.dann import Dann
from domainshift.methods.shaping import TargetMaps
from small_networks import SOURCE, TARGET, config_of, images, method_with, net
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastshape

LABELS = torch.arange(6)

# One configuration for each path through the methods' code.
ARMS = {
    "baseline": {},
    "adabn": {"mode": "adabn"},
    "random": {"mode": "random", "layers": (1,)},
    "random-zero": {"mode": "random", "layers": (1,), "gradient": "zero"},
    "channel": {"mode": "random", "layers": (1,), "mask_unit": "channel"},
    "block": {"mode": "random", "layers": (1,), "mask_unit": "block", "block_size": 3},
    "dropout2d": {"mode": "dropout2d", "layers": (1,)},
    "rescaled": {"mode": "random-rescaled", "layers": (1,)},
    "mixstyle": {"mode": "mixstyle", "layers": (1,), "mix_probability": 1},
    "dann": {"mode": "dann"},
    "da": {"mode": "da", "layers": (1,)},
    "bn-only": {"mode": "da", "layers": (1,), "apply_maps": False, "record_mode": "train"},
    "train-mode": {"mode": "da", "layers": (1,), "record_mode": "train"},
    "product": {"mode": "da", "layers": (1,), "product": True, "binarize": False},
    "unbinarized": {"mode": "da", "layers": (1,), "binarize": False},
    "top-k": {"mode": "da", "layers": (1,), "top_k": 0.3},
    "epsilon": {"mode": "da", "layers": (1,), "epsilon": 0.1},
    "domains": {"mode": "da", "layers": (1,), "mask_sources": ("photo", "cartoon")},
}


def batch_for(method, x=SOURCE):
    target = torch.stack([x, x + 1], 1) if method.config.options.model_dump().get("mask_sources") \
        else x + 1  # fmt: skip
    return x, LABELS[: len(x)], target if method.uses_target else None


def weights(method):
    return [t.clone() for t in method.model.state_dict().values()]


# --- classes ---


def test_every_method_is_a_class_of_its_own():
    names = [
        "baseline",
        "random",
        "da",
        "adabn",
        "dropout2d",
        "random-rescaled",
        "mixstyle",
        "dann",
    ]
    assert list(METHODS) == names
    assert len(set(METHODS.values())) == len(names)
    assert all(issubclass(kind, Method) and name == kind.name for name, kind in METHODS.items())
    assert [kind for kind in METHODS.values() if kind.uses_target] == [TargetMaps, Dann]
    assert [kind for kind in METHODS.values() if kind.uses_progress] == [Dann]
    assert len({kind.title for kind in METHODS.values()}) == len(names)


@pytest.mark.parametrize(
    ("arm", "cost"), [("baseline", 1), ("da", 4 / 3), ("domains", 5 / 3), ("dann", 2)]
)
def test_cost_in_passes_of_one_image(arm, cost):
    config = config_of(**ARMS[arm])
    assert METHODS[config.mode].cost(config) == pytest.approx(cost)


def test_domains_that_training_reads():
    def domains(mode="baseline", **values):
        return METHODS[mode].domains(config_of(mode, **values))

    assert domains(target=("sketch", "photo")) == ("art_painting",)
    assert domains("dann") == domains("da") == ("art_painting", "sketch")
    assert domains("da", mask_sources=("photo", "art_painting")) == ("art_painting", "photo")
    others = METHODS["da"].others(config_of("da", mask_sources=("photo", "art_painting")))
    assert others == ("photo", "art_painting")


# --- updates ---


def test_an_update_is_a_step_of_sgd_on_the_mean_loss():
    method = method_with(momentum=0.0, nesterov=False, weight_decay=0.0)
    plain = net()
    loss = F.cross_entropy(plain(SOURCE), LABELS)
    correct = (plain(SOURCE).argmax(1) == LABELS).sum()
    grads = torch.autograd.grad(loss, list(plain.parameters()))
    step = method.update(SOURCE, LABELS)
    for after, before, grad in zip(method.model.parameters(), plain.parameters(), grads,
                                   strict=True):  # fmt: skip
        torch.testing.assert_close(after, before - 0.1 * grad)
    assert step.loss_sum.item() == pytest.approx(6 * loss.item())
    assert (step.loss_sum.dtype, step.images) == (torch.float64, 6)
    assert step.correct == correct
    assert (method.passes, method.share) == (1, 1.0)


def test_accumulation_is_one_update_on_all_images():
    """Passes of 4 and 2: each image counts alike. BatchNorm in evaluation does not see the parts."""
    updated = []
    for accumulate in (1, 2):
        model = net().double()
        method = method_with(model, accumulate=accumulate, batch_size=6)
        for norm in method.norms():
            norm.train = lambda mode=True, norm=norm: norm  # stays in evaluation mode
            norm.training = False
        method.update(SOURCE.double()[:5], LABELS[:5])
        assert method.passes == accumulate
        updated.append(weights(method))
    for a, b in zip(*updated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_rate_drops_after_a_part_of_the_updates_or_of_the_epochs():
    method = method_with(epochs=None, updates=5, lr=0.02)
    rates = []
    for _ in range(5):
        rates.append(method.optimizer.param_groups[0]["lr"])
        method.update(SOURCE, LABELS)
    assert rates == pytest.approx([0.02] * 4 + [0.002])  # int(0.8 * 5)
    method = method_with(epochs=5, lr=0.02)
    for _ in range(6):
        method.update(SOURCE, LABELS)
    assert method.optimizer.param_groups[0]["lr"] == 0.02  # the caller steps once per epoch
    for _ in range(4):
        method.schedule.step()
    assert method.optimizer.param_groups[0]["lr"] == pytest.approx(0.002)


@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_continues_to_the_same_bits(arm):
    first, second = method_with(**ARMS[arm]), method_with(**ARMS[arm])
    torch.manual_seed(1)
    first.update(*batch_for(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for method in (first, second):
        torch.manual_seed(2)
        method.update(*batch_for(method))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_a_checkpoint_serves_another_memory_format():
    first = method_with()
    first.update(SOURCE, LABELS)
    second = method_with(net().to(memory_format=torch.channels_last))
    second.load_state_dict(first.state_dict())
    weight = second.model[0].weight
    momentum = second.optimizer.state[weight]["momentum_buffer"]
    assert momentum.stride() == weight.stride() != first.model[0].weight.stride()
    assert torch.equal(momentum, first.optimizer.state[first.model[0].weight]["momentum_buffer"])


@pytest.mark.parametrize("arm", ARMS)
def test_close_leaves_the_model_as_it_came(arm):
    method = method_with(**ARMS[arm])
    before = method.model.state_dict().keys()
    method.close()
    assert method.model.state_dict().keys() == before
    for module in method.model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)
        assert type(module).__module__.startswith("torch.nn")


class Reads(TorchDispatchMode):
    """Counts values that are brought to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arm", ARMS)
def test_updates_and_predictions_read_nothing(arm):
    """Apart from the look at shaped outputs, which a CPU alone makes."""
    method = method_with(**ARMS[arm])
    if hasattr(method, "attachment"):
        assert getattr(method.attachment, "check_finite", True)
        method.attachment.check_finite = False
    with Reads() as reads:
        float(SOURCE.sum())
        assert reads.count == 1  # the counter works
        method.update(*batch_for(method))
        method.predict(SOURCE)
        assert reads.count == 1


# --- BatchNorm in training ---


@pytest.mark.parametrize("arm", ARMS)
def test_whether_batchnorm_was_left_alone_is_measured_and_stated_alike(arm):
    method = method_with(**ARMS[arm])
    method.update(*batch_for(method))
    moved = None if method.bn_moved is None else bool(method.bn_moved)
    stated = method.statistics_untouched(method.config)
    assert stated is (None if moved is None else not moved)
    assert stated is {"dann": False, "bn-only": False, "train-mode": False}.get(
        arm, True if method.uses_target else None
    )


def test_a_pass_that_breaks_its_promise_is_noticed(monkeypatch):
    method = method_with(mode="da", layers=(1,))
    record = method.attachment.record
    passes = []

    def record_and_move(*batches):
        record(*batches)
        if len(passes) == 1:  # once, and not in the first update
            method.model[1].running_mean[0] += 1e-6
        passes.append(1)

    monkeypatch.setattr(
        fastshape.Attachment, "record", lambda self, *batches: record_and_move(*batches)
    )
    method.update(SOURCE, LABELS, TARGET)
    assert not method.bn_moved
    for _ in range(2):
        method.update(SOURCE, LABELS, TARGET)
        assert method.bn_moved


def test_a_network_without_batchnorm_has_nothing_to_move():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(5, 7))  # fmt: skip
    for arm in ("dann", "train-mode"):
        config = config_of(**ARMS[arm], model="alexnet")
        assert METHODS[config.mode].statistics_untouched(config) is True
        method = method_with(model, **ARMS[arm], model="alexnet")
        method.update(*batch_for(method))
        assert not method.bn_moved
        with method.recalibrated([SOURCE]):
            method.predict(SOURCE)
        method.close()


# --- predictions and recalibration ---


def test_a_prediction_has_logits_and_the_input_of_the_classifier():
    method = method_with(net().double())
    prediction = method.predict(SOURCE.double())
    body = nn.Sequential(*list(method.model)[:-1]).eval()
    features = body(SOURCE.double())
    assert {t.dtype for t in prediction} == {torch.float32}
    torch.testing.assert_close(prediction.features, features.float())
    torch.testing.assert_close(prediction.logits, method.model[-1](features).float())
    assert not prediction.logits.requires_grad


TWELVE = images(n=12)
BATCHES = TWELVE.split(4)


def trained(mode="baseline", **options):
    method = method_with(mode=mode, **options)
    method.update(TWELVE, torch.arange(12) % 7)
    return method


def test_statistics_are_plain_means_over_the_batches():
    method = trained()
    norm, conv = method.model[1], method.model[0]
    parameters = [p.clone() for p in method.model.parameters()]
    state = torch.get_rng_state()
    method.recalibrate(BATCHES)
    maps = [conv(batch).detach() for batch in BATCHES]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variance = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1
    after = method.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(parameters, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", ("hooks", "replace"))
@pytest.mark.parametrize("at_eval", ("off", "binarize", "on"))
def test_recalibration_shapes_as_the_test_does(at_eval, way):
    method = trained("random", layers=(1,), attach=way)
    trained_mean = method.model[1].running_mean.clone()
    fired = method.fired()["0"]
    with method.testing(Test(domain="sketch", at_eval=at_eval)):
        method.recalibrate(BATCHES)
    conv = method.model[0]
    unshaped = F.conv2d(TWELVE, conv.weight, conv.bias, padding=1).detach()
    expected = {"off": unshaped, "binarize": (unshaped > 0).float()}
    if at_eval in expected:  # batches of one size: the mean of their means is the mean
        mean = expected[at_eval].mean((0, 2, 3))
        torch.testing.assert_close(method.model[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(method.model[1].running_mean, trained_mean)
    assert method.fired()["0"] == fired + (0 if at_eval == "off" else len(BATCHES))


@pytest.mark.parametrize("raises", [False, True])
def test_recalibration_ends_with_the_statistics_of_training(raises):
    method = trained()
    before = weights(method)
    batches = [TWELVE, None] if raises else BATCHES

    with pytest.raises(TypeError) if raises else torch.no_grad():
        with method.recalibrated(batches):
            assert not torch.equal(method.model[1].running_mean, before[2])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(method), strict=True))
    assert [norm.momentum for norm in method.norms()] == [0.1, 0.1]


# --- tests ---


@pytest.mark.parametrize("mode", ["baseline", "adabn", "dropout2d", "dann"])
def test_a_method_without_shaping_has_no_shaped_test(mode):
    method = method_with(mode=mode, **({"layers": (1,)} if mode == "dropout2d" else {}))
    with method.testing(Test(domain="sketch")):
        method.predict(SOURCE)
    with pytest.raises(ConfigError, match=f"at_eval: 'on' is not for mode {mode}; allowed: off$"):
        with method.testing(Test(domain="sketch", at_eval="on")):
            pass


# --- float16 ---


def test_an_update_whose_float16_gradient_overflows_is_counted_and_moves_nothing():
    method = method_with(net(), amp="float16")
    before = weights(method)
    method.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    step = method.update(*batch_for(method))
    assert bool(step.skipped)
    moved = [name for name, t in zip(method.model.state_dict(), before, strict=True)
             if not torch.equal(t, method.model.state_dict()[name])]  # fmt: skip
    assert not any(name.endswith(("weight", "bias")) for name in moved)
    method.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    assert not bool(method.update(*batch_for(method)).skipped)
    assert not bool(method_with(net()).update(*batch_for(method)).skipped)  # without a scaler


def test_the_schedule_of_updates_waits_for_those_that_float16_skips():
    method = method_with(net(), amp="float16", updates=4, epochs=None, step_fraction=0.5, gamma=0.1)
    full = method.optimizer.param_groups[0]["lr"]
    rates = []
    for scale in (2.0**60, 1.0, 2.0**60, 1.0):
        method.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        method.update(*batch_for(method))
        rates.append(method.optimizer.param_groups[0]["lr"])
    assert rates == [full, full, full, full * 0.1]
