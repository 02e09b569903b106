"""What a server says of itself at /metrics, in the text format of Prometheus.

The format: github.com/prometheus/docs, content/docs/instrumenting/exposition_formats.md. Only what `metrics` lists is kept; whatever
else stands there, and lines that are none, are passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .metrics import SERVER_COUNTERS, SERVER_GAUGES, SERVER_RATIOS, SERVER_TIMES

LINE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{[^{}]*\})?\s+(\S+)(?:\s+-?\d+)?\s*")
"""Name, labels, value, time in ms. A label's value with a brace in it makes a line that is passed over."""

KEPT = {
    *SERVER_GAUGES,
    *SERVER_RATIOS,
    *SERVER_COUNTERS,
    *(f"{name}_{part}" for name in SERVER_TIMES for part in ("sum", "count")),
}


def read_metrics(text: str) -> Mapping[str, float]:
    """Value by name, of all label sets together: their sum, and the largest where it is a share of something."""
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
            found[name] = value if before is None else max(before, value) if name in SERVER_RATIOS else before + value
    return found
