"""torch.fx traces ActivationShaping and ShapedBatchNorm2d as one node, like the modules of torch.nn."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import fastshape
from fastshape import ActivationShaping, BitMask, ShapedBatchNorm2d


class Block(nn.Module):
    """Convolution, shaping, normalization; the forward may pass masks on."""

    def __init__(self, **shaping):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.shape = ActivationShaping(**shaping)
        self.conv2 = nn.Conv2d(5, 4, 1)
        self.norm = ShapedBatchNorm2d(4, relu=True, **shaping)

    def forward(self, x):
        return self.norm(self.conv2(self.shape(self.conv(x))))


class Masked(Block):
    def forward(self, x, mask, norm_mask=None, state=None):
        y = self.conv2(self.shape(self.conv(x), mask))
        return self.norm(y, mask=norm_mask) if state is None else self.norm(y, rng_state=state)


class WithConstants(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.rand(2, 5, 6, 6) < 0.5)
        self.bits = BitMask.from_tensor(torch.randn(2, 4, 6, 6))

    def forward(self, x):
        return self.norm(self.conv2(self.shape(self.conv(x), mask=self.mask)), self.bits)


def images(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def called_modules(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


def assert_equal_training(model, traced, *inputs, **arguments):
    """Outputs, gradients and buffers, over two steps; random masks are drawn from one generator state."""
    reference = copy.deepcopy(model)
    for _ in range(2):
        outputs = []
        for module in (reference, traced):
            module.zero_grad()
            torch.manual_seed(3)
            y = module(*inputs, **arguments)
            (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
            outputs.append(y)
        assert torch.equal(*outputs)
    expected, actual = dict(reference.named_parameters()), dict(traced.named_parameters())
    for name, parameter in actual.items():
        gradients = parameter.grad, expected[name].grad
        assert gradients == (None, None) or torch.equal(*gradients), name
    expected = dict(reference.named_buffers())
    for name, buffer in traced.named_buffers():
        if name in expected:
            assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("gradient", ("straight_through", "clipped", "zero"))
def test_modules_are_leaves(gradient):
    model = Block(p_zero=0.3, gradient=gradient)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert called_modules(traced) == ["conv", "shape", "conv2", "norm"]
    assert type(traced.shape) is ActivationShaping and type(traced.norm) is ShapedBatchNorm2d
    traced.graph.lint()
    assert_equal_training(model, traced, images())


@pytest.mark.parametrize("at_eval", ("off", "binarize", "on"))
def test_a_traced_model_follows_its_training_flag_and_settings(at_eval):
    model = Block(p_zero=0.5, at_eval=at_eval)
    traced = fx.symbolic_trace(model)
    for training in (False, True):
        model.train(training), traced.train(training)
        buffers = copy.deepcopy(model.state_dict())
        torch.manual_seed(0)
        expected = model(images())
        model.load_state_dict(buffers)
        torch.manual_seed(0)
        assert torch.equal(traced(images()), expected)
    traced.shape.p_zero = 0.9
    traced.shape.train()
    assert traced.shape(torch.ones(2**14)).mean() < 0.2


def test_inside_sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(ActivationShaping(0.3), nn.ReLU()),
        nn.Conv2d(4, 4, 1),
        ShapedBatchNorm2d(4, p_zero=0.5),
    )
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert called_modules(traced) == ["0", "1.0", "1.1", "2", "3"]
    assert_equal_training(model, traced, images())
    again = fx.symbolic_trace(copy.deepcopy(traced))
    assert called_modules(again) == called_modules(traced)
    assert_equal_training(traced, again, images())


def test_masks_and_states_may_be_inputs():
    model = Masked(p_zero=0.3)
    mask, norm_mask = torch.rand(2, 5, 6, 6) < 0.5, torch.rand(2, 4, 6, 6) < 0.5
    for pack in (lambda t: t, BitMask.from_bool):
        traced = fx.symbolic_trace(copy.deepcopy(model), concrete_args={"state": None})
        assert_equal_training(model, traced, images(), pack(mask), norm_mask=pack(norm_mask))
    traced = fx.symbolic_trace(copy.deepcopy(model), concrete_args={"norm_mask": None})
    assert_equal_training(model, traced, images(), mask, state=fastshape.rng_state(7))


def test_masks_that_the_model_holds():
    model = WithConstants()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert called_modules(traced) == ["conv", "shape", "conv2", "norm"]
    assert any(b.equal(model.bits.bits) for b in traced.buffers())
    loaded = pickle.loads(pickle.dumps(traced))
    for module in (traced, loaded):
        assert_equal_training(model, module, images())


def test_a_module_alone_has_no_code_to_trace():
    for module in (ActivationShaping(0.5), ShapedBatchNorm2d(3)):
        with pytest.raises(RuntimeError, match=f"not {type(module).__name__} alone.*Sequential"):
            fx.symbolic_trace(module)


def test_feature_extractor_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Block(p_zero=0.3)
    names = extraction.get_graph_node_names(model)[0]
    assert names == ["x", "conv", "shape", "conv2", "norm"]
    features = extraction.create_feature_extractor(model, {"shape": "maps", "norm": "last"})
    torch.manual_seed(1)
    outputs = features(images())
    torch.manual_seed(1)
    maps = model.shape(model.conv(images()))
    assert torch.equal(outputs["maps"], maps) and set(maps.unique().tolist()) == {0, 1}
    features.eval()
    model.eval()
    assert torch.equal(features(images())["last"], model(images()))


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is to move to torchao
def test_quantization_prepares_the_convolutions():
    quantization = pytest.importorskip("torch.ao.quantization")
    fx_mode = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model = Block(p_zero=0.3).eval()
    mapping = quantization.get_default_qconfig_mapping("x86")
    prepared = fx_mode.prepare_fx(copy.deepcopy(model), mapping, (images(),))
    assert {"conv", "shape", "conv2", "norm"} <= set(called_modules(prepared))
    assert torch.equal(prepared(images()), model(images()))
