"""Data of the figures of a study: the cells that are drawn, names of their models, colours and markers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...analysis.comparison import DEVICE_PEAK, HOST_PEAK, RATE
from ...analysis.scaling.cells import Measured
from ...analysis.scaling.findings import Findings
from ...analysis.scaling.focus import at_focus, labels
from ...records.quantizations import COLOURS
from .style import BLUE, BROWN, GREY, MARKERS, ORANGE, RED
from .sweep import SweepPoint

PALETTE = (BLUE, ORANGE, "#2e8b57", RED, "#8e44ad", BROWN, "#17a2a2", GREY)
"""Colours of models, for panels in which quantization does not vary."""


@dataclass(frozen=True)
class FigureData:
    """Data of all figures: the cells of the focus, a label for each cell's model, and the settings they all share."""

    found: Findings
    cells: tuple[Measured, ...]
    names: Mapping[str, str]
    common: str

    def name(self, measured: Measured) -> str:
        """Return the label of a cell's model."""
        return self.names[measured.result.hashes.config]

    @cached_property
    def models(self) -> list[str]:
        """Labels of the models, smallest first."""
        return list(
            dict.fromkeys(self.name(m) for m in sorted(self.cells, key=lambda m: m.variable("parameters") or 0.0))
        )

    @cached_property
    def quants(self) -> list[str]:
        """Quantizations in the order of the vocabulary."""
        seen = {m.cell.quant for m in self.cells}
        return [quant for quant in (*COLOURS, *sorted(seen - set(COLOURS))) if quant in seen]

    def look(self, model: str) -> tuple[str, str]:
        """Return colour and marker of a model."""
        number = self.models.index(model)
        return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]


def figure_data(found: Findings) -> FigureData:
    """Return the data of all figures of a study."""
    lengths = {m.cell.output_tokens for m in found.focus.cells}
    common = [found.focus.machine.name, *(f"{length} output tokens" for length in lengths)]
    return FigureData(found, found.focus.cells, labels(found.focus.cells), " · ".join(common))


def shape_text(data: FigureData) -> str:
    """Name the shape of comparison: batch size and prompt length."""
    return f"batch size {data.found.focus.batch} · {data.found.focus.prompt:g} prompt tokens"


def sized_names(cells: Sequence[Measured], names: Mapping[str, str]) -> dict[float, str]:
    """Map the size of each model of these cells (10⁹ parameters) to its label with the size.

    `names`: configuration hash → label, as `labels` returns it.
    """
    sizes: dict[float, dict[str, None]] = {}
    for m in cells:
        sizes.setdefault(m.variable("parameters") or 0.0, {})[names[m.result.hashes.config]] = None
    return {size: f"{', '.join(names)} · {size:.3g}" for size, names in sizes.items()}


def memory_key(cells: Sequence[Measured]) -> str:
    """Return the metric of peak memory: of the device if all cells have it, else needed on the host."""
    return DEVICE_PEAK if all(DEVICE_PEAK in m.metrics for m in cells) else HOST_PEAK


def points_at_focus(data: FigureData, key: str = RATE) -> list[SweepPoint]:
    """Return the cells at the shape of comparison as `sweep` draws them, with the labels of `data` as model names."""
    workloads = {m.cell.workload for m in data.cells}
    found = []
    for m in data.cells:
        if at_focus(m, data.found.focus) and key in m.metrics:
            named = {
                "model": data.name(m),
                "weights": "hub",
                "revision": "main",
                "trust_remote_code": False,
                "allow_pickle": False,
            }
            named |= {"workload": "various"} if len(workloads) > 1 else {}
            cell = dataclasses.replace(m.cell, **named)  # type: ignore[arg-type]
            found.append(SweepPoint(cell, m.metrics, m.is_suspect))
    order = data.models
    return sorted(found, key=lambda point: order.index(point.cell.model))
