"""Summary metrics and series of a result. Pure: every metric is a function of the raw stamps and readings.

Keys are MLflow keys (`metrics.KEYS`). An undefined or non-finite metric is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from ..records.backends import recorded_capabilities
from ..records.metric import GB, Metric, Series
from ..records.metrics import (
    BATCH_SIZE,
    COMPILE_TIME,
    DETOKENIZE,
    DEVICE_MEMORY,
    DEVICE_RESERVED,
    DEVICE_SAMPLES,
    E2E,
    E2E_BY_REPETITION,
    E2E_WITH_TEXT,
    FIRST_CALL,
    FORWARD,
    GPU_MEMORY,
    GPU_POWER,
    GPU_UTILIZATION,
    HOST_NEEDED,
    HOST_RSS,
    HOST_RSS_SAMPLES,
    ICL,
    ITL,
    ITL_BY_TOKEN,
    ITL_PERCENTILES,
    KEYS,
    KV_CACHE,
    LOAD_TIME,
    OF_MEAN,
    OUTPUT_RATE,
    OUTPUT_TOKENS,
    PREDICTED_LOADING,
    PREDICTED_MEMORY,
    PROMPT_TOKENS,
    RATE_BY_REPETITION,
    SAME_REPLIES,
    SAME_TOKENS,
    TENSOR_PARALLEL,
    TOKENIZE,
    TPOT,
    TTFT,
    TTFT_BY_REPETITION,
    TTFT_PERCENTILES,
    TURN_E2E,
    TURN_PREFILLED_TOKENS,
    TURN_PROMPT_TOKENS,
    TURN_TTFT,
    WEIGHTS,
    WORKER_CPU,
    WORKER_MEMORY,
)
from ..records.results import MemorySample, RequestRecord, RunResult
from ..stats import (
    block_bootstrap_interval,
    bootstrap_interval,
    mad,
    percentile,
    supports,
)
from .efficiency import efficiency_figures
from .figures import Figures, distribution, mean_of, once_per_result
from .latency import chunk_gaps_ms, e2e_ms, tpot_ms, ttft_ms
from .layout import layout_figures, layout_series
from .natural_stopping import natural_figures
from .online_metrics import online_figures, ramp_steps, stream_figures
from .quality import figures
from .ranks import rank_figures, rank_series
from .repetitions import (
    COMPARED_VALUES,
    mean_interval,
    output_rate,
    process_count,
    requests,
    several_in_a_step,
    token_gaps,
    typical_ttft,
    unit_values,
)
from .throughput import throughput_figures

MB = 1e6
"""Bytes in a MB, the unit of MLflow's own metrics of memory."""

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
    gpus: list[dict[str, Any]] = result.environment.get("gpus") or []
    index = _gpu_index(result)
    return gpus[index] if index is not None and index < len(gpus) else None


def _gpu_index(result: RunResult) -> int | None:
    """Index of the GPU that a result was measured on; None for a CPU."""
    device = str(result.load.facts.get("model.device", "cpu")) if result.load else result.cell.device
    return int(device.partition(":")[2] or 0) if device.startswith("cuda") else None


def hardware_name(result: RunResult) -> str:
    """Name of the hardware that a result was measured on: `NVIDIA A100`, or `AMD EPYC 7B13, 2 CPUs`."""
    gpu = gpu_of(result)
    if gpu:
        return str(gpu["name"])
    if result.load and (named := result.load.facts.get("model.device_name")):
        return str(named)
    cpu: Mapping[str, Any] = result.environment.get("cpu") or {}
    count, quota = cpu.get("usable_cpus"), cpu.get("quota_cpus")
    cpus = f"{count} CPUs{f' (quota of {quota:g})' if quota else ''}" if count else ""
    return ", ".join(filter(None, [str(cpu.get("name") or "an unnamed machine"), cpus]))


def summarize(result: RunResult) -> dict[str, float]:
    """Summary metrics by MLflow key; a result without repetitions has only the settings and the memory readings.

    A later family replaces figures of earlier ones; None removes what has no meaning in this scenario. Results come
    before settings, and the throughput first: MLflow's page of a comparison begins with the first metric.
    """
    return dict(_summary(result))


@once_per_result
def _summary(result: RunResult) -> dict[str, float]:
    found: Figures = {}
    for family in (*ALWAYS, *(MEASURED[result.cell.scenario] if result.repetitions else ()), *BESIDES):
        found |= family(result)
    order = sorted(found, key=lambda key: (key.startswith(f"{BATCH_SIZE.section}/"), key != OUTPUT_RATE.key()))
    return {key: float(value) for key in order if (value := found[key]) is not None and math.isfinite(value)}


def _settings(result: RunResult) -> Figures:
    lengths = [r.prompt_tokens for r in requests(result) if r.prompt_tokens is not None]
    return {
        BATCH_SIZE.key(): result.cell.batch_size,
        TENSOR_PARALLEL.key(): result.cell.tensor_parallel if _takes_ranks(result) else None,
        PROMPT_TOKENS.key(): fmean(lengths) if lengths else result.cell.prompt_tokens,
        OUTPUT_TOKENS.key(): result.cell.output_tokens,
    }


def _takes_ranks(result: RunResult) -> bool:
    return (
        result.cell.scenario == "offline" and "tensor_parallel" in recorded_capabilities(result.cell.backend).parameters
    )


def _memory(result: RunResult) -> Figures:
    stages, load = result.memory, result.load
    readings = {HOST_RSS: stages.host_rss, HOST_NEEDED: stages.host_needed, DEVICE_MEMORY: stages.device}
    sizes = {metric.key(s): own.get(s) for metric, own in readings.items() for s in metric.statistics} | {
        DEVICE_RESERVED.key("peak"): stages.device_reserved_peak,
        PREDICTED_MEMORY.key(): result.predicted_bytes,
        PREDICTED_LOADING.key(): result.predicted_load_bytes,
        WEIGHTS.key(): load.weight_bytes if load else None,
    }
    found: Figures = {key: None if size is None else size / GB for key, size in sizes.items()}
    return found | rank_figures(result) | {KV_CACHE.key(): load.kv_bytes_per_token if load else None}


def _load(result: RunResult) -> Figures:
    return {LOAD_TIME.key(): result.load.load_s if result.load else None, FIRST_CALL.key(): result.first_call_ms}


def _latency(result: RunResult) -> Figures:
    """Latency metrics pooled over repetitions and rows, as in `samples.csv.gz`; support counts distinct stamps.

    All requests of a cell have the same number of rows, so rows change no mean and hardly any percentile.
    """
    every = requests(result)
    pools = {
        TTFT: [ttft_ms(r) for r in every],
        ITL: token_gaps(result),
        ICL: [gap for r in every for gap in chunk_gaps_ms(r)] if several_in_a_step(result) else [],
        TPOT: [value for r in every if (value := tpot_ms(r)) is not None],
        E2E: [e2e_ms(r) for r in every],
    }
    found = {k: v for metric, pool in pools.items() for k, v in distribution(metric, pool, every[0].rows).items()}
    for metric in (TTFT, TPOT, E2E):
        found |= _spread_of_mean(result, metric)
    return found | distribution(FORWARD, [ns / 1e6 for ns in result.forward_ns or ()])


def _spread_of_mean(result: RunResult, metric: Metric) -> Figures:
    """Standard deviation and 95 % interval of a mean latency over `inference_units`; empty if a repetition has none."""
    values = unit_values(result, COMPARED_VALUES[metric.key("mean")])
    if values is None:
        return {}
    low, high = mean_interval(result, values) or (None, None)
    ends = (stdev(values) if len(values) > 1 else None, None if low is None else max(low, 0.0), high)
    return {metric.key(statistic): value for statistic, value in zip(OF_MEAN, ends, strict=True)}


def _text(result: RunResult) -> Figures:
    """The tokenizer's share of a request: encode each row's prompt and decode its answer, one after another."""
    if result.text_times is None:
        return {}
    tokenize, detokenize = (
        [ns / 1e6 for ns in some] for some in (result.text_times.tokenize_ns, result.text_times.detokenize_ns)
    )
    every = requests(result)
    return {
        TOKENIZE.key("p50"): median(tokenize),
        DETOKENIZE.key("p50"): median(detokenize),
        E2E_WITH_TEXT.key("mean"): fmean(map(e2e_ms, every)) + every[0].rows * (fmean(tokenize) + fmean(detokenize)),
    }


def _same_replies(result: RunResult) -> Figures:
    return {SAME_REPLIES.key(): mean_of(result.same_replies)}


def _compile_time(result: RunResult) -> Figures:
    return {COMPILE_TIME.key(): result.compile_s}


def _same_tokens(result: RunResult) -> Figures:
    same = mean_of(result.same_tokens)
    return {SAME_TOKENS.key(): None if same is None else same / result.cell.output_tokens}


def _quality(result: RunResult) -> Figures:
    return figures(result.quality) if result.quality else {}


Family = Callable[[RunResult], Figures]

ALWAYS: tuple[Family, ...] = (_settings, _memory, layout_figures, _load)
"""Families of metrics that every result has."""

MEASURED: dict[str, tuple[Family, ...]] = {
    "offline": (_latency, throughput_figures, efficiency_figures, _text, natural_figures),
    "online": (_latency, throughput_figures, online_figures, efficiency_figures, _text),
    "batching": (_latency, throughput_figures, stream_figures, efficiency_figures, _text),
}
"""Scenario → families of metrics of its repetitions."""

BESIDES: tuple[Family, ...] = (_same_replies, _compile_time, _same_tokens, _quality)
"""Families of metrics of what is recorded besides the repetitions."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of one metric. `values` says over what: repetitions, processes, or the tokens of a series.

    `mean_low` to `mean_high` is the 95 % interval of the mean (`mean_interval`), `median_low` to `median_high` the
    bootstrap's of the median; `mad` is the unscaled median absolute deviation. None with too few values, or, for the
    mean of a series, because that interval does not hold.
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
    """Statistics of each metric that is compared, over `inference_units`, and of the series of gaps by token.

    The value of a repetition is the mean over its requests, for inter-token latency the median of its gaps.

    Neighbouring gaps are correlated, so their interval is that of the block bootstrap. It describes the tokens of this
    cell, not other runs.
    """
    unit = "processes" if process_count(result) > 1 else "repetitions"
    found = []
    for key, of in COMPARED_VALUES.items():
        values = unit_values(result, of)
        if values:
            low, high = mean_interval(result, values) or (None, None)
            name = f"{KEYS[key].section}/{KEYS[key].name}"  # without a statistic: the table has several of them
            found.append(_statistics(name, unit, values, low, high, bootstrap_interval(values, "median")))
    gaps = [point.value for point in _token_series(result)]
    if gaps:
        found.append(
            _statistics(
                ITL_BY_TOKEN.key, "tokens", gaps, None, None, block_bootstrap_interval(gaps, statistic="median")
            )
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


def series(result: RunResult) -> list[Point]:
    """All series, with the times of their points; no step repeats within a key."""
    points: list[Point] = []
    for repetition in result.repetitions:
        wall, step = repetition.wall_ms, repetition.index + 1
        own = {
            TTFT_BY_REPETITION: typical_ttft(repetition),
            E2E_BY_REPETITION: median(map(e2e_ms, repetition.requests)),
            RATE_BY_REPETITION: output_rate(repetition),
        }
        points += [Point(one.key, step, value, wall) for one, value in own.items() if value is not None]
    points += _token_series(result)
    points += [
        Point(one.key, turn.number, value, result.ended_ms)
        for turn in turns_of(result)
        for one, value in turn.values().items()
    ]
    points += [Point(key, step, value, result.ended_ms) for key, step, value in ramp_steps(result)]
    points += [*_timeline(result), *_gpu_series(result)]
    of_devices = (*rank_series(result), *layout_series(result))
    points += [Point(one.key, number, value, result.ended_ms) for one, number, value in of_devices]
    firsts = [ttft_ms(r) for r in requests(result) if r.output_tokens]
    for key, values in ((ITL_PERCENTILES.key, token_gaps(result)), (TTFT_PERCENTILES.key, firsts)):
        supported = [q for q in range(1, 100) if supports(len(values), max(q, 100 - q))] if values else []
        order = sorted(values)
        points += [Point(key, q, percentile(order, q), result.ended_ms) for q in supported]
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

    def values(self) -> dict[Series, float]:
        """The known values by their series."""
        found = {
            TURN_PROMPT_TOKENS: self.prompt_tokens,
            TURN_PREFILLED_TOKENS: self.prefilled_tokens,
            TURN_TTFT: self.ttft_ms,
            TURN_E2E: self.e2e_ms,
        }
        return {one: value for one, value in found.items() if value is not None}


def turns_of(result: RunResult) -> list[Turn]:
    """Turns of conversations, by number; empty if nothing was measured turn by turn."""
    if result.cell.history == "none":
        return []
    columns: dict[int, list[RequestRecord]] = {}
    for repetition in result.repetitions:
        for position, request in enumerate(repetition.requests, 1):
            columns.setdefault(request.turn or position, []).append(request)
    counted = result.cell.history != "sent" or any(r.cached_tokens is not None for r in requests(result))
    return [
        Turn(
            number,
            len(column),
            mean_of([r.prompt_tokens for r in column if r.prompt_tokens is not None]),
            mean_of([r.prefilled_tokens for r in column if r.prefilled_tokens is not None]) if counted else None,
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
        yield Point(ITL_BY_TOKEN.key, index + 1, median(gaps), wall + offset)


def _timeline(result: RunResult) -> Iterator[Point]:
    """Samples of memory and CPU time, thinned to `MOST_SAMPLES` points.

    Each point has the largest memory of its part, so peaks remain, and the mean of its CPU time.
    """
    if not result.timeline or not result.repetitions:
        return
    cpus = _usable_cpus(result)
    stride = max(1, math.ceil(len(result.timeline) / MOST_SAMPLES))
    for step, start in enumerate(range(0, len(result.timeline), stride), 1):
        part = result.timeline[start : start + stride]
        largest: MemorySample = max(part, key=lambda s: s.rss)
        used = mean_of([sample.cpus for sample in part if sample.cpus is not None])
        values = {
            HOST_RSS_SAMPLES: largest.rss / GB,
            WORKER_MEMORY: largest.rss / MB,
            DEVICE_SAMPLES: None if largest.device is None else max(s.device or 0 for s in part) / GB,
            WORKER_CPU: None if used is None or cpus is None else 100 * used / cpus,
        }
        wall = _wall_ms(result, largest.t_ns)
        yield from (Point(one.key, step, value, wall) for one, value in values.items() if value is not None)


def _wall_ms(result: RunResult, t_ns: int) -> int:
    """Epoch time in ms of a monotonic time, by the first repetition."""
    first = result.repetitions[0]
    return first.wall_ms - first.requests[0].t0_ns // 1_000_000 + t_ns // 1_000_000


def _usable_cpus(result: RunResult) -> float | None:
    """Number of CPUs that the worker could use, with the quota of its control groups; None if it is not known."""
    cpu = result.environment.get("cpu") or {}
    return min(filter(None, (cpu.get("usable_cpus"), cpu.get("quota_cpus"))), default=None)


def _gpu_series(result: RunResult) -> Iterator[Point]:
    """Readings of the GPU at the end of each repetition, and device memory of the worker at each stage."""
    if gpu_of(result) is None or not result.repetitions:
        return
    index = _gpu_index(result)
    for repetition in result.repetitions:
        if noise := repetition.noise:
            busy = None if noise.utilization_ratio is None else 100 * noise.utilization_ratio
            ended = _wall_ms(result, max(r.stamps_ns[-1] for r in repetition.requests))
            for one, value in ((GPU_UTILIZATION, busy), (GPU_POWER, noise.power_w)):
                if value is not None:
                    yield Point(one.key.format(index=index), repetition.index + 1, value, ended)
    reached = sorted((t_ns, stage) for stage, t_ns in result.marks.items() if stage in result.memory.device)
    for step, (t_ns, stage) in enumerate(reached, 1):
        size = result.memory.device[stage] / MB
        yield Point(GPU_MEMORY.key.format(index=index), step, size, _wall_ms(result, t_ns))
