"""References to environment variables in a parameter's text: `$NAME` and `${NAME}`, names in capitals.

`$$` stands for a dollar sign. A parameter is recorded with its references. Their values are read when requests are
built, and are recorded nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .errors import UsageError
from .redaction import keep_secret

REFERENCE = re.compile(r"\$(?:\$|\{([A-Z_][A-Z0-9_]*)\}|([A-Z_][A-Z0-9_]*))")


def names_in(text: str) -> list[str]:
    """Return the names of the variables that a text refers to."""
    return [name for braced, plain in REFERENCE.findall(text) if (name := braced or plain)]


def without(text: str) -> str:
    """Return the text without its references."""
    return REFERENCE.sub("", text)


def resolved(parameter: str, text: str, environment: Mapping[str, str]) -> str:
    """Return the text with the values of its references, which are secrets of this process from now on.

    Raises UsageError for a variable that is not set, is empty, or that no header can hold.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name is None:
            return "$"
        held = environment.get(name, "").strip()
        if not held:
            raise UsageError(
                f"{parameter} refers to the environment variable {name}, which is not set. Set it, or write $$ for a "
                "dollar sign."
            )
        if not (held.isascii() and held.isprintable()):
            raise UsageError(f"{name} has a character that no HTTP header can hold. Set it to the plain value.")
        keep_secret(held)
        return held

    return REFERENCE.sub(value, text)


def in_texts(data: Any, change: Callable[[str], str]) -> Any:
    """Return JSON data with every text changed; names stay."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, dict):
        return {name: in_texts(value, change) for name, value in data.items()}
    return [in_texts(value, change) for value in data] if isinstance(data, list) else data
