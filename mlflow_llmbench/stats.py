"""Statistics over plain lists of numbers: no I/O, no state.

The unit of inference is the repetition, never the token: tokens of one request are correlated, and pooling them gives
95 % intervals that cover the truth 35–50 % of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, stdev

from .metrics import PERCENTILE_SUPPORT

T_975 = (
    12.70620474, 4.30265273, 3.18244631, 2.77644511, 2.57058184, 2.44691185, 2.36462425, 2.30600414, 2.26215716, 2.22813885,
    2.20098516, 2.17881283, 2.16036866, 2.14478669, 2.13144955, 2.11990530, 2.10981558, 2.10092204, 2.09302405, 2.08596345,
    2.07961384, 2.07387307, 2.06865761, 2.06389856, 2.05953855, 2.05552944, 2.05183052, 2.04840714, 2.04522964, 2.04227246,
)  # fmt: skip
"""Quantiles t(0.975; ν) of Student's distribution for ν = 1 … 30 (any statistical table, e.g. NIST/SEMATECH e-Handbook 1.3.6.7.2)."""


def t_quantile_975(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with `degrees` ≥ 1 degrees of freedom.

    Above 30 the Cornish–Fisher expansion of Abramowitz & Stegun 26.7.5 is used; its error there is below 1e-6.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1: {degrees}")
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    n = float(degrees)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean, `mean ± t(0.975; n − 1)·s/√n`; None with fewer than 2 values."""
    if len(values) < 2:
        return None
    half = t_quantile_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    centre = fmean(values)
    return centre - half, centre + half


def relative_half_width(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % interval of the mean ÷ the mean; None with fewer than 2 values or a mean of 0."""
    interval = t_interval(values)
    if interval is None or fmean(values) == 0:
        return None
    return (interval[1] - interval[0]) / 2 / abs(fmean(values))


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation ÷ mean; None with fewer than 2 values or a mean of 0."""
    if len(values) < 2 or fmean(values) == 0:
        return None
    return stdev(values) / abs(fmean(values))


def percentile(values: Sequence[float], q: float, repeat: int = 1) -> float:
    """The q-th percentile (0 … 100) with linear interpolation, as numpy's default (Hyndman & Fan 1996, type 7).

    With `repeat` each value counts that often, as rows of one batch share a stamp; they are not written out, there can be 10⁹.
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
    """Whether n distinct samples support the q-th percentile (see `metrics.PERCENTILE_SUPPORT`)."""
    needed = PERCENTILE_SUPPORT.get(q)
    return n >= (needed if needed is not None else math.ceil(math.log(0.05) / math.log(q / 100)) if q > 50 else 1)


def halves_agree(values: Sequence[float], tolerance: float = 0.05) -> bool:
    """Whether a trace of durations is steady: the medians of its first and second half differ by less than `tolerance`.

    The first value (cold caches, compilation) is left out. The comparison of an early with a late part of a trace is
    Geweke's diagnostic (1992), here with medians, since one disturbed run must not decide. False with fewer than 3 values.
    """
    rest = list(values[1:])
    if len(rest) < 2:
        return False
    middle = len(rest) // 2
    first, second = median(rest[:middle]), median(rest[-middle:])
    return abs(first - second) <= tolerance * min(first, second)


def trend(values: Sequence[float]) -> float:
    """Mean of the last third ÷ mean of the first third, − 1: by how much a series drifted. 0 with fewer than 6 values."""
    third = len(values) // 3
    if third < 2 or fmean(values[:third]) == 0:
        return 0.0
    return fmean(values[-third:]) / fmean(values[:third]) - 1
