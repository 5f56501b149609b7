"""MixStyle: whose statistics an image gets, where the gradient goes, and when nothing is mixed."""

import pytest
import torch
from domainshift.errors import ConfigError
from domainshift.methods.mixstyle import StyleMixing, channel_statistics, mixed
from small_networks import images, method_with, net, outputs
from torch import nn

X = 3 + 2 * torch.randn(6, 5, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mixing(x=X, probability=1.0, seed=1, model=None, **attributes):
    """What a module that gives x gives with mixing, and the draws: lambda and partners."""
    model = nn.Sequential(nn.Identity()) if model is None else model
    with StyleMixing(model, ["0"], probability, 0.1) as attachment:
        for name, value in attributes.items():
            setattr(attachment, name, value)
        torch.manual_seed(seed)
        y = model(x)
    whole = attachment.samples or len(x)
    torch.manual_seed(seed)
    torch.rand(1)
    shares = torch.distributions.Beta(0.1, 0.1).sample((whole, 1, 1, 1))
    return y, shares.to(torch.float64), torch.randperm(whole)


def test_statistics_lie_between_those_of_an_image_and_of_its_partner():
    y, share, partner = mixing()
    assert (partner != torch.arange(6)).any() and (share < 0.9).any()
    mean, deviation = X.mean((2, 3), keepdim=True), X.std((2, 3), correction=0, keepdim=True)
    new_mean = share * mean + (1 - share) * mean[partner]
    new_deviation = share * deviation + (1 - share) * deviation[partner]
    torch.testing.assert_close(y.mean((2, 3), keepdim=True), new_mean)
    torch.testing.assert_close(
        y.std((2, 3), correction=0, keepdim=True), new_deviation, rtol=1e-6, atol=0
    )
    normalized = (X - mean) / deviation
    torch.testing.assert_close(y, normalized * new_deviation + new_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_goes_through_the_normalized_values_alone(share):
    x = X.clone().requires_grad_()
    mean, deviation = channel_statistics(x)
    assert not (mean.requires_grad or deviation.requires_grad)
    others = mean.roll(1, 0), deviation.roll(1, 0)
    weight = torch.randn_like(X)
    y = mixed(x, mean, deviation, *others, X.new_full((6, 1, 1, 1), share))
    (y * weight).sum().backward()
    new_deviation = share * deviation + (1 - share) * others[1]
    torch.testing.assert_close(x.grad, weight * new_deviation / deviation)
    if share == 1:
        torch.testing.assert_close(y, x)


def test_nothing_is_mixed_in_evaluation():
    model = nn.Sequential(nn.Identity()).eval()
    state = torch.get_rng_state()
    with StyleMixing(model, ["0"], 1.0, 0.1) as attachment:
        assert model(X) is X
        assert attachment.fired == {"0": 0}
    assert torch.equal(torch.get_rng_state(), state)
    method = method_with(mode="mixstyle", layers=(1,), mix_probability=1)
    logits = method.predict(images()).logits
    method.recalibrate([images()])
    assert method.fired() == {"0": 0}
    method.close()
    assert torch.equal(method_with().predict(images()).logits, logits)


def test_a_layer_mixes_in_a_share_of_its_passes_and_all_of_them_count():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = X[:2, :1, :2, :2].contiguous()
    with StyleMixing(model, ["0", "1"], 0.3, 0.1) as attachment:
        torch.manual_seed(0)
        same = [
            [outputs(model, "0", x)[0] is x, outputs(model, "1", x)[0] is x] for _ in range(1000)
        ]
        assert attachment.fired == {"0": 2000, "1": 2000}
    share = 1 - torch.tensor(same, dtype=torch.float64)[:, 0].mean().item()
    assert share == pytest.approx(0.3, abs=0.073)  # 5 sigma of 1000


def test_each_layer_draws_for_itself_and_the_random_state_decides():
    def mixes(seed):
        model = nn.Sequential(nn.Identity(), nn.Identity())
        seen = [X]
        with StyleMixing(model, ["0", "1"], 0.5, 0.1):
            for module in model:
                module.register_forward_hook(lambda m, a, y: seen.append(y))
            torch.manual_seed(seed)
            model(X)
        return tuple(after is not before for before, after in zip(seen, seen[1:], strict=False))

    assert {mixes(seed) for seed in range(40)} == {(a, b) for a in (0, 1) for b in (0, 1)}
    ((y, *_), (again, *_)) = mixing(), mixing()
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mixed_by_statistics_in_float32(dtype):
    x = (300 + X).to(dtype)  # squares beyond the range of float16
    mean, deviation = channel_statistics(x)
    assert mean.dtype == deviation.dtype == torch.float32
    y, *_ = mixing(x)
    assert y.dtype == dtype and y.isfinite().all()
    exact, *_ = mixing(x.float())
    torch.testing.assert_close(y, exact.to(dtype))


def test_under_autocast_the_output_has_the_dtype_of_the_layer():
    model = net()
    with StyleMixing(model, ["0"], 1.0, 0.1), torch.autocast("cpu", torch.bfloat16):
        (y,) = outputs(model, "0", images())
    assert y.dtype == torch.bfloat16


def test_channels_last_stays():
    x = X.contiguous(memory_format=torch.channels_last)
    y, *_ = mixing(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, mixing()[0], rtol=1e-12, atol=1e-12)


def test_a_part_of_a_batch_gets_its_part_of_the_draws(monkeypatch):
    """Of two processes, each has three images and the statistics of all six."""
    whole, *_ = mixing()
    every = torch.stack(channel_statistics(X), 1)
    for first in (0, 3):
        own = slice(first, first + 3)

        def summed(t, own=own):
            assert not t[: own.start].any() and not t[own.stop :].any()
            torch.testing.assert_close(t[own], every[own])
            return every

        monkeypatch.setattr("domainshift.distributed.summed", summed)
        part, *_ = mixing(X[own], first_sample=first, samples=6)
        torch.testing.assert_close(part, whole[own], rtol=1e-12, atol=1e-12)


def test_an_image_without_spread_stays_finite():
    x = torch.zeros(4, 3, 5, 5)
    x[1:] = torch.randn(3, 3, 5, 5)
    y, *_ = mixing(x)
    assert y.isfinite().all()


def test_a_layer_without_maps_is_refused():
    method = method_with(mode="mixstyle", layers=("fc",))
    with pytest.raises(ConfigError, match=r"layers: the output of 'fc' has 2 dimensions; mixstyle"):
        method.update(images(), torch.arange(6))
