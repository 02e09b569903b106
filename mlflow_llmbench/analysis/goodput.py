"""Search for the highest request rate that meets the SLOs: the next rate to try, and the limit found. Pure.

Rates are doubled until one is too high, then bisected on a logarithmic scale. A rate *meets* the SLOs if the whole 95 %
interval of its share of good requests is at least the requested share, *fails* if the whole interval is below it, and
is *unclear* otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..records.cell import Cell
from ..records.metrics import GOODPUT_LIMIT, KNEE, REQUEST_RATE
from ..records.results import RunResult
from ..stats import t_interval
from .latency import e2e_ms
from .online_metrics import count_good
from .repetitions import requests
from .summary import summarize
from .verdict import judge

RESOLUTION = 0.05
"""The search ends when the lowest rate that is too high exceeds the highest that is not by at most this share."""

MOST_RATES = 16
LEAST_SHARE = 1 / 64
"""Minimum rate, as a share of the first rate tried: lower ones are not tried."""

Z = 1.959964
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class RateTrial:
    """One load of a search: rate in requests per second (None for one user alone), answered requests per second,
    share of good requests with its interval, True if the result can be trusted, mean end-to-end latency in ms.
    """

    rate: float | None
    requests_per_s: float
    share: float
    low: float
    high: float
    trusted: bool
    e2e_ms: float


@dataclass(frozen=True)
class GoodputLimit:
    """Result of the search for one configuration, in requests per second; None if no rate was found.

    `rate`: highest rate that met the SLOs. `low`: highest whose whole interval meets them. `high`: lowest whose whole
    interval fails. `knee`: the throughput of the load with the highest power.
    """

    cell: Cell
    asked: float
    trials: tuple[RateTrial, ...]
    rate: float | None
    low: float | None
    high: float | None
    knee: float | None

    def figures(self) -> dict[str, float]:
        """Metrics by MLflow key; what was not found is absent."""
        found = {
            GOODPUT_LIMIT.key(): self.rate,
            GOODPUT_LIMIT.key("low"): self.low,
            GOODPUT_LIMIT.key("high"): self.high,
            KNEE.key(): self.knee,
        }
        return {name: value for name, value in found.items() if value is not None}

    def sentence(self) -> str:
        """The result as a sentence."""
        limits = slo_text(self.cell)
        if self.rate is None:
            best = max((one.share for one in self.trials), default=0.0)
            return (
                f"No rate that was tried meets {limits} for {self.asked:.0%} of the requests; at best {best:.0%} of "
                "them met it."
            )
        ends = f"surely up to {self.low:g}" if self.low is not None else "not certain"
        ends += f", surely not at {self.high:g}" if self.high is not None else ", and no higher one was surely too high"
        knee = f" The knee is at {self.knee:.3g} requests per second." if self.knee is not None else ""
        return (
            f"Goodput: {self.rate:g} requests per second meet {limits} for {self.asked:.0%} of the requests ({ends})."
            f"{knee}"
        )


def slo_text(cell: Cell) -> str:
    """Return the SLOs of a cell as text: `TTFT ≤ 500 ms, TPOT ≤ 50 ms`."""
    slos = {"TTFT": cell.slo_ttft_ms, "TPOT": cell.slo_tpot_ms, "end to end": cell.slo_e2e_ms}
    return ", ".join(f"{name} ≤ {value:g} ms" for name, value in slos.items() if value is not None)


def share_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float, float] | None:
    """Share of good requests and its 95 % interval, from (good, judged) counts of repetitions; None if none is judged.

    Requests of a repetition are not independent, since they share a queue, and repetitions can be too alike to show any
    spread. On each side, the interval is therefore the wider one of Student's over repetitions and Wilson's over
    requests (JASA 22, 1927).
    """
    shares = [good / judged for good, judged in counts if judged]
    if not shares:
        return None
    good, n = sum(good for good, _ in counts), sum(judged for _, judged in counts)
    p = good / n
    middle, half = (
        (p + Z**2 / (2 * n)) / (1 + Z**2 / n),
        Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)),
    )
    low, high = t_interval(shares) or (0.0, 1.0)
    return p, max(0.0, min(low, middle - half)), min(1.0, max(high, middle + half))


def measure_rate(result: RunResult) -> RateTrial | None:
    """Judge one measured load; None if it has no judged request or no rate."""
    interval = share_interval([count_good(result.cell, repetition) for repetition in result.repetitions])
    metrics = summarize(result)
    rate = metrics.get(REQUEST_RATE.key())
    if interval is None or rate is None:
        return None
    trusted = judge(result, metrics).word != "invalid"
    return RateTrial(result.cell.request_rate, rate, *interval, trusted, fmean(map(e2e_ms, requests(result))))


def next_rate(found: Sequence[RateTrial], asked: float) -> float | None:
    """The rate to try next, in requests per second; None when the search has ended."""
    open_loops = [one for one in found if one.rate is not None]
    alone = [one for one in found if one.rate is None]
    if not open_loops:
        return _rounded(alone[0].requests_per_s) if alone and alone[0].share >= asked else None
    good, bad = _ends(open_loops, asked)
    first = open_loops[0].rate or 0.0
    if len(open_loops) >= MOST_RATES or (good is None and bad is not None and bad / 2 < first * LEAST_SHARE):
        return None
    if good is None or bad is None:
        return _rounded((bad or 0.0) / 2 if good is None else 2 * good)
    middle = _rounded(math.sqrt(good * bad))
    return None if bad / good <= 1 + RESOLUTION or middle in (good, bad) else middle


def _ends(found: Sequence[RateTrial], asked: float) -> tuple[float | None, float | None]:
    """The highest rate that is good, below the lowest that is too high or cannot be sent, and that lowest rate."""
    bad = min(
        (one.rate for one in found if one.rate is not None and (one.share < asked or not one.trusted)), default=None
    )
    good = [
        one.rate
        for one in found
        if one.rate is not None and one.share >= asked and one.trusted and (bad is None or one.rate < bad)
    ]
    return max(good, default=None), bad


def next_cell(results: Sequence[RunResult], asked: float) -> Cell | None:
    """The next load of the first configuration whose search has not ended; None when all have ended."""
    for cell, found in searches(results).items():
        rate = next_rate(found, asked)
        if rate is not None:
            return dataclasses.replace(cell, request_rate=rate)
    return None


def searches(results: Sequence[RunResult]) -> dict[Cell, list[RateTrial]]:
    """Loads tried for each configuration."""
    found: dict[Cell, list[RateTrial]] = {}
    for result in results:
        one = measure_rate(result) if result.outcome == "ok" and result.cell.scenario == "online" else None
        if one:
            found.setdefault(configuration_of(result), []).append(one)
    return found


def configuration_of(result: RunResult) -> Cell:
    """Return the configuration that a load belongs to: its cell without the rate."""
    return dataclasses.replace(result.cell, request_rate=None)


def limits(results: Sequence[RunResult], asked: float) -> list[GoodputLimit]:
    """The result of the search for each configuration."""
    return [_limit(cell, found, asked) for cell, found in searches(results).items()]


def _limit(cell: Cell, found: Sequence[RateTrial], asked: float) -> GoodputLimit:
    good, bad = _ends(found, asked)
    rates = [(one.rate, one) for one in found if one.rate is not None and one.trusted]
    fails = min((rate for rate, one in rates if one.high < asked), default=None)
    meets = [rate for rate, one in rates if one.low >= asked and (bad is None or rate < bad)]
    return GoodputLimit(
        cell,
        asked,
        tuple(found),
        good,
        max(meets, default=None),
        fails,
        knee({one.requests_per_s: one.e2e_ms for one in found if one.trusted}),
    )


def knee(latency_of: Mapping[float, float]) -> float | None:
    """The throughput with the highest power, throughput ÷ latency (Kleinrock, ICC 1979).

    None with fewer than 3 loads, or if it is the lowest or highest: the knee then lies beyond the measured loads.
    """
    loads = sorted(latency_of)
    if len(loads) < 3:
        return None
    best = max(loads, key=lambda load: load / latency_of[load])
    return best if best not in (loads[0], loads[-1]) else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
