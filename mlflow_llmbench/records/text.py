"""Write numbers for people, and find the word that they meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
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


def large_number_text(value: float) -> str:
    """Format a large count in words, with three digits: `950 thousand`, `1.20 million`, `3.45 billion`."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            return f"{short_number_text(value / size)} {word}"
    return short_number_text(value)


@overload
def finite(value: float | None) -> float | None: ...
@overload
def finite(value: object) -> Any: ...
def finite(value: object) -> Any:
    """Return a value, None for a float that is not finite: JSON has no such numbers, and a reading was not taken."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rough_duration(seconds: float) -> str:
    """Format estimated seconds, rounded up coarsely: `5 s`, `40 s`, `2 min`, `1 h 20 min`."""
    if seconds <= 90:
        return f"{max(-(-seconds // 5) * 5, 5):.0f} s"
    minutes = int(-(-seconds // 60))
    if minutes <= 90:
        return f"{minutes} min"
    tens = -(-minutes // 10) * 10
    return f"{tens // 60} h {tens % 60} min" if tens % 60 else f"{tens // 60} h"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun: `1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def nearest(text: str, known: Iterable[str]) -> str:
    """Return the known word that is most like a text, "" if none is."""
    return next(iter(difflib.get_close_matches(text.lower(), list(known), n=1)), "")


def known_words(text: str, known: Iterable[str]) -> str:
    """Return the advice for an unknown word: `Did you mean int4? Known: …`."""
    names = list(known)
    near = nearest(text, names)
    return f"{f'Did you mean {near}? ' if near else ''}Known: {', '.join(names)}."
