"""Networks that shaped by hand give the same with fastshape, to the last bit, over five steps of SGD."""

import by_hand
import ported
import pytest
import torch

LAYERS = {"hooks with globals": ("conv1", "conv2"), "a module in forward": ("conv1",)}


def injected(client, step):
    """Masks for one step, by layer."""
    generator = torch.Generator().manual_seed(step)
    shape = (6, 8, 1, 1) if client == "a module in forward" else (6, 8, 10, 10)
    return {
        name: torch.rand(shape, generator=generator) >= by_hand.P_ZERO
        for name in LAYERS.get(client, ())
    }


def five_steps(client, make, autocast, monkeypatch):
    net, step, *shaping = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(9)
    results = []
    for number in range(5):
        x, target = torch.randn(2, 6, 3, 10, 10, generator=generator)
        labels = torch.randint(0, 5, (6,), generator=generator)
        masks = injected(client, number)
        monkeypatch.setattr(by_hand, "MASKS", masks)
        if shaping:
            shaping[0].masks.update(masks)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = step(x, target)
        loss = by_hand.loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        optimizer.step()
        state = [*net.parameters(), *net.buffers()]
        results.append((logits, grads, [t.detach().clone() for t in state]))
    return results


@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("client", by_hand.CLIENTS)
def test_a_port_is_equal_to_the_last_bit(client, autocast, monkeypatch):
    hand = five_steps(client, by_hand.CLIENTS[client], autocast, monkeypatch)
    ours = five_steps(client, ported.CLIENTS[client], autocast, monkeypatch)
    for (y0, grads0, state0), (y1, grads1, state1) in zip(hand, ours, strict=True):
        assert torch.equal(y0, y1) and y0.dtype == y1.dtype
        for a, b in zip(grads0, grads1, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(state0, state1, strict=True))
    assert any(g is not None for g in hand[0][1])


@pytest.mark.parametrize("client", by_hand.CLIENTS)
def test_replacement_is_equal_but_for_rounding(client, monkeypatch):
    hand = five_steps(client, by_hand.CLIENTS[client], False, monkeypatch)
    ours = five_steps(client, lambda: ported.CLIENTS[client]("replace"), False, monkeypatch)
    assert torch.allclose(hand[0][0], ours[0][0], rtol=1e-4, atol=1e-5)
