"""Table of all parameters, made of the fields of `cell.Cell` and `cell.Options`, and the text form of their values."""

from __future__ import annotations

import dataclasses
from dataclasses import Field
from typing import Any

from .cell import SPECULATIVE, Cell, Options

PARAMETERS: dict[str, Field[Any]] = {f.name: f for kind in (Cell, Options) for f in dataclasses.fields(kind)}
"""Name → declaration, in the order of the vocabulary."""

SWEEPABLE = tuple(name for name, f in PARAMETERS.items() if f.metadata["sweep"])

LENGTHS = ("prompt_tokens", "output_tokens")
"""Parameters that a trace replaces."""

MEANT_WITH = {
    "int8_threshold": ("quant", ("int8",)),
    "double_quant": ("quant", ("int4", "fp4")),
    "assistant": ("decode", ("assisted",)),
    "draft_tokens": ("decode", SPECULATIVE),
}
"""Setting → the parameter and values with which it has a meaning. Other cells have it at its default."""


def as_text(name: str, value: object) -> str:
    """Return a value as written on the command line and logged: `auto` or `none` for None, `true`/`false`, 0.02."""
    if value is None:
        return str(PARAMETERS[name].metadata["unset"])
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def default_text(name: str) -> str:
    """The default of a parameter as text."""
    return as_text(name, PARAMETERS[name].default)
