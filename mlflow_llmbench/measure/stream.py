"""Measure a stream of requests that a model in this process answers in batches: static, dynamic or continuous.

Requests and arrival times are the same for each kind of batching. Latencies count from the arrival times, so they
include waiting for a batch. Static and dynamic batches are formed here. The backend generates them like any other
batch, padded to the longest prompt, until the longest answer ends. A row's tokens count as they arrive, up to its own
length: its latency does not include waiting for the rest of its batch. Continuous batching is done by the backend.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from ..backends.base import Backend, EngineBackend, Token
from ..records.cell import Cell
from ..records.errors import MeasurementError
from ..records.results import CellMeasurements, EngineReadings, Repetition, RequestRecord
from ..stats import is_steady
from ..system import machine
from ..workloads.arrivals import arrival_times_ns, request_count
from ..workloads.batching import batch_positions, needed_positions, next_batch
from ..workloads.prompts import PromptSet
from .batch import LEAST_WARMUPS, MOST_WARMUPS, checked_ids, time_request, zeros_at_end
from .events import RepetitionEnded, ReportProgress, WarmupEnded
from .stopping import enough

Order = tuple[list[int], int]
"""One request of a stream: its prompt ids and the requested number of output tokens."""


@dataclass(frozen=True)
class Served:
    """The result of a stream: each request with its output ids, in order, and the readings of the batching."""

    requests: tuple[RequestRecord, ...]
    outputs: tuple[list[int], ...]
    readings: EngineReadings


Serve = Callable[[Sequence[Order], Sequence[int]], Served]
"""Answers requests, which arrive at the given times in ns after the call."""


def measure_stream(
    backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, report: ReportProgress
) -> CellMeasurements:
    """Warm up with full batches, then repeat the stream until the throughput's interval is narrow enough.

    Each is reported after it, outside the timed region. Raises MeasurementError if the backend lacks this kind of
    batching or a request is answered without a token.
    """
    encode = backend.encode if backend.capabilities.tokenizer else None
    count = request_count(cell) or 1

    def orders(repetition: int, number: int) -> list[Order]:
        return [prompts.request(cell, repetition, i, vocab_size, encode) for i in range(number)]

    first = orders(0, count)
    with _server(backend, cell, max(len(ids) + output for ids, output in first)) as serve:
        first_call_ms, warmup_s, steady = _warm_up(
            cell, lambda number: orders(-1 - number, min(cell.batch_size, count)), serve, report
        )
        repetitions: list[Repetition] = []
        outputs: tuple[tuple[list[int], list[int]], ...] = ()
        zeros: list[int] = []
        limit = cell.repetitions or cell.max_repetitions
        while len(repetitions) < limit and not enough(cell, repetitions):
            index = len(repetitions)
            stream = orders(index, count) if index else first
            wall_ms, before = int(time.time() * 1000), machine.take_readings(backend.device)
            served = serve(stream, arrival_times_ns(cell, index) or (0,))
            noise = machine.noise_between(before, machine.take_readings(backend.device))
            repetitions.append(Repetition(index, wall_ms, served.requests, noise, engine=served.readings))
            zeros.append(zeros_at_end(served.outputs))
            if prompts.texts and not index:
                outputs = tuple((ids, out) for (ids, _), out in zip(stream, served.outputs, strict=True))[
                    : len(prompts.texts)
                ]
            report(RepetitionEnded(index + 1, limit, repetitions[-1]))
    return CellMeasurements(first_call_ms, tuple(warmup_s), steady, tuple(repetitions), outputs, zeros=tuple(zeros))


def serve_untimed(backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, index: int) -> None:
    """Answer the requests of a repetition once more, all of which arrive at once."""
    encode = backend.encode if backend.capabilities.tokenizer else None
    orders = [prompts.request(cell, index, i, vocab_size, encode) for i in range(request_count(cell) or 1)]
    with _server(backend, cell, max(len(ids) + output for ids, output in orders)) as serve:
        serve(orders, [0] * len(orders))


def _warm_up(
    cell: Cell, orders: Callable[[int], list[Order]], serve: Serve, report: ReportProgress
) -> tuple[float, list[float], bool]:
    """Make discarded runs of full batches whose requests arrive all at once.

    Return the first duration in ms, all durations in s, and whether they became steady.
    """
    fixed = cell.warmup is not None
    most = max(cell.warmup or 0, 1) if fixed else MOST_WARMUPS
    durations: list[float] = []
    steady = False
    while len(durations) < most and not (steady and not fixed):
        stream = orders(len(durations))
        requests = serve(stream, [0] * len(stream)).requests
        durations.append((max(r.stamps_ns[-1] for r in requests) - min(r.t0_ns for r in requests)) / 1e9)
        steady = len(durations) >= LEAST_WARMUPS and is_steady(durations)
        report(WarmupEnded(len(durations), most, durations[-1], until_steady=not fixed or None))
    return durations[0] * 1000, durations, steady


@contextlib.contextmanager
def _server(backend: Backend, cell: Cell, longest: int) -> Iterator[Serve]:
    """Provide the function that answers the requests of a cell.

    `longest` is the most tokens of a prompt and its answer. Raises MeasurementError if the backend lacks this batching.
    """
    able = backend.capabilities.continuous if cell.batching == "continuous" else backend.capabilities.padding
    if not able:
        raise MeasurementError(
            f"backend={cell.backend} has no {cell.batching} batching. Use backend=transformers or another batching."
        )
    if cell.batching != "continuous":
        yield lambda stream, due_ns: serve_batches(backend, cell, stream, due_ns)
        return
    log = _StepLog()
    engine = cast(EngineBackend, backend).open_engine(cell.batch_size, longest, log.take)

    def serve(stream: Sequence[Order], due_ns: Sequence[int]) -> Served:
        log.clear()
        engine.take_positions()
        started = time.perf_counter_ns()
        sent: list[int] = []
        gc.disable()
        try:
            for number, (ids, output) in enumerate(stream):
                _sleep_until(started + due_ns[number])
                sent.append(time.perf_counter_ns())
                engine.submit(number, ids, output)
            engine.wait()
        finally:
            gc.enable()
        return log.served(stream, [started + due for due in due_ns], sent, engine.take_positions())

    try:
        yield serve
    finally:
        engine.close()


def serve_batches(backend: Backend, cell: Cell, stream: Sequence[Order], due_ns: Sequence[int]) -> Served:
    """Answer a stream in static or dynamic batches, each of which runs to its end.

    A request counts as sent at its intended arrival, since only the batching can delay it.
    """
    wait_ns = None if cell.batching == "static" else int(cell.batch_wait_ms * 1e6)
    started = time.perf_counter_ns()
    intended = [started + due for due in due_ns]
    done: list[tuple[RequestRecord, list[object]]] = []
    begun = 0
    while begun < len(stream):
        begin_ns, count = next_batch(intended[begun:], time.perf_counter_ns(), cell.batch_size, wait_ns)
        group = stream[begun : begun + count]
        _sleep_until(begin_ns)
        done.append(time_request(backend, [ids for ids, _ in group], max(output for _, output in group)))
        begun += count
    requests: list[RequestRecord] = []
    outputs: list[list[int]] = []
    positions = 0
    for record, steps in done:
        group = stream[len(requests) : len(requests) + record.rows]
        ids = checked_ids(steps, record.rows)
        positions += batch_positions([(len(prompt), output) for prompt, output in group])
        for row, order in enumerate(group):
            at = intended[len(requests)]
            requests.append(_record(order, at, at, record.stamps_ns[: order[1]]))
            outputs.append([step[row] for step in ids[: order[1]]])
    readings = EngineReadings(positions, _needed(stream), tuple(record.rows for record, _ in done))
    return Served(tuple(requests), tuple(outputs), readings)


@dataclass
class _StepLog:
    """Log of an engine's steps as they arrive, written in the engine's thread."""

    stamps_ns: list[int] = field(default_factory=list)
    steps: list[Sequence[Token]] = field(default_factory=list)

    def take(self, step: Sequence[Token]) -> None:
        """Stamp one step, whose tokens are on the host."""
        self.stamps_ns.append(time.perf_counter_ns())
        self.steps.append(step)

    def clear(self) -> None:
        """Forget all steps."""
        self.stamps_ns.clear()
        self.steps.clear()

    def served(
        self, stream: Sequence[Order], intended: Sequence[int], sent: Sequence[int], positions: int | None
    ) -> Served:
        """Return the steps grouped by request."""
        stamps: list[list[int]] = [[] for _ in stream]
        outputs: list[list[int]] = [[] for _ in stream]
        lags = []
        for stamp, step in zip(self.stamps_ns, self.steps, strict=True):
            lags.append(stamp - min(token.engine_ns for token in step))
            for token in step:
                stamps[token.request].append(stamp)
                outputs[token.request].append(token.id)
        requests = [_record(*one) for one in zip(stream, intended, sent, map(tuple, stamps), strict=True)]
        return Served(tuple(requests), tuple(outputs), EngineReadings(positions, _needed(stream), lags_ns=tuple(lags)))


def _needed(stream: Sequence[Order]) -> int:
    return needed_positions([(len(ids), output) for ids, output in stream])


def _record(order: Order, intended_ns: int, sent_ns: int, stamps_ns: tuple[int, ...]) -> RequestRecord:
    ids, output = order
    if not stamps_ns:
        raise MeasurementError("A request was answered without a token. Nothing can be measured.")
    return RequestRecord(
        sent_ns,
        stamps_ns,
        prompt_tokens=len(ids),
        intended_ns=intended_ns,
        end_ns=stamps_ns[-1],
        asked=(len(ids), output),
    )


def _sleep_until(at_ns: int) -> None:
    """Sleep without spinning, since an engine's thread may need this core. The delay is measured."""
    while (left := at_ns - time.perf_counter_ns()) > 0:
        time.sleep(left / 1e9)
