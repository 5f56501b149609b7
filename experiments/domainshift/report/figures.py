"""The pictures of the report, as SVG that stands in an HTML page and takes its text colour.

They are drawn without pyplot, so no screen and no backend of the environment plays a part.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from domainshift.errors import BadInput
from domainshift.models import bare_model
from domainshift.records.results import Result, percent
from domainshift.report import switches
from domainshift.report.comparisons import FIGURE
from domainshift.report.published import Published
from domainshift.report.statistics import mean, spread
from domainshift.report.study import Arm, Pair, Table

INK = "#010203"  # stands for the page's text colour
OURS, THEIRS, REFERENCE = "#2f7fc1", "#d9822b", "#8a8a8a"
COLOURS = ("#2f7fc1", "#d9822b", "#3a9d6e", "#d1495b", "#8a63c2", "#7a6a58", "#c2a227", "#5fb0c9")
WIDTH = 7.2  # inches
PANELS = 4  # source-target pairs that get a panel each; more share a matrix
CURVES = 14  # lines in a panel of learning curves
DEGREE = 4  # of the curve over p_zero
PLACE = ("layers", "after", "every")  # switches that say where a method acts

PublishedOf = Mapping[tuple[str, Pair], Published]  # by name of the arm


class Picture(NamedTuple):
    title: str
    figure: Figure
    caption: str

    @property
    def svg(self) -> str:
        """An <svg> element; the same bytes for the same figure."""
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title}):
            self.figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight",
                                metadata={"Date": None, "Creator": None})  # fmt: skip
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        # names that nothing refers to, and that each figure would have again
        used = set(re.findall(r"#([\w-]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
        return text.replace(INK, "currentColor").strip()


STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor", "grid.color"), INK),
}


def pictures(table: Table, published: PublishedOf) -> list[Picture]:
    """Every figure that a table's arms make sense of."""
    with matplotlib.rc_context(STYLE):
        candidates = [
            over_p_zero(table, published),
            by_position(table, published),
            matrix(table),
            learning_curves(table),
        ]
    return [picture for picture in candidates if picture is not None]


def panels(
    table: Table, arms: Sequence[Arm], height: float
) -> tuple[Figure, list[tuple[Pair, Axes]]]:
    """One panel for each source-target pair of `arms`, below one another."""
    pairs = [pair for pair in table.pairs if any(arm.of(pair) for arm in arms)][:PANELS]
    figure, axes = titled([f"{source} to {target}" for source, target in pairs], arms, height)
    return figure, list(zip(pairs, axes, strict=True))


def titled(titles: Sequence[str], arms: Sequence[Arm], height: float) -> tuple[Figure, list[Axes]]:
    legend_height = 0.1 * min(len(arms), CURVES)  # two columns wide
    size = (WIDTH, height * len(titles) + 0.5 + legend_height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(titles), 1, squeeze=False, sharex=True)[:, 0]
    for title, panel in zip(titles, axes, strict=True):
        panel.set_title(title, loc="left")
        panel.set_ylabel("accuracy (%)")
    return figure, list(axes)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def accuracies(arm: Arm, pair: Pair) -> list[float]:
    return [result.summary[FIGURE] for result in arm.of(pair)]


def draw_points(axes: Axes, points: Sequence[tuple[float, list[float]]]) -> None:
    """Mean and, of several seeds, spread at each x."""
    points = sorted((x, values) for x, values in points if values)
    draw_spread(axes, [x for x, _ in points], [values for _, values in points], ms=5, color=OURS,
                label="ours, mean and spread over seeds")  # fmt: skip


def draw_spread(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **style: object
) -> None:
    error = [spread(v) or 0 for v in values]
    axes.errorbar(x, [mean(v) for v in values], error if any(error) else None, fmt="o", capsize=3,
                  **style)  # fmt: skip


def draw_published(
    axes: Axes, points: Sequence[tuple[float, Published | None]]
) -> list[tuple[float, float]]:
    """The valid figures, which are returned."""
    valid = [(x, p.accuracy) for x, p in points if p and p.status == "valid"]
    if valid:
        axes.plot(*zip(*valid, strict=True), "s", mfc="none", color=THEIRS, label="published")
    return valid


def draw_baseline(axes: Axes, table: Table, pair: Pair) -> None:
    values = accuracies(table.baseline, pair) if table.baseline else []
    if values:
        centre, sd = mean(values), spread(values)
        label = f"ours: {table.baseline.name}"
        axes.axhline(centre, ls="--", lw=1.2, color=REFERENCE, label=label)
        if sd is not None:
            axes.axhspan(centre - sd, centre + sd, color=REFERENCE, alpha=0.15, lw=0)


def alike(arms: Iterable[Arm], apart: Sequence[str]) -> list[list[Arm]]:
    """Arms in groups that differ in the switches `apart` alone."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.one:
            key = repr(
                [item for item in switches.method_values(arm.one).items() if item[0] not in apart]
            )
            groups.setdefault(key, []).append(arm)
    return list(groups.values())


# --- accuracy over p_zero ---------------------------------------------------------------------


def constant_p_zero(arm: Arm) -> float | None:
    p_zero = arm.one.config.get("p_zero")
    return p_zero[0] if p_zero and len(set(p_zero)) == 1 else None


def over_p_zero(table: Table, published: PublishedOf) -> Picture | None:
    """Accuracy over p_zero at one place, with the fitted curve."""
    groups = [
        g for g in alike(table.arms, ["p_zero"]) if all(constant_p_zero(a) is not None for a in g)
    ]
    arms = max(groups, key=len, default=[])
    if len(arms) < 3:
        return None
    figure, drawn = panels(table, arms, 3.2)
    fitted = False
    for pair, axes in drawn:
        points = [(constant_p_zero(arm), accuracies(arm, pair)) for arm in arms]
        draw_points(axes, points)
        fitted |= draw_fit(axes, [(x, mean(v)) for x, v in points if v], OURS, "fit to ours")
        theirs = [(constant_p_zero(a), published.get((a.name, pair))) for a in arms]
        valid = draw_published(axes, theirs)
        fitted |= draw_fit(axes, valid, THEIRS, "fit to published")
        other = [(x, p.accuracy) for x, p in theirs if p and p.status != "valid"]
        if other:
            axes.plot(*zip(*other, strict=True), "x", color=THEIRS, label="published, no run")
        draw_baseline(axes, table, pair)
    drawn[-1][1].set_xlabel("p0, the share of zeros in the random map")
    legend(figure, drawn[0][1], 3)
    caption = "Accuracy on the target after the last epoch over p0."
    if fitted:
        caption += (
            f" Curves: least-squares polynomials of degree {DEGREE}, of the published figures through "
            "those that were run. The report does not state its curve; this degree comes nearest to "
            "what it read off."
        )
    return Picture(f"Accuracy over p0: {table.title}", figure, caption)


def draw_fit(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str) -> bool:
    """A curve through at least DEGREE + 2 points; fewer would fit anything."""
    if len({x for x, _ in points}) < DEGREE + 2:
        return False
    x, y = np.array(sorted(points)).T
    dense = np.linspace(x.min(), x.max(), 100)
    axes.plot(dense, np.polyval(np.polyfit(x, y, DEGREE), dense), lw=1.2, color=colour, label=label)
    return True


# --- accuracy by position ---------------------------------------------------------------------


@functools.cache
def convolutions(model: str) -> dict[str, int]:
    """Numbers of a network's convolutions, from 1, by name; {} for a network that is not there."""
    try:
        modules = bare_model(model).named_modules()
    except BadInput:
        return {}
    names = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    return {name: number for number, name in enumerate(names, 1)}


def place_of(arm: Arm) -> int | None:
    """Number of the one convolution that an arm shapes."""
    layers = arm.one.training.layers
    return convolutions(arm.one.config["model"]).get(layers[0]) if len(layers) == 1 else None


def by_position(table: Table, published: PublishedOf) -> Picture | None:
    groups = [g for g in alike(table.arms, ["layers"]) if all(place_of(a) is not None for a in g)]
    arms = max(groups, key=len, default=[])
    if len(arms) < 3:
        return None
    figure, drawn = panels(table, arms, 2.8)
    for pair, axes in drawn:
        draw_points(axes, [(place_of(arm), accuracies(arm, pair)) for arm in arms])
        draw_published(axes, [(place_of(a), published.get((a.name, pair))) for a in arms])
        draw_baseline(axes, table, pair)
        axes.set_xticks(sorted(place_of(arm) for arm in arms))
    downsample = [str(n) for name, n in convolutions(arms[0].one.config["model"]).items()
                  if "downsample" in name]  # fmt: skip
    which = f" ({', '.join(downsample)} are downsample layers)" if downsample else ""
    drawn[-1][1].set_xlabel(f"convolution{which}")
    most = max((axes for _, axes in drawn), key=lambda a: len(a.get_legend_handles_labels()[0]))
    legend(figure, most, 3)
    return Picture(
        f"Accuracy by position: {table.title}",
        figure,
        "Accuracy on the target after the last epoch by the one convolution that is shaped.",
    )


# --- learning curves --------------------------------------------------------------------------


def curve(result: Result) -> dict[int, float]:
    """Accuracy on the target by epoch, where a test followed it."""
    name = result.evaluation.name
    tests = ((row.epoch, row.tests.get(name)) for row in result.rows)
    return {epoch: percent(test.correct, test.total) for epoch, test in tests if test}


def learning_curves(table: Table) -> Picture | None:
    """A panel a source-target pair; of many pairs one panel, of the mean over those all arms have."""
    arms = [arm for arm in table.compared if arm.one and len(curve(arm.one)) > 1]
    if not arms:
        return None
    first = arms[:CURVES]
    if len(table.pairs) > PANELS:
        common = [pair for pair in table.pairs if all(arm.of(pair) for arm in first)]
        if not common:
            return None
        figure, axes = titled([f"mean over {len(common)} source-target pairs"], first, 3.6)
        drawn = [(common, axes[0])]
    else:
        figure, drawn = panels(table, first, 2.8)
        drawn = [([pair], axes) for pair, axes in drawn]
    many = len(first) > len(COLOURS)
    for pairs, axes in drawn:
        for i, arm in enumerate(first):
            by_pair = [[curve(r) for r in results] for results in map(arm.of, pairs) if results]
            epochs = set.intersection(*(set(c) for curves in by_pair for c in curves)) if by_pair else ()  # fmt: skip
            if not epochs:
                continue
            shades = matplotlib.colormaps["viridis"]
            style = {"color": shades(0.25 + 0.7 * i / len(first)) if many else COLOURS[i]}
            if arm is table.baseline:
                style = {"color": REFERENCE, "ls": "--"}
            x = sorted(epochs)
            y = [mean([mean([c[e] for c in curves]) for curves in by_pair]) for e in x]
            axes.plot(x, y, label=arm.name, lw=1.5, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn[-1][1].set_xlabel("epoch")
    legend(figure, drawn[0][1], 2)
    caption = "Accuracy on the target after each epoch, mean over the seeds there are."
    if len(table.pairs) > PANELS:
        share = f"{len(common)} of {len(table.pairs)}"
        caption += f" Pairs: those of which every arm here has a run, {share}."
    if len(arms) > len(first):
        caption += f" The first {len(first)} of {len(arms)} arms."
    return Picture(f"Learning curves: {table.title}", figure, caption)


# --- source-target pairs ----------------------------------------------------------------------


def matrix(table: Table) -> Picture | None:
    """Source by target: the baseline's accuracy, and what each other arm adds to it."""
    sources, targets = (sorted({pair[i] for pair in table.pairs}) for i in (0, 1))
    arms = [arm for arm in table.compared if arm.one]
    if len(sources) < 2 or not arms:
        return None
    base = table.baseline if table.baseline in arms else None
    rows = math.ceil(len(arms) / 2)
    figure = Figure(figsize=(WIDTH, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    values = []
    for arm in arms:
        of = base if arm is not base else None
        cells = [[paired(arm, of, (source, target)) for target in targets] for source in sources]
        values.append(np.array(cells, dtype=float))  # None becomes NaN
    sizes = [np.abs(v[np.isfinite(v)]) for arm, v in zip(arms, values, strict=True) if arm is not base]  # fmt: skip
    # one scale for all differences, so that colours compare
    largest = max((float(v.max()) for v in sizes if v.size), default=1.0) or 1.0
    for axes, arm, cells in zip(grid.flat, arms, values, strict=False):
        absolute = arm is base or base is None
        limits = (0, 100) if absolute else (-largest, largest)
        draw_matrix(axes, cells, limits, sources, targets)
        title = f"{arm.name}, %" if absolute else f"{arm.name} minus {base.name}"
        axes.set_title(title, fontsize=9)
    for axes in grid.flat[len(arms) :]:
        axes.set_axis_off()
    return Picture(
        f"Source-target pairs: {table.title}",
        figure,
        "Rows: trained on. Columns: tested on. Accuracy after the last epoch (%), and differences to it "
        "in points, mean over the seeds that both have. Empty: the diagonal, or no run yet.",
    )


def paired(arm: Arm, base: Arm | None, pair: Pair) -> float | None:
    """Mean over seeds of an arm's accuracy on a pair, less the base's where there is one."""
    ours = {result.key: result.summary[FIGURE] for result in arm.of(pair)}
    if base is None:
        return mean(list(ours.values())) if ours else None
    theirs = {result.key: result.summary[FIGURE] for result in base.of(pair)}
    both = [ours[key] - theirs[key] for key in ours if key in theirs]
    return mean(both) if both else None


def draw_matrix(
    axes: Axes,
    values: np.ndarray,
    limits: tuple[float, float],
    sources: Sequence[str],
    targets: Sequence[str],
) -> None:
    absolute = limits[0] == 0
    colours = matplotlib.colormaps["Blues" if absolute else "RdBu"]
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=limits[0], vmax=limits[1],
                    edgecolors="none")  # fmt: skip
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colours((value - limits[0]) / (limits[1] - limits[0]))
            light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.55
            axes.text(j + 0.5, i + 0.5, f"{value:.1f}" if absolute else f"{value:+.1f}", ha="center",
                      va="center", fontsize=9, color="black" if light else "white")  # fmt: skip
    axes.set_xticks(np.arange(len(targets)) + 0.5, targets, fontsize=8, rotation=25, ha="right")
    axes.set_yticks(np.arange(len(sources)) + 0.5, sources, fontsize=8)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# --- the density of maps ----------------------------------------------------------------------


def trainings(results: Iterable[Result]) -> list[Result]:
    """One result of each training."""
    return list({result.folder: result for result in results}.values())


def kind_of(result: Result) -> str:
    """The method in words, wherever it acts: its title, and the options that are not the default."""
    method = switches.method_of(result)
    options = [
        f"{name} {switches.words(value)}"
        for name, value in switches.method_values(result).items()
        if name in method.Options.model_fields
        and name not in (*PLACE, "at_eval")
        and value != switches.default_of(method, name)
    ]
    mode = switches.mode_of(result)
    return ", ".join([method.title if method.name == mode else mode, *options])


def densities(results: Iterable[Result]) -> dict[str, dict[str, list[float]]]:
    """Share of ones in each layer's last map, one a training, by kind of recorded map and by layer."""
    shares: dict[str, dict[str, list[float]]] = {}
    for result in trainings(results):
        if "p_zero" in result.config:  # known beforehand
            continue
        for layer, share in result.training.density.items():
            shares.setdefault(kind_of(result), {}).setdefault(layer, []).append(share)
    return shares


def random_densities(results: Iterable[Result]) -> list[float]:
    """Distances of the random maps' densities from 1 - p_zero, one a training and layer."""
    distances = []
    for result in trainings(results):
        p_zero, training = result.config.get("p_zero"), result.training
        if p_zero is not None:
            p_zero = list(p_zero) * (len(training.layers) if len(p_zero) == 1 else 1)
            shares = (training.density.get(layer) for layer in training.layers)
            pairs = zip(shares, p_zero, strict=True)
            distances += [abs(s - 1 + p) for s, p in pairs if s is not None]
    return distances


def density(results: Sequence[Result]) -> Picture | None:
    """Density of the recorded maps by layer."""
    kinds = densities(results)
    if not kinds:
        return None
    numbers: dict[str, int] = {}
    for model in dict.fromkeys(result.config["model"] for result in results):
        numbers = convolutions(model) | numbers
    present = dict.fromkeys(layer for by_layer in kinds.values() for layer in by_layer)
    layers = sorted(present, key=lambda layer: numbers.get(layer, len(numbers) + 1))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6 + 0.12 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        for i, (kind, by_layer) in enumerate(sorted(kinds.items())):
            x = [layers.index(layer) for layer in by_layer]
            colour = COLOURS[i % len(COLOURS)]
            draw_spread(axes, x, list(by_layer.values()), ms=6, label=kind, color=colour)
        names = [f"{n} ({numbers[n]})" if n in numbers else n for n in layers]
        axes.set_xticks(range(len(layers)), names, rotation=40, ha="right", fontsize=8)
        axes.set(ylabel="share of ones in the map", ylim=(0, 1.02))
        legend(figure, axes, 1)
    return Picture(
        "Density of the recorded maps by layer",
        figure,
        "Share of ones in the map that each shaped layer used last in training, mean and spread over "
        "trainings; of a real-valued map the share of positive values. In brackets the number of a "
        "convolution.",
    )
