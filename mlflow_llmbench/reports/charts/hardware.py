"""Figures with a line for each machine, over the size of the model: the paper's figures 2, 6 and 16."""

from __future__ import annotations

from collections import Counter

from ...analysis.comparison import RATE
from ...analysis.scaling.cells import MEDIAN_TTFT, Measured
from ...analysis.scaling.focus import at_focus, labels, like_focus, with_interval
from .catalogue import Chart, Drawing
from .figure_data import PALETTE, FigureData, shape_text, sized_names
from .lines import Line, Panel, Values, lines_figure, points_over, value_of
from .style import MARKERS

SECONDS_PER_MILLION = 3600e-6
"""Million tokens for one unit of money are tokens per second, times this, over the price per hour."""


def _by_hardware(data: FigureData) -> Drawing:
    """Draw throughput, time to first token and tokens per unit of money over model size, a line per machine.

    At the shape of comparison, in the quantization that most models have on two machines.
    """
    found = data.found
    own = [
        m for m in found.cells if m.variable("parameters") and at_focus(m, found.focus) and like_focus(m, found.focus)
    ]
    machines: dict[tuple[str, str], set[str]] = {}
    for m in own:
        machines.setdefault((m.cell.quant, m.cell.model), set()).add(m.result.hashes.env)
    shared = Counter(quant for (quant, _), envs in machines.items() if len(envs) > 1)
    if not shared:
        return "it needs two machines that have measured the same models with the same batch size and prompt length"
    quant = max(data.quants, key=lambda quant: shared[quant])
    own = [m for m in own if m.cell.quant == quant]
    names = labels(own)
    prices = {machine.env: machine.price for machine in found.machines}

    def bought(m: Measured) -> tuple[float, float, float] | None:
        price = prices[m.result.hashes.env]
        return with_interval(m, RATE, SECONDS_PER_MILLION / price) if price else None

    rows: list[tuple[str, Values]] = [
        ("Throughput (output tokens/s)", value_of(RATE)),
        ("Time to first token (ms)", value_of(MEDIAN_TTFT)),
    ]
    if sum(1 for price in prices.values() if price) > 1:
        rows.append(("Million tokens per unit of money", bought))
    panels = []
    for up, of in rows:
        lines = []
        for number, machine in enumerate(found.machines):
            points = points_over([m for m in own if m.result.hashes.env == machine.env], "parameters", of)
            if points:
                looks = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
                lines.append(Line(machine.name, *looks, points))
        ticks = sized_names(own, names)
        panels.append(Panel("", "parameters (10⁹), logarithmic", up, tuple(lines), ticks))
    where = f"{shape_text(data)} · quantization {quant}"
    return lines_figure(
        "Throughput, latency and cost against model size, by hardware", where, panels, len(panels), True
    )


CHARTS = (
    Chart(
        "by_hardware",
        "study",
        _by_hardware,
        "Throughput, time to first token and tokens per unit of money over model size, a line for each machine.",
        (2, 6, 16),
    ),
)
