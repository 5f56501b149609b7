"""Means, spreads and intervals of a few numbers, and what may be said of several comparisons.

Plain Python on lists: nothing here knows what a run is. (Not called statistics.py: scripts in this
folder would then import it in place of Python's own, which torch and triton need.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95  # of every interval in the report


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divisor n - 1); None for one value, which has no spread."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def t_inside(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with a whole number `df` >= 1 of degrees of freedom.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4: all terms are positive, so nothing
    cancels.
    """
    return _inside_angle(math.atan(abs(t) / math.sqrt(df)), df)


def _inside_angle(angle: float, df: int) -> float:
    """The same with t = sqrt(df) tan(angle)."""
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    total, term = 0.0, cos if odd else 1.0
    for k in range(df // 2):
        total += term
        term *= cos * cos * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return min(1.0, 2 / math.pi * (angle + sin * total) if odd else sin * total)


def t_quantile(level: float, df: int) -> float:
    """The t >= 0 with P(|T| <= t) = level, by bisection on the angle; relative error below 1e-9.

    Raises ValueError unless 0 <= level < 1 and df is a whole number from 1.
    """
    if not 0 <= level < 1:
        raise ValueError(f"level: {level} is not allowed; allowed: 0 <= level < 1")
    if df != int(df) or df < 1:
        raise ValueError(f"df: {df} is not allowed; allowed: a whole number from 1")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves down to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if _inside_angle(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


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

    One value has no interval. Nor have values that are all the same: a spread of zero says that
    they are no independent draws (two runs that both collapsed, say), not that they are exact.
    """
    centre, sd, n = mean(values), spread(values), len(values)
    # equal accuracies of unequal k and n differ in their last bits
    if sd is None or sd <= 1e-12 * max(1.0, abs(centre)):
        return Estimate(centre, sd, None, None, None, n)
    error = sd / math.sqrt(n)
    half = t_quantile(level, n - 1) * error
    p = max(0.0, 1 - t_inside(centre / error, n - 1))
    return Estimate(centre, sd, centre - half, centre + half, p, n)


def wilson(k: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval, in percent, of k right answers in n.

    Raises ValueError unless n >= 1 and 0 <= k <= n.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k of n: {k} of {n} is not allowed; allowed: 0 <= k <= n, n >= 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, scale = k / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at k = 0 and k = n one end is exact, and rounding must not move it
    low = 0.0 if k == 0 else 100 * (centre - half)
    return low, 100.0 if k == n else 100 * (centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: below alpha together at most alpha in error.

    The smallest is multiplied by their number m, the next by m - 1, and so on, each at least the
    one before it and at most 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def prediction(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Where one more value like these lies: mean +- t(level, n - 1) * spread * sqrt(1 + 1 / n).

    None where the values have no interval (see `estimate`).
    """
    found = estimate(values, level)
    if found.low is None:
        return None
    half = t_quantile(level, found.n - 1) * found.spread * math.sqrt(1 + 1 / found.n)
    return found.mean - half, found.mean + half
