"""Maps that the package does not make, against values worked out by hand."""

import pytest
import torch
from domainshift.methods.masks import RecordedMaps
from domainshift.methods.shaping import TargetMaps
from small_networks import SOURCE, TARGET, config_of, images, net, outputs
from torch import nn

import fastshape

# --- recorded maps, and what they do ---


def shaped(x=SOURCE, targets=(TARGET,), **switches):
    """The first convolution's output before shaping, on each target, and after shaping."""
    model = net()
    conv = model[0]
    with TargetMaps.attach(model, config_of("da", layers=(1,), **switches)) as attachment:
        attachment.record(*targets)
        (y,) = outputs(model, "0", x)
    with torch.no_grad():
        return conv(x), [conv(t) for t in targets], y.detach(), attachment


def test_epsilon_stands_where_the_map_is_zero():
    a, (m,), y, _ = shaped(epsilon=0.25)
    values = torch.where(m > 0, 1.0, 0.25)
    assert torch.equal(y, (a > 0) * values)
    a, (m,), y, _ = shaped(epsilon=0.25, binarize=False)
    assert torch.equal(y, a * torch.where(m > 0, 1.0, 0.25))


@pytest.mark.parametrize("gradient", ["straight_through", "clipped", "zero"])
def test_the_gradient_with_an_epsilon(gradient):
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[[[2.0, 0.5], [-0.5, -2.0]]]], requires_grad=True)
    target = torch.tensor([[[[-1.0, 1.0], [-1.0, 1.0]]]])
    config = config_of("da", layers=(1,), epsilon=0.25, gradient=gradient)
    with TargetMaps.attach(model, config) as attachment:
        attachment.record(target)
        y = model(x)
    assert y.tolist() == [[[[0.25, 1.0], [0.0, 0.0]]]]
    if gradient == "zero":
        assert not y.requires_grad
        return
    (2 * y).sum().backward()
    expected = {"straight_through": [[0.5, 2.0], [0.5, 2.0]], "clipped": [[0.0, 2.0], [0.5, 0.0]]}
    assert x.grad.tolist() == [[expected[gradient]]]


def test_top_k_of_the_target_is_the_mask():
    a, (m,), y, attachment = shaped(top_k=0.25)
    assert torch.equal(y, ((a > 0) & fastshape.top_k(0.25)(m).to_bool()).float())
    assert attachment.density() == {"0": 0.25}
    a, (m,), y, _ = shaped(top_k=0.25, product=True, binarize=False)
    assert torch.equal(y, a * (m * fastshape.top_k(0.25)(m).to_bool()))


def test_the_maps_of_several_domains_are_multiplied():
    third = images(seed=3)
    switches = {"mask_sources": ("photo", "cartoon", "art_painting")}
    a, (m1, m2, m3), y, attachment = shaped(targets=(TARGET, SOURCE, third), **switches)
    mask = (m1 > 0) & (m2 > 0) & (m3 > 0)
    assert torch.equal(y, ((a > 0) & mask).float())
    assert attachment.density()["0"] == pytest.approx(mask.float().mean().item())
    a, (m1, m2), y, _ = shaped(
        targets=(TARGET, third), mask_sources=("photo", "cartoon"), product=True, binarize=False
    )
    assert torch.equal(y, a * (m1 * m2))


@pytest.mark.parametrize("switches", [{}, {"product": True, "binarize": False}])
@pytest.mark.parametrize("gradient", ["straight_through", "zero"])
def test_own_hooks_and_those_of_the_package_shape_alike(switches, gradient):
    results = []
    for kind in ("package", "own"):
        model = net()
        config = config_of("da", layers=(1, 2), gradient=gradient, attach="hooks", **switches)
        attachment = TargetMaps.attach(model, config)
        assert isinstance(attachment, fastshape.Attachment)
        if kind == "own":
            attachment.remove()
            attachment = RecordedMaps(model, attachment.names, config.options)
        attachment.record(TARGET)
        model(SOURCE).sum().backward()
        grads = [p.grad for p in model.parameters()]
        results.append((model(SOURCE), grads, attachment.fired, attachment.density()))
    (y1, grads1, *rest1), (y2, grads2, *rest2) = results
    assert torch.equal(y1, y2)
    for a, b in zip(grads1, grads2, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert rest1 == rest2


# --- what a pass over target images does to BatchNorm ---


@pytest.mark.parametrize("record_mode", ["eval", "train"])
@pytest.mark.parametrize("apply_maps", [True, False])
def test_batchnorm_moves_in_train_mode_only_and_then_all_of_it(record_mode, apply_maps):
    model = net()
    config = config_of("da", layers=(1,), record_mode=record_mode, apply_maps=apply_maps)
    norms = (model[1], model[4])
    before = [norm.running_mean.clone() for norm in norms]
    with TargetMaps.attach(model, config) as attachment:
        attachment.record(TARGET)
    assert model.training
    # model[4] comes after the only shaped layer: published code ran the pass to its end
    pairs = zip(before, norms, strict=True)
    moved = [not torch.equal(mean, norm.running_mean) for mean, norm in pairs]
    assert moved == [record_mode == "train"] * 2
    if record_mode == "train":
        mean = model[0](TARGET).mean((0, 2, 3))
        torch.testing.assert_close(model[1].running_mean, 0.1 * mean, rtol=1e-5, atol=1e-7)


def test_removed_hooks_leave_the_model_as_it_was():
    model = net()
    y = model(SOURCE)
    with TargetMaps.attach(model, config_of("da", layers=(1,), epsilon=0.5)) as attachment:
        attachment.record(TARGET)
        assert not torch.equal(model(SOURCE), y)
    assert torch.equal(model(SOURCE), y)
    assert not any(module._forward_hooks for module in model.modules())
