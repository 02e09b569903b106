"""Read limits such as `ttft_p95<=200ms` as text into checked bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...records.errors import UsageError
from ...records.metric import GB, STATISTICS
from ...records.metrics import TPOT, TTFT
from ...records.text import known_words
from .candidates import MEMORY, Limit, Measure
from .recommend import QUALITY_MEASURES

BYTES = {
    "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
LEAST_MEMORY = 1e6
"""Smallest limit of memory in bytes. No model needs less, so a smaller one lacks its unit."""

SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}
MILLISECONDS = {"": 1, "us": 1e-3, "µs": 1e-3, "ms": 1, "s": 1e3}
LATENCIES = {"ttft": (TTFT, "p50"), "tpot": (TPOT, "mean")}
"""Latency that a limit can name → its metric, and the statistic if the limit names none."""


def read_limits(
    max_memory: str | None = None,
    max_ttft: str | None = None,
    max_tpot: str | None = None,
    min_quality: str | None = None,
) -> list[Limit]:
    """Parse limits such as `6GB`, `p95=200ms` or `kl=0.05,top1=0.95`, in this order. Raises UsageError."""
    found = []
    if max_memory is not None:
        size = quantity("--max-memory", max_memory, BYTES, "6GB")
        if size < LEAST_MEMORY:
            raise UsageError(
                f"--max-memory is less than {LEAST_MEMORY / 1e6:g}MB: {max_memory}. Give a size with its unit, such as "
                "6GB or 500MB."
            )
        found.append(Limit("--max-memory", MEMORY, size / GB))
    for name, text in (("ttft", max_ttft), ("tpot", max_tpot)):
        if text is not None:
            measure, amount = _latency(name, text)
            found.append(Limit(f"--max-{name}", measure, quantity(f"--max-{name}", amount, MILLISECONDS, "200ms")))
    for part in filter(None, (min_quality or "").split(",")):
        name, _, text = part.partition("=")
        if name not in QUALITY_MEASURES:
            raise UsageError(
                f"Unknown quality: {name}. {known_words(name, QUALITY_MEASURES)} Give for example --min-quality "
                "kl=0.05."
            )
        found.append(
            Limit(
                f"--min-quality {name}",
                QUALITY_MEASURES[name],
                quantity(f"--min-quality {name}", text, {"": 1}, "kl=0.05"),
            )
        )
    return found


def _latency(name: str, text: str) -> tuple[Measure, str]:
    """Split `p95=200ms` into the measure of that statistic and the amount as text. Raises UsageError."""
    statistic, _, amount = text.rpartition("=")
    metric, default = LATENCIES[name]
    statistic = statistic or default
    if statistic not in STATISTICS or statistic not in metric.statistics:
        known = dict.fromkeys([default, *(name for name in metric.statistics if name in STATISTICS)])
        raise UsageError(f"Unknown statistic in --max-{name}: {statistic}. Known: {', '.join(known)}.")
    shown = {"p50": "median", "mean": "mean"}.get(statistic, statistic)
    advice = (
        "More repetitions support higher percentiles."
        if statistic not in ("mean", "p50")
        else "Measure at least 2 output tokens."
    )
    return Measure(f"{shown} {metric.title}", (metric.key(statistic),), metric.better, advice), amount


def quantity(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    """Parse a positive number with one of the units; returns it times the unit's value. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-zµ]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        known = [name for name in units if name]
        raise UsageError(
            f"{option} is not a number{f' with a unit ({chr(44).join(known)})' if known else ''}: {text}. "
            f"Give for example {example}."
        )
    if not (value := float(match[1]) * units[unit]):
        raise UsageError(f"{option} must be more than 0: {text}. Give for example {example}.")
    return value
