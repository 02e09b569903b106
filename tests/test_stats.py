"""Statistics against published values, against scipy and numpy, and by simulation."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from mlflow_llmbench import stats
from mlflow_llmbench.records.verdicts import PERCENTILE_SUPPORT
from mlflow_llmbench.stats import bootstrap
from mlflow_llmbench.stats.variance import Part, t_test


@pytest.mark.parametrize("degrees", [1, 2, 4, 10, 29, 30, 31, 40, 60, 120, 1000])
def test_t_quantile_agrees_with_scipy(degrees: int) -> None:
    assert stats.t_quantile_975(degrees) == pytest.approx(reference.t.ppf(0.975, degrees), abs=2e-6)


def test_t_interval_of_a_published_example() -> None:
    """NIST/SEMATECH e-Handbook 1.3.5.2, Zarr's heat flow meter data.

    n = 195, mean 9.261460, s = 0.022789, interval (9.258242, 9.264679).
    """
    rng = np.random.default_rng(1)
    values = rng.normal(size=195)
    values = (values - values.mean()) / values.std(ddof=1) * 0.022789 + 9.261460
    low, high = stats.t_interval(list(values))
    assert (low, high) == (pytest.approx(9.258242, abs=1e-6), pytest.approx(9.264679, abs=1e-6))


def test_intervals_cover_the_truth_95_times_in_100() -> None:
    draw = random.Random(3)
    hits = 0
    for _ in range(4000):
        low, high = stats.t_interval([draw.gauss(10, 2) for _ in range(6)])
        hits += low <= 10 <= high
    assert 0.94 <= hits / 4000 <= 0.96


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert stats.percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100), st.integers(1, 7))
def test_repeated_values_count_as_often_as_if_written_out(values: list[float], q: float, repeat: int) -> None:
    written = [value for value in values for _ in range(repeat)]
    assert stats.percentile(values, q, repeat) == pytest.approx(stats.percentile(written, q), rel=1e-9, abs=1e-6)


def test_percentile_of_a_published_example() -> None:
    """The 12 gauge values of the NIST/SEMATECH e-Handbook 7.2.6.2: its type 6 gives 95.1981, type 7 gives 95.19568."""
    values = [
        95.1772,
        95.1567,
        95.1937,
        95.1959,
        95.1442,
        95.0610,
        95.1591,
        95.1195,
        95.1065,
        95.0925,
        95.1990,
        95.1682,
    ]
    assert stats.percentile(values, 90) == pytest.approx(95.19568, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "q", "enough"),
    [
        (28, 90, False),
        (29, 90, True),
        (58, 95, False),
        (59, 95, True),
        (298, 99, False),
        (299, 99, True),
        (1, 50, True),
    ],
)
def test_support_of_percentiles(n: int, q: int, enough: bool) -> None:
    assert stats.supports(n, q) is enough


def test_support_is_the_formula_of_wilks() -> None:
    for q, n in PERCENTILE_SUPPORT.items():
        if q > 50:
            assert n == math.ceil(math.log(0.05) / math.log(q / 100))


def test_steady_state() -> None:
    assert not stats.is_steady([5.0, 1.0])
    assert stats.is_steady([5.0, 1.0, 1.02])
    assert not stats.is_steady([5.0, 2.0, 1.5, 1.2, 1.0])
    assert stats.is_steady([5.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])


def test_absent_instead_of_wrong() -> None:
    assert stats.t_interval([1.0]) is None
    assert stats.coefficient_of_variation([3.0]) is None
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], 50)
    with pytest.raises(ValueError, match="at least 1"):
        stats.t_quantile_975(0)


NIST_OUTLIERS = [
    30, 171, 184, 201, 212, 250, 265, 270, 272, 289, 305, 306, 322, 322, 336, 346, 351, 370, 390, 404, 409, 411, 436,
    437, 439, 441, 444, 448, 451, 453, 470, 480, 482, 487, 494, 495, 499, 503, 514, 521, 522, 527, 548, 550, 559, 560,
    570, 572, 574, 578, 585, 592, 592, 607, 616, 618, 621, 629, 637, 638, 640, 656, 668, 707, 709, 719, 737, 739, 752,
    758, 766, 792, 792, 794, 802, 818, 830, 832, 843, 858, 860, 869, 918, 925, 953, 991, 1000, 1005, 1068, 1441,
]  # fmt: skip
"""NIST/SEMATECH e-Handbook 7.1.6, outliers: median 559.5, quartiles 429.75 and 742.25 (its definition, type 6)."""

MOUSE_TREATMENT = [94, 197, 16, 38, 99, 141, 23]
"""Efron & Tibshirani, An Introduction to the Bootstrap (1993), table 2.1."""

SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
"""Student, The probable error of a mean (1908): extra hours of sleep with two drugs; the data set `sleep` of R."""


def test_mad_of_a_published_example() -> None:
    """The help page of R's mad: of 1 … 9, and of 1 … 8 and 100, it is 2 with constant 1."""
    assert stats.mad(range(1, 10)) == stats.mad([*range(1, 9), 100]) == 2


def test_outliers_of_a_published_example() -> None:
    """The handbook finds one mild outlier, 1441, beyond the inner fence at 1211, and no extreme one."""
    assert np.percentile(NIST_OUTLIERS, [25, 50, 75], method="weibull").tolist() == [429.75, 559.5, 742.25]
    found = stats.classify_outliers(NIST_OUTLIERS)
    assert [(value, word) for value, word in zip(NIST_OUTLIERS, found, strict=True) if word] == [(1441, "mild")]


def test_outliers_by_hand() -> None:
    """Quartiles of 1 … 9 are 3 and 7: mild beyond −3 and 13, severe beyond −9 and 19."""
    for value, word in [(13, None), (13.1, "mild"), (19, "mild"), (19.1, "severe"), (-3, None), (-9.1, "severe")]:
        values = [1, 2, 3, 4, 5, 6, 7, 8, value] if value > 5 else [value, 2, 3, 4, 5, 6, 7, 8, 9]
        assert stats.classify_outliers(values) == [word if v == value else None for v in values]
    assert stats.classify_outliers([1, 1, 1, 50]) == [None] * 4
    assert stats.classify_outliers([1, 1, 1, 1, 1, 50])[-1] == "severe"


def test_resampling_has_the_published_standard_errors() -> None:
    """Efron & Tibshirani (1993), table 2.2, infinitely many resamples, treated mice: mean 23.36, median 37.83."""
    data = np.array(MOUSE_TREATMENT, float)
    for statistic, error in (("mean", 23.36), ("median", 37.83)):
        assert bootstrap._resample(data, statistic, 200_000, 1).std() == pytest.approx(error, rel=0.005)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
def test_the_median_is_drawn_from_its_exact_distribution(values: list[float]) -> None:
    """Compare with all nⁿ resamples, written out; the shares deviate by at most Kolmogorov's 1.63/√N at 99 %."""
    every = np.median(np.array(list(itertools.product(values, repeat=len(values)))), axis=1)
    drawn = bootstrap._resample(np.array(values), "median", 40_000, 2)
    points = np.unique(every)
    shares = [np.searchsorted(np.sort(sample), points, side="right") / sample.size for sample in (every, drawn)]
    assert set(np.unique(drawn)) <= set(points)
    assert np.abs(shares[0] - shares[1]).max() < 1.63 / math.sqrt(40_000)


def coverage(interval: object, n: int, draws: int = 1500) -> float:
    """Share of samples of n normal values with mean 10 whose interval contains 10."""
    rng = np.random.default_rng(n)
    hits = 0
    for number in range(draws):
        low, high = interval(rng.normal(10, 2, n), number)
        hits += low <= 10 <= high
    return hits / draws


@pytest.mark.parametrize("n", [10, 20, 30])
@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_intervals_cover_the_truth(n: int, statistic: str) -> None:
    """Compare the coverage over 1,500 samples, a share with a standard deviation of 0.6 %."""
    assert 0.92 <= coverage(lambda v, seed: stats.bootstrap_interval(v, statistic, 1000, seed), n) <= 0.98


@pytest.mark.parametrize("n", [5, 10, 30])
def test_t_intervals_cover_the_truth_with_few_runs(n: int) -> None:
    assert 0.935 <= coverage(lambda v, _: stats.t_interval(v.tolist()), n) <= 0.965


def test_the_bootstrap_of_five_means_covers_less_than_t_as_its_docstring_says() -> None:
    assert 0.88 <= coverage(lambda v, seed: stats.bootstrap_interval(v, "mean", 1000, seed), 5) <= 0.93


def autoregressive(phi: float, length: int, count: int, seed: int = 4) -> np.ndarray:
    """Stationary AR(1) series with mean 0, one a row."""
    noise = np.random.default_rng(seed).normal(size=(count, length))
    series = np.empty_like(noise)
    series[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for i in range(1, length):
        series[:, i] = phi * series[:, i - 1] + noise[:, i]
    return series


def test_block_bootstrap_covers_where_the_plain_one_does_not() -> None:
    """AR(1) with φ = 0.8, 256 values: at least 85 %, against about 50 % when the values are taken as independent."""
    held = {None: 0, 1: 0}
    every = autoregressive(0.8, 256, 600)
    for block in held:
        for number, series in enumerate(every):
            low, high = stats.block_bootstrap_interval(series, block, resamples=1000, seed=number)
            held[block] += low <= 0 <= high
    assert 0.87 <= held[None] / 600 <= 0.98
    assert held[1] / 600 < 0.6


def test_the_block_bootstrap_of_the_median_covers_in_short_and_in_long_series() -> None:
    """AR(1) with φ = 0.8; long series go by the share of values below the median."""
    for length, least in ((256, 0.87), (1500, 0.90)):
        held = 0
        for number, series in enumerate(autoregressive(0.8, length, 400, seed=7)):
            low, high = stats.block_bootstrap_interval(series, statistic="median", resamples=600, seed=number)
            held += low <= 0 <= high
        assert least <= held / 400 <= 0.98


def test_medians_by_shares_are_those_of_whole_resamples() -> None:
    """For one skewed series, whole resamples (a custom function) and shares agree within a tenth of the width."""
    for number, series in enumerate(np.exp(2 * autoregressive(0.8, 3000, 4, seed=8))):
        low, high = stats.block_bootstrap_interval(series, 20, "median", seed=number)
        exact = stats.block_bootstrap_interval(
            series, 20, lambda rows, axis: np.median(rows, axis=axis), seed=number + 100
        )
        assert (low, high) == pytest.approx(exact, abs=0.1 * (high - low))


def test_block_length_follows_the_published_optimum() -> None:
    """For AR(1) and the circular bootstrap g/g(0) = 2φ/(1 − φ²), so b = (1.5·(2φ/(1 − φ²))²·n)^(1/3): 57 and 17.

    Politis & White 2004, 3.1.
    """
    for phi, n in ((0.8, 6400), (0.5, 2000)):
        ideal = (1.5 * (2 * phi / (1 - phi**2)) ** 2 * n) ** (1 / 3)
        assert np.median([stats.block_length(series) for series in autoregressive(phi, n, 20)]) == pytest.approx(
            ideal, rel=0.2
        )
    assert stats.block_length(np.random.default_rng(0).normal(size=1000)) == 1
    assert stats.block_length([3.0] * 100) == 1
    assert stats.block_length([1.0, 2.0]) == 1


def test_anticorrelated_series_have_a_block_length_and_an_interval() -> None:
    """Differences of neighbours have no spectrum at 0: where its estimate is not positive, blocks are the longest."""
    noise = np.random.default_rng(4).normal(size=101)
    assert stats.block_length(np.diff(noise)) == math.ceil(3 * math.sqrt(100))
    assert all(1 <= stats.block_length(series) <= 48 for series in autoregressive(-0.8, 256, 50, seed=9))
    low, high = stats.block_bootstrap_interval([9.0, 11.0] * 50)
    assert low == pytest.approx(10) == high


def test_the_block_bootstrap_of_anticorrelated_series_covers_and_is_narrower_than_the_plain_one() -> None:
    held, widths = 0, {None: 0.0, 1: 0.0}
    for number, series in enumerate(autoregressive(-0.5, 256, 300, seed=9)):
        for block in widths:
            low, high = stats.block_bootstrap_interval(series, block, resamples=600, seed=number)
            widths[block] += high - low
            held += block is None and low <= 0 <= high
    assert 0.9 <= held / 300 <= 0.99
    assert widths[None] < 0.8 * widths[1]


def test_blocks_are_summed_as_if_written_out() -> None:
    series = autoregressive(0.5, 103, 1)[0] + 50
    fast = stats.block_bootstrap_interval(series, 10, "mean")
    assert fast == pytest.approx(
        stats.block_bootstrap_interval(series, 10, lambda rows, axis: rows.mean(axis=axis)), rel=0.005
    )
    ring = np.concatenate([series, series[:9]])
    starts = np.array([[0, 100, 7, 3, 50, 60, 70, 80, 90, 95, 102]])
    written = np.concatenate([ring[s : s + 10] for s in starts[0]])[:103]
    assert bootstrap._block_means(ring, 103, 10, starts) == pytest.approx([written.mean()])


def test_a_hundred_thousand_samples_take_little_memory() -> None:
    values = autoregressive(0.8, 100_000, 1)[0]
    tracemalloc.start()
    stats.bootstrap_interval(values, "mean", resamples=100)
    stats.bootstrap_interval(values, "median")
    stats.block_bootstrap_interval(values)
    stats.block_bootstrap_interval(values, statistic="median")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 200e6


def test_bootstrap_takes_any_function_and_is_absent_instead_of_wrong() -> None:
    values = np.random.default_rng(5).normal(0, 3, 200)
    low, high = stats.bootstrap_interval(values, np.std)
    assert 2.5 < low < values.std() < high < 3.5
    assert stats.bootstrap_interval(values, "mean", seed=1) == stats.bootstrap_interval(values, "mean", seed=1)
    assert stats.bootstrap_interval([1, 2, 3, 4], "mean") is None
    assert stats.block_bootstrap_interval(values, 100) is None
    with pytest.raises(ValueError, match="unknown statistic: mode. Use mean or median"):
        stats.bootstrap_interval(values, "mode")
    with pytest.raises(ValueError, match="block is too short: 0"):
        stats.block_bootstrap_interval(values, 0)


def test_welch_of_a_published_example() -> None:
    """The help page of R's t.test, sleep (drug 1 − drug 2): t = −1.8608, 17.776 degrees, p = 0.07939.

    Interval −3.3654832 to 0.2054832.
    """
    found = stats.welch(SLEEP_2, SLEEP_1)
    assert (found.statistic, found.degrees, found.p_value) == pytest.approx((-1.8608, 17.776, 0.07939), rel=1e-4)
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-7)


def test_paired_of_a_published_example() -> None:
    """The same, paired: t = −4.0621, 9 degrees, p = 0.002833, interval −2.4598858 to −0.7001142."""
    found = stats.paired(SLEEP_2, SLEEP_1)
    assert (found.statistic, found.degrees, found.p_value) == pytest.approx((-4.0621, 9, 0.002833), rel=2e-4)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.difference == pytest.approx(-1.58)


def test_mann_whitney_of_a_published_example() -> None:
    """Hollander & Wolfe (1973) p. 69, the help page of R's wilcox.test: W = 35, one-sided p = 0.1272."""
    term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    early = [1.15, 0.88, 0.90, 0.74, 1.21]
    found = stats.mann_whitney(term, early)
    assert found.statistic == 35
    assert found.p_value / 2 == pytest.approx(0.1272, abs=5e-5)


def test_holm_of_a_published_example() -> None:
    """Wikipedia, Holm–Bonferroni method: of 0.01, 0.04, 0.03 and 0.005 the first and the last are below 0.05."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.6]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    if np.std(a) < 1e-3 or np.std(b) < 1e-3:
        return
    found, expected = stats.welch(a, b), reference.ttest_ind(b, a, equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.degrees == pytest.approx(expected.df, rel=1e-6)


def test_more_precise_means_never_make_a_known_noise_harder_to_see_through() -> None:
    """The noise between processes was estimated as 0, with an error: subtracted from what was seen."""
    noise = Part(0.0, 2e-10, 9)
    found = [t_test(0.05, (Part(error, error**2 / 30), noise)) for error in (1e-3, 1e-4, 1e-5, 1e-6, 1e-9)]
    assert all(later.p_value <= sooner.p_value for sooner, later in itertools.pairwise(found))
    assert found[-1].p_value < 1e-4 and found[-1].degrees == pytest.approx(9)
    low, high = found[-1].low, found[-1].high
    assert low <= 0.05 - 2 * math.sqrt(1e-9) < 0.05 + 2 * math.sqrt(1e-9) <= high
    few = t_test(0.05, (Part(1e-4, 1e-4**2 / 2),))
    assert few.degrees == pytest.approx(2)  # a variance of 3 values has its own degrees


def test_tests_without_variation_or_values() -> None:
    assert stats.welch([1, 1], [1, 1]).p_value == 1
    same = stats.welch([1, 1], [2, 2])
    assert (same.low, same.high, same.p_value) == (1, 1, 0)
    assert stats.paired([1, 2], [2, 3]).p_value == 0
    assert stats.welch([1], [1, 2]) is None
    assert stats.paired([1], [1]) is None
    assert stats.mann_whitney([], [1]) is None
    assert stats.mann_whitney([2, 2], [2, 2]).p_value == 1
    with pytest.raises(ValueError, match="as many values on both sides: 1 and 2"):
        stats.paired([1], [1, 2])
