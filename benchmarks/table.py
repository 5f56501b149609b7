"""Turns a pytest-benchmark file into a table, and into a small CSV worth keeping.

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
)


def rows_of(report: dict) -> list[dict]:
    """One row a benchmark, in the order they ran. Times in milliseconds, 1 GB = 1e9 bytes."""
    rows = []
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        rows.append(
            {
                "test": entry["name"].split("[")[0].removeprefix("test_"),
                "case": entry["param"],
                "fastshape_ms": f"{info['ours_ms']:.3g}",
                "contender_ms": f"{info['theirs_ms']:.3g}",
                "ratio": f"{info['ratio']:.2f}",
                "fastshape_GB_per_s": f"{info['bytes'] / info['ours_ms'] / 1e6:.1f}",
                "MB_moved": f"{info['bytes'] / 1e6:.0f}",
            }
        )
    return rows


def facts(report: dict) -> dict:
    """What the figures hold for."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "processor": report["machine_info"].get("cpu", {}).get("brand_raw", platform.machine()),
        "threads": torch.get_num_threads(),
        "backend": fastshape.backend_info()["cpu"],
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": report["datetime"][:10],
    }


def save(path: Path, rows: list[dict], about: dict) -> None:
    """Write the CSV, its facts as comment lines first; the file is replaced as a whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as file:
        for name, value in about.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--save", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    rows, about = rows_of(report), facts(report)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
    if arguments.save:
        save(arguments.save, rows, about)


if __name__ == "__main__":
    main()
