"""Dropout of whole channels, by hand, in parts, and as random maps."""

import pytest
import torch
from domainshift.config import Test
from domainshift.methods.dropout import ChannelDropout
from small_networks import images, method_with, net, outputs
from torch import nn
from torch.nn import functional as F

import fastshape
from fastshape import BitMask


def test_whole_channels_are_dropped_and_the_others_scaled():
    model = net(channels=64)
    method = method_with(model, "dropout2d", layers=(1,), drop_rate=0.75)
    x = images(n=40)
    (y,) = outputs(model, "0", x)
    raw = F.conv2d(x, model[0].weight, model[0].bias, padding=1)
    dropped = (y == 0).flatten(2).all(2)
    assert dropped.float().mean().item() == pytest.approx(0.75, abs=0.043)  # 5 sigma of 2560
    kept = ~dropped
    assert torch.equal(y[kept], raw[kept] * 4)  # 1 / (1 - 0.75), a power of two: exact
    assert method.fired() == {"0": 1}
    model.eval()
    (y,) = outputs(model, "0", x)
    assert torch.equal(y, raw)
    assert method.fired() == {"0": 1}
    method.close()
    model.train()
    assert torch.equal(outputs(model, "0", x)[0], raw)


def test_a_part_of_a_batch_gets_its_part_of_the_draw():
    x = torch.randn(7, 3, 4, 4)
    model = nn.Sequential(nn.Identity())
    dropout = ChannelDropout(model, ["0"], 0.4)
    torch.manual_seed(1)
    whole = F.dropout2d(x, 0.4)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(model(x), whole)
    dropout.first_sample, dropout.samples = 2, 7
    torch.manual_seed(1)
    assert torch.equal(model(x[2:5]), whole[2:5])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_rescaled_random_maps_per_channel_are_dropout_of_channels(rate, monkeypatch):
    """Given the same channels, with the input unbinarized: outputs and gradients."""
    kept = torch.rand(6, 5, 1, 1, generator=torch.Generator().manual_seed(0)) >= rate
    monkeypatch.setattr(
        fastshape, "random_blocks", lambda shape, *_, **__: BitMask.from_bool(kept.expand(shape))
    )
    monkeypatch.setattr(F, "dropout2d", lambda ones, p: ones * kept / (1 - p))
    maps = {"binarize": False, "mask_unit": "channel", "p_zero": (rate,)}
    results = []
    for mode, values in (("random-rescaled", maps), ("dropout2d", {"drop_rate": rate})):
        model = net()
        method = method_with(model, mode, layers=(1,), **values)
        (y,) = outputs(model, "0", images(n=6))
        method.update(images(n=6), torch.arange(6))
        results.append([y, *model.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if rate != 0.25 else 1e-5, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0]) or rate == 0.25  # powers of two are exact


@pytest.mark.parametrize("binarize", [True, False])
def test_a_rescaled_map_is_the_map_times_its_scale(binarize):
    results = []
    for mode in ("random", "random-rescaled"):
        model = net()
        values = {"layers": (1, 2), "p_zero": (0.5, 0.75), "mask_unit": "block", "block_size": 1}
        method_with(model, mode, binarize=binarize, **values)
        torch.manual_seed(3)
        results.append(outputs(model, "0", images(n=6))[0])
    assert torch.equal(results[1], 2 * results[0])
    assert results[0].any()


@pytest.mark.parametrize(("at_eval", "scale"), [("off", None), ("binarize", 1), ("on", 2)])
def test_a_test_rescales_only_with_maps(at_eval, scale):
    model = net()
    method = method_with(model, "random-rescaled", layers=(1,))
    with method.testing(Test(domain="sketch", at_eval=at_eval)):
        model.eval()
        (y,) = outputs(model, "0", images())
    method.close()
    raw = outputs(model, "0", images())[0]
    assert torch.equal(y, raw) if scale is None else set(y.unique().tolist()) == {0, scale}
