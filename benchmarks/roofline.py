"""Draws the roofline of a machine, with fastshape and its contenders below it.

python benchmarks/roofline.py .benchmarks/last.json --save benchmarks/results/NAME.png

The horizontal axis is operations of the algorithm per byte that it must move. The vertical axis is operations per second. All
contenders use the same counts, so that a contender which moves or computes more than necessary is drawn lower.
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Integer operations per element. Philox: ten rounds of two products, four xors and two key additions for eight elements, plus
# one comparison per element. Shaping: one comparison and two selections. BatchNorm of bits: one selection forward; a product,
# a sum, three selections and the two channel sums backward.
RANDOM = 10 * 8 / 8 + 1
SHAPE = 3
# test: operations per element in the timed call, and bytes per element (float32).
WORK = {
    "random_shaping forward": (RANDOM + SHAPE, 8),
    "random_shaping forward+backward": (2 * (RANDOM + SHAPE) - 1, 16),
    "random_shaping_in_place": (2 * (RANDOM + SHAPE) - 1, 16),
    "target_shaping": (2 * SHAPE, 16.25),
    "block": (2 * RANDOM + SHAPE + 1 + 7, 20.5),
}


def points(report: dict) -> list[tuple[str, str, float, float, float]]:
    """(work, contender, operations per byte, our Gop/s, their Gop/s) for each benchmark of a large map."""
    rows = []
    for entry in report["benchmarks"]:
        info, case = entry["extra_info"], entry["param"] or ""
        work = entry["name"].split("[")[0].removeprefix("test_")
        if work == "random_shaping":
            work += " forward+backward" if "forward+backward" in case else " forward"
        if work not in WORK or any(word in case for word in ("small", "layer1", "clone")):
            continue
        operations, size = WORK[work]
        total = operations * info["bytes"] / size
        rates = (total / info[key] / 1e6 for key in ("ours_ms", "theirs_ms"))
        contender = "float mask" if work == "target_shaping" else case.split("-")[0]
        rows.append((work, contender, operations / size, *rates))
    return rows


def roofs(report: dict) -> tuple[float, float, float]:
    """GB/s of a copy to warm memory, GB/s of a copy to fresh memory, and Gop/s of Philox alone."""
    by_name = {entry["name"]: entry for entry in report["benchmarks"]}

    def rate(name, amount):
        entry = by_name[name]
        return amount(entry["extra_info"]) / entry["stats"]["median"] / 1e9

    warm = rate("test_bandwidth[copy_to_warm_memory]", lambda info: info["bytes"])
    fresh = rate("test_bandwidth[copy_to_fresh_memory]", lambda info: info["bytes"])
    return warm, fresh, rate("test_random_bits", lambda info: RANDOM * info["elements"])


def draw(report: dict, path: Path) -> None:
    warm, fresh, peak = roofs(report)
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    ends = [0.1, 10.0]
    for bandwidth, label, style in (
        (warm, f"copy to warm memory, {warm:.1f} GB/s", "-"),
        (fresh, f"copy to fresh memory, {fresh:.1f} GB/s", "--"),
    ):
        knee = peak / bandwidth
        axes.plot(
            [ends[0], knee, ends[1]],
            [bandwidth * ends[0], peak, peak],
            style,
            color="0.35",
            lw=1,
            label=label,
        )
    axes.text(
        ends[1], peak, f"Philox alone, {peak:.1f} Gop/s ", ha="right", va="bottom", color="0.35"
    )
    ours: dict[str, list] = {}
    others: dict[str, list] = {}
    for work, contender, intensity, our_rate, their_rate in points(report):
        ours.setdefault(work, []).append((intensity, our_rate))
        name = contender.removeprefix("shaped_").replace("_of_reference", "").replace("_", " ")
        others.setdefault(name, []).append((intensity, their_rate))
    lines = []
    for marker, (name, values) in zip("osv^<>Xd*P", others.items(), strict=False):
        style = {"marker": marker, "ls": "", "mfc": "none", "mec": "0.4", "ms": 5, "label": name}
        lines += axes.plot(*zip(*values, strict=True), **style)
    axes.add_artist(axes.legend(handles=lines, title="contenders", fontsize=7, loc="lower right"))
    mine = list(axes.get_lines()[:2])
    for work, values in ours.items():
        rate = sorted(rate for _, rate in values)[len(values) // 2]
        mine += axes.plot(
            values[0][0], rate, "D", ms=8, label=f"fastshape: {work.replace('_', ' ')}"
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        xlabel="operations per byte that must move",
        ylabel="Gop/s",
    )
    axes.legend(handles=mine, fontsize=7, loc="upper left")
    about = report["machine_info"].get("cpu", {}).get("brand_raw", "")
    axes.set_title(f"{about}, float32 maps of (32 or 16, 64, 112, 112)", fontsize=9)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=130)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the file that pytest --benchmark-json wrote")
    parser.add_argument("--save", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    try:
        draw(json.loads(arguments.report.read_text()), arguments.save)
    except KeyError as error:
        parser.error(
            f"{arguments.report} lacks {error}: run benchmarks/test_roofs.py with the other benchmarks"
        )


if __name__ == "__main__":
    main()
