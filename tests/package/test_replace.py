"""attach(..., method="replace") gives the numbers of hooks, whoever reads the shaped map and BatchNorm's output."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastshape
from fastshape import attach

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
    return attach(model, layers, method="replace", **{"mode": "binarize", **arguments})


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
        counts = attachment.fired, attachment.density()
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


# ---- readers ----


class Times2(torch.autograd.Function):
    """What torch announces to nobody."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class CustomConv(nn.Conv2d):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class CustomNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class NormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one module, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         self.training, self.momentum, self.eps)  # fmt: skip
        return self.act(x)


def quiet(function, x):
    with torch.no_grad():
        return function(x)


# What a forward does with z, the output of the shaped convolution m.conv, in its step number `step`. FUSED: a BatchNorm is the
# first to read it. OTHERS: something else is, which is named.
FUSED = {
    "chain": lambda m, z, step: m.relu(m.bn(z)),
    "size asked": lambda m, z, step: m.relu(m.bn(z)).view(z.size(0), z.shape[1], -1, 1) + z.dim(),
    "read afterwards": lambda m, z, step: m.relu(m.bn(z)) + z,
    "read afterwards in some steps": lambda m, z, step: m.relu(m.bn(z)) + (z if step > 1 else 0),
    "read afterwards without a graph": lambda m, z, step: m.relu(m.bn(z)) + quiet(torch.mean, z),
    "read afterwards by a function of its own": lambda m, z, step: m.relu(m.bn(z)) + Times2.apply(z),
    "kept": lambda m, z, step: setattr(m, "map", z) or m.relu(m.bn(z)) + m.map,
    "two norms": lambda m, z, step: m.relu(m.bn(z)) + m.bn2(z),
    "one norm twice": lambda m, z, step: m.relu(m.bn(z)) + m.relu(m.bn(z)),
    "functional": lambda m, z, step: F.relu(F.batch_norm(z, None, None, training=True)),
    "subclass of a norm": lambda m, z, step: m.relu(m.custom_norm(z)),
    "norm and activation": lambda m, z, step: m.norm_act(z),
    "norm alone": lambda m, z, step: m.bn(z),
    "sum before relu": lambda m, z, step: m.relu(m.bn(z) + 1),
    "sum in place": lambda m, z, step: m.relu(m.bn(z).add_(1)),
    "relu in some steps": lambda m, z, step: (m.relu if step % 2 else torch.abs)(m.bn(z)),
    "two relus": lambda m, z, step: (lambda b: F.relu(b) + F.relu(b))(m.bn(z)),
    "norm's output has a norm": lambda m, z, step: m.bn(z).norm() + m.relu(m.bn(z)),
    "norm read before relu": lambda m, z, step: (lambda b: b.mean() + m.relu(b))(m.bn(z)),
    "norm read before relu in some steps": lambda m, z, step: (lambda b: (b.mean() if step > 1 else 0) + F.relu(b))(m.bn(z)),
    "norm read after relu": lambda m, z, step: (lambda b: F.relu(b) + b)(m.bn(z)),
    "norm read after relu in place": lambda m, z, step: (lambda b: m.relu(b) + b)(m.bn(z)),
    "norm read by a function of its own": lambda m, z, step: m.relu(Times2.apply(m.bn(z))),
    "relu in place, bn's name used": lambda m, z, step: (lambda b: (m.relu(b), b)[1])(m.bn(z)),
    "tensor method": lambda m, z, step: m.bn(z).relu_(),
}  # fmt: skip
OTHERS = {
    "no norm": ("relu", lambda m, z, step: m.relu(z)),
    "another norm": ("instance_norm", lambda m, z, step: F.instance_norm(z)),
    "module between": ("mul", lambda m, z, step: m.relu(m.bn(z * 1))),
    "changed in place": ("add_", lambda m, z, step: m.relu(m.bn(z.add_(0.1)))),
    "changed in part": ("__setitem__", lambda m, z, step: z.__setitem__(0, 0) or m.relu(m.bn(z))),
    "read before": ("mean", lambda m, z, step: z.mean() + m.relu(m.bn(z))),
    "read before without a graph": ("mean", lambda m, z, step: quiet(torch.mean, z) + m.relu(m.bn(z))),
    "its norm": ("norm", lambda m, z, step: z.norm() + m.relu(m.bn(z))),
    "in a list": ("cat", lambda m, z, step: m.relu(m.bn(torch.cat([z, z], 0)))),
    "detached": ("detach", lambda m, z, step: m.relu(m.bn(z.detach())) + z),
    "a function of its own": ("mul", lambda m, z, step: m.relu(m.bn(Times2.apply(z)))),
}  # fmt: skip


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read, self.step = read, 0
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.custom_norm, self.norm_act = CustomNorm(6), NormAct(6)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x):
        self.step += 1
        return self.fc(self.read(self, self.conv(x), self.step).sin().mean((2, 3)))


def steps_of(model, method, **arguments):
    """Three steps on a copy of `model`: outputs, gradients, buffers, and the attachment."""
    model = copy.deepcopy(model)
    steps = []
    with attach(model, "conv", method=method, **arguments) as attachment:
        for step in range(3):
            torch.manual_seed(step)
            x = images[:, :, :12, :12].double().requires_grad_()
            if arguments["mode"] == "target":
                attachment.record(targets[:, :, :12, :12].double())
            model.zero_grad()
            y = model(x)
            loss(y).backward()
            grads = [x.grad, *(p.grad for p in model.parameters())]
            steps.append((y, grads, [b.clone() for b in model.buffers()]))
    return steps, attachment


@pytest.mark.filterwarnings("ignore:method='replace'")
@pytest.mark.parametrize(
    ("mode", "memory_format"),
    (("random", torch.contiguous_format), ("target", torch.channels_last)),
)
@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
@pytest.mark.parametrize("case", (*FUSED, *OTHERS))
def test_whoever_reads_the_map(case, gradient, mode, memory_format):
    """Outputs, gradients and buffers are those of hooks, in each step."""
    torch.manual_seed(0)
    reader, read = (None, FUSED[case]) if case in FUSED else OTHERS[case]
    model = varied(Reading(read)).double().to(memory_format=memory_format)
    arguments = {"mode": mode, "gradient": gradient, "p_zero": 0.3 if mode == "random" else None}
    hooks, _ = steps_of(model, "hooks", **arguments)
    replace, attachment = steps_of(model, "replace", **arguments)
    for (y0, grads0, buffers0), (y1, grads1, buffers1) in zip(hooks, replace, strict=True):
        assert torch.allclose(y0, y1, rtol=1e-12, atol=1e-13)
        for a, b in zip(grads0, grads1, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-11)
        for a, b in zip(buffers0, buffers1, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert attachment.fired == {"conv": 3}
    if reader is None:
        assert attachment.fused == {"conv": 3} and attachment.reasons == {}
        assert attachment.method_of == {"conv": "replace"}
    else:
        assert attachment.fused == {"conv": 0} and attachment.method_of == {"conv": "hooks"}
        assert attachment.reasons == {"conv": f"{reader} reads its output before a BatchNorm does"}


def test_a_map_is_never_seen_unfinished():
    """By printing, copying, saving, numpy and other code that looks at a tensor."""
    seen = []

    def read(m, z, step):
        other = copy.deepcopy(z.detach())
        seen.append(
            [repr(z), pickle.loads(pickle.dumps(z.detach())), z.tolist(), z.detach().numpy()]
        )
        assert torch.equal(other, z) and type(z.clone()) is torch.Tensor
        return m.bn(z)

    model = Reading(read)
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        with attach(model, "conv", p_zero=0.5, method=method):
            model(images[:1, :, :6, :6])
    hooks, auto = seen
    assert hooks[0] == auto[0] and torch.equal(hooks[1], auto[1]) and hooks[2] == auto[2]
    assert (hooks[3] == auto[3]).all()


@pytest.mark.parametrize("case", ("chain", "norm read before relu", "read afterwards", *OTHERS))
@pytest.mark.parametrize("gradient", ("straight_through", "clipped"))
def test_a_step_leaves_no_tensor_behind(case, gradient):
    """Not in cycles either, which no collector can break where they pass through autograd's graph."""
    read = FUSED.get(case) or OTHERS[case][1]
    model = Reading(read)
    counts = []
    with attach(model, "conv", p_zero=0.5, gradient=gradient, method="auto"):
        for _ in range(4):
            model(images[:, :, :12, :12]).sum().backward()
            gc.collect()
            counts.append(sum(isinstance(t, torch.Tensor) for t in gc.get_objects()))
    assert counts[1] == counts[3]


def test_code_below_python_gets_the_finished_map():
    """An op of a library, which torch does not announce, reads it; one that writes to it is refused."""
    library = torch.library.Library("fastshape_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                return torch.ops.fastshape_test.twice(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Writing(Below):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                return x.detach().add_(1)

    model = varied(Reading(lambda m, z, step: m.relu(m.bn(Below.apply(z))))).double()
    hooks, replace = (steps_of(model, m, mode="random", p_zero=0.3)[0] for m in ("hooks", "auto"))
    for (y0, grads0, _), (y1, grads1, _) in zip(hooks, replace, strict=True):
        assert torch.equal(y0, y1)
        assert all(
            a is b is None or torch.allclose(a, b) for a, b in zip(grads0, grads1, strict=True)
        )

    model = varied(Reading(lambda m, z, step: m.relu(m.bn(z)) + Writing.apply(z))).double()
    steps_of(model, "auto", mode="random", p_zero=0.3)  # a copy may be written to


def test_a_converted_model():
    """SyncBatchNorm asks for a process group in training alone. In evaluation it calls torch's batch_norm."""
    model = build("resnet18").eval()
    with replaced(model, 1, at_eval="on") as attachment:
        before = model(images)
        after = nn.SyncBatchNorm.convert_sync_batchnorm(model)(images)
        assert torch.equal(before, after) and attachment.fused == {"conv1": 2}


def test_resnet18():
    model = build("resnet18").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = replaced(model, "all")
        for _ in range(2):
            model(images)
    assert set(attachment.method_of.values()) == {"replace"} and attachment.reasons == {}
    assert attachment.fused == attachment.fired == dict.fromkeys(attachment.names, 2)
    # In a block the output of bn1 goes to ReLU. Those of bn2 and of the downsample's BatchNorm go to the sum.
    rectified = {name for name, layer in attachment._layers.items() if layer.rectified}
    assert rectified == {"conv1", *(f"layer{k}.{b}.conv1" for k in (1, 2, 3, 4) for b in (0, 1))}


def test_mobilenet_says_where_hooks_serve():
    """Only the squeeze-and-excitation convolutions have no BatchNorm."""
    model = build("mobilenet_v3_small")
    attachment = attach(model, "all", mode="binarize", method="replace")
    with pytest.warns(UserWarning, match="method='replace': hooks serve .*fc1: relu reads") as w:
        model(images)
    assert len(w) == 1
    by_hooks = [name for name, method in attachment.method_of.items() if method == "hooks"]
    assert len(by_hooks) == 18 and all(".fc" in name for name in by_hooks)
    assert set(attachment.reasons) == set(by_hooks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)  # said once


@pytest.mark.parametrize("kind", ("forward", "backward"))
@pytest.mark.parametrize("module", ("conv", "bn", "relu"))
def test_other_hooks_see_what_they_would(module, kind):
    seen = []
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        model = varied(Reading(FUSED["chain"])).double()
        model.relu.inplace = False  # which a backward hook refuses
        register = "register_forward_hook" if kind == "forward" else "register_full_backward_hook"
        getattr(model.get_submodule(module), register)(
            lambda m, a, b: seen.append([t.clone() for t in (*a, *b) if t is not None])
        )
        loss(steps_of(model, method, mode="random", p_zero=0.3)[0][0][0])
    half = len(seen) // 2
    assert half == 3
    for hooks, auto in zip(seen[:half], seen[half:], strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(hooks, auto, strict=True))


@pytest.mark.parametrize(
    "arguments",
    ({"binarize": False, "mode": "random", "p_zero": 0.5}, {"mode": "product"}),
)
def test_a_map_that_is_not_binary_is_shaped_by_hooks(arguments):
    with pytest.warns(UserWarning, match="the shaped map is not binary") as warning_list:
        attachment = attach(Reading(FUSED["chain"]), 1, method="replace", **arguments)
    assert len(warning_list) == 1 and warning_list[0].filename == __file__
    assert attachment.method_of == {"conv": "hooks"} and list(attachment.reasons) == ["conv"]


def test_only_replace_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("hooks", "auto"):
            model = Reading(OTHERS["no norm"][1])
            with attach(model, 1, mode="binarize", method=method) as attachment:
                model(images)
            assert attachment.method_of == {"conv": "hooks"}
            assert bool(attachment.reasons) == (method == "auto")


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
    calls, real = [], torch.relu_  # which F.relu calls where nothing stands in for it
    monkeypatch.setattr(torch, "relu_", lambda x: calls.append(x.shape) or real(x))
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
        shaped = kept()  # counts what the tensors that wait for a reader save, too
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
    """On different layers and on the same one."""
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
        assert list(model.state_dict()) == keys and str(model) == printed
        assert {type(m) for m in model.modules()} == {type(m) for m in build("resnet18").modules()}
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
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    assert attachment.fired == {"conv1": 0, "layer1.1.conv1": 0}


# ---- recording ----


@pytest.mark.parametrize("record_mode", ("eval", "train"))
def test_recording_is_the_same(record_mode):
    """The target pass runs plain BatchNorm and ReLU, builds no graph and keeps only bits; in evaluation it ends early."""
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
        assert attachment.fired == dict.fromkeys(attachment.names, 0)
        assert bool(after) == (record_mode == "train")
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
    attachment = attach(model, [1, 4], mode="random", p_zero=0.5, method="auto")
    torch.manual_seed(5)
    y = compiled(x)
    loss(y).backward()
    assert torch.allclose(y, expected[0], rtol=1e-10)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[1][name], rtol=1e-8, atol=1e-8)
    assert not torch.equal(compiled(x), compiled(x))
    assert attachment.fired == {"conv1": 3, "layer1.1.conv1": 3}
    assert attachment.reasons == dict.fromkeys(attachment.names, "compiled code runs it")
    model(x)
    assert attachment.method_of == dict.fromkeys(attachment.names, "replace")
    attachment.remove()
    model.eval()
    assert torch.allclose(compiled(x), model(x))


# ---- modes of autograd, kept tensors, and what changes between ----


def frozen_part(m, x):
    with torch.no_grad():
        z = m.bn(m.conv(x))
    return torch.relu(z)


def norm_without_graph(m, x):
    y = m.conv(x)
    with torch.no_grad():
        z = m.bn(y)
    return torch.relu(z) + m.conv.bias.sum()


def relu_without_graph(m, x):
    z = m.bn(m.conv(x))
    with torch.no_grad():
        r = F.relu(z)
    return r + z


def relu_in_place_without_graph(m, x):
    z = m.bn(m.conv(x))
    with torch.no_grad():
        F.relu_(z)
    return z


def made_in_inference_mode(m, x):
    with torch.inference_mode():
        y = m.conv(x)
        z = m.bn(m.conv(x))
    return m.bn2(torch.relu(z) + y.clone()) + m.conv.bias.sum()


def read_in_inference_mode(m, x):
    y = m.conv(x)
    z = m.bn(y)
    with torch.inference_mode():
        z.mean(), y.mean()
    return F.conv2d(F.relu(z), m.conv.weight.transpose(0, 1)).mean() + F.conv2d(z + y, m.conv.weight[:, :, :1].repeat(1, 2, 1, 1)).mean()  # fmt: skip


def metadata_changes_in_place(m, x):
    y = m.conv(x)
    y.unsqueeze_(0)
    assert y.dim() == 5 and y.shape[0] == 1 and y.stride() == y.clone().stride()
    return y[0].sum() + m.conv(x).transpose_(2, 3)


def gradients_of_a_detached_map(m, x):
    y = m.conv(x.detach()).detach()
    y.requires_grad_()
    assert y.requires_grad
    (g,) = torch.autograd.grad(y.sin().sum(), y)
    return g + m.bn(m.conv(x))


def a_look_without_graph(m, x):
    y = m.conv(x)
    z = y + 1
    quiet(torch.mean, y)
    return z + Times2.apply(y)


def hook_before_the_norm(m, x):
    y = m.conv(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return m.bn(y)


def hooks_on_both(m, x):
    y = m.conv(x)
    z = m.bn(y)
    if z.requires_grad:
        z.register_hook(lambda g: g * 3)
    return torch.relu(z)


MODES_AND_CHANGES = (
    hooks_on_both,
    frozen_part, norm_without_graph, relu_without_graph, relu_in_place_without_graph, made_in_inference_mode,
    read_in_inference_mode, metadata_changes_in_place, gradients_of_a_detached_map,
    a_look_without_graph, hook_before_the_norm,
)  # fmt: skip


@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
@pytest.mark.parametrize("function", MODES_AND_CHANGES)
def test_modes_and_changes_between_are_those_of_hooks(function, gradient):
    results = []
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        model = varied(Reading(None)).double()
        with attach(model, "conv", p_zero=0.5, seed=3, gradient=gradient, method=method):
            x = images[:, :, :8, :8].double().requires_grad_()
            y = function(model, x)
            if y.requires_grad:
                y.square().sum().backward()
            grads = [x.grad, *(p.grad for p in model.parameters())]
            results.append((y.detach().clone(), y.requires_grad, grads, list(model.buffers())))
    (y0, needs0, grads0, buffers0), (y1, needs1, grads1, buffers1) = results
    assert torch.allclose(y0, y1, rtol=1e-10, atol=1e-12) and needs0 == needs1
    for a, b in zip(grads0, grads1, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    assert all(torch.allclose(a, b) for a, b in zip(buffers0, buffers1, strict=True))


SEGMENTS = {
    "another reader": lambda m: (m.conv, lambda y: y.tanh()),
    "norm, and the map": lambda m: (m.conv, lambda y: torch.relu(m.bn(y)) + y),
    "relu, and the norm's output": lambda m: (lambda x: m.bn(m.conv(x)), lambda z: torch.relu(z) * z),
    "all": lambda m: (lambda x: x, lambda x: (lambda z: torch.relu(z) + z)(m.bn(m.conv(x)))),
    "the layer twice": lambda m: (lambda x: x, lambda x: torch.relu(m.bn(m.conv(x))) + m.bn(m.conv(x)).abs()),
}  # fmt: skip


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("segment", SEGMENTS)
def test_a_checkpoint_may_begin_at_any_reader(segment, use_reentrant):
    results = []
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        model = varied(Reading(None)).double()
        before, inside = SEGMENTS[segment](model)
        with attach(model, "conv", p_zero=0.5, method=method):
            torch.manual_seed(2)
            x = images[:, :, :8, :8].double().requires_grad_()
            outputs = [checkpoint(inside, before(x), use_reentrant=use_reentrant) for _ in range(2)]
            sum(y.square().sum() for y in outputs).backward()
            results.append([*outputs, x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-8))


@pytest.mark.parametrize("ask", (
    lambda o, t: torch.autograd.grad(o, t, allow_unused=True),
    lambda o, t: t.register_hook(print),
    lambda o, t: t.retain_grad(),
    lambda o, t: o.backward(inputs=[t]),
))  # fmt: skip
@pytest.mark.parametrize("which", (0, 1))
def test_gradients_that_one_op_has_swallowed_are_refused_by_name(ask, which):
    model = Reading(None)
    with attach(model, "conv", p_zero=0.5, method="auto"):
        y = model.conv(images)
        z = model.bn(y)
        loss = torch.relu(z).sum()
        with pytest.raises(
            RuntimeError, match="'conv' has no gradient of its own after one op took it"
        ):
            ask(loss, (y, z)[which])
        loss.backward()


def test_a_layer_that_returns_its_input_is_shaped_at_once():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.bn = nn.Identity(), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.same(x)
            with torch.no_grad():
                x.add_(5)
            return self.bn(y)

    outputs = []
    for method in ("hooks", "auto"):
        model = Passing()
        with attach(model, "same", p_zero=0.5, seed=1, method=method) as attachment:
            outputs.append(model(images.clone()))
    assert torch.equal(*outputs)
    assert "a part of another tensor" in attachment.reasons["same"]


def test_an_output_that_its_module_changes_later_is_an_error():
    model = Reading(lambda m, z, step: (quiet(lambda k: k.add_(1), m.conv.kept), m.bn(z))[1])
    model.conv = CustomConv(3, 6, 3)
    with attach(model, "conv", p_zero=0.5, method="auto"):
        with pytest.raises(RuntimeError, match="the output of 'conv' was changed in place before"):
            model(images)


@torch.no_grad()
@pytest.mark.parametrize("change", (lambda t: t.mul_(0.5), lambda t: t.data.add_(1)))
@pytest.mark.parametrize("function", (lambda z: z, torch.relu, lambda z: z + torch.relu(z)))
def test_parameters_that_change_before_the_read_do_not_reach_it(function, change):
    """As an average of weights does, with the output of its teacher. In each step: what is expected of the reader changes."""
    results = []
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        model = varied(Reading(None)).double()
        with attach(model, "conv", p_zero=0.5, seed=1, method=method):
            for _ in range(3):
                z = model.bn(model.conv(images[:, :, :8, :8].double()))
                for parameter in model.bn.parameters():
                    change(parameter)
                results.append(function(z).clone())
    assert all(
        torch.allclose(a, b, rtol=1e-10) for a, b in zip(results[:3], results[3:], strict=True)
    )


@pytest.mark.parametrize("grad", (True, False))
def test_a_compiled_reader_of_an_eager_layer(grad):
    torch._dynamo.reset()
    results = []
    for method in ("hooks", "auto"):
        torch.manual_seed(0)
        model = varied(Reading(FUSED["chain"])).double()
        model.bn.compile(backend="eager")
        with attach(model, "conv", p_zero=0.5, seed=1, method=method):
            with torch.set_grad_enabled(grad):
                results.append([model(images.double()) for _ in range(2)])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*results, strict=True))


def test_forward_mode_is_refused_as_with_hooks():
    for method in ("hooks", "auto"):
        model = Reading(FUSED["chain"]).requires_grad_(False)
        with attach(model, "conv", p_zero=0.5, method=method):
            with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
                model(torch.autograd.forward_ad.make_dual(images, images))
