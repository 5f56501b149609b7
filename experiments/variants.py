"""Maps that `fastshape.attach` does not make, on hooks with the names that it has.

Random maps per channel or block; a value in place of 0; the top-K of a recorded map; the product of
several domains' maps; recording in train mode by a pass that runs to its end, so that it moves every
BatchNorm, as published code did, where `fastshape.attach` stops at the deepest shaped layer. And
dropout of whole channels. Plain PyTorch around `fastshape.shape`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from config import Config
from torch import Tensor, nn
from torch.nn import functional as F

import fastshape
from fastshape import BitMask


class Hooks:
    """A hook on the output of each chosen layer. Also a context manager that removes them.

    Attributes:
        names: names of the chosen modules.
        fired: how often an output was changed, by name.
        first_sample: number of the first sample in a batch of which this process has a part.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self.fired = dict.fromkeys(names, 0)
        self.first_sample = 0
        self.calls = dict.fromkeys(names, 0)  # in the forward under way
        self.handles = [model.register_forward_pre_hook(self.begin)]
        for name in names:
            hook = functools.partial(self.hook, name)
            self.handles.append(model.get_submodule(name).register_forward_hook(hook))

    def begin(self, model: nn.Module, args: tuple) -> None:
        self.calls = dict.fromkeys(self.names, 0)

    def hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        changed = self.changed(name, output, self.calls[name])
        self.calls[name] += 1
        self.fired[name] += changed is not None
        return changed

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        """What takes the place of x, the output of a layer's call number `call`; None: nothing."""
        raise NotImplementedError("each kind of hooks says what it changes")

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class ChannelDropout(Hooks):
    """Dropout of whole channels while training: zero with probability `rate`, else x / (1 - rate).

    Attributes:
        samples: how many the batch has of which this process has a part; None: what comes is whole.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rate: float) -> None:
        super().__init__(model, names)
        self.rate = rate
        self.samples: int | None = None
        self.density: dict[str, float] = {}

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        if not self.model.training:
            return None
        # drawn for the whole batch: each process has its rows, and their generators stay alike
        whole = x.new_ones(self.samples or len(x), *x.shape[1:2], *[1] * (x.dim() - 2))
        return x * F.dropout2d(whole, self.rate).narrow(0, self.first_sample, len(x))


class Maps(Hooks):
    """Shaping of chosen layers by the random or recorded maps that `config` describes.

    Args:
        names: modules to shape; none with `config.apply_maps` off, when only the pass of `record`
            is left.
        p_zero: mode random: probability of a zero, by name.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], p_zero: Mapping[str, float], config: Config
    ) -> None:
        super().__init__(model, names if config.apply_maps else ())
        self.config = config
        self.p_zero = p_zero
        self.recorded: dict[str, list[BitMask | Tensor]] = {}
        self.recording: dict[str, list[BitMask | Tensor]] | None = None
        self.last: dict[str, BitMask | Tensor] = {}

    @torch.no_grad()
    def record(self, *batches: Tensor) -> None:
        """Hold the maps of these images, one batch a domain, multiplied, until the next `record`."""
        training = self.model.training
        self.model.train(self.config.record_mode == "train")
        self.recorded = {}
        try:
            for batch in batches:
                self.recording = {name: [] for name in self.names}
                self.model(batch)
                for name, maps in self.recording.items():
                    earlier = self.recorded.get(name, maps)
                    pairs = zip(earlier, maps, strict=True)
                    self.recorded[name] = [a if a is b else self.product(a, b) for a, b in pairs]
        finally:
            self.recording = None
            self.model.train(training)

    def product(self, a: BitMask | Tensor, b: BitMask | Tensor) -> BitMask | Tensor:
        return a * b if self.config.product else a & b

    def recorded_map(self, x: Tensor) -> BitMask | Tensor:
        """What is kept of a layer's output in the pass of `record`: bits or a copy."""
        fraction = self.config.top_k
        kept = None if fraction is None else top_fraction(x, fraction)
        if self.config.product:
            return x.clone() if kept is None else x * kept
        return BitMask.from_tensor(x if kept is None else kept)

    def changed(self, name: str, x: Tensor, call: int) -> Tensor | None:
        if self.recording is not None:
            self.recording[name].append(self.recorded_map(x))
            return None
        config = self.config
        if not self.model.training and config.at_eval != "on":
            off = config.at_eval == "off"
            return None if off else fastshape.shape(x, gradient=config.gradient)
        if config.mode == "random":
            sides = {"element": 1, "channel": None, "block": config.block_size}
            side = sides[config.mask_unit]
            mask = random_blocks(x, self.p_zero[name], side, self.first_sample)
        else:
            mask = self.recorded[name][call]
        self.last[name] = mask
        if config.product:
            return (x.detach() if config.gradient == "zero" else x) * mask
        policy = {"binarize": config.binarize, "gradient": config.gradient}
        if config.epsilon == 0:
            return fastshape.shape(x, mask=mask, **policy)
        values = torch.where(mask.to_bool(), 1.0, config.epsilon).to(x.dtype)
        return fastshape.shape(x, **policy) * values

    @property
    def density(self) -> dict[str, float]:
        """Share of ones (of a raw product: of positive values) in each layer's last map."""
        masks = {
            name: m if isinstance(m, BitMask) else BitMask.from_tensor(m)
            for name, m in self.last.items()
        }
        return {name: mask.density() for name, mask in masks.items()}


def random_blocks(x: Tensor, p_zero: float, side: int | None, first: int = 0) -> BitMask:
    """A map of x's shape (n, C, ...) in which blocks of a (sample, channel) are 0 or 1 together.

    Args:
        p_zero: probability that a block is 0.
        side: of the square blocks, in elements; the first begins at the plane's first element and
            the last may be cut. None: the whole plane.
        first: number of x's first sample in the batch for which the map is drawn.
    """
    sides = [side or size for size in x.shape[2:]]
    grid = [-(-size // s) for size, s in zip(x.shape[2:], sides, strict=True)]
    state = fastshape.rng_state(device=x.device)
    drawn = (first + len(x), x.shape[1], *grid)
    mask = BitMask.random(drawn, p_zero, rng_state=state).to_bool()[first:]
    for dim, s in enumerate(sides, 2):
        mask = mask.repeat_interleave(s, dim).narrow(dim, 0, x.shape[dim])
    return BitMask.from_bool(mask)


def top_fraction(x: Tensor, fraction: float) -> Tensor:
    """Where the largest values of each plane are: bool of x's shape (n, C, ...).

    Of a plane of m values, ``max(1, round(fraction * m))`` are true, halves to even. Of equal values
    those that come first in row-major order.
    """
    planes = x.reshape(*x.shape[:2], -1)
    count = max(1, round(fraction * planes.shape[-1]))
    largest = planes.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    kept = torch.zeros(planes.shape, dtype=torch.bool, device=x.device)
    return kept.scatter_(-1, largest, True).reshape(x.shape)
