"""choose_layers: every way of naming layers, and messages that say what is wrong and what to do instead."""

import numpy as np
import pytest
import torch
from torch import nn

from fastshape.sites import choose_layers, modules_of_kind

torchvision = pytest.importorskip("torchvision")

CONVS = {1: "conv1", 4: "layer1.1.conv1", 8: "layer2.0.downsample.0", 20: "layer4.1.conv2"}


@pytest.fixture(scope="module")
def model():
    return torchvision.models.resnet18()


class Shared(nn.Module):
    """A convolution that has two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.decoder = nn.Sequential(self.encoder[0], nn.GELU())


def message(error, model, layers, **options):
    with pytest.raises(error) as caught:
        choose_layers(model, layers, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


# ---- what is taken ----


@pytest.mark.parametrize(
    "layers",
    (
        [1, 4],
        (1, 4),
        {1: 0.5, 4: 0.7},
        range(1, 5, 3),
        np.array([1, 4]),
        np.array([1, 4], dtype=np.uint8),
        [np.int32(1), np.int64(4)],
        torch.tensor([1, 4]),
        ["conv1", np.str_("layer1.1.conv1")],
        [1, "layer1.1.conv1"],
        (k for k in (1, 4)),
    ),
    ids=repr,
)
def test_several_layers(model, layers):
    assert choose_layers(model, layers) == (CONVS[1], CONVS[4])


@pytest.mark.parametrize("layers", (4, np.int64(4), np.array(4), np.array([4]), CONVS[4]), ids=repr)
def test_one_layer(model, layers):
    assert choose_layers(model, layers) == (CONVS[4],)


def test_modules(model):
    assert choose_layers(model, model.conv1) == ("conv1",)
    assert choose_layers(model, [model.layer1[1].conv1, 1]) == (CONVS[4], "conv1")
    assert choose_layers(model, {model.bn1: 0.5}) == ("bn1",)
    assert choose_layers(model, model.layer1) == ("layer1",)  # a Sequential is one module


def test_module_list_stands_for_its_modules():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    assert choose_layers(model, model.blocks) == ("blocks.0", "blocks.1")


def test_every(model):
    assert choose_layers(model, np.arange(1, 10), every=np.int64(4)) == (CONVS[4], CONVS[8])
    assert choose_layers(model, "all") == tuple(modules_of_kind(model, "conv"))


def test_any_name_of_a_module_that_has_several():
    model = Shared()
    for layers in ("encoder.0", "decoder.0", "dec*.0", "encoder.*", model.decoder[0], 1):
        assert choose_layers(model, layers) == ("encoder.0",)
    assert "'encoder.0' is named twice (again by 'decoder.0')" in message(
        ValueError, model, ["encoder.0", "decoder.0"]
    )


def test_names_without_the_prefix_of_a_compiled_model(model):
    compiled = torch.compile(model, backend="eager")
    expected = choose_layers(compiled, 4)
    assert expected == ("_orig_mod.layer1.1.conv1",)
    assert choose_layers(compiled, CONVS[4]) == choose_layers(compiled, expected[0]) == expected
    assert choose_layers(compiled, model.layer1[1].conv1) == expected


# ---- messages ----


def test_number_that_does_not_exist(model):
    for number in (0, 21, -1, np.int64(21)):
        expected = f"layers: there is no conv {number}; this model has convs 1 to 20"
        assert message(ValueError, model, number) == expected
    expected = "layers: there is no BatchNorm 30; this model has BatchNorms 1 to 20"
    assert message(ValueError, model, 30, after="bn") == expected
    expected = "layers: there is no activation 10; this model has activations 1 to 9"
    assert message(ValueError, model, 10, after="relu") == expected
    assert message(ValueError, nn.Linear(1, 1), 1).endswith("this model has no conv")
    assert message(ValueError, nn.Sequential(nn.Conv2d(1, 1, 1)), 2).endswith("has only conv 1")


def test_misspelt_name(model):
    text = message(ValueError, model, "layr1.0.conv1")
    assert text.startswith("layers: there is no module 'layr1.0.conv1'; close names are ")
    assert "'layer1.0.conv1'" in text and text.count("'") == 8  # the name and three others
    assert "'layer1.0.conv1'" in message(ValueError, model, "layer1.0.Conv1")
    assert "close names are 'module.conv1'" in message(
        ValueError, nn.ModuleDict({"module": model}), "conv1"
    )
    expected = "there is no module 'backbone'; no name in it is close; model.named_modules() lists them all"
    assert expected in message(ValueError, model, "backbone")
    assert "there is no module ''" in message(ValueError, model, "")
    assert "this model has no modules inside" in message(ValueError, nn.Conv2d(1, 1, 1), "conv")


def test_pattern_that_matches_no_module_of_the_kind(model):
    assert message(ValueError, model, "layer1.*.bn?") == (
        "layers: pattern 'layer1.*.bn?' matches no conv; after='bn' gives the 4 BatchNorms that it matches"
    )
    assert "after='relu' gives the 1 activation that it matches" in message(
        ValueError, Shared(), "decoder.[1]"
    )
    text = message(ValueError, model, "layer?")
    assert "matches no conv; it matches modules of other kinds ('layer1', 'layer2', 'lay" in text
    assert "which can be given by name" in text
    text = message(ValueError, model, "layr1.0.conv*")
    assert "matches no conv; close names are 'layer1.0.conv" in text


def test_module_of_another_model(model):
    other = torchvision.models.resnet18()
    assert message(ValueError, model, other.conv1) == (
        "layers: Conv2d(...) is not a module of this model, which is a ResNet"
    )
    assert message(ValueError, model, [1, other.layer1]).startswith(
        "layers: Sequential(...) is not"
    )
    assert message(ValueError, model, model).startswith("layers: ResNet(...) is the model itself")


def test_modules_and_tensors_given_by_mistake_are_named_and_not_printed(model):
    text = message(TypeError, model, 1, after=model.layer1)
    assert text == "after=Sequential(...): must be one of 'conv', 'bn', 'relu'"
    assert message(TypeError, model, 1, after=None).startswith("after=None: must be one of")
    assert message(ValueError, model, 1, after="pool") == "after='pool': allowed are conv, bn, relu"
    assert "every=ResNet(...): must be" in message(ValueError, model, 1, every=model)
    assert "layers: Parameter(...) is neither" in message(TypeError, model, model.parameters())
    assert message(ValueError, model, "x" * 5000).startswith("layers: there is no module 'xxxx")
    assert "'conv1' is named twice (again by Conv2d(...))" in message(
        ValueError, model, [1, model.conv1]
    )


@pytest.mark.parametrize(
    "layers", ([1.5], [True], [None], [[1, 4]], np.array([1.0]), np.array([True]), np.ones((2, 2), int))
)  # fmt: skip
def test_entries_of_a_wrong_type(model, layers):
    assert "is neither an int, a name, a pattern nor a module" in message(TypeError, model, layers)


@pytest.mark.parametrize("layers", (1.5, None, np.array(1.5)))
def test_layers_of_a_wrong_type(model, layers):
    assert "must be numbers, names, patterns, modules" in message(TypeError, model, layers)


def test_nothing_chosen(model):
    for layers, options in (([], {}), (np.array([], dtype=int), {}), (1, {"every": 2})):
        assert "nothing to shape; this model has 20" in message(
            ValueError, model, layers, **options
        )
