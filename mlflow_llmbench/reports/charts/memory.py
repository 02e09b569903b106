"""Figures of memory in a study: against model size, by quantization, against throughput."""

from __future__ import annotations

from typing import Any

from ...analysis.comparison import DEVICE_PEAK, RATE
from ...analysis.scaling.cells import Measured
from ...analysis.scaling.focus import at_focus, with_interval
from ...records.metrics import WEIGHTS
from ...records.quantizations import COLOURS
from .catalogue import Chart, Drawing
from .figure_data import FigureData, memory_key, points_at_focus, shape_text
from .lines import LOG_FROM, Panel, by_quant, lines_figure, value_of
from .style import BROWN, GREY, WIDTH, new_figure, plain_numbers, put_legend
from .sweep import metric_figure


def _memory_against_size(data: FigureData) -> Drawing:
    """Draw peak memory, and the weights alone, over model size by precision."""
    own = [m for m in data.cells if at_focus(m, data.found.focus) and m.variable("parameters")]
    sizes = {m.variable("parameters") or 0.0: data.name(m) for m in own}
    if len(sizes) < 2:
        return "it needs two models of known size that were measured with the same batch size and prompt length"
    key = memory_key(own)
    panels = [
        Panel(
            "",
            "Parameters (10⁹), logarithmic",
            f"{heading} (GB)",
            tuple(by_quant(own, data.quants, "parameters", value_of(of))),
            sizes,
        )
        for heading, of in (
            (f"Peak {'device' if key == DEVICE_PEAK else 'host'} memory", key),
            ("Weights", WEIGHTS.key()),
        )
    ]
    return lines_figure(
        "Memory against model size, by precision", f"{shape_text(data)} · {data.common}", panels, 2, tilt=True
    )


def _memory_by_quantization(data: FigureData) -> Drawing:
    key = memory_key(data.cells)
    points = points_at_focus(data, key)
    if len({cell.quant for cell, _ in points}) < 2:
        return "it needs two quantizations that were measured with the same batch size and prompt length"
    return metric_figure(points, key)


def _scatter(data: FigureData) -> Drawing:
    """Draw throughput over peak memory, one dot per cell; a larger dot is a larger batch."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    key = memory_key(data.cells)
    own = [m for m in data.cells if key in m.metrics and RATE in m.metrics]
    if len(own) < 2:
        return "it needs two cells with a known peak of memory"
    batches = sorted({m.cell.batch_size for m in own})
    figure, (axes,) = new_figure(
        "Throughput against peak memory",
        f"left and up is better · larger dots: larger batches · {data.common}",
        (WIDTH, 5.2),
    )
    alike: dict[tuple[str, str, int], list[Measured]] = {}
    bars: list[tuple[list[tuple[float, float]], str]] = []
    for m in own:
        looks = COLOURS.get(m.cell.quant, BROWN), data.look(data.name(m))[1], batches.index(m.cell.batch_size)
        alike.setdefault(looks, []).append(m)
    for (colour, marker, size), dots in alike.items():
        x = [m.metrics[key] for m in dots]
        y, low, high = zip(*(with_interval(m, RATE) or (0.0, 0.0, 0.0) for m in dots), strict=True)
        bars += [([(at, bottom), (at, top)], colour) for at, bottom, top in zip(x, low, high, strict=True)]
        form: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6, "markersize": 4.5 + 1.6 * size}
        axes.plot(x, y, marker, linestyle="", color=colour, **form)
    # One collection for all: adding a collection looks at every point that is there.
    axes.add_collection(LineCollection([ends for ends, _ in bars], colors=[one for _, one in bars], linewidths=1.0))
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
        Line2D([], [], linestyle="", marker="o", color=COLOURS.get(quant, BROWN), label=quant) for quant in data.quants
    ]
    handles += [
        Line2D([], [], linestyle="", marker=data.look(model)[1], color=GREY, label=model) for model in data.models
    ]
    put_legend(figure, handles)
    return figure


CHARTS = (
    Chart(
        "memory_against_model_size",
        "study",
        _memory_against_size,
        "Peak memory of the process and bytes of the weights, by precision.",
    ),
    Chart(
        "memory_by_quantization",
        "study",
        _memory_by_quantization,
        "Peak memory by quantization; the dark part is the weights.",
    ),
    Chart("memory_against_throughput", "study", _scatter, "Throughput against peak memory, every cell."),
)
