"""Ways to train a classifier for another domain: one class each, with `update` and `predict`.

A method gets source images with their labels and, if it `uses_target`, target images (or, for
domain generalization, images of other domains). There is no argument through which a target label
could come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import distributed
import torch
from config import Config, ConfigError
from model import DomainHead, ReverseGradient
from torch import Tensor, nn
from torch.nn import functional as F
from variants import ChannelDropout, Maps

import fastshape

AUTOCAST_DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ShapingError(RuntimeError):
    """Shaping was asked for and did not happen."""


class Step(NamedTuple):
    """What one update saw. The 0-d tensors are on the training device: reading them waits."""

    loss_sum: Tensor  # float64, sum of the losses of this process's images
    correct: Tensor  # int64, those of them classified right while training
    images: int  # of all processes


class Method:
    """Source only: cross-entropy on the labelled domain. The other methods change pieces of it.

    Args:
        model: classifier on `device`, images (n, 3, S, S) -> logits (n, n_classes).
        config: optimizer, schedule and autocast are built from it.
        device: where images arrive and the model is.

    Attributes:
        passes: training passes so far; accumulation makes several per update.
        progress: share of training that is done, 0 to 1. Whoever calls `update` sets it before.
        bn_moved: 0-d bool on the device: did a pass over other images than the source's move
            BatchNorm's running statistics in training? None: there was no such pass since it was
            last set to None.
        share: this process's share of the images in the last training pass.
    """

    uses_target = False
    layer_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.passes = 0
        self.progress = 0.0
        self.bn_moved: Tensor | None = None
        self.share = 1.0
        distributed.share_statistics(model)
        self.optimizer = torch.optim.SGD(
            self.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            # takes the scaler's word on the device: without it each update waits for the GPU
            fused=device.type == "cuda",
        )
        # steps once per epoch, or once per update where those are what is counted
        step_size = max(1, int(config.step_fraction * (config.updates or config.epochs)))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size, config.gamma)
        self.amp_dtype = AUTOCAST_DTYPES[config.amp]
        # float16 gradients underflow without scaling; bfloat16 has the range of float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")

    def parameters(self) -> list[Any]:
        """Everything the optimizer moves: parameters, or groups of them."""
        return list(self.model.parameters())

    def loss(self, images: Tensor, labels: Tensor, target_images: Tensor | None) -> tuple:
        """Mean loss of one training pass, with its graph, and the source logits."""
        logits = self.model(images)
        return F.cross_entropy(logits, labels), logits

    def update(
        self,
        images: Tensor,
        labels: Tensor,
        target_images: Tensor | None = None,
        whole: int | None = None,
    ) -> Step:
        """One optimizer step on n source images, or on this process's part of the batch.

        Args:
            images: float32 (n, 3, S, S), normalized.
            labels: int64 (n,).
            target_images: float32 (n, 3, S, S), for a method that `uses_target`; else None. With
                k `mask_sources`: (n, k, 3, S, S).
            whole: images in the batch of all processes, of which these are `distributed.parts`;
                None: n.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        whole, taken = whole or len(images), 0
        for part in distributed.parts(whole, self.config.accumulate):
            mine = slice(taken, taken + part.count)
            taken = mine.stop
            x, y = images[mine], labels[mine]
            t = None if target_images is None else target_images[mine]
            self.place(part.start, part.whole)
            with self.autocast():
                loss, logits = self.loss(x, y, t)
            # each image counts alike, however unequal the parts
            self.scaler.scale(loss * (len(x) / whole)).backward()
            loss_sum += loss.detach() * len(x)
            correct += (logits.detach().argmax(1) == y).sum()
            self.passes += 1
            self.share = part.count / part.whole
        distributed.add_gradients(p for g in self.optimizer.param_groups for p in g["params"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.config.updates is not None:
            self.schedule.step()
        return Step(loss_sum, correct, whole)

    def place(self, start: int, whole: int | None = None) -> None:
        """Say where in a pass of `whole` images, of all processes, those that come next begin."""

    @torch.no_grad()
    def predict(self, images: Tensor, start: int = 0) -> Tensor:
        """Logits, float32 (n, n_classes), in evaluation mode.

        Args:
            images: float32 (n, 3, S, S), normalized.
            start: number of the first of them in the batch of all processes.
        """
        self.model.eval()
        self.place(start)
        with self.autocast():
            return self.model(images).float()

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure BatchNorm's running statistics anew, as plain means over `batches`.

        The model runs as in testing but for BatchNorm, which uses each batch's own statistics. Each
        process runs through all the batches, whole: the figures of one process, and nothing to send.

        Args:
            batches: images, float32 (n, 3, S, S), normalized; n > 1.
        """
        norms = self.norms()
        momenta = [norm.momentum for norm in norms]
        self.model.eval()
        self.place(0)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        with self.autocast(), distributed.alone(self.model):
            for images in batches:
                self.model(images.to(self.device, non_blocking=True))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    @contextmanager
    def recalibrated(self, batches: Iterable[Tensor]) -> Iterator[None]:
        """`recalibrate` for a while: afterwards the statistics are those of training again."""
        buffers = [buffer for norm in self.norms() for buffer in norm.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        self.recalibrate(batches)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)

    def adapted(self, batches: Iterable[Tensor]) -> AbstractContextManager:
        """How the target is tested: around its test, with its images in batches, without labels."""
        return nullcontext()

    def norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        kind = nn.modules.batchnorm._BatchNorm
        return [module for module in self.model.modules() if isinstance(module, kind)]

    def statistics(self) -> Tensor:
        """A copy of BatchNorm's running means and variances, one after the other."""
        return torch.cat([t for n in self.norms() for t in (n.running_mean, n.running_var)])

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def fired(self) -> dict[str, int]:
        """How often each shaped layer was shaped so far, tests included."""
        return {}

    def density(self) -> dict[str, float]:
        """Share of ones in the map each shaped layer used last. Waits for the device."""
        return {}

    def close(self) -> None:
        """Leave the model as it came: nothing attached, nothing shared with other processes."""
        distributed.share_statistics(self.model, False)

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
        draws = config.mode == "random" and isinstance(self.attachment, fastshape.Attachment)
        if draws and "fc" in self.layer_names and distributed.size() > 1:
            raise ConfigError(
                f"layers: 'fc' gives {model.fc.out_features} elements an image; random maps of "
                f"{distributed.size()} processes need a multiple of 8, as every other layer gives"
            )

    def fired(self) -> dict[str, int]:
        return {name: int(count) for name, count in self.attachment.fired.items()}

    def density(self) -> dict[str, float]:
        return self.attachment.density

    def place(self, start: int, whole: int | None = None) -> None:
        self.attachment.first_sample = start

    def close(self) -> None:
        self.attachment.remove()
        super().close()


class Dropout2d(RandomMaps):
    """Whole channels of the chosen layers are dropped while training."""

    def place(self, start: int, whole: int | None = None) -> None:
        super().place(start)
        self.attachment.samples = whole


class TargetMaps(RandomMaps):
    """Domain adaptation: the target images' activations, recorded first, shape the source's."""

    uses_target = True

    def loss(self, images: Tensor, labels: Tensor, target_images: Tensor | None) -> tuple:
        domains = target_images.unbind(1) if self.config.mask_sources else (target_images,)
        before = self.statistics()
        self.attachment.record(*domains)
        moved = (self.statistics() != before).any()
        self.bn_moved = moved if self.bn_moved is None else self.bn_moved | moved
        return super().loss(images, labels, target_images)


class AdaBN(Method):
    """Source only, but the target is tested with BatchNorm statistics of its own images.

    They are plain means over whole batches of the target (a smaller last one is left out), and are
    taken back after the test: training and the tests on the source never see them.
    """

    def adapted(self, batches: Iterable[Tensor]) -> AbstractContextManager:
        return self.recalibrated(batches)


class Dann(Method):
    """Domain-adversarial training: features from which a head cannot tell source from target.

    loss = CE(source) + w (BCE(source) + BCE(target)), w being config.dann_weight. The head sits behind
    a reversal of gradients, of weight `reversal(progress)`. Source and target images go through the
    network in one batch, so BatchNorm sees both.
    """

    uses_target = True

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        self.body = nn.Sequential(*(m for name, m in model.named_children() if name != "fc"))
        self.classifier = model.fc
        self.head = DomainHead(model.fc.in_features, config.seed).to(device)
        distributed.share_statistics(self.head)
        super().__init__(model, config, device)

    def parameters(self) -> list[Any]:
        heads = [*self.classifier.parameters(), *self.head.parameters()]
        lr = self.config.lr * self.config.dann_lr_factor
        return [{"params": list(self.body.parameters())}, {"params": heads, "lr": lr}]

    def loss(self, images: Tensor, labels: Tensor, target_images: Tensor | None) -> tuple:
        n = len(images)
        features = self.body(torch.cat([images, target_images])).flatten(1)
        logits = self.classifier(features[:n])
        domain = self.head(ReverseGradient.apply(features, reversal(self.progress))).squeeze(1)
        of_source, of_target = domain[:n], domain[n:]
        told_apart = F.binary_cross_entropy_with_logits(of_source, torch.zeros_like(of_source))
        told_apart += F.binary_cross_entropy_with_logits(of_target, torch.ones_like(of_target))
        self.bn_moved = torch.ones((), dtype=torch.bool, device=self.device)  # by one joint batch
        return F.cross_entropy(logits, labels) + self.config.dann_weight * told_apart, logits

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])


def reversal(progress: float) -> float:
    """DANN's lambda: 2 / (1 + exp(-10 p)) - 1, from 0 at p = 0 to nearly 1 at p = 1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


METHODS = {
    "baseline": Method,
    "random": RandomMaps,
    "da": TargetMaps,
    "adabn": AdaBN,
    "dropout2d": Dropout2d,
    "dann": Dann,
}


def attach(model: nn.Module, config: Config) -> fastshape.Attachment | Maps | ChannelDropout:
    """Shape `model` as `config` says. Raises ConfigError for layers it does not have."""
    mode = {"random": "random", "da": "product" if config.product else "target"}
    p_zero = config.p_zero
    if p_zero is not None:
        p_zero = p_zero[0] if len(p_zero) == 1 else list(p_zero)
    try:
        attachment = fastshape.attach(
            model,
            "all" if config.layers == ("all",) else list(config.layers),
            mode=mode.get(config.mode, "binarize"),
            p_zero=p_zero,
            after=config.after,
            every=config.every,
            binarize=config.binarize,
            gradient=config.gradient,
            at_eval=config.at_eval,
            record_mode=config.record_mode,
            # the op has no form that shares BatchNorm's statistics
            method="replace" if config.attach == "replace" and distributed.size() == 1 else "hooks",
        )
    except ValueError as error:  # its message names the argument, the value and what exists
        raise ConfigError(str(error)) from error
    own = config.mask_unit != "element" or config.epsilon > 0 or config.top_k is not None
    own |= bool(config.mask_sources) or config.record_mode == "train" or not config.apply_maps
    if config.mode != "dropout2d" and not own:
        return attachment
    attachment.remove()
    if config.mode == "dropout2d":
        return ChannelDropout(model, attachment.names, config.drop_rate)
    return Maps(model, attachment.names, attachment.p_zero, config)


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
