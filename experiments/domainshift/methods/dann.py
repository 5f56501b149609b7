"""Domain-adversarial training (Ganin et al., arXiv 1505.07818)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from domainshift import distributed
from domainshift.config import Config, NotNegative, Positive, switch
from domainshift.methods.base import Method, TargetOptions, has_batch_norm

if TYPE_CHECKING:  # see domainshift.methods.base
    import torch
    from torch import Tensor, nn


class DannOptions(TargetOptions):
    dann_weight: NotNegative = switch(
        0.5, "weight of the two domain losses beside the classification loss"
    )
    dann_lr_factor: Positive = switch(
        1.0, "learning rate of classifier and domain head, relative to that of the rest"
    )


class Dann(Method):
    """Features from which a head cannot tell the source from the target.

    loss = CE(source) + w (BCE(source) + BCE(target)), with w = `dann_weight`. The head gets the
    classifier's input through a reversal of gradients of weight `reversal(progress)`. Source and
    target images go through the network in one batch, so BatchNorm sees both. With w = 0 the joint
    batch alone is left.
    """

    name = "dann"
    title = "domain-adversarial training"
    Options = DannOptions
    uses_target = True
    uses_progress = True  # in the weight of the reversal

    @classmethod
    def cost(cls, config: Config) -> float:
        return 2.0  # a target image for each source image

    @classmethod
    def statistics_untouched(cls, config: Config) -> bool | None:
        return not has_batch_norm(config.model)

    @classmethod
    def is_control(cls, control: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        """The same run with dann_weight 0: BatchNorm sees both domains, and no loss does."""
        if control["mode"] != own["mode"]:
            return super().is_control(control, own)
        names = {*cls.Options.names("training"), "bn_at_test"} - {"dann_weight"}
        alike = all(control[name] == own[name] for name in names)
        return alike and control["dann_weight"] == 0 < own["dann_weight"]

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        if values["dann_weight"] == 0:
            return "source and target images in one batch, no domain loss"
        return f"{cls.title}, weight {values['dann_weight']:g}"

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        from domainshift.methods import domain_head
        from domainshift.models import classifier_name

        self.classifier = model.get_submodule(classifier_name(model))
        self.head = domain_head.DomainHead(self.classifier.in_features, config.seed).to(device)
        distributed.share_batch_norm(self.head, device)
        super().__init__(model, config, device)

    def trained(self) -> list[nn.Module]:
        return [self.model, self.head]

    def parameters(self) -> list[Any]:
        options = self.config.options
        heads = [*self.classifier.parameters(), *self.head.parameters()]
        known = {id(p) for p in heads}
        body = [p for p in self.model.parameters() if id(p) not in known]
        return [{"params": body}, {"params": heads, "lr": self.config.lr * options.dann_lr_factor}]

    def loss(
        self, images: Tensor, labels: Tensor, target_images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        import torch
        from torch.nn import functional as F

        from domainshift.methods.domain_head import ReverseGradient

        n = len(images)
        logits = self.model(torch.cat([images, target_images]))[:n]
        features = ReverseGradient.apply(self.tap.features, reversal(self.progress))
        domain = self.head(features).squeeze(1)
        source, target = domain[:n], domain[n:]
        confusion = F.binary_cross_entropy_with_logits(source, torch.zeros_like(source))
        confusion += F.binary_cross_entropy_with_logits(target, torch.ones_like(target))
        # one joint batch moves the statistics wherever there are any
        self.bn_moved = torch.full((), bool(self.norms()), device=self.device)
        return F.cross_entropy(logits, labels) + self.config.options.dann_weight * confusion, logits

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"head": self.head.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])


def reversal(progress: float) -> float:
    """DANN's lambda: 2 / (1 + exp(-10 p)) - 1, from 0 at p = 0 to nearly 1 at p = 1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1
