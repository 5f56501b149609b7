"""Means, spreads and intervals of a few numbers, and p values of several comparisons together.

Nothing here knows what a result is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95  # of every interval in the report


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divisor n - 1); None for one value, which has no spread."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


class Estimate(NamedTuple):
    """A mean with its t interval; low, high and p are None where the values give none."""

    mean: float
    spread: float | None  # sample standard deviation
    low: float | None
    high: float | None
    p: float | None  # two-sided, of the mean being zero
    n: int


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of n values and its interval, mean +- t(level, n - 1) * spread / sqrt(n).

    One value has no interval. Nor have values that are all the same: a spread of zero says that they
    are no independent draws (two runs that both collapsed, say), not that they are exact.
    """
    centre, sd, n = mean(values), spread(values), len(values)
    # equal accuracies of unequal k and n differ in their last bits
    if sd is None or sd <= 1e-12 * max(1.0, abs(centre)):
        return Estimate(centre, sd, None, None, None, n)
    error, student = sd / math.sqrt(n), stats.t(n - 1)
    half = float(student.ppf((1 + level) / 2)) * error
    p = float(2 * student.sf(abs(centre) / error))
    return Estimate(centre, sd, centre - half, centre + half, p, n)


def prediction(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Where one more value like these lies: mean +- t(level, n - 1) * spread * sqrt(1 + 1 / n).

    None where the values have no interval (see `estimate`).
    """
    e = estimate(values, level)
    if e.low is None:
        return None
    half = (e.high - e.mean) * math.sqrt(e.n + 1)  # the interval's half has spread / sqrt(n)
    return e.mean - half, e.mean + half


def wilson(k: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval, in percent, of k right answers in n. k may be a mean.

    Raises ValueError unless n >= 1 and 0 <= k <= n.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k of n: {k} of {n} is not allowed; allowed: 0 <= k <= n, n >= 1")
    z = float(stats.norm.ppf((1 + level) / 2))
    share, scale = k / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at k = 0 and k = n one end is exact, and rounding must not move it
    low = 0.0 if k == 0 else 100 * (centre - half)
    return low, 100.0 if k == n else 100 * (centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given.

    Rejecting those below alpha keeps the chance of any error among them at alpha. The smallest is
    multiplied by their number m, the next by m - 1, and so on; each is at least the one before it and
    at most 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
