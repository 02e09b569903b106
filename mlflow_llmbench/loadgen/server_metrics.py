"""Parse a server's own metrics (/metrics) in the text format of Prometheus.

Format: github.com/prometheus/docs, content/docs/instrumenting/exposition_formats.md. Only the names that `metrics`
lists are kept. Other names and malformed lines are skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ..records.server_names import (
    SERVER_ACCEPTANCES,
    SERVER_ACCEPTED_LENGTHS,
    SERVER_COUNTERS,
    SERVER_GAUGES,
    SERVER_RATIOS,
    SERVER_TIMES,
)

LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{[^{}]*\})?\s+(\S+)(?:\s+-?\d+)?\s*")
"""Name, labels, value, time in ms. A line with a brace in a label's value does not match and is skipped."""

LARGEST = frozenset([*SERVER_RATIOS, *SERVER_ACCEPTANCES, *SERVER_ACCEPTED_LENGTHS])
"""Metrics that several engines do not have the sum of."""

KEPT = {
    *SERVER_GAUGES,
    *LARGEST,
    *SERVER_COUNTERS,
    *(f"{name}_{part}" for name in SERVER_TIMES for part in ("sum", "count")),
}


def read_metrics(text: str) -> Mapping[str, float]:
    """Return the value of each metric over all label sets: their sum, or the largest for a share or a length."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else LINE.fullmatch(line)
        if match is None or match[1] not in KEPT:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if math.isfinite(value):
            name = match[1]
            before = found.get(name)
            found[name] = value if before is None else max(before, value) if name in LARGEST else before + value
    return found
