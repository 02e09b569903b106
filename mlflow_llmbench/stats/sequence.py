"""Judgement of measurements in the order in which they were made: trend, step, two speeds, serial correlation.

A confidence interval of a mean assumes independent values of one distribution, and few repetitions of a benchmark show
by themselves whether that holds. All statistics here are free of location and scale, so their critical values depend on
the number of values alone; those of `CRITICAL` are quantiles of 600,000 simulated series of independent normal values.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import NormalDist, fmean, stdev

from .descriptive import t_interval, t_quantile_975

LEAST_CORRELATED = 20
"""Minimum number of values from which serial correlation can be estimated well enough to widen an interval by it."""

MOST_JUDGED = 128
"""Longest series that is judged value by value; longer ones are first averaged over equal blocks of neighbours."""

MOST_CORRELATION = 0.97
"""Largest serial correlation that is assumed; beyond it a series is one drift and has no mean."""

STANDARD_ERRORS = 1.0
"""Standard errors above the estimate at which the serial correlation is assumed.

Of 0, 0.5, 1 and 1.5 it is the least for which the intervals of AR(1) series chosen by a stopping rule cover 93 %.
"""

STOPPED_FACTOR = 1.15
"""Factor of the interval's width that makes up for stopping when it is narrow, with 5 to 30 values."""

CRITICAL: dict[int, tuple[float, float, float]] = {
    5: (10.24, 12.84, 18.27),
    6: (7.24, 9.52, 12.51),
    7: (5.89, 7.97, 9.92),
    8: (5.19, 7.08, 8.51),
    9: (4.75, 6.49, 7.62),
    10: (4.47, 6.09, 6.99),
    12: (4.12, 5.61, 6.23),
    14: (3.94, 5.25, 5.72),
    16: (3.82, 5.09, 5.39),
    19: (3.64, 4.87, 5.06),
    20: (3.42, 4.58, 4.99),
    24: (3.33, 4.43, 4.74),
    30: (3.26, 4.31, 4.53),
    45: (3.15, 4.19, 4.32),
    68: (3.12, 4.12, 4.26),
    100: (3.08, 4.11, 4.26),
    128: (3.06, 4.09, 4.27),
}
"""Number of values → critical values of trend, step (0.2 % false alarms each) and separation (0.5 %).

Together a quiet series is called disturbed in at most 0.9 % of cases. Linear in between.
"""

FEW = 0.1
"""Maximum share of values in the smaller of two groups for them to be called outliers and not a second speed."""

FEW_CHANGE = 5
"""Factor by which outliers must deviate more than a second speed to be reported: they move the mean so much less."""


@dataclass(frozen=True)
class Finding:
    """A departure of a series from independent values of one distribution.

    - `kind`: `trend`, `step`, `two_speeds` or `outliers`
    - `change`: its relative size: over the whole series, after against before, or the smaller against the larger group
    - `count`: values after the step or in the smaller group; all of them for a trend
    - `statistic`, `limit`: the test statistic and its critical value
    """

    kind: str
    change: float
    count: int
    statistic: float
    limit: float


def autocorrelation(values: Sequence[float]) -> float:
    """Lag-1 autocorrelation without its bias of about −(1 + 4φ)/n in short series; 0 without variation.

    (n·r₁ + 1)/(n − 4), the correction of Marriott & Pope (Biometrika 41, 1954). ValueError with fewer than 5 values.
    """
    if len(values) < 5:
        raise ValueError(f"autocorrelation needs at least 5 values: {len(values)}")
    return min((len(values) * _lag1(values) + 1) / (len(values) - 4), 1.0)


def _lag1(values: Sequence[float]) -> float:
    centre = fmean(values)
    rest = [value - centre for value in values]
    squares = math.fsum(d * d for d in rest)
    return math.fsum(a * b for a, b in pairwise(rest)) / squares if squares else 0.0


def is_correlated(values: Sequence[float]) -> bool:
    """Return True if neighbours resemble each other more than chance explains, at 10 % (one-sided).

    A generous test, to decide whether more values are worth having. The lag-1 autocorrelation of independent normal
    values is about normal with mean −1/n and standard deviation (n − 2)/(n·√(n − 1)) (Moran, Biometrika 35, 1948).
    False with fewer than 5 values.
    """
    n = len(values)
    return n >= 5 and _lag1(values) > (NormalDist().inv_cdf(0.9) * (n - 2) / math.sqrt(n - 1) - 1) / n


def effective_size(values: Sequence[float]) -> float:
    """Number of independent values that determine the mean as well as these neighbours do: n·(1 − φ)/(1 + φ).

    For a series that follows AR(1) with coefficient φ (Bayley & Hammersley 1946). φ is taken one standard error,
    √((1 − φ²)/n), above its estimate, and not below 0. With fewer than `LEAST_CORRELATED` values φ cannot be told and
    the size is n.
    """
    n = len(values)
    if n < LEAST_CORRELATED:
        return float(n)
    found = autocorrelation(values)
    high = found + STANDARD_ERRORS * math.sqrt(max(1 - found * found, 0.0) / n)
    phi = min(max(high, 0.0), MOST_CORRELATION)
    return n * (1 - phi) / (1 + phi)


def sequence_interval(values: Sequence[float], stopped: bool = False) -> tuple[float, float] | None:
    """95 % interval of the mean of values in the order of measurement; None with fewer than 2.

    Student's, with the effective instead of the actual number of values, and the variance corrected for its bias under
    correlation. With fewer than `LEAST_CORRELATED` values it is `t_interval`. Simulated coverage (3,000 series each;
    plain interval in brackets), n = 20, 30, 60: independent: 0.98 (0.95), 0.97, 0.98 · AR(1) φ = 0.5: 0.97 (0.74),
    0.98, 0.97 · φ = 0.8: 0.96 (0.47), 0.97, 0.98. Independent values pay 30, 24 and 13 % in width.

    `stopped` says that the number of values was chosen by looking at the width of this interval. It is narrow enough
    sooner where the spread happens to be small. The mean of normal values does not depend on that, so the coverage can
    be computed for each true spread (Starr, Annals of Mathematical Statistics 37, 1966); at worst it is 0.92 with up to
    30 values. With `STOPPED_FACTOR` it is at least 0.95. From `LEAST_CORRELATED` values on, the width for serial
    correlation is more than this factor.
    """
    n, size = len(values), effective_size(values) if values else 0.0
    if n < 2:
        return None
    centre = fmean(values)
    if size >= n:
        low, high = t_interval(values) or (centre, centre)
        factor = STOPPED_FACTOR if stopped and n < LEAST_CORRELATED else 1.0
        return centre - factor * (high - low) / 2, centre + factor * (high - low) / 2
    inflation = n / size
    unbiased = max(1 - (inflation - 1) / n, 0.2)
    half = _quantile(max(size - 1, 1.0)) * stdev(values) * math.sqrt(inflation / n / unbiased)
    return centre - half, centre + half


def _quantile(degrees: float) -> float:
    """Two-sided 95 % quantile of Student's t with broken degrees of freedom: linear in 1/ν between whole ones.

    At most 19 % too large (ν between 1 and 2), 0.4 % from 3 on. Without scipy, which a worker's environment may lack.
    """
    low = math.floor(degrees)
    share = (1 / degrees - 1 / (low + 1)) / (1 / low - 1 / (low + 1))
    return share * t_quantile_975(low) + (1 - share) * t_quantile_975(low + 1)


def judge_sequence(values: Sequence[float], least_change: float) -> list[Finding]:
    """Departures of a series from independent values of one distribution: those in time first, the clearest of them.

    Only those of a relative size of at least `least_change` are returned, outliers from `FEW_CHANGE` times that on.
    Empty with fewer than 5 values, or a mean of 0. At most 0.9 % of quiet series of any length get a finding.

    - trend: Student's t of the slope of a line
    - step: the largest t of a difference of means before and after (Worsley, JASA 74, 1979)
    - separation: the largest distance of the means of two groups of the sorted values, in standard deviations within
      the groups (the D of Ashman, Bird & Zepf, Astronomical Journal 108, 1994, for the best split)

    From `LEAST_CORRELATED` values on, the first two are divided by the inflation of the error through the serial
    correlation that is left after the line or step is taken out, so that slow noise is not called a trend.
    """
    series, longest = _averaged(values), len(values)
    if longest < 5 or fmean(values) == 0 or not stdev(values):
        return []
    limits = _critical(len(series))
    in_time = [_trend(series, limits[0]), _step(series, limits[1], longest / len(series))]
    in_time.sort(key=lambda one: one.limit / one.statistic if one.statistic else math.inf)
    least = {"outliers": FEW_CHANGE * least_change}
    return [
        one
        for one in (*in_time, _separation(values))
        if one.statistic > one.limit and abs(one.change) >= least.get(one.kind, least_change)
    ]


def _averaged(values: Sequence[float]) -> list[float]:
    """Means of equal blocks of neighbours, at most `MOST_JUDGED`; the rest at the end belongs to the last one."""
    size = math.ceil(len(values) / MOST_JUDGED)
    if size <= 1:
        return list(values)
    count = len(values) // size
    return [fmean(values[i * size : (i + 1) * size if i + 1 < count else None]) for i in range(count)]


def _critical(n: int) -> tuple[float, float, float]:
    sizes = list(CRITICAL)
    place = bisect_left(sizes, n)
    if place == len(sizes) or sizes[place] == n:
        return CRITICAL[sizes[min(place, len(sizes) - 1)]]
    low, high = sizes[place - 1], sizes[place]
    share = (n - low) / (high - low)
    first, second, third = (a + share * (b - a) for a, b in zip(CRITICAL[low], CRITICAL[high], strict=True))
    return first, second, third


def _deflation(rest: Sequence[float]) -> float:
    """Factor for a t statistic whose residuals are serially correlated, √((1 − φ)/(1 + φ)); 1 for short series."""
    n = len(rest)
    if n < LEAST_CORRELATED:
        return 1.0
    unbiased = (n * _lag1(rest) + 2) / (n - 5)  # one more parameter than in `autocorrelation`
    phi = min(max(unbiased, 0.0), MOST_CORRELATION)
    return math.sqrt((1 - phi) / (1 + phi))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf if numerator > 0 else 0.0


def _trend(series: Sequence[float], limit: float) -> Finding:
    n, centre = len(series), fmean(series)
    middle = (n - 1) / 2
    spread = math.fsum((i - middle) ** 2 for i in range(n))
    slope = math.fsum((i - middle) * value for i, value in enumerate(series)) / spread
    rest = [value - centre - slope * (i - middle) for i, value in enumerate(series)]
    error = math.sqrt(math.fsum(d * d for d in rest) / (n - 2) / spread)
    statistic = _ratio(abs(slope), error) * _deflation(rest)
    return Finding("trend", slope * (n - 1) / centre, n, statistic, limit)


def _step(series: Sequence[float], limit: float, block: float) -> Finding:
    n, centre = len(series), fmean(series)
    sums = list(accumulate(value - centre for value in series))
    at = max(range(2, n - 1), key=lambda k: sums[k - 1] ** 2 / (k * (n - k)))
    before, after = fmean(series[:at]), fmean(series[at:])
    rest = [value - (before if i < at else after) for i, value in enumerate(series)]
    error = math.sqrt(math.fsum(d * d for d in rest) / (n - 2) * (1 / at + 1 / (n - at)))
    statistic = _ratio(abs(after - before), error) * _deflation(rest)
    return Finding("step", (after - before) / before if before else math.inf, round((n - at) * block), statistic, limit)


def _separation(values: Sequence[float]) -> Finding:
    """Best split of all values into two groups: two speeds, or a few outliers."""
    n, centre = len(values), fmean(values)
    order = sorted(value - centre for value in values)
    sums, squares = list(accumulate(order)), list(accumulate(d * d for d in order))

    def distance(k: int) -> tuple[float, float]:
        low, high = sums[k - 1] / k, (sums[-1] - sums[k - 1]) / (n - k)
        within = squares[-1] - k * low**2 - (n - k) * high**2
        # Rounding leaves about 1e-12 of the total where both groups are constant.
        within = 0.0 if within < 1e-12 * squares[-1] else within
        return _ratio(high - low, math.sqrt(within / (n - 2))), high - low

    at = max(range(1, n), key=lambda k: distance(k))
    statistic, gap = distance(at)
    few = min(at, n - at)
    kind = "outliers" if few == 1 or few <= FEW * n else "two_speeds"
    # The larger group is the reference: few slow values are a fall, few fast ones a rise.
    base = centre + (sums[at - 1] / at if at > n - at else (sums[-1] - sums[at - 1]) / (n - at))
    change = gap if at > n - at else -gap
    return Finding(kind, change / base if base else math.inf, few, statistic, _separation_limit(n))


def _separation_limit(n: int) -> float:
    """Critical value of the separation; beyond the table it grows as the largest of n normal values does."""
    longest = max(CRITICAL)
    if n <= longest:
        return _critical(n)[2]
    largest = [NormalDist().inv_cdf(1 - 0.0025 / count) for count in (longest, n)]
    return CRITICAL[longest][2] + largest[1] - largest[0]
