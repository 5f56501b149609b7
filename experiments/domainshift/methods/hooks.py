"""Forward hooks on chosen layers, by which a method changes their outputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # see domainshift.methods.base
    from torch import Tensor, nn


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
        from domainshift.finite import nonfinite_names

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
