"""What a stopped training goes on from, and what tests read.

A checkpoint holds the state of the network, the optimizer, the schedule, the gradient scaler and the
random streams after an epoch, and names what decided them. The epochs' rows are not in it: they are
the lines of metrics.jsonl, which is written first.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from domainshift import files
from domainshift.config import differing
from domainshift.errors import BadInput, ConfigError, RecordError
from domainshift.methods import Method
from domainshift.models import state_digest

# --- what decides the weights -----------------------------------------------------------------


def switch_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name: old -> new' for each switch that makes two trainings different ones.

    The numbers of epochs may differ: `check_growth` decides about them.
    """
    old, new = dict(old), dict(new)
    if old.get("epochs") and new.get("epochs"):
        del old["epochs"], new["epochs"]
    return differing(old, new)


def image_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """In words, which domains have other images in `new`. Arguments: digests, by domain."""
    return [
        f"the images of {name} are others ({old[name][:12]} -> {digest[:12]})"
        for name, digest in new.items()
        if old.get(name, digest) != digest
    ]


def check_origin(saved: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError, which names each difference, unless both are one training.

    Domains that are tested now and were not before are no difference.
    """
    differences = switch_differences(saved["switches"], own["switches"])
    for name in ("targets", "weights", "method_file"):
        differences += differing({name: saved[name]}, {name: own[name]})
    differences += image_differences(images_of(saved), images_of(own))
    if differences:
        raise ConfigError(
            f"{path} is of another training ({'; '.join(differences)}); use the same values, images "
            "and weights, or another --out"
        )


def images_of(made_of: Mapping[str, Any]) -> dict[str, str]:
    """The digests of all images that a training, or its tests, read, by domain."""
    return {**made_of["images"], **made_of.get("tested", {})}


def check_growth(
    old: int | None, new: int | None, state: Mapping[str, Any], method: Method
) -> None:
    """Raises ConfigError where a longer training would have been another one up to here.

    Args:
        old, new: epochs of the checkpoint's configuration and of this one.
        state: of the checkpoint.
    """
    if old == new:
        return
    done = state["epoch"]
    if new < done:
        raise ConfigError(f"epochs: {new} is less than the {done} that are trained")
    before, now = state["schedule"]["step_size"], method.schedule.step_size
    if state["schedule"]["gamma"] < 1:
        for epoch in range(1, done + 1):
            if (epoch - 1) // before != (epoch - 1) // now:
                raise ConfigError(
                    f"epochs: {new} in place of {old} is not allowed: the learning rate drops every "
                    f"{now} epochs in place of every {before}, and {done} are trained, so that of "
                    f"epoch {epoch} would have been another; allowed while no more than {min(before, now)} are trained"
                )
    if method.uses_progress:
        raise ConfigError(
            f"epochs: {new} in place of {old} is not allowed: what {method.name} does in an epoch "
            "depends on the length of training; use another --out"
        )


# --- files ------------------------------------------------------------------------------------


def save(path: Path, method: Method, epoch: int, made_of: Mapping[str, Any]) -> None:
    """Write the state after an epoch. Raises RecordError, with the old file untouched.

    Args:
        made_of: of `domainshift.setup.origin`, and as `tested` the digests of tested domains.
    """
    state = method.state_dict() | {
        "epoch": epoch,
        "origin": dict(made_of),
        "cpu_rng": torch.get_rng_state(),
    }
    if method.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(method.device)
    content = io.BytesIO()  # in memory first: torch.save hides that a disk is full
    torch.save(state, content)
    files.write_bytes(path, content.getvalue())


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, without unpickling code. Raises RecordError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecordError(f"cannot read checkpoint {path}: {reason}") from error


def check(state: Any, path: Path, method: Method, own: Mapping[str, Any]) -> None:
    """Raises BadInput unless `method` can go on from a checkpoint's state."""
    try:
        saved, epochs = state["origin"], state["origin"]["switches"]["epochs"]
        state["epoch"], state["schedule"]["step_size"]
    except (TypeError, KeyError) as error:
        raise RecordError(f"cannot read checkpoint {path}: it has no entry {error}") from error
    check_origin(saved, own, path)
    check_growth(epochs, own["switches"]["epochs"], state, method)


def resume(path: Path, method: Method, own: Mapping[str, Any]) -> int:
    """Set a method and the random streams to the state in a checkpoint. Returns its epoch.

    Raises ConfigError for a checkpoint of another training, or one that cannot grow so long.
    """
    state = read(path)
    check(state, path, method, own)
    epoch, schedule = state["epoch"], state["schedule"]
    before, now = schedule["step_size"], method.schedule.step_size
    method.load_state_dict(state | {"schedule": schedule | {"step_size": now}})
    if before != now:
        set_rates(method, drops=epoch // now)
    torch.set_rng_state(state["cpu_rng"])
    if method.device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], method.device)
    return epoch


def set_rates(method: Method, drops: int) -> None:
    """Give the optimizer the learning rates after so many drops, multiplied as the schedule does."""
    schedule, rates = method.schedule, []
    for group, rate in zip(method.optimizer.param_groups, schedule.base_lrs, strict=True):
        for _ in range(drops):
            rate *= schedule.gamma
        group["lr"] = rate
        rates.append(rate)
    schedule._last_lr = rates


def load_weights(path: Path, method: Method, digest: str, made_of: Mapping[str, Any]) -> None:
    """Give a method's network the weights that a training's record names.

    Args:
        made_of: as for `save`.

    Raises BadInput where the checkpoint holds other ones or was tested on other images, or is missing.
    """
    if not path.is_file():
        raise BadInput(f"{path} is missing, so the finished training cannot be tested further")
    state = read(path)
    own = state_digest(state["model"]) if isinstance(state.get("model"), Mapping) else "none"
    if own != digest:
        raise BadInput(
            f"{path} was exchanged: the hash of its weights is {own[:12]}, and training.json names "
            f"{digest[:12]}"
        )
    if isinstance(state.get("origin"), Mapping):
        check_origin(state["origin"], made_of, path)
    method.model.load_state_dict(state["model"])
