"""What a run leaves behind: files that are whole or absent, the figures in them, and their check.

Every file is written next to its final place and then renamed over it, so a reader, a kill or a
full disk finds the old file or the new one, never half of one.

summary.json is a function of config.yaml, of metrics.jsonl and of a few facts in itself (versions,
weights, names of layers), and carries a seal over all three files. `check` computes both again: it
finds a file that was edited, cut or exchanged. It is no signature: whoever runs this code can seal
what they like.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import distributed
import torch
import torchvision
import toy
import yaml
from config import REPOSITORY, SWITCHES, Config, hash_of
from data import OFFICIAL_COUNTS
from torch import Tensor

import fastshape

# Of what summary.json and metrics.jsonl hold. To be raised when a reader of old ones would err.
RECORD_VERSION = 2


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


def read_json(path: Path) -> Any:
    """What a json file holds. Raises RecordError."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"cannot read {path}: half-written, or no json ({error})") from error


def read_json_lines(path: Path) -> list[Any]:
    """What a file of json lines holds. Raises RecordError naming the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RecordError(
                f"cannot read {path}: line {number} is half-written, or no json ({error})"
            ) from error
    return rows


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


def versions(device: str) -> dict[str, str | int | None]:
    """What computed a run on `device`, or after a resume the last part of it, for its record."""
    backends = fastshape.backend_info()
    return {
        "fastshape": fastshape.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "backend": backends[torch.device(device).type],
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "processes": distributed.size(),
        "commit": commit(),
    }


@functools.cache
def commit() -> str | None:
    """The commit that runs, with "-dirty" where files differ from it; None where git cannot tell."""
    if not (REPOSITORY / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def summarize(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    layers: Sequence[str],
    classes: Sequence[str],
    weights: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> dict[str, Any]:
    """The run's result: a function of its arguments alone.

    Beside the last epoch's figures stand those of the epoch that is best on held-out source images
    (selected_*, None without any) and of the one that is best on the target (oracle_*: a choice by
    target labels, no result). Of equals the earliest.

    Args:
        config: what config.yaml holds: `Config.as_dict()`, and `warnings`, what a reader must know.
        rows: one per epoch; the last one is the published figure, whichever epoch was best.
        layers: module names of the shaped layers.
        classes: names of the classes.
        weights: source and sha256 of the initial weights.
        versions: what computed the run.
    """
    config = dict(config)
    warnings = list(config.pop("warnings", []))
    last = rows[-1]
    tests = [figures(torch.tensor(row["target_confusion"]), classes) for row in rows]
    target = tests[-1]
    if target["collapsed"]:
        warnings.append(f"collapsed: every target image is called {target['collapsed_to']}")
    summary = {
        "source": config["source"],
        "target": config["target"],
        "mode": config["mode"],
        "layers": config["layers"],
        "layer_names": list(layers),
        "seed": config["seed"],
        "epochs": len(rows),
        "updates": sum(row["updates"] for row in rows),
        "passes": sum(row["passes"] for row in rows),
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
    chosen = {"selected": None, "oracle": best([test["correct"] for test in tests])}
    if "holdout_confusion" in last:
        held_out_tests = [figures(torch.tensor(row["holdout_confusion"]), classes) for row in rows]
        held_out = held_out_tests[-1]
        chosen["selected"] = best([test["correct"] for test in held_out_tests])
        summary["source_accuracy"] = held_out["accuracy"]
        summary["source_correct"] = held_out["correct"]
        summary["source_total"] = held_out["total"]
    if "invalid_test_confusion" in last:
        invalid = figures(torch.tensor(last["invalid_test_confusion"]), classes)
        for name in ("correct", "total", "accuracy"):
            summary[f"invalid_test_{name}"] = invalid[name]
    for by, at in chosen.items():
        summary[f"{by}_epoch"] = None if at is None else rows[at]["epoch"]
        for name in ("correct", "total", "accuracy"):
            summary[f"{by}_target_{name}"] = None if at is None else tests[at][name]
    untouched = [row["bn_untouched"] for row in rows]
    seconds = sum(row["train_seconds"] for row in rows)
    images = sum(row["source_train_total"] for row in rows)
    summary |= {
        "seconds": sum(row["seconds"] for row in rows),
        "images_per_second": images / seconds,
        "fired": {name: sum(row["fired"][name] for row in rows) for name in last["fired"]},
        "density": last["density"],
        "bn_untouched": None if None in untouched else all(untouched),
        "weights": dict(weights),
        "versions": dict(versions),
        "warnings": warnings,
        "config": config,
        "config_hash": hash_of(config),
        "record_version": RECORD_VERSION,
    }
    return summary


def best(values: Sequence[int]) -> int:
    """Position of the largest value; of equals the first."""
    return max(range(len(values)), key=values.__getitem__)


def sealed(
    summary: Mapping[str, Any], config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`summary` with its seal: sha256 of what config.yaml, metrics.jsonl and the summary hold."""
    summary = {name: value for name, value in summary.items() if name != "seal"}
    content = json.dumps([config, rows, summary], sort_keys=True, allow_nan=False)
    return summary | {"seal": hashlib.sha256(content.encode()).hexdigest()}


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
    if summary["selected_epoch"] is not None:
        lines.append(
            f"selected         {summary['selected_target_accuracy']:.2f} %  on the target at epoch "
            f"{summary['selected_epoch']}, the best on held-out source images"
        )
    lines.append(
        f"time             {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:.0f} training images/s"
    )
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return [*lines, f"record: {folder}"]


# --- check ------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What config.yaml, metrics.jsonl and summary.json of a finished run hold.

    Raises RecordError for a file that is missing or half-written.
    """
    config = read_yaml(folder / "config.yaml")
    rows = read_json_lines(folder / "metrics.jsonl")
    if not (folder / "summary.json").exists():
        raise RecordError(f"{folder} is unfinished: {len(rows)} epochs, and no summary.json")
    return config, rows, read_json(folder / "summary.json")


def check(folder: Path) -> list[str]:
    """What is wrong with the record of a finished run, a line for each thing; nothing: [].

    Needs the three text files alone: neither data nor weights, and nothing is trained or written.
    """
    folder = Path(folder)
    try:
        return [f"{folder}: {what}" for _, what in faults(*read(folder))]
    except RecordError as error:
        return [str(error)]


def faults(config: dict[str, Any], rows: list[Any], summary: Any) -> list[tuple[str, str]]:
    """What is wrong with what `read` gave: (rule, words).

    The rule is "version"; "record", where the record is not as it was written; or one of the other
    rules in audit.py, where it may be, and the run itself was not as it must be.
    """
    version = summary.get("record_version") if isinstance(summary, dict) else None
    if version != RECORD_VERSION:
        return [("version", f"a record of version {version}; this code reads {RECORD_VERSION}")]
    found = []
    try:
        if sealed(summary, config, rows)["seal"] != summary.get("seal"):
            found.append(("record", "edited after the run: the seal does not fit"))
        found += (("record", what) for what in summary_problems(config, rows, summary))
        found += row_problems(config, rows, summary["layer_names"])
    # of files with anything in them, NaN too, which no seal can be over
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as e:
        found.append(("record", f"cannot be computed again: {type(e).__name__}: {e}"))
    return found


def summary_problems(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Iterator[str]:
    """Where the summary is not what its switches and rows give."""
    unlike = set(config) ^ {*SWITCHES, "warnings"}
    if unlike:
        yield f"config.yaml: {', '.join(sorted(unlike))}: unknown switch, or one that is missing"
    expected = summarize(
        config,
        rows,
        layers=summary["layer_names"],
        classes=list(summary["per_class"]),
        weights=summary["weights"],
        versions=summary["versions"],
    )
    for name in sorted(expected.keys() | summary.keys() - {"seal"}):
        found, right = summary.get(name), expected.get(name)
        if found != right:
            yield (
                f"summary.json: {name} is {shortened(found)}; config.yaml and metrics.jsonl give "
                f"{shortened(right)}"
            )


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def row_problems(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], layers: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Where the epochs' rows are not what such a run must give: (rule, words), as `faults` has them."""
    run = Config(**{name: config[name] for name in SWITCHES})
    target = images_per_class(run, run.target)
    held_out = rows[0].get("holdout_total", 0)
    training = sum(images_per_class(run, run.source)) - held_out
    if (held_out > 0) != (run.holdout > 0):
        yield "labels", f"{held_out} images are held out, but holdout is {run.holdout:g}"
    if run.target in run.mask_sources:
        yield "labels", f"maps of other domains than the target, but mask_sources has {run.target}"
    epochs, updates = run.length(training)
    if len(rows) != epochs:
        yield "length", f"metrics.jsonl has {len(rows)} epochs; {updates} updates take {epochs}"
    # what became of BatchNorm's statistics in passes over other images than the source's
    untouched = {"da": run.record_mode == "eval", "dann": False}.get(run.mode)
    done = 0
    for number, row in enumerate(rows, 1):
        seen = min(training, (updates - done) * run.batch_size)
        steps = -(-seen // run.batch_size)
        done += steps
        where = f"metrics.jsonl, epoch {number}:"
        passes = sum(parts(size, run.accumulate) for size in batch_sizes(seen, run))
        right = percent(row["source_train_correct"], row["source_train_total"])
        expected = [
            ("length", "epoch", number),
            ("length", "updates", steps),
            ("length", "passes", passes),
            ("labels", "source_train_total", seen),
            ("labels", "holdout_total", held_out if run.holdout > 0 else None),
            ("record", "source_train_accuracy", right),
            ("BatchNorm", "bn_untouched", untouched),
        ]
        for stem in ("target", "holdout", "invalid_test"):
            if f"{stem}_confusion" in row:
                counts = torch.tensor(row[f"{stem}_confusion"])
                correct, total = int(counts.diagonal().sum()), int(counts.sum())
                values = {"correct": correct, "total": total, "accuracy": percent(correct, total)}
                expected += (("record", f"{stem}_{name}", v) for name, v in values.items())
        for rule, name, right in expected:
            if row.get(name) != right:
                yield rule, f"{where} {name} is {row.get(name)!r}, not {right!r}"
        tested = torch.tensor(row["target_confusion"]).sum(1).tolist()
        if tested != target:
            what = f"tested on {tested} images of the classes; {run.target} has {target}"
            yield "k of n", f"{where} {what}"
        if set(row["fired"]) != set(layers):
            yield "hooks", f"{where} fired {sorted(row['fired'])}, not {layers}"
        for name, times in row["fired"].items():
            if times < row["passes"] or times % row["passes"]:
                what = f"layer {name} fired {times} times in {row['passes']} passes"
                yield "hooks", f"{where} {what}"


def images_per_class(config: Config, domain: str) -> list[int]:
    """How many images of each class a run with these switches has of a domain."""
    counts = OFFICIAL_COUNTS[domain]
    if config.data == "toy":
        counts = [toy.IMAGES_PER_CLASS] * len(counts)
    return [n if config.limit is None else min(n, config.limit) for n in counts]


def batch_sizes(images: int, config: Config) -> list[int]:
    """Sizes of the batches that so many images make."""
    size = config.batch_size
    return [min(size, images - first) for first in range(0, images, size)]


def parts(images: int, accumulate: int) -> int:
    """Passes that an update on so many images takes."""
    return -(-images // -(-images // accumulate))
