"""Write numbers for people."""

from __future__ import annotations

import math
from typing import Any, overload


def short_number_text(value: float) -> str:
    """Format a number with about three significant digits and no exponent: 0.000123, 0.0123, 1.23, 12.3, 123, 12346."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = (
        0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4 if size >= 0.01 else 6
    )
    return f"{value:.{digits}f}"


def number_text(value: float) -> str:
    """Format with four significant digits and no exponent."""
    if value == 0:
        return "0"
    return f"{value:.{min(6, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


@overload
def finite(value: float | None) -> float | None: ...
@overload
def finite(value: object) -> Any: ...
def finite(value: object) -> Any:
    """Return a value, None for a float that is not finite: JSON has no such numbers, and a reading was not taken."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plural(number: int, noun: str) -> str:
    """Return a count with its noun: `1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
