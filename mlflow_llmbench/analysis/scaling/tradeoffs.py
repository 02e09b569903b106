"""Trade-offs: batch size, quantization against its reference, latency cliffs, prompt tokens against output tokens.

Everything is computed from the values of single repetitions. Ratios are those of geometric means, with Welch's interval
on the logarithms, as in `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from ...records.errors import NotFitted, OutOfRange
from ...stats import holm, t_interval, welch
from .fitting import Fit

LEVEL = 0.05
"""Probability of a false alarm in one series, over all its points."""

LEAST_CLIFF = 1.25
"""Smallest factor of a cliff, however significant a jump is: cells measured one after another drift by some percent."""

KEPT_SHARE = 0.5
"""Default share of the best per-instance throughput that the largest acceptable batch must keep."""

EXTRA_PROMPT_TOKENS = 512
EXTRA_OUTPUT_TOKENS = 8
"""The comparison of the performance notes (Databricks 2023): 512 more prompt tokens against 8 more output tokens."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two cells' throughput and its 95 % interval, None if a side has fewer than two repetitions.

    `name`: batch size or quantization of the first cell.
    """

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OptimalBatch:
    """The best batch size, by both definitions and by plain throughput.

    `per_instance`: argmax T(b)/b (EffiLLM, Per-Instance Efficiency Analysis) · `alike`: sizes whose T(b)/b is not
    measurably lower · `largest`: the largest size whose T(b)/b keeps `share` of the maximum · `throughput`: argmax
    T(b).
    """

    per_instance: int
    alike: tuple[int, ...]
    largest: int
    share: float
    throughput: int


@dataclass(frozen=True)
class Cliff:
    """A jump of latency from `before` to `after`, `factor` times larger than the neighbouring steps explain."""

    before: float
    after: float
    factor: float
    p_value: float


@dataclass(frozen=True)
class TokenCost:
    """Cost in ms of more prompt tokens and of more output tokens, each as (value, low, high) with a 95 % interval.

    `equal_output`: the number of output tokens that cost as much as the prompt tokens, with its interval.
    """

    prompt_tokens: int
    output_tokens: int
    prompt: tuple[float, float, float]
    output: tuple[float, float, float]
    equal_output: tuple[float, float, float]


def ratio(name: str, over: Sequence[float], under: Sequence[float], scale: float = 1.0) -> Ratio:
    """Return scale · over ÷ under, of geometric means, with Welch's interval on the logarithms."""
    first, second = [math.log(v) for v in under], [math.log(v) for v in over]
    value = scale * math.exp(fmean(second) - fmean(first))
    found = welch(first, second)
    return Ratio(
        name, value, scale * math.exp(found.low) if found else None, scale * math.exp(found.high) if found else None
    )


def scaling_efficiency(rates: Mapping[int, Sequence[float]]) -> list[Ratio]:
    """Return η_b = T(b) / (b·T(1)) of each batch size except 1 (EffiLLM, Batch Size Scaling).

    `rates`: batch size → throughput of each repetition. Raises NotFitted without a measurement at batch size 1.
    """
    if 1 not in rates:
        raise NotFitted(
            f"Scaling efficiency needs batch size 1, and {', '.join(map(str, rates))} were measured. Measure it too."
        )
    return [ratio(str(size), values, rates[1], 1 / size) for size, values in sorted(rates.items()) if size != 1]


def optimal_batch(rates: Mapping[int, Sequence[float]], share: float = KEPT_SHARE) -> OptimalBatch:
    """Return the best batch size by both definitions.

    Sizes are alike if Welch's test on ln T(b)/b (Holm over sizes) finds no difference. Raises NotFitted with fewer than
    two batch sizes.
    """
    if len(rates) < 2:
        raise NotFitted(
            f"An optimal batch size needs at least two to choose from: {len(rates)} measured. Measure more of them."
        )
    each = {size: fmean(values) / size for size, values in sorted(rates.items())}
    best = max(each, key=each.__getitem__)
    others = [size for size in each if size != best]
    tests = [
        welch([math.log(v / size) for v in rates[size]], [math.log(v / best) for v in rates[best]]) for size in others
    ]
    adjusted = holm([test.p_value if test else 1.0 for test in tests])
    alike = tuple(size for size, p in zip(others, adjusted, strict=True) if p >= LEVEL)
    largest = max(size for size, value in each.items() if value >= share * each[best])
    return OptimalBatch(best, alike, largest, share, max(each, key=lambda size: each[size] * size))


def find_cliffs(series: Mapping[float, Sequence[float]], steepest: float) -> list[Cliff]:
    """Find the steps of a latency series (x → the values of its repetitions) that are steeper than both neighbours.

    The steepness of a step is its elasticity e = Δ ln y / Δ ln x. Under every smooth law considered here (k + n·x^w,
    the knee of a roofline, a quadratic) e never falls as x grows and stays below `steepest`: 1 over batch sizes, since
    the rows could be run one by one; 2 over lengths, for quadratic attention.

    A cliff is a step whose e exceeds that of the step before and that of the step after (at an end: `steepest`), each
    in a one-sided Welch test of the contrast at 5 %, with Holm's correction over all steps, and whose jump is at least
    `LEAST_CLIFF`. Requiring both is an intersection-union test (Berger 1982) and needs no further correction.

    Not detected: a jump in the first or last step that stays below `steepest`, which looks like growth, and a jump that
    spreads over two steps.

    Raises NotFitted with fewer than 3 places, or fewer than 2 values at one.
    """
    from scipy import special  # type: ignore[import-untyped]

    places = sorted(series)
    if len(places) < 3 or any(len(series[x]) < 2 for x in places):
        raise NotFitted(
            f"Cliffs cannot be told from noise in {len(places)} places: 3 with 2 repetitions each are needed. "
            "Measure more."
        )
    logs = [[math.log(v) for v in series[x]] for x in places]
    level, spread = [fmean(v) for v in logs], [(variance(v) / len(v), len(v) - 1) for v in logs]
    widths = [math.log(places[i + 1] / places[i]) for i in range(len(places) - 1)]
    steepness = [(level[i + 1] - level[i]) / widths[i] for i in range(len(widths))]

    def p_steeper(step: int, other: int) -> float:
        """One-sided p value of e(step) ≤ e(other), by Welch–Satterthwaite; `other` beyond the ends means `steepest`."""
        weights = dict.fromkeys(range(len(places)), 0.0)
        weights[step + 1] += 1 / widths[step]
        weights[step] -= 1 / widths[step]
        inside = 0 <= other < len(widths)
        if inside:
            weights[other + 1] -= 1 / widths[other]
            weights[other] += 1 / widths[other]
        gap = steepness[step] - (steepness[other] if inside else steepest)
        parts = [(weights[i] ** 2 * spread[i][0], spread[i][1]) for i in weights]
        error = sum(part for part, _ in parts)
        if error == 0:
            return 0.0 if gap > 1e-9 else 1.0
        degrees = error**2 / sum(part**2 / count for part, count in parts)
        return float(special.stdtr(degrees, -gap / math.sqrt(error)))

    p_values = holm([max(p_steeper(i, i - 1), p_steeper(i, i + 1)) for i in range(len(widths))])
    found = []
    for i, p in enumerate(p_values):
        around = [steepness[j] if 0 <= j < len(widths) else steepest for j in (i - 1, i + 1)]
        factor = math.exp((steepness[i] - max(around)) * widths[i])
        if p < LEVEL and factor >= LEAST_CLIFF:
            found.append(Cliff(places[i], places[i + 1], factor, p))
    return found


def token_cost(
    prefill: Fit,
    tpot_ms: Sequence[float],
    prompt_tokens: int = EXTRA_PROMPT_TOKENS,
    output_tokens: int = EXTRA_OUTPUT_TOKENS,
) -> TokenCost:
    """Compare the cost of `prompt_tokens` more in the prompt with that of `output_tokens` more in the output.

    A prompt token costs the slope c of the fitted line L = a + c·s (ms); an output token the mean of `tpot_ms`, the
    time per output token of each repetition. The interval of the quotient combines those of its parts (MOVER on
    logarithms: Zou & Donner, Statistics in Medicine 27, 2008). Slower decoding with a longer cache is not included.
    Raises OutOfRange if the measured lengths span less than `prompt_tokens`, NotFitted if the interval of a cost
    reaches 0.
    """
    (low, high), slope, gaps = prefill.ranges[0], prefill.parameter("c"), t_interval(tpot_ms)
    if high - low < prompt_tokens:
        raise OutOfRange(
            f"{prompt_tokens} more prompt tokens are beyond the measured lengths {low:g} to {high:g}. "
            "Measure lengths that lie that far apart."
        )
    if not (slope.low and slope.high and gaps) or slope.low <= 0 or gaps[0] <= 0:
        raise NotFitted(
            "The cost of a prompt or output token cannot be told from 0 with these cells. "
            "Measure more lengths, or more repetitions."
        )
    first = (slope.value * prompt_tokens, slope.low * prompt_tokens, slope.high * prompt_tokens)
    each = (fmean(tpot_ms), *gaps)
    second = (each[0] * output_tokens, each[1] * output_tokens, each[2] * output_tokens)
    centre = math.log(first[0] / each[0])
    below = math.hypot(math.log(first[0] / first[1]), math.log(each[2] / each[0]))
    above = math.hypot(math.log(first[2] / first[0]), math.log(each[0] / each[1]))
    return TokenCost(
        prompt_tokens,
        output_tokens,
        first,
        second,
        (math.exp(centre), math.exp(centre - below), math.exp(centre + above)),
    )
