"""Figures of the EffiLLM paper, from measured cells: against model size, batch size, prompt length; heatmaps, memory.

A figure whose data are missing is not drawn, and the reason is returned. Lines join measured cells only; bars across a
dot are 95 % intervals. The style is that of `charts`.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...analysis.comparison import DEVICE_PEAK, HOST_PEAK, RATE
from ...analysis.scaling.cells import MEDIAN_TTFT, Measured
from ...analysis.scaling.findings import Findings
from ...analysis.scaling.focus import at_focus, labels, with_interval
from ...analysis.scaling.study import MEAN_TPOT, CliffSearch
from ...records.cell import Cell
from ...records.metrics import ITL, KL, WEIGHTS
from ...records.quantizations import COLOURS
from .style import (
    BLUE,
    BROWN,
    GREY,
    INK,
    LIGHT,
    MARKERS,
    ORANGE,
    RED,
    WIDTH,
    chart_style,
    new_figure,
    plain_numbers,
    put_legend,
    save_figure,
    value_label,
)
from .sweep import metric_figure, overview_figure, quality_figure
from .tradeoffs import draw_tradeoffs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PALETTE = (BLUE, ORANGE, "#2e8b57", RED, "#8e44ad", BROWN, "#17a2a2", GREY)
"""Colours of models, for panels in which quantization does not vary."""

LOG_FROM = 12.0
"""Ratio of the highest to the lowest value from which an axis of values is logarithmic."""

MOST_HEATMAPS = 24
LEAST_HEATMAP = 2  # least number of batch sizes and of prompt lengths

Point = tuple[float, float, float, float]  # x, value, low, high


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


@dataclass(frozen=True)
class View:
    """Data of all figures: the cells of the focus, a label for each cell's model, and the settings they all share."""

    found: Findings
    cells: tuple[Measured, ...]
    names: Mapping[str, str]
    common: str

    def name(self, measured: Measured) -> str:
        """Return the label of a cell's model."""
        return self.names[measured.result.hashes.config]

    @property
    def models(self) -> list[str]:
        """Labels of the models, smallest first."""
        return list(
            dict.fromkeys(self.name(m) for m in sorted(self.cells, key=lambda m: m.variable("parameters") or 0.0))
        )

    @property
    def quants(self) -> list[str]:
        """Quantizations in the order of the vocabulary."""
        seen = {m.cell.quant for m in self.cells}
        return [quant for quant in (*COLOURS, *sorted(seen - set(COLOURS))) if quant in seen]

    def look(self, model: str) -> tuple[str, str]:
        """Return colour and marker of a model."""
        number = self.models.index(model)
        return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]


def draw_figures(found: Findings, folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write the figures as .svg and .png in `folder`, which is created.

    Return the files, and (figure, reason) for each that is not drawn.
    """
    names = labels(found.focus.cells)
    lengths = {m.cell.output_tokens for m in found.focus.cells}
    common = [found.focus.machine.name, *(f"{length} output tokens" for length in lengths)]
    view = View(found, found.focus.cells, names, " · ".join(common))
    files: list[Path] = []
    missing: list[tuple[str, str]] = []
    with chart_style():
        for name, draw in FIGURES.items():
            figure = draw(view)
            if isinstance(figure, str):
                missing.append((name, figure))
            else:
                files += save_figure(figure, folder, name)
        more, not_drawn = draw_tradeoffs(found, names, folder)
    return [*files, *more], [*missing, *not_drawn]


def _ticks(places: Iterable[float], words: Callable[[float], str] = lambda value: f"{value:,.0f}") -> dict[float, str]:
    return {place: words(place) for place in sorted(set(places))}


def _against_size(view: View) -> Figure | str:
    """Draw throughput and time to first token over model size, a line per quantization, at the shape of comparison."""
    own = [m for m in view.cells if at_focus(m, view.found.focus) and m.variable("parameters")]
    sizes = {m.variable("parameters") or 0.0: view.name(m) for m in own}
    if len(sizes) < 2:
        return "it needs two models of known size that were measured with the same batch size and prompt length"
    panels = [
        Panel("", "Parameters (10⁹), logarithmic", label, tuple(_by_quant(own, view.quants, "parameters", of)), sizes)
        for label, of in (
            ("Throughput (output tokens/s)", _value(RATE)),
            ("Time to first token (ms)", _value(MEDIAN_TTFT)),
        )
    ]
    return _lines_figure(
        "Throughput and latency against model size", f"{_shape(view)} · {view.common}", panels, 2, tilt=True
    )


def _memory_against_size(view: View) -> Figure | str:
    """Draw peak memory, and the weights alone, over model size by precision."""
    own = [m for m in view.cells if at_focus(m, view.found.focus) and m.variable("parameters")]
    sizes = {m.variable("parameters") or 0.0: view.name(m) for m in own}
    if len(sizes) < 2:
        return "it needs two models of known size that were measured with the same batch size and prompt length"
    key = memory_key(own)
    panels = [
        Panel(
            "",
            "Parameters (10⁹), logarithmic",
            f"{heading} (GB)",
            tuple(_by_quant(own, view.quants, "parameters", _value(of, 1e-9))),
            sizes,
        )
        for heading, of in (
            (f"Peak {'device' if key == DEVICE_PEAK else 'host'} memory", key),
            ("Weights", WEIGHTS.key()),
        )
    ]
    return _lines_figure(
        "Memory against model size, by precision", f"{_shape(view)} · {view.common}", panels, 2, tilt=True
    )


def memory_key(cells: Sequence[Measured]) -> str:
    """Return the metric of peak memory: of the device if all cells have it, else needed on the host."""
    return DEVICE_PEAK if all(DEVICE_PEAK in m.metrics for m in cells) else HOST_PEAK


def _value(key: str, scale: float = 1.0) -> Callable[[Measured], tuple[float, float, float] | None]:
    return lambda measured: with_interval(measured, key, scale)


def _per_instance(measured: Measured) -> tuple[float, float, float] | None:
    return with_interval(measured, RATE, 1 / measured.cell.batch_size)


def _by_quant(
    cells: Sequence[Measured],
    quants: Sequence[str],
    over: str,
    of: Callable[[Measured], tuple[float, float, float] | None],
) -> Iterator[Line]:
    for quant, marker in zip(quants, itertools.cycle(MARKERS), strict=False):
        points = _points([m for m in cells if m.cell.quant == quant], over, of)
        if points:
            yield Line(quant, COLOURS.get(quant, BROWN), marker, points)


def _points(
    cells: Sequence[Measured], over: str, of: Callable[[Measured], tuple[float, float, float] | None]
) -> tuple[Point, ...]:
    found = [(x, *value) for m in cells if (x := m.variable(over)) and (value := of(m))]
    return tuple(sorted(found))


Rows = Sequence[tuple[str, Callable[[Measured], tuple[float, float, float] | None]]]
SPEED: Rows = (("Throughput (output tokens/s)", _value(RATE)), ("Time to first token (ms)", _value(MEDIAN_TTFT)))


def _against(over: str, title: str, across: str, held: str, rows: Rows = SPEED) -> Callable[[View], Figure | str]:
    """Return a function that draws metrics over a setting, the setting `held` fixed at that of comparison.

    A column per quantization, a row per metric, a line per model.
    """

    def draw(view: View) -> Figure | str:
        focus = view.found.focus
        if held == "batch_size":
            own = [m for m in view.cells if m.cell.batch_size == focus.batch]
            words = f"batch size {focus.batch}"
        else:
            own = [m for m in view.cells if m.variable("prompt_tokens") == focus.prompt]
            words = f"{focus.prompt:g} prompt tokens"
        places = {x for m in own if (x := m.variable(over))}
        if len(places) < 2:
            return f"it needs two values of {over} at {words}"
        quants = [quant for quant in view.quants if any(m.cell.quant == quant for m in own)]
        panels = []
        for number, (up, of) in enumerate(rows):
            for quant in quants:
                lines = [
                    Line(
                        model,
                        *view.look(model),
                        _points([m for m in own if m.cell.quant == quant and view.name(m) == model], over, of),
                    )
                    for model in view.models
                ]
                heading = quant if number == 0 and len(quants) > 1 else ""
                panels.append(
                    Panel(
                        heading,
                        across if number == len(rows) - 1 else "",
                        up,
                        tuple(line for line in lines if line.points),
                        _ticks(places),
                    )
                )
        note = "" if len(quants) > 1 else f"quantization {quants[0]}"
        return _lines_figure(title, " · ".join(filter(None, [words, note, view.common])), panels, len(quants))

    return draw


def _shape(view: View) -> str:
    return f"batch size {view.found.focus.batch} · {view.found.focus.prompt:g} prompt tokens"


def _lines_figure(title: str, subtitle: str, panels: Sequence[Panel], columns: int, tilt: bool = False) -> Figure:
    rows = -(-len(panels) // columns)
    size = max(WIDTH, 3.3 * columns), 4.6 if rows == 1 else 1 + 2.9 * rows
    figure, drawn = new_figure(title, f"{subtitle} · across dots: 95 % intervals", size, (rows, columns))
    for number, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
        _draw_lines(axes, panel, tilt)
        axes.set(title=panel.heading, xlabel=panel.across, ylabel=panel.up if number % columns == 0 or tilt else "")
    if not tilt:
        for row in range(rows):
            _same_scale(drawn[row * columns : (row + 1) * columns])
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    put_legend(figure, list(handles.values()))
    return figure


def _draw_lines(axes: Axes, panel: Panel, tilt: bool) -> None:
    for line in panel.lines:
        x, y, low, high = (list(column) for column in zip(*line.points, strict=True))
        axes.vlines(x, low, high, color=line.colour, linewidth=1.2)
        axes.plot(x, y, line.marker + "-", color=line.colour, linewidth=1.4, markersize=5, label=line.label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
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


def _same_scale(row: Sequence[Axes]) -> None:
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


def _heatmap(key: str, title: str, unit: str, cliffs: bool) -> Callable[[View], Figure | str]:
    """Return a function that draws a map of batch size × prompt length for each model and quantization.

    With `cliffs`, the cliffs of this latency are marked.
    """

    def draw(view: View) -> Figure | str:
        groups = [(model, quant) for model in view.models for quant in view.quants]
        maps = []
        for model, quant in groups:
            own = [
                m
                for m in view.cells
                if view.name(m) == model and m.cell.quant == quant and key in m.metrics and m.variable("prompt_tokens")
            ]
            if (
                min(len({m.cell.batch_size for m in own}), len({m.variable("prompt_tokens") for m in own}))
                >= LEAST_HEATMAP
            ):
                maps.append((model, quant, own))
        if not maps:
            return "it needs two batch sizes and two prompt lengths of one model and quantization"
        shown = maps[:MOST_HEATMAPS]
        columns = min(len(view.quants) if len(view.quants) > 1 else 3, len(shown))
        rows = -(-len(shown) // columns)
        notes = [
            unit,
            "red: a latency cliff" if cliffs else "",
            f"first {len(shown)} of {len(maps)}" if len(maps) > len(shown) else "",
            view.common,
        ]
        size = max(WIDTH, 3.4 * columns), 1.2 + (2.5 if rows > 1 else 3.2) * rows
        figure, panels = new_figure(title, " · ".join(filter(None, notes)), size, (rows, columns), legend=False)
        values = [m.metrics[key] for _, _, own in shown for m in own]
        searches = [s for s in view.found.scaling.cliffs if s.metric == key and s.cliffs] if cliffs else []
        for number, (axes, (model, quant, own)) in enumerate(zip(panels, shown, strict=False)):
            _draw_map(axes, own, key, (min(values), max(values)), searches)
            _mark_failed(axes, view, own)
            axes.set(
                title=f"{textwrap.shorten(model, 34, placeholder='…')} · {quant}",
                ylabel="Prompt tokens" if number % columns == 0 else "",
            )
            axes.set_xlabel("Batch size" if number + columns >= len(shown) else "")
        for axes in panels[len(shown) :]:
            axes.remove()
        return figure

    return draw


def _places(own: Sequence[Measured]) -> tuple[list[float], list[float]]:
    return sorted({float(m.cell.batch_size) for m in own}), sorted({m.variable("prompt_tokens") or 0.0 for m in own})


def _draw_map(
    axes: Axes, own: Sequence[Measured], key: str, ends: tuple[float, float], searches: Sequence[CliffSearch]
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    batches, prompts = _places(own)
    table = np.full((len(prompts), len(batches)), np.nan)
    for m in own:
        table[prompts.index(m.variable("prompt_tokens") or 0.0), batches.index(m.cell.batch_size)] = m.metrics[key]
    norm = LogNorm(ends[0], max(ends[1], ends[0] * 1.01))
    colours = colormaps["Blues"].with_extremes(bad=LIGHT)
    axes.imshow(table, origin="lower", aspect="auto", cmap=colours, norm=norm)
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            axes.text(
                column,
                row,
                value_label(float(value)),
                ha="center",
                va="center",
                size=8,
                color="white" if norm(value) > 0.55 else INK,
            )
    axes.set(
        xticks=range(len(batches)),
        xticklabels=[f"{b:g}" for b in batches],
        yticks=range(len(prompts)),
        yticklabels=[f"{p:g}" for p in prompts],
    )
    axes.grid(visible=False)
    axes.tick_params(length=0)
    hashes = {m.result.hashes.config: m for m in own}
    for search in searches:
        along = next((hashes[h] for h in search.config_hashes if h in hashes), None)
        if along is None:
            continue
        for cliff in search.cliffs:
            if search.over == "batch_size":
                right, row = batches.index(cliff.before) + 0.5, prompts.index(along.variable("prompt_tokens") or 0.0)
                axes.plot([right, right], [row - 0.5, row + 0.5], color=RED, linewidth=3, solid_capstyle="butt")
            else:
                column, top = batches.index(along.cell.batch_size), prompts.index(cliff.before) + 0.5
                axes.plot([column - 0.5, column + 0.5], [top, top], color=RED, linewidth=3, solid_capstyle="butt")


def _mark_failed(axes: Axes, view: View, own: Sequence[Measured]) -> None:
    """Write the outcome of failed or refused cells into the map."""
    batches, prompts = _places(own)
    same: Cell = own[0].cell
    for result in view.found.results:
        cell = result.cell
        alike = (cell.model, cell.quant, cell.weights, cell.output_tokens) == (
            same.model,
            same.quant,
            same.weights,
            same.output_tokens,
        )
        here = result.hashes.env == view.found.focus.machine.env
        if result.failure and here and alike and cell.batch_size in batches and cell.prompt_tokens in prompts:
            axes.text(
                batches.index(cell.batch_size),
                prompts.index(cell.prompt_tokens),
                result.outcome,
                ha="center",
                va="center",
                size=7,
                color=GREY,
            )


def _points_of(view: View, key: str = RATE) -> list[tuple[Cell, Mapping[str, float]]]:
    """Return the cells at the shape of comparison as `charts` draws them, with the labels of `view` as model names."""
    workloads = {m.cell.workload for m in view.cells}
    found: list[tuple[Cell, Mapping[str, float]]] = []
    for m in view.cells:
        if at_focus(m, view.found.focus) and key in m.metrics:
            named = {
                "model": view.name(m),
                "weights": "hub",
                "revision": "main",
                "trust_remote_code": False,
                "allow_pickle": False,
            }
            named |= {"workload": "various"} if len(workloads) > 1 else {}
            found.append((dataclasses.replace(m.cell, **named), m.metrics))  # type: ignore[arg-type]
    order = view.models
    return sorted(found, key=lambda point: order.index(point[0].model))


def _models(view: View) -> Figure | str:
    points = _points_of(view)
    if len({cell.model for cell, _ in points}) < 2:
        return "it needs two models that were measured with the same batch size and prompt length"
    keys = [
        RATE,
        MEDIAN_TTFT,
        *([ITL.key("p50")] if any(ITL.key("p50") in m for _, m in points) else []),
        memory_key(view.cells),
    ]
    return overview_figure(points, keys)


def _memory_by_quantization(view: View) -> Figure | str:
    key = memory_key(view.cells)
    points = _points_of(view, key)
    if len({cell.quant for cell, _ in points}) < 2:
        return "it needs two quantizations that were measured with the same batch size and prompt length"
    return metric_figure(points, key)


def _quality(view: View) -> Figure | str:
    scored = [(cell, metrics) for cell, metrics in _points_of(view) if KL.key() in metrics]
    return (
        quality_figure(scored)
        if len(scored) > 1
        else "it needs two cells at the shape of comparison with figures of quality: use real weights and quality=auto"
    )


def _scatter(view: View) -> Figure | str:
    """Draw throughput over peak memory, one dot per cell; a larger dot is a larger batch."""
    from matplotlib.lines import Line2D

    key = memory_key(view.cells)
    own = [m for m in view.cells if key in m.metrics and RATE in m.metrics]
    if len(own) < 2:
        return "it needs two cells with a known peak of memory"
    batches = sorted({m.cell.batch_size for m in own})
    figure, (axes,) = new_figure(
        "Throughput against peak memory",
        f"left and up is better · larger dots: larger batches · {view.common}",
        (WIDTH, 5.2),
    )
    for m in own:
        x, (y, low, high) = m.metrics[key] * 1e-9, with_interval(m, RATE) or (0.0, 0.0, 0.0)
        colour, size = COLOURS.get(m.cell.quant, BROWN), 4.5 + 1.6 * batches.index(m.cell.batch_size)
        axes.vlines(x, low, high, color=colour, linewidth=1.0)
        axes.plot(
            [x],
            [y],
            view.look(view.name(m))[1],
            color=colour,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    rates = [m.metrics[RATE] for m in own]
    if max(rates) > LOG_FROM * min(rates) > 0:
        axes.set_yscale("log")
        plain_numbers(axes)
    else:
        axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.set(
        xlabel=f"Peak {'device' if key == DEVICE_PEAK else 'host'} memory (GB)", ylabel="Throughput (output tokens/s)"
    )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS.get(quant, BROWN), label=quant) for quant in view.quants
    ]
    handles += [
        Line2D([], [], linestyle="", marker=view.look(model)[1], color=GREY, label=model) for model in view.models
    ]
    put_legend(figure, handles)
    return figure


FIGURES: dict[str, Callable[[View], Figure | str]] = {
    "against_model_size": _against_size,
    "against_batch_size": _against(
        "batch_size", "Throughput and latency against batch size", "Batch size", "prompt_tokens"
    ),
    "against_prompt_length": _against(
        "prompt_tokens", "Throughput and latency against prompt length", "Prompt tokens", "batch_size"
    ),
    "per_instance": _against(
        "batch_size",
        "Throughput of one instance against batch size",
        "Batch size",
        "prompt_tokens",
        (("Throughput ÷ batch size (tokens/s)", _per_instance),),
    ),
    "heatmap_throughput": _heatmap(RATE, "Throughput by batch size and prompt length", "output tokens/s", cliffs=False),
    "heatmap_ttft": _heatmap(
        MEDIAN_TTFT, "Time to first token by batch size and prompt length", "ms, median", cliffs=True
    ),
    "heatmap_tpot": _heatmap(
        MEAN_TPOT, "Time per output token by batch size and prompt length", "ms, mean", cliffs=True
    ),
    "memory_against_model_size": _memory_against_size,
    "memory_by_quantization": _memory_by_quantization,
    "memory_against_throughput": _scatter,
    "models": _models,
    "quality_against_speed": _quality,
}
"""Figure → function that draws it, or returns the reason why it cannot be drawn."""
