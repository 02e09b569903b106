"""Metric: one figure with its statistics, and the places that show it. The table of all metrics is `metrics`.

In code a metric is named `<metric>_<unit>_<statistic>`. MLflow keys add a section, because the MLflow UI makes one
chart section per prefix: `ttft_ms_p50` is logged as `latency/ttft_ms_p50`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

RATIO = "0–1"
"""Unit of shares."""

GB = 1e9
"""Bytes in a GB, the unit of every figure of memory. Raw readings are in bytes."""

STATISTICS = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}
"""Statistic of a metric that has several → its name in words. A figure is always named with its statistic."""


@dataclass(frozen=True)
class Place:
    """A place that shows one statistic of a metric.

    `order` sorts the metrics of a place; steps of ten leave room for others. `label` and `unit` replace the metric's
    own there, and a value is shown times `scale`. Metrics with one `name` stand in for each other: the first that was
    measured is shown.
    """

    order: int
    statistic: str = ""
    label: str = ""
    name: str = ""
    unit: str | None = None
    scale: float = 1.0

    where: ClassVar[str] = ""


@dataclass(frozen=True)
class Column(Place):
    """Column of the tables of cells: terminal, report.md, report.html, the description of a sweep."""

    where: ClassVar[str] = "tables of cells"


@dataclass(frozen=True)
class Line(Place):
    """Line of the summary of one run, which is its description in the MLflow UI; `label` is its name in words."""

    where: ClassVar[str] = "description of a run"


@dataclass(frozen=True)
class Claim(Place):
    """Claim in the headline of a sweep. `name`: what the best cell is, such as `fastest`."""

    where: ClassVar[str] = "headline of a sweep"


@dataclass(frozen=True)
class Compared(Place):
    """Metric of `llmbench compare`, in its table and charts."""

    where: ClassVar[str] = "comparison"


@dataclass(frozen=True)
class Gated(Place):
    """Metric that `llmbench gate` checks. `name`: how a limit names it."""

    only_if_limited: bool = False

    where: ClassVar[str] = "gate"


@dataclass(frozen=True)
class Goal(Place):
    """Goal of `llmbench recommend`. `name`: how `--goal` names it; `advice`: what to do where it was not measured."""

    advice: str = "Measure again."

    where: ClassVar[str] = "goal of a recommendation"


@dataclass(frozen=True)
class QualityBound(Place):
    """Quality that `llmbench recommend` can limit. `name`: how `--min-quality` names it."""

    advice: str = "Measure again with quality."

    where: ClassVar[str] = "limit of a recommendation"


@dataclass(frozen=True)
class Tag(Place):
    """Tag of a registered version, and figure in its configuration."""

    where: ClassVar[str] = "tags of a version"


@dataclass(frozen=True)
class ExportComment(Place):
    """Figure in the comment of an exported command; `label` is its unit in words."""

    where: ClassVar[str] = "exported command"


@dataclass(frozen=True)
class Bars(Place):
    """Bar chart of a sweep. `name`: its file."""

    where: ClassVar[str] = "charts of a sweep"


@dataclass(frozen=True)
class Panel(Place):
    """Bar chart, column and axis of the view that is published in the MLflow UI."""

    where: ClassVar[str] = "view in MLflow"


P = TypeVar("P", bound=Place)


@dataclass(frozen=True)
class Metric:
    """One metric: section in MLflow, name, definition, unit, statistics, better direction, and the places that show it.

    `title` is its name in words, `label` the heading of a table's column, `shown_unit` the unit in
    words. `tolerance` is the largest relative difference of two cells that counts as equal where no interval
    says more; without one, no cell is marked as best.
    """

    section: str
    name: str
    definition: str
    unit: str = ""
    statistics: tuple[str, ...] = ("",)
    better: str = ""  # "lower", "higher", or "" for neither
    title: str = ""
    label: str = ""
    shown_unit: str | None = None  # None: `unit`
    tolerance: float | None = None
    places: tuple[Place, ...] = ()

    def key(self, statistic: str = "") -> str:
        """MLflow key of one statistic. Raises KeyError for a statistic that the metric does not have."""
        if statistic not in self.statistics:
            raise KeyError(f"{self.section}/{self.name} has no statistic {statistic!r}")
        return f"{self.section}/{self.name}{f'_{statistic}' if statistic else ''}"

    def mlflow_keys(self) -> list[str]:
        """MLflow keys, one per statistic."""
        return [self.key(statistic) for statistic in self.statistics]

    @property
    def display_unit(self) -> str:
        """Unit of a shown value; "" for a ratio."""
        return self.unit.replace(RATIO, "") if self.shown_unit is None else self.shown_unit

    @property
    def percentiles(self) -> tuple[int, ...]:
        """The percentiles among the statistics: 50 for `p50`."""
        return tuple(int(s[1:]) for s in self.statistics if s[:1] == "p" and s[1:].isdecimal())


def interval_keys(key: str) -> tuple[str, str]:
    """MLflow keys of the ends of a figure's 95 % interval: low, high."""
    return f"{key}_ci_low", f"{key}_ci_high"


@dataclass(frozen=True)
class Entry(Generic[P]):
    """One metric at one place."""

    metric: Metric
    place: P

    @property
    def key(self) -> str:
        """MLflow key of the shown statistic."""
        return self.metric.key(self.place.statistic)

    @property
    def name(self) -> str:
        """Name at the place: that of a limit, a claim or a chart; by default the key."""
        return self.place.name or self.key

    @property
    def heading(self) -> str:
        """Heading of a column. It names the statistic where the metric has several: `TTFT p50 ms`, `TTFT mean ms`."""
        if self.place.label:
            return self.place.label
        text = self.metric.label or self.metric.name
        if not self.statistic:
            return text
        unit = f" {self.metric.unit}"
        return f"{text.removesuffix(unit)} {self.place.statistic}{unit if text.endswith(unit) else ''}"

    @property
    def words(self) -> str:
        """The metric in words, with its statistic where it has several: `time to first token, median`."""
        if self.place.label:
            return self.place.label
        return f"{self.metric.title}, {self.statistic}" if self.statistic else self.metric.title

    @property
    def statistic(self) -> str:
        """The shown statistic in words, "" for a metric that has only one."""
        return STATISTICS.get(self.place.statistic, "") if len(self.metric.statistics) > 1 else ""

    @property
    def title(self) -> str:
        """The metric in words, with a capital first letter."""
        return self.words[:1].upper() + self.words[1:]

    @property
    def unit(self) -> str:
        """Unit of the shown value; "" for a ratio."""
        return self.metric.display_unit if self.place.unit is None else self.place.unit

    @property
    def scale(self) -> float:
        """Factor from the stored to the shown value."""
        return self.place.scale


def first_known(entries: Iterable[Entry[P]], known: Callable[[str], bool]) -> list[Entry[P]]:
    """Return the entries whose key is known, of those with one name only the first."""
    found: dict[str, Entry[P]] = {}
    for entry in entries:
        if known(entry.key):
            found.setdefault(entry.name, entry)
    return list(found.values())


@dataclass(frozen=True)
class Series:
    """A series: section in MLflow, name, and what a step means."""

    section: str
    name: str
    definition: str
    unit: str = ""

    @property
    def key(self) -> str:
        """MLflow key."""
        return f"{self.section}/{self.name}"
