"""The two pictures of a run: how it learned, and what shaping does to the maps of an image."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from domainshift import files
from domainshift.config import Config
from domainshift.data.images import ShuffledImages, UnlabelledImages, test_transform
from domainshift.data.pairing import epoch_order
from domainshift.methods import Method
from domainshift.plotting import Axes, Figure, FigureCanvasAgg
from domainshift.records.results import percent
from domainshift.records.schema import EvaluationRecord, Row
from domainshift.training.loop import TrainingImages

SOURCE, HELD_OUT, INVALID, GREY = "#2e6f95", "#5fa55a", "#b0a000", "#777777"
TARGETS = ("#d1495b", "#8d5a97", "#e08e45", "#3a7d7c", "#9c6644")
SIGNED, BINARY, SHARE = "RdBu_r", "gray", "viridis"
MOST_LAYERS = 6  # rows of maps.png; more do not fit on a page
PAIRED = "paired as in epoch 1 of training"
BATCH = 8  # images in the drawn pass, enough for sensible BatchNorm statistics


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whichever backend matplotlib is set to. Raises RecordError."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15)
    files.write_bytes(path, content.getvalue())


# --- curves -----------------------------------------------------------------------------------


def curves(
    path: Path, rows: Sequence[Row], method: Method, evaluations: Sequence[EvaluationRecord]
) -> None:
    """Accuracy (percent) and training loss over the epochs of a run.

    Args:
        evaluations: the run's tests, whose accuracies are drawn at the epochs that have them.
    """
    config = method.config
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    words = method.words(config.as_dict())
    figure.suptitle(f"{words}; trained on {config.source}, seed {config.seed}", wrap=True)
    accuracy, loss = figure.subplots(1, 2)
    look = {"marker": "o", "ms": 4, "clip_on": False}

    trained = [percent(row.source_train_correct, row.source_train_total) for row in rows]
    epochs = [row.epoch for row in rows]
    accuracy.plot(epochs, trained, color=SOURCE, label=f"{config.source} (training images)", **look)
    targets = [record for record in evaluations if record.images == "all"]
    colours = {record.name: TARGETS[i % len(TARGETS)] for i, record in enumerate(targets)}
    for record in evaluations:
        points = [(row.epoch, row.tests[record.name]) for row in rows if record.name in row.tests]
        points = [(epoch, percent(count.correct, count.total)) for epoch, count in points]
        label, colour = {
            "all": (record.name, colours.get(record.name)),
            "holdout": (f"{record.domain} (held out)", HELD_OUT),
            "train": ("INVALID: tested on training images", INVALID),
        }[record.images]
        if points:
            accuracy.plot(*zip(*points, strict=True), color=colour, label=label, **look)
    if len(targets) == 1:
        accuracy.axhline(targets[0].majority_rate, ls="--", lw=1, color=GREY,
                         label=f"largest class of {targets[0].domain}")  # fmt: skip
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip

    losses = [row.train_loss for row in rows]
    loss.plot(epochs, losses, marker="o", ms=4, color=SOURCE)
    loss.set(title="Training loss", xlabel="epoch", ylabel="loss (mean per image, nats)")
    loss.set_ylim(0, max(losses) * 1.08 or 1)
    for earlier, later in zip(rows, rows[1:], strict=False):
        if later.lr != earlier.lr:
            loss.axvline(earlier.epoch + 0.5, ls=":", lw=1, color=GREY)
            loss.text(earlier.epoch + 0.5, 0.98, f" lr {later.lr:g}", color=GREY, va="top",
                      transform=loss.get_xaxis_transform())  # fmt: skip
    for axes in (accuracy, loss):
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


# --- maps -------------------------------------------------------------------------------------


def maps(path: Path, method: Method, images: TrainingImages) -> None:
    """One source image at the shaped layers: before shaping, the map, after shaping.

    Drawn from a training pass of the trained network, on a copy: the model keeps its statistics.

    Args:
        method: closed, so that nothing is attached to its model.
    """
    config, model, layers = method.config, method.model, method.layers
    picks = np.unique(np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int))
    names = [layers[i] for i in picks]
    places = spread(len(images.source_indices))
    rows = [int(images.source_indices[place]) for place in places]
    inputs = network_input(images.source.images, rows, config)
    pictures = [(f"source: {config.source}", images.source.images[rows[0]])]
    recorded = []  # images whose maps are recorded, a batch for each of their domains
    shuffled = getattr(config.options, "target_transform", "") == "shuffled"
    kind = ShuffledImages if shuffled else UnlabelledImages
    others = zip(method.others(config), images.others, strict=True)
    for number, (name, (other, _)) in enumerate(others):
        rows = beside(images, config, number, places)
        title = f"maps of {name}" + ", shuffled" * shuffled + f",\n{PAIRED}"
        pictures.append((title, other[rows[0]]))
        recorded.append(network_input(other, rows, config, kind))
    before, after = activations(method, names, inputs, recorded, ones=False)
    # shaping a map of ones gives the map that shaping multiplies by
    _, masks = activations(method, names, inputs, recorded, ones=True)

    figure = Figure(figsize=(12.5, 2.35 * (len(names) + 1) + 0.6), layout="compressed")
    figure.suptitle(f"Activation shaping of one image: {method.words(config.as_dict())}")
    grid = figure.subplots(len(names) + 1, 5, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid[0]:
        axes.set_axis_off()
    pictures = pictures[:3]
    for axes, (title, picture) in zip(grid[0], pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
    binary = all(is_binary(after[name][0]) for name in names)
    number = f"{len(names)} of {len(layers)} shaped layers" if len(names) < len(layers) else ""
    explain(grid[0, len(pictures)], method.map_words, binary, number)
    for axes, name in zip(grid[1:], names, strict=True):
        draw_layer(axes, title_of(model, name), before[name][0], masks[name][0], after[name][0])
    save(figure, path)


def spread(n: int) -> list[int]:
    """Up to BATCH of n places, evenly over them; the first one, which is drawn, is from the middle."""
    places = np.unique(np.linspace(0, n - 1, BATCH).round().astype(int)).tolist()
    middle = len(places) // 2
    return [*places[middle:], *places[:middle]]


def beside(images: TrainingImages, config: Config, number: int, places: Sequence[int]) -> list[int]:
    """The images of one other domain that epoch 1 puts beside source images.

    Args:
        number: of the domain among `images.others`.
        places: of the source images, among those to train on.
    """
    indices = images.others[number][1]
    sizes, pairing = (len(images.source_indices), len(indices)), config.options.pairing
    source, other = epoch_order(config.seed, 1, *sizes, pairing, number)
    partner = dict(zip(source.tolist(), other.tolist(), strict=True))
    return [int(indices[partner[place]]) for place in places]


def network_input(
    images: np.ndarray,
    rows: Sequence[int],
    config: Config,
    kind: type[UnlabelledImages] = UnlabelledImages,
) -> Tensor:
    """float32 (len(rows), 3, S, S): those images as the network is tested on them."""
    dataset = kind(images, rows, test_transform(config.image_size))
    return torch.stack([dataset[i] for i in range(len(dataset))]).to(config.device)


@torch.no_grad()
def activations(
    method: Method, names: Sequence[str], inputs: Tensor, recorded: Sequence[Tensor], *, ones: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps (n, C, H, W) before and after shaping, by layer, in one training pass.

    Args:
        recorded: images whose maps are recorded first, a batch for each domain.
        ones: feed the shaping of each layer ones in place of its activation.
    """
    model = copy.deepcopy(method.model).train()
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    torch.manual_seed(method.config.seed)  # both passes must draw the same random maps
    with method.attach(model, by_hooks(method.config)) as attachment:
        if recorded:
            attachment.record(*recorded)
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


def by_hooks(config: Config) -> Config:
    """The configuration with shaping on hooks: what one fused op does cannot be seen."""
    if "attach" not in config.options.names():
        return config
    options = config.options.model_copy(update={"attach": "hooks"})
    return config.model_copy(update={"options": options})


def explain(axes: Axes, map_words: str, binary: bool, number: str) -> None:
    """A few lines on how to read the rows below."""
    lines = [
        f"y = {'1[x > 0]' if binary else 'x'} · m",
        "",
        "x  activation before shaping",
        f"m  {map_words}",
        "y  input of the next layer",
        "",
        "columns 1 to 3: one channel, in which x and m change sign often",
        "columns 4 and 5: mean over all channels of the layer",
        number,
    ]
    text = axes.text(0.0, 1, "\n".join(lines), va="top", fontsize=10, transform=axes.transAxes)
    text.set_in_layout(False)  # it runs over the columns to its right, which are empty here


def is_binary(values: Tensor) -> bool:
    """Whether all values are between 0 and 1, as binarized ones are."""
    return bool(((values >= 0) & (values <= 1)).all())


def signed(values: Tensor) -> dict[str, Any]:
    """Colours with white at zero."""
    limit = float(values.abs().max())
    return {"cmap": SIGNED, "vmin": -limit, "vmax": limit}


def draw_layer(row: np.ndarray, title: str, before: Tensor, mask: Tensor, after: Tensor) -> None:
    """Five panels of one layer from its maps (C, H, W), or (C,), each then one pixel."""
    before, mask, after = (
        t.reshape(len(t), 1, 1) if t.dim() == 1 else t for t in (before, mask, after)
    )
    channels, height, width = before.shape
    real = not is_binary(mask)
    # a channel that shows something: its x and its map both have zeros and ones
    kept = mask > 0 if real else mask == 1
    ones, kept = ((t.flatten(1).float().mean(1)) for t in (before > 0, kept))
    channel = int((ones * (1 - ones) * kept * (1 - kept)).argmax())
    binary = {"cmap": BINARY, "vmin": 0, "vmax": 1}
    map_title = "map m" if real else f"map m ({100 * kept[channel]:.0f} % ones)"
    x, m, y = before[channel], mask[channel], after[channel]
    mean_x, mean_y = before.mean(0), after.mean(0)
    panels = [
        ("before: x", x, signed(x)),
        (map_title, m, signed(m) if real else binary),
        ("after: y", y, binary if is_binary(after) else signed(y)),
        ("before: mean of x", mean_x, signed(mean_x)),
        ("after: mean of y", mean_y, {"cmap": SHARE} if is_binary(after) else signed(mean_y)),
    ]
    for axes, (words, values, look) in zip(row, panels, strict=True):
        image = axes.imshow(values.numpy(), interpolation="nearest", **look)
        axes.set_title(words, fontsize=9)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.03, fraction=0.05)
        bar.ax.tick_params(labelsize=7)
        if look is binary:
            bar.set_ticks([0, 1])
    size = f"{channels} channels, {height} x {width}"
    row[0].set_ylabel(f"{title}\n{size}\nchannel {channel}", fontsize=9)


def title_of(model: nn.Module, name: str) -> str:
    """A layer's name, after its number if it is a convolution."""
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return f"conv {convs.index(name) + 1}: {name}" if name in convs else name
