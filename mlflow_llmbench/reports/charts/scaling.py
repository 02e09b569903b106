"""Charts of a scaling study: measured cells, the law with its interval, the best rival; nothing beyond the cells."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...analysis.scaling.fitting import Fit, Prediction
from ...analysis.scaling.law_sentences import parameters_text
from ...analysis.scaling.laws import LawFit
from ...analysis.scaling.ranking import ranked
from ...analysis.scaling.study import ScalingStudy
from ...analysis.scaling.surfaces import Surface
from ...stats import t_interval
from .catalogue import Chart, Drawing
from .figure_data import PALETTE
from .lines import MOST_TICKS
from .style import BLUE, GREY, INK, ORANGE, WIDTH, Array, hollow, new_figure, plain_numbers, put_legend, suspect_handle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MOST_PANELS = 9
"""Most groups of cells in one chart; scaling.md has all."""

LOG_FROM = 20.0
"""Ratio of the highest to the lowest value from which the y axis is logarithmic."""

AXES = {
    "batch_size": "Batch size",
    "prompt_tokens": "Prompt tokens",
    "parameters": "Parameters (10⁹)",
    "held_tokens": "Tokens held: batch · (prompt + output)",
}
POINTS = 120  # of a curve

LEAST_STEP = 0.13
"""Smallest distance between the names of two ticks, as a share of the axis."""

WIDEST_HEADING = 36
"""Most characters in a line above a panel."""


def law_figures(study: ScalingStudy) -> Drawing:
    """Draw one figure for each fitted law, named by its key."""
    keys = dict.fromkeys(law.law.key for law in study.laws)
    figures = {key: _law_figure([law for law in study.laws if law.law.key == key], study) for key in keys}
    return figures or "no law was fitted"


def _exponents(study: ScalingStudy) -> Drawing:
    return _exponents_figure(study.surfaces) if study.surfaces else "no law was fitted over both settings"


def _law_figure(laws: Sequence[LawFit], study: ScalingStudy) -> Figure:
    """Draw one panel per group: cells (dots), the law with its 95 % band, the best rival, predictions (crosses).

    Rows of panels share their scale.
    """
    shown = laws[:MOST_PANELS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    law = shown[0].law
    notes = [
        study.subject,
        law.form.formula,
        f"first {len(shown)} of {len(laws)} groups" if len(laws) > len(shown) else "",
    ]
    size = max(WIDTH, 3.9 * columns), 4.6 if rows == 1 else 1 + 3.2 * rows
    figure, panels = new_figure(
        law.title[:1].upper() + law.title[1:], " · ".join(filter(None, notes)), size, (rows, columns)
    )
    values: list[list[float]] = []
    for number, (axes, found) in enumerate(zip(panels, shown, strict=False)):
        predictions = [predicted for owner, predicted in study.predictions if owner is found]
        values.append(_draw_law(axes, found, predictions))
        axes.set(
            title=textwrap.fill(found.where, WIDEST_HEADING, max_lines=3, placeholder="…") if len(shown) > 1 else "",
            xlabel=AXES[law.over],
        )
        if number % columns == 0:
            axes.set_ylabel(f"{law.title.partition(' against ')[0].capitalize()} ({law.unit})")
        parameters = parameters_text(found.fit).replace("), ", ")\n")
        falls = found.fit.y[0] > found.fit.y[-1]
        axes.text(
            0.97 if falls else 0.03,
            0.97,
            parameters,
            transform=axes.transAxes,
            va="top",
            ha="right" if falls else "left",
            size=8,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
            zorder=6,
        )
    every = [*itertools.chain(*values)]
    logarithmic = max(every) > LOG_FROM * min(every) > 0
    for first in range(0, len(shown), columns):
        own = values[first : first + columns]
        _share_scale(panels[first : first + len(own)], [*itertools.chain(*own)], logarithmic)
    for axes in panels[len(shown) :]:
        axes.remove()
    handles = {
        label: handle
        for axes in panels[: len(shown)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    for label, handle in handles.items():
        handle.set_label(label)
    doubtful = [suspect_handle()] if any(m.is_suspect for found in shown for m in found.cells) else []
    put_legend(figure, [*handles.values(), *doubtful])
    return figure


def _draw_law(axes: Axes, found: LawFit, predictions: Sequence[Prediction]) -> list[float]:
    """Draw one group, and return the values that the axis must reach."""
    low, high = found.fit.ranges[0]
    x: Array = np.geomspace(low, high, POINTS).astype(np.float64)
    x[0], x[-1] = low, high  # without the rounding error that would put them out of range
    curve = [found.fit.predict(float(place)) for place in x]
    band = [] if found.fit.undetermined else [value for p in curve for value in (p.mean_low, p.mean_high)]
    if band:
        axes.fill_between(
            x, band[::2], band[1::2], color=BLUE, alpha=0.18, linewidth=0, label="95 % interval of the law"
        )
    axes.plot(x, [p.value for p in curve], color=BLUE, linewidth=1.6, label="law")
    if found.rivals:
        rival = ranked(found.rivals)[0]
        axes.plot(x, _values(rival, x), color=ORANGE, linewidth=1.4, linestyle=(0, (4, 2)), label="nearest rival")
    places = np.array([place[0] for place in found.fit.x])
    ends: list[tuple[float, float, float]] = []
    for place, measured, value in zip(places, found.cells, found.fit.y, strict=True):
        interval = t_interval(measured.values(found.metric))
        if interval and interval[1] > interval[0] > 0:
            half = (interval[1] - interval[0]) / 2
            ends.append((place, max(value - half, 1e-12), value + half))
    if ends:
        axes.vlines(*zip(*ends, strict=True), color=INK, linewidth=1.2)
    axes.plot(places, found.fit.y, "o", color=INK, markersize=5, markeredgewidth=0, label="measured", zorder=4)
    doubtful = [
        (place, value) for place, m, value in zip(places, found.cells, found.fit.y, strict=True) if m.is_suspect
    ]
    if doubtful:
        axes.plot(*zip(*doubtful, strict=True), "o", markersize=5, zorder=5, **hollow(INK))
    if predictions:
        at = [p.x[0] for p in predictions]
        axes.vlines(at, [p.low for p in predictions], [p.high for p in predictions], color=GREY, linewidth=1.0)
        axes.plot(at, [p.value for p in predictions], "x", color=GREY, markersize=6, label="predicted", zorder=3)
    _number_ticks(axes, places)
    return [*found.fit.y, *(min(high, 2 * max(found.fit.y)) for high in band[1::2])]


def _values(found: Fit, x: Array) -> list[float]:
    return [found.predict(float(place)).value for place in x]


def _number_ticks(axes: Axes, places: Array) -> None:
    """Make x logarithmic with the measured places as ticks."""
    axes.set_xscale("log", base=2)
    ticks = sorted({float(place) for place in places})
    kept = ticks if len(ticks) <= MOST_TICKS else [2.0**k for k in range(-6, 31) if ticks[0] <= 2.0**k <= ticks[-1]]
    named = _apart(kept)
    axes.set_xticks(kept, [(f"{t:,.0f}" if t >= 10 else f"{t:.3g}") if t in named else "" for t in kept])
    axes.minorticks_off()
    air = (ticks[-1] / ticks[0]) ** 0.06
    axes.set_xlim(ticks[0] / air, ticks[-1] * air)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Return those of increasing ticks whose names do not cover each other on a logarithmic axis, with both ends."""
    step = math.log(ticks[-1] / ticks[0]) * LEAST_STEP
    kept = ticks[:1]
    for tick in ticks[1:-1]:
        if math.log(tick / kept[-1]) >= step and math.log(ticks[-1] / tick) >= step:
            kept = [*kept, tick]
    return [*kept, *ticks[1:][-1:]]


def _share_scale(row: Sequence[Axes], values: Sequence[float], logarithmic: bool) -> None:
    """Give a row of panels the same y axis, from 0 if it is not logarithmic.

    Leaves room above for the text with the parameters.
    """
    low, high = min(values), max(values)
    for axes in row:
        if logarithmic:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
            axes.set_ylim(low / 1.3, high * (high / low) ** 0.35)
        else:
            axes.set_ylim(0, high * 1.35)


def _exponents_figure(surfaces: Sequence[Surface]) -> Figure:
    """Draw β of the batch size by prompt length, with 95 % intervals: the paper's β(s)."""
    more = [f"first {MOST_PANELS} of {len(surfaces)} groups"] if len(surfaces) > MOST_PANELS else []
    figure, (axes,) = new_figure(
        "Exponent of the batch size by prompt length",
        " · ".join(["T = α·b^β at each length", "1 = perfect scaling", "line: 95 % interval", *more]),
    )
    shown = surfaces[:MOST_PANELS]
    for number, surface in enumerate(shown):
        colour = (*PALETTE, INK)[number % (len(PALETTE) + 1)]
        points = [(length, fit.parameter("β")) for length, fit in surface.exponents]
        shift = 1.015 ** (number - (len(shown) - 1) / 2)
        x = [length * shift for length, _ in points]
        axes.vlines(
            x,
            [p.low if p.low is not None else p.value for _, p in points],
            [p.high if p.high is not None else p.value for _, p in points],
            color=colour,
        )
        axes.plot(x, [p.value for _, p in points], "o-", color=colour, markersize=5, linewidth=1.0, label=surface.where)
        doubtful = [(place, p.value) for place, (length, p) in zip(x, points, strict=True) if length in surface.suspect]
        if doubtful:
            axes.plot(*zip(*doubtful, strict=True), "o", markersize=5, zorder=5, **hollow(colour))
    axes.set_xscale("log", base=2)
    ticks = sorted({length for surface in shown for length, _ in surface.exponents})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="Prompt tokens", ylabel="β", ylim=(min(0.0, axes.get_ylim()[0]), max(1.05, axes.get_ylim()[1])))
    marks = [suspect_handle()] if any(surface.suspect for surface in shown) else []
    put_legend(figure, [*axes.get_legend_handles_labels()[0], *marks])
    return figure


CHARTS = (Chart("laws", "scaling", law_figures), Chart("exponent_by_length", "scaling", _exponents))
