"""Maps of batch size × prompt length for each model and quantization, with latency cliffs and failed cells."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analysis.comparison import RATE
from ...analysis.scaling.cells import MEDIAN_TTFT, Measured
from ...analysis.scaling.study import MEAN_TPOT, CliffSearch
from ...records.cell import Cell
from .catalogue import Chart, Drawing
from .figure_data import FigureData
from .style import GREY, HATCH, INK, LIGHT, RED, WIDTH, new_figure, value_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_HEATMAPS = 24
LEAST_HEATMAP = 2  # least number of batch sizes and of prompt lengths


def _heatmap(key: str, title: str, unit: str, cliffs: bool) -> Callable[[FigureData], Drawing]:
    """Return a function that draws a map of batch size × prompt length for each model and quantization.

    With `cliffs`, the cliffs of this latency are marked.
    """

    def draw(data: FigureData) -> Drawing:
        groups = [(model, quant) for model in data.models for quant in data.quants]
        maps = []
        for model, quant in groups:
            own = [
                m
                for m in data.cells
                if data.name(m) == model and m.cell.quant == quant and key in m.metrics and m.variable("prompt_tokens")
            ]
            if (
                min(len({m.cell.batch_size for m in own}), len({m.variable("prompt_tokens") for m in own}))
                >= LEAST_HEATMAP
            ):
                maps.append((model, quant, own))
        if not maps:
            return "it needs two batch sizes and two prompt lengths of one model and quantization"
        shown = maps[:MOST_HEATMAPS]
        columns = min(len(data.quants) if len(data.quants) > 1 else 3, len(shown))
        rows = -(-len(shown) // columns)
        notes = [
            unit,
            "red: a latency cliff" if cliffs else "",
            "hatched: suspect" if any(m.is_suspect for _, _, own in shown for m in own) else "",
            f"first {len(shown)} of {len(maps)}" if len(maps) > len(shown) else "",
            data.common,
        ]
        size = max(WIDTH, 3.4 * columns), 1.2 + (2.5 if rows > 1 else 3.2) * rows
        figure, panels = new_figure(title, " · ".join(filter(None, notes)), size, (rows, columns), legend=False)
        values = [m.metrics[key] for _, _, own in shown for m in own]
        searches = [s for s in data.found.scaling.cliffs if s.metric == key and s.cliffs] if cliffs else []
        for number, (axes, (model, quant, own)) in enumerate(zip(panels, shown, strict=False)):
            _draw_map(axes, own, key, (min(values), max(values)), searches)
            _mark_failed(axes, data, own)
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
    from matplotlib.patches import Rectangle

    batches, prompts = _places(own)
    table = np.full((len(prompts), len(batches)), np.nan)
    for m in own:
        table[prompts.index(m.variable("prompt_tokens") or 0.0), batches.index(m.cell.batch_size)] = m.metrics[key]
    norm = LogNorm(ends[0], max(ends[1], ends[0] * 1.01))
    colours = colormaps["Blues"].with_extremes(bad=LIGHT)
    axes.imshow(table, origin="lower", aspect="auto", cmap=colours, norm=norm)
    for m in own:
        if m.is_suspect:
            corner = batches.index(m.cell.batch_size) - 0.5, prompts.index(m.variable("prompt_tokens") or 0.0) - 0.5
            form: Any = {"fill": False, "hatch": HATCH, "edgecolor": GREY, "linewidth": 0}
            axes.add_patch(Rectangle(corner, 1, 1, **form))
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
                bbox={"facecolor": colours(norm(value)), "edgecolor": "none", "pad": 0.8},
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
            doubtful = {cliff.before, cliff.after} & set(search.suspect)
            edge: Any = {"color": RED, "linewidth": 3, "solid_capstyle": "butt"} | (
                {"linestyle": (0, (1, 0.7)), "dash_capstyle": "butt"} if doubtful else {}
            )
            if search.over == "batch_size":
                right, row = batches.index(cliff.before) + 0.5, prompts.index(along.variable("prompt_tokens") or 0.0)
                axes.plot([right, right], [row - 0.5, row + 0.5], **edge)
            else:
                column, top = batches.index(along.cell.batch_size), prompts.index(cliff.before) + 0.5
                axes.plot([column - 0.5, column + 0.5], [top, top], **edge)


def _mark_failed(axes: Axes, data: FigureData, own: Sequence[Measured]) -> None:
    """Write the outcome of failed or refused cells into the map."""
    batches, prompts = _places(own)
    same: Cell = own[0].cell
    for result in data.found.results:
        cell = result.cell
        alike = (cell.model, cell.quant, cell.weights, cell.output_tokens) == (
            same.model,
            same.quant,
            same.weights,
            same.output_tokens,
        )
        here = result.hashes.env == data.found.focus.machine.env
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


CHARTS = (
    Chart(
        "heatmap_throughput",
        "study",
        _heatmap(RATE, "Throughput by batch size and prompt length", "output tokens/s", cliffs=False),
        "Throughput of every shape. Grey: not measured, with the outcome if it was tried.",
        (5,),
    ),
    Chart(
        "heatmap_ttft",
        "study",
        _heatmap(MEDIAN_TTFT, "Time to first token by batch size and prompt length", "ms, median", cliffs=True),
        "Time to first token of every shape. A red edge is a latency cliff: a step that is steeper than both "
        "neighbours; it is dotted where a cell beside it is suspect.",
        (9,),
    ),
    Chart(
        "heatmap_tpot",
        "study",
        _heatmap(MEAN_TPOT, "Time per output token by batch size and prompt length", "ms, mean", cliffs=True),
        "Time per output token of every shape. Red edges are cliffs, as above.",
    ),
)
