"""Networks by name: their initial weights, their classifier and the numbers of their layers."""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

import fastshape
from domainshift import files, finite
from domainshift.errors import ConfigError, RecordError, WeightsError, listing
from domainshift.torch_defaults import own_defaults

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}

SLIM = "resnet18-slim"
SLIM_WIDTH = 12  # channels of its first convolution, where ResNet-18 has FULL_WIDTH
FULL_WIDTH = 64
IMAGENET_CLASSES = 1000

# torchvision's files for DenseNet have norm.1 where the network has norm1
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")

APPROXIMATE = "layer4.0.conv1, layer4.0.conv2, layer4.1.conv1, layer4.1.conv2"


class Weights(NamedTuple):
    """What a record says about the initial weights."""

    source: str  # imagenet, none, or the name of a file
    sha256: str | None  # of the file; of the tensors for timm's imagenet; None for none
    warnings: list[str]


@own_defaults()
def build_model(name: str, weights: str, classes: int, seed: int) -> tuple[nn.Module, Weights]:
    """A network with `classes` outputs, on the CPU, in train mode, and where its weights come from.

    Args:
        name: a torchvision classifier, "resnet18-slim", or "timm:NAME".
        weights: "imagenet" (torchvision's first weights of that network, IMAGENET1K_V1 for nearly all,
            or those of timm), "none" (random), or the path of a state dict. The dict may be inside
            {"model": ...} or {"state_dict": ...}, with names that start with "module.".
        classes: outputs of the new classifier. That of `weights`, whatever its size, is dropped.
        seed: of everything that is initialized here. The global random stream is left alone.

    Raises:
        ConfigError: no such network, or one without exactly one linear classifier.
        WeightsError: the weights are missing, unreadable, of another network, or cannot be downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(name)
        # after as many draws for any weights, so the new classifier depends on the seed alone
        classifier = classifier_name(model)
        new = nn.Linear(model.get_submodule(classifier).in_features, classes)
        model.set_submodule(classifier, new)
        if weights == "none":
            return model, Weights("none", None, [])
        if weights == "imagenet":
            state, digest = imagenet_state(name)
            load_backbone(model, state, f"'imagenet' is not for {name}")
            return model, Weights("imagenet", digest, [])
    path = Path(weights)
    digest = file_digest(path)
    load_backbone(model, read_state(path), f"{path} is not for {name}")
    return model, Weights(path.name, digest, caveats(path, digest))


@functools.cache
@own_defaults()
def bare_model(name: str) -> nn.Module:
    """A network without memory for weights, on the meta device. All callers share it.

    Raises ConfigError as `build_model` does.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return network(name)
        except NotImplementedError:  # RegNet computes with tensors while it is built
            return network(name).to("meta")


# --- networks ---------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """A network as its library builds it, with random weights from the global stream.

    Raises ConfigError unless exactly one nn.Linear has as many outputs as the network, and no
    nn.Linear comes after it in the order of modules: this one is the classifier.
    """
    if name == SLIM:
        model = slim()
    else:
        library, short = library_of(name)
        model = models.get_model(short) if library is models else library.create_model(short)
    linear = {n: m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    outputs = getattr(model, "num_classes", IMAGENET_CLASSES)
    classifiers = [n for n, features in linear.items() if features == outputs]
    if len(classifiers) != 1 or classifiers != list(linear)[-1:]:
        count = f"{len(classifiers)} linear classifiers" if classifiers else "no linear classifier"
        listing = f" ({', '.join(classifiers)})" if classifiers else ""
        raise ConfigError(f"model: {name!r} has {count}{listing}; allowed: networks with one")
    return model


def classifier_name(model: nn.Module) -> str:
    """Name of the classifier: the last nn.Linear in the order of modules, such as fc or classifier.6.

    Raises ConfigError for a network without any.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ConfigError(f"model: {type(model).__name__} has no linear classifier")
    return names[-1]


def library_of(name: str) -> tuple[ModuleType, str]:
    """timm or torchvision.models, and the network's name there. Raises ConfigError."""
    prefix, colon, short = name.partition(":")
    if colon and prefix == "timm":
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"model: {name!r} needs timm: pip install timm ({error})") from error
        library, names = timm, [*timm.list_models(), *timm.list_pretrained()]
    else:
        library, short, names = models, name, models.list_models(module=models)
    if short not in names:
        near = ", ".join(difflib.get_close_matches(short, names, 3)) or "resnet18"
        raise ConfigError(
            f"model: {name!r} is not allowed; allowed: a torchvision classifier, {SLIM}, or "
            f"timm:NAME; {library.__name__} has {near}, ..."
        )
    return library, short


def slim() -> nn.Module:
    """A ResNet-18 with SLIM_WIDTH in place of 64 channels, 96 in place of 512, and so on.

    Its modules have ResNet-18's names. It is initialized as torchvision does it.
    """
    with torch.device("meta"):
        model = models.resnet18()

    def narrow(channels: int) -> int:
        return channels * SLIM_WIDTH // FULL_WIDTH if channels >= FULL_WIDTH else channels

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            new = nn.Conv2d(
                narrow(module.in_channels), narrow(module.out_channels), module.kernel_size,
                module.stride, module.padding, bias=False,
            )  # fmt: skip
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(narrow(module.num_features))
        elif isinstance(module, nn.Linear):
            new = nn.Linear(narrow(module.in_features), module.out_features)
        else:
            continue
        model.set_submodule(name, new)
    return model


# --- weights ----------------------------------------------------------------------------------


def weights_digest(weights: str, name: str) -> str:
    """What stands for the initial weights in the key of a training. Nothing is built or downloaded.

    Returns:
        "none", "imagenet" with the name of the weights, or the SHA-256 of the file, in hex.

    Raises:
        ConfigError: no such network.
        WeightsError: no such file, or no ImageNet weights for this network.
    """
    if weights == "none":
        return weights
    return f"{weights} {imagenet(name)[0]}" if weights == "imagenet" else file_digest(Path(weights))


def imagenet(name: str) -> tuple[str, Any]:
    """Name of a network's ImageNet weights, and the library's own entry. Raises WeightsError."""
    missing = f"weights: there are no 'imagenet' weights for {name}; allowed: none | a file's path"
    if name == SLIM:
        raise WeightsError(missing)
    library, short = library_of(name)
    if library is models:
        entry = next(iter(models.get_model_weights(short)))
        return str(entry), entry
    entry = library.get_pretrained_cfg(short)
    if entry is None or not entry.has_weights:
        raise WeightsError(missing)
    return f"timm:{entry.architecture}.{entry.tag}", entry


def imagenet_state(name: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of a network's ImageNet weights, and its SHA-256: that of torchvision's file.

    It is downloaded once, into torch's hub folder or that of timm. Raises WeightsError.
    """
    _, entry = imagenet(name)
    library, short = library_of(name)
    path, place = None, ""
    if library is models:
        path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
        place = f", or put {entry.url} at {path}"
    try:
        if path is None:
            state = library.create_model(short, pretrained=True).state_dict()
            return state, state_digest(state)
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state, file_digest(path)
    except Exception as error:  # no network, no room, a broken download: of any library's kind
        raise WeightsError(
            f"weights: 'imagenet' could not be downloaded for {name} ({one_line(error)}). Instead: "
            f"--weights PATH with a local state dict{place}, or --weights none to start from random "
            "weights"
        ) from error


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the names, dtypes, shapes and bytes of a state dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file of weights, in hex. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(
            f"weights: no file {path}; allowed: imagenet | none | a state dict's path"
        )
    try:
        return files.digest(path)
    except RecordError as error:
        raise WeightsError(f"weights: {error}") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, read without unpickling code. Raises WeightsError.

    It is the whole content, or the entry "model" or "state_dict" of a checkpoint. A prefix "module."
    of all names, which DataParallel leaves there, is cut off.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises anything on a file of another kind
        raise WeightsError(
            f"weights: {path} is not a readable state dict ({one_line(error)})"
        ) from error
    state = content
    if isinstance(content, Mapping):
        inner = (content[key] for key in ("model", "state_dict") if key in content)
        state = next((entry for entry in inner if isinstance(entry, Mapping)), content)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = type(state).__name__
        entries = (
            ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else f"a {kind}"
        )
        raise WeightsError(f"weights: {path} is no state dict of tensors; it holds {entries}")
    prefix = "module." if state and all(str(n).startswith("module.") for n in state) else ""
    if bad := finite.nonfinite_names({n: in_float32(t) for n, t in state.items()}):
        large = "" if finite.nonfinite_names(state) else " in float32"
        raise WeightsError(
            f"weights: {path} holds numbers that are not finite{large}, in {listing(bad)}"
        )
    return {str(name).removeprefix(prefix): tensor for name, tensor in state.items()}


def in_float32(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as a network gets them; those of other kinds as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], complaint: str) -> None:
    """Copy a state dict, its classifier left out, into a network; floating dtypes are converted.

    Raises WeightsError that goes on from `complaint` with the first name that is missing, the first
    that is unexpected, the first of another shape and the first of a dtype that is not allowed.
    """
    classifier = classifier_name(model) + "."
    state = {OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(classifier)}
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(classifier)}
    problems = []
    # state dicts of old torch versions have no batch counters; nothing here reads them
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    if missing:
        problems.append(f"missing {missing[0]} ({len(missing)} keys)")
    unexpected = [name for name in state if name not in own]
    if unexpected:
        problems.append(f"unexpected {unexpected[0]} ({len(unexpected)} keys)")
    shapes = [n for n in state if n in own and state[n].shape != own[n].shape]
    if shapes:
        theirs, ours = tuple(state[shapes[0]].shape), tuple(own[shapes[0]].shape)
        problems.append(f"{shapes[0]} has shape {theirs}, not {ours} ({len(shapes)} keys)")
    kinds = [n for n in state if n in own and not fits(state[n].dtype, own[n].dtype)]
    if kinds:
        theirs = str(state[kinds[0]].dtype).removeprefix("torch.")
        allowed = "allowed: float16 | bfloat16 | float32 | float64"
        problems.append(f"{kinds[0]} has dtype {theirs} ({len(kinds)} keys); {allowed}")
    if problems:
        raise WeightsError(f"weights: {complaint}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def fits(dtype: torch.dtype, own: torch.dtype) -> bool:
    """Whether numbers of a file may be converted to a network's: those with a fraction, or counters."""
    return dtype.is_floating_point if own.is_floating_point else not dtype.is_complex


def caveats(path: Path, digest: str) -> list[str]:
    """What a record must say about weights from a file, beside their hash."""
    name = f"weights {path.name} (sha256 {digest[:16]}...)"
    if "reconstructed" in path.name:
        return [
            f'{name}: results are not with "torchvision V1" but with a reconstruction of it; '
            f"approximate: {APPROXIMATE}"
        ]
    if path.is_relative_to(Path(__file__).parent):
        return []  # committed with the project: the data set's own words say what they are
    note = f'{name}: a local file, not checked to be "torchvision V1"'
    if (path.parent / "README.md").is_file():
        note += "; the README.md beside it may say what it is worth"
    return [note]


def one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- layers -----------------------------------------------------------------------------------


class LayerRow(NamedTuple):
    """A layer that can be shaped."""

    number: int  # from 1, among those of its kind
    name: str
    kind: str  # the module's class
    shapes: tuple[tuple[int, ...], ...]  # (C, H, W) of the output for an image, once for each size


def layer_table(name: str, image_size: int, after: str = "conv") -> list[LayerRow]:
    """The layers of one kind that a network has, with the numbers that --layers takes.

    Args:
        image_size: side of the input, in pixels.
        after: "conv", "bn" or "relu" (any activation).

    Raises ConfigError: no such network, kind or layer, or images of that size do not fit.
    """
    model = bare_model(name)
    try:
        with fastshape.attach(model, "all", mode="binarize", after=after) as attachment:
            names = attachment.names
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shapes = output_shapes(name, image_size)
    return [
        LayerRow(
            number, layer, type(model.get_submodule(layer)).__name__,
            tuple(dict.fromkeys(shapes.get(layer, ()))),
        )
        for number, layer in enumerate(names, 1)
    ]  # fmt: skip


def layer_lines(name: str, image_size: int, after: str = "conv") -> list[str]:
    """`layer_table` as text: a heading and a line per layer."""
    rows = layer_table(name, image_size, after)
    width = max(len(row.name) for row in rows)
    kinds = max(len(row.kind) for row in rows)
    lines = [f"{name}, {after} layers, output for one image of {image_size} x {image_size} pixels"]
    for row in rows:
        shapes = " | ".join(" x ".join(map(str, s)) for s in row.shapes) or "never called"
        lines.append(f"{row.number:4}  {row.name:{width}}  {row.kind:{kinds}}  {shapes}")
    return lines


@functools.cache
@own_defaults()
def output_shapes(name: str, image_size: int) -> Mapping[str, list[tuple[int, ...]]]:
    """Output shapes of a network's modules for one image: by name, one for each call, without batch.

    Raises ConfigError: no such network, or it does not take images of that size.
    """
    model, shapes = bare_model(name), {}

    def keep(layer: str, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(layer, []).append(tuple(output.shape[1:]))

    handles = [
        module.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
        for layer, module in model.named_modules()
    ]
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except Exception as error:  # the network's own code may raise anything
        raise ConfigError(
            f"image_size: {image_size} is not allowed for model {name}: {one_line(error)}"
        ) from error
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    return shapes


class FeatureTap:
    """Keeps what the classifier of a network got in the last forward.

    Attributes:
        features: (n, d), the pooled features, with their graph and in the dtype of the forward; None
            before the first forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.features: Tensor | None = None
        classifier = model.get_submodule(classifier_name(model))
        self._handle = classifier.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def remove(self) -> None:
        """Leave the network as it was. A second call does nothing."""
        self._handle.remove()
        self.features = None
