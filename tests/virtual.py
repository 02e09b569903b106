"""An executor in a scripted world: each cell has the figures that the world gives it, and no time passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlflow_llmbench.measure.events import StageMemory
from mlflow_llmbench.measure.outcome import CellSpan, Clock, GroupOutcome
from mlflow_llmbench.measure.task import Task
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import OutOfMemory
from mlflow_llmbench.records.results import CellMeasurements, LoadInfo
from mlflow_llmbench.sweeps.executor import MachineFacts, OnEvent, OnPause, SerialExecutor
from mlflow_llmbench.system import machine
from mlflow_llmbench.system.memory import HostMemory

from .results import WIGGLE, made


@dataclass(frozen=True)
class Figures:
    """Figures of a cell: ms to the first token and per further one, peak GB. `oom`: it runs out of memory instead.

    `factors` multiply the times of its repetitions: two that differ much make the cell suspect.
    """

    ttft: float = 20.0
    step: float = 10.0
    memory: float = 1.0
    oom: bool = False
    factors: tuple[float, ...] = WIGGLE


World = Callable[[Cell], Figures]


class VirtualExecutor(SerialExecutor):
    """Executor whose machine is the world. `measured` are the cells in the order in which they were measured."""

    def __init__(self, world: World) -> None:
        environment = machine.environment()
        super().__init__(MachineFacts(environment, (environment["hashes"]["env"],)))
        self.world = world
        self.measured: list[Cell] = []
        self.loads = 0

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Measure the submitted task, and the cells that a search adds to it."""
        task, next_cell = self.take()
        outcome = GroupOutcome(load=LoadInfo(1.0, weight_bytes=10**9), clock=Clock.now())
        self.loads += 1
        number = 0
        while number < len(task.cells):
            figures = self.world(task.cells[number])
            self.measured.append(task.cells[number])
            if figures.oom:
                outcome.cells[number] = CellSpan(number)
                outcome.fail(OutOfMemory("The world has no more memory."))
                break
            self._measure(task.cells[number], figures, number, outcome)
            number += 1
            if found := next_cell(task, outcome) if next_cell and number == len(task.cells) else None:
                on_pause(task, outcome)
                task = task.with_cell(*found)
        outcome.ended = True
        return task, outcome

    def _measure(self, cell: Cell, figures: Figures, number: int, outcome: GroupOutcome) -> None:
        peak = round(figures.memory * 1e9)
        repetitions = made(
            batch=cell.batch_size, step=figures.step, ttft=figures.ttft, factors=figures.factors
        ).repetitions
        memory = StageMemory("peak", HostMemory(peak, peak, peak), t_ns=1000 * number + 500)
        outcome.cells[number] = CellSpan(1000 * number, memory, ended_ns=1000 * number + 500)
        outcome.measured[number] = CellMeasurements(1.0, (1.0,), True, repetitions, ())
        outcome.texts[number] = ()
