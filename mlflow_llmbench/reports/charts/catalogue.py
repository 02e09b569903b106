"""Table of all charts: the `CHARTS` of every module in this folder, and the function that draws those of a subject.

To add a chart, write a module with a function that returns the figure, or the reason why it cannot be drawn, and list
it in the module's `CHARTS`. Reports and artifacts take it from here. In the table modules come in alphabetical order.

The same input gives the same bytes. pyplot is not used. The style is set in an `rc_context` during a call, so a
notebook's own settings are neither read nor changed. rcParams are global: do not draw in two threads at once.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .style import chart_style, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Subject: TypeAlias = Literal["cell", "sweep", "comparisons", "recommendation", "scaling", "study"]
"""Subject of a chart. Its function gets a RunResult, a `sweep.SweepPoints`, a sequence of comparisons, a
recommendation, a scaling study, or a `figure_data.FigureData`."""

Drawing: TypeAlias = "Figure | Mapping[str, Figure] | str"
"""A figure, several figures by the names of their files, or the reason why there is none."""


@dataclass(frozen=True)
class Chart:
    """One chart: the name of its files, what it shows, the function that draws it, and its caption in reports.

    `paper`: numbers of the figures of the EffiLLM paper that it corresponds to.
    """

    name: str
    subject: Subject
    draw: Callable[[Any], Drawing]
    caption: str = ""
    paper: tuple[int, ...] = ()

    @property
    def legend(self) -> str:
        """The caption with the numbers of the paper's figures."""
        return f"{self.caption} ({figures_text(self.paper)} of the EffiLLM paper.)" if self.paper else self.caption


def figures_text(numbers: Sequence[int]) -> str:
    """Name figures by their numbers: `Figure 5`, `Figures 2 and 6`."""
    *first, last = map(str, numbers)
    return f"Figures {', '.join(first)} and {last}" if first else f"Figure {last}"


@dataclass(frozen=True)
class DrawnCharts:
    """Written files; and (chart, reason) for each chart that could not be drawn."""

    files: tuple[Path, ...]
    missing: tuple[tuple[str, str], ...]


@lru_cache
def charts_of(subject: Subject) -> tuple[Chart, ...]:
    """Return the charts of a subject, in the order of the report."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [import_module(f"{__package__}.{name}") for name in names]
    return tuple(chart for module in modules for chart in getattr(module, "CHARTS", ()) if chart.subject == subject)


def draw_charts(subject: Subject, data: object, folder: Path) -> DrawnCharts:
    """Write every chart of a subject in `folder`, which is created if there is one.

    Charts are written as .svg and .png, those of a cell only as .svg: a PNG would take most of the parent's time for a
    cell, and the MLflow UI shows both.
    """
    files: list[Path] = []
    missing: list[tuple[str, str]] = []
    with chart_style():
        for chart in charts_of(subject):
            drawing = chart.draw(data)
            if isinstance(drawing, str):
                missing.append((chart.name, drawing))
                continue
            figures = drawing if isinstance(drawing, Mapping) else {chart.name: drawing}
            files += [
                file
                for name, figure in figures.items()
                for file in save_figure(figure, folder, name, subject != "cell")
            ]
    return DrawnCharts(tuple(files), tuple(missing))
