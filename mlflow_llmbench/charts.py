"""Charts as SVG and PNG, of one measured cell and of a sweep. The only user of matplotlib.

Pure drawing: same input, same bytes. pyplot is not used; the style lives in an `rc_context` for the time of a call, so the
settings of a calling notebook are neither read nor changed (rcParams are global: do not draw in two threads at once).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .metrics import COLOURS, KEYS
from .plan import UNDECISIVE
from .records import Cell, MemorySample, RequestRecord, RunResult
from .stats import supports

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Points = Sequence[tuple[Cell, Mapping[str, float]]]

INK, GREY, LIGHT = "#22272e", "#6b7480", "#e3e6ea"
BLUE, ORANGE, RED = "#2e6da4", "#d9820f", "#c0392b"
OTHER_COLOURS = ("#8c6d31", "#7b4173", "#3182bd", "#636363")
"""For quantizations that `metrics.COLOURS` does not know."""

WIDTH, HEIGHT, WIDEST = 9.0, 4.6, 24.0  # inches
DPI = 144  # of the PNG
CHARACTER = 0.6 / 72  # inches of width per character and point of font size, DejaVu Sans
MOST_BINS = 400
"""Points of a line; a longer series is drawn by its bins."""

STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.labelsize": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LIGHT, "grid.linewidth": 0.8,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "ytick.major.size": 0, "xtick.major.size": 3, "legend.frameon": False, "legend.fontsize": 9, "lines.solid_capstyle": "butt",
    "svg.fonttype": "none", "svg.hashsalt": "mlflow-llmbench",
}  # fmt: skip


def draw_cell(result: RunResult, folder: Path) -> list[Path]:
    """Write `itl_by_token`, `latency_distribution` and `memory_timeline` of one cell, each as .svg and .png; return the files.

    A chart without data (one output token, no timeline, a failed cell) is left out. Creates `folder`.
    """
    with _style():
        charts = {"itl_by_token": _itl_figure(result), "latency_distribution": _latency_figure(result), "memory_timeline": _memory_figure(result)}
        return [path for name, figure in charts.items() if figure for path in _save(figure, folder, name)]


def draw_sweep(points: Points, folder: Path) -> list[Path]:
    """Write `overview` and one chart each of throughput, TTFT, ITL and memory over measured cells with their summary metrics.

    One bar per quantization. Groups along x are the batch sizes, or the combinations of whatever else varies; each model
    has its panel, or is a group of its own where nothing but the quantization varies besides. Where a cell was measured
    twice the last one counts. A chart that no cell has the metric of is left out; fewer than two cells give no chart.
    """
    if len(points) < 2:
        return []
    with _style():
        charts = {"overview": _overview_figure(points)} | {name: _sweep_figure(points, name) for name in SWEEP_CHARTS}
        return [path for name, figure in charts.items() if figure for path in _save(figure, folder, name)]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.svg": {"Date": None}, folder / f"{name}.png": {}}
    for path, metadata in files.items():
        figure.savefig(path, format=path.suffix[1:], dpi=DPI, metadata=metadata)
    return list(files)


def _figure(
    title: str, subtitle: str, size: tuple[float, float] = (WIDTH, HEIGHT), grid: tuple[int, int] = (1, 1), legend: Sequence[Any] = ()
) -> tuple[Figure, list[Axes]]:
    """A figure with a bold title, a grey line below it, a row of legend entries if any, and rows × columns of axes."""
    from matplotlib.figure import Figure

    width, height = size
    header = 0.92 if legend else 0.64
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header / height), w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.04)
    figure.text(0.12 / width, 1 - 0.13 / height, _shorten(title, width, 13.5), size=13, weight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.41 / height, _shorten(subtitle, width, 9), size=9, color=GREY, va="top")
    if legend:
        spacing = {"borderaxespad": 0.0, "borderpad": 0.1, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.4}
        place = (0.12 / width, 1 - 0.62 / height)
        figure.legend(handles=list(legend), ncols=len(legend), loc="upper left", bbox_to_anchor=place, **spacing)
        figure.legends[-1].set_in_layout(False)
    return figure, list(figure.subplots(*grid, squeeze=False).flat)


def _shorten(text: str, width: float, size: float) -> str:
    most = int((width - 0.2) / (CHARACTER * size))
    return text if len(text) <= most else text[: most - 1] + "…"


def _name(model: object) -> str:
    """The last part of a model's name or path, with characters that our font lacks replaced."""
    return re.sub(r"[^\x20-\x7e\xa0-\u052f]", "?", str(model).rstrip("/").rsplit("/", 1)[-1])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def _describe(cell: Cell, names: Sequence[str] = ("quant", "batch_size", "prompt_tokens", "output_tokens", "workload")) -> str:
    """The named settings in words, those of no interest left out: `int8 · batch size 4 · 128 prompt tokens`."""
    words = {
        "quant": f"quantization {cell.quant}", "batch_size": f"batch size {cell.batch_size}", "output_tokens": f"{cell.output_tokens} output tokens",
        "prompt_tokens": f"{cell.prompt_tokens} prompt tokens" if cell.prompt_tokens else "",
        "workload": f"workload {_name(cell.workload)}" if cell.workload != "synthetic" else "",
    }  # fmt: skip
    return " · ".join(words[name] for name in names if words.get(name))


def _requests(result: RunResult) -> list[tuple[int, RequestRecord]]:
    return [(repetition.index, request) for repetition in result.repetitions for request in repetition.requests if request.stamps_ns]


def _count(result: RunResult, requests: int) -> str:
    """How many samples a value per repetition (or per request, where a repetition has several) rests on."""
    return f"n = {requests:,} {'repetitions' if requests == len(result.repetitions) else 'requests'}"


def _gaps(request: RequestRecord) -> Array:
    return np.diff(np.array(request.stamps_ns, dtype=np.int64)).astype(np.float64) / 1e6


def _limits(low: float, high: float) -> tuple[float, float]:
    """Limits around the data with air; at least ±15 % of the level, so that harmless jitter looks harmless."""
    middle = (low + high) / 2
    half = max((high - low) / 2 * 1.12, 0.15 * middle, 1e-6)
    return max(0.0, middle - half), middle + half


def _itl_figure(result: RunResult) -> Figure | None:
    """Gap by token index 2 … N, ms: median over requests, with the band between their 10th and 90th percentile."""
    gaps = [_gaps(request) for _, request in _requests(result)]
    longest = max((len(g) for g in gaps), default=0)
    if longest == 0:
        return None
    table = np.full((len(gaps), longest), np.nan)
    for row, values in zip(table, gaps, strict=True):
        row[: len(values)] = values
    low, middle, high = np.nanpercentile(table, [10, 50, 90] if len(gaps) >= 10 else [0, 50, 100], axis=0)
    stride = -(-longest // MOST_BINS)
    starts = np.arange(0, longest, stride)
    tokens = np.array([part.mean() for part in np.split(np.arange(2.0, longest + 2), starts[1:])])
    medians = np.array([np.median(part) for part in np.split(middle, starts[1:])])
    binned = f" · drawn in bins of {stride} tokens" if stride > 1 else ""
    figure, (axes,) = _figure(
        f"{_name(result.cell.model)} · inter-token latency by token", f"{_describe(result.cell)} · {_count(result, len(gaps))}{binned}"
    )
    marker = {"marker": "o", "markersize": 4} if longest < 3 else {}
    axes.plot(tokens, medians, color=BLUE, linewidth=1.5, label="median", **marker)  # type: ignore[arg-type]
    if len(gaps) > 1:
        label = "10–90 %" if len(gaps) >= 10 else "lowest to highest"
        band = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        axes.fill_between(tokens, *band, color=BLUE, alpha=0.2, linewidth=0, label=label)
    top = min(float(high.max()), 1.5 * float(np.percentile(high, 98)))
    axes.set_ylim(*_limits(float(low.min()), top))
    if high.max() > axes.get_ylim()[1]:
        note = f"beyond the axis: {_number(float(high.max()))} ms at token {int(high.argmax()) + 2}"
        axes.text(0.995, 0.985, note, transform=axes.transAxes, ha="right", va="top", size=9, color=GREY)
    axes.set(xlabel="Token index", ylabel="Inter-token latency (ms)")
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.02)
    axes.legend(loc="lower left", ncols=2)
    return figure


def _latency_figure(result: RunResult) -> Figure | None:
    """The cumulative distribution of all gaps with its supported percentiles, and TTFT by repetition with its median."""
    requests = _requests(result)
    if not requests:
        return None
    values = np.concatenate([_gaps(request) for _, request in requests])
    weights = np.concatenate([np.full(request.output_tokens - 1, request.rows) for _, request in requests])
    title, subtitle = f"{_name(result.cell.model)} · latency distribution", _describe(result.cell)
    figure, panels = _figure(title, subtitle, grid=(1, 2 if len(values) else 1))
    if len(values):
        _draw_distribution(panels[0], values, weights)
    ttft = np.array([(request.stamps_ns[0] - request.t0_ns) / 1e6 for _, request in requests])
    axes = panels[-1]
    axes.plot([i + 1 for i, _ in requests], ttft, "o", color=BLUE, markersize=5, alpha=0.75, markeredgewidth=0, rasterized=len(ttft) > 1000)
    median = float(np.median(ttft))
    axes.axhline(median, color=ORANGE, linewidth=1.2)
    note = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom", "color": "#9a5a06"}
    axes.annotate(f"median {_number(median)} ms", (1, median), (0, 3), size=9, **note)  # type: ignore[arg-type]
    axes.set_ylim(*_limits(float(ttft.min()), float(ttft.max())))
    axes.set_title(f"Time to first token · {_count(result, len(ttft))}")
    axes.set(xlabel="Repetition", ylabel="Time to first token (ms)")
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.08)
    return figure


def _draw_distribution(axes: Axes, values: Array, weights: NDArray[Any]) -> None:
    """Share of gaps not longer than x. Rows that share a stamp weigh by their number, as in the summary metrics, but n counts stamps."""
    order = np.argsort(values, kind="stable")
    values, ranks = values[order], np.cumsum(weights[order])

    def at(q: float) -> float:
        """Linear interpolation between order statistics, as if each value were repeated `weight` times."""
        position = q / 100 * (ranks[-1] - 1)
        below, above = (values[np.searchsorted(ranks, k, side="right")] for k in (np.floor(position), np.ceil(position)))
        return float(below + (above - below) * (position % 1))

    shares = np.concatenate([np.linspace(0, 99, 300), np.linspace(99, 100, 100)]) if len(values) > MOST_BINS else 100 * ranks / ranks[-1]
    drawn = [at(q) for q in shares] if len(values) > MOST_BINS else values
    axes.step([values[0], *drawn], [0, *shares], where="post", color=BLUE, linewidth=1.5)
    low, high = float(values[0]), min(float(values[-1]), 1.5 * at(99))
    space = max(high - low, 0.02 * high)
    for q in (q for q in (50, 90, 99) if supports(len(values), q)):
        axes.plot([at(q)], [q], "o", color=ORANGE, markersize=5, zorder=3)
        axes.annotate(f"p{q}  {_number(at(q))} ms", (at(q), q), (6, -4), textcoords="offset points", va="top", size=9)
    axes.set_xlim(low - 0.06 * space, high + 0.45 * space)
    if values[-1] > high + 0.45 * space:
        note = f"longest: {_number(float(values[-1]))} ms"
        axes.text(1, 0.02, note, transform=axes.transAxes, ha="right", va="bottom", size=9, color=GREY)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(f"Inter-token latency · n = {len(values):,} {'gap' if len(values) == 1 else 'gaps'}")
    axes.set(xlabel="Inter-token latency (ms)", ylabel="Share of gaps up to this (%)")
    axes.locator_params(axis="x", nbins=5)


def _memory_figure(result: RunResult) -> Figure | None:
    """Memory over time in 10⁹ bytes, the stages as vertical lines, and the stages' exact readings as dots on them."""
    if not result.timeline:
        return None
    start = result.timeline[0].t_ns
    marks = {stage: (t - start) / 1e9 for stage, t in sorted(result.marks.items(), key=lambda mark: mark[1])}
    figure, (axes,) = _figure(f"{_name(result.cell.model)} · memory over time", _describe(result.cell), (WIDTH, HEIGHT + 0.4))
    lines = (("host resident", "rss", BLUE), ("host anonymous", "anonymous", ORANGE), ("device", "device", RED))
    for label, field, colour in lines:
        samples = [s for s in result.timeline if getattr(s, field) is not None]
        if samples:
            axes.plot(*_extremes(samples, field, start), color=colour, linewidth=1.4, label=label)
    stages = result.memory
    for label, readings, colour in (("resident at stage", stages.host_rss, BLUE), ("needed at stage", stages.host_needed, "white")):
        known = [(marks[stage], readings[stage] / 1e9) for stage in marks if stage in readings]
        if known:
            edge = BLUE if colour == BLUE else ORANGE
            axes.plot(*zip(*known, strict=True), "o", color=colour, markeredgecolor=edge, markeredgewidth=1.5, markersize=6, label=label, zorder=4)
    last = max([(result.timeline[-1].t_ns - start) / 1e9, *marks.values(), 1e-3])
    first = min([0.0, *marks.values()])
    axes.set_xlim(first - 0.01 * (last - first), last + 0.01 * (last - first))
    axes.set_ylim(0, max(axes.dataLim.y1, 1e-3) * 1.08)
    _draw_marks(axes, marks)
    axes.set(xlabel="Time since the first sample (s)", ylabel="Memory (GB)")
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.6, columnspacing=1.6)
    return figure


def _extremes(samples: Sequence[MemorySample], field: str, start: int) -> tuple[Array, Array]:
    """Seconds and GB of a field; a long series is thinned to the lowest and highest sample of each bin, so that peaks stay."""
    x = np.array([(s.t_ns - start) / 1e9 for s in samples])
    y = np.array([getattr(s, field) / 1e9 for s in samples])
    if len(y) <= 2 * MOST_BINS:
        return x, y
    bins = np.array_split(np.arange(len(y)), MOST_BINS)
    keep = np.array(sorted({i for part in bins for i in (part[y[part].argmin()], part[y[part].argmax()])}))
    return x[keep], y[keep]


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    """Thin vertical lines with their names above the axes. Names that would touch go to higher rows, earlier ones higher."""
    low, high = axes.get_xlim()
    begins: list[float] = []  # per row: where its leftmost name begins, as a fraction of the width
    for stage, t in sorted(marks.items(), key=lambda mark: mark[1], reverse=True):
        x = (t - low) / (high - low)
        end = x + (len(stage) * 9 * CHARACTER + 0.08) / (WIDTH - 1.2)
        row = next((i for i, begin in enumerate(begins) if end < begin), len(begins))
        begins[row : row + 1] = [x]
        foot = 1.0 + 0.055 * row
        axes.plot([t, t], [0, foot + 0.045], color=GREY, linewidth=0.7, transform=axes.get_xaxis_transform(), clip_on=False, zorder=1)
        axes.annotate(stage, (t, foot + 0.008), (3, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points", size=9, color=GREY)


@dataclass(frozen=True)
class SweepChart:
    """A chart of a sweep: its title, the axis by the first metric that any cell has, and the factor from stored to drawn value."""

    title: str
    axes: Mapping[str, str]  # metric → label of the y axis
    scale: float = 1.0


SWEEP_CHARTS = {
    "throughput": SweepChart("throughput", {"throughput/output_tokens_per_s": "Output tokens per second"}),
    "ttft": SweepChart("time to first token", {"latency/ttft_ms_p50": "Time to first token (ms)"}),
    "itl": SweepChart("inter-token latency", {"latency/itl_ms_p50": "Inter-token latency (ms)"}),
    "memory": SweepChart(
        "memory",
        {
            "memory/device_bytes_peak": "Peak device memory (GB)", "memory/host_needed_bytes_peak": "Peak host memory needed (GB)",
            "memory/host_rss_bytes_peak": "Peak resident memory (GB)", "memory/weight_bytes": "Weights (GB)",
        },
        1e-9,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Where each cell's bar stands: its panel (a model, or "" for all), its group along x, and its quantization."""

    panels: list[str]
    names: list[str]  # the parameters whose values make a group
    groups: list[tuple[Any, ...]]
    quants: list[str]
    cells: Mapping[tuple[str, tuple[Any, ...], str], Mapping[str, float]]

    @property
    def bars(self) -> int:
        """Number of places for a bar in a panel."""
        return len(self.groups) * len(self.quants)


def _arrange(points: Points, one_panel: bool = False) -> Grid:
    cells = [cell for cell, _ in points]
    seen = {f.name: list(dict.fromkeys(getattr(cell, f.name) for cell in cells)) for f in dataclasses.fields(Cell)}
    names = [name for name, values in seen.items() if len(values) > 1 and name not in ("quant", *UNDECISIVE)]
    split = "model" in names and len(names) > 1 and not one_panel
    names = [name for name in names if not (split and name == "model")] or ["batch_size"]
    order = {n: sorted(seen[n], key=lambda v: (v is None, v or 0)) if all(not isinstance(v, str) for v in seen[n]) else seen[n] for n in names}
    placed = {
        (cell.model if split else "", tuple(getattr(cell, name) for name in names), cell.quant): metrics for cell, metrics in points
    }  # fmt: skip
    groups = sorted({group for _, group, _ in placed}, key=lambda group: [order[name].index(v) for name, v in zip(names, group, strict=True)])
    known = list(COLOURS)
    quants = sorted(seen["quant"], key=lambda q: (known.index(q) if q in known else len(known), q))
    return Grid(seen["model"] if split else [""], names, groups, quants, placed)


def _axis(points: Points, chart: SweepChart) -> str | None:
    """The first metric of a chart that any cell has."""
    return next((key for key in chart.axes if any(metrics.get(key) for _, metrics in points)), None)


def _title(points: Points, what: str) -> str:
    models = list(dict.fromkeys(_name(cell.model) for cell, _ in points))
    return f"{', '.join(models) if len(models) <= 2 else f'{len(models)} models'} · {what}"


def _constant(points: Points) -> str:
    """What all cells have in common, in words."""
    cells = [cell for cell, _ in points]
    names = ("quant", "batch_size", "prompt_tokens", "output_tokens", "workload")
    return _describe(cells[0], [name for name in names if len({getattr(cell, name) for cell in cells}) == 1])


def _colour(quants: Sequence[str], quant: str) -> str:
    others = [q for q in quants if q not in COLOURS]
    return COLOURS.get(quant) or OTHER_COLOURS[others.index(quant) % len(OTHER_COLOURS)]


def _legend(grid: Grid, weights: bool) -> list[Any]:
    """One entry per quantization, unless there is one only or the ticks name them; and the shade that stands for the weights."""
    from matplotlib.patches import Patch

    quants = grid.quants if len(grid.quants) > 1 and len(grid.groups) > 1 else []
    shade = [Patch(facecolor="#00000040", label="shaded: weights")] if weights else []
    return [Patch(facecolor=_colour(grid.quants, quant), label=quant) for quant in quants] + shade


def _has_weights(points: Points, key: str | None) -> bool:
    """Whether the weights are drawn into the bars of peak memory."""
    return bool(key) and str(key).endswith("_peak") and any(metrics.get("memory/weight_bytes") for _, metrics in points)


def _sweep_figure(points: Points, name: str) -> Figure | None:
    chart = SWEEP_CHARTS[name]
    key = _axis(points, chart)
    if key is None:
        return None
    grid = _arrange(points)
    columns = min(len(grid.panels), 3)
    rows = -(-len(grid.panels) // columns)
    width = min(max(WIDTH, columns * (0.8 + 0.17 * (grid.bars + len(grid.groups)))), WIDEST)
    interval = ["line: 95 % interval"] if any(f"{key}_ci_low" in metrics for _, metrics in points) else []
    median = ["median"] if key.endswith("_p50") else []
    subtitle = " · ".join([f"{KEYS[key].better} is better", *median, *interval, _constant(points)]).rstrip(" ·")
    legend = _legend(grid, _has_weights(points, key))
    figure, every = _figure(_title(points, chart.title), subtitle, (width, HEIGHT if rows == 1 else 1 + 2.9 * rows), (rows, columns), legend)
    for axes in every[len(grid.panels) :]:
        axes.remove()
    panels = every[: len(grid.panels)]
    for number, (axes, panel) in enumerate(zip(panels, grid.panels, strict=True)):
        _draw_bars(axes, grid, panel, key, chart.scale, width / columns - 0.8)
        axes.set_title(_name(panel))
        axes.set_ylabel(chart.axes[key] if number % columns == 0 else "")
    tops = [axes.get_ylim()[1] for axes in panels]
    if max(tops) < 8 * min(tops):  # one scale for all models, unless the small ones would vanish
        for axes in panels:
            axes.set_ylim(0, max(tops))
    return figure


def _overview_figure(points: Points) -> Figure | None:
    """All charts of a sweep in one picture with one legend; models are groups along x."""
    drawn = [(chart, key) for chart in SWEEP_CHARTS.values() if (key := _axis(points, chart))]
    if not drawn:
        return None
    grid = _arrange(points, one_panel=True)
    columns, rows = min(len(drawn), 2), -(-len(drawn) // 2)
    width = min(max(11.0, columns * (0.8 + 0.15 * (grid.bars + len(grid.groups)))), WIDEST)
    weights = any(_has_weights(points, key) for _, key in drawn)
    figure, every = _figure(_title(points, "overview"), _constant(points), (width, 1 + 3.1 * rows), (rows, columns), _legend(grid, weights))
    for axes, (chart, key) in zip(every, drawn, strict=False):
        _draw_bars(axes, grid, "", key, chart.scale, width / columns - 0.8)
        axes.set_title(f"{chart.title.capitalize()} · {KEYS[key].better} is better")
        axes.set_ylabel(chart.axes[key])
    for axes in every[len(drawn) :]:
        axes.remove()
    return figure


def _draw_bars(axes: Axes, grid: Grid, panel: str, key: str, scale: float, inches: float) -> None:
    """Bars of one panel with their values, intervals and weights. `inches`: about how wide the axes will be."""
    count = len(grid.quants)
    pitch = 0.84 / count
    span = max(len(grid.groups) + 0.1, 7 * pitch)  # few bars stay slim
    places = {(group, quant): g + (q - (count - 1) / 2) * pitch for g, group in enumerate(grid.groups) for q, quant in enumerate(grid.quants)}
    labels: list[tuple[float, float, str]] = []
    for (group, quant), x in places.items():
        metrics = grid.cells.get((panel, group, quant), {})
        value = metrics.get(key)
        if value is None:
            labels.append((x, 0.0, "–"))
            continue
        axes.bar(x, value * scale, 0.92 * pitch, color=_colour(grid.quants, quant))
        if key.endswith("_peak") and "memory/weight_bytes" in metrics:
            axes.bar(x, metrics["memory/weight_bytes"] * scale, 0.92 * pitch, color="black", alpha=0.25)
        low, high = metrics.get(f"{key}_ci_low", value), metrics.get(f"{key}_ci_high", value)
        if high > low:
            axes.vlines(x, max(low, 0) * scale, high * scale, color=INK, linewidth=1.2)
        labels.append((x, max(value, high) * scale, _number(value * scale)))
    room = inches * pitch / span
    flat = max(len(text) for *_, text in labels) * 8 * CHARACTER < room
    for x, y, text in labels if flat or room > 0.13 else ():
        axes.annotate(text, (x, y), (0, 2), textcoords="offset points", ha="center", va="bottom", size=8, rotation=0 if flat else 90)
    axes.set_ylim(0, max(y for _, y, _ in labels) * (1.1 if flat else 1.25) or 1)
    middle = (len(grid.groups) - 1) / 2
    axes.set_xlim(middle - span / 2, middle + span / 2)
    if len(grid.groups) == 1 and count > 1:
        axes.set_xticks(list(places.values()), [quant for _, quant in places])
        axes.set_xlabel("Quantization")
    else:
        texts = ["\n".join("auto" if value is None else _name(value) for value in group) for group in grid.groups]
        axes.set_xticks(range(len(texts)), texts)
        axes.set_xlabel(" · ".join(grid.names).replace("_", " ").capitalize())
    axes.tick_params(axis="x", length=0)
