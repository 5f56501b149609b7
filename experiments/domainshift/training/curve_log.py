"""Curves of a run for TensorBoard or Weights & Biases, beside the run's own records."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from domainshift.config import Config
from domainshift.errors import ConfigError
from domainshift.records.results import percent
from domainshift.records.schema import Row

PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


def curve_log(config: Config, folder: Path) -> Callable[[Row], None]:
    """A function that sends an epoch's numbers to where `config.log` says; "none": it does nothing.

    Raises ConfigError where the package is not installed.
    """
    if config.log == "none":
        return lambda row: None
    module, package = PACKAGES[config.log]
    try:
        library: Any = importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"log: {config.log!r} needs a package that is not installed: pip install {package}"
        ) from None
    if config.log == "wandb":
        name = folder.name

        def send(values: dict[str, float], epoch: int) -> None:
            # one run for each folder, which a resumed training goes on with
            run = library.run or library.init(
                project="domainshift", id=name, name=name, resume="allow", config=config.as_dict()
            )
            run.log(values, step=epoch)
    else:

        def send(values: dict[str, float], epoch: int) -> None:
            with library.SummaryWriter(str(folder / "tensorboard")) as writer:
                for tag, value in values.items():
                    writer.add_scalar(tag, value, epoch)

    return lambda row: send(curves_of(row), row.epoch)


def curves_of(row: Row) -> dict[str, float]:
    """The numbers of an epoch, in percent where they are shares, by the name of their curve."""
    trained = percent(row.source_train_correct, row.source_train_total)
    values = {"train/loss": row.train_loss, "train/accuracy": trained, "train/lr": row.lr}
    for name, count in row.tests.items():
        values[f"test/{name}/accuracy"] = percent(count.correct, count.total)
        values[f"test/{name}/loss"] = count.loss
    return values
