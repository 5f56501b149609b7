"""The layers that switches name, found a second time without the code that shapes them."""

import fnmatch

import pytest
import torch
from domainshift.config import Config
from domainshift.sweep.schema import known_suites
from made_records import index_of, setup_of
from torch import nn
from torchvision.models import resnet18

KINDS = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "relu": nn.ReLU}

with torch.device("meta"):
    MODULES = dict(resnet18().named_modules())


def layers_of(config: Config) -> list[str]:
    """Names of the modules of a ResNet-18 that a configuration shapes."""
    options = config.options
    if not getattr(options, "layers", ()) or not getattr(options, "apply_maps", True):
        return []
    of_kind = [n for n, m in MODULES.items() if isinstance(m, KINDS[options.after])]
    names: list[str] = []
    for entry in options.layers:
        if isinstance(entry, int):
            names.append(of_kind[entry - 1])
        elif entry in MODULES:
            names.append(entry)
        else:
            pattern = "*" if entry == "all" else entry
            names += [name for name in of_kind if fnmatch.fnmatchcase(name, pattern)]
    return names[options.every - 1 :: options.every]


@pytest.mark.parametrize(
    "switches, expected",
    [
        ({"layers": [1, 8, 20]}, ["conv1", "layer2.0.downsample.0", "layer4.1.conv2"]),
        (
            {"layers": "all", "every": 6},
            ["layer2.0.conv1", "layer3.0.conv2", "layer4.0.downsample.0"],
        ),
        ({"layers": 2, "after": "relu"}, ["layer1.0.relu"]),
        ({"layers": "layer1.?.bn1", "after": "bn"}, ["layer1.0.bn1", "layer1.1.bn1"]),
        ({"layers": "layer2.1.conv2"}, ["layer2.1.conv2"]),
    ],
)
def test_the_layers_that_switches_name(switches, expected):
    setup = setup_of(mode="random", p_zero=0.5, target="cartoon", **switches)
    assert layers_of(setup.config) == expected == list(setup.method.layer_names(setup.config))


@pytest.mark.parametrize("path", known_suites().values(), ids=known_suites())
def test_the_layers_of_every_arm_of_every_suite(path):
    _, jobs = index_of(path.read_text())
    for job in jobs:
        layers = job.setup.method.layer_names(job.setup.config)
        assert list(layers) == layers_of(job.setup.config), job.name
