"""Small networks, images and configurations for the tests of the methods."""

import torch
from domainshift.config import Config
from domainshift.methods import method_named
from torch import nn

CPU = torch.device("cpu")


def net(channels=5):
    """Two blocks of convolution, BatchNorm and ReLU, and a classifier of 7 classes, `fc`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model.add_module("fc", nn.Linear(channels, 7))
    return model


def images(n=6, seed=0, side=8):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


SOURCE, TARGET = images(seed=1), images(seed=2)


def config_of(mode="baseline", **values):
    """A configuration that no data set and no preset is part of."""
    kind = method_named(mode).Options
    options = kind(**{name: values.pop(name) for name in kind.names() if name in values})
    return Config(**{"mode": mode, "amp": "off", "device": "cpu", "lr": 0.1} | values,
                  options=options)  # fmt: skip


def method_with(network=None, mode="baseline", **values):
    return method_named(mode)(net() if network is None else network, config_of(mode, **values), CPU)


def outputs(model, name, x):
    """What module `name` gives in a forward, attached hooks included."""
    results = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: results.append(y))
    model(x)
    handle.remove()
    return results
