"""Preview of a command: its cells with estimated memory and time, and those that would be refused. Starts nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import model_shape
from ..config.cells import group_cells
from ..config.spec import parse
from ..measure import quality_order
from ..records.cell import Cell, as_text
from ..records.results import ModelFacts
from ..reports.tables import text_table
from ..sweeps import planning
from ..sweeps.planning import expand, resolve_models
from ..system import estimate, machine
from ..workloads.prompts import prompts_of

MOST_LINES = 100
"""Most cells that the text shows; `--json` has all."""


@dataclass(frozen=True)
class Planned:
    """One planned cell: estimated peak bytes and minimum seconds (None if unknown), and why it would be refused.

    `refused` is None if the cell would be tried.
    """

    cell: Cell
    predicted_bytes: int | None
    least_s: float | None
    refused: str | None


@dataclass(frozen=True)
class Preview:
    """All cells in order, the names of the settings that vary, and the number of model loads."""

    cells: tuple[Planned, ...]
    varied: tuple[str, ...]
    loads: int

    @property
    def tried(self) -> list[Planned]:
        """Cells that would be measured."""
        return [planned for planned in self.cells if planned.refused is None]


def preview(**parameters: object) -> Preview:
    """Expand and estimate what `sweep.run` would do with the same parameters.

    Raises the errors that it would raise before it starts, except for a quantization whose package is missing: its
    cells are refused for that reason, and the others are still planned.
    """
    spec = parse({name: value for name, value in parameters.items() if value is not None})
    cells = expand(spec)
    groups = [group.cells for group in group_cells(cells)]
    lacking: dict[Cell, str] = {}
    model_of = resolve_models(groups, lacking=lacking)
    planning.refuse_twins(cells, model_of)
    prompts_of(cells)
    quality_order.require(spec.options)
    limit, _ = estimate.memory_limit(spec.options.memory_limit)
    hardware, peaks = machine.environment()["hashes"]["hardware"], machine.known_peaks()

    def planned(cell: Cell, model: ModelFacts) -> Planned:
        shape = model_shape.Shape.from_config(model.config) if model.config else None
        predicted = estimate.predicted_bytes(cell, model, shape)
        rates: Mapping[str, float] = peaks.get(f"{hardware} {cell.device} {cell.threads or 'auto'}", {})
        seconds = estimate.least_seconds(cell, model, shape, rates)
        room = (None, "") if spec.options.force else estimate.room_here(cell.device, limit)
        return Planned(cell, predicted, seconds, lacking.get(cell) or estimate.refusal(cell, model, predicted, room))

    found = tuple(planned(cell, model_of[cell]) for cell in cells)
    tried = {planned_.cell for planned_ in found if planned_.refused is None}
    return Preview(found, tuple(spec.varied), sum(any(cell in tried for cell in group) for group in groups))


def format_preview(found: Preview) -> str:
    """Return the plan as text: a line per cell, the reasons for refusals, and the totals."""
    names = found.varied or ("model", "quant", "batch_size")
    lines = []
    for planned in found.cells[:MOST_LINES]:
        size = None if planned.predicted_bytes is None else f"{planned.predicted_bytes / 1e9:.2f}"
        state = "refused" if planned.refused else duration(planned.least_s)
        lines.append([*(as_text(name, getattr(planned.cell, name)) for name in names), size, state])
    rows = [text_table([*names, "memory GB", "at least"], lines, range(len(names), len(names) + 2))]
    if len(found.cells) > MOST_LINES:
        rows.append(f"… and {len(found.cells) - MOST_LINES} more; --json has all.")
    return "\n".join([*rows, "", *_refusals(found), _sums(found)])


def _refusals(found: Preview) -> list[str]:
    """Return a line per kind of refusal: the number of cells, and the message of the first."""
    told = [p.refused for p in found.cells if p.refused]
    first: dict[str, str] = {}
    for text in told:
        first.setdefault(_kind(text), text)
    kinds = Counter(map(_kind, told))
    return [f"{count} cells would be refused ({kind}): {first[kind]}" for kind, count in kinds.items()]


def _kind(refusal: str) -> str:
    return (
        "context"
        if "is more than the context" in refusal
        else "package"
        if "is not installed" in refusal or "Install" in refusal
        else "memory"
    )


def _sums(found: Preview) -> str:
    """Return a sentence with the totals: cells, loads, maximum memory and minimum time."""
    tried = found.tried
    sizes = [p.predicted_bytes for p in tried if p.predicted_bytes is not None]
    text = f"{len(tried)} of {len(found.cells)} cells would be measured, with {found.loads} loads"
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


def duration(seconds: float | None) -> str:
    """Format seconds: `0.4 s`, `12 s`, `3.5 min`, `2.1 h`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def preview_json(found: Preview) -> dict[str, Any]:
    """Return the plan as JSON data; unknown values are null."""
    cells = [
        {
            "parameters": {name: as_text(name, value) for name, value in vars(p.cell).items()},
            "predicted_bytes": p.predicted_bytes,
            "least_s": p.least_s,
            "refused": p.refused,
        }
        for p in found.cells
    ]
    return {"cells": cells, "varied": list(found.varied), "loads": found.loads, "tried": len(found.tried)}
