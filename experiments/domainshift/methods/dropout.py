"""Dropout of whole channels after chosen layers (Tompson et al., arXiv 1411.4280)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from domainshift.config import Config, Layers, Probability, switch
from domainshift.methods.hooks import Hooks
from domainshift.methods.shaping import LAYERS, Layered, LayerOptions, choose_layers, places

if TYPE_CHECKING:  # see domainshift.methods.base
    from torch import Tensor, nn


class DropoutOptions(LayerOptions):
    """conv 10, to compare it with random maps there."""

    layers: Layers = switch((10,), f"layers to shape: {LAYERS}", allowed=LAYERS)
    drop_rate: Probability = switch(0.5, "probability that a (sample, channel) is dropped")


class Dropout2d(Layered):
    """Whole channels are zero with probability `drop_rate` while training, else x / (1 - drop_rate)."""

    name = "dropout2d"
    title = "dropout of channels"
    Options = DropoutOptions

    @classmethod
    def attach(cls, model: nn.Module, config: Config) -> ChannelDropout:
        options = config.options
        return ChannelDropout(model, choose_layers(model, options), options.drop_rate)

    def place(self, start: int, whole: int | None = None) -> None:
        super().place(start)
        self.attachment.samples = whole

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        return f"{cls.title} {places(values)}, rate {values['drop_rate']:g}"


class ChannelDropout(Hooks):
    """Dropout of whole channels in training mode, on the outputs of chosen modules.

    Attributes:
        samples: how many samples the pass of all processes has; None: those that come.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rate: float) -> None:
        super().__init__(model, names)
        self.rate = rate
        self.samples: int | None = None

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        if not self.model.training:
            return None
        from torch.nn import functional as F

        # drawn for the whole batch: each process takes its rows, and their generators stay alike
        whole = x.new_ones(self.samples or len(x), *x.shape[1:2], *[1] * (x.dim() - 2))
        return x * F.dropout2d(whole, self.rate).narrow(0, self.first_sample, len(x))
