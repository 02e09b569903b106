"""Searches: choose the next cell of a sweep from the results before it. A search extends the plan cell by cell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..analysis import goodput
from ..analysis.decisions import tuning
from ..analysis.decisions.candidates import Limit, Measure
from ..analysis.decisions.recommend import QUALITY_MEASURES
from ..analysis.decisions.tuning import Grid, Trial
from ..config.cells import needs_no_less
from ..records.cell import Cell
from ..records.results import RunResult
from .planning import Plan, PlannedCell


class Search(Protocol):
    """Chooses the cells of a sweep one after another. It is used by one sweep, from one thread."""

    @property
    def cells(self) -> int:
        """Number of cells that the sweep will have at most; 0 if that is not known."""

    def tell(self, planned: PlannedCell, result: RunResult) -> None:
        """Take the result of a cell. The newest of several counts: the first lacks what the end of its load brings."""

    def extend(self, plan: Plan, group: Sequence[PlannedCell] = ()) -> Plan | None:
        """Return the plan with one more cell, last; None if there is none to add now.

        `group` are the cells of the load that is open now: the new cell is one that this load serves. Without it, any.
        """


@dataclass
class GoodputSearch:
    """Search for the highest request rate that meets the SLOs, in each load group by itself (`analysis.goodput`)."""

    attainment: float
    cells: int = 0
    results: dict[str, RunResult] = field(default_factory=dict)

    def tell(self, planned: PlannedCell, result: RunResult) -> None:
        """Take the result of a cell."""
        self.results[planned.folder] = result

    def extend(self, plan: Plan, group: Sequence[PlannedCell] = ()) -> Plan | None:
        """Return the plan with one more rate, for a configuration of the open load."""
        found = [self.results[planned.folder] for planned in group if planned.folder in self.results]
        cell = goodput.next_cell(found, self.attainment)
        return plan.with_cell(cell, group[0]) if cell else None


class TuningSearch:
    """Search of a planned grid for the configuration that is best for a goal within limits (`analysis…tuning`).

    `excluded` are the folders of cells that are not tried, since they cannot be measured or need too much memory.
    `cells` is the number of cells to try.
    """

    def __init__(
        self,
        grid: Plan,
        target: Measure,
        limits: Sequence[Limit],
        cells: int,
        excluded: Collection[str] = (),
        accept_suspect: str | None = None,
    ) -> None:
        self.plan, self.target, self.limits, self.cells = grid, target, tuple(limits), cells
        self.excluded, self.accept_suspect = frozenset(excluded), accept_suspect
        self.grid = Grid([planned.cell for planned in grid.cells])
        self.number = {planned.folder: number for number, planned in enumerate(grid.cells)}
        self.load_of = {planned.folder: place for place, group in enumerate(grid.groups) for planned in group}
        self.trials: dict[int, Trial] = {}
        self.results: dict[int, RunResult] = {}
        # Quality is measured when a load ends, so one that limits name is known only then.
        self.waits_for_quality = any(limit.measure in QUALITY_MEASURES.values() for limit in limits)

    def first(self) -> Plan:
        """Return the plan of the first cell alone; at least one must not be excluded."""
        number = self._choose()
        assert number is not None
        return self.plan.only([self.plan.cells[number]])

    @property
    def open_cells(self) -> list[int]:
        """Numbers of the cells that can still be tried."""
        return [
            number
            for number, planned in enumerate(self.plan.cells)
            if number not in self.trials and planned.folder not in self.excluded and not self._is_hopeless(planned.cell)
        ]

    def tell(self, planned: PlannedCell, result: RunResult) -> None:
        """Take the result of a cell."""
        number = self.number[planned.folder]
        self.results[number] = result
        self.trials[number] = tuning.read_trial(result, self.target, self.limits, self.accept_suspect)

    def extend(self, plan: Plan, group: Sequence[PlannedCell] = ()) -> Plan | None:
        """Return the plan with the cell that promises most."""
        if len(plan.cells) >= self.cells or (group and self.waits_for_quality):
            return None
        number = self._choose()
        if number is None:
            return None
        chosen = self.plan.cells[number]
        if group and self.load_of[chosen.folder] != self.load_of[group[0].folder]:
            return None
        return self.plan.only([*plan.cells, chosen])

    def chances(self) -> dict[int, float]:
        """Return for each cell that can still be tried the chance that it is better than all trials."""
        return tuning.chances(self.grid, self.trials, self.open_cells, self.target, self.limits)

    def _choose(self) -> int | None:
        first = self.grid.first_trials(self.cells)
        return tuning.choose(self.grid, self.trials, self.open_cells, self.target, self.limits, first)

    def _is_hopeless(self, cell: Cell) -> bool:
        """Return True if a cell needs at least the memory, or the time, of a trial that failed for want of it."""
        return any(
            result.outcome in ("oom", "timeout")
            and needs_no_less(
                cell, result.cell, ignore_shape=result.load is None, compare_time=result.outcome == "timeout"
            )
            for result in self.results.values()
        )
