"""Maps that the package does not make, against values worked out by hand."""

import pytest
import torch
from domainshift.methods.masks import RecordedMaps, random_blocks, top_fraction
from domainshift.methods.shaping import TargetMaps
from small_networks import SOURCE, TARGET, config_of, images, net, outputs
from torch import nn

import fastshape

# --- maps per channel and per block ---


def test_a_block_is_kept_or_dropped_as_one():
    x = torch.zeros(4, 8, 7, 5)
    torch.manual_seed(3)
    mask = random_blocks(x, 0.5, 3).to_bool()
    assert mask.shape == x.shape
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):  # 7 = 3 + 3 + 1, 5 = 3 + 2
        for columns in (slice(0, 3), slice(3, 5)):
            block = mask[:, :, rows, columns].flatten(2)
            assert torch.equal(block.all(2), block.any(2))
    assert mask[:, :, 0, 0].ne(mask[:, :, 3, 3]).any()  # blocks differ from one another


@pytest.mark.parametrize("p_zero", [0.0, 0.3, 0.9])
def test_a_channel_is_kept_or_dropped_as_one(p_zero):
    torch.manual_seed(0)
    mask = random_blocks(torch.zeros(100, 64, 4, 2), p_zero, None).to_bool().flatten(2)
    assert torch.equal(mask.all(2), mask.any(2))
    assert mask.float().mean().item() == pytest.approx(1 - p_zero, abs=0.02)  # 5 sigma


def test_blocks_of_one_element_are_the_stream_of_the_op():
    x = torch.randn(2, 3, 4, 5)
    torch.manual_seed(7)
    mask = random_blocks(x, 0.4, 1)
    torch.manual_seed(7)
    assert torch.equal(fastshape.shape(x.abs() + 1, p_zero=0.4) > 0, mask.to_bool())


def test_a_layer_without_a_plane_has_only_channels():
    torch.manual_seed(0)
    assert random_blocks(torch.zeros(9, 40), 0.5, 3).density() == pytest.approx(0.5, abs=0.14)


@pytest.mark.parametrize("side", (1, 2, None))
def test_the_map_of_a_part_is_the_part_of_the_map(side):
    x = torch.zeros(7, 3, 5, 4)
    torch.manual_seed(1)
    whole = random_blocks(x, 0.5, side).to_bool()
    state = torch.get_rng_state()
    for start in (0, 3):
        torch.manual_seed(1)
        assert torch.equal(random_blocks(x[start:], 0.5, side, start).to_bool(), whole[start:])
        assert torch.equal(torch.get_rng_state(), state)


# --- top-K ---


def test_top_k_by_hand():
    x = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [-1.0, -2.0]]]])
    half = top_fraction(x, 0.5)
    assert half.tolist() == [[[[False, True], [True, False]], [[True, True], [False, False]]]]
    assert top_fraction(x, 0.01).flatten(2).sum(2).tolist() == [[1, 1]]  # never none
    assert top_fraction(x, 0.75)[0, 1].tolist() == [[True, True], [True, False]]
    assert top_fraction(x, 1.0).all()
    assert top_fraction(torch.arange(10.0).view(1, 1, 10), 0.25).sum() == 2  # 2.5, half to even


def test_top_k_counts_row_major_in_any_memory_format():
    x = torch.randint(0, 3, (2, 4, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(top_fraction(x, 0.3), top_fraction(last, 0.3))
    kept = top_fraction(x, 0.3).flatten(2)
    for plane, mask in zip(x.flatten(2).flatten(0, 1), kept.flatten(0, 1), strict=True):
        best = sorted(range(25), key=lambda i: (-plane[i].item(), i))[:8]
        assert mask.nonzero().flatten().tolist() == sorted(best)


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
    assert torch.equal(y, ((a > 0) & top_fraction(m, 0.25)).float())
    assert attachment.density == {"0": 0.25}
    a, (m,), y, _ = shaped(top_k=0.25, product=True, binarize=False)
    assert torch.equal(y, a * (m * top_fraction(m, 0.25)))


def test_the_maps_of_several_domains_are_multiplied():
    third = images(seed=3)
    switches = {"mask_sources": ("photo", "cartoon", "art_painting")}
    a, (m1, m2, m3), y, attachment = shaped(targets=(TARGET, SOURCE, third), **switches)
    mask = (m1 > 0) & (m2 > 0) & (m3 > 0)
    assert torch.equal(y, ((a > 0) & mask).float())
    assert attachment.density["0"] == pytest.approx(mask.float().mean().item())
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
        results.append((model(SOURCE), grads, attachment.fired, attachment.density))
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
