"""Domain-adversarial training against its formula."""

import math

import pytest
import torch
from domainshift.methods.dann import reversal
from domainshift.methods.domain_head import DomainHead, ReverseGradient
from small_networks import SOURCE, TARGET, images, method_with
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize(("progress", "weight"), [(0, 0.0), (0.5, 0.9866142982), (1, 0.9999092043)])
def test_the_weight_of_the_reversal(progress, weight):
    assert reversal(progress) == pytest.approx(weight, abs=1e-10)


def test_the_reversal_turns_the_sign_and_scales():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = ReverseGradient.apply(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([4.0, 8.0])).sum().backward()
    assert x.grad.tolist() == [-1.0, -2.0]


def test_the_head_is_that_of_the_protocol_and_a_function_of_the_seed():
    before = torch.get_rng_state()
    head = DomainHead(512, 3)
    assert torch.equal(torch.get_rng_state(), before)
    kinds = [type(part).__name__ for part in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(part.weight.shape) for part in head if isinstance(part, nn.Linear)] == [
        (1024, 512), (1024, 1024), (1, 1024),
    ]  # fmt: skip
    assert torch.equal(head[0].weight, DomainHead(512, 3)[0].weight)
    assert not torch.equal(head[0].weight, DomainHead(512, 4)[0].weight)


class Small(nn.Module):
    """Features of three numbers and a classifier, in a model whose parts are not a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(3, 7)

    def forward(self, x):
        return self.fc(self.conv1(x).mean((2, 3)))


def dann(**switches):
    method = method_with(Small(), "dann", **switches)
    torch.manual_seed(1)
    method.head = nn.Sequential(nn.Linear(3, 1))
    return method


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_loss_and_gradients_by_hand(weight):
    method = dann(dann_weight=weight)
    method.progress = 0.1
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    loss, logits = method.loss(SOURCE, labels, TARGET)
    model, head = method.model, method.head[0]

    def features(x):
        return model.conv1(x).mean((2, 3))

    p_source = torch.sigmoid(head(features(SOURCE))).squeeze(1)
    p_target = torch.sigmoid(head(features(TARGET))).squeeze(1)
    domain = -torch.log(1 - p_source).mean() - torch.log(p_target).mean()
    classes = F.cross_entropy(model(SOURCE), labels)
    torch.testing.assert_close(loss, classes + weight * domain)
    torch.testing.assert_close(logits, model(SOURCE))

    loss.backward()
    gradients = [p.grad.clone() for p in (model.conv1.weight, head.weight, model.fc.weight)]
    lam = 2 / (1 + math.exp(-1)) - 1
    of_classes, of_fc = torch.autograd.grad(
        classes, [model.conv1.weight, model.fc.weight], retain_graph=True
    )
    of_domain, of_head = torch.autograd.grad(domain, [model.conv1.weight, head.weight])
    torch.testing.assert_close(gradients[0], of_classes - lam * weight * of_domain)
    torch.testing.assert_close(gradients[1], weight * of_head)
    torch.testing.assert_close(gradients[2], of_fc)


def test_with_weight_0_the_joint_batch_alone_is_left():
    """The gradients are those of the classification loss on source images, whatever the head says."""
    method, labels = dann(dann_weight=0), torch.arange(6)
    method.progress = 0.5
    method.loss(SOURCE, labels, TARGET)[0].backward()
    classes = F.cross_entropy(method.model(SOURCE), labels)
    for p, expected in zip(
        method.model.parameters(),
        torch.autograd.grad(classes, list(method.model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p.grad, expected)
    assert not method.head[0].weight.grad.any()


def test_heads_learn_faster_if_asked_and_the_schedule_drops_both():
    method = method_with(mode="dann", dann_lr_factor=10, epochs=1, lr=0.02)
    body, heads = method.optimizer.param_groups
    assert (body["lr"], heads["lr"]) == (0.02, 0.2)
    named = {id(p): name for name, p in method.model.named_parameters()}
    assert {named.get(id(p), "head") for p in heads["params"]} == {"fc.weight", "fc.bias", "head"}
    every = len(list(method.model.parameters())) + len(list(method.head.parameters()))
    assert len(body["params"]) + len(heads["params"]) == every
    method.optimizer.step()
    method.schedule.step()
    assert (body["lr"], heads["lr"]) == pytest.approx((0.002, 0.02))


def test_one_batch_of_both_domains_goes_through_batchnorm():
    method = method_with(mode="dann")
    sizes = []
    method.model[1].register_forward_hook(lambda m, a, y: sizes.append(len(a[0])))
    x = images(n=4)
    method.update(x, torch.arange(4), x + 1)
    assert sizes == [8]


def test_the_head_is_part_of_a_checkpoint():
    method, other = method_with(mode="dann"), method_with(mode="dann", seed=1)
    assert not torch.equal(method.head[0].weight, other.head[0].weight)
    other.load_state_dict(method.state_dict())
    for name, tensor in method.head.state_dict().items():
        assert torch.equal(tensor, other.head.state_dict()[name]), name
