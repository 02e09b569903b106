"""Charts of latency against throughput over the loads of a server, with the knee and the limits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ...analysis.goodput import knee
from ...config.cells import load_text
from ...records.cell import Cell
from ...records.metric import Metric
from ...records.metrics import ATTAINMENT, E2E, REQUEST_RATE, TPOT, TTFT
from .catalogue import Chart, Drawing
from .style import (
    BLUE,
    BROWN,
    GREY,
    ORANGE,
    RED,
    drawn_name,
    new_figure,
    put_legend,
    value_label,
)
from .sweep import Points, SweepPoint, SweepPoints, settings_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RATE, MEAN_E2E = REQUEST_RATE.key(), E2E.key("mean")
PANELS = ((TTFT, "slo_ttft_ms"), (TPOT, "slo_tpot_ms"))
LINES = (("p50", "median", BLUE), ("p95", "95th percentile", ORANGE))
LEAST_LOADS = 3


def load_figures(sweep: SweepPoints) -> Drawing:
    """Draw one figure for each configuration with at least `LEAST_LOADS` loads, named `load`, `load-2` and so on.

    A filled dot met the limits for the asked share of the requests. Points are joined in the order of the requested
    load.
    """
    loads: dict[Cell, list[SweepPoint]] = {}
    for point in sweep.points:
        cell, metrics, _ = point
        if cell.scenario == "online" and cell.trace is None and cell.ramp_to is None and RATE in metrics:
            loads.setdefault(dataclasses.replace(cell, concurrency=1, request_rate=None), []).append(point)
    several = [(cell, found) for cell, found in loads.items() if len(found) >= LEAST_LOADS]
    if not several:
        return f"it needs {LEAST_LOADS} loads of one server"
    return {
        "load" if number == 1 else f"load-{number}": _figure_of(cell, found, sweep.attainment)
        for number, (cell, found) in enumerate(several, 1)
    }


def _figure_of(cell: Cell, found: Points, asked: float) -> Figure:
    ordered = sorted(found, key=lambda point: (point[0].request_rate or 0.0, point[0].concurrency))
    panels = [panel for panel in PANELS if any(panel[0].key("p50") in metrics for _, metrics, _ in ordered)]
    panels = panels if cell.generates else [(E2E, "slo_e2e_ms")]
    limited = any(getattr(cell, name) is not None for name in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms"))
    words = [f"quantization {cell.quant}"] if cell.launch else []
    words += [
        settings_text(cell, ("prompt_tokens", "output_tokens")),
        *([f"filled: met by {asked:.0%} of the requests"] if limited else []),
    ]
    figure, axes = new_figure(
        f"{drawn_name(cell.model)} · latency against throughput", " · ".join(words), grid=(1, max(1, len(panels)))
    )
    best = knee({metrics[RATE]: metrics[MEAN_E2E] for _, metrics, _ in ordered if MEAN_E2E in metrics})
    handles: dict[str, Any] = {}
    for one, (metric, slo) in zip(axes, panels, strict=False):
        _draw_panel(one, metric, ordered, asked if limited else None, handles)
        if best is not None:
            handles["knee"] = one.axvline(
                best, color=BROWN, linewidth=1.2, linestyle=(0, (4, 3)), label=f"knee, {value_label(best)} requests/s"
            )
        limit = getattr(cell, slo)
        if limit is not None and limit <= 3 * max(metrics.get(metric.key("p50"), 0.0) for _, metrics, _ in ordered):
            handles["limit"] = one.axhline(limit, color=RED, linewidth=1.0, linestyle=":", label="limit")
        one.set(xlabel="Requests answered per second", ylabel=f"{metric.title.capitalize()} ({metric.unit})")
        one.set_ylim(bottom=0)
        one.set_xlim(left=0)
    put_legend(figure, list(handles.values()))
    return figure


def _draw_panel(
    axes: Axes,
    metric: Metric,
    ordered: Points,
    asked: float | None,
    handles: dict[str, Any],
) -> None:
    """Draw the median and, if the samples support it, the 95th percentile, with the requested load at each median."""
    for statistic, label, colour in LINES:
        key = metric.key(statistic)
        known = [point for point in ordered if key in point.metrics]
        if not known:
            continue
        x, y = [metrics[RATE] for _, metrics, _ in known], [metrics[key] for _, metrics, _ in known]
        [handles[statistic]] = axes.plot(x, y, color=colour, linewidth=1.4, label=label)
        good = [asked is None or metrics.get(ATTAINMENT.key(), 0.0) >= asked for _, metrics, _ in known]
        axes.scatter(x, y, s=26, zorder=3, edgecolors=colour, facecolors=[colour if one else "white" for one in good])
        if statistic == "p50":
            for (cell, _, suspect), across, up in zip(known, x, y, strict=True):
                text = f"{load_text(cell)} (suspect)" if suspect else load_text(cell)
                axes.annotate(text, (across, up), textcoords="offset points", xytext=(4, -11), size=7.5, color=GREY)


CHARTS = (Chart("load", "sweep", load_figures),)
