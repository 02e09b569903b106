"""Machines of a study, and the cells that its figures show: one machine, and one shape at which models meet."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...records.cell import Cell
from ...records.metric import interval_keys
from ..comparison import UNNAMED
from ..repetitions import interval_over_units
from .cells import Measured, describe, machine_names, varied_settings

OF_MODEL = ("model", "prune", "revision", "weights", "backend", "trust_remote_code", "allow_pickle", "workload")
"""Settings of a model: in one figure each model may have its own, and those that vary are named."""

SHOWN = ("quant", "batch_size", "prompt_tokens")
"""The axes of the figures, beside the model."""


OF_MACHINE = ("device", "threads", "gpu_layers", "worker_python")
"""Settings that say how a machine is used."""


@dataclass(frozen=True)
class Machine:
    """One machine with one software: environment hash, name (with the hash if two share it), cells, price per hour."""

    env: str
    name: str
    cells: int
    price: float | None


@dataclass(frozen=True)
class Focus:
    """The cells in the figures: of one machine, differing only in model, quantization, batch size and prompt length.

    `batch`, `prompt`: the values held fixed while something else varies · `note`: what is left out.
    """

    machine: Machine
    cells: tuple[Measured, ...]
    batch: int
    prompt: float
    note: str


def find_machines(cells: Sequence[Measured]) -> tuple[Machine, ...]:
    """Return the machines, the one with most cells first."""
    counts = Counter(measured.result.hashes.env for measured in cells)
    first = {env: next(m.result for m in cells if m.result.hashes.env == env) for env in counts}
    shown = machine_names(cells)
    return tuple(Machine(env, shown[env], count, first[env].price_per_hour) for env, count in counts.most_common())


def choose_focus(cells: Sequence[Measured], machines: Sequence[Machine]) -> Focus:
    """Choose the machine and settings of most cells, and the shape at which most models and quantizations meet."""
    here = [measured for measured in cells if measured.result.hashes.env == machines[0].env]
    held = _held()
    counts = Counter(tuple(getattr(m.cell, name) for name in held) for m in here)
    chosen = counts.most_common(1)[0][0]
    newest: dict[tuple[object, ...], Measured] = {}
    for measured in sorted(
        (m for m in here if tuple(getattr(m.cell, name) for name in held) == chosen), key=lambda m: m.result.ended_ms
    ):
        newest[tuple(getattr(measured.cell, name) for name in (*OF_MODEL, *SHOWN))] = measured
    shown = list(newest.values())
    shapes: dict[tuple[int, float], int] = Counter(
        (m.cell.batch_size, prompt) for m in shown if (prompt := m.variable("prompt_tokens"))
    )
    batch, prompt = (
        min(shapes, key=lambda shape: (-shapes[shape], shape[0], abs(math.log(shape[1] / 128)))) if shapes else (1, 0.0)
    )
    others = len(here) - len(shown)
    settings = ", ".join(
        f"{name}={getattr(shown[0].cell, name)}" for name in held if name in varied_settings([m.cell for m in here])
    )
    note = (
        f"{others} of the {len(here)} cells there are not shown: they were measured with other settings than "
        f"{settings or 'these'}."
        if others
        else ""
    )
    return Focus(machines[0], tuple(shown), batch, prompt, note)


def labels(cells: Sequence[Measured]) -> dict[str, str]:
    """Map config hash → label of the cell's model: its name, with weights and workload if they vary among the cells."""
    varied = [name for name in ("weights", "workload") if len({getattr(m.cell, name) for m in cells}) > 1]
    words = {"hub": "real", "random": "random"}

    def label(cell: Cell) -> str:
        values = [words.get(str(getattr(cell, name)), str(getattr(cell, name))) for name in varied]
        return describe(cell, ["model"]) + (f" ({', '.join(values)})" if values else "")

    return {m.result.hashes.config: label(m.cell) for m in cells}


def with_interval(measured: Measured, key: str, scale: float = 1.0) -> tuple[float, float, float] | None:
    """Return (value, low, high) of a metric, with the ends of its 95 % interval; None without the metric.

    Without an interval both ends are the value itself.
    """
    value = measured.metrics.get(key)
    if value is None:
        return None
    low, high = (measured.metrics.get(end) for end in interval_keys(key))
    if low is None or high is None:
        ends = interval_over_units(measured.result, key, measured.values(key))
        low, high = (min(max(ends[0], 0.0), value), max(ends[1], value)) if ends else (value, value)
    return value * scale, low * scale, high * scale


def like_focus(measured: Measured, focus: Focus) -> bool:
    """Return True if a cell of any machine has the settings of the focus, but for model, shape and use of the machine.

    The device, its threads and the interpreter of the worker belong to the machine.
    """
    first = focus.cells[0].cell
    return all(getattr(measured.cell, name) == getattr(first, name) for name in _held() if name not in OF_MACHINE)


def _held() -> list[str]:
    return [f.name for f in dataclasses.fields(Cell) if f.name not in (*UNNAMED, *OF_MODEL, *SHOWN)]


def at_focus(measured: Measured, focus: Focus) -> bool:
    """Return True if a cell has the batch size and prompt length at which models and quantizations are compared."""
    return measured.cell.batch_size == focus.batch and measured.variable("prompt_tokens") == focus.prompt
