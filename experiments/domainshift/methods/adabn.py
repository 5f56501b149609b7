"""AdaBN: the baseline, tested with BatchNorm statistics of the target (Li et al., arXiv 1603.04779)."""

from __future__ import annotations

from collections.abc import Callable

from domainshift.config import Config
from domainshift.methods.base import Method


class AdaBN(Method):
    """The training is the baseline's. Only `bn_at_test` differs: `target`."""

    name = "adabn"
    title = "no shaping, BatchNorm measured on the target"
    defaults = {"bn_at_test": "target"}
    trains_as = Method.name

    @classmethod
    def check(cls, config: Config, refuse: Callable[[str, str], None]) -> list[str]:
        if config.bn_at_test != "target":
            refuse("bn_at_test", f"is not for mode {cls.name}, which tests with statistics of the "
                   "target; allowed: target")  # fmt: skip
        return super().check(config, refuse)
