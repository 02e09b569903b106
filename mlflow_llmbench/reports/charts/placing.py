"""Places of names and labels in a chart, so that they do not cover each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import GREY, INK, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SLANTED_PITCH, LINE = 0.2, 0.15
"""Inches between neighbouring names at 45°, and height of a line of labels."""

MOST_LABELS = 14
"""Points that are labelled. If there are more, only those on the front are."""

SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
"""Where a label may stand beside its point, right and up: first beside both of its intervals."""

Box = tuple[float, float, float, float]  # left, bottom, right, top, in inches


def spread(places: Sequence[float], pitch: float) -> list[float]:
    """Move increasing places between 0 and 1 apart to a pitch, as little as possible and without leaving 0 to 1.

    If they do not fit, they get equal distances over the whole range. The least squares of the moves are found by
    pooling neighbours that would come too close (isotonic regression).
    """
    count = len(places)
    pitch = min(pitch, 1 / max(count - 1, 1))
    pools: list[tuple[float, int]] = []  # mean of what the members want for the first place, and their number
    for number, place in enumerate(places):
        pools.append((place - number * pitch, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, more), (before, few) = pools.pop(), pools.pop()
            pools.append(((before * few + last * more) / (few + more), few + more))
    most = 1 - (count - 1) * pitch
    first = [min(max(wanted, 0.0), most) for wanted, members in pools for _ in range(members)]
    return [start + number * pitch for number, start in enumerate(first)]


def name_places(axes: Axes, names: Mapping[float, str], inches: float) -> None:
    """Write a name below each place along x, aslant, moved apart where they would cover each other.

    `inches` is the approximate width of the axes, whose limits and scale must be set. A line leads from a name to its
    place. The axis needs no tick labels of its own.
    """
    axes.set_xticks(list(names), [""] * len(names))
    axes.minorticks_off()
    low, high = axes.get_xlim()
    scale = axes.get_xscale() == "log"
    along = axes.xaxis.get_transform()

    def fraction(place: float) -> float:
        ends = [float(along.transform([[value]])[0][0]) if scale else value for value in (low, place, high)]
        return (ends[1] - ends[0]) / (ends[2] - ends[0])

    places = sorted(names)
    moved = spread([fraction(place) for place in places], SLANTED_PITCH / inches)
    form: Any = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (1, 1), "shrinkA": 0, "shrinkB": 3}
    for place, at in zip(places, moved, strict=True):
        axes.annotate(
            names[place],
            (fraction(place), 0),
            (at, -0.06),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="right",
            va="top",
            rotation=45,
            rotation_mode="anchor",
            size=8,
            color=INK,
            arrowprops=form,
        )


def label_points(
    axes: Axes, labels: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Label points, given as x, y and text, each on the first side that is free; one without a free side has none.

    A place is free if it covers no label, no other labelled point, and none of the `others`. Scales and limits must be
    set. The layout is computed, since it depends on the size of the axes.
    """
    figure = axes.get_figure()
    if layout := figure.get_layout_engine():  # type: ignore[union-attr]
        layout.execute(figure)  # type: ignore[arg-type]
    box = axes.get_window_extent()
    inch = figure.dpi  # type: ignore[union-attr]
    points = [tuple(axes.transData.transform(place) / inch) for place in [*((x, y) for x, y, _ in labels), *others]]
    taken: list[Box] = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in points]
    for number, (x, y, text) in enumerate(labels):
        at, wide = points[number], text_width(text, 8)
        for right, up in SIDES:
            left = at[0] + (0.08 if right > 0 else -0.08 - wide if right < 0 else -wide / 2)
            bottom = at[1] - LINE / 2 + 0.13 * up
            mine = (left, bottom, left + wide, bottom + LINE)
            inside = box.x0 / inch <= mine[0] and mine[2] <= box.x1 / inch and box.y0 / inch <= mine[1]
            if inside and mine[3] <= box.y1 / inch + 0.1 and not any(_cover(mine, one) for one in taken):
                taken.append(mine)
                offset = ((left - at[0]) * 72, (bottom + LINE / 2 - at[1]) * 72)
                axes.annotate(text, (x, y), offset, textcoords="offset points", va="center", size=8, color=INK)
                break


def front_of(points: Sequence[tuple[float, float]], better: tuple[int, int]) -> list[tuple[float, float]]:
    """Return the points that no other is at least as good as in both respects, by increasing x.

    `better` is 1 for an axis on which more is better, else −1.
    """
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda point: (-better[0] * point[0], -better[1] * point[1])):
        if not found or better[1] * point[1] > better[1] * found[-1][1]:
            found.append(point)
    return sorted(found)


def draw_front(axes: Axes, points: Sequence[tuple[float, float]], better: tuple[int, int]) -> Line2D:
    """Draw the front of points as steps, and return the entry of the legend. `better` is that of `front_of`."""
    x, y = zip(*front_of(points, better), strict=True)
    # Between two points of the front, what is reached is the better of their worse values.
    form: Any = {"color": GREY, "linewidth": 1.2, "zorder": 2.5}
    [line] = axes.plot(x, y, drawstyle="steps-post" if better[0] < 0 else "steps-pre", label="front", **form)
    return line


def _cover(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
