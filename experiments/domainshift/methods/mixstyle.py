"""MixStyle (Zhou et al., arXiv 2104.02008): channel statistics of images, mixed while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from domainshift import distributed
from domainshift.config import Config, Layers, Positive, Share, switch
from domainshift.errors import ConfigError
from domainshift.methods.hooks import Hooks
from domainshift.methods.shaping import LAYERS, Layered, LayerOptions, choose_layers, places

if TYPE_CHECKING:  # see domainshift.methods.base
    from torch import Tensor, nn

EPSILON = 1e-6  # added to a variance before its root, as in the authors' code


class MixStyleOptions(LayerOptions):
    """The first two residual stages of a ResNet, as the paper has it for PACS."""

    layers: Layers = switch(
        ("layer1", "layer2"), f"layers after which to mix: {LAYERS}", allowed=LAYERS
    )
    mix_probability: Share = switch(0.5, "probability that a layer mixes in a pass")
    mix_alpha: Positive = switch(
        0.1, "lambda, the share of an image's own statistics, is drawn from Beta(alpha, alpha)"
    )


class MixStyle(Layered):
    """Each image gets channel means and deviations between its own and those of another image."""

    name = "mixstyle"
    title = "mixed channel statistics"
    Options = MixStyleOptions

    @classmethod
    def attach(cls, model: nn.Module, config: Config) -> StyleMixing:
        options = config.options
        names = choose_layers(model, options)
        return StyleMixing(model, names, options.mix_probability, options.mix_alpha)

    def place(self, start: int, whole: int | None = None) -> None:
        super().place(start)
        self.attachment.samples = whole

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        probability, alpha = values["mix_probability"], values["mix_alpha"]
        return f"{cls.title} {places(values)}, probability {probability:g}, alpha {alpha:g}"


class StyleMixing(Hooks):
    """MixStyle in training mode, on the outputs of chosen modules.

    At each layer one draw decides whether a pass mixes, as in the authors' code. All draws come from
    torch's CPU generator, for the whole batch: they are the same on every device, and several processes
    draw alike. A pass that does not mix counts in `fired` too.

    Attributes:
        samples: how many samples the pass of all processes has; None: those that come.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], probability: float, alpha: float
    ) -> None:
        import torch

        super().__init__(model, names)
        self.probability = probability
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.samples: int | None = None

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        if not self.model.training:
            return None
        import torch

        if x.dim() != 4:
            raise ConfigError(
                f"layers: the output of {name!r} has {x.dim()} dimensions; mixstyle needs (n, C, H, W)"
            )
        if torch.rand(1).numpy()[0] >= self.probability:  # on the CPU: nothing waits for a GPU
            return x
        whole = self.samples or len(x)
        own_share, partner = self.beta.sample((whole, 1, 1, 1)), torch.randperm(whole)
        own = slice(self.first_sample, self.first_sample + len(x))
        mean, deviation = channel_statistics(x)
        everyone = gathered(torch.stack([mean, deviation], 1), own, whole)
        others = everyone[partner[own].to(x.device)].unbind(1)
        return mixed(x, mean, deviation, *others, own_share[own].to(mean))


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each (sample, channel): (n, C, H, W) -> two of (n, C, 1, 1).

    Without graph, and in float32 for a half-precision x.
    """
    import torch

    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return mean, (variance + EPSILON).sqrt()


def gathered(statistics: Tensor, own: slice, whole: int) -> Tensor:
    """Statistics (n, ...) of this process's images -> (whole, ...) of the whole batch.

    Where there are fewer images than processes, each process has the whole batch.
    """
    if len(statistics) == whole:
        return statistics
    everyone = statistics.new_zeros(whole, *statistics.shape[1:])
    everyone[own] = statistics
    return distributed.summed(everyone)


def mixed(
    x: Tensor,
    mean: Tensor,
    deviation: Tensor,
    other_mean: Tensor,
    other_deviation: Tensor,
    own_share: Tensor,
) -> Tensor:
    """x with means and deviations between its own and others, in its dtype and memory format.

    Args:
        x: (n, C, H, W). The gradient goes through its normalized values alone.
        mean, deviation, other_mean, other_deviation: (n, C, 1, 1), without graph.
        own_share: (n, 1, 1, 1), lambda: 1 leaves x as it is, 0 takes the others' statistics.
    """
    new_mean = other_mean.lerp(mean, own_share)
    new_deviation = other_deviation.lerp(deviation, own_share)
    return ((x - mean) * (new_deviation / deviation) + new_mean).to(x.dtype)
