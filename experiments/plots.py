"""The figures of the report, as SVG that stands in an HTML page and takes its text colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from audit import conv_number, modules
from findings import FIGURE
from intervals import mean, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from published import Published
from study import METHOD, Arm, Pair, Run, Table

INK = "#010203"  # stands for the page's text colour
OURS, THEIRS, REFERENCE = "#2f7fc1", "#d9822b", "#8a8a8a"
COLOURS = ("#2f7fc1", "#d9822b", "#3a9d6e", "#d1495b", "#8a63c2", "#7a6a58", "#c2a227", "#5fb0c9")
WIDTH = 7.2  # inches
PANELS = 4  # source-target pairs that get a panel each; of more there is a matrix
CURVES = 14  # lines in a panel of learning curves
DEGREE = 4  # of the curve over p0

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
        found = [
            over_p_zero(table, published),
            by_position(table, published),
            matrix(table),
            learning_curves(table),
        ]
    return [picture for picture in found if picture is not None]


def panels(
    table: Table, arms: Sequence[Arm], height: float
) -> tuple[Figure, list[tuple[Pair, Axes]]]:
    """One panel for each source-target pair of `arms`, below one another."""
    pairs = [pair for pair in table.pairs if any(arm.of(pair) for arm in arms)][:PANELS]
    figure, axes = titled([f"{source} to {target}" for source, target in pairs], arms, height)
    return figure, list(zip(pairs, axes, strict=True))


def titled(titles: Sequence[str], arms: Sequence[Arm], height: float) -> tuple[Figure, list[Axes]]:
    # of the legend, two columns wide
    below = 0.1 * len(arms) if len(arms) <= CURVES else 0.1 * CURVES
    figure = Figure(figsize=(WIDTH, height * len(titles) + 0.5 + below), layout="constrained")
    axes = figure.subplots(len(titles), 1, squeeze=False, sharex=True)[:, 0]
    for title, panel in zip(titles, axes, strict=True):
        panel.set_title(title, loc="left")
        panel.set_ylabel("accuracy (%)")
    return figure, list(axes)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def figures_of(arm: Arm, pair: Pair) -> list[float]:
    return [run.summary[FIGURE] for run in arm.of(pair)]


def draw_points(axes: Axes, points: Sequence[tuple[float, list[float]]], label: str) -> None:
    """Mean and, of several seeds, spread at each x."""
    points = sorted((x, values) for x, values in points if values)
    x, y = [x for x, _ in points], [mean(values) for _, values in points]
    error = [spread(values) or 0 for _, values in points]
    axes.errorbar(x, y, yerror_or_none(error), fmt="o", ms=5, capsize=3, color=OURS, label=label)


def yerror_or_none(error: Sequence[float]) -> Sequence[float] | None:
    return error if any(error) else None


def draw_baseline(axes: Axes, table: Table, pair: Pair) -> None:
    values = figures_of(table.baseline, pair) if table.baseline else []
    if values:
        axes.axhline(
            mean(values), ls="--", lw=1.2, color=REFERENCE, label=f"ours: {table.baseline.name}"
        )
        if len(values) > 1:
            sd = spread(values)
            axes.axhspan(mean(values) - sd, mean(values) + sd, color=REFERENCE, alpha=0.15, lw=0)


# --- accuracy over p0 -------------------------------------------------------------------------


def alike(arms: Sequence[Arm], apart: Sequence[str]) -> list[list[Arm]]:
    """Arms in groups that differ in the switches `apart` alone."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.one:
            key = repr([arm.one.config[n] for n in METHOD if n not in apart])
            groups.setdefault(key, []).append(arm)
    return list(groups.values())


def constant_p_zero(arm: Arm) -> float | None:
    p_zero = arm.one.config["p_zero"] if arm.one else None
    return p_zero[0] if p_zero and len(set(p_zero)) == 1 else None


def over_p_zero(table: Table, published: PublishedOf) -> Picture | None:
    """Accuracy over p0 at one place, with the fitted curve."""
    groups = [
        g for g in alike(table.arms, ["p_zero"]) if all(constant_p_zero(a) is not None for a in g)
    ]
    arms = max(groups, key=len, default=[])
    if len(arms) < 3:
        return None
    figure, drawn = panels(table, arms, 3.2)
    fitted = False
    for pair, axes in drawn:
        points = [(constant_p_zero(arm), figures_of(arm, pair)) for arm in arms]
        draw_points(axes, points, "ours, mean and spread over seeds")
        fitted |= draw_fit(axes, [(x, mean(v)) for x, v in points if v], OURS, "fit to ours")
        theirs = [(constant_p_zero(a), published.get((a.name, pair))) for a in arms]
        valid = [(x, p.accuracy) for x, p in theirs if p and p.status == "valid"]
        other = [(x, p.accuracy) for x, p in theirs if p and p.status != "valid"]
        if valid:
            axes.plot(*zip(*valid, strict=True), "s", mfc="none", color=THEIRS, label="published")
            fitted |= draw_fit(axes, valid, THEIRS, "fit to published")
        if other:
            axes.plot(*zip(*other, strict=True), "x", color=THEIRS, label="published, no run")
        draw_baseline(axes, table, pair)
    drawn[-1][1].set_xlabel("p0, the share of zeros in the random map")
    legend(figure, drawn[0][1], 3)
    caption = "Accuracy on the target at the last epoch over p0."
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


def place_of(arm: Arm) -> int | None:
    """Number of the one convolution that an arm shapes."""
    layers = arm.one.layers if arm.one else ()
    return conv_number(layers[0]) if len(layers) == 1 else None


def by_position(table: Table, published: PublishedOf) -> Picture | None:
    groups = [g for g in alike(table.arms, ["layers"]) if all(place_of(a) is not None for a in g)]
    arms = max(groups, key=len, default=[])
    if len(arms) < 3:
        return None
    figure, drawn = panels(table, arms, 2.8)
    for pair, axes in drawn:
        points = [(place_of(arm), figures_of(arm, pair)) for arm in arms]
        draw_points(axes, points, "ours, mean and spread over seeds")
        theirs = [(place_of(a), published.get((a.name, pair))) for a in arms]
        valid = [(x, p.accuracy) for x, p in theirs if p and p.status == "valid"]
        if valid:
            axes.plot(*zip(*valid, strict=True), "s", mfc="none", color=THEIRS, label="published")
        draw_baseline(axes, table, pair)
        axes.set_xticks(sorted(place_of(arm) for arm in arms))
    drawn[-1][1].set_xlabel("convolution (8, 13 and 18 are downsample layers)")
    most = max((axes for _, axes in drawn), key=lambda a: len(a.get_legend_handles_labels()[0]))
    legend(figure, most, 3)
    return Picture(
        f"Accuracy by position: {table.title}",
        figure,
        "Accuracy on the target at the last epoch by the one convolution that is shaped.",
    )


# --- learning curves --------------------------------------------------------------------------


def learning_curves(table: Table) -> Picture | None:
    """A panel a source-target pair; of many pairs one panel, of the mean over those all arms have."""
    arms = [arm for arm in table.compared() if arm.one]
    if not arms or max(len(arm.one.rows) for arm in arms) < 2:
        return None
    shown = arms[:CURVES]
    if len(table.pairs) > PANELS:
        common = [pair for pair in table.pairs if all(arm.of(pair) for arm in shown)]
        if not common:
            return None
        figure, axes = titled([f"mean over {len(common)} source-target pairs"], shown, 3.6)
        drawn = [(common, axes[0])]
    else:
        figure, drawn = panels(table, shown, 2.8)
        drawn = [([pair], axes) for pair, axes in drawn]
    many = len(shown) > len(COLOURS)
    for pairs, axes in drawn:
        for i, arm in enumerate(shown):
            by_pair = [runs for runs in map(arm.of, pairs) if runs]
            if not by_pair:
                continue
            colour = (
                matplotlib.colormaps["viridis"](0.25 + 0.7 * i / len(shown)) if many else COLOURS[i]
            )
            style = {"color": colour, "lw": 1.5}
            if arm is table.baseline:
                style |= {"color": REFERENCE, "ls": "--"}
            length = min(len(run.rows) for runs in by_pair for run in runs)
            values = [
                mean([mean([run.rows[e]["target_accuracy"] for run in runs]) for runs in by_pair])
                for e in range(length)
            ]
            axes.plot(range(1, length + 1), values, label=arm.name, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn[-1][1].set_xlabel("epoch")
    legend(figure, drawn[0][1], 2)
    caption = "Accuracy on the target after each epoch, mean over the seeds there are."
    if len(table.pairs) > PANELS:
        caption += (
            f" Pairs: those of which every arm here has a run, {len(common)} of {len(table.pairs)}."
        )
    if len(arms) > len(shown):
        caption += f" The first {len(shown)} of {len(arms)} arms."
    return Picture(f"Learning curves: {table.title}", figure, caption)


# --- source-target pairs ----------------------------------------------------------------------


def matrix(table: Table) -> Picture | None:
    """Source by target: the baseline's accuracy, and what each other arm adds to it."""
    sources, targets = (sorted({pair[i] for pair in table.pairs}) for i in (0, 1))
    arms = [arm for arm in table.compared() if arm.one]
    if len(sources) < 2 or not arms:
        return None
    base = table.baseline if table.baseline in arms else None
    rows = math.ceil(len(arms) / 2)
    figure = Figure(figsize=(WIDTH, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    values = {}
    for arm in arms:
        of = base if arm is not base else None
        cells = [[paired(arm, of, (source, target)) for target in targets] for source in sources]
        values[arm.name] = np.array(cells, dtype=float)  # None becomes NaN
    differences = [
        np.abs(v) for arm, v in zip(arms, values.values(), strict=True) if arm is not base
    ]
    finite = [v[np.isfinite(v)] for v in differences]
    # one scale for all differences, so that colours compare
    largest = max((float(v.max()) for v in finite if v.size), default=1.0) or 1.0
    for axes, arm in zip(grid.flat, arms, strict=False):
        absolute = arm is base or base is None
        limits = (0, 100) if absolute else (-largest, largest)
        draw_matrix(axes, values[arm.name], limits, sources, targets)
        axes.set_title(
            f"{arm.name}, %" if absolute else f"{arm.name} minus {base.name}", fontsize=9
        )
    for axes in grid.flat[len(arms) :]:
        axes.set_axis_off()
    return Picture(
        f"Source-target pairs: {table.title}",
        figure,
        "Rows: trained on. Columns: tested on. Accuracy at the last epoch (%), and differences to it in "
        "points, mean over the seeds that both have. Empty: the diagonal, or no run yet.",
    )


def paired(arm: Arm, base: Arm | None, pair: Pair) -> float | None:
    """Mean over seeds of an arm's accuracy on a pair, less the base's where there is one."""
    ours = {run.key: run.summary[FIGURE] for run in arm.of(pair)}
    if base is None:
        return mean(list(ours.values())) if ours else None
    theirs = {run.key: run.summary[FIGURE] for run in base.of(pair)}
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


# --- the density of masks ---------------------------------------------------------------------


def densities(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Share of ones in each layer's last map, one a run, by kind of recorded map and by layer."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        config = run.config
        if config["mode"] != "da" or not run.summary["density"]:
            continue
        kind = "real-valued" if config["product"] else "binarized"
        of = " and ".join(config["mask_sources"]) or "the target"
        kind += f" maps of {of}" + ("" if config["top_k"] is None else f", top {config['top_k']:g}")
        for layer, share in run.summary["density"].items():
            found.setdefault(kind, {}).setdefault(layer, []).append(share)
    return found


def random_densities(runs: Sequence[Run]) -> list[float]:
    """Distances of the random maps' densities from 1 - p0, one a run and layer."""
    found = []
    for run in runs:
        if run.config["mode"] == "random":
            p_zero = list(run.config["p_zero"])
            p_zero *= len(run.layers) if len(p_zero) == 1 else 1
            shares = (run.summary["density"].get(layer) for layer in run.layers)
            found += [abs(s - 1 + p) for s, p in zip(shares, p_zero, strict=True) if s is not None]
    return found


def density(runs: Sequence[Run]) -> Picture | None:
    """Density of the recorded maps by layer."""
    found = densities(runs)
    if not found:
        return None
    layers = [name for name in modules() if any(name in by_layer for by_layer in found.values())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6 + 0.12 * len(found)), layout="constrained")
        axes = figure.subplots()
        for i, (kind, by_layer) in enumerate(sorted(found.items())):
            x = [layers.index(layer) for layer in by_layer]
            values = list(by_layer.values())
            error = [spread(v) or 0 for v in values]
            axes.errorbar(x, [mean(v) for v in values], yerror_or_none(error), fmt="o", ms=6,
                          capsize=3, label=kind, color=COLOURS[i % len(COLOURS)])  # fmt: skip
        names = [f"{n} ({conv_number(n)})" if conv_number(n) else n for n in layers]
        axes.set_xticks(range(len(layers)), names, rotation=40, ha="right", fontsize=8)
        axes.set(ylabel="share of ones in the map", ylim=(0, 1.02))
        legend(figure, axes, 2)
    return Picture(
        "Density of the recorded maps by layer",
        figure,
        "Share of ones in the map that each shaped layer used last in training, mean and spread over "
        "runs; of a real-valued map the share of positive values. In brackets the reports' number of "
        "a convolution.",
    )
