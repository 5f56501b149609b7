"""The two pictures of a run: how it learned, and what shaping does to an image's maps.

    python experiments/pictures.py augmentation.png --source cartoon --image-size 96

draws a third: training images by the reference pipeline, and by the one on the device below them.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from config import Config, resolve
from data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UnlabelledImages,
    load_domain,
    test_transform,
    train_transform,
)
from device_images import DeviceBatches
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import attach
from record import write_bytes
from torch import Tensor, nn
from train import TrainingImages

TARGET, SOURCE, HELD_OUT, INVALID, GREY = "#d1495b", "#2e6f95", "#5fa55a", "#b0a000", "#777777"
SIGNED, BINARY, SHARE = "RdBu_r", "gray", "viridis"
SHOWN_LAYERS = 6  # rows of maps.png; more do not fit on a page
BATCH = 8  # images in the pass that is drawn, as many as BatchNorm needs for sane statistics


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as png, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15)
    write_bytes(path, buffer.getvalue())


# --- curves -----------------------------------------------------------------------------------


def curves(path: Path, rows: Sequence[dict[str, Any]], config: Config) -> None:
    """Accuracy (percent) and training loss over the epochs of a run."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    shaped = f", layers {' '.join(map(str, config.layers))}" if config.layers else ""
    figure.suptitle(
        f"{config.mode}{shaped}: {config.source} to {config.target}, seed {config.seed}"
    )
    accuracy, loss = figure.subplots(1, 2)

    lines = [
        ("target_accuracy", f"{config.target} (target)", TARGET),
        ("source_train_accuracy", f"{config.source} (training images)", SOURCE),
        ("holdout_accuracy", f"{config.source} (held out)", HELD_OUT),
        ("invalid_test_accuracy", "INVALID: tested on training images", INVALID),
    ]
    for key, label, colour in lines:
        if key in rows[0]:
            values = [row[key] for row in rows]
            accuracy.plot(epochs, values, marker="o", ms=4, color=colour, label=label,
                          clip_on=False)  # fmt: skip
    counts = np.array(rows[-1]["target_confusion"])
    majority = 100 * counts.sum(1).max() / counts.sum()
    accuracy.axhline(majority, ls="--", lw=1, color=GREY, label="target's largest class")
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip

    losses = [row["train_loss"] for row in rows]
    loss.plot(epochs, losses, marker="o", ms=4, color=SOURCE)
    loss.set(title="Training loss", xlabel="epoch", ylabel="loss (mean per image, nats)")
    loss.set_ylim(0, max(losses) * 1.08)
    for earlier, later in zip(rows, rows[1:], strict=False):
        if later["lr"] != earlier["lr"]:
            loss.axvline(earlier["epoch"] + 0.5, ls=":", lw=1, color=GREY)
            loss.text(earlier["epoch"] + 0.5, 0.98, f" lr {later['lr']:g}", color=GREY, va="top",
                      transform=loss.get_xaxis_transform())  # fmt: skip
    for axes in (accuracy, loss):
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


# --- maps -------------------------------------------------------------------------------------


def maps(
    path: Path, model: nn.Module, config: Config, images: TrainingImages, layers: Sequence[str]
) -> None:
    """One source image at the shaped layers: before shaping, the map, after shaping.

    Drawn from a training pass of the trained network, on a copy: the model keeps its statistics.

    Args:
        model: trained, with nothing attached.
        layers: module names of the shaped layers. Of many, evenly spread ones are drawn.
    """
    picks = np.unique(np.linspace(0, len(layers) - 1, SHOWN_LAYERS).round().astype(int))
    shown = [layers[i] for i in picks]
    source_rows = spread(len(images.source_indices))
    source_rows = [int(images.source_indices[i]) for i in source_rows]
    inputs = network_input(images.source.images, source_rows, config)
    # the images whose maps are recorded, a batch for each of their domains; none in mode random
    recorded, domains = [], config.mask_sources or (config.target,)
    for name, (other, indices) in zip(domains, images.unlabelled, strict=False):
        other_rows = [int(indices[i]) for i in spread(len(indices))]
        recorded.append((name, other[other_rows[0]], network_input(other, other_rows, config)))
    target = [batch for _, _, batch in recorded]
    before, after = activations(model, config, shown, inputs, target, ones=False)
    # what shaping makes of a map of ones is the map it multiplies by, read without any inside
    _, mask = activations(model, config, shown, inputs, target, ones=True)

    pictures = [(f"source: {config.source}", images.source.images[source_rows[0]])]
    kind = "maps of" if config.mask_sources else "target:"
    pictures += [(f"{kind} {name}", picture) for name, picture, _ in recorded[:2]]
    figure = Figure(figsize=(12.5, 2.35 * (len(shown) + 1) + 0.6), layout="compressed")
    figure.suptitle(f"Activation shaping of one image: {describe(config)}")
    grid = figure.subplots(len(shown) + 1, 5, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[0]:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid[0], pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
    explain(grid[0, len(pictures)], config, len(shown), len(layers))
    for axes, name in zip(grid[1:], shown, strict=True):
        draw_layer(axes, model, name, before[name][0], mask[name][0], after[name][0], config)
    save(figure, path)


def spread(n: int) -> list[int]:
    """Up to BATCH positions, evenly over n; the first one drawn lies in the middle."""
    positions = np.unique(np.linspace(0, n - 1, BATCH).round().astype(int)).tolist()
    middle = len(positions) // 2
    return positions[middle:] + positions[:middle]


def network_input(images: np.ndarray, rows: Sequence[int], config: Config) -> Tensor:
    """float32 (len(rows), 3, S, S): those images as the network is tested on them."""
    dataset = UnlabelledImages(images, rows, test_transform(config.image_size))
    return torch.stack([dataset[i] for i in range(len(dataset))]).to(config.device)


@torch.no_grad()
def activations(
    model: nn.Module,
    config: Config,
    names: Sequence[str],
    inputs: Tensor,
    target: Sequence[Tensor],
    ones: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps (n, C, H, W) before and after shaping, by layer, in one training pass.

    Args:
        target: images whose maps are recorded first, in mode da; a batch for each domain.
        ones: feed the shaping of each layer ones instead of its activation.
    """
    model = copy.deepcopy(model).train()
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    torch.manual_seed(config.seed)  # both passes must draw the same random maps
    with attach(model, config) as attachment:
        if target:
            attachment.record(*target)
        for name in names:
            module = model.get_submodule(name)

            def first(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> Tensor:
                before.setdefault(name, output.detach().float().cpu().clone())
                return torch.ones_like(output) if ones else output

            def last(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                after.setdefault(name, output.detach().float().cpu().clone())

            module.register_forward_hook(first, prepend=True)
            module.register_forward_hook(last)
        model(inputs)
    return before, after


def describe(config: Config) -> str:
    if config.mode == "random":
        p_zero = ", ".join(f"{p:g}" for p in config.p_zero)
        unit = "" if config.mask_unit == "element" else f" per {config.mask_unit}"
        return f"random maps{unit}, p_zero {p_zero}"
    kind = "real-valued maps" if config.product else "binarized maps"
    top = "" if config.top_k is None else f", top {config.top_k:g}"
    return f"{kind} of {' and '.join(config.mask_sources) or 'the target'}{top}"


def explain(axes: Axes, config: Config, shown: int, total: int) -> None:
    """A few lines on how to read the rows below."""
    activation = "1[x > 0]" if config.binarize else "x"
    kind = "product of the other images' maps" if config.mask_sources else "map of the target image"
    kind = "map drawn at random" if config.mode == "random" else kind
    lines = [
        f"y = {activation} · m",
        "",
        "x  activation before shaping",
        f"m  {kind}",
        "y  what the next layer gets",
        "",
        "columns 1 to 3: one channel, in which x and m change sign often",
        "columns 4 and 5: mean over all channels of the layer",
    ]
    if shown < total:
        lines.append(f"{shown} of {total} shaped layers")
    text = axes.text(0.0, 1, "\n".join(lines), va="top", fontsize=10, transform=axes.transAxes)
    text.set_in_layout(False)  # it runs over the columns to its right; they are empty here


def signed(values: Tensor) -> dict[str, Any]:
    """Colours with white at zero."""
    limit = float(values.abs().max())
    return {"cmap": SIGNED, "vmin": -limit, "vmax": limit}


def draw_layer(
    row: np.ndarray,
    model: nn.Module,
    name: str,
    before: Tensor,
    mask: Tensor,
    after: Tensor,
    config: Config,
) -> None:
    """Five panels of one layer from its maps (C, H, W), or (C,), each then one pixel."""
    before, mask, after = (
        t.reshape(len(t), 1, 1) if t.dim() == 1 else t for t in (before, mask, after)
    )
    channels, height, width = before.shape
    # a channel that shows something: both its x and its map have zeros as well as ones
    not_zero = ((before > 0), (mask > config.epsilon))
    ones, kept = (t.flatten(1).float().mean(1) for t in not_zero)
    channel = int((ones * (1 - ones) * kept * (1 - kept)).argmax())
    binary = {"cmap": BINARY, "vmin": 0, "vmax": 1}
    map_title = "map m" if config.product else f"map m ({100 * kept[channel]:.0f} % ones)"
    x, m, y = before[channel], mask[channel], after[channel]
    mean_x, mean_y = before.mean(0), after.mean(0)
    panels = [
        ("before: x", x, signed(x)),
        (map_title, m, signed(m) if config.product else binary),
        ("after: y", y, binary if config.binarize else signed(y)),
        ("before: mean of x", mean_x, signed(mean_x)),
        ("after: mean of y", mean_y, {"cmap": SHARE} if config.binarize else signed(mean_y)),
    ]
    for axes, (title, values, look) in zip(row, panels, strict=True):
        drawn = axes.imshow(values.numpy(), interpolation="nearest", **look)
        axes.set_title(title, fontsize=9)
        bar = axes.figure.colorbar(drawn, ax=axes, pad=0.03, fraction=0.05)
        bar.ax.tick_params(labelsize=7)
        if look is binary:
            bar.set_ticks([0, 1])
    number = conv_number(model, name)
    row[0].set_ylabel(
        f"{'' if number is None else f'conv {number}: '}{name}\n"
        f"{channels} channels, {height} x {width}\nchannel {channel}",
        fontsize=9,
    )


def conv_number(model: nn.Module, name: str) -> int | None:
    """The reports' number of a convolution, from 1 in named_modules() order; None for others."""
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return convs.index(name) + 1 if name in convs else None


# --- augmentation -----------------------------------------------------------------------------


def augmentation(path: Path, config: Config, shown: int = 12, epochs: int = 3) -> float:
    """Source images as epochs see them: by the reference, and by `DeviceBatches` below.

    Returns the largest difference of a pixel, in 255ths.
    """
    images = load_domain(config.data, config.source, limit=config.limit, cache=config.cache).images
    rows = np.linspace(0, len(images) - 1, shown).astype(int)
    figure = Figure(figsize=(shown, 2.1 * epochs + 0.5), layout="constrained")
    grid = figure.subplots(2 * epochs, shown, squeeze=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    largest = 0.0
    for epoch, axes in zip(range(1, epochs + 1), grid.reshape(epochs, 2, shown), strict=True):
        transform = train_transform(config.image_size)
        dataset = UnlabelledImages(images, rows, transform, config.seed, epoch)
        reference = torch.stack([dataset[i] for i in range(shown)])
        device = next(iter(DeviceBatches(dataset, [list(range(shown))], config))).cpu()
        for name, line, batch in zip(
            ("reference", "device"), axes, (reference, device), strict=True
        ):
            line[0].set_ylabel(f"epoch {epoch}\n{name}", fontsize=8)
            for cell, image in zip(line, (batch * std + mean).clamp(0, 1), strict=True):
                cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
                cell.set(xticks=[], yticks=[])
        largest = max(largest, float(((reference - device) * std).abs().max()) * 255)
    figure.suptitle(
        f"{config.source}, {config.image_size} x {config.image_size}, seed {config.seed}: largest "
        f"difference of a pixel {largest:.2f} of 255"
    )
    save(figure, path)
    return largest


def main(arguments: Sequence[str] | None = None) -> None:
    from run import said  # which imports this module

    path, *switches = sys.argv[1:] if arguments is None else arguments
    config, _ = resolve(said(switches)[0])
    print(f"{path}: largest difference of a pixel {augmentation(Path(path), config):.2f} of 255")


if __name__ == "__main__":
    main()
