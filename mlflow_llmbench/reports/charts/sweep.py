"""Charts of a sweep: one bar per quantization, and quality against speed.

Groups along x are the batch sizes, or the combinations of all other varied parameters. Each model has its own panel,
or is a group if only the quantization varies besides.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config.cells import NOT_IN_IDENTITY
from ...records.cell import Cell, differing
from ...records.metric import Bars, interval_keys
from ...records.metrics import KL, OUTPUT_RATE, WEIGHTS, by_name, shown_in
from ...records.quantizations import COLOURS
from .catalogue import Chart, Drawing
from .placing import MOST_LABELS, draw_front, label_points
from .style import (
    BROWN,
    CHARACTER,
    GREY,
    HATCH,
    HEIGHT,
    INK,
    MARKERS,
    WIDEST,
    WIDTH,
    drawn_name,
    hollow,
    new_figure,
    put_legend,
    suspect_handle,
    suspect_patch,
    value_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class SweepPoint(NamedTuple):
    """A measured cell with its summary metrics, and whether it is suspect."""

    cell: Cell
    metrics: Mapping[str, float]
    suspect: bool = False


Points = Sequence[SweepPoint]
Panels = Sequence[tuple[str, str, str]]  # model or "" for all, metric, heading

DESCRIBED = ("quant", "batch_size", "concurrency", "request_rate", "prompt_tokens", "output_tokens", "workload")
"""Settings that a subtitle names."""

BARS = {entry.key: entry for entry in shown_in(Bars)}
"""Metric → its chart. A chart draws the first of its metrics that any cell has."""

FEW_CELLS = "it needs two cells that have its metric"


@dataclass(frozen=True)
class SweepPoints:
    """Measured cells of a sweep with their summary metrics. If a cell was measured twice, the last one counts.

    `attainment` is the share (0–1) of the requests that shall meet the limits.
    """

    points: Points
    attainment: float


def _metric_keys(points: Points) -> dict[str, str]:
    """Return the metric of each chart of bars that has data; none if there are fewer than two cells."""
    keys: dict[str, str] = {}
    if _is_single(points):
        return keys
    for entry in BARS.values():
        if any(metrics.get(entry.key) for _, metrics, _ in points):
            keys.setdefault(entry.name, entry.key)
    return keys


def _is_single(points: Points) -> bool:
    return len({cell for cell, *_ in points}) < 2


def _overview(sweep: SweepPoints) -> Drawing:
    keys = _metric_keys(sweep.points)
    return overview_figure(sweep.points, keys.values()) if keys else FEW_CELLS


def _bars(name: str) -> Callable[[SweepPoints], Drawing]:
    """Return the function that draws the bars of one chart."""

    def draw(sweep: SweepPoints) -> Drawing:
        key = _metric_keys(sweep.points).get(name)
        return metric_figure(sweep.points, key) if key else FEW_CELLS

    return draw


def _quality(sweep: SweepPoints) -> Drawing:
    """Draw the divergence from the unquantized model against throughput."""
    scored = [point for point in sweep.points if {KL.key(), OUTPUT_RATE.key()} <= point.metrics.keys()]
    return FEW_CELLS if _is_single(scored) else quality_figure(scored)


def settings_text(cell: Cell, names: Sequence[str] = DESCRIBED) -> str:
    """Describe the settings in words: `quantization int8 · batch size 4 · 128 prompt tokens`.

    An online cell has its load in place of the batch size.
    """
    online, rate = cell.scenario == "online", cell.request_rate
    words = {
        "quant": "" if online and cell.quant == "none" else f"quantization {cell.quant}",
        "batch_size": "" if online else f"batch size {cell.batch_size}",
        "concurrency": ""
        if not online or rate
        else f"{cell.concurrency} {'user' if cell.concurrency == 1 else 'users'}",
        "request_rate": f"{rate:g} requests/s" if rate else "",
        "workload": f"{drawn_name(cell.workload)} prompts",
        "prompt_tokens": f"{cell.prompt_tokens or 'auto'} prompt tokens",
        "output_tokens": f"{cell.output_tokens} output tokens",
    }
    return " · ".join(words[name] for name in names if words[name])


@dataclass(frozen=True)
class Grid:
    """The position of each cell's bar: its panel (a model, or "" for all), its group along x, and its quantization."""

    panels: list[str]
    names: list[str]  # the parameters whose values make a group
    groups: list[tuple[Any, ...]]
    quants: list[str]
    cells: Mapping[tuple[str, tuple[Any, ...], str], SweepPoint]


def _arrange(points: Points, one_panel: bool) -> Grid:
    cells = [cell for cell, *_ in points]
    seen = {f.name: list(dict.fromkeys(getattr(cell, f.name) for cell in cells)) for f in dataclasses.fields(Cell)}
    names = [name for name in differing(cells, NOT_IN_IDENTITY) if name != "quant"]
    split = len(names) > 1 and "model" in names and not one_panel
    names = [name for name in names if not (split and name == "model")] or ["batch_size"]
    for name in names:  # numbers by size, None last; words in their given order
        seen[name].sort(key=lambda value: (value is None, 0 if value is None or isinstance(value, str) else value))
    placed = {
        (point.cell.model if split else "", tuple(getattr(point.cell, name) for name in names), point.cell.quant): point
        for point in points
    }
    groups = sorted(
        {g for _, g, _ in placed}, key=lambda g: [seen[name].index(value) for name, value in zip(names, g, strict=True)]
    )
    quants = [quant for quant in (*COLOURS, *sorted(set(seen["quant"]) - set(COLOURS))) if quant in seen["quant"]]
    return Grid(seen["model"] if split else [""], names, groups, quants, placed)


def metric_figure(points: Points, key: str) -> Figure:
    """Draw one metric, one panel per model. All share one y scale, unless small values would vanish on it."""
    grid = _arrange(points, one_panel=False)
    notes = [f"{BARS[key].metric.better} is better", "median" if key.endswith("_p50") else ""]
    notes.append("line: 95 % interval" if any(interval_keys(key)[0] in metrics for _, metrics, _ in points) else "")
    figure = _bars_figure(
        points, grid, BARS[key].words, notes, [(panel, key, drawn_name(panel)) for panel in grid.panels], 3, WIDTH
    )
    tops = [axes.get_ylim()[1] for axes in figure.axes]
    for axes in figure.axes if max(tops) < 8 * min(tops) else ():
        axes.set_ylim(0, max(tops))
    return figure


def overview_figure(points: Points, keys: Iterable[str]) -> Figure:
    """Draw all metrics of a sweep in one figure with one legend; models are groups along x."""
    drawn = [("", key, f"{BARS[key].title} · {BARS[key].metric.better} is better") for key in keys]
    return _bars_figure(points, _arrange(points, one_panel=True), "overview", [], drawn, 2, 11.0)


def quality_figure(points: Points) -> Figure:
    """Draw quality loss by quantization against speed: one point per cell, with both 95 % intervals."""
    from matplotlib.lines import Line2D

    cells = [cell for cell, *_ in points]
    varied = differing(cells, NOT_IN_IDENTITY)
    models, quants = ([*dict.fromkeys(getattr(cell, name) for cell in cells)] for name in ("model", "quant"))
    other = [name for name in varied if name not in ("model", "quant")]
    notes = [
        "right and down is better",
        "lines: 95 % intervals",
        settings_text(cells[0], [name for name in DESCRIBED if name not in varied]),
    ]
    notes += [f"in brackets: {', '.join(other).replace('_', ' ')}"] if other else []
    title = f"{drawn_name(models[0]) if len(models) == 1 else f'{len(models)} models'} · quality against speed"
    figure, (axes,) = new_figure(title, " · ".join(filter(None, notes)))
    quants.sort(key=lambda quant: [*COLOURS].index(quant) if quant in COLOURS else len(COLOURS))
    labels = []
    for cell, metrics, suspect in points:
        x, y, colour = metrics[OUTPUT_RATE.key()], metrics[KL.key()], COLOURS.get(cell.quant, BROWN)
        marker = MARKERS[models.index(cell.model) % len(MARKERS)]
        axes.plot([x], [y], marker, color=colour, markersize=7, zorder=3, **(hollow(colour) if suspect else {}))
        axes.hlines(
            y,
            metrics.get(OUTPUT_RATE.key("ci_low"), x),
            metrics.get(OUTPUT_RATE.key("ci_high"), x),
            color=colour,
            linewidth=1.2,
        )
        low, high = metrics.get(KL.key("ci_low"), y), metrics.get(KL.key("ci_high"), y)
        axes.vlines(x, low, high, color=colour, linewidth=1.2)
        settings = " ".join(drawn_name(getattr(cell, name)) for name in other)
        labels.append((x, y, f"{y:.2g} {f'({settings})' if settings else ''}".strip()))
    top = max(axes.dataLim.y1, 1e-6)
    axes.set(xlim=(0, 1.12 * axes.dataLim.x1), ylim=(-0.05 * top, 1.12 * top))
    axes.set(xlabel="Throughput (output tokens/s)", ylabel="KL divergence from unquantized (nats)")
    shapes = zip(models, itertools.cycle(MARKERS), strict=False) if len(models) > 1 else ()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS.get(quant, BROWN), label=quant) for quant in quants
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=GREY, label=drawn_name(model)) for model, marker in shapes
    ]
    if any(point.suspect for point in points):
        handles.append(suspect_handle())
    if len(points) > MOST_LABELS:
        handles.append(draw_front(axes, [(x, y) for x, y, _ in labels], (1, -1)))
    put_legend(figure, handles)
    label_points(axes, labels if len(points) <= MOST_LABELS else [])
    return figure


def _bars_figure(
    points: Points, grid: Grid, topic: str, notes: Sequence[str], drawn: Panels, most: int, width: float
) -> Figure:
    """Draw panels of bars, each with its model (or ""), metric and heading.

    There are at most `most` columns, fewer if the bars would get too thin. `width` is in inches.
    """
    from matplotlib.patches import Patch

    need = 0.8 + 0.14 * len(grid.groups) * (len(grid.quants) + 1)
    columns = next((c for c in range(min(most, len(drawn)), 1, -1) if c * need <= 1.1 * width), 1)
    rows, width = -(-len(drawn) // columns), min(max(width, columns * need), WIDEST)
    cells = [cell for cell, *_ in points]
    models = list(dict.fromkeys(drawn_name(cell.model) for cell in cells))
    title = f"{', '.join(models) if len(models) < 3 else f'{len(models)} models'} · {topic}"
    constant = settings_text(
        cells[0], [name for name in DESCRIBED if len({getattr(cell, name) for cell in cells}) == 1]
    )
    # Otherwise the ticks or the subtitle name the quantization.
    quants = grid.quants if len(grid.quants) > 1 and len(grid.groups) > 1 else []
    legend = [Patch(facecolor=COLOURS.get(quant, BROWN), label=quant) for quant in quants]
    if any(key.endswith("_peak") for _, key, _ in drawn) and any(
        metrics.get(WEIGHTS.key()) for _, metrics, _ in points
    ):
        legend.append(Patch(facecolor="#00000040", label="shaded: weights"))
    if any(point.suspect for point in points):
        legend.append(suspect_patch())
    size = width, HEIGHT if rows == 1 else 1 + 3 * rows
    figure, panels = new_figure(
        title, " · ".join(filter(None, [*notes, constant])), size, (rows, columns), bool(legend)
    )
    for number, (axes, (panel, key, heading)) in enumerate(zip(panels, drawn, strict=False)):
        _draw_bars(axes, grid, panel, key, width / columns - 0.8)
        entry = BARS[key]
        axes.set(title=heading, ylabel="" if panel and number % columns else f"{entry.title} ({entry.unit})")
    for axes in panels[len(drawn) :]:
        axes.remove()
    if legend:
        put_legend(figure, legend)
    return figure


def _draw_bars(axes: Axes, grid: Grid, panel: str, key: str, inches: float) -> None:
    """Draw the bars of one panel with their values, 95 % intervals and weights; a dash where nothing was measured.

    `inches` is the approximate width of the axes.
    """
    count, scale = len(grid.quants), BARS[key].scale
    pitch = 0.84 / count
    span = max(len(grid.groups) + 0.1 if len(grid.groups) > 1 else 0.88, 7 * pitch)  # few bars stay slim
    bars = itertools.product(enumerate(grid.groups), enumerate(grid.quants))
    places = {(group, quant): g + (q - (count - 1) / 2) * pitch for (g, group), (q, quant) in bars}
    labels: list[tuple[float, float, str]] = []
    for (group, quant), x in places.items():
        point = grid.cells.get((panel, group, quant))
        if point is None or (value := point.metrics.get(key)) is None:
            labels.append((x, 0.0, "–"))
            continue
        metrics = point.metrics
        looks: Any = {"hatch": HATCH, "edgecolor": "white", "linewidth": 0} if point.suspect else {}
        axes.bar(x, value * scale, 0.92 * pitch, color=COLOURS.get(quant, BROWN), **looks)
        if key.endswith("_peak") and WEIGHTS.key() in metrics:
            axes.bar(x, metrics[WEIGHTS.key()] * scale, 0.92 * pitch, color="black", alpha=0.25)
        low, high = (metrics.get(end, value) for end in interval_keys(key))
        if high > low:
            axes.vlines(x, max(low, 0) * scale, high * scale, color=INK, linewidth=1.2)
        labels.append((x, max(value, high) * scale, value_label(value * scale)))
    room = inches * pitch / span
    flat = max(len(text) for *_, text in labels) * 8 * CHARACTER < room
    for x, y, text in labels if flat or room > 0.12 else ():
        upright = 0 if flat or text == "–" else 90
        axes.annotate(
            text, (x, y), (0, 2), textcoords="offset points", ha="center", va="bottom", size=8, rotation=upright
        )
    top, middle = max(y for _, y, _ in labels) * (1.1 if flat else 1.25), (len(grid.groups) - 1) / 2
    axes.set(ylim=(0, top or 1), xlim=(middle - span / 2, middle + span / 2))
    axes.tick_params(axis="x", length=0)
    if len(grid.groups) == 1 and count > 1:
        axes.set(xticks=list(places.values()), xticklabels=[quant for _, quant in places], xlabel="Quantization")
        if max(map(len, grid.quants)) * 9 * CHARACTER > room:
            axes.tick_params(axis="x", labelrotation=30)
        return
    most = max(6, int(inches / span / (8.3 * CHARACTER)))
    texts = [
        "\n".join("auto" if value is None else textwrap.fill(drawn_name(value), most) for value in group)
        for group in grid.groups
    ]
    axes.set(xticks=range(len(texts)), xticklabels=texts, xlabel=" · ".join(grid.names).replace("_", " ").capitalize())


CHARTS = (
    Chart("overview", "sweep", _overview),
    *(Chart(name, "sweep", _bars(name)) for name in by_name(Bars)),
    Chart("quality", "sweep", _quality),
)
