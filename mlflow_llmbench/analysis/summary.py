"""Summary metrics and series of a result. Pure: every metric is a function of the raw stamps and readings.

Keys are MLflow keys (`metrics.KEYS`). An undefined or non-finite metric is absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from ..records.metrics import STAGES
from ..records.results import MemorySample, RequestRecord, RunResult, TextTimes
from ..records.text import number_text
from ..stats import (
    block_bootstrap_interval,
    bootstrap_interval,
    coefficient_of_variation,
    mad,
    percentile,
    relative_half_width,
    supports,
    t_interval,
)
from .efficiency import PER_GB, efficiency_figures, per_gb, tokens_per_step
from .latency import chunk_gaps_ms, e2e_ms, tpot_ms, ttft_ms
from .online_metrics import online_figures, ramp_steps, stream_figures
from .quality import figures
from .repetitions import (
    PER_REPETITION,
    RATES,
    mean_of,
    output_rate,
    process_count,
    requests,
    several_in_a_step,
    token_gaps,
    unit_values,
)

MOST_SAMPLES = 300
"""Maximum number of logged points of a memory series; the MLflow UI draws about as many."""


@dataclass(frozen=True)
class Point:
    """One point of a series: key, step, value, and wall-clock time in ms."""

    key: str
    step: int
    value: float
    wall_ms: int


def gpu_of(result: RunResult) -> dict[str, Any] | None:
    """The GPU that a result was measured on, as in its environment; None for a CPU, even if the machine has a GPU."""
    device = str(result.load.facts.get("model.device", "cpu")) if result.load else result.cell.device
    gpus: list[dict[str, Any]] = result.environment.get("gpus") or []
    index = int(device.partition(":")[2] or 0)
    return gpus[index] if device.startswith("cuda") and index < len(gpus) else None


def hardware_name(result: RunResult) -> str:
    """Name of the hardware that a result was measured on: `NVIDIA A100`, or `AMD EPYC 7B13, 2 CPUs`."""
    gpu = gpu_of(result)
    if gpu:
        return str(gpu["name"])
    cpu: Mapping[str, Any] = result.environment.get("cpu") or {}
    count = cpu.get("usable_cpus")
    return ", ".join(filter(None, [str(cpu.get("name") or "an unnamed machine"), f"{count} CPUs" if count else ""]))


def summarize(result: RunResult) -> dict[str, float]:
    """Summary metrics by MLflow key; a result without repetitions has only the settings and the memory readings."""
    found: dict[str, float | None] = dict(_settings(result))
    found |= _memory(result)
    if result.load:
        found["load/load_s"] = result.load.load_s
    found["load/first_call_ms"] = result.first_call_ms
    if result.repetitions:
        found |= _latency(result)
        found |= _throughput(result)
        found |= _of_scenario(result, found)
    if result.text_times and result.repetitions:
        found |= _around_the_model(result.text_times, requests(result)[0].rows, found["latency/e2e_ms_mean"] or 0.0)
    if result.same_replies:
        found["trust/same_replies_ratio"] = fmean(result.same_replies)
    found["load/compile_s"] = result.compile_s
    if result.same_tokens:
        found["trust/same_tokens_ratio"] = fmean(result.same_tokens) / result.cell.output_tokens
    if result.quality:
        found |= figures(result.quality)
    return {key: float(value) for key, value in found.items() if value is not None and math.isfinite(value)}


def _of_scenario(result: RunResult, found: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics of one scenario: server, stream, or single batches; MBU and MFU only for one batch of one length."""
    if result.cell.scenario == "online":
        return online_figures(result) | {PER_GB: per_gb(found)}
    own = efficiency_figures(result, found) | {"lengths/tokens_per_step_mean": tokens_per_step(result)}
    if not result.cell.batching:
        return own
    return stream_figures(result) | {key: own[key] for key in (PER_GB, "efficiency/joules_per_token")}


def _settings(result: RunResult) -> Iterator[tuple[str, float | None]]:
    lengths = [r.prompt_tokens for r in requests(result) if r.prompt_tokens is not None]
    yield "config/batch_size", result.cell.batch_size
    yield "config/prompt_tokens", fmean(lengths) if lengths else result.cell.prompt_tokens
    yield "config/output_tokens", result.cell.output_tokens


def _memory(result: RunResult) -> dict[str, float | None]:
    stages = result.memory
    found: dict[str, float | None] = {}
    for name, readings in (
        ("host_rss_bytes", stages.host_rss),
        ("host_needed_bytes", stages.host_needed),
        ("device_bytes", stages.device),
    ):
        found |= {f"memory/{name}_{stage}": readings.get(stage) for stage in STAGES}
    found["memory/device_reserved_bytes_peak"] = stages.device_reserved_peak
    found["memory/predicted_bytes"] = result.predicted_bytes
    if result.load:
        found["memory/weight_bytes"] = result.load.weight_bytes
        found["memory/kv_bytes_per_token"] = result.load.kv_bytes_per_token
    return found


def _latency(result: RunResult) -> dict[str, float | None]:
    """Latency metrics pooled over repetitions and rows, as in `samples.csv.gz`; support counts distinct stamps.

    All requests of a cell have the same number of rows, so rows change no mean and hardly any percentile.
    """
    all_requests = requests(result)
    rows = all_requests[0].rows
    pools = {
        "ttft_ms": [ttft_ms(r) for r in all_requests],
        "itl_ms": token_gaps(result),
        "icl_ms": [gap for r in all_requests for gap in chunk_gaps_ms(r)] if several_in_a_step(result) else [],
        "tpot_ms": [value for r in all_requests if (value := tpot_ms(r)) is not None],
        "e2e_ms": [e2e_ms(r) for r in all_requests],
    }
    wanted = {
        "ttft_ms": (50, 90, 95, 99),
        "itl_ms": (50, 90, 95, 99),
        "icl_ms": (50, 95, 99),
        "tpot_ms": (50, 95),
        "e2e_ms": (50, 95, 99),
    }
    found: dict[str, float | None] = {}
    for name, pool in pools.items():
        if not pool:
            continue
        found[f"latency/{name}_mean"] = fmean(pool)
        found |= {f"latency/{name}_p{q}": percentile(pool, q, rows) for q in wanted[name] if supports(len(pool), q)}
    return found


def _around_the_model(times: TextTimes, rows: int, e2e: float) -> dict[str, float]:
    """The tokenizer's share of a request: encode each row's prompt and decode its answer, one after another."""
    tokenize, detokenize = ([ns / 1e6 for ns in some] for some in (times.tokenize_ns, times.detokenize_ns))
    return {
        "latency/tokenize_ms_p50": median(tokenize),
        "latency/detokenize_ms_p50": median(detokenize),
        "latency/e2e_with_text_ms_mean": e2e + rows * (fmean(tokenize) + fmean(detokenize)),
    }


def _throughput(result: RunResult) -> dict[str, float | None]:
    """Token rates, means over `units`; the interval and the trust metrics are over `units` too."""
    rates = {name: unit_values(result, rate) for name, rate in RATES.items()}
    found: dict[str, float | None] = {
        f"throughput/{name}_tokens_per_s": fmean(values) for name, values in rates.items() if values
    }
    found["trust/repetitions"] = len(result.repetitions)
    output = rates["output"]
    if output is None:
        return found
    mean = fmean(output)
    found["throughput/per_instance_tokens_per_s"] = mean / result.cell.batch_size
    interval = t_interval(output)
    if interval:
        # Student's interval does not know that a rate is positive.
        found["throughput/output_tokens_per_s_ci_low"], found["throughput/output_tokens_per_s_ci_high"] = (
            max(interval[0], 0.0),
            interval[1],
        )
    found["trust/relative_half_width"] = relative_half_width(output)
    found["trust/cv_ratio"] = coefficient_of_variation(output)
    if result.price_per_hour is not None:
        found["cost/per_million_tokens"] = result.price_per_hour / (mean * 3600) * 1e6
    return found


@dataclass(frozen=True)
class Statistics:
    """Statistics of one metric. `values` says over what: repetitions, processes, or the tokens of a series.

    `mean_low` to `mean_high` is Student's 95 % interval of the mean, `median_low` to `median_high` the bootstrap's of
    the median; `mad` is the unscaled median absolute deviation. None with too few values, or, for the mean of a series,
    because Student's interval does not hold.
    """

    key: str
    values: str
    n: int
    mean: float
    median: float
    sd: float | None = None
    mad: float | None = None
    mean_low: float | None = None
    mean_high: float | None = None
    median_low: float | None = None
    median_high: float | None = None


def statistics(result: RunResult) -> list[Statistics]:
    """Statistics of each metric that a repetition has, over `units`, and of the series of gaps by token.

    Neighbouring gaps are correlated, so their interval is that of the block bootstrap. It describes the tokens of this
    cell, not other runs.
    """
    unit = "processes" if process_count(result) > 1 else "repetitions"
    found = []
    for key, of in PER_REPETITION.items():
        values = unit_values(result, of)
        if values:
            low, high = t_interval(values) or (None, None)
            found.append(_statistics(key, unit, values, low, high, bootstrap_interval(values, "median")))
    gaps = [point.value for point in _token_series(result)]
    if gaps:
        found.append(
            _statistics("steps/itl_ms", "tokens", gaps, None, None, block_bootstrap_interval(gaps, statistic="median"))
        )
    return found


def _statistics(
    key: str,
    what: str,
    values: Sequence[float],
    low: float | None,
    high: float | None,
    interval: tuple[float, float] | None,
) -> Statistics:
    several = len(values) > 1
    median_low, median_high = interval or (None, None)
    sd, deviation = (stdev(values), mad(values)) if several else (None, None)
    return Statistics(
        key, what, len(values), fmean(values), median(values), sd, deviation, low, high, median_low, median_high
    )


def statistics_cells(result: RunResult) -> tuple[list[str], list[list[str]]]:
    """Heading and body of the table of `statistics`; – for an absent value."""

    def text(value: float | None) -> str:
        return "–" if value is None else number_text(value)

    def interval(low: float | None, high: float | None) -> str:
        return "–" if low is None or high is None else f"{number_text(low)} to {number_text(high)}"

    heading = ["metric", "values", "mean", "95 % interval (t)", "median", "95 % interval (bootstrap)", "sd", "MAD"]
    body = []
    for s in statistics(result):
        means, medians = (
            [text(s.mean), interval(s.mean_low, s.mean_high)],
            [text(s.median), interval(s.median_low, s.median_high)],
        )
        counted = f"{s.n} {s.values}" if s.n > 1 else f"1 {s.values.removesuffix('s')}"
        body.append([s.key, counted, *means, *medians, text(s.sd), text(s.mad)])
    return heading, body


def series(result: RunResult) -> list[Point]:
    """All series, with the times of their points; no step repeats within a key."""
    points: list[Point] = []
    for repetition in result.repetitions:
        wall, step = repetition.wall_ms, repetition.index + 1
        group = repetition.requests
        points.append(Point("steps/ttft_ms", step, median(map(ttft_ms, group)), wall))
        points.append(Point("steps/e2e_ms", step, median(map(e2e_ms, group)), wall))
        rate = output_rate(repetition)
        points += [] if rate is None else [Point("steps/output_tokens_per_s", step, rate, wall)]
    points += _token_series(result)
    points += [
        Point(f"steps/turn_{name}", turn.number, value, result.ended_ms)
        for turn in turns_of(result)
        for name, value in turn.values().items()
    ]
    points += [Point(key, step, value, result.ended_ms) for key, step, value in ramp_steps(result)]
    points += _memory_series(result)
    for key, values in (("itl_ms", token_gaps(result)), ("ttft_ms", [ttft_ms(r) for r in requests(result)])):
        supported = [q for q in range(1, 100) if supports(len(values), max(q, 100 - q))] if values else []
        order = sorted(values)
        points += [Point(f"percentiles/{key}", q, percentile(order, q), result.ended_ms) for q in supported]
    return [point for point in points if math.isfinite(point.value)]


@dataclass(frozen=True)
class Turn:
    """Turns with one number over all measured conversations: their count, mean lengths in tokens, medians in ms."""

    number: int
    count: int
    prompt_tokens: float | None
    prefilled_tokens: float | None
    ttft_ms: float
    e2e_ms: float

    def values(self) -> dict[str, float]:
        """The known values by name, without number and count."""
        return {
            name: value for name, value in vars(self).items() if name not in ("number", "count") and value is not None
        }


def turns_of(result: RunResult) -> list[Turn]:
    """Turns of conversations, by number; empty if nothing was measured turn by turn."""
    if result.cell.history == "none":
        return []
    columns: dict[int, list[RequestRecord]] = {}
    for repetition in result.repetitions:
        for position, request in enumerate(repetition.requests, 1):
            columns.setdefault(request.turn or position, []).append(request)
    told = result.cell.history != "sent" or any(r.cached_tokens is not None for r in requests(result))
    return [
        Turn(
            number,
            len(column),
            mean_of([r.prompt_tokens for r in column if r.prompt_tokens is not None]),
            mean_of([r.prefilled_tokens for r in column if r.prefilled_tokens is not None]) if told else None,
            median(map(ttft_ms, column)),
            median(map(e2e_ms, column)),
        )
        for number, column in sorted(columns.items())
    ]


def _token_series(result: RunResult) -> Iterator[Point]:
    """Median gap over repetitions by token index, at the time of that token in the last repetition."""
    every = [r for r in requests(result) if r.single_tokens]
    if not every or several_in_a_step(result):
        return
    last, wall = every[-1], result.repetitions[-1].wall_ms
    for index in range(1, max(r.output_tokens for r in every)):
        gaps = [(r.stamps_ns[index] - r.stamps_ns[index - 1]) / 1e6 for r in every if r.output_tokens > index]
        offset = (last.stamps_ns[min(index, last.output_tokens - 1)] - last.t0_ns) // 1_000_000
        yield Point("steps/itl_ms", index + 1, median(gaps), wall + offset)


def _memory_series(result: RunResult) -> Iterator[Point]:
    """Memory timeline, thinned to `MOST_SAMPLES` points; each keeps the largest sample of its part, so peaks remain."""
    if not result.timeline or not result.repetitions:
        return
    anchor = result.repetitions[0]
    to_wall = anchor.wall_ms - anchor.requests[0].t0_ns // 1_000_000
    stride = max(1, math.ceil(len(result.timeline) / MOST_SAMPLES))
    for step in range(0, len(result.timeline), stride):
        part = result.timeline[step : step + stride]
        largest: MemorySample = max(part, key=lambda s: s.rss)
        yield Point("steps/host_rss_bytes", step // stride + 1, largest.rss, to_wall + largest.t_ns // 1_000_000)
        if largest.device is not None:
            yield Point(
                "steps/device_bytes",
                step // stride + 1,
                max(s.device or 0 for s in part),
                to_wall + largest.t_ns // 1_000_000,
            )
