"""Activation shaping: random maps, and maps recorded from target images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from domainshift import distributed
from domainshift.config import (
    Config,
    Layers,
    Names,
    NotNegative,
    Probabilities,
    Share,
    Switches,
    Test,
    Whole,
    switch,
)
from domainshift.errors import ConfigError
from domainshift.methods.base import FORWARD, Method, TargetOptions, has_batch_norm

if TYPE_CHECKING:  # see domainshift.methods.base
    import torch
    from torch import Tensor, nn

    import fastshape
    from domainshift.methods import masks

LAYERS = "conv numbers from 1, module names, shell patterns, or all"

Refuse = Callable[[str, str], None]


# --- chosen layers ----------------------------------------------------------------------------


class LayerOptions(Switches):
    """Which layers a method changes."""

    layers: Layers = switch((), f"layers to shape: {LAYERS}", allowed=LAYERS)
    after: Literal["conv", "bn", "relu"] = switch("conv", "kind of layer to shape after")
    every: Whole = switch(1, "shape every N-th of the layers: N, 2N, 3N, ... of --layers all")


def choose_layers(model: nn.Module, options: LayerOptions) -> tuple[str, ...]:
    """Names of the modules that the switches choose. Raises ConfigError for any that is not there."""
    import fastshape

    layers = "all" if options.layers == ("all",) else list(options.layers)
    try:
        with fastshape.attach(
            model, layers, mode="binarize", after=options.after, every=options.every
        ) as attachment:
            return tuple(attachment.names)
    except ValueError as error:  # its message names the argument, the value and what exists
        raise ConfigError(str(error)) from error


@functools.lru_cache(maxsize=256)
def layers_of(model: str, options: LayerOptions) -> tuple[str, ...]:
    from domainshift.models import bare_model

    return choose_layers(bare_model(model), options)


def places(values: Mapping[str, Any]) -> str:
    """Chosen layers in words: "after conv 1, conv 4", "after every conv"."""
    after, every = values["after"], values["every"]
    if list(values["layers"]) == ["all"]:
        return f"after every {after}" if every == 1 else f"after one in {every} {after} layers"
    named = [f"{after} {n}" if isinstance(n, int) else str(n) for n in values["layers"]]
    return f"after {', '.join(named)}"


class Layered(Method):
    """A method that changes the output of chosen layers while training. It states `attach`."""

    Options = LayerOptions

    @classmethod
    def settle(cls, values: dict[str, Any], given: Mapping[str, Any]) -> None:
        if "every" not in given and given.get("layers", "all") not in ("all", ["all"], ("all",)):
            values["every"] = 1

    @classmethod
    def check(cls, config: Config, refuse: Refuse) -> list[str]:
        if not config.options.layers:
            refuse("layers", f"is empty; mode {cls.name} needs at least one of: {LAYERS}")
        return super().check(config, refuse)

    @classmethod
    def layer_names(cls, config: Config) -> tuple[str, ...]:
        options = config.options
        chosen = {name: getattr(options, name) for name in LayerOptions.names()}
        return layers_of(config.model, LayerOptions(**chosen))

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.attachment = self.attach(model, config)
        self.layers = tuple(self.attachment.names)

    def place(self, start: int, whole: int | None = None) -> None:
        self.attachment.first_sample = start

    def fired(self) -> dict[str, int]:
        return {name: int(count) for name, count in self.attachment.fired.items()}

    def density(self) -> dict[str, float]:
        return self.attachment.density()

    def close(self) -> None:
        self.attachment.remove()
        super().close()


# --- shaping ----------------------------------------------------------------------------------


class ShapingOptions(LayerOptions):
    """Switches of random and of recorded maps."""

    binarize: bool = switch(True, "binarize the activation before it meets the map")
    epsilon: NotNegative = switch(0.0, "value of the map, in place of 0, where it is not 1")
    gradient: Literal["straight_through", "clipped", "zero"] = switch(
        "straight_through", "gradient through the binarization"
    )
    at_eval: Literal["off", "binarize", "on"] = switch(
        "off", "shaping while testing", role="testing"
    )
    attach: Literal["auto", "hooks", "replace"] = switch(
        "auto",
        "replace: a shaped convolution, its BatchNorm and ReLU run as one op where the model has them "
        "in a row; hooks: they run one by one; equal except for rounding, which training magnifies; "
        "auto: replace where that is one op on this device, else hooks",
        role="place",
    )


class Shaping(Layered):
    """A method that multiplies activations by maps, binarized first or not."""

    Options = ShapingOptions

    @classmethod
    def check(cls, config: Config, refuse: Refuse) -> list[str]:
        if config.options.at_eval not in cls.at_eval_choices:
            allowed = " | ".join(cls.at_eval_choices)
            refuse("at_eval", f"is not for mode {cls.name}; allowed: {allowed}")
        return super().check(config, refuse)

    @classmethod
    def cuts_gradients(cls, config: Config) -> bool:
        return config.options.gradient == "zero"

    @classmethod
    def own_maps(
        cls, model: nn.Module, names: tuple[str, ...], options: ShapingOptions
    ) -> masks.Maps | None:
        """Hooks for options that `fastshape.attach` does not have; None where it has them all."""
        raise NotImplementedError(f"{cls.__name__} must define own_maps: Shaping is abstract")

    @classmethod
    def package_mode(cls, options: ShapingOptions) -> dict[str, Any]:
        """`mode` and the arguments of `fastshape.attach` that belong to it."""
        raise NotImplementedError(f"{cls.__name__} must define package_mode: Shaping is abstract")

    @classmethod
    def attach(cls, model: nn.Module, config: Config) -> fastshape.Attachment | masks.Maps:
        """Shape `model` as in training, and not at all in evaluation mode until `at_eval` is set.

        Raises ConfigError for layers that the model does not have.
        """
        import fastshape

        options = config.options
        names = choose_layers(model, options)
        if own := cls.own_maps(model, names, options):
            return own
        return fastshape.attach(
            model,
            list(names),
            **cls.package_mode(options),
            binarize=options.binarize,
            gradient=options.gradient,
            method=attach_method(config),
            check_finite=config.device == "cpu",  # on a GPU each step would wait for it
        )

    @contextmanager
    def testing(self, test: Test) -> Iterator[None]:
        with super().testing(test):
            self.attachment.at_eval = test.at_eval
            try:
                yield
            finally:
                self.attachment.at_eval = "off"


def attach_method(config: Config) -> str:
    """The `method` of `fastshape.attach`."""
    options = config.options
    if distributed.size() > 1:  # the fused op has no form that shares BatchNorm's statistics
        return "hooks"
    if options.attach != "auto":
        return options.attach
    import torch

    import fastshape

    native = fastshape.backend_info()[torch.device(config.device).type] == "native"
    return "auto" if native and options.after == "conv" and options.binarize else "hooks"


def shaping_words(values: Mapping[str, Any]) -> str:
    """The chosen layers and what differs from plain shaping: "after conv 4, gradient zero"."""
    parts = [places(values)]
    parts += [] if values["binarize"] or values.get("product") else ["activation not binarized"]
    parts += [f"{values['epsilon']:g} in place of 0"] if values["epsilon"] else []
    parts += [f"gradient {values['gradient']}"] if values["gradient"] != "straight_through" else []
    return ", ".join(parts)


# --- random maps ------------------------------------------------------------------------------


class RandomOptions(ShapingOptions):
    """conv 10 is where independent runs agree that random maps help."""

    layers: Layers = switch((10,), f"layers to shape: {LAYERS}", allowed=LAYERS)
    p_zero: Probabilities = switch(
        (0.5,),
        "probability that the map is 0; one number or one per layer",
        allowed="0 <= p_zero < 1, one number or one per layer",
    )
    mask_unit: Literal["element", "channel", "block"] = switch(
        "element", "what one draw decides: an element, a (sample, channel), a block of its plane"
    )
    block_size: Whole | None = switch(
        None, "mask_unit block: side of the square blocks, in elements"
    )


class RandomMaps(Shaping):
    """Activation shaping with random maps: new ones at each layer and pass."""

    name = "random"
    title = "random maps"
    Options = RandomOptions
    at_eval_choices = ("off", "binarize", "on")
    map_words = "map drawn at random"

    @classmethod
    def check(cls, config: Config, refuse: Refuse) -> list[str]:
        options = config.options
        result = super().check(config, refuse)
        layers = len(cls.layer_names(config))
        if len(options.p_zero) not in (1, layers):
            refuse("p_zero", f"has {len(options.p_zero)} values for {layers} layers; allowed: one "
                   "value, or one per layer")  # fmt: skip
        if (options.mask_unit == "block") != (options.block_size is not None):
            refuse("block_size", f"with mask_unit {options.mask_unit}; block needs a whole number "
                   "from 1, element and channel have none")  # fmt: skip
        return result

    @classmethod
    def own_maps(
        cls, model: nn.Module, names: tuple[str, ...], options: RandomOptions
    ) -> masks.Maps | None:
        from domainshift.methods import masks

        return masks.RandomMaps(model, names, options) if options.epsilon else None

    @classmethod
    def package_mode(cls, options: RandomOptions) -> dict[str, Any]:
        p_zero = options.p_zero
        unit = options.block_size if options.mask_unit == "block" else options.mask_unit
        p_zero = p_zero[0] if len(p_zero) == 1 else list(p_zero)
        return {"mode": "random", "p_zero": p_zero, "unit": unit}

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        by_element = config.options.mask_unit == "element" and not config.options.epsilon
        if distributed.size() == 1 or not by_element:
            return
        for name in self.layers:
            outputs = getattr(model.get_submodule(name), "out_features", 8)
            if outputs % 8:
                raise ConfigError(
                    f"layers: {name!r} gives {outputs} elements per image; random maps of "
                    f"{distributed.size()} processes need a multiple of 8"
                )

    # without a zero these switches decide nothing
    ZEROS = ("p_zero", "mask_unit", "block_size")

    @classmethod
    def is_control(cls, control: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        """The same run with p_zero 0, which leaves the binarization."""
        if control["mode"] != own["mode"]:
            return super().is_control(control, own)
        names = {*cls.Options.names("training", "testing"), "bn_at_test"} - {*cls.ZEROS}
        alike = all(control[name] == own[name] for name in names)
        return alike and not any(control["p_zero"]) and any(own["p_zero"])

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        if not any(values["p_zero"]):
            return f"binarization alone {shaping_words(values)}"
        unit = {"element": "", "channel": " per channel", "block": " per block"}
        p_zero = ", ".join(f"{p:g}" for p in values["p_zero"])
        kind = f"random maps{unit[values['mask_unit']]} {shaping_words(values)}"
        return f"{kind}, p_zero {p_zero}"


class RescaledMaps(RandomMaps):
    """Random maps whose result is divided by 1 - p_zero, as dropout does it.

    Without binarization and per channel this is `Dropout2d` with drop_rate p_zero. BatchNorm behind a
    shaped layer divides a constant factor out while training, so that after a convolution the factor
    moves BatchNorm's running statistics, and hence tests, and the weights hardly.
    """

    name = "random-rescaled"
    title = "random maps, rescaled"

    @classmethod
    def own_maps(
        cls, model: nn.Module, names: tuple[str, ...], options: RandomOptions
    ) -> masks.Maps:
        from domainshift.methods import masks

        return masks.RescaledMaps(model, names, options)

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        words = super().words(values)
        return f"{words}, rescaled by 1 / (1 - p_zero)" if any(values["p_zero"]) else words


# --- maps of the target -----------------------------------------------------------------------


class TargetMapsOptions(TargetOptions, ShapingOptions):
    """conv 4 is the best layer of report B's target maps."""

    layers: Layers = switch((4,), f"layers to shape: {LAYERS}", allowed=LAYERS)
    product: bool = switch(
        False, "multiply by the target's real values, as report B's code did; never binarizes"
    )
    record_mode: Literal["eval", "train"] = switch(
        "eval",
        "mode of BatchNorm in the pass over target images; in train mode they move its running "
        "statistics",
    )
    apply_maps: bool = switch(
        True,
        "false: run the pass over target images and shape nothing (with --record-mode train: bn-only, "
        "where only BatchNorm's running statistics move)",
    )
    top_k: Share | None = switch(
        None,
        "the map is 1 at this part of the largest values of each (sample, channel), rather than where "
        "they are above 0; --product keeps those values and zeroes the others",
    )
    mask_sources: Names = switch(
        (),
        "record the maps of these domains in place of the target's and multiply them: domain "
        "generalization, training sees no target image; --source may be among them",
    )


class TargetMaps(Shaping):
    """Domain adaptation: the activations of target images, recorded first, shape those of the source."""

    name = "da"
    aliases = ("target",)
    title = "maps of target images"
    Options = TargetMapsOptions
    uses_target = True
    at_eval_choices = ("off", "binarize")  # a test image has no recorded map
    map_words = "map of the target image"

    @classmethod
    def settle(cls, values: dict[str, Any], given: Mapping[str, Any]) -> None:
        super().settle(values, given)
        if given.get("product") and "binarize" not in given:
            values["binarize"] = False
        if given.get("apply_maps") is False:
            # measured on the source, the statistics would undo what the pass over target images does
            values["bn_at_test"] = "trained"

    @classmethod
    def check(cls, config: Config, refuse: Refuse) -> list[str]:
        options = config.options
        result = super().check(config, refuse)
        if options.product and options.gradient == "clipped":
            refuse("gradient", "is not for --product; allowed with it: straight_through | zero")
        if options.product and options.binarize:
            refuse("product", "means no binarization; use --no-binarize or --no-product")
        if options.product and options.epsilon:
            refuse(
                "epsilon", "is not for --product, whose map has no zeros to replace; allowed: 0.0"
            )
        if set(config.target) & set(options.mask_sources):
            refuse("mask_sources", "has the target in it; allowed: any domain but "
                   f"{' and '.join(config.target)}")  # fmt: skip
        if len(set(options.mask_sources)) < len(options.mask_sources):
            refuse("mask_sources", "names a domain twice; allowed: each domain once")
        if options.record_mode == "train" and config.bn_at_test != "trained":
            result.append(
                f"bn_at_test {config.bn_at_test} measures BatchNorm again before each test: what "
                "record_mode train moves is not in the figures"
            )
        return result

    @classmethod
    def layer_names(cls, config: Config) -> tuple[str, ...]:
        names = super().layer_names(config)
        return names if config.options.apply_maps else ()

    @classmethod
    def others(cls, config: Config) -> tuple[str, ...]:
        return config.options.mask_sources or config.target

    @classmethod
    def cost(cls, config: Config) -> float:
        return 1 + FORWARD * (len(config.options.mask_sources) or 1)

    @classmethod
    def statistics_untouched(cls, config: Config) -> bool | None:
        return config.options.record_mode == "eval" or not has_batch_norm(config.model)

    @classmethod
    def own_maps(
        cls, model: nn.Module, names: tuple[str, ...], options: TargetMapsOptions
    ) -> masks.Maps | None:
        several = options.mask_sources or (options.product and options.top_k is not None)
        if options.epsilon == 0 and not several and options.apply_maps:
            return None
        from domainshift.methods import masks

        return masks.RecordedMaps(model, names if options.apply_maps else (), options)

    @classmethod
    def package_mode(cls, options: TargetMapsOptions) -> dict[str, Any]:
        import fastshape

        mode = "product" if options.product else "target"
        to_mask = None if options.top_k is None else fastshape.top_k(options.top_k)
        return {"mode": mode, "record_mode": options.record_mode, "to_mask": to_mask}

    def loss(
        self, images: Tensor, labels: Tensor, target_images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        several = target_images.dim() > images.dim()
        domains = target_images.unbind(1) if several else (target_images,)
        before = self.statistics()
        self.attachment.record(*domains)
        moved = (self.statistics() != before).any()
        self.bn_moved = moved if self.bn_moved is None else self.bn_moved | moved
        return super().loss(images, labels, target_images)

    @classmethod
    def is_control(cls, control: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        """bn-only: target images go through BatchNorm in train mode, and nothing is shaped."""
        if control["mode"] != own["mode"]:
            return super().is_control(control, own)
        bn_only = not control["apply_maps"] and control["record_mode"] == "train"
        return bn_only and own["apply_maps"]

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        domains = " and ".join(values["mask_sources"]) or "the target"
        shuffled = values["target_transform"] == "shuffled"
        if not values["apply_maps"]:
            images = "shuffled images" if shuffled else "images"
            return (
                f"{images} of {domains} through BatchNorm in {values['record_mode']} mode, no maps"
            )
        kind = "real-valued maps" if values["product"] else "binarized maps"
        top = "" if values["top_k"] is None else f", top {values['top_k']:g}"
        mode = ", recorded in train mode" if values["record_mode"] == "train" else ""
        whose = f"shuffled images of {domains}" if shuffled else domains
        return f"{kind} of {whose} {shaping_words(values)}{top}{mode}"
