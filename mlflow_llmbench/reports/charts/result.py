"""Charts of one measured cell: gaps between tokens, the distribution of latencies, memory over time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...analysis.latency import gaps_ms
from ...analysis.repetitions import several_in_a_step
from ...records.results import RequestRecord, RunResult
from ...stats import supports
from .catalogue import Chart, Drawing
from .style import (
    BLUE,
    CHARACTER,
    GREY,
    HEIGHT,
    ORANGE,
    RED,
    WIDTH,
    Array,
    axis_limits,
    drawn_name,
    new_figure,
    put_legend,
    value_label,
)
from .sweep import settings_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_BINS = 400  # points of a line; a longer series is drawn by its bins


def _requests(result: RunResult) -> list[RequestRecord]:
    return [request for repetition in result.repetitions for request in repetition.requests if request.stamps_ns]


def _count(result: RunResult, requests: int) -> str:
    """Return the sample count in words; the unit is the repetition, or the request if a repetition has several."""
    noun = "repetition" if requests == len(result.repetitions) else "request"
    return f"n = {requests:,} {noun}{'' if requests == 1 else 's'}"


def _gaps(result: RunResult) -> list[Array]:
    """Return the gaps between the tokens of each request in ms; none if several tokens arrive in one step."""
    return [] if several_in_a_step(result) else [np.array(gaps_ms(request)) for request in _requests(result)]


def itl_figure(result: RunResult) -> Drawing:
    """Draw the gap in ms by token index 2 … N: median over requests, and the 10th to 90th percentile as a band."""
    gaps = _gaps(result)
    longest = max((len(g) for g in gaps), default=0)
    if longest == 0:
        return "it needs the times of single tokens"
    table = np.array(list(itertools.zip_longest(*gaps, fillvalue=np.nan)))  # tokens × requests
    low, middle, high = np.nanpercentile(table, [10, 50, 90] if len(gaps) >= 10 else [0, 50, 100], axis=1)
    stride = -(-longest // MOST_BINS)
    starts = np.arange(0, longest, stride)
    tokens = np.array([part.mean() for part in np.split(np.arange(2.0, longest + 2), starts[1:])])
    medians = np.array([np.median(part) for part in np.split(middle, starts[1:])])
    subtitle = f"{settings_text(result.cell)} · {_count(result, len(gaps))}" + (
        f" · bins of {stride} tokens" if stride > 1 else ""
    )
    figure, (axes,) = new_figure(f"{drawn_name(result.cell.model)} · inter-token latency by token", subtitle)
    axes.plot(tokens, medians, color=BLUE, linewidth=1.5, label="median", marker="o" if longest < 3 else "")
    if len(gaps) > 1:
        band = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        axes.fill_between(
            tokens,
            *band,
            color=BLUE,
            alpha=0.2,
            linewidth=0,
            label="10–90 %" if len(gaps) >= 10 else "lowest to highest",
        )
    axes.set_ylim(*axis_limits(float(low.min()), min(float(high.max()), 1.5 * float(np.percentile(high, 98)))))
    if (top := float(high.max())) > axes.get_ylim()[1]:
        note = f"beyond the axis: {value_label(top)} ms at token {int(high.argmax()) + 2}"
        axes.text(0.995, 0.985, note, transform=axes.transAxes, ha="right", va="top", size=9, color=GREY)
    axes.set(xlabel="Token index", ylabel="Inter-token latency (ms)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlim(2 - max(0.5, 0.02 * longest), longest + 1 + max(0.5, 0.02 * longest))
    put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def latency_figure(result: RunResult) -> Drawing:
    """Draw the cumulative distribution of all gaps with its supported percentiles, and TTFT by repetition."""
    requests = _requests(result)
    if not requests:
        return "nothing was generated"
    gaps = _gaps(result)
    values = np.concatenate([np.array([]), *gaps])
    weights = np.concatenate(
        [
            np.array([], dtype=int),
            *(np.full(len(its), request.rows) for its, request in zip(gaps, requests, strict=False)),
        ]
    )
    title = f"{drawn_name(result.cell.model)} · latency distribution"
    figure, panels = new_figure(title, settings_text(result.cell), grid=(1, 2 if len(values) else 1), legend=False)
    if len(values):
        _draw_distribution(panels[0], values, weights)
    what = "Time to first token" if result.cell.generates else "Time to the answer"
    ttft = np.array([(request.stamps_ns[0] - request.start_ns) / 1e6 for request in requests])
    groups = [[request for request in repetition.requests if request.stamps_ns] for repetition in result.repetitions]
    x = [
        n + 0.7 + 0.6 * (i + 0.5) / len(group) for n, group in enumerate(groups) for i in range(len(group))
    ]  # side by side, as sent
    axes = panels[-1]
    axes.plot(x, ttft, "o", color=BLUE, markersize=5, alpha=0.75, markeredgewidth=0, rasterized=len(ttft) > 1000)
    median = float(np.median(ttft))
    axes.axhline(median, color=ORANGE, linewidth=1.2)
    axes.text(
        1.02, median, f"median\n{value_label(median)} ms", transform=axes.get_yaxis_transform(), va="center", size=9
    )
    axes.set_ylim(*axis_limits(float(ttft.min()), float(ttft.max())))
    axes.set_xlim(0.4, len(groups) + 0.6)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(
        title=f"{what} · {_count(result, len(ttft))}",
        xlabel="Repetition",
        ylabel=f"{what} (ms)",
    )
    return figure


def _draw_distribution(axes: Axes, values: Array, weights: NDArray[Any]) -> None:
    """Draw the share of gaps up to x. As in the summary metrics, a gap is weighted by its rows; n counts it once."""
    order = np.argsort(values, kind="stable")
    values, ranks = values[order], np.cumsum(weights[order])

    def at(q: Any) -> Any:
        """Return percentiles with linear interpolation, as if each value occurred `weight` times."""
        position = np.asarray(q) / 100 * (ranks[-1] - 1)
        below, above = (
            values[np.searchsorted(ranks, k, side="right")] for k in (np.floor(position), np.ceil(position))
        )
        return below + (above - below) * (position % 1)

    shares = np.linspace(0, 100, MOST_BINS + 1)
    axes.plot(at(shares), shares, color=BLUE, linewidth=1.5)
    low, high = float(values[0]), min(float(values[-1]), float(2 * at(99) - values[0]))
    space = max(high - low, 0.02 * high) or 1.0  # all gaps are 0 if the whole answer came in one read
    for q in filter(lambda q: supports(len(values), q), (50, 90, 99)):
        axes.plot([at(q)], [q], "o", color=ORANGE, markersize=5, zorder=3)
        axes.annotate(
            f"p{q}  {value_label(at(q))} ms", (at(q), q), (6, -4), textcoords="offset points", va="top", size=9
        )
    axes.set_xlim(low - 0.06 * space, high + 0.45 * space)
    if values[-1] > high + 0.45 * space:
        axes.text(
            1,
            0.02,
            f"longest: {value_label(values[-1])} ms",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            size=9,
            color=GREY,
        )
    axes.set(
        ylim=(0, 104),
        yticks=range(0, 101, 20),
        ylabel="Share of gaps up to this (%)",
        xlabel="Inter-token latency (ms)",
    )
    axes.set_title(f"Inter-token latency · n = {len(values):,} {'gap' if len(values) == 1 else 'gaps'}")
    axes.locator_params(axis="x", nbins=5)


def memory_figure(result: RunResult) -> Drawing:
    """Draw memory over time in GB (10⁹ bytes), with the stages as vertical lines and their exact readings as dots."""
    if not result.timeline:
        return "memory was not sampled"
    start = result.timeline[0].t_ns
    marks = {stage: (t - start) / 1e9 for stage, t in sorted(result.marks.items(), key=lambda mark: mark[1])}
    figure, (axes,) = new_figure(
        f"{drawn_name(result.cell.model)} · memory over time", settings_text(result.cell), (WIDTH, HEIGHT + 0.4)
    )
    for label, name, colour in (
        ("host resident", "rss", BLUE),
        ("host anonymous", "anonymous", ORANGE),
        ("device", "device", RED),
    ):
        samples = [
            ((s.t_ns - start) / 1e9, getattr(s, name) / 1e9) for s in result.timeline if getattr(s, name) is not None
        ]
        if samples:
            parts = np.array_split(np.array(samples), min(MOST_BINS, len(samples)))
            # Keep the lowest and the highest sample of each part, so that peaks are not lost.
            kept = np.concatenate([part[sorted({part[:, 1].argmin(), part[:, 1].argmax()})] for part in parts])
            axes.plot(*kept.T, color=colour, linewidth=1.4, label=label)
    resident = ("resident at stage", result.memory.host_rss, BLUE, BLUE)
    for label, readings, face, edge in (resident, ("needed at stage", result.memory.host_needed, "white", ORANGE)):
        dots = [(t, readings[stage] / 1e9) for stage, t in marks.items() if stage in readings]
        if dots:
            axes.plot(*np.array(dots).T, "o", mfc=face, mec=edge, mew=1.5, markersize=6, label=label, zorder=4)
    ends = [0.0, (result.timeline[-1].t_ns - start) / 1e9, *marks.values()]
    air = 0.01 * max(max(ends) - min(ends), 1e-3)
    axes.set(xlim=(min(ends) - air, max(ends) + air), xlabel="Time since the first sample (s)")
    axes.set(ylim=(0, max(axes.dataLim.y1, 1e-3) * 1.08), ylabel="Memory (GB)")
    _draw_marks(axes, marks)
    put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    """Draw thin vertical lines named above the axes. Names that would touch go to higher rows, earlier ones higher."""
    low, high = axes.get_xlim()
    begins: list[float] = []  # per row: where its leftmost name begins, as a fraction of the width
    for stage, t in sorted(marks.items(), key=lambda mark: mark[1], reverse=True):
        x = (t - low) / (high - low)
        end = x + (len(stage) * 9 * CHARACTER + 0.08) / (WIDTH - 1.2)
        row = next((i for i, begin in enumerate(begins) if end < begin), len(begins))
        begins[row : row + 1] = [x]
        foot = 1.0 + 0.055 * row
        axes.plot(
            [t, t],
            [0, foot + 0.045],
            color="#aab2bd",
            linewidth=0.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=1,
        )
        axes.annotate(
            stage,
            (t, foot + 0.008),
            (3, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            size=9,
            color=GREY,
        )


CHARTS = (
    Chart("itl_by_token", "cell", itl_figure),
    Chart("latency_distribution", "cell", latency_figure),
    Chart("memory_timeline", "cell", memory_figure),
)
