"""Statistics against published values, against scipy and numpy, and by simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from mlflow_llmbench import stats


@pytest.mark.parametrize("degrees", [1, 2, 4, 10, 29, 30, 31, 40, 60, 120, 1000])
def test_t_quantile_agrees_with_scipy(degrees: int) -> None:
    assert stats.t_quantile_975(degrees) == pytest.approx(reference.t.ppf(0.975, degrees), abs=2e-6)


def test_t_interval_of_a_published_example() -> None:
    """NIST/SEMATECH e-Handbook 1.3.5.2, Zarr's heat flow meter data: n = 195, mean 9.261460, s = 0.022789, interval (9.258242, 9.264679)."""
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
    """The 12 gauge values of the NIST/SEMATECH e-Handbook 7.2.6.2: its own definition (type 6) gives 95.1981, type 7 gives 95.19568."""
    values = [95.1772, 95.1567, 95.1937, 95.1959, 95.1442, 95.0610, 95.1591, 95.1195, 95.1065, 95.0925, 95.1990, 95.1682]
    assert stats.percentile(values, 90) == pytest.approx(95.19568, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "q", "enough"), [(28, 90, False), (29, 90, True), (58, 95, False), (59, 95, True), (298, 99, False), (299, 99, True), (1, 50, True)]
)
def test_support_of_percentiles(n: int, q: int, enough: bool) -> None:
    assert stats.supports(n, q) is enough


def test_support_is_the_formula_of_wilks() -> None:
    for q, n in stats.PERCENTILE_SUPPORT.items():
        if q > 50:
            assert n == math.ceil(math.log(0.05) / math.log(q / 100))


def test_steady_state() -> None:
    assert not stats.halves_agree([5.0, 1.0])
    assert stats.halves_agree([5.0, 1.0, 1.02])
    assert not stats.halves_agree([5.0, 2.0, 1.5, 1.2, 1.0])
    assert stats.halves_agree([5.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])


def test_absent_instead_of_wrong() -> None:
    assert stats.t_interval([1.0]) is None
    assert stats.relative_half_width([0.0, 0.0]) is None
    assert stats.coefficient_of_variation([3.0]) is None
    with pytest.raises(ValueError, match="no values"):
        stats.percentile([], 50)
    with pytest.raises(ValueError, match="at least 1"):
        stats.t_quantile_975(0)


def test_trend() -> None:
    assert stats.trend([1.0, 1.0, 1.5, 1.5, 2.0, 2.0]) == pytest.approx(1.0)
    assert stats.trend([1.0, 2.0]) == 0.0
