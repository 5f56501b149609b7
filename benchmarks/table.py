"""Turns a pytest-benchmark file into a table and a small CSV.

python benchmarks/table.py .benchmarks/last.json --save benchmarks/results/NAME.csv
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

import fastshape

COLUMNS = (
    "test",
    "case",
    "fastshape_ms",
    "contender_ms",
    "ratio",
    "fastshape_GB_per_s",
    "MB_moved",
    "fastshape_MB",
    "contender_MB",
    "fastshape_images_per_s",
)


def rows_of(report: dict) -> list[dict]:
    """One row per benchmark, in the order in which they ran. Times are in milliseconds; 1 GB = 1e9 bytes.

    A roof has no contender: its time is in ``contender_ms`` and its rate in ``fastshape_GB_per_s``. Memory rows have bytes
    instead of times. ``fastshape_images_per_s`` belongs to fastshape's time or, without one, to the row's own time.
    """
    rows = []
    for entry in report["benchmarks"]:
        info, row = entry["extra_info"], dict.fromkeys(COLUMNS, "")
        row["test"] = entry["name"].split("[")[0].removeprefix("test_")
        row["case"] = entry["param"] or ""
        if "ratio" in info:
            row["ratio"] = f"{info['ratio']:.2f}"
        if "ours_bytes" in info:
            row["fastshape_MB"] = f"{info['ours_bytes'] / 1e6:.3g}"
            row["contender_MB"] = f"{info['theirs_bytes'] / 1e6:.3g}"
        elif "ours_ms" in info:
            row["fastshape_ms"] = f"{info['ours_ms']:.3g}"
            row["contender_ms"] = f"{info['theirs_ms']:.3g}"
        else:
            row["contender_ms"] = f"{1e3 * entry['stats']['median']:.3g}"
        if size := info.get("bytes"):
            seconds = info["ours_ms"] / 1e3 if "ours_ms" in info else entry["stats"]["median"]
            row["fastshape_GB_per_s"] = f"{size / seconds / 1e9:.1f}"
            row["MB_moved"] = f"{size / 1e6:.0f}"
        if images := info.get("images_per_second"):
            row["fastshape_images_per_s"] = f"{images:.3g}"
        rows.append(row)
    return rows


def facts(processor: str, date: str, device: str = "cpu") -> dict:
    """The machine and the versions that the figures belong to."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "backend": fastshape.backend_info()[device],
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": date,
    }


def show(rows: list[dict], about: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def save(path: Path, rows: list[dict], about: dict) -> None:
    """Write the CSV after its facts as comment lines. The file is replaced as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as file:
        for name, value in about.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the file that pytest --benchmark-json wrote")
    parser.add_argument("--save", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    processor = report["machine_info"].get("cpu", {}).get("brand_raw", platform.machine())
    rows, about = rows_of(report), facts(processor, report["datetime"][:10])
    show(rows, about)
    if arguments.save:
        save(arguments.save, rows, about)


if __name__ == "__main__":
    main()
