"""Ways to train a classifier for another domain: one class each, with `update` and `predict`.

A method gets source images with their labels and, if it `uses_target`, target images. There is no
argument through which a target label could come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from config import Config, ConfigError
from torch import Tensor, nn
from torch.nn import functional as F

import fastshape

AUTOCAST_DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ShapingError(RuntimeError):
    """Shaping was asked for and did not happen."""


class Step(NamedTuple):
    """What one update saw. The 0-d tensors are on the training device: reading them waits."""

    loss_sum: Tensor  # float64, sum of the images' losses
    correct: Tensor  # int64, images classified right while training
    images: int


class Method:
    """Source only: cross-entropy on the labelled domain. The other methods change pieces of it.

    Args:
        model: classifier on `device`, images (n, 3, S, S) -> logits (n, n_classes).
        config: optimizer, schedule and autocast are built from it.
        device: where images arrive and the model is.
    """

    uses_target = False
    layer_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.passes = 0  # training passes so far; accumulation makes several per update
        self.optimizer = torch.optim.SGD(
            self.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        step_size = max(1, int(config.step_fraction * config.epochs))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size, config.gamma)
        self.amp_dtype = AUTOCAST_DTYPES[config.amp]
        # float16 gradients underflow without scaling; bfloat16 has the range of float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")

    def parameters(self) -> list[nn.Parameter]:
        """Everything the optimizer moves."""
        return list(self.model.parameters())

    def loss(self, images: Tensor, labels: Tensor, target_images: Tensor | None) -> tuple:
        """Mean loss of one training pass, with its graph, and the source logits."""
        logits = self.model(images)
        return F.cross_entropy(logits, labels), logits

    def update(self, images: Tensor, labels: Tensor, target_images: Tensor | None = None) -> Step:
        """One optimizer step on n source images.

        Args:
            images: float32 (n, 3, S, S), normalized.
            labels: int64 (n,).
            target_images: float32 (n, 3, S, S), for a method that `uses_target`; else None.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        size = -(-len(images) // self.config.accumulate)
        for part in range(0, len(images), size):
            x, y = images[part : part + size], labels[part : part + size]
            t = None if target_images is None else target_images[part : part + size]
            with self.autocast():
                loss, logits = self.loss(x, y, t)
            # each image counts alike, however unequal the parts
            self.scaler.scale(loss * (len(x) / len(images))).backward()
            loss_sum += loss.detach() * len(x)
            correct += (logits.detach().argmax(1) == y).sum()
            self.passes += 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Step(loss_sum, correct, len(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits, float32 (n, n_classes), in evaluation mode."""
        self.model.eval()
        with self.autocast():
            return self.model(images).float()

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure BatchNorm's running statistics anew, as plain means over `batches`.

        The model runs as in testing but for BatchNorm, which uses each batch's own statistics.

        Args:
            batches: images, float32 (n, 3, S, S), normalized; n > 1.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        self.model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        with self.autocast():
            for images in batches:
                self.model(images.to(self.device, non_blocking=True))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def fired(self) -> dict[str, int]:
        """How often each shaped layer was shaped so far, tests included."""
        return {}

    def close(self) -> None:
        """Leave the model as it came: nothing attached."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class RandomMaps(Method):
    """Activation shaping with random maps: new ones at each layer and pass."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.attachment = attach(model, config)
        self.layer_names = tuple(self.attachment.names)

    def fired(self) -> dict[str, int]:
        return {name: int(count) for name, count in self.attachment.fired.items()}

    def close(self) -> None:
        self.attachment.remove()


class TargetMaps(RandomMaps):
    """Domain adaptation: the target images' activations, recorded first, shape the source's."""

    uses_target = True

    def loss(self, images: Tensor, labels: Tensor, target_images: Tensor | None) -> tuple:
        self.attachment.record(target_images)
        return super().loss(images, labels, target_images)


METHODS = {"baseline": Method, "random": RandomMaps, "da": TargetMaps}


def attach(model: nn.Module, config: Config) -> fastshape.Attachment:
    """Shape `model` as `config` says. Raises ConfigError for layers it does not have."""
    mode = "random" if config.mode == "random" else "product" if config.product else "target"
    p_zero = config.p_zero
    if p_zero is not None:
        p_zero = p_zero[0] if len(p_zero) == 1 else list(p_zero)
    try:
        return fastshape.attach(
            model,
            "all" if config.layers == ("all",) else list(config.layers),
            mode=mode,
            p_zero=p_zero,
            after=config.after,
            every=config.every,
            binarize=config.binarize,
            gradient=config.gradient,
            at_eval=config.at_eval,
            record_mode=config.record_mode,
        )
    except ValueError as error:  # its message names the argument, the value and what exists
        raise ConfigError(str(error)) from error


def check_fired(fired: dict[str, int], passes: int) -> None:
    """Refuse training in which a layer was not shaped once per pass.

    A module that the network calls k times per pass is shaped k times per pass.

    Args:
        fired: how often each chosen layer was shaped in these passes.
        passes: training passes through the network.

    Raises:
        ShapingError: names the layer.
    """
    for name, times in fired.items():
        if times < passes or times % passes:
            raise ShapingError(
                f"layer {name} was shaped {times} times in {passes} training passes: "
                "activation shaping did not happen as asked, so the figures would mean nothing"
            )
