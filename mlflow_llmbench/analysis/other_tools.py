"""Read results of other programs. Figures with the same definition get our key; all others keep the program's own name.

The same word does not mean the same figure. Reasons against a translation, from the code of vLLM 0.33, GuideLLM 0.8,
AIPerf 0.13, optimum-benchmark 0.6 and the documentation of llama-bench:

- open loops: ours count from the intended sending time, theirs from the actual one, so latencies are translated for
  closed loops only;
- `inter-token latency`: in vLLM, pooled gaps between chunks, the same as ours only if each chunk holds one token; in
  AIPerf, a mean per request, which is our time per output token; in GuideLLM, weighted by tokens, which is neither;
- GuideLLM's time per output token includes the first token, its request latency ends after the last token, its
  percentiles do not interpolate;
- AIPerf's percentiles hold failed requests as infinite, so they are translated only if none failed; nothing is
  translated from a run that did not finish;
- llama-bench leaves out tokenization and sampling; optimum-benchmark stamps before the token is on the host and assumes
  the number of tokens;
- vLLM and GuideLLM write 0 for a figure without values (all outputs of one token, a reply that was not streamed): such
  a 0 is not taken, the figure is absent;
- a percentile that the sample does not support (`verdicts.PERCENTILE_SUPPORT`) is not translated.

The program counts the tokens (see `Foreign.tokens_by`), which affects time per output token and throughput.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..records.errors import UsageError
from ..records.metric import GB
from ..records.metrics import (
    BATCH_SIZE,
    CONCURRENCY,
    E2E,
    FAILED_RATIO,
    FULL_OUTPUT_RATE,
    FULL_REQUEST_RATE,
    ITL,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    TPOT,
    TTFT,
    WEIGHTS,
)
from ..records.redaction import excerpt
from ..records.verdicts import PERCENTILE_SUPPORT

Data = Mapping[str, Any]
UNUSABLE = re.compile(r"[^A-Za-z0-9_./-]")
"""Characters that MLflow does not allow in a metric key."""

Pairs = dict[str, float]


@dataclass(frozen=True)
class Foreign:
    """One measurement of another program.

    `metrics` have our keys, `own` the program's names (`vllm/mean_itl_ms`); `params` are as the program reports them.
    """

    source: str
    version: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    own: Mapping[str, float]
    tokens_by: str


def read_foreign(data: Any) -> list[Foreign]:
    """Read the measurements in the JSON of a program's result file.

    Raises UsageError if the program is unknown, or if the file is broken or has no measurement.
    """
    for known, recognise, read in READERS:
        if recognise(data):
            try:
                found = list(read(data))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UsageError(
                    f"It looks like a result of {known}, and cannot be read: {type(error).__name__}: {error}. Check "
                    "that the file is complete."
                ) from None
            if not found:
                raise UsageError(f"It is a result of {known} without any measurement. Give another file.")
            return found
    raise UsageError(
        f"It is not a result of a known program. Give the JSON of {', '.join(known for known, _, _ in READERS)}."
    )


def _number(value: Any) -> float | None:
    """A finite number; None for anything else: an absent figure is absent, never 0."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def _split(prefix: str, every: Mapping[str, Any], ours: Mapping[str, str]) -> tuple[Pairs, Pairs]:
    """Split figures by the program's names into (those under our keys, the others under its own names)."""
    numbers = {name: number for name, value in every.items() if (number := _number(value)) is not None}
    own = {f"{prefix}/{UNUSABLE.sub('_', name)}": number for name, number in numbers.items() if name not in ours}
    return {ours[name]: number for name, number in numbers.items() if name in ours}, own


def _supported(keys: Mapping[str, str], n: float | None) -> dict[str, str]:
    """The part of a translation that n requests support."""
    found = {}
    for name, key in keys.items():
        quantile = re.search(r"_p(\d+)$", key)
        if quantile is None or (n is not None and n >= PERCENTILE_SUPPORT[int(quantile[1])]):
            found[name] = key
    return found


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: excerpt(str(value), 500)
        for name, value in values.items()
        if value is not None and not isinstance(value, dict | list)
    }


# vLLM

VLLM_SETTINGS = (
    "date",
    "backend",
    "endpoint_type",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
)


def _is_vllm(data: Any) -> bool:
    return isinstance(data, dict) and {"model_id", "duration", "completed", "request_throughput"} <= data.keys()


def _vllm(data: Data) -> Iterator[Foreign]:
    # Without a limit, an infinite rate is one burst, or a trace with its own times: the file does not say which.
    closed = (
        data.get("request_rate") == "inf" and not data.get("ramp_up_strategy") and bool(data.get("max_concurrency"))
    )
    completed, failed = float(data["completed"]), _number(data.get("failed"))
    ours: dict[str, str] = {}
    latencies = {"e2el": E2E, "ttft": TTFT} if closed else {}
    for theirs, metric in (latencies | {"tpot": TPOT}).items():
        statistics = {"mean": "mean", "median": "p50", "p95": "p95", "p99": "p99"}
        known = {name: own for name, own in statistics.items() if own in metric.statistics}
        ours |= {f"{name}_{theirs}_ms": metric.key(own) for name, own in known.items()}
    ours = _supported(ours, completed)
    if _single_tokens(data):
        gaps = {"mean": "mean", "median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
        ours |= _supported({f"{name}_itl_ms": ITL.key(own) for name, own in gaps.items()}, sum(map(len, data["itls"])))
    if closed:
        ours |= {
            "output_throughput": FULL_OUTPUT_RATE.key(),
            "request_throughput": FULL_REQUEST_RATE.key(),
        }
    empty = [f"_{kind}_ms" for kind in ("ttft", "tpot", "itl", "e2el") if data.get(f"mean_{kind}_ms") == 0]
    every = {
        name: value for name, value in data.items() if name not in VLLM_SETTINGS and not name.endswith(tuple(empty))
    }
    metrics, own = _split("vllm", every, ours)
    if failed is not None and completed + failed > 0:
        metrics[FAILED_RATIO.key()] = failed / (completed + failed)
    if closed:
        metrics[CONCURRENCY.key()] = float(data["max_concurrency"])
    load = f"c{data['max_concurrency']}" if closed else f"{data.get('request_rate')}/s"
    params = _texts({name: data.get(name) for name in VLLM_SETTINGS})
    yield Foreign(
        "vllm bench serve",
        "",
        f"{data['model_id']} {load}",
        params,
        metrics,
        own,
        "the server, or the client's tokenizer",
    )


def _single_tokens(data: Data) -> bool:
    """Return True if every chunk held one token; needs a file with single requests (`--save-detailed`)."""
    gaps, lengths = data.get("itls"), data.get("output_lens")
    if not isinstance(gaps, list) or not isinstance(lengths, list) or len(gaps) != len(lengths) or not gaps:
        return False
    return all(len(own) == max(length - 1, 0) for own, length in zip(gaps, lengths, strict=True))


# GuideLLM

GUIDELLM_CLOSED = ("synchronous", "concurrent")
GUIDELLM_STATISTICS = ("mean", "median", "std_dev", "min", "max", "count")


def _is_guidellm(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("benchmarks"), list) and "metadata" in data


def _guidellm(data: Data) -> Iterator[Foreign]:
    version = str((data.get("metadata") or {}).get("guidellm_version") or "")
    for benchmark in data["benchmarks"]:
        strategy = (benchmark.get("config") or {}).get("strategy") or {}
        kind = str(strategy.get("type_") or "unknown")
        every: dict[str, Any] = {}
        for name, statuses in benchmark["metrics"].items():
            successful = statuses.get("successful") if isinstance(statuses, dict) else None
            if isinstance(successful, dict) and successful.get("count") != 0:
                every |= {f"{name}_{statistic}": successful.get(statistic) for statistic in GUIDELLM_STATISTICS}
                every |= {f"{name}_{q}": (successful.get("percentiles") or {}).get(q) for q in ("p90", "p95", "p99")}
        ours = {"time_to_first_token_ms_mean": TTFT.key("mean")} if kind in GUIDELLM_CLOSED else {}
        metrics, own = _split("guidellm", every, ours)
        streams = _number(strategy.get("streams")) if kind == "concurrent" else 1.0 if kind == "synchronous" else None
        if streams is not None:
            metrics[CONCURRENCY.key()] = streams
        level = strategy.get("streams") or strategy.get("rate") or ""
        yield Foreign(
            "guidellm",
            version,
            f"{kind} {level}".strip(),
            _texts({f"strategy.{n}": v for n, v in strategy.items()}),
            metrics,
            own,
            "the server",
        )


# AIPerf


AIPERF_STATES = ("was_cancelled", "is_complete", "incomplete_reason")


def _is_aiperf(data: Any) -> bool:
    return isinstance(data, dict) and "input_config" in data and "request_latency" in data


def _aiperf(data: Data) -> Iterator[Foreign]:
    config = data["input_config"] or {}
    phase = _aiperf_phase(config)
    closed = phase.get("type") == "concurrency"
    whole = data.get("is_complete") is not False and data.get("was_cancelled") is not True
    errors = _number((data.get("error_request_count") or {}).get("avg")) or 0.0
    count = _number((data.get("request_count") or {}).get("avg"))
    tables = {name: table for name, table in data.items() if isinstance(table, dict) and "unit" in table}
    every = {
        f"{name}_{statistic}": value
        for name, table in tables.items()
        for statistic, value in table.items()
        if statistic != "unit"
    }
    translated = {"inter_token_latency": TPOT} | (
        {"time_to_first_token": TTFT, "request_latency": E2E} if closed else {}
    )
    ours: dict[str, str] = {}
    for theirs, metric in translated.items() if whole else ():
        if (tables.get(theirs) or {}).get("unit") == "ms":
            statistics = {"avg": "mean"} | ({"p50": "p50", "p95": "p95", "p99": "p99"} if not errors else {})
            known = {name: own for name, own in statistics.items() if own in metric.statistics}
            ours |= {f"{theirs}_{name}": metric.key(own) for name, own in known.items()}
    metrics, own = _split("aiperf", every, _supported(ours, count))
    if count is not None and count + errors > 0:
        metrics[FAILED_RATIO.key()] = errors / (count + errors)
    concurrency = _number(phase.get("concurrency"))
    if closed and concurrency is not None:
        metrics[CONCURRENCY.key()] = concurrency
    yield Foreign(
        "aiperf",
        str(data.get("aiperf_version") or ""),
        " ".join(filter(None, ["aiperf", str(phase.get("type") or ""), str(phase.get("concurrency") or "")])),
        _texts(
            {f"phase.{name}": value for name, value in phase.items()} | {name: data.get(name) for name in AIPERF_STATES}
        ),
        metrics,
        own,
        "the client's tokenizer, or the server",
    )


def _aiperf_phase(config: Data) -> Data:
    """The profiled phase; empty if the configuration does not name it."""
    phases = config.get("phases")
    known = [phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    return next((phase for phase in known if phase.get("name") == "profiling"), known[-1] if known else {})


# llama-bench


def _is_llama_bench(data: Any) -> bool:
    return (
        isinstance(data, list)
        and bool(data)
        and all(isinstance(row, dict) and {"n_prompt", "n_gen", "avg_ts"} <= row.keys() for row in data)
    )


def _llama_bench(data: Any) -> Iterator[Foreign]:
    for row in data:
        prompt, output = int(row["n_prompt"]), int(row["n_gen"])
        figures = {
            name: row.get(name)
            for name in ("avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "model_size", "model_n_params")
        }
        metrics, own = _split("llama-bench", figures, {"model_size": WEIGHTS.key()})
        if WEIGHTS.key() in metrics:
            metrics[WEIGHTS.key()] /= GB
        metrics |= {
            key: float(count) for key, count in ((PROMPT_TOKENS.key(), prompt), (OUTPUT_TOKENS.key(), output)) if count
        }
        test = f"pp{prompt}+tg{output}" if prompt and output else f"pp{prompt}" if prompt else f"tg{output}"
        test += f" @ d{row['n_depth']}" if row.get("n_depth") else ""
        yield Foreign(
            "llama-bench",
            str(row.get("build_commit") or ""),
            f"{row.get('model_type') or 'llama.cpp'} {test}",
            _texts(
                {name: value for name, value in row.items() if name not in figures and not name.startswith("samples")}
            ),
            metrics,
            own,
            "what was asked",
        )


# optimum-benchmark


def _is_optimum(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    parts = data["report"] if isinstance(data.get("report"), dict) else data
    return any(isinstance(part, dict) and {"latency", "throughput", "memory"} <= part.keys() for part in parts.values())


def _optimum(data: Data) -> Iterator[Foreign]:
    report, config = (data["report"], data.get("config") or {}) if isinstance(data.get("report"), dict) else (data, {})
    every: dict[str, Any] = {}
    for stage, parts in report.items():
        for part, table in (parts or {}).items():
            if isinstance(table, dict):
                every |= {f"{stage}.{part}.{name}": value for name, value in table.items()}
    metrics, own = _split("optimum-benchmark", every, {})
    shapes = (config.get("scenario") or {}).get("input_shapes") or {}
    names = {"batch_size": BATCH_SIZE.key(), "sequence_length": PROMPT_TOKENS.key()}
    metrics |= {key: number for name, key in names.items() if (number := _number(shapes.get(name))) is not None}
    backend = config.get("backend") or {}
    environment = config.get("environment") or {}
    params = _texts(
        {f"backend.{name}": value for name, value in backend.items()}
        | {f"environment.{name}": value for name, value in environment.items()}
    )
    name = str(config.get("name") or backend.get("model") or "optimum-benchmark")
    yield Foreign(
        "optimum-benchmark",
        str(environment.get("optimum_benchmark_version") or ""),
        name,
        params,
        metrics,
        own,
        "what was asked",
    )


READERS: tuple[tuple[str, Callable[[Any], bool], Callable[[Any], Iterator[Foreign]]], ...] = (
    ("vllm bench serve", _is_vllm, _vllm),
    ("guidellm", _is_guidellm, _guidellm),
    ("aiperf", _is_aiperf, _aiperf),
    ("llama-bench", _is_llama_bench, _llama_bench),
    ("optimum-benchmark", _is_optimum, _optimum),
)
"""Program, check if some JSON is its result, reader of that JSON."""
