"""Panels with a line per model or quantization, over a setting or the size of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...analysis.scaling.cells import Measured
from ...analysis.scaling.focus import with_interval
from ...records.quantizations import COLOURS
from .placing import name_places
from .style import BROWN, GREY, MARKERS, WIDTH, hollow, new_figure, plain_numbers, put_legend, suspect_handle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LOG_FROM = 12.0
"""Ratio of the highest to the lowest value from which an axis of values is logarithmic."""

MOST_TICKS = 8
"""Largest number of places of which each has its name; of more, only the powers of two have."""

FURTHEST = 3.0
"""Factor beyond the values up to which intervals widen a logarithmic axis; they are cut off there."""

Values = Callable[[Measured], tuple[float, float, float] | None]
"""Function that returns a value of a cell with the ends of its 95 % interval, or None."""


class Point(NamedTuple):
    """A measured cell: x, its value with the ends of its interval, and whether it is suspect."""

    x: float
    value: float
    low: float
    high: float
    suspect: bool = False


@dataclass(frozen=True)
class Line:
    """Measured cells to join by a line: label, look and points."""

    label: str
    colour: str
    marker: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: heading, names of x and y, lines. `ticks`: places along x → their names.

    `slopes`: dashed lines y = slope · x, by their labels.
    """

    heading: str
    across: str
    up: str
    lines: tuple[Line, ...]
    ticks: Mapping[float, str]
    slopes: Mapping[str, float] = field(default_factory=dict)


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
    found = [Point(x, *value, m.is_suspect) for m in cells if (x := m.variable(over)) and (value := of(m))]
    return tuple(sorted(found))


def lines_figure(
    title: str, subtitle: str, panels: Sequence[Panel], columns: int, named: bool = False, linear: bool = False
) -> Figure:
    """Draw panels in rows of `columns`, each row on one scale. Hollow markers are suspect cells.

    With `named`, the ticks are names of models, the subtitle says what is across, and each panel has its own scale.
    With `linear`, both axes are.
    """
    rows = -(-len(panels) // columns)
    size = max(WIDTH, 3.3 * columns), (5.2 if named else 4.6) if rows == 1 else 1 + 2.9 * rows
    across = f" · across: {panels[0].across}" if named else ""
    figure, drawn = new_figure(title, f"{subtitle} · lines at dots: 95 % intervals{across}", size, (rows, columns))
    for number, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
        _draw_lines(axes, panel, linear)
        axes.set(title=panel.heading, ylabel=panel.up if number % columns == 0 or named else "")
        if named:
            name_places(axes, panel.ticks, size[0] / columns - 1.0)
        else:
            _number_ticks(axes, panel.ticks)
            axes.set_xlabel(panel.across)
    for first in range(0, len(panels), 1 if named else columns):
        last = first + (1 if named else columns)
        _share_scale(drawn[first:last], panels[first:last], linear)
    for axes, panel in zip(drawn, panels, strict=True):
        _draw_slopes(axes, panel.slopes)
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    suspect = any(point.suspect for panel in panels for line in panel.lines for point in line.points)
    put_legend(figure, [*handles.values(), *([suspect_handle()] if suspect else [])])
    return figure


def _draw_lines(axes: Axes, panel: Panel, linear: bool) -> None:
    """Draw the lines, with hollow markers where a cell is suspect, and set the limits of x."""
    for line in panel.lines:
        x, y, low, high, _ = (list(column) for column in zip(*line.points, strict=True))
        axes.vlines(x, low, high, color=line.colour, linewidth=1.2)
        axes.plot(x, y, line.marker + "-", color=line.colour, linewidth=1.4, markersize=5, label=line.label)
        doubtful = [(point.x, point.value) for point in line.points if point.suspect]
        if doubtful:
            axes.plot(*zip(*doubtful, strict=True), line.marker, linestyle="", markersize=5, **hollow(line.colour))
    places = list(panel.ticks)
    if linear:
        axes.set_xlim(0, max(places) * 1.08)
        return
    axes.set_xscale("log", base=2)
    air = (max(places) / min(places)) ** 0.08
    axes.set_xlim(min(places) / air, max(places) * air)


def _number_ticks(axes: Axes, ticks: Mapping[float, str]) -> None:
    """Name the places along x, of many only the powers of two."""
    powers = {x: name for x, name in ticks.items() if math.log2(x).is_integer()}
    kept = ticks if len(ticks) <= MOST_TICKS or len(powers) < 2 else powers
    axes.set_xticks(list(kept), list(kept.values()))
    axes.minorticks_off()


def _share_scale(row: Sequence[Axes], panels: Sequence[Panel], linear: bool) -> None:
    """Give a row of panels the same axis of values, logarithmic if the values of the row span much.

    An interval that reaches 0, or further than `FURTHEST` from all values, is cut off at the edge of such an axis.
    """
    points = [point for panel in panels for line in panel.lines for point in line.points]
    values = [point.value for point in points] or [1.0]
    limits = value_limits(values, [(point.low, point.high) for point in points], linear)
    for axes in row:
        set_value_scale(axes, limits)


def value_limits(
    values: Sequence[float], intervals: Sequence[tuple[float, float]], linear: bool = False
) -> tuple[float, float]:
    """Return the limits of an axis of values: from 0, or from above 0 if it is to be logarithmic."""
    least, most = min(values), max(values)
    if linear or not most > LOG_FROM * least > 0:
        return 0.0, max([most, *(high for _, high in intervals)]) * 1.1 or 1.0
    bottom = min([least, *(max(low, least / FURTHEST) for low, _ in intervals)])
    top = max([most, *(min(high, most * FURTHEST) for _, high in intervals)])
    return bottom / 1.2, top * 1.2


def set_value_scale(axes: Axes, limits: tuple[float, float]) -> None:
    """Set the limits of an axis of values, logarithmic if they are above 0."""
    if limits[0] > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    axes.set_ylim(*limits)


def _draw_slopes(axes: Axes, slopes: Mapping[str, float]) -> None:
    """Draw lines y = slope · x up to the edge of the axes, with their labels there."""
    (_, right), (_, top) = axes.get_xlim(), axes.get_ylim()
    for number, (label, slope) in enumerate(slopes.items()):
        x = min(right, top / slope)
        name = "the paper: bytes per weight" if number == 0 else "_"
        axes.plot([0, x], [0, slope * x], color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1, label=name)
        above = x < right
        axes.annotate(
            label, (x, slope * x), (0, 2) if above else (3, 0), textcoords="offset points", size=8, color=GREY,
            ha="center" if above else "left", va="bottom" if above else "center", annotation_clip=False,
        )  # fmt: skip
