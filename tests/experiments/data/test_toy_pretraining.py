"""The start of the toy's network: imaginary figures, and weights small enough to be committed."""

import numpy as np
import torch
from domainshift.data.drawing import CLASSES, SIDE, draw
from domainshift.data.toy_pretraining import KINDS, MODEL, WEIGHTS, creature, pictures
from domainshift.models import build_model


def test_weights_are_under_a_megabyte_of_float16_and_load_safely():
    assert WEIGHTS.stat().st_size < 1_000_000
    state = torch.load(WEIGHTS, weights_only=True)
    model, _ = build_model(MODEL, "none", KINDS, 0)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    floats = [value for value in state.values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float16}
    assert all(value.isfinite().all() for value in floats)


def test_pictures_are_the_same_each_time_and_differ():
    images, labels = pictures(kinds=3, each=2, seed=0)
    assert images.shape == (6, 3, SIDE, SIDE) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(images.flatten(1).unique(dim=0)) == 6
    again, _ = pictures(kinds=3, each=2, seed=0)
    assert torch.equal(images, again)
    other, _ = pictures(kinds=3, each=2, seed=1)
    assert not torch.equal(images, other)


def test_individuals_of_a_kind_share_its_plan():
    def plan(kind, seed):
        figure = creature(kind, np.random.default_rng(seed))
        return [(tone, [len(shape) for shape in shapes]) for tone, shapes in figure]

    assert plan(1, 0) == plan(1, 1)
    assert plan(1, 0) != plan(2, 0)


def test_no_picture_of_the_toy_is_among_them():
    images, _ = pictures(kinds=4, each=2, seed=0)
    seen = {image.permute(1, 2, 0).numpy().tobytes() for image in images}
    assert not seen & {draw("photo", name, index).tobytes() for name in CLASSES for index in (0, 1)}
