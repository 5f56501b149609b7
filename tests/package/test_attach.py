"""attach(): the choice of layers, the target pass, the shaping, and that nothing else changes."""

import copy
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastshape
from fastshape import attach
from fastshape.attach import MODES
from fastshape.fusion import output_is_free

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


def resnet18(**arguments):
    torch.manual_seed(0)
    return models.resnet18(num_classes=7, **arguments)


class Tiny(nn.Module):
    """conv -> bn -> relu -> conv -> relu (the same, in place) -> pool -> fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)
        self.maps = []

    def forward(self, x):
        a = self.conv1(x)
        b = self.relu(self.bn(a))
        c = self.relu(self.conv2(b))
        self.maps = [a, b, c]
        return self.fc(c.mean((2, 3)))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
targets = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


# ---- the choice of layers ----


def test_the_reports_numbers():
    model = resnet18()
    names = attach(model, "all", mode="binarize").names
    assert len(names) == 20
    assert (names[0], names[3], names[7], names[12], names[17], names[19]) == (
        "conv1",
        "layer1.1.conv1",
        "layer2.0.downsample.0",
        "layer3.0.downsample.0",
        "layer4.0.downsample.0",
        "layer4.1.conv2",
    )
    every_third = attach(model, "all", every=3, mode="binarize").names
    assert every_third == tuple(names[k - 1] for k in (3, 6, 9, 12, 15, 18))
    assert attach(model, [1, 4], mode="binarize").names == ("conv1", "layer1.1.conv1")
    assert attach(model, 4, mode="binarize").names == ("layer1.1.conv1",)


def test_names_patterns_and_kinds():
    model = resnet18()
    assert attach(model, "layer1.0.conv2", mode="binarize").names == ("layer1.0.conv2",)
    assert attach(model, ["layer4.*conv*"], mode="binarize").names == (
        "layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2",
    )  # fmt: skip
    assert attach(model, [1], after="bn", mode="binarize").names == ("bn1",)
    assert len(attach(model, "all", after="bn", mode="binarize").names) == 20
    assert len(attach(model, "all", after="relu", mode="binarize").names) == 9
    assert attach(model, "layer1", mode="binarize").names == ("layer1",)


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    (
        (21, {}, ValueError, "there is no conv 21; this model has convs 1 to 20"),
        (0, {}, ValueError, "there is no conv 0"),
        (
            10,
            {"after": "relu"},
            ValueError,
            "there is no activation 10; this model has activations 1 to 9",
        ),
        ("layer9", {}, ValueError, "no module 'layer9'; close names are 'layer4'"),
        ([1, "conv1"], {}, ValueError, r"'conv1' is named twice \(again by 'conv1'\)"),
        ([4, 4], {}, ValueError, "'layer1.1.conv1' is named twice"),
        ("layer9*", {}, ValueError, "pattern 'layer9\\*' matches no conv; close names are"),
        ([], {}, ValueError, "nothing to shape"),
        ([1], {"every": 2}, ValueError, "every=2: nothing to shape"),
        ([1], {"every": 0}, ValueError, "every=0: must be an int of at least 1"),
        ([1.5], {}, TypeError, "1.5 is neither an int, a name, a pattern nor a module"),
        ([True], {}, TypeError, "True is neither"),
        (1, {"after": "pool"}, ValueError, "after='pool': allowed are conv, bn, relu"),
        (
            1,
            {"mode": "dropout"},
            ValueError,
            "mode='dropout': allowed are random, target, binarize, product",
        ),
        (1, {"p_zero": 1.0, "mode": "random"}, ValueError, "p_zero=1.0: must be in"),
        (1, {"mode": "random"}, ValueError, "mode 'random' needs a probability"),
        (1, {"mode": "target", "p_zero": 0.5}, ValueError, "only mode 'random' draws masks"),
        ([1, 4], {"mode": "random", "p_zero": [0.1]}, ValueError, "1 values for 2 layers"),
        (1, {"gradient": "none"}, ValueError, "gradient='none': allowed are"),
        (1, {"mode": "product", "gradient": "clipped"}, ValueError, "mode 'product' allows"),
        (1, {"at_eval": "random"}, ValueError, "at_eval='random': allowed are off, binarize, on"),
        (1, {"record_mode": "test"}, ValueError, "record_mode='test': allowed are eval, train"),
        (1, {"method": "fx"}, ValueError, "method='fx': allowed are hooks, replace, auto"),
    ),
)
def test_bad_arguments_are_named_and_leave_no_hook(layers, options, error, message):
    model = resnet18()
    with pytest.raises(error, match=message):
        attach(model, layers, **{"mode": "binarize", **options})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="model: must be a torch.nn.Module, not function"):
        attach(lambda x: x, 1, mode="binarize")


# ---- shaping ----


def test_random_shapes_the_output_of_the_layer(tiny):
    plain = nn.functional.conv2d(images, tiny.conv1.weight, tiny.conv1.bias, padding=1)
    with attach(tiny, 1, p_zero=0.5) as attachment:
        torch.manual_seed(3)
        tiny(images)
        torch.manual_seed(3)
        expected = fastshape.shape(plain, p_zero=0.5)
        assert torch.equal(tiny.maps[0], expected)
        assert attachment.fired == {"conv1": 1}
        mask = attachment.masks["conv1"]
        assert torch.equal(expected, fastshape.shape(plain, mask=mask))
        assert attachment.density() == {"conv1": mask.density()}
        assert 0.4 < attachment.density()["conv1"] < 0.6


def test_one_p_zero_per_layer(tiny):
    with attach(tiny, [1, 2], p_zero=[0.1, 0.9]) as attachment:
        tiny(images)
        density = attachment.density()
    assert density["conv1"] > 0.8 and density["conv2"] < 0.2


def test_the_word_of_the_experiments_is_taken_for_target_maps(tiny):
    with fastshape.attach(tiny, 1, mode="da") as attachment:
        assert attachment.mode == "target"


def test_target_masks_are_those_of_the_target(tiny):
    tiny.eval()
    tiny(targets)
    target_map = tiny.maps[0].detach()
    tiny.train()
    with attach(tiny, 1, mode="target") as attachment:
        attachment.record(targets)
        plain = nn.functional.conv2d(images, tiny.conv1.weight, tiny.conv1.bias, padding=1)
        tiny(images)
        assert torch.equal(tiny.maps[0], ((plain > 0) & (target_map > 0)).float())
        assert attachment.density()["conv1"] == (target_map > 0).float().mean().item()


def test_product_multiplies_by_the_recorded_map(tiny):
    with attach(tiny, 1, mode="product", record_mode="train") as attachment:
        attachment.record(targets)
        conv = nn.functional.conv2d
        plain = conv(images, tiny.conv1.weight, tiny.conv1.bias, padding=1)
        recorded = conv(targets, tiny.conv1.weight, tiny.conv1.bias, padding=1)
        tiny(images).sum().backward()
        assert torch.equal(tiny.maps[0], plain * recorded)
        assert attachment.fired == {"conv1": 1}


def test_binarize_only(tiny):
    with attach(tiny, 1, mode="binarize") as attachment:
        tiny(images)
        assert set(tiny.maps[0].unique().tolist()) == {0.0, 1.0}
        assert attachment.density() == {"conv1": 1.0}


@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
def test_gradient_policy_reaches_the_weights(tiny, gradient):
    with attach(tiny, 1, p_zero=0.2, gradient=gradient):
        tiny(images).sum().backward()
    if gradient == "zero":
        assert tiny.conv1.weight.grad is None
    else:
        assert tiny.conv1.weight.grad.abs().sum() > 0
    assert tiny.conv2.weight.grad is not None


def test_at_eval(tiny):
    tiny.eval()
    expected = tiny(images)
    with attach(tiny, 1, p_zero=0.5) as attachment:
        assert torch.equal(tiny(images), expected) and attachment.fired == {"conv1": 0}
    with attach(tiny, 1, p_zero=0.5, at_eval="binarize") as attachment:
        tiny(images)
        assert torch.equal(
            tiny.maps[0],
            (
                nn.functional.conv2d(images, tiny.conv1.weight, tiny.conv1.bias, padding=1) > 0
            ).float(),
        )
    with attach(tiny, 1, p_zero=0.5, at_eval="on") as attachment:
        first = tiny(images)
        assert not torch.equal(first, tiny(images)) and attachment.fired == {"conv1": 2}


# ---- in place ----


@pytest.fixture
def output_pointers(monkeypatch):
    """The data pointers of the outputs of torch's convolutions and batch norms, in the order of the calls."""
    pointers = []

    def watch(module, method):
        real = getattr(module, method)

        def wrapper(*args, **kwargs):
            output = real(*args, **kwargs)
            pointers.append(output.data_ptr())
            return output

        monkeypatch.setattr(module, method, wrapper)

    watch(nn.Conv2d, "_conv_forward")
    watch(nn.functional, "batch_norm")
    return pointers


class Keeping(nn.Conv2d):
    """A convolution whose backward needs its output."""

    def forward(self, x):
        return super().forward(x).exp()


class Remembering(nn.Conv2d):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def chain(conv=nn.Conv2d):
    return nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
@pytest.mark.parametrize("binarize", (True, False))
@pytest.mark.parametrize(("after", "k"), (("conv", 0), ("bn", 1)))
def test_output_of_conv_and_norm_is_overwritten(output_pointers, gradient, binarize, after, k):
    """Neither needs its output for backward. Shaping allocates no map and saves only bits."""
    torch.manual_seed(0)
    model = chain()
    maps = []
    model[k + 1].register_forward_pre_hook(lambda m, a: maps.append(a[0].data_ptr()))
    grads = []
    for inplace in (True, False):
        if not inplace:  # another hook may keep a reference to the map
            model[k].register_forward_hook(lambda *a: None)
        model.zero_grad()
        with attach(model, 1, after=after, p_zero=0.3, gradient=gradient, binarize=binarize):
            torch.manual_seed(1)
            output_pointers.clear()
            y = model(images)
            assert (maps[-1] == output_pointers[k]) == inplace
            y.square().sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_in_place_allocates_and_saves_no_map(output_pointers):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    saved = []
    with attach(model, 1, p_zero=0.3):

        def pack(t):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(images)
    maps = [t for t in saved if t.shape == (4, 4, 6, 6)]
    # Autograd saves the input of the second convolution: the shaped output of the first.
    assert [t.data_ptr() for t in maps] == output_pointers[:1]
    assert set(maps[0].unique().tolist()) == {0.0, 1.0}
    y.sum().backward()


@pytest.mark.parametrize(
    "case", ("keeping", "remembering", "another hook", "relu", "global hook", "no batch")
)
def test_in_place_only_where_nothing_else_needs_the_map(tiny, case, output_pointers):
    """Overwriting would break backward or change a map that other code holds."""
    torch.manual_seed(0)
    model = chain({"keeping": Keeping, "remembering": Remembering}.get(case, nn.Conv2d))
    layers, held = "2" if case == "relu" else "0", []
    x = images
    if case == "another hook":
        model[0].register_forward_hook(lambda m, a, out: held.append(out))
    if case == "relu":
        model[1].register_forward_hook(lambda m, a, out: None)
    if case == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, a, out: held.append(out) if m is model[0] else None
        )
    if case == "no batch":
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), images[0]
    with attach(model, layers, p_zero=0.3):
        y = model(x)
        y.sum().backward()
    if case == "global hook":
        handle.remove()
    if case == "remembering":
        held.append(model[0].kept)
    for out in held:
        assert torch.equal(out, nn.functional.conv2d(x, model[0].weight, model[0].bias))
    if case in ("remembering", "another hook", "global hook"):
        assert len(held) == 1
    assert model[0].weight.grad is not None


def test_only_the_modules_own_output_is_overwritten():
    conv = nn.Conv2d(3, 4, 3)
    z = conv(images)
    assert output_is_free(conv, z) and output_is_free(conv, z.detach())
    assert not output_is_free(conv, z.exp()) and not output_is_free(conv, z[:])
    assert not output_is_free(conv, torch.ones(3, requires_grad=True))


def test_without_a_graph_the_map_is_overwritten_too(output_pointers):
    model = chain().eval()
    for context in (torch.no_grad, torch.inference_mode):
        with attach(model, 1, after="conv", mode="binarize", at_eval="on"), context():
            output_pointers.clear()
            pointers = []
            handle = model[1].register_forward_pre_hook(
                lambda m, a, pointers=pointers: pointers.append(a[0].data_ptr())
            )
            model(images)
            handle.remove()
            assert pointers == output_pointers[:1]


# ---- checkpointing ----


class Checkpointed(nn.Module):
    """Tiny with two nested parts. Backward computes one or both of them again."""

    def __init__(self, parts=(), use_reentrant=None):
        super().__init__()
        self.parts, self.use_reentrant = parts, use_reentrant
        self.tiny = Tiny()

    def again(self, part, function, x):
        if part not in self.parts:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def block(self, x):
        return self.tiny.relu(self.tiny.bn(self.tiny.conv1(x)))

    def outer(self, x):
        return self.tiny.conv2(self.again("inner", self.block, x)).sin()

    def forward(self, x):
        return self.tiny.fc(self.again("outer", self.outer, x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs")  # in the target pass
@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("parts", (("inner",), ("outer",), ("inner", "outer"), ("model",)))
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_nothing(mode, parts, use_reentrant):
    torch.manual_seed(0)
    models = Checkpointed(), Checkpointed(parts, use_reentrant)
    models[1].load_state_dict(models[0].state_dict())
    steps = []
    for model in models:
        model.double()
        p_zero = 0.3 if mode == "random" else None
        # Computing a part again moves its running statistics again, and a target pass in evaluation mode depends on them.
        attachment = attach(model, "tiny.*", mode=mode, p_zero=p_zero, record_mode="train")
        for seed in (1, 2):  # each step uses the maps of its own record
            torch.manual_seed(seed)
            if mode in ("target", "product"):
                attachment.record(torch.randn(targets.shape).double())
            x = images.double().requires_grad_()
            y = model.again("model", model, x)
            y.square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        steps.append((y, grads, attachment.fired, attachment.density()))
    (y0, grads0, *counts0), (y1, grads1, *counts1) = steps
    assert counts0 == counts1 and set(counts1[0].values()) == {2}
    assert torch.equal(y0, y1)
    for a, b in zip(grads0, grads1, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpoints_use_the_maps_of_their_forward_or_raise(use_reentrant):
    model = Checkpointed(("inner",), use_reentrant)
    with attach(model, "tiny.conv1", mode="target") as attachment:
        attachment.record(targets)
        x = images.clone().requires_grad_()
        first = model(x).sum()
        attachment.record(images)
        second = model(x).sum()
        second.backward()
        with pytest.raises(
            RuntimeError, match="a later record replaced the maps that backward needs"
        ):
            first.backward()


def test_a_pickled_record_serves_checkpoints_elsewhere():
    """Each thread counts its autograd nodes from 0, as each process does."""
    model = Checkpointed(("inner",), use_reentrant=False)
    for _ in range(9):
        model(images)
    attachment = attach(model, "tiny.conv1", mode="target")
    attachment.record(targets)
    unpickled = pickle.loads(pickle.dumps(model))
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: unpickled(images).sum().backward()).result()
    model(images).sum().backward()
    assert torch.equal(unpickled.tiny.conv1.weight.grad, model.tiny.conv1.weight.grad)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_two_checkpointed_calls_of_a_layer_are_an_error(use_reentrant, tiny):
    with attach(tiny, "relu", mode="target") as attachment:
        attachment.record(targets)
        x = images.clone().requires_grad_()
        y = checkpoint(tiny, x, use_reentrant=use_reentrant)
        with pytest.raises(RuntimeError, match="'relu' is checkpointed and was called 2 times"):
            y.sum().backward()
    with attach(tiny, "relu", p_zero=0.5) as attachment:
        checkpoint(tiny, x, use_reentrant=use_reentrant).sum().backward()
        assert attachment.fired == {"relu": 2}


# ---- recording ----


def test_shared_relu_fires_twice_and_each_call_has_its_own_map(tiny):
    tiny.eval()
    tiny(targets)
    first, second = (t.detach() > 0 for t in tiny.maps[1:])
    tiny.train()
    with attach(tiny, "relu", mode="target") as attachment:
        attachment.record(targets)
        tiny(images)
        assert attachment.fired == {"relu": 2}
        assert (
            not (tiny.maps[1].bool() & ~first).any() and not (tiny.maps[2].bool() & ~second).any()
        )
        assert not torch.equal(first, second)


def test_resnet_in_place_relu_and_add_do_not_reach_the_record():
    """The block adds to bn2's output and rectifies it in place. The recorded map must be the output of bn2."""
    model = resnet18().eval()
    outputs = []
    handle = model.layer1[0].bn2.register_forward_hook(
        lambda m, a, out: outputs.append(out.detach().clone())
    )
    with attach(model, "layer1.0.bn2", mode="target") as attachment:
        attachment.record(targets)
        handle.remove()
        recorded = attachment._recorded["layer1.0.bn2"][0]
    assert torch.equal(recorded.to_bool(), outputs[0] > 0)
    # About half of bn2's output is negative. The rectified sum is never negative.
    assert 0.2 < recorded.density() < 0.8


def test_recording_stops_at_the_deepest_layer():
    for layers, beyond, reached in (
        ([4], "layer1.1.bn1", "layer1.1.conv1"),
        ([4, 8], "layer2.0.downsample.1", "layer2.0.downsample.0"),
    ):
        model = resnet18()
        calls = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, o, name=name, calls=calls: calls.append(name))
        with attach(model, layers, mode="target") as attachment:
            attachment.record(targets)
            assert reached in calls and beyond not in calls and "fc" not in calls
            assert all(len(maps) == 1 for maps in attachment._recorded.values())


class Branching(nn.Module):
    """Control flow that depends on data, so that the model cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.reached_the_end = 0

    def forward(self, x):
        x = self.conv1(x)
        if x.sum() > -1e9:
            x = self.conv2(x)
        self.reached_the_end += 1
        return self.fc(x.mean((2, 3)))


def test_a_pass_whose_calls_are_not_certain_goes_to_the_end():
    """The values of a tensor decide which layers run."""
    model = Branching()
    with attach(model, [1, 2], mode="target") as attachment:
        for passes in (1, 2):
            attachment.record(targets)
            assert model.reached_the_end == passes
        model(images)
        assert attachment.fired == {"conv1": 1, "conv2": 1}


@pytest.mark.parametrize("record_mode", ("eval", "train"))
@pytest.mark.parametrize("training", (True, False))
def test_record_mode_decides_whether_statistics_move(tiny, record_mode, training):
    tiny.train(training)
    tiny.conv2.eval()  # its own flag, which must be restored
    before = copy.deepcopy(tiny.bn.state_dict())
    with attach(tiny, 2, mode="target", record_mode=record_mode) as attachment:
        attachment.record(targets)
    moved = any(not torch.equal(before[key], value) for key, value in tiny.bn.state_dict().items())
    assert moved == (record_mode == "train")
    assert tiny.training == training and tiny.bn.training == training and not tiny.conv2.training


def test_recording_builds_no_graph_and_keeps_only_bits(tiny):
    def forbidden(t):
        raise AssertionError("a tensor was saved for backward")

    with attach(tiny, 2, mode="target") as attachment:
        with torch.autograd.graph.saved_tensors_hooks(forbidden, lambda t: t):
            attachment.record(targets)
        (mask,) = attachment._recorded["conv2"]
        assert mask.bits.numel() == targets.shape[0] * 4 * 8 * 8 // 8
        assert not mask.bits.requires_grad


def test_recording_draws_nothing_and_shapes_nothing(tiny):
    with attach(tiny, 1, mode="target") as attachment:
        before = torch.get_rng_state()
        attachment.record(targets)
        assert torch.equal(torch.get_rng_state(), before)
        assert attachment.fired == {"conv1": 0}


def test_a_source_batch_may_be_smaller_but_not_larger(tiny):
    with attach(tiny, 1, mode="target") as attachment:
        attachment.record(targets)
        tiny(images[:3])
        expected = (
            nn.functional.conv2d(images[:3], tiny.conv1.weight, tiny.conv1.bias, padding=1) > 0
        ) & (nn.functional.conv2d(targets[:3], tiny.conv1.weight, tiny.conv1.bias, padding=1) > 0)
        assert torch.equal(tiny.maps[0].bool(), expected)
        with pytest.raises(
            ValueError, match="recorded map has 4 samples, and a source batch of 8 needs as many"
        ):
            tiny(torch.cat([images, images]))
        with pytest.raises(ValueError, match="only the batch size may differ"):
            tiny(torch.randn(4, 3, 9, 9))


@pytest.mark.parametrize("mode", ("target", "product"))
def test_nothing_recorded_is_an_error(tiny, mode):
    with attach(tiny, 1, mode=mode) as attachment:
        with pytest.raises(RuntimeError, match="nothing is recorded for 'conv1'"):
            tiny(images)
        attachment.record(targets)
        tiny(images)
    with (
        attach(tiny, 1, p_zero=0.5) as attachment,
        pytest.raises(RuntimeError, match="mode='random' records nothing"),
    ):
        attachment.record(targets)


def test_a_failed_record_leaves_no_maps(tiny):
    with attach(tiny, [1, 2], mode="target") as attachment:
        attachment.record(targets)
        with pytest.raises(RuntimeError):
            attachment.record(torch.randn(4, 5, 8, 8))
        assert tiny.training
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            tiny(images)


def test_a_module_that_returns_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x):
            return self.lstm(x)[0]

    with (
        attach(Pair(), "lstm", mode="binarize") as attachment,
        pytest.raises(TypeError, match="'lstm' returns a tuple"),
    ):
        attachment.model(torch.randn(2, 5, 3))


# ---- nothing else changes ----


def test_remove_leaves_the_model_as_it_was():
    model = resnet18().eval()
    before, keys, expected = str(model), list(model.state_dict()), model(images)
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    attachment = attach(model, "all", mode="target", at_eval="on")
    attachment.record(targets)
    model(images)
    assert str(model) == before and list(model.state_dict()) == keys
    attachment.remove()
    attachment.remove()
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(model(images), expected)
    with pytest.raises(RuntimeError, match="was removed"):
        attachment.record(targets)


def test_copies_have_an_attachment_of_their_own(tiny):
    attachment = attach(tiny, 1, mode="target")
    attachment.record(targets)
    for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        (attachment_of_copy,) = fastshape.attachments(other)
        assert attachment_of_copy is not attachment and attachment_of_copy.model is other
        other(images)
        tiny(images)
        assert torch.equal(other.maps[0], tiny.maps[0])
        assert attachment_of_copy.fired == {"conv1": 1}
        attachment_of_copy.remove()
        assert not fastshape.attachments(other) and not other.conv1._forward_hooks
    assert fastshape.attachments(tiny) == [attachment] and attachment.fired == {"conv1": 2}


@pytest.mark.parametrize(
    ("build", "size"),
    (
        (lambda: models.resnet18(num_classes=7), 64),
        (lambda: models.resnet50(num_classes=7), 64),
        (lambda: models.vgg11_bn(num_classes=7), 64),
        (lambda: models.mobilenet_v3_small(num_classes=7), 64),
    ),
    ids=("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small"),
)
@pytest.mark.parametrize("after", ("conv", "bn", "relu"))
def test_any_model_trains_a_step(build, size, after):
    torch.manual_seed(0)
    model = build()
    x, t = torch.randn(2, 2, 3, size, size)
    with attach(model, "all", after=after, every=4, mode="target") as attachment:
        attachment.record(t)
        model(x).sum().backward()
        assert all(count >= 1 for count in attachment.fired.values())
        assert all(0 <= share <= 1 for share in attachment.density().values())


def test_channels_last_model():
    model = resnet18().to(memory_format=torch.channels_last)
    x = images.contiguous(memory_format=torch.channels_last)
    with attach(model, [1, 4], mode="target") as attachment:
        attachment.record(targets.contiguous(memory_format=torch.channels_last))
        model(x).sum().backward()
        assert attachment._recorded["conv1"][0].memory_format == "channels_last"


def test_compiled_model_is_shaped_at_every_call(tiny):
    torch._dynamo.reset()
    attachment = attach(tiny, 1, p_zero=0.5)
    compiled = torch.compile(tiny, backend="eager")
    outputs = [compiled(images) for _ in range(3)]
    assert attachment.fired == {"conv1": 3}
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("compiled_before", (False, True))
def test_compiled_model_with_equal_blocks_is_shaped_in_the_chosen_one(compiled_before):
    """The compiler reuses the code of a block for an equal block. A block with a hook needs its own code."""
    torch._dynamo.reset()
    model = resnet18()
    compiled = torch.compile(model, backend="eager")
    if compiled_before:
        compiled(images)
    attachment = attach(model, 4, p_zero=0.5)
    first, second = compiled(images), compiled(images)
    assert attachment.fired == {"layer1.1.conv1": 2}
    assert not torch.equal(first, second)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x, extra=None):
        y = self.conv1(x)
        return self.conv2(y) if extra is not None else self.conv2(self.conv2(y))


def test_omitted_arguments_decide_where_recording_ends():
    with attach(Optional(), 2, mode="target") as attachment:
        for inputs, calls in (((targets,), 2), ((targets, images), 1), ((targets, None), 2)):
            attachment.record(*inputs)
            assert len(attachment._recorded["conv2"]) == calls
            before = attachment.fired["conv2"]
            attachment.model(images, *inputs[1:])
            assert attachment.fired["conv2"] == before + calls


def test_layers_of_a_wrong_type():
    for layers in (4.0, None):
        with pytest.raises(TypeError, match=f"layers={layers}: must be numbers, names"):
            attach(resnet18(), layers, mode="binarize")


# ---- a part of a batch ----


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("starts", ((0, 1, 4), (0, 3)))
def test_parts_of_a_batch_have_the_parts_of_its_mask(memory_format, starts):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 2, stride=2))
    batch = torch.randn(7, 3, 5, 6).to(memory_format=memory_format)
    with attach(model, "all", p_zero=[0.5, 0.3]) as attachment:
        torch.manual_seed(3)
        whole, density, after = model(batch), attachment.density(), torch.get_rng_state()
        outputs, ones = [], dict.fromkeys(density, 0.0)
        for start, stop in zip(starts, (*starts[1:], 7), strict=True):
            attachment.first_sample = start
            torch.manual_seed(3)
            outputs.append(model(batch[start:stop]))
            assert torch.equal(torch.get_rng_state(), after)
            for name, share in attachment.density().items():
                ones[name] += share * (stop - start) / 7
    assert torch.equal(torch.cat(outputs), whole)
    assert ones == pytest.approx(density)


def test_a_part_that_begins_within_a_draw_is_an_error():
    model = nn.Sequential(nn.Linear(5, 12))
    with attach(model, "0", p_zero=0.5) as attachment:
        attachment.first_sample = 2  # 24 elements are three draws
        model(torch.randn(3, 5))
        attachment.first_sample = 1
        with pytest.raises(ValueError, match="first_sample=1: '0' has 12 elements per sample"):
            model(torch.randn(3, 5))


def test_the_offset_of_a_part_wraps():
    model = nn.Sequential(nn.Linear(5, 8))
    batch = torch.randn(6, 5)
    with attach(model, "0", p_zero=0.5, seed=7) as attachment:
        start = attachment.stream = torch.tensor([7, 2**63 - 3])
        whole = model(batch)
        attachment.stream, attachment.first_sample = start, 4
        assert torch.equal(model(batch[4:]), whole[4:])


# --- values that are not finite ---


@pytest.mark.parametrize("method", ["hooks", "replace"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_names_the_layer_whose_map_hides_a_nan(method, value, dtype):
    """Without it the loss is finite, because B(NaN) = 0 and B(-inf) = 0."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(dtype)
    x = torch.randn(2, 1, 6, 6).to(dtype)
    x[1, 0, 3, 3] = value
    with attach(model, 1, p_zero=0.5, method=method) as attachment:
        assert model(x).isfinite().all()
        attachment.check_finite = True
        with pytest.raises(
            FloatingPointError, match=r"layer '0': \d+ of 256 values of its output are not"
        ):
            model(x)
    with attach(model, 1, p_zero=0.5, method=method, check_finite=True) as attachment:
        model(x[:1])
        assert attachment.fired == {"0": 1} and attachment.method_of == {"0": method}


@pytest.mark.parametrize("mode", ["target", "product"])
def test_check_finite_looks_at_recorded_maps(mode):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 1))
    attachment = attach(model, [1, 2], mode=mode, check_finite=True)
    x = torch.randn(2, 1, 6, 6)
    attachment.record(x)
    with pytest.raises(FloatingPointError, match="layer '0': 256 of"):
        attachment.record(x.where(x < 0, math.inf))
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        model(x)


def test_check_finite_is_true_or_false():
    with pytest.raises(TypeError, match="check_finite='yes': must be True or False"):
        attach(nn.Sequential(nn.Conv2d(1, 1, 1)), 1, p_zero=0.5, check_finite="yes")


# --- threads ---


def in_threads(count, act):
    """`act(k)` in `count` threads that start together. Raises what one of them raises."""
    start = threading.Barrier(count)

    def wait_and_act(k):
        start.wait()
        return act(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_act, range(count)))


def blocks(n=3):
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(n)
    ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("method", ["hooks", "replace"])
@pytest.mark.parametrize("grad", [True, False])
def test_threads_share_an_attached_model(method, grad):
    """Each forward is that of one thread alone, and every call is counted."""
    model = blocks().eval()  # so that the running statistics stay
    inputs = torch.randn(8, 2, 4, 9, 9)
    with attach(model, "all", mode="target", at_eval="on", method=method) as attachment:
        attachment.record(torch.randn(2, 4, 9, 9))
        expected = [model(x) for x in inputs]
        before = attachment.fired

        def act(k):
            with torch.set_grad_enabled(grad):
                return all(model(inputs[k]).equal(expected[k]) for _ in range(40))

        assert all(in_threads(8, act))
        assert {attachment.fired[name] - before[name] for name in before} == {320}


@pytest.mark.parametrize("method", ["hooks", "replace"])
def test_a_record_during_a_forward_in_another_thread_is_told(method):
    """Also one that begins after the last shaped layer, when BatchNorm and dropout go on in the modes of the record."""
    model, x = blocks(), torch.randn(2, 4, 9, 9)
    attachment = attach(model, 1, mode="target", method=method)
    attachment.record(x)
    entered, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if not entered.is_set():
            entered.set()
            go_on.wait()

    model[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(model, x)
        entered.wait()
        attachment.record(x)
        go_on.set()
        with pytest.raises(RuntimeError, match="record ran in another thread during this forward"):
            forward.result()
    model(x)  # this thread's own record is none of another


@pytest.mark.parametrize("method", ["hooks", "replace"])
def test_a_forward_in_another_thread_must_wait_for_a_record(method):
    """The record changes the modes of all modules, and its end is a private exception."""
    model, x = blocks(), torch.randn(2, 4, 9, 9)
    attachment = attach(model, "all", mode="target", method=method)
    entered, go_on = threading.Event(), threading.Event()

    def pause(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            go_on.wait(10)

    handle = model[1][2].register_forward_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        recording = pool.submit(attachment.record, x)
        assert entered.wait(10)
        for act in (lambda: model(x), lambda: model[1](x), lambda: attachment.record(x)):
            with pytest.raises(RuntimeError, match="attachment.record runs in another thread"):
                act()
        go_on.set()
        recording.result()
    handle.remove()
    assert model.training and model(x).shape == x.shape
    assert {name: len(maps) for name, maps in attachment._recorded.items()} == dict.fromkeys(
        attachment.names, 1
    )


@pytest.mark.parametrize("mode", ["target", "product"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_record_serves_training_whatever_mode_it_was_made_in(mode, context):
    model, x = blocks(), torch.randn(2, 4, 9, 9)
    attachment = attach(model, [1, 3], mode=mode)
    with context():
        attachment.record(x)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- copies of parts ---


@pytest.mark.parametrize("method", ["hooks", "replace"])
def test_a_copied_part_is_unshaped_and_lets_go_of_the_model(method):
    model, x = blocks(), torch.randn(2, 4, 9, 9)
    plain = copy.deepcopy(model[1])
    attachment = attach(model, "all", p_zero=0.5, method=method)
    part = copy.deepcopy(model[1])
    assert part(x).equal(plain(x)) and not part(x).equal(model[1](x))
    fired = dict(attachment.fired)
    part(x)
    assert attachment.fired == fired
    whole = sum(p.numel() for p in model.parameters())
    for one in (part, model[1]):
        assert len(pickle.dumps(one)) < len(pickle.dumps(plain)) + whole  # a float has four bytes
    with attach(part, "all", mode="binarize") as own:
        part(x)
        assert own.fired == {"0": 1}
    assert part(x).equal(plain(x))
    attachment.remove()


def test_a_part_of_a_copied_model_is_shaped_by_the_attachment_of_the_copy():
    model, x = blocks(), torch.randn(2, 4, 9, 9)
    attach(model, "all", p_zero=0.5)
    wrapper = copy.deepcopy(nn.ModuleDict({"net": model}))["net"]
    (own,) = fastshape.attachments(wrapper)
    wrapper(x)
    assert own.fired == {"0.0": 1, "1.0": 1, "2.0": 1}
    (others,) = fastshape.attachments(model)
    assert others.fired == {"0.0": 0, "1.0": 0, "2.0": 0}


# --- numbers of numpy, and several names ---


def test_numbers_and_arrays_of_numpy_are_numbers():
    model = blocks()
    for layers, p_zero in (
        (np.int64(2), np.float32(0.5)),
        (np.array([1, 3]), np.array([0.25, 0.5])),
        (range(1, 4), np.float16(0.5)),
    ):
        with attach(model, layers, p_zero=p_zero) as attachment:
            rates = np.broadcast_to(p_zero, len(attachment.names))
            assert list(attachment.p_zero.values()) == rates.tolist()
            assert set(map(type, attachment.p_zero.values())) == {float}
    with pytest.raises(TypeError, match="layers: np.float64"):
        attach(model, [np.float64(1)], p_zero=0.5)
    with pytest.raises(TypeError, match="layers: np.True_"):
        attach(model, [np.bool_(True)], p_zero=0.5)


def test_a_module_is_found_under_each_of_its_names():
    model = nn.Module()
    model.a = nn.Conv2d(1, 8, 1)
    model.b = model.a
    with attach(model, "b", p_zero=0.5) as attachment:
        assert attachment.names == ("a",)
    with pytest.raises(ValueError, match=r"layers: 'a' is named twice \(again by 'b'\)"):
        attach(model, ["a", "b"], p_zero=0.5)
