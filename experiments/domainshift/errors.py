"""What can go wrong, by whose fault: exit code 2 for bad input, 1 for a run that failed."""

from collections.abc import Sequence


def listing(names: Sequence[str]) -> str:
    """The first five names, and how many more there are: part of a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class BadInput(ValueError):
    """Something the user gave cannot be used. The message names it, its value and what is allowed."""


class ConfigError(BadInput):
    """A switch has a value that is not allowed, or two switches contradict each other."""


class DataError(BadInput):
    """A data folder, an image or a domain is not usable."""


class WeightsError(BadInput):
    """Initial weights are missing, unreadable, or belong to another network."""


class SuiteError(BadInput):
    """A suite, or the content of its folder, is not usable."""


class RecordError(BadInput):
    """A file of a run cannot be written or read: it is broken, the disk is full, and the like."""


class Failure(RuntimeError):
    """A run that started cannot go on."""


class TrainingError(Failure):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """A loss, an activation, a weight or a logit is NaN or infinite."""


class ShapingError(Failure):
    """Shaping was asked for and did not happen."""
