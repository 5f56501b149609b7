"""The pictures of the report, as SVG that stands in an HTML page and takes its text colour.

They are drawn without pyplot, so no screen and no backend of the environment plays a part.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from domainshift.errors import BadInput
from domainshift.models import bare_model
from domainshift.plotting import Axes, Figure, matplotlib
from domainshift.records.results import Result, percent
from domainshift.report import switches
from domainshift.report.comparisons import (
    FIGURE,
    Comparison,
    Verdict,
    by_name,
    counted,
    signed,
    with_interval,
)
from domainshift.report.published import Published
from domainshift.report.statistics import mean, spread
from domainshift.report.study import Arm, Pair, Study, Table

INK = "#010203"  # stands for the page's text colour
OURS, THEIRS, REFERENCE = "#2f7fc1", "#d9822b", "#8a8a8a"
COLOURS = ("#2f7fc1", "#d9822b", "#3a9d6e", "#d1495b", "#8a63c2", "#7a6a58", "#c2a227", "#5fb0c9")
WIDTH = 7.2  # inches
TEXT, SMALLEST = 11.5, 10.5  # points; 420 pixels wide, 8.6 and 7.9 pixels
PANELS = 4  # source-target pairs that get a panel each; more share a matrix
CURVES = 14  # lines in a panel of learning curves
DEGREE = 4  # of the curve over p_zero
CONFUSED = 8  # arms whose confusions are drawn
NUMBERED = 12  # classes up to which a confusion matrix has numbers and named columns
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
        settle(self.figure)
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


def settle(figure: Figure) -> None:
    """Lay a figure out for good. Each further layout would move it by rounding errors."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


STYLE = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
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


def curves_by_seed(arm: Arm, pair: Pair) -> dict[int, dict[int, float]]:
    return {result.training.seed: curve(result) for result in arm.of(pair)}


def mean_curve(
    by_pair: Sequence[Mapping[int, Mapping[int, float]]],
) -> tuple[list[int], list[float], list[float] | None]:
    """The epochs that all curves have, with mean and standard deviation over seeds at each.

    The deviation is of each seed's mean over the pairs. It is None for one seed, and where pairs differ
    in their seeds.

    Args:
        by_pair: curves by seed, for each source-target pair.
    """
    curves = [curve for by_seed in by_pair for curve in by_seed.values()]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    centre = [mean([mean([c[e] for c in by_seed.values()]) for by_seed in by_pair]) for e in epochs]
    seeds = {frozenset(by_seed) for by_seed in by_pair}
    if len(seeds) != 1 or len(*seeds) < 2:
        return epochs, centre, None
    of_seeds = [[mean([c[seed][e] for c in by_pair]) for seed in sorted(*seeds)] for e in epochs]
    return epochs, centre, [spread(values) for values in of_seeds]


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
    bands = False
    for pairs, axes in drawn:
        for i, arm in enumerate(first):
            by_pair = [curves_by_seed(arm, pair) for pair in pairs if arm.of(pair)]
            x, y, sd = mean_curve(by_pair)
            if not x:
                continue
            style = {"color": COLOURS[i % len(COLOURS)], "ls": "-:"[i // len(COLOURS)]}
            if arm is table.baseline:
                style = {"color": REFERENCE, "ls": "--"}
            axes.plot(x, y, label=arm.name, lw=1.5, **style)
            if sd is not None:
                low, high = np.subtract(y, sd), np.add(y, sd)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
                bands = True
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn[-1][1].set_xlabel("epoch")
    legend(figure, drawn[0][1], 2)
    caption = "Accuracy on the target after each epoch, mean over the seeds there are."
    if bands:
        caption += " Bands: one standard deviation over seeds on each side; one seed has none."
    else:
        caption += " No line has a band of the spread: that needs several seeds."
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
        axes.set_title(title, fontsize=SMALLEST)
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
            background = colours((value - limits[0]) / (limits[1] - limits[0]))
            text = f"{value:.1f}" if absolute else f"{value:+.1f}"
            write_in_cell(axes, i, j, text, background)
    axes.set_xticks(
        np.arange(len(targets)) + 0.5, targets, fontsize=SMALLEST, rotation=25, ha="right"
    )
    axes.set_yticks(np.arange(len(sources)) + 0.5, sources, fontsize=SMALLEST)
    axes.invert_yaxis()
    plain(axes)


def write_in_cell(
    axes: Axes, row: int, column: int, text: str, background: Sequence[float]
) -> None:
    """A cell's number, black on light colours and white on dark ones."""
    red, green, blue, _ = background
    light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.55
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=SMALLEST,
              color="black" if light else "white")  # fmt: skip


def plain(axes: Axes) -> None:
    """Without grid, ticks and frame."""
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
        axes.set_xticks(range(len(layers)), names, rotation=40, ha="right", fontsize=SMALLEST)
        axes.set(ylabel="share of ones in the map", ylim=(0, 1.02))
        legend(figure, axes, 1)
    return Picture(
        "Density of the recorded maps by layer",
        figure,
        "Share of ones in the map that each shaped layer used last in training, mean and spread over "
        "trainings; of a real-valued map the share of positive values. In brackets the number of a "
        "convolution.",
    )


# --- primary comparisons ----------------------------------------------------------------------


class Look(NamedTuple):
    label: str
    colour: str
    marker: str


LOOKS = {
    Verdict.HIGHER: Look("higher", "#2f7fc1", "^"),
    Verdict.LOWER: Look("lower", "#d1495b", "v"),
    Verdict.EQUAL: Look("equal within the margin", "#3a9d6e", "s"),
    Verdict.UNDECIDED: Look("undecided or no verdict", "#8a8a8a", "o"),
}
VERDICTS_WIDTH = 1.1  # inches, of the column of words
NUMBERS = 1 - VERDICTS_WIDTH / WIDTH  # right end of the numbers, in parts of the figure
ROW = 0.28  # inches
HEADING = 72  # signs in a line


def look_of(c: Comparison) -> Look:
    return LOOKS.get(c.verdict, LOOKS[Verdict.UNDECIDED])


def forest(primary: Sequence[Comparison]) -> Picture | None:
    """Every primary comparison with its interval, in the order given; None without an estimate.

    A comparison's name stands above a row for each of its source-target pairs.
    """
    if not any(c.estimate for c in primary):
        return None
    groups = by_name(primary)
    with matplotlib.rc_context(STYLE):
        figure, axes, places = forest_axes(groups)
        for name, group in groups.items():
            draw_group(axes, name, group, places[name])
        axes.set_xlabel("difference in accuracy (points)")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        order = [look.label for look in LOOKS.values() if look.label in once]
        order += [label for label in once if label not in order]
        columns = 3 if len(order) > 4 else 2
        figure.legend([once[label] for label in order], order, loc="lower center", ncols=columns, handlelength=1.2,
                      frameon=False)  # fmt: skip
    caption = (
        "Each arm minus its reference after the last epoch, paired by seed. Point: mean. Line: 95 % "
        "interval; one seed has none. Colour and shape: verdict after Holm's correction over all rows."
    )
    margins = dict.fromkeys(c.margin for c in primary if c.margin is not None)
    if margins:
        words = " or ".join(f"{margin:g}" for margin in margins)
        caption += f" Band: the margin of {words} points, within which arms pass for equal."
    return Picture("Primary comparisons", figure, caption)


def forest_axes(
    groups: Mapping[str, Sequence[Comparison]],
) -> tuple[Figure, Axes, dict[str, float]]:
    """Axes with room for words at both sides, and the place of the first row of each group."""
    places, y = {}, 0.0
    for name, group in groups.items():
        y += heading_of(name).count("\n") + 1
        places[name] = y
        y += len(group) + 0.3
    longest = max(len(row_name(c, group)) for group in groups.values() for c in group)
    left, right, top, bottom = 0.25 + 0.095 * longest, 1.15 + VERDICTS_WIDTH, 0.05, 1.15  # inches
    height = ROW * y + top + bottom
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + right) / WIDTH,
                            ROW * y / height))  # fmt: skip
    axes.set_ylim(y - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    return figure, axes, places


def heading_of(name: str) -> str:
    return textwrap.fill(name, HEADING, break_long_words=False, break_on_hyphens=False)


def row_name(c: Comparison, group: Sequence[Comparison]) -> str:
    """The target, after its source where the group has several."""
    sources = {source for other in group for source, _ in other.pairs}
    if len(sources) < 2 or len(c.pairs) != 1:
        return c.target
    return " to ".join(c.pairs[0])


def draw_group(axes: Axes, name: str, group: Sequence[Comparison], first: float) -> None:
    """One comparison's rows from place `first` downwards, its name above them."""
    words = {"xycoords": ("figure fraction", "data"), "va": "center_baseline"}
    heading = heading_of(name)
    middle = first - (heading.count("\n") + 1) / 2 - 0.5
    axes.annotate(heading, (0, middle), ha="left", fontweight="bold", **words)
    ends = first - 0.5, first + len(group) - 0.5
    axes.plot([0, 0], ends, color=INK, lw=1, zorder=1)
    margin = group[0].margin
    if margin is not None:
        axes.fill_betweenx(ends, -margin, margin, color=REFERENCE, alpha=0.2, lw=0, zorder=0,
                           label=f"margin of {margin:g} points")  # fmt: skip
    for i, c in enumerate(group):
        y, e, look = first + i, c.estimate, look_of(c)
        axes.annotate(row_name(c, group), (0.02, y), ha="left", **words)
        if e is None:
            text = "no result yet"
        else:
            text = signed(e.mean) if e.low is None else with_interval(e)
            axes.plot([e.mean], [y], look.marker, ms=8, color=look.colour, label=look.label)
            if e.low is not None:
                axes.hlines(y, e.low, e.high, colors=look.colour, lw=2)
        axes.annotate(text, (NUMBERS, y), ha="right", **words)
        verdict = c.verdict.word if c.verdict and e else ""
        axes.annotate(verdict, (1, y), ha="right", **words)


# --- confusions -------------------------------------------------------------------------------


def confusions(study: Study, primary: Sequence[Comparison]) -> list[Picture]:
    """What each arm that a primary comparison is about takes for what, beside its first reference.

    Args:
        primary: comparisons of `study.primary`, for the pairs and seeds that both arms have.
    """
    references: dict[str, str] = {}
    for arm, reference in study.primary:
        references.setdefault(arm.name, reference.name)
    pictures = []
    for names in list(references.items())[:CONFUSED]:
        own = [c for c in primary if (c.arm.name, c.reference.name) == names and c.estimate]
        if own:
            pictures.append(confusion_picture(own))
    return pictures


def confusion_picture(compared: Sequence[Comparison]) -> Picture:
    """A row of panels for each source-target pair of one arm and one reference."""
    first = compared[:PANELS]
    arm, reference = first[0].arm.name, first[0].reference.name
    classes = [results_of(c, c.arm)[0].evaluation.classes for c in first]
    heights = [1.1 + max(1.9, 0.19 * len(names)) for names in classes]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
        grid = figure.subplots(len(first), 2, squeeze=False, height_ratios=heights,
                               width_ratios=(1.25, 1))  # fmt: skip
        for (left, right), c, names in zip(grid, first, classes, strict=True):
            draw_confusion(left, confusion_of(results_of(c, c.arm)), names)
            left.set_title(" to ".join(c.pairs[0]), loc="left")
            draw_classes(right, c)
        legend(figure, grid[0, 1], 2)
    caption = (
        f"Left: {arm} after the last epoch. Rows are the true classes and columns the predicted ones, "
        "in percent of the row, all seeds together; less than half a percent has no number. Right: accuracy by class, mean and standard "
        f"deviation over seeds, of {arm} and {reference}. Only seeds that both have."
    )
    if len(compared) > len(first):
        caption += f" The first {len(first)} of {len(compared)} source-target pairs."
    return Picture(f"Confusions of {arm}", figure, caption)


def results_of(c: Comparison, arm: Arm) -> list[Result]:
    """An arm's results on a comparison's one pair, of the seeds that it compares."""
    return [arm.results[(*c.pairs[0], seed)] for seed in c.seeds]


def confusion_of(results: Sequence[Result]) -> np.ndarray:
    """Percent of each true class that is called each class, the results together.

    A class without images has NaN.
    """
    counts = np.sum([result.evaluation.confusion for result in results], axis=0, dtype=float)
    with np.errstate(invalid="ignore"):
        return 100 * counts / counts.sum(1, keepdims=True)


def draw_confusion(axes: Axes, shares: np.ndarray, classes: Sequence[str]) -> None:
    colours, n = matplotlib.colormaps["Blues"], len(classes)
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=100,
                    edgecolors="none")  # fmt: skip
    ticks = np.arange(n) + 0.5
    axes.set_yticks(ticks, classes, fontsize=SMALLEST)
    axes.set_xticks([])
    axes.set_xlabel("predicted, in the order of the rows")
    if n <= NUMBERED:
        axes.set_xticks(ticks, classes, fontsize=SMALLEST, rotation=40, ha="right")
        axes.set_xlabel("predicted")
        for (i, j), share in np.ndenumerate(shares):
            if share >= 0.5:
                write_in_cell(axes, i, j, f"{share:.0f}", colours(share / 100))
    axes.set_ylabel("true")
    axes.set_ylim(n, 0)
    plain(axes)


def draw_classes(axes: Axes, c: Comparison) -> None:
    """Accuracy by class of an arm and its reference, in the order of the rows to their left."""
    for arm, offset, colour in ((c.arm, -0.2, OURS), (c.reference, 0.2, REFERENCE)):
        one_by_one = [confusion_of([result]).diagonal() for result in results_of(c, arm)]
        by_class = np.transpose(one_by_one).tolist()
        y = np.arange(len(by_class)) + 0.5 + offset
        error = [spread(values) for values in by_class] if len(one_by_one) > 1 else None
        axes.barh(y, [mean(values) for values in by_class], 0.38, xerr=error, color=colour,
                  label=arm.name, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})  # fmt: skip
    axes.set(ylim=(len(by_class), 0), xlim=(0, 100), yticks=[], xlabel="accuracy by class (%)")
    axes.set_axisbelow(True)


# --- cost -------------------------------------------------------------------------------------


def cost(study: Study) -> Picture | None:
    """Seconds of a training by arm, of the trainings on the device that has most of them.

    Arms that test the same trainings share a bar.
    """
    used = trainings(study.used)
    if not used:
        return None
    devices = Counter(map(device_of, used))
    device = max(devices, key=devices.__getitem__)  # of equals the first
    bars: dict[frozenset[str], tuple[list[str], list[Result]]] = {}
    for arm in study.arms.values():
        own = [r for r in trainings(arm.results.values()) if device_of(r) == device]
        if own:
            key = frozenset(str(result.folder) for result in own)
            bars.setdefault(key, ([], own))[0].append(arm.name)
    baseline = next((table.baseline.name for table in study.tables if table.baseline), None)
    with matplotlib.rc_context(STYLE):
        figure = draw_cost(list(bars.values()), baseline)
    caption = (
        "Seconds of one training with the tests after its epochs, mean over the trainings of an arm, "
        f"and the source images that it trained on a second. All on {device}."
    )
    if len(devices) > 1:
        rest = counted(len(used) - devices[device], "training")
        caption += f" Left out, since times on several devices do not compare: {rest}."
    return Picture("Cost of a training by arm", figure, caption)


def device_of(result: Result) -> str:
    """The device of a training in words, with what else decides its speed."""
    versions = result.training.versions
    parts = [versions["device"]]
    parts += [counted(versions["threads"], "thread")] if versions["threads"] else []
    parts += [f"{versions['processes']} processes"] if versions["processes"] > 1 else []
    return ", ".join(parts)


def draw_cost(
    bars: Sequence[tuple[Sequence[str], Sequence[Result]]], baseline: str | None
) -> Figure:
    names = [textwrap.fill(", ".join(arms), 34) for arms, _ in bars]
    lines = [name.count("\n") + 1 for name in names]
    y = np.cumsum(lines) - np.array(lines) / 2
    figure = Figure(figsize=(WIDTH, 0.22 * sum(lines) + 0.9), layout="constrained")
    axes = figure.subplots()
    seconds = [mean([r.summary["seconds"] for r in results]) for _, results in bars]
    speeds = [mean([r.training.images_per_second for r in results]) for _, results in bars]
    of_baseline = [
        length for (arms, _), length in zip(bars, seconds, strict=True) if baseline in arms
    ]
    axes.barh(y, seconds, 0.7, color=OURS)
    for (arms, _), place, length, speed in zip(bars, y, seconds, speeds, strict=True):
        text = f"{length:.0f} s, {speed:.0f} images/s"
        if of_baseline and baseline not in arms:
            text += f", {length / of_baseline[0]:.2f} x {baseline}"
        axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center",
                      fontsize=SMALLEST)  # fmt: skip
    axes.set_yticks(y, names, fontsize=SMALLEST)
    axes.set(ylim=(sum(lines), 0), xlabel="seconds of a training")
    axes.set_xlim(0, (2.0 if of_baseline else 1.4) * max(seconds))  # room for the words
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    return figure
