"""Predictions as text and as JSON data. Every figure is marked as predicted."""

from __future__ import annotations

from typing import Any

from ..analysis.scaling.prediction import PredictedCell, PredictedFigure, Prediction
from ..analysis.scaling.ranking import percent
from ..records.cell import Cell, as_text
from ..records.codec import to_json
from ..records.metric import GB
from ..records.text import number_text, plural
from .tables import MISSING, text_table

NAMED = ("model", "quant", "batch_size", "prompt_tokens", "output_tokens")
"""Settings that name a predicted cell."""

HEADING = ("predicted figure", "value", "95 % interval", "leave-one-out error", "cells", "by")


def format_prediction(found: Prediction) -> str:
    """Format a prediction for a terminal: what it rests on, a line for each figure, and what is missing or beyond."""
    varied = [name for name in NAMED if len({getattr(one.cell, name) for one in found.cells}) > 1]
    body = []
    for one in found.cells:
        settings = [as_text(name, getattr(one.cell, name)) for name in varied]
        body += [[*settings, *_line(figure)] for figure in one.figures]
    first = len(varied) + 1
    table = [text_table([*varied, *HEADING], body, range(first, first + 4))] if body else []
    notes = [f"- {line}" for one in found.cells for line in _notes(one, found)]
    return "\n\n".join([_lead(found), *table, *(["\n".join(dict.fromkeys(notes))] if notes else [])])


def _lead(found: Prediction) -> str:
    """Say what is predicted for which machine, and from what."""
    same = [name for name in NAMED if len({getattr(one.cell, name) for one in found.cells}) == 1]
    cell = found.cells[0].cell
    what = ", ".join(f"{name} {as_text(name, getattr(cell, name))}" for name in same)
    suspect = f", {found.suspect} of them suspect" if found.suspect else ""
    basis = f"{plural(found.count, 'measured cell')} of {', '.join(found.sweeps)}{suspect}"
    if found.hardware is None:
        return f"Predicted, not measured: {what}; on {found.machine}, from {basis}."
    device = found.hardware
    rates = [f"{device.bandwidth / GB:g} GB/s", f"{device.flops / 1e12:g} TFLOP/s"]
    rates += [f"{device.memory / GB:g} GB"] if device.memory else []
    text = f"Predicted, not measured: {what}; on {device.name} ({', '.join(rates)}; {device.source})"
    if found.machine is None:
        return (
            f"{text}. Times are bounds by the nominal rates: programs reach a part of them. With measured cells (--of "
            "SWEEP) they are those of the share that was reached there."
        )
    return (
        f"{text}, at the share of the best rates that {basis} reached on {found.machine}. The error is that of the "
        "share there; that of the other machine is not known."
    )


def _line(figure: PredictedFigure) -> list[str]:
    interval = (
        MISSING
        if figure.low is None or figure.high is None
        else f"{number_text(figure.low)} to {number_text(figure.high)}"
    )
    bound = f"{figure.bound} " if figure.bound else ""
    value = f"{bound}{number_text(figure.value)} {figure.unit}"
    return [figure.name, value, interval, percent(figure.error), str(figure.cells or MISSING), figure.by]


def _notes(one: PredictedCell, found: Prediction) -> list[str]:
    """Return sentences on a cell: measured ones, what is missing, what lies beyond, and whether it fits."""
    name = _name(one.cell)
    notes = [f"{name} was measured, so it is not predicted."] if one.measured else []
    notes += [f"{name}, {note}." if not note.endswith(".") else f"{name}: {note}" for note in one.notes]
    beyond: dict[str, list[str]] = {}
    for figure in one.figures:
        if figure.beyond:
            beyond.setdefault(figure.beyond, []).append(figure.name)
    for far, names in beyond.items():
        notes.append(f"{name}, {' and '.join(names)}: beyond the measured cells, {far} of their work.")
    if one.fits is not None and found.hardware and found.hardware.memory:
        size = next(figure.value for figure in one.figures if figure.unit == "GB")
        told = f"{name} needs about {number_text(size)} of {found.hardware.memory / GB:g} GB: "
        told += "it fits" if one.fits else "it does not fit"
        rows = one.largest_batch
        told += "" if rows is None else f"; the largest batch that fits is {rows}" if rows else ", with no batch size"
        notes.append(f"{told}. A driver and its libraries need more.")
    return notes


def _name(cell: Cell) -> str:
    return (
        f"{cell.model.rstrip('/').rpartition('/')[2]} {cell.quant} batch {cell.batch_size} with "
        f"{as_text('prompt_tokens', cell.prompt_tokens)} + {cell.output_tokens} tokens"
    )


def prediction_json(found: Prediction) -> dict[str, Any]:
    """Return a prediction as JSON data. `predicted` is true in it and in every figure; an absent value is null."""
    return {
        "predicted": True,
        "machine": found.machine,
        "hardware": to_json(found.hardware),
        "sweeps": list(found.sweeps),
        "measured_cells": found.count,
        "suspect_cells": found.suspect,
        "cells": [
            {
                "parameters": {name: as_text(name, getattr(one.cell, name)) for name in NAMED},
                "figures": [{"predicted": True, "unit": f.unit, **to_json(f)} for f in one.figures],
                "measured": one.measured,
                "fits": one.fits,
                "largest_batch": one.largest_batch,
                "notes": list(one.notes),
            }
            for one in found.cells
        ],
    }
