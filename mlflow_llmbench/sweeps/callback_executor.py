"""Measure a `generate` function of the user's own in this process, as a worker would measure a backend."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

from ..backends.callback import CallbackBackend, Generate
from ..measure.batch import measure_cell
from ..measure.events import CellBegun, CellCompleted, CellMeasured, CellProgress, FirstToken, GroupBegun
from ..measure.journal import EventLog, write_text
from ..measure.outcome import Clock, GroupOutcome
from ..measure.task import Task
from ..records.errors import LlmbenchError, OutOfMemory
from ..system import machine
from ..workloads.prompts import load_prompts
from .executor import MachineFacts, OnEvent, OnPause, SerialExecutor


class CallbackExecutor(SerialExecutor):
    """Executor that calls a function in this process. It has no memory limit: the function's need is unknown."""

    def __init__(self, device: str, encode: Callable[[str], Sequence[int]] | None, vocab_size: int) -> None:
        environment = machine.environment()
        super().__init__(MachineFacts(environment, (environment["hashes"]["env"],)))
        self.device, self.encode, self.vocab_size = device, encode, vocab_size
        self.function: Generate | None = None

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Measure the submitted task, as a worker would."""
        task, _ = self.take()
        on_event(task, GroupBegun())
        backend = self._backend(task)
        outcome = GroupOutcome(load=backend.describe(), clock=Clock.now())
        try:
            for number in range(len(task.cells)):
                self._measure(backend, task, number, outcome, on_event)
        except KeyboardInterrupt:
            outcome.interrupted = True
        except MemoryError:
            outcome.fail(OutOfMemory("Memory ran out."))
        except LlmbenchError as error:
            outcome.fail(error)
        if backend.raised:
            write_text(task.folders[0] / "worker.log", backend.raised)
        outcome.ended = True
        return task, outcome

    def _backend(self, task: Task) -> CallbackBackend:
        backend = CallbackBackend(task.cells[0], task.model)
        backend.function, backend.encoder, backend.device, backend.vocab_size = (
            self.function,
            self.encode,
            self.device,
            self.vocab_size,
        )
        backend.capabilities = dataclasses.replace(backend.capabilities, tokenizer=self.encode is not None)
        return backend

    def _measure(
        self, backend: CallbackBackend, task: Task, number: int, outcome: GroupOutcome, on_event: OnEvent
    ) -> None:
        cell = task.cells[number]
        begun = CellBegun(number, t_ns=time.perf_counter_ns())
        outcome.take(begun)
        on_event(task, begun)
        with contextlib.closing(EventLog(task.folders[number] / "events.jsonl")) as log:

            def report(event: CellProgress) -> None:
                if not isinstance(event, FirstToken):
                    log.append(event)
                on_event(task, event.of_cell(number))

            measured = measure_cell(backend, cell, load_prompts(cell.workload), self.vocab_size, report)
            outcome.take(CellMeasured(number, measured, t_ns=time.perf_counter_ns()))
            log.append(CellCompleted(measured.steady, measured.first_call_ms))
        on_event(task, CellMeasured(number))
