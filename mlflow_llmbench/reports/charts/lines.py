"""Panels with a line per model or quantization, over a setting or the size of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...analysis.scaling.cells import Measured
from ...analysis.scaling.focus import with_interval
from ...records.quantizations import COLOURS
from .style import BROWN, MARKERS, WIDTH, new_figure, plain_numbers, put_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LOG_FROM = 12.0
"""Ratio of the highest to the lowest value from which an axis of values is logarithmic."""

MOST_TICKS = 8
"""Largest number of places of which each has its name; of more, only the powers of two have."""

Point = tuple[float, float, float, float]  # x, value, low, high
Values = Callable[[Measured], tuple[float, float, float] | None]
"""Function that returns a value of a cell with the ends of its 95 % interval, or None."""


@dataclass(frozen=True)
class Line:
    """Measured cells to join by a line: label, look and points."""

    label: str
    colour: str
    marker: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: heading, names of x and y, lines. `ticks`: places along x → their names."""

    heading: str
    across: str
    up: str
    lines: tuple[Line, ...]
    ticks: Mapping[float, str]


def ticks(places: Iterable[float]) -> dict[float, str]:
    """Map each place along an axis to its name."""
    return {place: f"{place:,.0f}" for place in sorted(set(places))}


def value_of(key: str) -> Values:
    """Return a function that gives a metric of a cell with its interval."""
    return lambda measured: with_interval(measured, key)


def by_quant(cells: Sequence[Measured], quants: Sequence[str], over: str, of: Values) -> Iterator[Line]:
    """Yield a line per quantization over the variable `over`; cells without a value are left out."""
    for quant, marker in zip(quants, itertools.cycle(MARKERS), strict=False):
        points = points_over([m for m in cells if m.cell.quant == quant], over, of)
        if points:
            yield Line(quant, COLOURS.get(quant, BROWN), marker, points)


def points_over(cells: Sequence[Measured], over: str, of: Values) -> tuple[Point, ...]:
    """Return the points of a line, by increasing x."""
    found = [(x, *value) for m in cells if (x := m.variable(over)) and (value := of(m))]
    return tuple(sorted(found))


def lines_figure(title: str, subtitle: str, panels: Sequence[Panel], columns: int, tilt: bool = False) -> Figure:
    """Draw panels in rows of `columns`, each row on one scale.

    With `tilt`, the ticks are names of models with their size, written aslant, and each panel has its own scale.
    """
    rows = -(-len(panels) // columns)
    size = max(WIDTH, 3.3 * columns), 4.6 if rows == 1 else 1 + 2.9 * rows
    figure, drawn = new_figure(title, f"{subtitle} · across dots: 95 % intervals", size, (rows, columns))
    for number, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
        _draw_lines(axes, panel, tilt)
        axes.set(title=panel.heading, xlabel=panel.across, ylabel=panel.up if number % columns == 0 or tilt else "")
    if not tilt:
        for row in range(rows):
            _share_scale(drawn[row * columns : (row + 1) * columns])
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    put_legend(figure, list(handles.values()))
    return figure


def _draw_lines(axes: Axes, panel: Panel, tilt: bool) -> None:
    for line in panel.lines:
        x, y, low, high = (list(column) for column in zip(*line.points, strict=True))
        axes.vlines(x, low, high, color=line.colour, linewidth=1.2)
        axes.plot(x, y, line.marker + "-", color=line.colour, linewidth=1.4, markersize=5, label=line.label)
    axes.set_xscale("log", base=2)
    powers = {x: name for x, name in panel.ticks.items() if math.log2(x).is_integer()}
    ticks = panel.ticks if tilt or len(panel.ticks) <= MOST_TICKS or len(powers) < 2 else powers
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    if tilt:
        named = [f"{name}\n{size:.3g}" for size, name in panel.ticks.items()]
        axes.set_xticks(list(panel.ticks), named, rotation=35, ha="right", rotation_mode="anchor", size=8)
    places = list(panel.ticks)
    air = (max(places) / min(places)) ** 0.08
    axes.set_xlim(min(places) / air, max(places) * air)
    values = [point[1] for line in panel.lines for point in line.points]
    if values and max(values) > LOG_FROM * min(values) > 0:
        axes.set_yscale("log")
        plain_numbers(axes)
    else:
        axes.set_ylim(0, max((point[3] for line in panel.lines for point in line.points), default=1.0) * 1.1)


def _share_scale(row: Sequence[Axes]) -> None:
    """Give a row of panels the same axis of values, logarithmic if one of them is."""
    if any(axes.get_yscale() == "log" for axes in row):
        low = min(axes.dataLim.y0 for axes in row)
        for axes in row:
            axes.set_yscale("log")
            plain_numbers(axes)
            axes.set_ylim(low / 1.2, max(a.dataLim.y1 for a in row) * 1.2)
    else:
        top = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(0, top)
