"""Figures over model size, batch size and prompt length. Lines join measured cells only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...analysis.comparison import RATE
from ...analysis.scaling.cells import MEDIAN_TTFT, Measured
from ...analysis.scaling.focus import at_focus, with_interval
from .catalogue import Chart, Drawing
from .figure_data import FigureData, shape_text, sized_names
from .lines import Line, Panel, Values, by_quant, lines_figure, points_over, ticks, value_of

Rows = Sequence[tuple[str, Values]]
SPEED: Rows = (("Throughput (output tokens/s)", value_of(RATE)), ("Time to first token (ms)", value_of(MEDIAN_TTFT)))


def _against_size(data: FigureData) -> Drawing:
    """Draw throughput and time to first token over model size, a line per quantization, at the shape of comparison."""
    own = [m for m in data.cells if at_focus(m, data.found.focus) and m.variable("parameters")]
    sizes = sized_names(own, data.names)
    if len(sizes) < 2:
        return "it needs two models of known size that were measured with the same batch size and prompt length"
    panels = [
        Panel("", "parameters (10⁹), logarithmic", label, tuple(by_quant(own, data.quants, "parameters", of)), sizes)
        for label, of in SPEED
    ]
    return lines_figure(
        "Throughput and latency against model size", f"{shape_text(data)} · {data.common}", panels, 2, named=True
    )


def _per_instance(measured: Measured) -> tuple[float, float, float] | None:
    return with_interval(measured, RATE, 1 / measured.cell.batch_size)


def _against(over: str, title: str, across: str, held: str, rows: Rows = SPEED) -> Callable[[FigureData], Drawing]:
    """Return a function that draws metrics over a setting, the setting `held` fixed at that of comparison.

    A column per quantization, a row per metric, a line per model.
    """

    def draw(data: FigureData) -> Drawing:
        focus = data.found.focus
        if held == "batch_size":
            own = [m for m in data.cells if m.cell.batch_size == focus.batch]
            words = f"batch size {focus.batch}"
        else:
            own = [m for m in data.cells if m.variable("prompt_tokens") == focus.prompt]
            words = f"{focus.prompt:g} prompt tokens"
        places = {x for m in own if (x := m.variable(over))}
        if len(places) < 2:
            return f"it needs two values of {over} at {words}"
        quants = [quant for quant in data.quants if any(m.cell.quant == quant for m in own)]
        panels = []
        for number, (up, of) in enumerate(rows):
            for quant in quants:
                lines = [
                    Line(
                        model,
                        *data.look(model),
                        points_over([m for m in own if m.cell.quant == quant and data.name(m) == model], over, of),
                    )
                    for model in data.models
                ]
                heading = quant if number == 0 and len(quants) > 1 else ""
                panels.append(
                    Panel(
                        heading,
                        across if number == len(rows) - 1 else "",
                        up,
                        tuple(line for line in lines if line.points),
                        ticks(places),
                    )
                )
        note = "" if len(quants) > 1 else f"quantization {quants[0]}"
        return lines_figure(title, " · ".join(filter(None, [words, note, data.common])), panels, len(quants))

    return draw


CHARTS = (
    Chart(
        "against_model_size",
        "study",
        _against_size,
        "Throughput and time to first token over model size. Models of similar size lie side by side, whatever their "
        "family.",
        (2, 6),
    ),
    Chart(
        "against_batch_size",
        "study",
        _against("batch_size", "Throughput and latency against batch size", "Batch size", "prompt_tokens"),
        "Throughput and time to first token over batch size, at one prompt length.",
        (3, 7),
    ),
    Chart(
        "against_prompt_length",
        "study",
        _against("prompt_tokens", "Throughput and latency against prompt length", "Prompt tokens", "batch_size"),
        "Throughput and time to first token over prompt length, at one batch size.",
        (4, 8),
    ),
    Chart(
        "per_instance",
        "study",
        _against(
            "batch_size",
            "Throughput of one instance against batch size",
            "Batch size",
            "prompt_tokens",
            (("Throughput ÷ batch size (tokens/s)", _per_instance),),
        ),
        "Throughput of each request of a batch: throughput ÷ batch size.",
        (15,),
    ),
)
