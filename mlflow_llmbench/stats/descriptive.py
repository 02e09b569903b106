"""Means with Student intervals, percentiles, spread, steadiness and outliers of one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, stdev

from ..records.verdicts import PERCENTILE_SUPPORT

T_975 = (
    12.70620474, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425, 2.30600414, 2.26215716,
    2.22813885, 2.20098516, 2.17881283, 2.16036866, 2.14478669, 2.13144955, 2.11990530, 2.10981558, 2.10092204,
    2.09302405, 2.08596345, 2.07961384, 2.07387307, 2.06865761, 2.06389856, 2.05953855, 2.05552944, 2.05183052,
    2.04840714, 2.04522964, 2.04227246,
)  # fmt: skip
"""Quantiles t(0.975; ν) of Student's distribution, ν = 1 … 30 (e.g. NIST/SEMATECH e-Handbook 1.3.6.7.2)."""


def t_quantile_975(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with `degrees` degrees of freedom; ValueError if below 1.

    Above 30 it uses the Cornish–Fisher expansion of Abramowitz & Stegun 26.7.5, with an error below 1e-6 there.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1: {degrees}")
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    n = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean, `mean ± t(0.975; n − 1)·s/√n`; None with fewer than 2 values."""
    if len(values) < 2:
        return None
    half = t_quantile_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    centre = fmean(values)
    return centre - half, centre + half


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation ÷ mean; None with fewer than 2 values or a mean of 0."""
    if len(values) < 2 or fmean(values) == 0:
        return None
    return stdev(values) / abs(fmean(values))


def percentile(values: Sequence[float], q: float, repeat: int = 1) -> float:
    """The q-th percentile (0 … 100) with linear interpolation, as numpy's default (Hyndman & Fan 1996, type 7).

    With `repeat`, each value counts that often: rows of one batch share a stamp. The copies, up to 10⁹, are not stored.
    ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    order = sorted(values)
    last = len(order) * repeat - 1
    position = q / 100 * last
    below = math.floor(position)
    low, high = order[below // repeat], order[min(below + 1, last) // repeat]
    return low + (high - low) * (position - below)


def supports(n: int, q: int) -> bool:
    """Return True if n distinct samples are enough to report the q-th percentile (see `metrics.PERCENTILE_SUPPORT`)."""
    needed = PERCENTILE_SUPPORT.get(q)
    return n >= (needed if needed is not None else math.ceil(math.log(0.05) / math.log(q / 100)) if q > 50 else 1)


def is_steady(values: Sequence[float], tolerance: float = 0.05) -> bool:
    """Return True if a trace of durations is steady: the medians of its two halves differ by at most `tolerance`.

    The first value (cold caches, compilation) is left out. Comparing an early with a late part of a trace is Geweke's
    diagnostic (1992). Medians replace his means, so that one disturbed run does not decide. False with fewer than 3
    values.
    """
    rest = list(values[1:])
    if len(rest) < 2:
        return False
    middle = len(rest) // 2
    first, second = median(rest[:middle]), median(rest[-middle:])
    return abs(first - second) <= tolerance * min(first, second)


def mad(values: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled; × 1.4826 estimates the standard deviation of normal data."""
    centre = median(values)
    return median(abs(value - centre) for value in values)


def classify_outliers(values: Sequence[float]) -> list[str | None]:
    """For each value None, "mild" (beyond 1.5 interquartile ranges from the quartiles) or "severe" (beyond 3).

    The fences of Tukey, Exploratory Data Analysis (1977), with quartiles by `percentile`. Outliers are shown, never
    dropped. If the middle half of the values is identical, the range is 0 and every other value is severe. All None
    with fewer than 5 values, whose quartiles say nothing.
    """
    if len(values) < 5:
        return [None] * len(values)
    low, high = percentile(values, 25), percentile(values, 75)
    beyond = [max(low - value, value - high) for value in values]
    return ["severe" if d > 3 * (high - low) else "mild" if d > 1.5 * (high - low) else None for d in beyond]
