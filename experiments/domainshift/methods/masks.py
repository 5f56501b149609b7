"""Maps that `fastshape.attach` does not make, on forward hooks.

Rescaled random maps, a value in place of 0, the real values of the top-K of a recorded map, the product
of the maps of several domains, and recording without shaping.
Plain PyTorch around `fastshape.shape`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastshape
from domainshift.config import Switches
from domainshift.methods.hooks import Hooks
from fastshape import BitMask

Map = BitMask | Tensor


class Maps(Hooks):
    """Shaping of chosen layers by maps that a subclass makes.

    Args:
        names: modules to shape.
        options: `binarize`, `gradient` and `epsilon` (see `domainshift.methods.shaping`).
    """

    product = False  # multiply by the real values of the map

    def __init__(self, model: nn.Module, names: Sequence[str], options: Switches) -> None:
        super().__init__(model, names)
        self.options = options
        self.last: dict[str, Map] = {}

    def map_for(self, name: str, x: Tensor, call: int) -> Map:
        """The map of x's shape that shapes x."""
        raise NotImplementedError(f"{type(self).__name__} must define map_for: Maps is abstract")

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        gradient, epsilon = self.options.gradient, self.options.epsilon
        if not self.model.training and self.at_eval != "on":
            off = self.at_eval == "off"
            return None if off else fastshape.shape(x, gradient=gradient)
        mask = self.last[name] = self.map_for(name, x, call)
        if self.product:
            return (x.detach() if gradient == "zero" else x) * mask
        policy = {"binarize": self.options.binarize, "gradient": gradient}
        if epsilon == 0:
            return fastshape.shape(x, mask=mask, **policy)
        values = torch.where(mask.to_bool(), 1.0, epsilon).to(x.dtype)
        return fastshape.shape(x, **policy) * values

    def density(self) -> dict[str, float]:
        """Share of ones (in a raw product: of positive values) in the last map of each layer."""
        return {
            name: (m if isinstance(m, BitMask) else BitMask.from_tensor(m)).density()
            for name, m in self.last.items()
        }


class RandomMaps(Maps):
    """A random map at each forward, whose values are drawn per element, channel or block."""

    def __init__(self, model: nn.Module, names: Sequence[str], options: Switches) -> None:
        super().__init__(model, names, options)
        rates = options.p_zero * (len(names) if len(options.p_zero) == 1 else 1)
        self.p_zero = dict(zip(names, rates, strict=True))
        sides = {"element": 1, "channel": None, "block": options.block_size}
        self.side = sides[options.mask_unit]

    def map_for(self, name: str, x: Tensor, call: int) -> BitMask:
        return fastshape.random_blocks(
            x.shape, self.p_zero[name], self.side, device=x.device, first_sample=self.first_sample
        )


class RescaledMaps(RandomMaps):
    """A random map at each forward, and what it leaves divided by 1 - p_zero."""

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        shaped = super().changed(name, x, call)
        with_map = self.model.training or self.at_eval == "on"
        return shaped / (1 - self.p_zero[name]) if with_map else shaped


class RecordedMaps(Maps):
    """The maps that `record` keeps, until the next `record`."""

    def __init__(self, model: nn.Module, names: Sequence[str], options: Switches) -> None:
        super().__init__(model, names, options)
        self.product = options.product
        self.recorded: dict[str, list[Map]] = {}
        self.recording: dict[str, list[Map]] | None = None

    @torch.no_grad()
    def record(self, *batches: Tensor) -> None:
        """Keep the maps of these images, one batch for each domain, multiplied with one another."""
        training = self.model.training
        self.model.train(self.options.record_mode == "train")
        try:
            passes = [self.maps_of(batch) for batch in batches]
        finally:
            self.recording = None
            self.model.train(training)
        multiply = torch.mul if self.product else BitMask.__and__
        self.recorded = {
            name: [functools.reduce(multiply, maps) for maps in zip(*calls, strict=True)]
            for name in self.names
            for calls in [[maps[name] for maps in passes]]
        }

    def maps_of(self, batch: Tensor) -> dict[str, list[Map]]:
        """The maps of one batch by layer, one for each call of the layer."""
        self.recording = maps = {name: [] for name in self.names}
        self.model(batch)
        return maps

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        if self.recording is None:
            return super().changed(name, x, call)
        self.recording[name].append(self.kept(x))
        return None

    def kept(self, x: Tensor) -> Map:
        """What `record` keeps of a layer's output: bits, or a copy for the raw product."""
        fraction = self.options.top_k
        largest = None if fraction is None else fastshape.top_k(fraction)(x)
        if self.product:
            return x.clone() if largest is None else x * largest.to_bool()
        return BitMask.from_tensor(x) if largest is None else largest

    def map_for(self, name: str, x: Tensor, call: int) -> Map:
        return self.recorded[name][call]
