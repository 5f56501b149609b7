"""The examples in the documentation of the public names run, and every public name has one."""

import doctest

import pytest
import torch

import fastshape

# `reference` is a module, the specification, and has a page of its own
OBJECTS = {name: getattr(fastshape, name) for name in fastshape.__all__ if name != "reference"}


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_every_public_name_has_an_example(name):
    _, example, block = OBJECTS[name].__doc__.partition("\n    Example:\n")
    assert example and doctest.DocTestParser().get_examples(block)


class ShownOutput(doctest.OutputChecker):
    """Compares what an example prints only if the example shows it."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_examples_run(name):
    models = pytest.importorskip("torchvision.models")
    given = {
        "torch": torch,
        "nn": torch.nn,
        "fastshape": fastshape,
        "model": models.resnet18(num_classes=7),
        "images": torch.randn(2, 3, 64, 64),
        "labels": torch.tensor([0, 6]),
        "criterion": torch.nn.functional.cross_entropy,
    }
    runner = doctest.DocTestRunner(ShownOutput(), optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(OBJECTS[name], name, globs=given):
        runner.run(test)
    assert runner.summarize().failed == 0
