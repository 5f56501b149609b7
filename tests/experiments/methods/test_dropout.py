"""Dropout of whole channels, by hand and in parts."""

import pytest
import torch
from domainshift.methods.dropout import ChannelDropout
from small_networks import images, method_with, net, outputs
from torch import nn
from torch.nn import functional as F


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
