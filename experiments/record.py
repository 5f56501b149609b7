"""What a run leaves behind: files that are whole or absent, and the figures in them.

Every file is written next to its final place and then renamed over it, so a reader, a kill or a
full disk finds the old file or the new one, never half of one.
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor

import fastshape


class RecordError(OSError):
    """A file of the run folder cannot be written or read."""


# --- files ------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically and durably.

    Raises RecordError (disk full, no permission, ...); `path` is then what it was before, and no
    temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        kept = "the old one is untouched" if path.exists() else "nothing was written"
        raise RecordError(f"cannot write {path}: {error.strerror or error}; {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    # NaN is not json; whoever has one must say what it means
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows).encode())


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    write_bytes(path, yaml.safe_dump(dict(value), sort_keys=False).encode())


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file. Raises RecordError."""
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecordError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} holds no switches; expected lines such as `mode: random`")
    return value


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors and plain values. Serialized in memory first: torch.save hides a full disk."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` saved, on the CPU, read without unpickling code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a broken file the reader trips over anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecordError(f"cannot read checkpoint {path}: {reason}") from error


# --- figures ----------------------------------------------------------------------------------


def percent(part: int, whole: int) -> float:
    return 100.0 * part / whole


def figures(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """All figures of one test, from counts.

    Args:
        confusion: int64 (n_classes, n_classes); [true, predicted] counts images.
        classes: their names.

    Returns:
        correct and total (images), accuracy (percent), macro_accuracy (percent, mean over the
        classes that occur), per_class (name -> correct, total, accuracy), majority_rate (percent:
        what answering the largest true class would score), collapsed (every prediction is one
        class) and, for that case, the predicted class.
    """
    total = int(confusion.sum())
    correct = int(confusion.diagonal().sum())
    of_class = confusion.sum(1).tolist()
    hits = confusion.diagonal().tolist()
    predicted = [name for name, n in zip(classes, confusion.sum(0).tolist(), strict=True) if n]
    per_class = {
        name: {"correct": hit, "total": n, "accuracy": percent(hit, n) if n else None}
        for name, hit, n in zip(classes, hits, of_class, strict=True)
    }
    rates = [c["accuracy"] for c in per_class.values() if c["total"]]
    return {
        "correct": correct,
        "total": total,
        "accuracy": percent(correct, total),
        "macro_accuracy": sum(rates) / len(rates),
        "per_class": per_class,
        "majority_rate": percent(max(of_class), total),
        "collapsed": len(predicted) == 1,
        "collapsed_to": predicted[0] if len(predicted) == 1 else None,
    }


def versions(device: str) -> dict[str, str]:
    """What computed a run on `device`, for its record."""
    backends = fastshape.backend_info()
    return {
        "fastshape": fastshape.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "backend": backends[torch.device(device).type],
    }


def summarize(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    layers: Sequence[str],
    classes: Sequence[str],
    weights: Mapping[str, Any],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The run's result: a function of its switches and its epoch rows alone.

    Args:
        config: `Config.as_dict()`.
        rows: one per epoch; the last one is the published figure, whichever epoch was best.
        layers: module names of the shaped layers.
        classes: names of the classes.
        weights: source and sha256 of the initial weights.
        warnings: what a reader must know, most important first.
    """
    last = rows[-1]
    target = figures(torch.tensor(last["target_confusion"]), classes)
    warnings = list(warnings)
    if target["collapsed"]:
        warnings.append(f"collapsed: every target image is called {target['collapsed_to']}")
    summary = {
        "source": config["source"],
        "target": config["target"],
        "mode": config["mode"],
        "layers": config["layers"],
        "layer_names": list(layers),
        "seed": config["seed"],
        "epochs": config["epochs"],
        "target_correct": target["correct"],
        "target_total": target["total"],
        "target_accuracy": target["accuracy"],
        "macro_accuracy": target["macro_accuracy"],
        "per_class": target["per_class"],
        "majority_rate": target["majority_rate"],
        "collapsed": target["collapsed"],
        "source_accuracy": None,
        "source_train_accuracy": last["source_train_accuracy"],
        "train_loss": last["train_loss"],
    }
    if "holdout_confusion" in last:
        held_out = figures(torch.tensor(last["holdout_confusion"]), classes)
        summary["source_accuracy"] = held_out["accuracy"]
        summary["source_correct"] = held_out["correct"]
        summary["source_total"] = held_out["total"]
    if "invalid_test_confusion" in last:
        invalid = figures(torch.tensor(last["invalid_test_confusion"]), classes)
        for name in ("correct", "total", "accuracy"):
            summary[f"invalid_test_{name}"] = invalid[name]
    seconds = sum(row["train_seconds"] for row in rows)
    images = sum(row["source_train_total"] for row in rows)
    summary |= {
        "seconds": sum(row["seconds"] for row in rows),
        "images_per_second": images / seconds,
        "fired": {name: sum(row["fired"][name] for row in rows) for name in last["fired"]},
        "weights": dict(weights),
        "versions": versions(config["device"]),
        "warnings": warnings,
        "config": dict(config),
    }
    return summary


def summary_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """The few lines that close a run on screen."""
    shaped = ", ".join(summary["layer_names"]) or "none"
    lines = [
        f"{summary['mode']}: {summary['source']} -> {summary['target']}, shaped layers: {shaped}",
        f"target accuracy  {summary['target_accuracy']:.2f} %  "
        f"({summary['target_correct']} of {summary['target_total']}, epoch {summary['epochs']})",
        f"macro accuracy   {summary['macro_accuracy']:.2f} %",
        f"majority rate    {summary['majority_rate']:.2f} %",
        f"collapsed        {'YES' if summary['collapsed'] else 'no'}",
    ]
    if summary["source_accuracy"] is not None:
        lines.append(
            f"source accuracy  {summary['source_accuracy']:.2f} %  "
            f"({summary['source_correct']} of {summary['source_total']} held out)"
        )
    if "invalid_test_total" in summary:
        lines.append(
            f"INVALID FIGURE   {summary['invalid_test_accuracy']:.2f} %  "
            f"({summary['invalid_test_correct']} of {summary['invalid_test_total']} trained on)"
        )
    lines.append(
        f"time             {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:.0f} training images/s"
    )
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return [*lines, f"record: {folder}"]
