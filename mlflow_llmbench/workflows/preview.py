"""Preview of a command: its plan as text or JSON. Measures nothing."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from ..analysis.layout import weights_text
from ..config.spec import parse
from ..records.cell import as_text
from ..reports.tables import text_table
from ..sweeps.planning import Plan, plan
from ..sweeps.sweep import open_executor
from ..system import placement
from ..system.estimate import Refusal

MOST_LINES = 100
"""Most cells that the text shows; `--json` has all."""


def preview(**parameters: object) -> Plan:
    """Return the plan that `sweep.run` would execute with the same parameters.

    Raises the errors that it would raise before it starts, except for a quantization whose package is missing: its
    cells are refused for that reason, and the others are still planned.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    with contextlib.closing(open_executor(spec)) as executor:
        return plan(spec, executor.machine)


def format_preview(found: Plan) -> str:
    """Return the plan as text: a line per cell, the reasons for refusals, and the totals."""
    names = found.varied or ("model", "quant", "batch_size")
    placed = any(planned.cell.placement == placement.AUTO for planned in found.cells)
    lines = []
    for planned in found.cells[:MOST_LINES]:
        size = None if planned.predicted_bytes is None else f"{planned.predicted_bytes / 1e9:.2f}"
        state = "refused" if planned.refusal else duration(planned.least_s)
        where = [weights_text(planned.predicted_placement or {}) or "–"] if placed else []
        lines.append([*(as_text(name, getattr(planned.cell, name)) for name in names), size, state, *where])
    heading = [*names, "memory GB", "at least", *(["weights in"] if placed else [])]
    rows = [text_table(heading, lines, range(len(names), len(names) + 2))]
    if len(found.cells) > MOST_LINES:
        rows.append(f"… and {len(found.cells) - MOST_LINES} more; --json has all.")
    return "\n".join([*rows, "", *_refusals(found), _sums(found)])


def _refusals(found: Plan) -> list[str]:
    """Return a line per kind of refusal: the number of cells, and the message of the first."""
    refusals = [planned.refusal for planned in found.cells if planned.refusal]
    first: dict[str, Refusal] = {}
    for refusal in refusals:
        first.setdefault(refusal.kind, refusal)
    counts = Counter(refusal.kind for refusal in refusals)
    return [
        f"{_counted(count, 'cell')} would be refused ({kind}): {first[kind].sentence}" for kind, count in counts.items()
    ]


def _sums(found: Plan) -> str:
    """Return a sentence with the totals: cells, loads, maximum memory and minimum time."""
    tried = found.tried
    sizes = [p.predicted_bytes for p in tried if p.predicted_bytes is not None]
    cells = _counted(len(found.cells), "cell")
    text = f"{len(tried)} of {cells} would be measured, with {_counted(found.loads, 'load')}"
    if sizes:
        text += f", at most about {max(sizes) / 1e9:.2f} GB"
    known = [p.least_s for p in tried if p.least_s is not None]
    if tried and len(known) == len(tried):
        return (
            f"{text}, in at least {duration(sum(known))} by this machine's best rates; "
            "loading, downloads and overheads come on top."
        )
    return (
        f"{text}. The time is unknown until a real model has been measured here once with the same device and threads."
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float | None) -> str:
    """Format seconds: `0.4 s`, `12 s`, `3.5 min`, `2.1 h`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def preview_json(found: Plan) -> dict[str, Any]:
    """Return the plan as JSON data; unknown values are null."""
    cells = [
        {
            "parameters": {name: as_text(name, value) for name, value in vars(p.cell).items()},
            "predicted_bytes": p.predicted_bytes,
            "predicted_load_bytes": p.predicted_load_bytes,
            "predicted_placement": p.predicted_placement,
            "least_s": p.least_s,
            "refused": p.refusal.sentence if p.refusal else None,
        }
        for p in found.cells
    ]
    return {"cells": cells, "varied": list(found.varied), "loads": found.loads, "tried": len(found.tried)}
