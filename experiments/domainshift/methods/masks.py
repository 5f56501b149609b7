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
from domainshift.finite import nonfinite_names
from fastshape import BitMask

Map = BitMask | Tensor


class Hooks:
    """A hook on the output of each chosen layer. As a context manager, it removes itself at the end.

    Attributes:
        names: names of the chosen modules.
        fired: how often an output was changed, by name.
        first_sample: place of the first sample in the pass that several processes share.
        at_eval: what happens in evaluation mode: off, binarize or on.
        check_finite: whether an output on a CPU that is not finite raises FloatingPointError.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self.fired = dict.fromkeys(names, 0)
        self.first_sample = 0
        self.at_eval = "off"
        self.check_finite = True
        self.calls = dict.fromkeys(names, 0)  # in the current forward
        self.handles = [model.register_forward_pre_hook(self.begin)]
        for name in names:
            hook = functools.partial(self.hook, name)
            self.handles.append(model.get_submodule(name).register_forward_hook(hook))

    def begin(self, model: nn.Module, args: tuple) -> None:
        self.calls = dict.fromkeys(self.names, 0)

    def hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        # on a GPU each step would wait for this
        look = self.check_finite and output.device.type == "cpu"
        if look and nonfinite_names({name: output}):
            raise FloatingPointError(f"layer {name!r}: its output is not finite")
        changed = self.changed(name, output, self.calls[name])
        self.calls[name] += 1
        self.fired[name] += changed is not None
        return changed

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        """The tensor that replaces x, the output of a layer's call number `call`; None: x stays."""
        raise NotImplementedError(f"{type(self).__name__} must define changed: Hooks is abstract")

    def density(self) -> dict[str, float]:
        """Share of ones in the last map of each layer that has maps. Waits for the device."""
        return {}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


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
