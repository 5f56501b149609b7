"""Means, spreads and intervals of a few numbers, and p values of several comparisons together.

Nothing here knows what a result is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95  # of every interval in the report
AGREE = 0.2  # p of a test of spreads, from which on they pass for one
POWER = 0.8  # with which the smallest difference that can be seen is seen


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divisor n - 1); None for one value, which has no spread."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


class Pool(NamedTuple):
    """The spread that the arms of a table have in common.

    sd: standard deviation of one result about the means of its arm and of its seed
    df: degrees of freedom, (arms - 1) * (seeds - 1)
    arms: how many arms it comes from, each of trainings of its own
    """

    sd: float
    df: int
    arms: int


def pooled(rows: Sequence[Sequence[float]]) -> Pool | None:
    """The common spread of arms, a row each of one value a seed (randomized blocks: seeds are blocks).

    The rows must be independent but for what a seed adds to all: two tests of one training are not.

    None for fewer than three arms or three seeds, for values without spread, and where the arms'
    spreads differ: where Bartlett's test has p < `AGREE`. (Levene's about the medians finds nothing in
    five seeds, and about the means too much.)
    """
    values = np.asarray(rows, dtype=float)
    arms, seeds = values.shape if values.ndim == 2 else (0, 0)
    if arms < 3 or seeds < 3:
        return None
    about = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    df = (arms - 1) * (seeds - 1)
    sd = math.sqrt(float((about**2).sum()) / df)
    if sd <= 1e-12 * max(1.0, abs(float(values.mean()))):
        return None
    if not (about.std(1) > 1e-12).all() or stats.bartlett(*about).pvalue < AGREE:
        return None
    return Pool(sd, df, arms)


class Estimate(NamedTuple):
    """A mean with its t interval; low, high and p are None where the values give none.

    spread: sample standard deviation
    p: two-sided, of the mean being zero
    error: standard error of the mean, from `pool` where there is one
    df: degrees of freedom of the error
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    error: float | None = None
    df: int | None = None


def estimate(
    values: Sequence[float], level: float = LEVEL, pool: Pool | None = None, scale: float = 1.0
) -> Estimate:
    """The mean of n values and its interval, mean +- t(level, df) * error.

    The error is spread / sqrt(n) on n - 1 degrees of freedom, or with a pool scale * sd / sqrt(n) on
    the pool's. A pool is not used where the values spread more than it says (F test, p < `AGREE`). One
    value has no interval. Nor have values that are all the same: a spread of zero says
    that they are no independent draws (two runs that both collapsed, say), not that they are exact.

    Args:
        pool: of the results whose weighted sums the values are.
        scale: square root of the sum of the squared weights; sqrt(2) for a difference of two results.
    """
    centre, sd, n = mean(values), spread(values), len(values)
    # equal accuracies of unequal k and n differ in their last bits
    if sd is None or sd <= 1e-12 * max(1.0, abs(centre)):
        return Estimate(centre, sd, None, None, None, n)
    if pool is not None:
        ratio = (sd / (scale * pool.sd)) ** 2
        pool = None if stats.f(n - 1, pool.df).sf(ratio) < AGREE else pool
    error = (sd if pool is None else scale * pool.sd) / math.sqrt(n)
    df = n - 1 if pool is None else pool.df
    student = stats.t(df)
    half = float(student.ppf((1 + level) / 2)) * error
    p = float(2 * student.sf(abs(centre) / error))
    return Estimate(centre, sd, centre - half, centre + half, p, n, error, df)


def equivalence(e: Estimate, margin: float) -> float | None:
    """p of the mean being `margin` or more from zero: the larger of two one-sided t tests.

    (Schuirmann, 1987.) None where the estimate has no error.
    """
    if e.error is None:
        return None
    student = stats.t(e.df)
    return float(
        max(student.sf((e.mean + margin) / e.error), student.cdf((e.mean - margin) / e.error))
    )


def beyond(e: Estimate, margin: float) -> float | None:
    """p of the mean being no more than `margin` from zero: a t test of both ends of that interval.

    Where the true mean is `margin`, an estimate as far from zero on either side has this probability.
    With a margin of zero it is the two-sided p. None where the estimate has no error.
    """
    if e.error is None:
        return None
    student, far = stats.t(e.df), abs(e.mean)
    return float(
        min(1.0, student.sf((far - margin) / e.error) + student.sf((far + margin) / e.error))
    )


def quantile(df: int, alpha: float) -> float:
    """What Student's t exceeds with probability `alpha`: one-sided."""
    return float(stats.t(df).isf(alpha))


@functools.lru_cache(maxsize=1024)
def smallest_difference(df: int, alpha: float, power: float = POWER) -> float:
    """The difference, in standard errors, that a two-sided t test sees with probability `power`.

    Args:
        df: degrees of freedom of the error.
        alpha: level of the test.
    """
    bound = float(stats.t(df).ppf(1 - alpha / 2))
    # over the errors that may be estimated, at the midpoints of a thousand equally probable parts
    parts = (np.arange(1000) + 0.5) / 1000
    bounds = bound * np.sqrt(stats.chi2(df).ppf(parts) / df)

    def lacking(shift: float) -> float:
        seen = stats.norm.sf(bounds - shift) + stats.norm.cdf(-bounds - shift)
        return float(seen.mean()) - power

    return float(optimize.brentq(lacking, 0.0, 10 * bound + 10))


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
