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
    from matplotlib.figure import Figure


Array = NDArray[np.float64]

INK, GREY, LIGHT = "#22272e", "#6b7480", "#e3e6ea"
BLUE, ORANGE, RED, BROWN = "#2e6da4", "#d9820f", "#c0392b", "#8c6d31"
MARKERS = "osD^vP*X"  # one per model

WIDTH, HEIGHT, WIDEST, DPI = 9.0, 4.6, 24.0, 144  # inches, and dots per inch of the PNG
CHARACTER = 0.6 / 72  # inches of width per character and point of font size, DejaVu Sans

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


def put_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put the legend in one row under the subtitle, outside the axes, or in rows at the bottom if it is too wide."""
    if not handles:
        return
    width = figure.get_figwidth()
    entries = [len(str(handle.get_label())) * 9 * CHARACTER + 0.5 for handle in handles]
    form: Any = {"borderpad": 0.1, "handlelength": 1.3, "columnspacing": 1.4}
    if sum(entries) < width - 0.3:
        place = (0.12 / width, 1 - 0.62 / figure.get_figheight())
        form |= {"borderaxespad": 0.0, "handletextpad": 0.5}
        legend = figure.legend(
            handles=list(handles), ncols=len(handles), loc="upper left", bbox_to_anchor=place, **form
        )
        legend.set_in_layout(False)
    else:
        columns = max(1, int((width - 0.3) / max(entries)))
        figure.legend(handles=list(handles), ncols=columns, loc="outside lower left", **form)


def plain_numbers(axes: Axes) -> None:
    """Write the numbers of a logarithmic y axis without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
