"""Style shared by all charts: colours, sizes, legends, number formats, saving."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


Array = NDArray[np.float64]

INK, GREY, LIGHT = "#22272e", "#6b7480", "#e3e6ea"
BLUE, ORANGE, RED, BROWN = "#2e6da4", "#d9820f", "#c0392b", "#8c6d31"
MARKERS = "osD^vP*X"  # one per model

WIDTH, HEIGHT, WIDEST, DPI = 9.0, 4.6, 24.0, 144  # inches, and dots per inch of the PNG
CHARACTER = 0.6 / 72  # inches of width per character and point of font size, DejaVu Sans
HEADER, BARE_HEADER = 0.92, 0.64  # inches of title and subtitle, with and without a row of legend entries
ENTRY, LEGEND_ROW = 0.42, 0.2  # inches of a legend entry besides its text, and of a row of entries

HATCH = "/////"
"""Hatching of suspect bars and fields; suspect points are hollow."""

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


@contextmanager
def chart_style() -> Iterator[None]:
    """Draw in our style inside this context; the caller's own settings are neither read nor changed."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save_figure(figure: Figure, folder: Path, name: str, png: bool = True) -> list[Path]:
    """Write a figure as `<name>.svg`, and with `png` also as `<name>.png`, in `folder`, which is created.

    Returns the files. The layout is computed once, and the canvases are called directly: `Figure.savefig` draws each
    file twice.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.svg"]
    if layout := figure.get_layout_engine():
        layout.execute(figure)
        figure.set_layout_engine("none")
    FigureCanvasSVG(figure).print_svg(files[0], metadata={"Date": None})
    if png:
        files.append(folder / f"{name}.png")
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(files[1])
    return files


def new_figure(
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
    header = HEADER if legend else BARE_HEADER
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


def put_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put the legend in one row under the subtitle, outside the axes, or in rows at the bottom if it is too wide.

    Rows at the bottom are read from left to right, and make the figure higher. A label that is wider than the figure
    is shortened.
    """
    if not handles:
        return
    room = figure.get_figwidth() - 0.3
    for handle in handles:
        handle.set_label(_shortened(str(handle.get_label()), room - ENTRY))
    entries = [text_width(str(handle.get_label()), 9) + ENTRY for handle in handles]
    form: Any = {"borderpad": 0.1, "handlelength": 1.3, "columnspacing": 1.4}
    if sum(entries) < room:
        place = (0.12 / figure.get_figwidth(), 1 - 0.62 / figure.get_figheight())
        form |= {"borderaxespad": 0.0, "handletextpad": 0.5}
        legend = figure.legend(
            handles=list(handles), ncols=len(handles), loc="upper left", bbox_to_anchor=place, **form
        )
        legend.set_in_layout(False)
        return
    columns = max(1, int(room / max(entries)))
    rows = -(-len(handles) // columns)
    _make_higher(figure, max(0.0, rows * LEGEND_ROW - (HEADER - BARE_HEADER)))
    by_column = [handles[place] for first in range(columns) for place in range(first, len(handles), columns)]
    figure.legend(handles=by_column, ncols=columns, loc="outside lower left", **form)


def _shortened(text: str, inches: float) -> str:
    """Shorten a legend's label to a width."""
    if text_width(text, 9) <= inches:
        return text
    return next(
        short
        for count in range(len(text) - 1, -1, -1)
        if text_width(short := f"{text[:count]}…", 9) <= inches or not count
    )


def _make_higher(figure: Figure, inches: float) -> None:
    """Make a figure higher for a legend at the bottom, and give the row under the subtitle to the axes."""
    before = figure.get_figheight()
    after = before + inches
    figure.set_figheight(after)
    for text in figure.texts:
        text.set_y(1 - (1 - text.get_position()[1]) * before / after)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - BARE_HEADER / after))  # type: ignore[call-arg, union-attr]


def text_width(text: str, size: float) -> float:
    """Width of a text in our font, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=STYLE["font.sans-serif"], size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def hollow(colour: str) -> dict[str, Any]:
    """Form of the marker of a suspect result."""
    return {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.2}


def suspect_handle() -> Any:
    """Legend entry of hollow markers."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker="o", markersize=6, label="hollow: suspect", **hollow(GREY))


def suspect_patch() -> Any:
    """Legend entry of hatched areas."""
    from matplotlib.patches import Patch

    return Patch(facecolor="white", edgecolor=GREY, hatch=HATCH, linewidth=0.8, label="hatched: suspect")


def plain_numbers(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def drawn_name(model: object) -> str:
    """Return the last part of a name or path, at most 40 characters, with ? for characters that our font lacks."""
    name = re.sub(r"[^\x20-\x7e\xa0-\u052f]", "?", str(model).rstrip("/").rsplit("/", 1)[-1])
    return name if len(name) <= 40 else f"{name[:39]}…"


def value_label(value: float) -> str:
    """Format a number with about three digits: 12345 → 12,345, 41.27 → 41.3, 0.872 → 0.87."""
    digits = 0 if value >= 99.95 or value == 0 else 1 if value >= 9.995 else 2 if value >= 0.0995 else 4
    return f"{value:,.{digits}f}" if value >= 9999.5 else f"{value:.{digits}f}"


def axis_limits(low: float, high: float) -> tuple[float, float]:
    """Return axis limits with a margin around the data, at least ±15 % of the level: small jitter should look small."""
    half = max(0.56 * (high - low), 0.075 * (high + low), 1e-6)
    return max(0.0, (low + high) / 2 - half), (low + high) / 2 + half
