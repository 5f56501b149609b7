"""Intervals against values worked out by hand or printed in every table of Student's t."""

import math

import pytest
from domainshift.report import statistics
from domainshift.report.statistics import (
    Pool,
    beyond,
    equivalence,
    estimate,
    holm,
    mean,
    pooled,
    prediction,
    smallest_difference,
    spread,
    wilson,
)
from scipy import stats

# two-sided levels; the usual printed table, to three decimals
PRINTED = {
    0.90: {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 9: 1.833, 30: 1.697, 60: 1.671},
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 60: 2.000},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 9: 3.250, 30: 2.750, 60: 2.660},
}


def values_of(n):
    """n values of mean 0 whose standard error is 1, so that half their interval is the t quantile."""
    values = [float(i - (n - 1) / 2) for i in range(n)]
    scale = math.sqrt(n) / spread(values)
    return [v * scale for v in values]


@pytest.mark.parametrize("level", PRINTED)
def test_t_quantiles_are_the_printed_ones(level):
    for df, expected in PRINTED[level].items():
        assert estimate(values_of(df + 1), level).high == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_t_quantiles_of_closed_forms(level):
    def quantile(df):
        return estimate(values_of(df + 1), level).high

    # df 1 is Cauchy; df 2 solves t / sqrt(2 + t^2) = level
    assert quantile(1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-9)
    assert quantile(2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-9)
    # df 4: with c = t / sqrt(4 + t^2), P = c (3 - c^2) / 2, a cubic whose root is 2 sin(asin(P)/3)
    c = 2 * math.sin(math.asin(level) / 3)
    assert quantile(4) == pytest.approx(2 * c / math.sqrt(1 - c * c), rel=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 11, 29, 59])
def test_p_is_the_integral_of_the_density_of_t(df):
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps, end = 4000, 2.5
    points = [constant * (1 + (end * i / steps) ** 2 / df) ** (-(df + 1) / 2)
              for i in range(steps + 1)]  # fmt: skip
    simpson = points[0] + points[-1] + 4 * sum(points[1::2]) + 2 * sum(points[2:-1:2])
    inside = 2 * simpson * end / steps / 3
    for sign in (1, -1):
        e = estimate([v + sign * end for v in values_of(df + 1)])
        assert e.p == pytest.approx(1 - inside, abs=1e-10)


def test_t_becomes_normal():
    assert estimate(values_of(100_001)).high == pytest.approx(1.959964, abs=5e-5)


def test_mean_and_spread_by_hand():
    assert mean([54, 56, 61]) == 57
    assert spread([54, 56, 61]) == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert spread([54]) is None


def test_estimate_by_hand():
    # 1, 2, 3, 4, 5: mean 3, variance 2.5, error sqrt(0.5); t(0.95, 4) = 2.776445
    e = estimate([1, 2, 3, 4, 5])
    assert (e.mean, e.n) == (3, 5)
    assert e.low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert e.high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-6)
    # t = 3 / sqrt(0.5) = 4.2426, on 4 degrees of freedom: c = t / sqrt(4 + t^2) = 0.904534
    assert e.p == pytest.approx(1 - 0.904534 * (3 - 0.904534**2) / 2, abs=1e-5)


def test_two_values_by_hand():
    e = estimate([0.0, 2.0])  # error 1, t(0.95, 1) = 12.7062; t = 1 is the Cauchy quartile
    assert (e.low, e.high) == pytest.approx((1 - 12.706205, 1 + 12.706205), abs=1e-6)
    assert e.p == pytest.approx(0.5)


def test_one_value_has_no_interval():
    assert estimate([1.5]) == (1.5, None, None, None, None, 1, None, None)


def test_equal_values_have_no_interval():
    e = estimate([1.5, 1.5, 1.5])
    assert (e.mean, e.spread, e.low, e.p) == (1.5, 0.0, None, None)
    assert estimate([0.1 + 0.2, 0.3]).low is None  # equal but for rounding


def test_the_interval_excludes_zero_exactly_when_p_is_below_the_rest():
    for shift in (0.5, 1.0, 1.9, 2.0, 3.0):
        e = estimate([shift - 1, shift, shift + 1, shift + 2])
        assert (e.low > 0) == (e.p < 1 - statistics.LEVEL)


def test_wilson_by_hand():
    # z = 1.959964, z^2 = 3.841459; 8 of 10: centre 0.8 + 0.1920729 = 0.9920729 over 1.3841459,
    # half 1.959964 sqrt(0.016 + 0.00960365) over 1.3841459
    low, high = wilson(8, 10)
    assert low == pytest.approx(100 * (0.9920729 - 0.3136137) / 1.3841459, abs=1e-3)
    assert high == pytest.approx(100 * (0.9920729 + 0.3136137) / 1.3841459, abs=1e-3)
    # the ends k = 0 and k = n: z^2 / (n + z^2)
    assert wilson(0, 10) == (0.0, pytest.approx(100 * 3.841459 / 13.841459, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(100 * 10 / 13.841459, abs=1e-4), 100.0)


@pytest.mark.parametrize("k, n, half", [(1278, 2344, 2.0), (1589, 3929, 1.5)])
def test_wilson_of_the_baselines(k, n, half):
    low, high = wilson(k, n)
    assert (high - low) / 2 == pytest.approx(half, abs=0.05)


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="k of n"):
        wilson(k, n)


def test_holm_by_hand():
    # sorted 0.01 x 4, 0.02 x 3, 0.03 x 2 (= 0.06, equal to the one before), 0.5 x 1
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_prediction_by_hand():
    # 1 ... 5: spread sqrt(2.5), n = 5: half 2.776445 sqrt(2.5 * 6 / 5) = 2.776445 sqrt(3)
    half = 2.776445 * math.sqrt(3)
    assert prediction([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert prediction([1.0]) is None


# --- arms together ----------------------------------------------------------------------------


def test_a_pool_by_hand():
    """Three arms of three seeds; what is left of arms and seeds has squares that sum to 88/9."""
    pool = pooled([[0, 0, 0], [4, 4, 6], [0, 2, -2]])
    assert (pool.df, pool.arms) == (4, 3)
    assert pool.sd**2 == pytest.approx(88 / 9 / 4)


def test_a_pool_is_blind_to_what_arms_and_seeds_have_in_common():
    rows = [[1.0, 2.0, 4.0, 3.0], [2.0, 2.5, 3.0, 1.0], [0.0, 5.0, 1.0, 2.0]]
    moved = [[v + 10 * i + 7 * j for j, v in enumerate(row)] for i, row in enumerate(rows)]
    assert pooled(moved).sd == pytest.approx(pooled(rows).sd)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[1, 2, 3], [3, 1, 2]],  # two arms
        [[1, 2], [2, 1], [3, 5]],  # two seeds
        [[1, 1, 1], [2, 2, 2], [3, 3, 3]],  # no spread
        [*([0, i, 2, 0, 1] for i in range(6)), [40, -50, 60, -30, 20]],  # one spreads wider
    ],
)
def test_what_gives_no_pool(rows):
    assert pooled(rows) is None


def test_a_difference_with_a_pool():
    """Error sqrt(2) * 3 / sqrt(4) on 30 degrees of freedom; the values' own spread is smaller."""
    e = estimate([4.0, 5.0, 6.0, 5.0], pool=Pool(3.0, 30, 11), scale=math.sqrt(2))
    assert (e.mean, e.df) == (5.0, 30)
    assert e.error == pytest.approx(3 / math.sqrt(2))
    assert e.high - e.mean == pytest.approx(2.042 * 3 / math.sqrt(2), abs=2e-3)


def test_values_that_spread_more_than_the_pool_have_their_own_error():
    values = [0.0, 10.0, -10.0, 5.0]
    assert estimate(values, pool=Pool(1.0, 30, 11), scale=math.sqrt(2)) == estimate(values)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    """t = (3 - 1) / 1 and (1 + 3) / 1 on 2 degrees of freedom, where P(T > t) is closed."""

    def above(t):
        return 0.5 * (1 - t / math.sqrt(2 + t * t))

    e = estimate([1 - math.sqrt(3), 1.0, 1 + math.sqrt(3)])
    assert e.error == pytest.approx(1)
    assert equivalence(e, 3.0) == pytest.approx(above(2.0))
    assert equivalence(e._replace(mean=-1.0), 3.0) == pytest.approx(above(2.0))
    assert equivalence(estimate([1.0]), 3.0) is None


@pytest.mark.parametrize("df, alpha", [(4, 0.05), (36, 0.05 / 18), (2, 0.1)])
def test_the_smallest_difference_is_found_with_the_stated_power(df, alpha):
    """Against scipy's noncentral t, an independent computation of the same probability."""
    shift, bound = smallest_difference(df, alpha), stats.t(df).ppf(1 - alpha / 2)
    found = stats.nct.sf(bound, df, shift) + stats.nct.cdf(-bound, df, shift)
    assert found == pytest.approx(0.8, abs=2e-4)


def test_beyond_a_margin_is_a_test_of_both_its_ends():
    """Of a margin of zero it is the two-sided test; a true value at the margin is passed by chance."""
    e = estimate([1.0, 3.0, 2.0, 4.0, 2.0])
    assert beyond(e, 0.0) == pytest.approx(e.p)
    above, below = (float(stats.t(4).sf((2.4 + end) / e.error)) for end in (-1.0, 1.0))
    assert beyond(e, 1.0) == beyond(e._replace(mean=-2.4), 1.0) == pytest.approx(above + below)
    assert beyond(e, 2.4) > 0.5 and beyond(e._replace(mean=0.0), 2.0) == 1.0
    assert beyond(estimate([1.0]), 3.0) is None


def test_more_seeds_find_smaller_differences():
    assert smallest_difference(44, 0.05) < smallest_difference(4, 0.05)
    assert smallest_difference(10**6, 0.05) == pytest.approx(1.959964 + 0.841621, abs=1e-3)
