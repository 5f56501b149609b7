"""A ResNet-18 training step and a target pass, shaped by replacement, against the other ways and against no shaping."""

import functools

import contenders
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import fastshape

BATCH, SIDE = 16, 112
MAIN_PATH = [n for n in range(1, 21) if n not in (8, 13, 18)]  # without the downsample convolutions
LAYERS = {"conv 1 and 4": [1, 4], "all 17": MAIN_PATH}
ROUNDS = 9


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=7)


def names_of(layers: list[int]) -> list[str]:
    convs = [name for name, m in network().named_modules() if isinstance(m, nn.Conv2d)]
    return [convs[number - 1] for number in layers]


def hooked(shaping, layers) -> nn.Module:
    model = network()
    for name in names_of(layers):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output: shaping(output)
        )
    return model


def attached(layers, method) -> nn.Module:
    model = network()
    fastshape.attach(model, layers, p_zero=contenders.P_ZERO, method=method)
    return model


CONTENDERS = {
    "unshaped": lambda layers: network(),
    "hooks": functools.partial(attached, method="hooks"),
    "eager_reference": functools.partial(hooked, contenders.eager_reference),
    "published_numpy": functools.partial(hooked, contenders.published_numpy),
}


class Step:
    """One update of `model` on its own batch. `record`, if there is one, gets the target images first."""

    def __init__(self, model: nn.Module, record=None, batch: int = BATCH, side: int = SIDE):
        device = next(model.parameters()).device
        seeded = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.images, self.target = torch.randn(2, batch, 3, side, side, **seeded)
        self.labels = torch.randint(7, (batch,), **seeded)
        self.model, self.record = model, record
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        if self.record is not None:
            self.record(self.target)
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_random_step(against, layers, contender):
    ours = Step(attached(LAYERS[layers], "replace"))
    against(ours, Step(CONTENDERS[contender](LAYERS[layers])), moved_bytes=0, rounds=ROUNDS)


def target_step(**size) -> Step:
    model = network()
    attachment = fastshape.attach(model, [4], mode="target", method="replace")
    return Step(model, attachment.record, **size)


def published_target_step() -> Step:
    model = network()
    return Step(model, contenders.PublishedTargetMaps(model, names_of([4])).record)


@pytest.mark.parametrize("contender", ("unshaped", "published"))
def test_domain_adaptation_step(against, contender):
    """A target pass at layer 4 and a training step, against a plain step and against the published way."""
    theirs = Step(network()) if contender == "unshaped" else published_target_step()
    against(target_step(), theirs, moved_bytes=0, rounds=ROUNDS)


def test_record(against):
    """The target pass alone, against the published one, which runs the whole network in training mode with a graph."""
    ours, theirs = target_step(), published_target_step()
    against(
        lambda: ours.record(ours.target),
        lambda: theirs.record(theirs.target),
        moved_bytes=0,
        rounds=ROUNDS,
    )
