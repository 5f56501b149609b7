"""ResNet-18 with a fresh classifier, where its weights come from, and the domain head of DANN."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

APPROXIMATE = "layer4.0.conv1, layer4.0.conv2, layer4.1.conv1, layer4.1.conv2"


class WeightsError(ValueError):
    """Weights cannot be had, or are not those of a ResNet-18."""


class Weights(NamedTuple):
    """What a record says about the initial weights."""

    source: str  # imagenet, none, or the file's name
    sha256: str | None
    warnings: list[str]


@functools.cache
def bare_model() -> nn.Module:
    """A ResNet-18 without memory for weights, for the names and kinds of its modules."""
    with torch.device("meta"):
        return resnet18()


def build_model(weights: str, classes: int, seed: int) -> tuple[nn.Module, Weights]:
    """A ResNet-18 with `classes` outputs, on the CPU, in train mode.

    Args:
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "none" (seeded initialization), or the
            path of a state dict. Its classifier, whatever its size, is replaced by a new one.
        classes: outputs of the new `fc`.
        seed: of everything that is initialized here. The global random stream is left alone.

    Raises:
        WeightsError: no such file, not a state dict, of another architecture, or no network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet18(weights=None)
        # same number of draws for any weights, so the new classifier depends on the seed alone
        model.fc = nn.Linear(model.fc.in_features, classes)
    if weights == "none":
        return model, Weights("none", None, [])
    if weights == "imagenet":
        path, state = torchvision_weights()
    else:
        path = Path(weights)
        state = read_state(path)
    load_backbone(model, state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = "imagenet" if weights == "imagenet" else path.name
    return model, Weights(name, digest, [] if weights == "imagenet" else caveats(path, digest))


def torchvision_weights() -> tuple[Path, dict[str, Tensor]]:
    """torchvision's IMAGENET1K_V1, downloaded once into torch's hub folder, and its file there."""
    weights = ResNet18_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no room, or a broken download
        raise WeightsError(
            f"weights: 'imagenet' could not be downloaded from {weights.url} ({error}). Instead: "
            f"--weights PATH with a local state dict, or put that file at {path}, or "
            "--weights none to start from random weights"
        ) from error
    return path, state


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in the file `path`, read without unpickling code. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(
            f"weights: no file {path}; allowed: imagenet | none | a state dict's path"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file of another kind the reader trips over anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"weights: {path} is not a readable state dict ({reason})") from error
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        held = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state)
        raise WeightsError(f"weights: {path} is no state dict of tensors; it holds {held}")
    return state


def load_backbone(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy `state`, its classifier left out, into `model`; dtypes are converted.

    Raises WeightsError naming the first keys that are missing, unexpected or of another shape.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    problems = []
    # state dicts of old torch versions have no batch counters; nothing here reads them
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        problems.append(f"missing {missing[0]} ({len(missing)} keys)")
    unexpected = [name for name in state if name not in wanted]
    if unexpected:
        problems.append(f"unexpected {unexpected[0]} ({len(unexpected)} keys)")
    shapes = [k for k in state if k in wanted and state[k].shape != wanted[k].shape]
    if shapes:
        found, want = tuple(state[shapes[0]].shape), tuple(wanted[shapes[0]].shape)
        problems.append(f"{shapes[0]} has shape {found}, not {want} ({len(shapes)} keys)")
    if problems:
        raise WeightsError(f"weights: {path} is not a ResNet-18's: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def caveats(path: Path, digest: str) -> list[str]:
    """What a record must say about weights from a file, beside their hash."""
    name = f"weights {path.name} (sha256 {digest[:16]}...)"
    if "reconstructed" in path.name:
        return [
            f'{name}: results are not with "torchvision V1" but with a reconstruction of it; '
            f"approximate: {APPROXIMATE}"
        ]
    if (path.parent / "README.md").is_file():
        return [
            f'{name}: a local file, not checked to be "torchvision V1"; the README.md beside it may '
            "say what it is worth"
        ]
    return [f'{name}: a local file, not checked to be "torchvision V1"']


# --- domain-adversarial training --------------------------------------------------------------

HIDDEN = 1024  # width of the domain head's two hidden layers


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is -weight times what comes back: dL/dx = -weight * dL/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


class DomainHead(nn.Sequential):
    """Which domain do features come from? (n, features) -> logits (n, 1), on the CPU.

    Args:
        features: width of the input.
        seed: of the initial weights. The global random stream is left alone.
    """

    def __init__(self, features: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Linear(features, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, 1),
            )
