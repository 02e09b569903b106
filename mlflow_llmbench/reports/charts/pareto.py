"""The chart of a recommendation: the candidates, the Pareto front, the limits, and the winner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analysis.decisions.candidates import MEMORY, Candidate, Measure, interval
from ...analysis.decisions.recommend import GOALS, Recommendation
from ...records.metrics import KEYS
from ...records.quantizations import COLOURS
from .catalogue import Chart, Drawing
from .placing import MOST_LABELS, draw_front, label_points
from .style import BLUE, GREY, INK, RED, WIDTH, hollow, new_figure, put_legend, suspect_handle

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def recommendation_figure(found: Recommendation) -> Drawing:
    """Draw the goal against memory and against each limited measure, one panel each.

    Large points are on the front, a line joins those that are the best in both axes of a panel, and hollow points are
    suspect. The ring marks the winner, the shaded range is excluded by a limit, bars are 95 % intervals.
    """
    goal = GOALS[found.goal]
    others = [measure for measure in found.objectives if measure is not goal] or [MEMORY]
    others.sort(key=lambda measure: measure is not MEMORY)
    if len(found.eligible) < 2:
        return "it needs two candidates"
    if any(one.value(measure) is None for one in found.eligible for measure in others):
        return "a candidate lacks a value"
    name = found.winner.name if found.winner else "nothing meets the limits"
    title = f"{goal.label[:1].upper()}{goal.label[1:]}: {name}"
    columns = min(2, len(others))
    rows = -(-len(others) // columns)
    size = (WIDTH if columns == 1 else 1.3 * WIDTH, 4.8 if rows == 1 else 1.2 + 3.6 * rows)
    figure, panels = new_figure(title, f"{goal.better} is better; bars are 95 % intervals", size, (rows, columns))
    for axes, measure in zip(panels, others, strict=False):
        _draw_panel(axes, found, measure, goal)
    for axes in panels[len(others) :]:
        axes.remove()
    put_legend(figure, _legend(found))
    for axes, measure in zip(panels, others, strict=False):
        _label_panel(axes, found, measure, goal)
    return figure


def _draw_panel(axes: Axes, found: Recommendation, across: Measure, up: Measure) -> None:
    """Draw one scatter plot: `across` on x, the goal on y."""
    front = {id(one) for one in found.front}
    for measure, bars in ((across, "xerr"), (up, "yerr")):
        _draw_intervals(axes, found.eligible, across, up, measure, bars)
    for one in found.eligible:
        x, y = _place(one, across), _place(one, up)
        colour = COLOURS.get(one.result.cell.quant, BLUE)
        looks: Any = {"markersize": 8 if id(one) in front else 4, "alpha": 1.0 if id(one) in front else 0.7}
        looks |= hollow(colour) if is_suspect(one) else {}
        axes.plot([x], [y], "o", color=colour, zorder=3, **looks)
        if one is found.winner:
            axes.plot([x], [y], "o", markersize=14, mfc="none", mec=INK, mew=1.4, zorder=4)
    axes.margins(0.14)
    _draw_limits(axes, found, across, up)
    places = [(_place(one, across), _place(one, up)) for one in found.front]
    draw_front(axes, places, (1 if across.better == "higher" else -1, 1 if up.better == "higher" else -1))
    axes.set(xlabel=_axis_label(across), ylabel=_axis_label(up))
    axes.grid(visible=True, axis="both")


def _label_panel(axes: Axes, found: Recommendation, across: Measure, up: Measure) -> None:
    """Name the candidates, or only those on the front if there are many."""
    front = {id(one) for one in found.front}
    named = found.eligible if len(found.eligible) <= MOST_LABELS else found.front
    ordered = sorted(named, key=lambda one: (one is not found.winner, id(one) not in front))
    others = [(_place(one, across), _place(one, up)) for one in found.eligible if one not in named]
    label_points(axes, [(_place(one, across), _place(one, up), one.name) for one in ordered], others)


def _draw_intervals(
    axes: Axes, candidates: Sequence[Candidate], across: Measure, up: Measure, measure: Measure, bars: str
) -> None:
    """Draw the intervals of one measure of all candidates as one set of bars."""
    places = [
        (_place(one, across), _place(one, up), _place(one, measure), *ends)
        for one in candidates
        if (ends := interval(one, measure))
    ]
    if places:
        x, y, centre, low, high = np.array(places).T
        reach: Any = {bars: np.array([centre - low, high - centre]).clip(0)}
        axes.errorbar(x, y, **reach, fmt="none", ecolor=GREY, elinewidth=0.9, capsize=2, zorder=2)


def _draw_limits(axes: Axes, found: Recommendation, across: Measure, up: Measure) -> None:
    """Draw each limit as a line, and shade the range that a limit on x excludes."""
    for limit in found.limits:
        bound = limit.bound
        if limit.measure == across:
            axes.axvline(bound, color=RED, linewidth=1.2, linestyle="--", zorder=1)
            axes.autoscale_view()
            low, high = axes.get_xlim()
            axes.axvspan(
                *((bound, max(high, bound)) if across.better == "lower" else (min(low, bound), bound)),
                color=RED,
                alpha=0.07,
                zorder=0,
            )
            axes.set_xlim(low, max(high, bound))
        elif limit.measure == up:
            axes.axhline(bound, color=RED, linewidth=1.2, linestyle="--", zorder=1)


def _legend(found: Recommendation) -> list[Any]:
    from matplotlib.lines import Line2D

    def dot(label: str, **form: Any) -> Any:
        return Line2D([], [], linestyle="none", marker="o", color=GREY, label=label, **form)

    front = Line2D([], [], color=GREY, linewidth=1.2, marker="o", markersize=8, label="on the front")
    entries = [front, dot("dominated", markersize=4, alpha=0.7)]
    if any(map(is_suspect, found.eligible)):
        entries.append(suspect_handle())
    if found.winner:
        entries.append(dot("winner", markersize=11, mfc="none", mec=INK, mew=1.4))
    quants = dict.fromkeys(one.result.cell.quant for one in found.eligible)
    if len(quants) > 1:
        entries += [
            Line2D([], [], linestyle="none", marker="s", color=COLOURS.get(quant, BLUE), label=quant)
            for quant in quants
        ]
    if any(limit.measure in found.objectives for limit in found.limits):
        entries.append(Line2D([], [], color=RED, linestyle="--", linewidth=1.2, label="limit"))
    return entries


def is_suspect(one: Candidate) -> bool:
    """Return True if a candidate's verdict is suspect."""
    return one.verdict.word == "suspect"


def _place(one: Candidate, measure: Measure) -> float:
    return one.value(measure) or 0.0


def _axis_label(measure: Measure) -> str:
    key = measure.keys[-1]
    unit = KEYS[key].display_unit if key in KEYS else ""
    return f"{measure.label[:1].upper()}{measure.label[1:]}{f' ({unit})' if unit else ''}"


CHARTS = (Chart("recommendation", "recommendation", recommendation_figure),)
