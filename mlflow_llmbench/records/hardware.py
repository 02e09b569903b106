"""Machines by their nominal rates, for predictions of what was not measured on them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UsageError
from .metric import GB
from .redaction import excerpt
from .text import known_words

TERA = 1e12

LEAST, MOST = 1e-3, 1e9
"""Range of a given rate (GB/s, 10¹² FLOP/s) and of a given memory (GB): no device is beyond it."""


@dataclass(frozen=True)
class Hardware:
    """A device: bytes read from its memory per second, dense 16-bit FLOP/s with 32-bit sums, and bytes of memory.

    `memory` is None if it is not known. `source` says where the rates are from.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float | None
    source: str


def _nvidia(name: str, bandwidth_gb: float, teraflops: float, memory_gb: float, source: str) -> Hardware:
    return Hardware(name, bandwidth_gb * GB, teraflops * TERA, memory_gb * GB, f"NVIDIA, {source}")


_TABLE = (
    _nvidia("rtx-3080", 760, 59.5, 10, "GA102 architecture whitepaper, table of the RTX 3080 10 GB"),
    _nvidia("rtx-3090", 936, 71, 24, "GA102 architecture whitepaper, table of the RTX 3090"),
    _nvidia("rtx-4090", 1008, 165.2, 24, "Ada architecture whitepaper, appendix A, RTX 4090"),
    _nvidia("t4", 320, 65, 16, "T4 datasheet"),
    _nvidia("l4", 300, 121, 24, "L4 datasheet"),
    _nvidia("a10", 600, 125, 24, "A10 datasheet"),
    _nvidia("a100-40gb", 1555, 312, 40, "A100 datasheet, SXM 40 GB"),
    _nvidia("a100-80gb", 2039, 312, 80, "A100 datasheet, SXM 80 GB"),
    _nvidia("h100", 3350, 989.4, 80, "H100 datasheet, SXM"),
    _nvidia("h200", 4800, 989.4, 141, "H200 datasheet, SXM"),
)
"""Rates as published by the vendor. FLOP/s are those of dense products: datasheets with sparsity give twice as many."""

HARDWARE = {one.name: one for one in _TABLE}


def named_hardware(name: str) -> Hardware:
    """Return the device of this name. Raises UsageError."""
    found = HARDWARE.get(name.strip().lower().replace(" ", "-"))
    if found is None:
        raise UsageError(
            f"Unknown hardware: {excerpt(name, 60)}. {known_words(name, HARDWARE)} "
            "Or give its rates: --bandwidth 900 --flops 80 --memory 16GB."
        )
    return found


def given_hardware(bandwidth: str | None, flops: str | None, memory: str | None) -> Hardware:
    """Return a device by texts of its bandwidth (GB/s), FLOP/s (10¹²) and memory (`16GB`). Raises UsageError."""
    if bandwidth is None or flops is None:
        lacking = "--bandwidth with GB/s" if bandwidth is None else "--flops with TFLOP/s"
        raise UsageError(f"A machine is given by its bandwidth and its FLOP/s. Add {lacking}.")
    rates = _rate("--bandwidth", bandwidth, "GB/s"), _rate("--flops", flops, "TFLOP/s")
    name = f"a machine of {rates[0]:g} GB/s and {rates[1]:g} TFLOP/s"
    size = None if memory is None else _size(memory)
    return Hardware(name, rates[0] * GB, rates[1] * TERA, size, "given")


def _size(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mgt])(i?)b", text.strip().lower())
    power: int = "_kmgt".index(found[2]) if found else 0
    size = float(found[1]) * float((1024 if found[3] else 1000) ** power) if found else 0.0
    if not LEAST <= size / GB < MOST:
        raise UsageError(
            f"--memory is not a size: {excerpt(text, 60)}. Give a number with its unit, such as 16GB or 12GiB."
        )
    return size


def _rate(option: str, text: str, unit: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not LEAST <= rate < MOST:
        raise UsageError(
            f"{option} is not a rate in {unit}: {excerpt(text, 60)}. Give a number above 0, without a unit."
        )
    return rate
