"""Figures of memory in a study: against model size, by quantization, against throughput."""

from __future__ import annotations

from ...analysis.comparison import DEVICE_PEAK, RATE
from ...analysis.scaling.cells import Measured
from ...analysis.scaling.focus import at_focus, with_interval
from ...records.metrics import WEIGHTS
from ...records.quantizations import COLOURS
from .catalogue import Chart, Drawing
from .figure_data import FigureData, memory_key, points_at_focus, shape_text, sized_names
from .lines import LOG_FROM, Panel, by_quant, lines_figure, set_value_scale, value_limits, value_of
from .placing import MOST_LABELS, draw_front, front_of, label_points
from .style import BROWN, GREY, WIDTH, hollow, new_figure, plain_numbers, put_legend, suspect_handle
from .sweep import metric_figure

PAPER_SLOPES = {"4": 4.0, "2": 2.0, "1": 1.0, "0.5": 0.5}
"""The paper's slopes of memory over the number of parameters: bytes per weight of FP32, FP16, INT8 and INT4."""


def _memory_against_size(data: FigureData) -> Drawing:
    """Draw peak memory, and the weights alone, over model size by precision."""
    own = [m for m in data.cells if at_focus(m, data.found.focus) and m.variable("parameters")]
    sizes = sized_names(own, data.names)
    if len(sizes) < 2:
        return "it needs two models of known size that were measured with the same batch size and prompt length"
    key = memory_key(own)
    panels = [
        Panel(
            "",
            "parameters (10⁹)",
            f"{heading} (GB)",
            tuple(by_quant(own, data.quants, "parameters", value_of(of))),
            sizes,
            PAPER_SLOPES,
        )
        for heading, of in (
            (f"Peak {'device' if key == DEVICE_PEAK else 'host'} memory", key),
            ("Weights", WEIGHTS.key()),
        )
    ]
    return lines_figure(
        "Memory against model size, by precision", f"{shape_text(data)} · {data.common}", panels, 2, True, linear=True
    )


def _memory_by_quantization(data: FigureData) -> Drawing:
    key = memory_key(data.cells)
    points = points_at_focus(data, key)
    if len({point.cell.quant for point in points}) < 2:
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
        f"left and up is better · larger dots: larger batches, b is the batch size · {data.common}",
        (WIDTH, 5.2),
    )
    alike: dict[tuple[str, str, int, bool], list[Measured]] = {}
    bars: list[tuple[list[tuple[float, float]], str]] = []
    for m in own:
        looks = COLOURS.get(m.cell.quant, BROWN), data.look(data.name(m))[1], batches.index(m.cell.batch_size)
        alike.setdefault((*looks, m.is_suspect), []).append(m)
    for (colour, marker, size, suspect), dots in alike.items():
        x = [m.metrics[key] for m in dots]
        y, low, high = zip(*(with_interval(m, RATE) or (0.0, 0.0, 0.0) for m in dots), strict=True)
        bars += [([(at, bottom), (at, top)], colour) for at, bottom, top in zip(x, low, high, strict=True)]
        form = hollow(colour) if suspect else {"markeredgecolor": "white", "markeredgewidth": 0.6}
        axes.plot(x, y, marker, linestyle="", color=colour, markersize=4.5 + 1.6 * size, **form)
    # One collection for all: adding a collection looks at every point that is there.
    axes.add_collection(LineCollection([ends for ends, _ in bars], colors=[one for _, one in bars], linewidths=1.0))
    set_value_scale(axes, value_limits([m.metrics[RATE] for m in own], [(ends[0][1], ends[1][1]) for ends, _ in bars]))
    sizes = [m.metrics[key] for m in own]
    if max(sizes) > LOG_FROM * min(sizes) > 0:
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    else:
        axes.set_xlim(0, max(sizes) * 1.08)
    axes.set(
        xlabel=f"Peak {'device' if key == DEVICE_PEAK else 'host'} memory (GB)", ylabel="Throughput (output tokens/s)"
    )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS.get(quant, BROWN), label=quant) for quant in data.quants
    ]
    handles += [
        Line2D([], [], linestyle="", marker=data.look(model)[1], color=GREY, label=model) for model in data.models
    ]
    handles += [suspect_handle()] if any(m.is_suspect for m in own) else []
    places = {(m.metrics[key], m.metrics[RATE]): m for m in own}
    named = list(places)
    if len(own) > MOST_LABELS:
        handles.append(draw_front(axes, named, (-1, 1)))
        named = front_of(named, (-1, 1))
    put_legend(figure, handles)
    labels = [
        (*place, f"{data.name(places[place])} {places[place].cell.quant} b{places[place].cell.batch_size}")
        for place in named
    ]
    label_points(axes, labels, [place for place in places if place not in named])
    return figure


CHARTS = (
    Chart(
        "memory_against_model_size",
        "study",
        _memory_against_size,
        "Peak memory of the process and bytes of the weights, by precision. The dashed lines are the paper's bytes per "
        "weight of FP32, FP16, INT8 and INT4.",
        (10,),
    ),
    Chart(
        "memory_by_quantization",
        "study",
        _memory_by_quantization,
        "Peak memory by quantization; the dark part is the weights.",
        (11,),
    ),
    Chart("memory_against_throughput", "study", _scatter, "Throughput against peak memory, every cell.", (12,)),
)
