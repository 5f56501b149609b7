"""attach(..., method="replace") finds chains in ordinary models and gives the same numbers as hooks."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastshape
from fastshape import ShapedBatchNorm2d, attach

torchvision = pytest.importorskip("torchvision")

images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
targets = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
MAIN_PATH = [k for k in range(1, 21) if k not in (8, 13, 18)]


def build(name, **arguments):
    torch.manual_seed(0)
    return varied(getattr(torchvision.models, name)(num_classes=7, **arguments))


def varied(model):
    """Changes the BatchNorm parameters from 1 and 0, with which sums of binary maps are exactly 0 before ReLU."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return model


def replaced(model, layers=1, **arguments):
    """attach with replacement of all layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = {"mode": "binarize", **arguments}
        return attach(model, layers, method="replace", **arguments)


def loss(y):
    """A loss whose gradient BatchNorm does not cancel, as it does that of the square."""
    return (y * torch.arange(1.0, y.numel() + 1).sin().view_as(y)).sum()


def shaped_step(
    model, method, layers, x, *inputs, forward=None, training=True, seed=5, **arguments
):
    """One step on a copy of `model`: its output, gradients, buffers and counts, and the attachment."""
    model = copy.deepcopy(model).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attachment = attach(model, layers, method=method, **arguments)
    with attachment:
        torch.manual_seed(seed)
        if arguments["mode"] == "target":
            attachment.record(x.flip(0) * 0.9, *inputs)
        y = (forward or model.__call__)(*([model] if forward else []), x, *inputs)
        if y.requires_grad:
            loss(y).backward()
        counts = attachment.fired, attachment.density
    grads = {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), grads, dict(model.named_buffers()), counts, attachment


def assert_same(first, second, tolerance=1e-10):
    (y0, grads0, buffers0, counts0, _), (y1, grads1, buffers1, counts1, _) = first, second
    assert counts0 == counts1
    assert (y0 - y1).norm() <= tolerance * y0.norm()
    largest = max((g.norm() for g in grads0.values() if g is not None), default=0)
    for name, grad in grads0.items():
        assert (grad is None) == (grads1[name] is None), name
        if grad is not None:
            assert (grad - grads1[name]).norm() <= tolerance * largest, name
    for name, buffer in buffers0.items():
        assert torch.allclose(buffer, buffers1[name], rtol=1e-12, atol=1e-14), name


# ---- chains ----


def test_resnet18():
    model = build("resnet18")
    attachment = replaced(model, "all")
    assert set(attachment.method_of.values()) == {"replace"} and attachment.reasons == {}
    norms = {name for name, m in model.named_modules() if isinstance(m, ShapedBatchNorm2d)}
    assert norms == {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # In a block the output of bn1 goes to ReLU. Those of bn2 and of the downsample's BatchNorm go to the sum.
    fused = {name for name in norms if model.get_submodule(name).relu}
    assert fused == {"bn1", *(f"layer{k}.{b}.bn1" for k in (1, 2, 3, 4) for b in (0, 1))}


def test_mobilenet_says_where_hooks_serve():
    """Only the squeeze-and-excitation convolutions have no BatchNorm."""
    model = build("mobilenet_v3_small")
    with pytest.warns(
        UserWarning, match="method='replace': hooks serve features.1.block.1.fc1"
    ) as w:
        attachment = attach(model, "all", mode="binarize", method="replace")
    assert len(w) == 1 and w[0].filename == __file__
    by_hooks = [name for name, method in attachment.method_of.items() if method == "hooks"]
    assert len(by_hooks) == 18 and all(".fc" in name for name in by_hooks)
    assert list(attachment.reasons) == by_hooks
    assert "ReLU, not a plain BatchNorm2d" in attachment.reasons["features.1.block.1.fc1"]


class Model(nn.Module):
    """A chain, or by `case` something that is not one."""

    def __init__(self, case="chain"):
        super().__init__()
        self.case = case
        self.conv = {"custom conv": CustomConv, "pointwise": nn.Linear}.get(case, nn.Conv2d)(
            3, 6, 3
        )
        norms = {"custom norm": CustomNorm, "sync": nn.SyncBatchNorm, "instance": nn.InstanceNorm2d}
        self.bn = norms.get(case, nn.BatchNorm2d)(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(6, 2)
        if case == "own forward":
            self.bn.forward = functools.partial(plus_one, self.bn)

    def forward(self, x, add=False):
        case, z = self.case, self.conv(x)
        if case == "untraceable" and x.sum() > 1e9:
            return z
        if case == "two consumers":
            h = self.relu(self.bn(z)) + z
        elif case == "used twice":
            h = self.relu(self.bn(self.conv2(self.relu(self.bn(z)))))
        elif case == "conv twice":
            h = self.relu(self.bn(z)) + self.bn2(self.conv(x * 0.5))
        elif case == "functional":
            h = F.relu(F.batch_norm(z, None, None, training=True))
        elif case == "no norm":
            h = self.relu(z)
        elif case == "module between":
            h = self.relu(self.bn(self.drop(z)))
        elif case == "changed in place":
            z.add_(0.1)
            h = self.relu(self.bn(z))
        elif case == "kept":
            self.map = z
            h = self.relu(self.bn(z))
        elif case == "size asked":
            h = self.relu(self.bn(z)).view(z.size(0), 6, -1, 1)
        elif case == "in training alone":
            h = self.relu(self.bn(z)) if self.training else self.relu(z)
        elif case == "rectified, changed in place, rectified again":
            h = self.relu(self.relu(self.bn(z)).sub_(0.3))
        elif case == "relu in training alone":
            h = self.relu(self.bn(z)) if self.training else self.bn(z)
        elif case == "sum before relu":
            h = self.relu(self.bn(z) + 1)
        elif case == "norm output twice":
            b = self.bn(z)
            h = self.relu(b * 1) + b
        elif case == "norm output kept":
            self.map = self.bn(z)
            h = self.relu(self.map)
        elif case == "functional relu":
            h = F.relu(self.bn(z), inplace=True)
        elif case == "relu in place, bn's name used":
            h = self.bn(z)
            self.relu(h)
        else:
            h = self.relu(self.bn(z))
            if add:
                h = h + z
        if case not in ("used twice", "size asked"):
            h = self.bn2(self.conv2(h)).abs() + h
        return self.fc(h.mean((2, 3)))


def plus_one(bn, x):
    return nn.BatchNorm2d.forward(bn, x) + 1


class CustomConv(nn.Conv2d):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class CustomNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


NO_CHAIN = {
    "two consumers": "its output is not used by one BatchNorm2d alone, but by bn, add",
    "used twice": "bn is called 2 times in one forward",
    "conv twice": "it is called 2 times in one forward",
    "functional": "its output is used by batch_norm, not by a BatchNorm2d",
    "no norm": "its output is used by relu, which is a ReLU, not a plain BatchNorm2d",
    "module between": "its output is used by drop, which is a Dropout, not a plain BatchNorm2d",
    "changed in place": "its output is not used by one BatchNorm2d alone, but by add_, bn",
    "kept": "its output is not used by one BatchNorm2d alone, but by bn, an attribute",
    "size asked": "its output is not used by one BatchNorm2d alone, but by bn, size",
    "custom conv": "it is a CustomConv, not a plain 2d convolution",
    "custom norm": "its output is used by bn, which is a CustomNorm, not a plain BatchNorm2d",
    "own forward": "its output is used by bn, which is a BatchNorm2d, not a plain BatchNorm2d",
    "sync": "its output is used by bn, which is a SyncBatchNorm, not a plain BatchNorm2d",
    "instance": "a InstanceNorm2d",
    "untraceable": "torch.fx cannot trace the model: .*control flow",
}
UNFUSED = ("sum before relu", "norm output twice", "norm output kept", "functional relu",
           "relu in place, bn's name used")  # fmt: skip


@pytest.mark.parametrize("case", NO_CHAIN)
def test_hooks_serve_what_is_no_chain_with_a_warning(case):
    torch.manual_seed(0)
    model = varied(Model(case)).double()
    if case == "sync":  # without a process group it runs only in evaluation
        model.eval()
    with pytest.warns(UserWarning, match=f"hooks serve conv: .*{NO_CHAIN[case]}") as warning_list:
        attachment = attach(model, "conv", mode="binarize", method="replace")
    assert len(warning_list) == 1
    assert attachment.method_of == {"conv": "hooks"} and list(attachment.reasons) == ["conv"]
    assert not any(isinstance(m, ShapedBatchNorm2d) for m in model.modules())
    attachment.remove()
    arguments = {
        "layers": "conv",
        "x": images.double(),
        "mode": "random",
        "p_zero": 0.3,
        "at_eval": "on",
    }
    both = [
        shaped_step(model, m, training=case != "sync", **arguments) for m in ("hooks", "replace")
    ]
    assert_same(*both, tolerance=0)


@pytest.mark.parametrize("case", UNFUSED)
def test_a_relu_that_is_not_of_the_chain_is_not_replaced(case):
    torch.manual_seed(0)
    model = varied(Model(case)).double()
    with replaced(model, "conv"):
        assert type(model.relu) is nn.ReLU and not model.bn.relu
    arguments = {"layers": "conv", "x": images.double(), "mode": "random", "p_zero": 0.3}
    assert_same(*(shaped_step(model, m, **arguments) for m in ("hooks", "replace")))


@pytest.mark.parametrize(("case", "reason"), (
    ("in training alone", "conv: its output is used by relu"),
    ("relu in training alone", "training and evaluation use its output differently"),
))  # fmt: skip
def test_the_chain_must_exist_in_all_modes_that_shape(case, reason):
    model = Model(case)
    replaced(model, "conv").remove()
    with pytest.warns(UserWarning, match=reason):
        attach(model, "conv", mode="binarize", at_eval="on", method="replace")


@pytest.mark.parametrize("module", ("conv", "bn"))
@pytest.mark.parametrize("kind", ("forward", "backward"))
def test_other_hooks_prevent_replacement(module, kind):
    model = Model()
    register = "register_forward_hook" if kind == "forward" else "register_full_backward_hook"
    getattr(model.get_submodule(module), register)(lambda *a: None)
    with pytest.warns(UserWarning, match="hooks"):
        attachment = attach(model, "conv", mode="binarize", method="replace")
    assert attachment.method_of == {"conv": "hooks"}


@pytest.mark.parametrize(("arguments", "reason"), (
    ({"binarize": False}, "the shaped map is not binary"),
    ({"mode": "product", "p_zero": None}, "the shaped map is not binary"),
    ({"after": "bn"}, "it is a BatchNorm2d, not a plain 2d convolution"),
    ({"after": "relu"}, "it is a ReLU, not a plain 2d convolution"),
))  # fmt: skip
def test_settings_without_a_binary_map_before_a_norm(arguments, reason):
    with pytest.warns(UserWarning, match=reason):
        attachment = attach(
            Model(), 1, method="replace", **{"mode": "random", "p_zero": 0.5, **arguments}
        )
    assert set(attachment.method_of.values()) == {"hooks"}


def test_hooks_never_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = attach(Model("used twice"), 1, mode="binarize")
    assert attachment.method_of == {"conv": "hooks"} and attachment.reasons == {}


class Untraceable(nn.Module):
    """Control flow that depends on data, around blocks without it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6)
        )
        self.conv, self.bn = nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        for block in self.blocks:
            if x.sum() < 1e9:
                x = block(x)
        return self.bn(self.conv(x)).mean((2, 3))


def test_blocks_of_a_model_that_cannot_be_traced():
    model = varied(Untraceable()).double()
    with pytest.warns(UserWarning, match="hooks serve conv: torch.fx cannot trace the model"):
        attachment = attach(model, "all", mode="binarize", method="replace")
    assert attachment.method_of == {
        "conv": "hooks",
        "blocks.0.0": "replace",
        "blocks.1.0": "replace",
    }
    assert model.blocks[0][1].relu
    attachment.remove()
    arguments = {"layers": "all", "x": images.double(), "mode": "target"}
    assert_same(*(shaped_step(model, m, **arguments) for m in ("hooks", "replace")))


class Split(nn.Module):
    """Only the whole model shows the user of a part's output."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.part(x))


@pytest.mark.parametrize(
    "forward", (lambda m, x: m(x), lambda m, x: m.part(x), lambda m, x: m.part[0](x))
)
def test_a_chain_across_modules(forward):
    model = varied(Split()).double()
    with replaced(model, "all"):
        assert model.part[1].relu and type(model.relu) is not nn.ReLU
    arguments = {"mode": "random", "p_zero": 0.3, "forward": forward}
    assert_same(
        *(shaped_step(model, m, "all", images.double(), **arguments) for m in ("hooks", "replace"))
    )


# ---- the same as hooks ----


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small"))
@pytest.mark.parametrize("mode", ("random", "target", "binarize"))
def test_any_model_in_training(name, mode):
    model = build(name).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arguments = {"mode": mode, "p_zero": 0.3 if mode == "random" else None, "layers": "all"}
    both = [shaped_step(model, m, x=images.double(), **arguments) for m in ("hooks", "replace")]
    assert_same(*both)
    assert list(both[1][4].method_of.values()).count("replace") == {
        "resnet18": 20, "resnet50": 53, "vgg11_bn": 8, "mobilenet_v3_small": 34,
    }[name]  # fmt: skip


@pytest.mark.parametrize("layers", (1, 4, [1, 4], MAIN_PATH, [8, 13, 18]))
@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
def test_resnet18_layers(layers, gradient):
    model = build("resnet18").double()
    for mode in ("random", "target"):
        arguments = {
            "mode": mode,
            "p_zero": 0.3 if mode == "random" else None,
            "gradient": gradient,
        }
        assert_same(*(
            shaped_step(model, m, layers, images.double(), **arguments) for m in ("hooks", "replace")
        ))  # fmt: skip


@pytest.mark.parametrize("mode", ("random", "target", "binarize"))
@pytest.mark.parametrize("at_eval", ("off", "binarize", "on"))
def test_in_evaluation(mode, at_eval):
    model = build("resnet18").double()
    model(images.double())  # moves the statistics from their initial values
    arguments = {"mode": mode, "p_zero": 0.3 if mode == "random" else None, "at_eval": at_eval}
    both = [
        shaped_step(model, m, MAIN_PATH, images.double(), training=False, **arguments)
        for m in ("hooks", "replace")
    ]
    assert_same(*both, tolerance=0 if at_eval == "off" else 1e-10)
    if at_eval == "off":
        assert torch.equal(both[1][0], model.eval()(images.double()))


def test_frozen_norms_and_their_settings():
    """bn.eval() in a model in training mode; momentum=None; no parameters; no statistics."""
    model = build("resnet18").double()
    model.layer1[0].bn1 = nn.BatchNorm2d(64, affine=False).double()
    model.layer1[0].bn2 = nn.BatchNorm2d(64, track_running_stats=False).double()
    model.layer1[1].bn1.momentum = None

    def forward(model, x):
        model.layer1[1].bn2.eval()
        return model(x)

    arguments = {"mode": "random", "p_zero": 0.3, "forward": forward}
    assert_same(*(
        shaped_step(model, m, [1, 2, 3, 4, 5], images.double(), **arguments) for m in ("hooks", "replace")
    ))  # fmt: skip


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_float32_and_autocast(memory_format, dtype):
    """One block, so that no rounded number is compared with 0 later."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False)  # the gradient of a bias would be a rounding error
    block = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    block = varied(block).to(memory_format=memory_format)
    x = images.contiguous(memory_format=memory_format)

    def forward(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(x)
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        return y

    arguments = {"mode": "random", "p_zero": 0.3, "forward": forward}
    hooks, replace = (shaped_step(block, m, "0", x, **arguments) for m in ("hooks", "replace"))
    # The errors of statistics and sums over the M values of a channel (see test_batch_norm), then one rounding to the dtype.
    rounding = (4 * 62 * 62 / 2 + 12) * torch.finfo(torch.float32).eps / 2 + torch.finfo(dtype).eps
    assert (replace[0] - hooks[0]).abs().max() <= rounding * hooks[0].abs().max()
    for name, grad in hooks[1].items():
        assert (replace[1][name] - grad).norm() <= rounding * grad.norm(), name


# ---- time and memory ----


def test_relu_runs_once_in_the_op(monkeypatch):
    calls, real = [], F.relu
    monkeypatch.setattr(
        F, "relu", lambda x, inplace=False: calls.append(x.shape) or real(x, inplace)
    )
    model = build("resnet18")
    with attach(model, MAIN_PATH, mode="binarize"):
        model(images)
    assert len(calls) == 17
    calls.clear()
    with replaced(model, MAIN_PATH):
        model(images)
        assert len(calls) == 8  # the ReLUs after the sums
        calls.clear()
        model.eval()(images)
        assert len(calls) == 17  # unshaped


def test_backward_keeps_bits_of_the_block():
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    n = 4 * 8 * 64 * 64

    def kept():
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(images)
        assert y.requires_grad
        own = sum(t.numel() * 4 for t in (images, *block.parameters()))
        return sum(storages.values()) - own

    plain = kept()
    with replaced(block, "0", mode="random", p_zero=0.5):
        shaped = kept()
    assert plain >= 2 * 4 * n  # the outputs of the convolution and of ReLU
    assert n // 8 <= shaped <= n // 8 + 1024  # the bits, 16 float64 numbers and the state


def test_no_fresh_map_in_training(monkeypatch):
    """All steps of the chain overwrite the output of the convolution."""
    outputs, real = [], nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda *a: outputs.append(real(*a)) or outputs[-1]
    )
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    with replaced(block, "0", mode="random", p_zero=0.5):
        y = block(images)
        assert y.data_ptr() == outputs[-1].data_ptr()
        y.sum().backward()
        with torch.no_grad():
            assert block(images).data_ptr() == outputs[-1].data_ptr()


# ---- other kinds of calls ----


PARTS = {
    "the convolution": lambda m, x: m.conv1(x),
    "convolution and norm": lambda m, x: m.bn1(m.conv1(x)),
    "a functional relu": lambda m, x: F.relu(m.bn1(m.conv1(x))),
    "another order": lambda m, x: m.bn1(m.relu(m.conv1(x))),
    "two consumers": lambda m, x: (lambda z: m.bn1(z) + z)(m.conv1(x)),
    "a stage": lambda m, x: m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x))))),
    "by name": lambda m, x: m(x=x),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_model(part):
    model = build("resnet18").double()
    arguments = {"mode": "random", "p_zero": 0.3, "forward": PARTS[part]}
    hooks, replace = (
        shaped_step(model, m, [1, 2, 3], images.double(), **arguments) for m in ("hooks", "replace")
    )
    assert_same(hooks, replace)
    assert hooks[3][0]["conv1"] == 1


def test_parts_after_a_target_pass_that_stopped():
    model = build("resnet18").double()

    def forward(model, x):
        return model.bn1(model.conv1(x))

    arguments = {"mode": "target", "forward": forward}
    assert_same(*(
        shaped_step(model, m, [1, 4], images.double(), **arguments) for m in ("hooks", "replace")
    ))  # fmt: skip


@pytest.mark.parametrize("inputs", ((), (False,), (True,)))
def test_optional_arguments(inputs):
    """A chain may exist only if they are omitted."""
    torch.manual_seed(0)
    model = varied(Model()).double()
    assert_same(*(
        shaped_step(model, m, "conv", images.double(), *inputs, mode="target") for m in ("hooks", "replace")
    ))  # fmt: skip


def test_a_relu_that_is_called_again():
    """On the same tensor, which is no longer rectified. Without a graph, because backward would need the old values."""
    torch.manual_seed(0)
    model = varied(Model("rectified, changed in place, rectified again")).double()
    with replaced(model, "conv"):
        assert model.bn.relu
    arguments = {"mode": "random", "p_zero": 0.3, "forward": torch.no_grad()(lambda m, x: m(x))}
    assert_same(
        *(shaped_step(model, m, "conv", images.double(), **arguments) for m in ("hooks", "replace"))
    )


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_repeats_the_shaping(use_reentrant):
    model = build("resnet18").double()

    def forward(model, x):
        x = model.conv1(x)
        for layer in (model.layer1, model.layer2):
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    arguments = {"mode": "random", "p_zero": 0.3, "forward": forward}
    hooks, replace = (
        shaped_step(model, m, [2, 4, 6, 8], images.double(), **arguments)
        for m in ("hooks", "replace")
    )
    assert_same(hooks, replace)
    plain = shaped_step(model, "replace", [2, 4, 6, 8], images.double(), mode="random", p_zero=0.3,
                        forward=lambda m, x: m.layer2(m.layer1(m.conv1(x))))  # fmt: skip
    for name, grad in plain[1].items():
        assert grad is None or torch.allclose(grad, replace[1][name])


class Checkpointed(nn.Module):
    """A chain. Backward computes its `part` again."""

    def __init__(self, part=None, use_reentrant=None):
        super().__init__()
        self.part, self.use_reentrant = part, use_reentrant
        self.first, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def again(self, part, function, x):
        if part != self.part:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def norm(self, x):
        return self.bn(self.again("conv", self.conv, x))

    def chain(self, x):
        return self.relu(self.again("conv, bn", self.norm, x))

    def forward(self, x):
        return self.again("conv, bn, relu", self.chain, self.first(x)).sin().mean((2, 3))


@pytest.mark.filterwarnings("ignore:None of the inputs")  # in the target pass
@pytest.mark.parametrize("before", (True, False), ids=("before attach", "after attach"))
@pytest.mark.parametrize("mode", ("random", "target"))
@pytest.mark.parametrize("method", ("hooks", "replace"))
@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("part", ("conv", "conv, bn", "conv, bn, relu"))
def test_checkpoints_within_a_chain(part, use_reentrant, method, mode, before):
    """The gradients are exactly those without checkpoints, so that hooks did not serve the chain."""
    torch.manual_seed(0)
    plain = varied(Checkpointed()).double()

    def forward(model, x):
        model.part, model.use_reentrant = part, use_reentrant
        return model(x)

    model = copy.deepcopy(plain)
    if before:
        model.part, model.use_reentrant = part, use_reentrant
    arguments = {"mode": mode, "p_zero": 0.3 if mode == "random" else None}
    plain, again = (
        shaped_step(m, method, "conv", images.double(), forward=f, **arguments)
        for m, f in ((plain, None), (model, forward))
    )
    assert plain[4].method_of == again[4].method_of == {"conv": method}
    assert torch.equal(plain[0], again[0]) and plain[3] == again[3]
    for name, grad in plain[1].items():
        assert torch.equal(grad, again[1][name]), name


@pytest.mark.parametrize("watched", (("conv1",), ("bn1",), ("relu",), ("conv1", "bn1", "relu")))
def test_hooks_that_are_added_later_see_the_same_tensors(watched):
    model = build("resnet18").double()
    tensors = []

    def forward(model, x):
        tensors.append([])
        for name in watched:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda m, args: tensors[-1].append(args[0].clone()))
            module.register_forward_hook(lambda m, args, out: tensors[-1].append(out.clone()))
        return model(x)

    arguments = {"mode": "random", "p_zero": 0.3, "forward": forward}
    assert_same(
        *(shaped_step(model, m, [1, 4], images.double(), **arguments) for m in ("hooks", "replace"))
    )
    for a, b in zip(*tensors, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_two_attachments(order):
    """On different layers both replace. On the same layer hooks serve both."""
    model = build("resnet18").double()

    def run(method, layers):
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both = [attach(twin, k, mode="random", p_zero=0.3, method=method) for k in layers]
        torch.manual_seed(1)
        outputs = [twin(images.double())]
        for which in order:
            both[which].remove()
            outputs.append(twin(images.double()))
        assert all(
            type(m).__module__.startswith(("torch.", "torchvision.")) for m in twin.modules()
        )
        return outputs

    for layers in ([2, 3], [2, 2]):
        for a, b in zip(run("hooks", layers), run("replace", layers), strict=True):
            assert torch.allclose(a, b, rtol=1e-10)


def test_a_lost_shaping_is_an_error():
    model = build("resnet18")
    replaced(model, 1)
    model.bn1 = nn.BatchNorm2d(64)
    with pytest.raises(RuntimeError, match="the output of conv1 did not reach its BatchNorm2d"):
        model(images)
    model = build("resnet18")
    replaced(model, 1)
    with pytest.raises(RuntimeError, match="If nn.SyncBatchNorm.convert_sync_batchnorm or"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)(images)


def test_an_error_in_forward_leaves_no_state():
    model = build("resnet18").double()

    def forward(model, x):
        with pytest.raises(ValueError, match="halfway"):
            fail = model.maxpool.register_forward_hook(halfway)
            model(x)
        fail.remove()
        return model.conv1(x)

    def halfway(*_):
        raise ValueError("halfway")

    arguments = {"mode": "binarize", "forward": forward}
    assert_same(
        *(shaped_step(model, m, 1, images.double(), **arguments) for m in ("hooks", "replace"))
    )


# ---- nothing else changes ----


def state_of(model):
    """All attributes of a module, by identity."""
    return [
        (id(m), type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items() if k != "training"})
        for m in model.modules()
    ]  # fmt: skip


def test_remove_leaves_the_model_as_it_was():
    model = build("resnet18")
    printed, keys, before = str(model), list(model.state_dict()), state_of(model)
    with replaced(model, "all", mode="target") as attachment:
        attachment.record(targets)
        model(images).sum().backward()
        assert list(model.state_dict()) == keys and str(model) != printed
        assert isinstance(model.bn1, nn.BatchNorm2d)
    after = state_of(model)
    assert str(model) == printed
    assert [(i, t) for i, t, _ in after] == [(i, t) for i, t, _ in before]
    for (_, _, a), (_, _, b) in zip(after, before, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key in ("_parameters", "_buffers", "_modules"):
                assert all(a[key][name] is b[key][name] for name in b[key])
            else:
                assert a[key] == b[key] or a[key] is b[key]
    assert model.bn1.num_batches_tracked.item() == 1  # keeps the statistics of the training step
    attachment.remove()
    model(images)


def test_checkpoints_and_moves_while_attached():
    model, other = build("resnet18"), build("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with replaced(model, [1, 4]):
        model(images).square().sum().backward()
        optimizer.step()
        other.load_state_dict(model.state_dict())
        model.double()
    assert model.bn1.running_mean.dtype == torch.float64 == model.bn1.weight.dtype
    assert torch.equal(model.bn1.weight.float(), other.bn1.weight)
    model.eval()(images.double())


def test_copies_have_an_attachment_of_their_own():
    model = build("resnet18")
    attachment = replaced(model, [1, 4], mode="target")
    attachment.record(targets)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (attachment_of_copy,) = fastshape.attachments(other)
        assert attachment_of_copy is not attachment and attachment_of_copy.model is other
        twin = copy.deepcopy(model)
        assert torch.equal(other(images), twin(images))
        assert attachment_of_copy.fired == {"conv1": 1, "layer1.1.conv1": 1}
        attachment_of_copy.remove()
        assert not any(isinstance(m, ShapedBatchNorm2d) for m in other.modules())
        assert type(other.relu) is nn.ReLU and isinstance(model.bn1, ShapedBatchNorm2d)
    assert attachment.fired == {"conv1": 0, "layer1.1.conv1": 0}


# ---- recording ----


@pytest.mark.parametrize("record_mode", ("eval", "train"))
def test_recording_is_the_same(record_mode):
    """The target pass runs plain BatchNorm and ReLU, builds no graph, ends at the deepest layer and keeps only bits."""
    model = build("resnet18")
    held, buffers, after = [], [], []

    def forbidden(t):
        raise AssertionError("a tensor was saved for backward")

    for method in ("hooks", "replace"):
        twin = copy.deepcopy(model)
        twin.layer2.register_forward_pre_hook(lambda m, a: after.append(a))
        attachment = attach(twin, [1, 2, 4], mode="target", record_mode=record_mode, method=method)
        with torch.autograd.graph.saved_tensors_hooks(forbidden, lambda t: t):
            attachment.record(targets)
        held.append(attachment._recorded)
        buffers.append(dict(twin.named_buffers()))
        assert attachment.fired == dict.fromkeys(attachment.names, 0) and not after
        (mask,) = attachment._recorded["conv1"]
        assert mask.bits.nbytes == 4 * 64 * 32 * 32 // 8
        storages = {
            mask.bits.untyped_storage().nbytes() for (mask,) in attachment._recorded.values()
        }
        assert storages == {4 * 64 * 32 * 32 // 8, 4 * 64 * 16 * 16 // 8}
    assert held[0] == held[1]
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name])
    assert (buffers[1]["bn1.num_batches_tracked"].item() == 1) == (record_mode == "train")


# ---- torch.compile ----


@pytest.mark.parametrize("compiled_before", (False, True))
def test_compiled(compiled_before):
    torch._dynamo.reset()
    model = build("resnet18").double()
    x = images.double()
    compiled = torch.compile(model, backend="aot_eager")
    if compiled_before:
        compiled(x)
    expected = shaped_step(model, "replace", [1, 4], x, mode="random", p_zero=0.5)
    attachment = replaced(model, [1, 4], mode="random", p_zero=0.5)
    torch.manual_seed(5)
    y = compiled(x)
    loss(y).backward()
    assert torch.allclose(y, expected[0], rtol=1e-10)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[1][name], rtol=1e-8, atol=1e-8)
    assert not torch.equal(compiled(x), compiled(x))
    assert attachment.fired == {"conv1": 3, "layer1.1.conv1": 3}
    attachment.remove()
    model.eval()
    assert torch.allclose(compiled(x), model(x))
