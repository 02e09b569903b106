"""Bootstrap intervals: of independent values, and of one autocorrelated series by blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from .descriptive import t_quantile_975

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Statistic = str | Callable[..., Any]

CHUNK = 1 << 18
"""Resampled values held in memory at once: 2 MB, which fit in a cache."""

MOST_EXACT_MEDIANS = 1000
"""Longest series for which a block bootstrap computes the median of each resample exactly."""


def bootstrap_interval(
    values: Sequence[float], statistic: Statistic, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a statistic of independent values.

    `statistic` is "mean", "median", or a function like `numpy.std` with an `axis`.

    The expanded percentile interval of Hesterberg (The American Statistician 69, 2015, 371–386): quantiles of the
    resampled statistic at Φ(∓√(n/(n − 1))·t(0.975; n − 1)) instead of 2.5 and 97.5 %, because the plain percentile
    interval is too narrow in small samples. Simulated coverage of the mean, normal data, 3,000 samples (plain
    percentiles in brackets): n = 5: 0.91 (0.83) · 6: 0.93 (0.85) · 10: 0.94 (0.90) · 20: 0.95 (0.92) ·
    30: 0.95 (0.94); of the median 0.93 to 0.98. For the mean of 5 values use `t_interval`, which covers 0.95.

    The mean is resampled in full, n draws each, in chunks. For the median, the ranks of the middle order statistics of
    n draws are n times those of n uniform numbers, whose joint distribution is Beta, so they are drawn directly. This
    gives the same distribution (Efron 1979 derives it for the median) with two random numbers per resample.
    100,000 values and 2,000 resamples take about 1 s and 12 MB for the mean and 2 ms for the median (2-core AMD EPYC).
    A custom function takes the time of the mean plus its own.

    None with fewer than 5 values: no resample leaves their range, which then holds the truth too rarely.
    """
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    if data.size < 5:
        return None
    return _expanded_percentiles(_resample(data, statistic, resamples, seed), data.size)


def _resample(data: Array, statistic: Statistic, resamples: int, seed: int) -> Array:
    """Return the statistic of each of `resamples` samples drawn from `data` with replacement."""
    import numpy as np

    draw = np.random.Generator(np.random.SFC64(seed))
    n = data.size
    if statistic == "median":
        lower, upper = (n + 1) // 2, n // 2 + 1  # ranks of the middle order statistics, equal if n is odd
        first = draw.beta(lower, n + 1 - lower, resamples)
        second = first if upper == lower else 1 - (1 - first) * draw.random(resamples) ** (1 / (n - lower))
        order = np.sort(data)
        ranks = [np.minimum((uniform * n).astype(np.intp), n - 1) for uniform in (first, second)]
        return np.asarray((order[ranks[0]] + order[ranks[1]]) / 2)
    compute = _function(statistic)
    rows = max(1, CHUNK // n)
    parts = []
    for start in range(0, resamples, rows):
        # 32-bit numbers are drawn twice as fast as 64-bit ones, but 64-bit indices are looked up four times as fast.
        chosen = draw.integers(0, n, (min(rows, resamples - start), n), dtype=np.uint32).astype(np.intp)
        parts.append(compute(data.take(chosen), axis=1))
    return np.concatenate(parts)


def _function(statistic: Statistic) -> Callable[..., Any]:
    import numpy as np

    named: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}
    if not isinstance(statistic, str):
        return statistic
    if statistic not in named:
        raise ValueError(f"unknown statistic: {statistic}. Use mean or median, or a function of (array, axis).")
    return named[statistic]


def _expanded_percentiles(distribution: Array, n: int) -> tuple[float, float]:
    """Percentile interval, widened to the width that Student's t needs with n independent values."""
    import numpy as np

    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile_975(n - 1))
    low, high = np.quantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def block_length(series: Sequence[float]) -> int:
    """Block length for the circular block bootstrap of a stationary series, 1 to min(3√n, n/3), rounded up.

    After Politis & White, Econometric Reviews 23 (2004) 53–70: b = (2ĝ²/D̂)^(1/3)·n^(1/3), D̂ = 4/3·ĝ(0)², with the
    correction of Patton, Politis & White (28, 2009, 372–375), where ĝ = Σ λ(k/M)·|k|·R(k), ĝ(0) = Σ λ(k/M)·R(k),
    R the autocovariances, λ the flat-top window, and M twice the lag after which the autocorrelations stay within
    ±2√(log₁₀ n/n).
    """
    import numpy as np

    data = np.asarray(series, dtype=np.float64)
    n = data.size
    data = data - data.mean()
    most = math.ceil(min(3 * math.sqrt(n), n / 3))
    if n < 9 or not data.any():
        return 1
    run = max(5, math.ceil(math.sqrt(math.log10(n))))
    lags = min(math.ceil(math.sqrt(n)) + run, n - 1)
    covariance = np.array([data[: n - k] @ data[k:] for k in range(lags + 1)]) / n
    small = np.abs(covariance[1:] / covariance[0]) < 2 * math.sqrt(math.log10(n) / n)
    last = next((lag for lag in range(lags - run + 1) if small[lag : lag + run].all()), lags)
    if last == 0:  # no correlation at all
        return 1
    width = min(2 * last, lags)
    k = np.arange(1, width + 1)
    weighted = np.clip(2 * (1 - k / width), 0, 1) * covariance[1 : width + 1]
    g, g0 = 2 * (k * weighted).sum(), covariance[0] + 2 * weighted.sum()
    if g0 <= 0:
        return most
    return min(max(1, math.ceil(math.pow(2 * (g / g0) ** 2 / (4 / 3) * n, 1 / 3))), most)


def block_bootstrap_interval(
    series: Sequence[float],
    block: int | None = None,
    statistic: Statistic = "mean",
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % interval of a statistic of one stationary, autocorrelated series, e.g. the token gaps of one long request.

    The circular block bootstrap of Politis & Romano (1992): n/b blocks of b neighbours, drawn from the series closed to
    a ring. `block=None` takes `block_length`. The percentiles are expanded as in `bootstrap_interval`, for n/b values.
    Simulated coverage of the mean of AR(1) series, 1,000 each, n = 128, 256, 1,000: φ = 0: 0.95, 0.94, 0.95 ·
    φ = 0.5: 0.90, 0.92, 0.94 · φ = 0.8: 0.86, 0.91, 0.93 · φ = 0.9: 0.84, 0.87, 0.91; of the median with φ = 0.8: 0.90,
    0.91, 0.93. For 100,000 values with φ = 0.8, 2,000 resamples take 0.2 s for the mean and the median. A custom
    function needs every resample in full and takes a hundred times as long.

    The interval describes this series only, not the variation between runs: the unit of inference is the process or the
    repetition. None with fewer than 5 values or 3 blocks; ValueError if `block` is below 1.
    """
    import numpy as np

    data = np.asarray(series, dtype=np.float64)
    n = data.size
    length = block_length(series) if block is None else block
    if length < 1:
        raise ValueError(f"block is too short: {length}. Use at least 1.")
    if n < 5 or n // length < 3:
        return None
    if length == 1:
        return _expanded_percentiles(_resample(data, statistic, resamples, seed), n)
    return _expanded_percentiles(_resample_blocks(data, length, statistic, resamples, seed), n // length)


def _resample_blocks(data: Array, length: int, statistic: Statistic, resamples: int, seed: int) -> Array:
    """Return the statistic of each of `resamples` series made of blocks.

    Means come from sums of blocks, and so do medians of long series: if a share s of a resample lies at or below the
    median of the series, its own median is the (1 − s)-quantile of the series, up to O(n^(−3/4)) (Bahadur, Annals of
    Mathematical Statistics 37, 1966). Short series and other functions are resampled in full.
    """
    import numpy as np

    n = data.size
    if statistic == "median" and n > MOST_EXACT_MEDIANS:
        below = (data <= np.median(data)).astype(np.float64)
        shares = _resample_blocks(below, length, "mean", resamples, seed)
        return np.asarray(np.quantile(data, np.clip(0.5 + below.mean() - shares, 0, 1)))
    draw = np.random.Generator(np.random.SFC64(seed))
    blocks = math.ceil(n / length)
    ring = np.concatenate([data, data[: length - 1]])
    rows = max(1, CHUNK // (blocks if statistic == "mean" else n))
    parts = []
    for start in range(0, resamples, rows):
        starts = draw.integers(0, n, (min(rows, resamples - start), blocks), dtype=np.uint32).astype(np.intp)
        if statistic == "mean":
            parts.append(_block_means(ring, n, length, starts))
        else:
            places = (starts[:, :, None] + np.arange(length)).reshape(len(starts), -1)[:, :n]
            parts.append(_function(statistic)(ring.take(places), axis=1))
    return np.concatenate(parts)


def _block_means(ring: Array, n: int, length: int, starts: NDArray[np.intp]) -> Array:
    """Means of resamples (rows of `starts`) from sums of blocks, not written out; the last block is cut to n values."""
    import numpy as np

    total = np.concatenate([[0.0], np.cumsum(ring - ring.mean())])  # centred, so that long sums lose no digits
    rest = n - length * (starts.shape[1] - 1)
    whole = total[length : length + n] - total[:n]
    surplus = total[length : length + n] - total[rest : rest + n]
    return np.asarray(ring.mean() + (whole.take(starts).sum(axis=1) - surplus.take(starts[:, -1])) / n)
