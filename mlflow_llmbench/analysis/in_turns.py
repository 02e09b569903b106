"""The command that measures two configurations again in turns, filled in from their results."""

from __future__ import annotations

from dataclasses import fields

from ..records.cell import Cell, as_text, default_text, differing
from ..records.invocation import command_text

OF_THE_COMMAND = ("processes",)
"""Parameters that `ab` decides by itself: it measures each side in several processes."""


def command_in_turns(a: Cell, b: Cell) -> str:
    """Return the command `ab` for two cells, or its name alone if it cannot be filled in.

    That is so for servers, for permissions, which are given anew, and for values with blanks, which a side cannot hold.
    """
    apart = differing([a, b], OF_THE_COMMAND) or ["quant"]
    side_a, side_b = (" ".join(f"{name}={as_text(name, getattr(cell, name))}" for name in apart) for cell in (a, b))
    if (
        any(cell.scenario == "online" or cell.trust_remote_code for cell in (a, b))
        or any(len(side.split()) != len(apart) for side in (side_a, side_b))
        or (a.backend != b.backend and "backend" not in apart and "quant" not in apart)
    ):
        return command_text("ab")
    texts = {f.name: as_text(f.name, getattr(a, f.name)) for f in fields(Cell)}
    implied = {*apart, *OF_THE_COMMAND, *(("backend",) if "quant" in apart else ())}
    named = [name for name, text in texts.items() if name == "model" or text != default_text(name)]
    return command_text("ab", side_a, side_b, **{name: texts[name] for name in named if name not in implied})
