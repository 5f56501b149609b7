"""What a method is: one class that owns its switches, its training pass and its words.

A method file holds one subclass of `Method`. Nothing else in the experiments knows a method by its
name: the configuration, the plan of a suite, the audit, the estimate of time, the pictures and the
report ask the class.

A method gets source images with their labels and, where it asks for them, images of other domains.
It has no argument through which a label of the target could come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from domainshift import distributed
from domainshift.config import PATCH, Config, Switches, Test, switch
from domainshift.errors import ConfigError

if TYPE_CHECKING:  # --help reads the methods, and needs no torch, which takes seconds to import
    import torch
    from torch import Tensor, nn
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

# Cost of a pass without backward, in passes with one. Convolutions dominate: backward costs twice
# what forward does.
FORWARD = 1 / 3


class Step(NamedTuple):
    """What one update saw. The 0-d tensors are on the training device: reading them waits."""

    loss_sum: Tensor  # float64, sum of the losses of this process's images
    correct: Tensor  # int64, those of them that were classified right while training
    images: int  # in all processes
    skipped: Tensor  # bool, whether a float16 gradient was not finite, so that no weight moved


class Prediction(NamedTuple):
    """What a model says of images, on its device."""

    logits: Tensor  # float32 (n, classes)
    features: Tensor  # float32 (n, d), the input of the classifier


class TargetOptions(Switches):
    """Switches of a method that trains on images of other domains too (`uses_target`)."""

    pairing: Literal["random", "modulo"] = switch(
        "random", "which target image meets source image i: a random one, or number i % n_target"
    )
    target_transform: Literal["train", "test", "shuffled"] = switch(
        "train",
        "augment the target images as the source's; only resize them; or augment them and put their "
        f"patches of {PATCH} x {PATCH} pixels in random order, which leaves colours and texture and no "
        "content",
    )


class Method:
    """Source only: cross-entropy on the labelled domain. Other methods change pieces of it.

    Class attributes, which a method states once and everything else asks for:

        name             value of --mode
        aliases          other words for it
        title            a few words for tables and the report
        Options          its switches, a subclass of `Switches`
        defaults         common switches whose values it sets where the user gives none
        uses_target      whether training sees images of the targets (so it trains once for each)
        uses_progress    whether training depends on `progress`, so that it cannot be made longer later
        trains_as        the method whose training it shares, where only its test differs
        at_eval_choices  values of at_eval that its tests may have
        map_words        what shaping multiplies an activation by, for the picture of maps; "": no maps

    Args:
        model: classifier on `device`, images (n, 3, S, S) -> logits (n, classes).
        config: optimizer, schedule and autocast are built from it.
        device: where images arrive and the model is.

    Attributes:
        layers: names of the shaped modules.
        passes: training passes so far; accumulation makes several per update.
        progress: share of training that is done, 0 to 1. The caller of `update` sets it.
        bn_moved: 0-d bool on the device: whether a pass over images of other domains moved BatchNorm's
            running statistics in training. None: there was no such pass since it was last None.
        share: this process's share of the images in the last training pass.
    """

    name: ClassVar[str] = "baseline"
    aliases: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = "no shaping"
    Options: ClassVar[type[Switches]] = Switches
    defaults: ClassVar[Mapping[str, Any]] = {}
    uses_target: ClassVar[bool] = False
    uses_progress: ClassVar[bool] = False
    trains_as: ClassVar[str | None] = None
    at_eval_choices: ClassVar[tuple[str, ...]] = ("off",)
    map_words: ClassVar[str] = ""

    layers: tuple[str, ...] = ()

    # --- what the method says of a configuration ----------------------------------------------

    @classmethod
    def settle(cls, values: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Change preset values that lose their meaning through those that the user gave, in place."""

    @classmethod
    def check(cls, config: Config, refuse: Callable[[str, str], None]) -> list[str]:
        """Refuse options that contradict each other, by refuse(switch, why). Returns warnings."""
        shuffles = cls.uses_target and config.options.target_transform == "shuffled"
        if shuffles and config.image_size % PATCH:
            refuse("target_transform", f"is not for image_size {config.image_size}; allowed with it: "
                   f"train | test; shuffled needs a multiple of {PATCH}")  # fmt: skip
        return distributed.caveats(config.device)

    @classmethod
    def layer_names(cls, config: Config) -> tuple[str, ...]:
        """Names of the modules of `config.model` that training shapes.

        Raises ConfigError for layers that the network does not have.
        """
        return ()

    @classmethod
    def others(cls, config: Config) -> tuple[str, ...]:
        """The domains whose unlabelled images stand beside the source images in training."""
        return config.target if cls.uses_target else ()

    @classmethod
    def domains(cls, config: Config) -> tuple[str, ...]:
        """The domains whose images training reads, the source first, each once."""
        return tuple(dict.fromkeys((config.source, *cls.others(config))))

    @classmethod
    def cost(cls, config: Config) -> float:
        """Work for one source image of training, in forward and backward passes of one image."""
        return 1.0

    @classmethod
    def statistics_untouched(cls, config: Config) -> bool | None:
        """Whether images of other domains leave BatchNorm alone in training. None: there are none."""
        return None

    @classmethod
    def is_control(cls, control: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        """Whether a run with the switches `control` does what comes along with this method's run, and
        not the method: target images through BatchNorm, binarization alone, and the like.

        For any method it is a baseline, if both are tested with BatchNorm measured on the source.

        Args:
            control, own: switches of two finished runs, with `mode`, `at_eval` and `bn_at_test`.
        """
        if own["mode"] == Method.name or control["mode"] != Method.name:
            return False
        return control["bn_at_test"] == own["bn_at_test"] == "source"

    @classmethod
    def words(cls, values: Mapping[str, Any]) -> str:
        """The method with its switches in words, for titles and captions."""
        return cls.title

    @classmethod
    def attach(cls, model: nn.Module, config: Config) -> Any:
        """Shape `model` as in training. None for a method that shapes nothing.

        The result has `names`, `fired`, `density`, `at_eval`, `first_sample` and `remove()`, is a
        context manager that removes itself, and has `record(*batches)` for a method that `uses_target`.
        """
        return None

    # --- training -----------------------------------------------------------------------------

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        import torch

        from domainshift.models import FeatureTap

        self.model = model
        self.config = config
        self.device = device
        self.passes = 0
        self.progress = 0.0
        self.bn_moved: Tensor | None = None
        self.share = 1.0
        self.replaced = distributed.share_batch_norm(model, device)
        self.tap = FeatureTap(model)
        self.optimizer = torch.optim.SGD(
            self.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            # reads the scaler's verdict on the device: otherwise each update waits for the GPU
            fused=device.type == "cuda",
        )
        # steps once for each epoch, or where updates are counted each update, that moved the weights
        step_size = max(1, int(config.step_fraction * (config.updates or config.epochs)))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size, config.gamma)
        self.amp_dtype = None if config.amp == "off" else getattr(torch, config.amp)
        # float16 gradients underflow without scaling; bfloat16 has the range of float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.training_pass = distributed.parallel(
            self.loss, self.trained(), some_unused=self.cuts_gradients(config)
        )

    def trained(self) -> list[nn.Module]:
        """The modules that hold all trained parameters."""
        return [self.model]

    def parameters(self) -> list[Any]:
        """What the optimizer moves: parameters, or groups of them."""
        return list(self.model.parameters())

    @classmethod
    def cuts_gradients(cls, config: Config) -> bool:
        """Whether some parameters get no gradient, which several processes must agree on."""
        return False

    def loss(
        self, images: Tensor, labels: Tensor, target_images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of one training pass, with its graph, and the source logits (n, classes)."""
        from torch.nn import functional as F

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
            target_images: float32 (n, 3, S, S), for a method that `uses_target`, else None. Where
                several domains stand beside the source: (n, domains, 3, S, S).
            whole: images in the batch of all processes, whose `distributed.parts` these are; None: n.
        """
        import torch

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        whole, taken = whole or len(images), 0
        parts = distributed.parts(whole, self.config.accumulate)
        for part in parts:
            own = slice(taken, taken + part.count)
            taken = own.stop
            x, y = images[own], labels[own]
            t = None if target_images is None else target_images[own]
            self.place(part.start, part.whole)
            last = part is parts[-1]
            with nullcontext() if last else distributed.unaveraged(self.training_pass):
                with self.autocast():
                    loss, logits = self.checked(self.training_pass(x, y, t), x)
                # every image of the batch counts alike, however unequal the parts; the mean over
                # the processes, which backward takes, divides by their number
                counted = len(x) if part.counts else 0
                weight = counted * distributed.size() / whole
                self.scaler.scale(loss * weight).backward()
            loss_sum += loss.detach() * counted
            if counted:
                correct += (logits.detach().argmax(1) == y).sum()
            self.passes += 1
            self.share = counted / part.whole
        skipped = self.overflown()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # to read `skipped` waits for a GPU, but only float16 can skip
        if self.config.updates is not None and not (self.scaler.is_enabled() and skipped):
            self.schedule.step()
        if not distributed.shares_batch_norm(self.device):
            distributed.average([t for n in self.norms() for t in (n.running_mean, n.running_var)])
        return Step(loss_sum, correct, whole, skipped)

    def overflown(self) -> Tensor:
        """Whether the scaler will skip the next step: bool, on the device."""
        import torch

        if not self.scaler.is_enabled():
            return torch.zeros((), dtype=torch.bool, device=self.device)
        groups = (group["params"] for group in self.optimizer.param_groups)
        grads = [p.grad for params in groups for p in params if p.grad is not None]
        return ~torch.nn.utils.get_total_norm(grads, math.inf).isfinite()

    def checked(self, result: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `loss` returned, if it is what it must be. Raises ConfigError."""
        from torch import Tensor

        pair = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
        if not all(isinstance(t, Tensor) for t in pair) or pair[0].dim() or len(pair[1]) != len(x):
            raise ConfigError(
                f"mode {self.name}: loss returned {type(result).__name__}; allowed: a pair of the mean "
                "loss, without dimensions, and the logits, one row per source image"
            )
        return pair

    def place(self, start: int, whole: int | None = None) -> None:
        """Tell random maps which images of a pass come next.

        Args:
            start: place of the first of them in the pass of all processes.
            whole: images in that pass; None: those that come.
        """

    # --- testing ------------------------------------------------------------------------------

    @contextmanager
    def testing(self, test: Test) -> Iterator[None]:
        """Within it the evaluation mode shapes as `test.at_eval` says; outside it does not shape.

        Raises ConfigError for a value of at_eval that the method does not have.
        """
        if test.at_eval not in self.at_eval_choices:
            allowed = " | ".join(self.at_eval_choices)
            raise ConfigError(
                f"at_eval: {test.at_eval!r} is not for mode {self.name}; allowed: {allowed}"
            )
        yield

    def predict(self, images: Tensor, start: int = 0) -> Prediction:
        """Logits and features in evaluation mode.

        Args:
            images: float32 (n, 3, S, S), normalized.
            start: place of the first of them in the batch of all processes.
        """
        import torch

        self.model.eval()
        self.place(start)
        with torch.no_grad(), self.autocast():
            logits = self.model(images)
        return Prediction(logits.float(), self.tap.features.float())

    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure BatchNorm's running statistics on `batches`: plain means over them.

        The model runs as in testing, except that BatchNorm normalizes by each batch.

        Args:
            batches: images, float32 (n, 3, S, S), normalized; n > 1. All processes get all of them.
        """
        import torch

        norms = self.norms()
        momenta = [norm.momentum for norm in norms]
        self.model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for images in batches:
                part = slice(None)
                if distributed.shares_batch_norm(self.device):
                    part = distributed.parts(len(images))[0].images
                self.place(part.start or 0, len(images))
                with torch.no_grad(), self.autocast():
                    self.model(images[part].to(self.device, non_blocking=True))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    @contextmanager
    def recalibrated(self, batches: Iterable[Tensor]) -> Iterator[None]:
        """`recalibrate` for a while. Afterwards the statistics are those of training again."""
        buffers = [buffer for norm in self.norms() for buffer in norm.buffers()]
        saved = [buffer.clone() for buffer in buffers]
        try:
            self.recalibrate(batches)
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)

    # --- what it can tell ---------------------------------------------------------------------

    def norms(self) -> list[BatchNorm]:
        """The BatchNorms of the model that have running statistics."""
        from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

        return [
            module
            for module in self.model.modules()
            if isinstance(module, BatchNorm) and module.running_mean is not None
        ]

    def statistics(self) -> Tensor:
        """A copy of BatchNorm's running means and variances, one after the other."""
        import torch

        values = [t for n in self.norms() for t in (n.running_mean, n.running_var)]
        return torch.cat(values) if values else torch.empty(0, device=self.device)

    def autocast(self) -> torch.autocast:
        import torch

        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def fired(self) -> dict[str, int]:
        """How often each shaped layer was shaped so far, tests included."""
        return {}

    def density(self) -> dict[str, float]:
        """Share of ones in the map that each shaped layer used last. Waits for the device."""
        return {}

    def close(self) -> None:
        """Leave the model as it came: nothing attached, nothing shared with other processes."""
        self.tap.remove()
        self.training_pass = self.loss
        distributed.restore(self.model, self.replaced)

    # --- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import torch

        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            if moments.get("momentum_buffer") is not None:  # it has the strides of the saving run
                buffer = torch.empty_like(parameter).copy_(moments["momentum_buffer"])
                moments["momentum_buffer"] = buffer
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def has_batch_norm(model: str) -> bool:
    """Whether a network normalizes by statistics that a pass in train mode moves."""
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

    from domainshift.models import bare_model

    return any(isinstance(module, BatchNorm) for module in bare_model(model).modules())
