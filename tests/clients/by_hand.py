"""Three networks that shape activations as people write it by hand. `ported` has the same with fastshape.

Each makes a network whose `step(x, target)` gives the loss, with masks drawn or recorded as its author did. `MASKS` injects masks
in place of what is drawn, so that both forms can be compared to the last bit.
"""

import torch
from torch import nn
from torch.nn import functional as F

MASKS = {}  # by layer: what tests inject


def small_resnet():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 8, 3, padding=1, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(8))
    net.add_module("relu1", nn.ReLU(inplace=True))
    net.add_module("conv2", nn.Conv2d(8, 8, 3, padding=1, bias=False))
    net.add_module("bn2", nn.BatchNorm2d(8))
    net.add_module("relu2", nn.ReLU(inplace=True))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(8, 5))
    return net


# --- hooks with globals: random maps, without a gradient ---

P_ZERO = 0.3
TRAINING = True


def random_hook(name):
    def hook(module, inputs, output):
        if not TRAINING:
            return output
        mask = MASKS.get(name)
        if mask is None:
            mask = torch.rand(output.shape, device=output.device) >= P_ZERO
        binary = (output > 0).to(output.dtype)
        return binary * mask.to(output.dtype)

    return hook


def hooks_with_globals():
    net = small_resnet()
    for name in ("conv1", "conv2"):
        getattr(net, name).register_forward_hook(random_hook(name))

    def step(x, target):
        return net(x)

    return net, step


# --- a module in forward: straight-through, and a mask per channel ---


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return (x > 0).to(x.dtype) * mask

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class ShapingLayer(nn.Module):
    def __init__(self, p_zero):
        super().__init__()
        self.p_zero = p_zero

    def forward(self, x):
        if not self.training:
            return x
        mask = MASKS.get("conv1")
        if mask is None:
            mask = torch.rand(x.shape[:2], device=x.device)[:, :, None, None] >= self.p_zero
        return StraightThrough.apply(x, mask.to(x.dtype).expand(x.shape))


def module_in_forward():
    shaped = nn.Sequential()
    for name, module in small_resnet().named_children():
        shaped.add_module(name, module)
        if name == "conv1":
            shaped.add_module("shaping", ShapingLayer(P_ZERO))

    def step(x, target):
        return shaped(x)

    return shaped, step


# --- a subclass with two passes: maps of the target ---


class TwoPasses(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.maps = {}
        self.recording = False
        for name in ("conv1", "conv2"):
            getattr(net, name).register_forward_hook(self.hook(name))

    def hook(self, name):
        def hook(module, inputs, output):
            if self.recording:
                self.maps[name] = (output.detach() > 0).to(output.dtype)
                return output
            if not self.training:
                return output
            return StraightThrough.apply(output, self.maps[name][: len(output)])

        return hook

    def forward(self, x, target=None):
        if target is not None:
            flags = [(m, m.training) for m in self.net.modules()]
            self.net.eval()
            self.recording = True
            with torch.no_grad():
                self.net(target)
            self.recording = False
            for module, flag in flags:
                module.training = flag
        return self.net(x)


def two_passes():
    model = TwoPasses(small_resnet())

    def step(x, target):
        return model(x, target)

    return model.net, step


CLIENTS = {
    "hooks with globals": hooks_with_globals,
    "a module in forward": module_in_forward,
    "two passes": two_passes,
}


def loss(logits, labels):
    return F.cross_entropy(logits.float(), labels)
