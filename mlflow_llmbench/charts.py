"""Charts of one measured cell and of a sweep as SVG and PNG, and the style of all charts.

The same input gives the same bytes. pyplot is not used. The style is set in an `rc_context` during a call, so a
notebook's own settings are neither read nor changed. rcParams are global: do not draw in two threads at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .cell import Cell, differing
from .latency import gaps_ms
from .metrics import COLOURS, KEYS
from .plan import UNDECISIVE
from .records import RequestRecord, RunResult
from .repetitions import several_in_a_step
from .stats import supports

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Points = Sequence[tuple[Cell, Mapping[str, float]]]
Panels = Sequence[tuple[str, str, str]]  # model or "" for all, metric, heading

INK, GREY, LIGHT = "#22272e", "#6b7480", "#e3e6ea"
BLUE, ORANGE, RED, BROWN = "#2e6da4", "#d9820f", "#c0392b", "#8c6d31"

DESCRIBED = ("quant", "batch_size", "concurrency", "request_rate", "prompt_tokens", "output_tokens", "workload")
"""Settings that a subtitle names."""

SWEEP_AXES = {
    "throughput/output_tokens_per_s": ("throughput", "throughput", "output tokens/s"),
    "latency/ttft_ms_p50": ("ttft", "time to first token", "ms"),
    "latency/itl_ms_p50": ("itl", "inter-token latency", "ms"),
    "memory/device_bytes_peak": ("memory", "peak device memory", "GB"),
    "memory/host_needed_bytes_peak": ("memory", "peak host memory", "GB"),
    "memory/host_rss_bytes_peak": ("memory", "peak resident memory", "GB"),
    "memory/weight_bytes": ("memory", "weights", "GB"),
    "efficiency/padding_waste_ratio": ("padding", "computed for nothing", "share"),
}
"""Metric → its chart, its name in words, its unit there. A chart draws the first of its metrics that any cell has."""

THROUGHPUT, KL = "throughput/output_tokens_per_s", "quality/kl_vs_reference"
MARKERS = "osD^vP*X"  # one per model
MOST_LABELS = 16  # points with their value; more would cover each other

WIDTH, HEIGHT, WIDEST, DPI = 9.0, 4.6, 24.0, 144  # inches, and dots per inch of the PNG
CHARACTER = 0.6 / 72  # inches of width per character and point of font size, DejaVu Sans
MOST_BINS = 400  # points of a line; a longer series is drawn by its bins

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlflow-llmbench",
}


def draw_cell(result: RunResult, folder: Path) -> list[Path]:
    """Write `itl_by_token`, `latency_distribution` and `memory_timeline` of one cell, each as .svg and .png.

    Return the files. A chart without data (one output token, no timeline, a failed cell) is left out. Creates `folder`.
    """
    with _style():
        drawn = _itl_figure(result), _latency_figure(result), _memory_figure(result)
        charts = zip(("itl_by_token", "latency_distribution", "memory_timeline"), drawn, strict=True)
        return [path for name, figure in charts if figure for path in _save(figure, folder, name)]


def draw_sweep(points: Points, folder: Path) -> list[Path]:
    """Write `overview`, `throughput`, `ttft`, `itl`, `memory` and `quality` of measured cells, as .svg and .png.

    `points` holds cells with their summary metrics. Returns the files. `quality` plots the divergence from the
    unquantized model against throughput. The others have one bar per quantization. Groups along x are the batch sizes,
    or the combinations of all other varied parameters. Each model has its own panel, or is a group if only the
    quantization varies besides. If a cell was measured twice, the last one counts. A chart without any value is left
    out. Fewer than two cells give no charts.
    """
    keys: dict[str, str] = {}  # chart → its metric
    for key, (chart, *_) in SWEEP_AXES.items():
        if any(metrics.get(key) for _, metrics in points):
            keys.setdefault(chart, key)
    if len({cell for cell, _ in points}) < 2 or not keys:
        return []
    with _style():
        charts = {"overview": _overview_figure(points, keys.values())} | {
            name: _sweep_figure(points, key) for name, key in keys.items()
        }
        scored = [(cell, metrics) for cell, metrics in points if KL in metrics and THROUGHPUT in metrics]
        charts |= {"quality": _quality_figure(scored)} if len({cell for cell, _ in scored}) > 1 else {}
        return [path for name, figure in charts.items() for path in _save(figure, folder, name)]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # the layout is fixed; computing it again would take a third of the time
    figure.savefig(folder / f"{name}.png", dpi=DPI)
    return [folder / f"{name}.svg", folder / f"{name}.png"]


def _figure(
    title: str,
    subtitle: str,
    inches: tuple[float, float] = (WIDTH, HEIGHT),
    grid: tuple[int, int] = (1, 1),
    legend: bool = True,
    polar: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Lay out a bold title, a grey subtitle, room for one row of legend entries, and rows × columns of axes."""
    from matplotlib.figure import Figure

    width, height = inches
    header = 0.92 if legend else 0.64
    figure = Figure(figsize=inches)
    figure.set_layout_engine(
        "constrained", rect=(0, 0, 1, 1 - header / height), w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.04
    )
    for text, size, wide, down, weight, colour in (
        (title, 13, 1.1, 0.13, "bold", INK),
        (subtitle, 9, 0.85, 0.41, "normal", GREY),
    ):
        most = int((width - 0.2) / (wide * CHARACTER * size))
        short = text if len(text) <= most else text[: most - 1] + "…"
        figure.text(0.12 / width, 1 - down / height, short, va="top", size=size, weight=weight, color=colour)
    return figure, list(
        figure.subplots(*grid, squeeze=False, subplot_kw={"projection": "polar"} if polar else None).flat
    )


def _put_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put the legend in one row under the subtitle, outside the axes, where it hides nothing."""
    place = (0.12 / figure.get_figwidth(), 1 - 0.62 / figure.get_figheight())
    form = {"borderaxespad": 0.0, "borderpad": 0.1, "handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1.4}
    figure.legend(
        handles=list(handles), ncols=len(handles), loc="upper left", bbox_to_anchor=place, **form
    ).set_in_layout(False)


def _plain_numbers(axes: Axes) -> None:
    """Write the numbers of a logarithmic y axis without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name(model: object) -> str:
    """Return the last part of a name or path, at most 40 characters, with ? for characters that our font lacks."""
    name = re.sub(r"[^\x20-\x7e\xa0-\u052f]", "?", str(model).rstrip("/").rsplit("/", 1)[-1])
    return name if len(name) <= 40 else f"{name[:39]}…"


def _number(value: float) -> str:
    """Format a number with about three digits: 12345 → 12,345, 41.27 → 41.3, 0.872 → 0.87."""
    digits = 0 if value >= 99.95 or value == 0 else 1 if value >= 9.995 else 2 if value >= 0.0995 else 4
    return f"{value:,.{digits}f}" if value >= 9999.5 else f"{value:.{digits}f}"


def _describe(cell: Cell, names: Sequence[str] = DESCRIBED) -> str:
    """Describe the settings in words: `quantization int8 · batch size 4 · 128 prompt tokens`.

    An online cell has its load in place of the batch size.
    """
    online, rate = cell.scenario == "online", cell.request_rate
    words = {
        "quant": "" if online and cell.quant == "none" else f"quantization {cell.quant}",
        "batch_size": "" if online else f"batch size {cell.batch_size}",
        "concurrency": ""
        if not online or rate
        else f"{cell.concurrency} {'user' if cell.concurrency == 1 else 'users'}",
        "request_rate": f"{rate:g} requests/s" if rate else "",
        "workload": f"{_name(cell.workload)} prompts",
        "prompt_tokens": f"{cell.prompt_tokens or 'auto'} prompt tokens",
        "output_tokens": f"{cell.output_tokens} output tokens",
    }
    return " · ".join(words[name] for name in names if words[name])


def _requests(result: RunResult) -> list[RequestRecord]:
    return [request for repetition in result.repetitions for request in repetition.requests if request.stamps_ns]


def _count(result: RunResult, requests: int) -> str:
    """Return the sample count in words; the unit is the repetition, or the request if a repetition has several."""
    noun = "repetition" if requests == len(result.repetitions) else "request"
    return f"n = {requests:,} {noun}{'' if requests == 1 else 's'}"


def _gaps(result: RunResult) -> list[Array]:
    """Return the gaps between the tokens of each request in ms; none if several tokens arrive in one step."""
    return [] if several_in_a_step(result) else [np.array(gaps_ms(request)) for request in _requests(result)]


def _limits(low: float, high: float) -> tuple[float, float]:
    """Return axis limits with a margin around the data, at least ±15 % of the level: small jitter should look small."""
    half = max(0.56 * (high - low), 0.075 * (high + low), 1e-6)
    return max(0.0, (low + high) / 2 - half), (low + high) / 2 + half


def _itl_figure(result: RunResult) -> Figure | None:
    """Draw the gap in ms by token index 2 … N: median over requests, and the 10th to 90th percentile as a band."""
    gaps = _gaps(result)
    longest = max((len(g) for g in gaps), default=0)
    if longest == 0:
        return None
    table = np.array(list(itertools.zip_longest(*gaps, fillvalue=np.nan)))  # tokens × requests
    low, middle, high = np.nanpercentile(table, [10, 50, 90] if len(gaps) >= 10 else [0, 50, 100], axis=1)
    stride = -(-longest // MOST_BINS)
    starts = np.arange(0, longest, stride)
    tokens = np.array([part.mean() for part in np.split(np.arange(2.0, longest + 2), starts[1:])])
    medians = np.array([np.median(part) for part in np.split(middle, starts[1:])])
    subtitle = f"{_describe(result.cell)} · {_count(result, len(gaps))}" + (
        f" · bins of {stride} tokens" if stride > 1 else ""
    )
    figure, (axes,) = _figure(f"{_name(result.cell.model)} · inter-token latency by token", subtitle)
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
    axes.set_ylim(*_limits(float(low.min()), min(float(high.max()), 1.5 * float(np.percentile(high, 98)))))
    if (top := float(high.max())) > axes.get_ylim()[1]:
        note = f"beyond the axis: {_number(top)} ms at token {int(high.argmax()) + 2}"
        axes.text(0.995, 0.985, note, transform=axes.transAxes, ha="right", va="top", size=9, color=GREY)
    axes.set(xlabel="Token index", ylabel="Inter-token latency (ms)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlim(2 - max(0.5, 0.02 * longest), longest + 1 + max(0.5, 0.02 * longest))
    _put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _latency_figure(result: RunResult) -> Figure | None:
    """Draw the cumulative distribution of all gaps with its supported percentiles, and TTFT by repetition."""
    requests = _requests(result)
    if not requests:
        return None
    gaps = _gaps(result)
    values = np.concatenate([np.array([]), *gaps])
    weights = np.concatenate(
        [
            np.array([], dtype=int),
            *(np.full(len(its), request.rows) for its, request in zip(gaps, requests, strict=False)),
        ]
    )
    title = f"{_name(result.cell.model)} · latency distribution"
    figure, panels = _figure(title, _describe(result.cell), grid=(1, 2 if len(values) else 1), legend=False)
    if len(values):
        _draw_distribution(panels[0], values, weights)
    ttft = np.array([(request.stamps_ns[0] - request.start_ns) / 1e6 for request in requests])
    groups = [[request for request in repetition.requests if request.stamps_ns] for repetition in result.repetitions]
    x = [
        n + 0.7 + 0.6 * (i + 0.5) / len(group) for n, group in enumerate(groups) for i in range(len(group))
    ]  # side by side, as sent
    axes = panels[-1]
    axes.plot(x, ttft, "o", color=BLUE, markersize=5, alpha=0.75, markeredgewidth=0, rasterized=len(ttft) > 1000)
    median = float(np.median(ttft))
    axes.axhline(median, color=ORANGE, linewidth=1.2)
    axes.text(1.02, median, f"median\n{_number(median)} ms", transform=axes.get_yaxis_transform(), va="center", size=9)
    axes.set_ylim(*_limits(float(ttft.min()), float(ttft.max())))
    axes.set_xlim(0.4, len(groups) + 0.6)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(
        title=f"Time to first token · {_count(result, len(ttft))}",
        xlabel="Repetition",
        ylabel="Time to first token (ms)",
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
        axes.annotate(f"p{q}  {_number(at(q))} ms", (at(q), q), (6, -4), textcoords="offset points", va="top", size=9)
    axes.set_xlim(low - 0.06 * space, high + 0.45 * space)
    if values[-1] > high + 0.45 * space:
        axes.text(
            1,
            0.02,
            f"longest: {_number(values[-1])} ms",
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


def _memory_figure(result: RunResult) -> Figure | None:
    """Draw memory over time in GB (10⁹ bytes), with the stages as vertical lines and their exact readings as dots."""
    if not result.timeline:
        return None
    start = result.timeline[0].t_ns
    marks = {stage: (t - start) / 1e9 for stage, t in sorted(result.marks.items(), key=lambda mark: mark[1])}
    figure, (axes,) = _figure(
        f"{_name(result.cell.model)} · memory over time", _describe(result.cell), (WIDTH, HEIGHT + 0.4)
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
    _put_legend(figure, axes.get_legend_handles_labels()[0])
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


@dataclass(frozen=True)
class Grid:
    """The position of each cell's bar: its panel (a model, or "" for all), its group along x, and its quantization."""

    panels: list[str]
    names: list[str]  # the parameters whose values make a group
    groups: list[tuple[Any, ...]]
    quants: list[str]
    cells: Mapping[tuple[str, tuple[Any, ...], str], Mapping[str, float]]


def _arrange(points: Points, one_panel: bool) -> Grid:
    cells = [cell for cell, _ in points]
    seen = {f.name: list(dict.fromkeys(getattr(cell, f.name) for cell in cells)) for f in dataclasses.fields(Cell)}
    names = [name for name in differing(cells, UNDECISIVE) if name != "quant"]
    split = len(names) > 1 and "model" in names and not one_panel
    names = [name for name in names if not (split and name == "model")] or ["batch_size"]
    for name in names:  # numbers by size, None last; words in their given order
        seen[name].sort(key=lambda value: (value is None, 0 if value is None or isinstance(value, str) else value))
    placed = {
        (cell.model if split else "", tuple(getattr(cell, name) for name in names), cell.quant): metrics
        for cell, metrics in points
    }
    groups = sorted(
        {g for _, g, _ in placed}, key=lambda g: [seen[name].index(value) for name, value in zip(names, g, strict=True)]
    )
    quants = [quant for quant in (*COLOURS, *sorted(set(seen["quant"]) - set(COLOURS))) if quant in seen["quant"]]
    return Grid(seen["model"] if split else [""], names, groups, quants, placed)


def _sweep_figure(points: Points, key: str) -> Figure:
    """Draw one metric, one panel per model. All share one y scale, unless small values would vanish on it."""
    grid = _arrange(points, one_panel=False)
    notes = [f"{KEYS[key].better} is better", "median" if key.endswith("_p50") else ""]
    notes.append("line: 95 % interval" if any(f"{key}_ci_low" in metrics for _, metrics in points) else "")
    figure = _bars_figure(
        points, grid, SWEEP_AXES[key][1], notes, [(panel, key, _name(panel)) for panel in grid.panels], 3, WIDTH
    )
    tops = [axes.get_ylim()[1] for axes in figure.axes]
    for axes in figure.axes if max(tops) < 8 * min(tops) else ():
        axes.set_ylim(0, max(tops))
    return figure


def _overview_figure(points: Points, keys: Iterable[str]) -> Figure:
    """Draw all metrics of a sweep in one figure with one legend; models are groups along x."""
    drawn = [("", key, f"{SWEEP_AXES[key][1].capitalize()} · {KEYS[key].better} is better") for key in keys]
    return _bars_figure(points, _arrange(points, one_panel=True), "overview", [], drawn, 2, 11.0)


def _quality_figure(points: Points) -> Figure:
    """Draw quality loss by quantization against speed: one point per cell, with both 95 % intervals."""
    from matplotlib.lines import Line2D

    cells = [cell for cell, _ in points]
    varied = differing(cells, UNDECISIVE)
    models, quants = ([*dict.fromkeys(getattr(cell, name) for cell in cells)] for name in ("model", "quant"))
    other = [name for name in varied if name not in ("model", "quant")]
    notes = [
        "right and down is better",
        "lines: 95 % intervals",
        _describe(cells[0], [name for name in DESCRIBED if name not in varied]),
    ]
    notes += [f"in brackets: {', '.join(other).replace('_', ' ')}"] if other else []
    title = f"{_name(models[0]) if len(models) == 1 else f'{len(models)} models'} · quality against speed"
    figure, (axes,) = _figure(title, " · ".join(filter(None, notes)))
    for cell, metrics in points:
        x, y, colour = metrics[THROUGHPUT], metrics[KL], COLOURS.get(cell.quant, BROWN)
        axes.plot([x], [y], MARKERS[models.index(cell.model) % len(MARKERS)], color=colour, markersize=7, zorder=3)
        axes.hlines(
            y,
            metrics.get(f"{THROUGHPUT}_ci_low", x),
            metrics.get(f"{THROUGHPUT}_ci_high", x),
            color=colour,
            linewidth=1.2,
        )
        axes.vlines(x, metrics.get(f"{KL}_ci_low", y), metrics.get(f"{KL}_ci_high", y), color=colour, linewidth=1.2)
        if len(points) <= MOST_LABELS:
            settings = " ".join(_name(getattr(cell, name)) for name in other)
            # Points that lie close mostly differ in their quantization: alternate the labels by it.
            shift = -11 if quants.index(cell.quant) % 2 else 4
            axes.annotate(
                f"{y:.2g} {f'({settings})' if settings else ''}", (x, y), (6, shift), textcoords="offset points", size=8
            )
    top = max(axes.dataLim.y1, 1e-6)
    axes.set(xlim=(0, 1.12 * axes.dataLim.x1), ylim=(-0.05 * top, 1.12 * top))
    axes.set(xlabel="Throughput (output tokens/s)", ylabel="KL divergence from unquantized (nats)")
    shapes = zip(models, itertools.cycle(MARKERS), strict=False) if len(models) > 1 else ()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS.get(quant, BROWN), label=quant) for quant in quants
    ]
    handles += [Line2D([], [], linestyle="", marker=marker, color=GREY, label=_name(model)) for model, marker in shapes]
    _put_legend(figure, handles)
    return figure


def _bars_figure(
    points: Points, grid: Grid, topic: str, notes: Sequence[str], drawn: Panels, most: int, width: float
) -> Figure:
    """Draw panels of bars, each with its model (or ""), metric and heading.

    There are at most `most` columns, fewer if the bars would get too thin. `width` is in inches.
    """
    from matplotlib.patches import Patch

    need = 0.8 + 0.14 * len(grid.groups) * (len(grid.quants) + 1)
    columns = next((c for c in range(min(most, len(drawn)), 1, -1) if c * need <= 1.1 * width), 1)
    rows, width = -(-len(drawn) // columns), min(max(width, columns * need), WIDEST)
    cells = [cell for cell, _ in points]
    models = list(dict.fromkeys(_name(cell.model) for cell in cells))
    title = f"{', '.join(models) if len(models) < 3 else f'{len(models)} models'} · {topic}"
    constant = _describe(cells[0], [name for name in DESCRIBED if len({getattr(cell, name) for cell in cells}) == 1])
    # Otherwise the ticks or the subtitle name the quantization.
    quants = grid.quants if len(grid.quants) > 1 and len(grid.groups) > 1 else []
    legend = [Patch(facecolor=COLOURS.get(quant, BROWN), label=quant) for quant in quants]
    if any(key.endswith("_peak") for _, key, _ in drawn) and any(
        metrics.get("memory/weight_bytes") for _, metrics in points
    ):
        legend.append(Patch(facecolor="#00000040", label="shaded: weights"))
    size = width, HEIGHT if rows == 1 else 1 + 3 * rows
    figure, panels = _figure(title, " · ".join(filter(None, [*notes, constant])), size, (rows, columns), bool(legend))
    for number, (axes, (panel, key, heading)) in enumerate(zip(panels, drawn, strict=False)):
        _draw_bars(axes, grid, panel, key, width / columns - 0.8)
        _, what, unit = SWEEP_AXES[key]
        axes.set(title=heading, ylabel="" if panel and number % columns else f"{what.capitalize()} ({unit})")
    for axes in panels[len(drawn) :]:
        axes.remove()
    if legend:
        _put_legend(figure, legend)
    return figure


def _draw_bars(axes: Axes, grid: Grid, panel: str, key: str, inches: float) -> None:
    """Draw the bars of one panel with their values, 95 % intervals and weights; a dash where nothing was measured.

    `inches` is the approximate width of the axes.
    """
    count, scale = len(grid.quants), 1e-9 if key.startswith("memory/") else 1.0
    pitch = 0.84 / count
    span = max(len(grid.groups) + 0.1 if len(grid.groups) > 1 else 0.88, 7 * pitch)  # few bars stay slim
    bars = itertools.product(enumerate(grid.groups), enumerate(grid.quants))
    places = {(group, quant): g + (q - (count - 1) / 2) * pitch for (g, group), (q, quant) in bars}
    labels: list[tuple[float, float, str]] = []
    for (group, quant), x in places.items():
        metrics = grid.cells.get((panel, group, quant), {})
        if (value := metrics.get(key)) is None:
            labels.append((x, 0.0, "–"))
            continue
        axes.bar(x, value * scale, 0.92 * pitch, color=COLOURS.get(quant, BROWN))
        if key.endswith("_peak") and "memory/weight_bytes" in metrics:
            axes.bar(x, metrics["memory/weight_bytes"] * scale, 0.92 * pitch, color="black", alpha=0.25)
        low, high = metrics.get(f"{key}_ci_low", value), metrics.get(f"{key}_ci_high", value)
        if high > low:
            axes.vlines(x, max(low, 0) * scale, high * scale, color=INK, linewidth=1.2)
        labels.append((x, max(value, high) * scale, _number(value * scale)))
    room = inches * pitch / span
    flat = max(len(text) for *_, text in labels) * 8 * CHARACTER < room
    for x, y, text in labels if flat or room > 0.12 else ():
        upright = 0 if flat or text == "–" else 90
        axes.annotate(
            text, (x, y), (0, 2), textcoords="offset points", ha="center", va="bottom", size=8, rotation=upright
        )
    top, middle = max(y for _, y, _ in labels) * (1.1 if flat else 1.25), (len(grid.groups) - 1) / 2
    axes.set(ylim=(0, top or 1), xlim=(middle - span / 2, middle + span / 2))
    axes.tick_params(axis="x", length=0)
    if len(grid.groups) == 1 and count > 1:
        axes.set(xticks=list(places.values()), xticklabels=[quant for _, quant in places], xlabel="Quantization")
        if max(map(len, grid.quants)) * 9 * CHARACTER > room:
            axes.tick_params(axis="x", labelrotation=30)
        return
    most = max(6, int(inches / span / (8.3 * CHARACTER)))
    texts = [
        "\n".join("auto" if value is None else textwrap.fill(_name(value), most) for value in group)
        for group in grid.groups
    ]
    axes.set(xticks=range(len(texts)), xticklabels=texts, xlabel=" · ".join(grid.names).replace("_", " ").capitalize())
