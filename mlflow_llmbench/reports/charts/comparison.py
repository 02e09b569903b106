"""Charts of comparisons: the ratios with their intervals, and the values behind them, in the style of `charts`."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...analysis.comparison import (
    ALIKE,
    BETTER,
    COMPARED,
    NOISE,
    UNTESTED,
    UNTOLD,
    WORSE,
    Comparison,
    Effect,
    interval_text,
    percent_text,
    ratio_text,
    units_text,
)
from .catalogue import Chart, Drawing
from .style import (
    BLUE,
    GREY,
    INK,
    LIGHT,
    RED,
    WIDTH,
    axis_limits,
    drawn_name,
    new_figure,
    put_legend,
    value_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DIRECTIONS = (("higher", "Higher is better →"), ("lower", "← Lower is better"))
LOOKS = {
    BETTER: (BLUE, BLUE),
    WORSE: (RED, RED),
    ALIKE: (GREY, GREY),
    NOISE: (GREY, "white"),
    UNTOLD: (GREY, LIGHT),
    UNTESTED: (INK, "white"),
}
"""Effect → colours of its line and of its dot's fill."""

MOST_TOGETHER = 8  # comparisons in one chart of ratios
LEAST_SPAN = math.log(1.03)  # least half width of the ratio axis, so that small differences look small
MOST_BEYOND = math.log(3)  # most that an interval may widen the axis beyond the ratios
ROW = 0.27  # inches
MOST_LETTERS = 13  # per line under a column of values, so that neighbours do not touch


def ratios_figures(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw each metric's ratio with its 95 % interval on a logarithmic axis; the range below the noise is shaded."""
    batches = [comparisons[start : start + MOST_TOGETHER] for start in range(0, len(comparisons), MOST_TOGETHER)]
    return _numbered("ratios", [_ratios_figure(batch) for batch in batches])


def values_figures(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw the values of both results of each comparison, one dot per unit, with pairs joined."""
    return _numbered("values", [_values_figure(comparison) for comparison in comparisons])


def _numbered(name: str, figures: Sequence[Figure | None]) -> Drawing:
    """Name the figures, with numbers from 1 if there are several; a number without data has no figure."""
    names = [name] if len(figures) == 1 else [f"{name}_{number}" for number in range(1, len(figures) + 1)]
    drawn = {one: figure for one, figure in zip(names, figures, strict=True) if figure}
    return drawn or "no metric can be compared"


@dataclass(frozen=True)
class _Line:
    """One line of the ratio chart: a heading, or the name of a metric or result with its effect."""

    label: str
    effect: Effect | None = None
    heading: bool = False


def _lines(comparisons: Sequence[Comparison]) -> Iterator[_Line]:
    """Yield the metrics grouped by their better direction. With several comparisons, each metric is a heading too."""
    bases = {comparison.name_a for comparison in comparisons}
    for better, direction in DIRECTIONS:
        shown = [
            entry
            for entry in COMPARED
            if entry.metric.better == better and any(_drawable(c.effect(entry.key)) for c in comparisons)
        ]
        if shown:
            yield _Line(direction, heading=True)
        for entry in shown:
            if len(comparisons) > 1:
                yield _Line(entry.title)
            for comparison in comparisons:
                effect = comparison.effect(entry.key)
                name = comparison.name_b if len(bases) == 1 else f"{comparison.name_b} ÷ {comparison.name_a}"
                if _drawable(effect):
                    yield _Line(
                        textwrap.shorten(_words(name), 44, placeholder="…") if len(comparisons) > 1 else entry.title,
                        effect,
                    )


def _words(name: str) -> str:
    """Return the parameters in which a result differs, each shortened as names in charts are."""
    return " ".join(map(drawn_name, name.split()))


def _drawable(effect: Effect | None) -> bool:
    return effect is not None and effect.ratio > 0


def _ratios_figure(comparisons: Sequence[Comparison]) -> Figure | None:
    """Draw a line per metric and comparison: ratio as a dot, interval as a line, both as text at the right."""
    lines = [*_lines(comparisons)]
    effects = [line.effect for line in lines if line.effect]
    if not effects:
        return None
    first = comparisons[0]
    base = _words(first.name_a) if len({c.name_a for c in comparisons}) == 1 else "their bases"
    other = _words(first.name_b) if len(comparisons) == 1 else f"{len(comparisons)} results"
    units = " · ".join(dict.fromkeys(units_text(c) for c in comparisons)) if len(comparisons) < 4 else ""
    subtitle = " · ".join(
        filter(
            None,
            [
                "95 % intervals",
                units,
                "with noise between processes" if any(c.process_noise != (None, None) for c in comparisons) else None,
                "paired t test" if first.paired else "Welch's t test",
                "Holm over metrics",
                _doubt(comparisons),
            ],
        )
    )
    figure, (axes,) = new_figure(f"{other} against {base} · ratios", subtitle, (WIDTH + 1.5, 1.75 + ROW * len(lines)))
    low, high = _span(effects)
    noise = 1 + first.noise
    axes.axvspan(1 / noise, noise, color=LIGHT, zorder=0, label=f"noise threshold of {percent_text(first.noise)}")
    axes.axvline(1, color=GREY, linewidth=0.9, zorder=1)
    axes.set(xscale="log", xlim=(low, high), ylim=(len(lines) - 0.4, -0.7))
    for place, line in enumerate(lines):
        if line.effect:
            _draw_effect(axes, place, line.effect, (low, high))
    for place in (place for place, line in enumerate(lines) if line.heading and place):
        axes.axhline(place - 0.5, color=LIGHT, linewidth=0.8, zorder=0.5)
    _label_lines(axes, lines, several=len(comparisons) > 1)
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:.3g}" if tick > 0.9 or high < 1.7 * low else f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    label = (
        f"{other if len(comparisons) == 1 else 'Result'} ÷ {base if base != 'their bases' else 'its base'} (log scale)"
    )
    axes.set_xlabel(textwrap.fill(label, 90, max_lines=2, placeholder="…"))
    put_legend(figure, _legend(axes, effects))
    return figure


def _doubt(comparisons: Sequence[Comparison]) -> str:
    """Say whether results are suspect."""
    doubtful = dict.fromkeys(doubt for one in comparisons for doubt in one.doubts)
    return (
        "" if not doubtful else next(iter(doubtful)) if len(doubtful) == 1 else f"{len(doubtful)} results are suspect"
    )


def _span(effects: Sequence[Effect]) -> tuple[float, float]:
    """Return the limits of the ratio axis: all ratios, 1, and their intervals up to `MOST_BEYOND`."""
    ratios = [0.0, *(math.log(effect.ratio) for effect in effects)]
    low, high = min(ratios), max(ratios)
    ends = [math.log(end) for effect in effects for end in (effect.low, effect.high) if end]
    low = max(min([low, *ends]), low - MOST_BEYOND)
    high = min(max([high, *ends]), high + MOST_BEYOND)
    air = 0.05 * (high - low)
    return math.exp(min(low - air, -LEAST_SPAN)), math.exp(max(high + air, LEAST_SPAN))


def _draw_effect(axes: Axes, place: float, effect: Effect, limits: tuple[float, float]) -> None:
    """Draw the dot, the interval (an arrow where it leaves the axis), and both as text."""
    line, inside = LOOKS[effect.effect]
    if effect.low is not None and effect.high is not None:
        low, high = max(effect.low, limits[0]), min(effect.high, limits[1])
        axes.plot([low, high], [place, place], color=line, linewidth=1.6, solid_capstyle="butt", zorder=2)
        for end, shown, marker in ((effect.low, low, "<"), (effect.high, high, ">")):
            if shown != end:
                axes.plot([shown], [place], marker, color=line, markersize=6, clip_on=False, zorder=3)
    axes.plot([effect.ratio], [place], "o", color=line, mfc=inside, mew=1.4, markersize=6.5, zorder=4, clip_on=False)
    interval = f"{ratio_text(effect)}  ({interval_text(effect)})" if effect.low is not None else ratio_text(effect)
    for text, points, colour in ((interval, 12, INK), (effect.effect, 142, line)):
        axes.annotate(
            text,
            (1, place),
            (points, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            size=9,
            color=colour,
        )


def _label_lines(axes: Axes, lines: Sequence[_Line], several: bool) -> None:
    """Write the names at the left: headings grey; with several comparisons, metrics in bold above the results."""
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        if line.heading:
            label.set(color=GREY, style="italic")
        elif several and line.effect is None:
            label.set_fontweight("bold")
    heading: Any = {"xycoords": axes.transAxes, "textcoords": "offset points", "va": "bottom", "size": 9, "color": GREY}
    for text, points in (("ratio  (95 % interval)", 12), ("effect", 142)):
        axes.annotate(text, (1, 1), (points, 2), **heading)


def _legend(axes: Axes, effects: Sequence[Effect]) -> list[object]:
    """Return the legend entries: the effects that occur, in a fixed order, and the shaded range."""
    from matplotlib.lines import Line2D

    seen = {effect.effect for effect in effects}
    form: Any = {"marker": "o", "markersize": 6.5, "markeredgewidth": 1.4}
    dots: list[object] = [
        Line2D([], [], color=line, markerfacecolor=inside, linewidth=0 if word == UNTESTED else 1.6, label=word, **form)
        for word, (line, inside) in LOOKS.items()
        if word in seen
    ]
    return [*dots, *axes.get_legend_handles_labels()[0]]


def _ticks(low: float, high: float) -> list[float]:
    """Return at most nine ticks between two ratios: even steps if they are close, else round numbers and inverses."""
    if high / low < 1.7:
        step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step < 9)
        return [round(number * step, 4) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    for round_numbers in ((1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0), (1.0, 2.0, 5.0), (1.0,)):
        powers = [one * 10**power for power in range(10) for one in round_numbers]
        found = sorted({side for one in powers for side in (one, 1 / one) if low <= side <= high})
        if len(found) < 10:
            break
    return found


def _values_figure(comparison: Comparison) -> Figure | None:
    """Draw a panel per tested metric: the values of A and B, one dot per unit, their means as bars, pairs joined."""
    effects = [effect for effect in comparison.effects if effect.values_a and effect.values_b]
    if not effects:
        return None
    columns = min(3, len(effects))
    rows = -(-len(effects) // columns)
    names = _words(comparison.name_a), _words(comparison.name_b)
    how = "lines join pairs" if comparison.paired else "from left to right as measured"
    subtitle = " · ".join(filter(None, [units_text(comparison), how, "bars: means", _doubt([comparison])]))
    size = WIDTH + 1.5 if columns == 3 else WIDTH, 0.9 + 2.9 * rows
    figure, panels = new_figure(
        f"{names[1]} against {names[0]} · values", subtitle, size, (rows, columns), legend=False
    )
    for axes, effect in zip(panels, effects, strict=False):
        _draw_values(axes, effect, comparison.paired)
        entry = effect.entry
        axes.set(title=f"{entry.title} · {entry.metric.better} is better", ylabel=entry.unit)
        axes.set_xticks([0, 1], [textwrap.fill(name, MOST_LETTERS, max_lines=5, placeholder="…") for name in names])
    for axes in panels[len(effects) :]:
        axes.remove()
    return figure


def _draw_values(axes: Axes, effect: Effect, paired: bool) -> None:
    """Draw one panel. Unpaired values lie side by side in the order of measurement, so that a drift is visible."""
    scale = effect.entry.scale
    sides = [[value * scale for value in values] for values in (effect.values_a, effect.values_b)]
    if paired:
        alpha = max(0.15, min(0.8, 12 / len(sides[0])))
        axes.plot([0, 1], [sides[0], sides[1]], color=GREY, linewidth=0.9, alpha=alpha, zorder=1)
    means = (effect.a * scale, effect.b * scale)
    for side, (values, mean, colour) in enumerate(zip(sides, means, (GREY, BLUE), strict=True)):
        outwards = 2 * side - 1  # with pairs, the space between the columns belongs to their lines
        spread = 0.0 if paired else 0.3
        places = [side + spread * (2 * (number + 0.5) / len(values) - 1) for number in range(len(values))]
        many = len(values) > 60
        form: Any = {"markersize": 3 if many else 5, "alpha": 0.5 if many else 0.75, "rasterized": len(values) > 1000}
        axes.plot(places, values, "o", color=colour, markeredgewidth=0, **form)
        end = side + 0.36 * outwards
        axes.plot(
            [side + 0.08 * outwards if paired else side - 0.36 * outwards, end],
            [mean, mean],
            color=INK,
            linewidth=1.6,
            zorder=3,
        )
        axes.annotate(
            value_label(mean),
            (end, mean),
            (3 * outwards, 0),
            textcoords="offset points",
            ha="left" if side else "right",
            va="center",
            size=9,
        )
    every = [*itertools.chain(*sides)]
    axes.set(xlim=(-0.85, 1.85), ylim=axis_limits(min(every), max(every)))
    axes.tick_params(axis="x", length=0)


CHARTS = (Chart("ratios", "comparisons", ratios_figures), Chart("values", "comparisons", values_figures))
