"""Measure one cell on a server: warm up, repeat the load, parse the answers.

A repetition is one run of the whole load, from an idle server to the last answer. Repetitions are thus independent, and
no request belongs to two of them; intervals over windows of one long run would mistake slow drift for noise. Answers
are parsed between repetitions.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

from ..backends.base import ServerBackend
from ..loadgen.client import Load, Trace
from ..records.cell import Cell
from ..records.errors import MeasurementError
from ..records.results import CellMeasurements, ClientReadings, Repetition, RequestRecord
from ..stats import is_steady
from ..system import machine
from ..workloads.arrivals import arrival_times_ns, request_count
from ..workloads.prompts import PromptSet, lengths_of, lengths_vary
from .batch import LEAST_WARMUPS, MOST_WARMUPS
from .events import RepetitionEnded, ReportProgress, WarmupEnded
from .shared_tokens import shared_requests, shared_turns
from .stopping import enough

WARM_USERS = 4
"""Concurrent requests in the warm-up of an open loop, which has no number of users."""

PROCESS_SHARE = 0.5
"""Most CPU use that is planned for a client process, as a share of its core; far below that of an invalid run."""

EXPECTED_MARGIN = 1.5
"""Requests built before a load of a given duration, as a multiple of the number expected from the warm-up."""


def measure_server(server: ServerBackend, cell: Cell, prompts: PromptSet, report: ReportProgress) -> CellMeasurements:
    """Warm up with waves of the cell's requests, then repeat the load until the throughput's interval is narrow enough.

    Each is reported after it, outside the timed region. Raises MeasurementError if every request of a warm-up wave or
    of a repetition failed.
    """
    first_call_ms, warmup_s, steady, last_wave = _warm_up(server, cell, prompts, report)
    repetitions: list[Repetition] = []
    limit = cell.repetitions or cell.max_repetitions
    count = request_count(cell)
    while len(repetitions) < limit and not enough(cell, repetitions, local=False):
        index = len(repetitions)
        load = Load(count, cell.concurrency, cell.duration_s, arrival_times_ns(cell, index))
        processes = cell.client_processes or _processes_for(load, last_wave)
        wall_ms, before = int(time.time() * 1000), machine.take_readings(server.device)
        trace = server.send(prompts, cell, index, load, _expected(cell, warmup_s[-1]), processes)
        noise = machine.noise_between(before, machine.take_readings(server.device))
        requests = _records(server, cell, prompts, trace)
        complete = _complete(requests)
        failed = tuple(request for request in requests if request.outcome != "complete")
        repetitions.append(
            Repetition(
                index, wall_ms, complete, noise, failed=failed, client=_readings(trace), server=server.readings(trace)
            )
        )
        report(RepetitionEnded(index + 1, limit, repetitions[-1]))
    return CellMeasurements(first_call_ms, tuple(warmup_s), steady, tuple(repetitions), ())


def _records(server: ServerBackend, cell: Cell, prompts: PromptSet, trace: Trace) -> list[RequestRecord]:
    """Return the records of a load's requests, with what was asked of each and what it shares with earlier ones."""
    records = [_with_asked(server.read(exchange), cell, exchange.number) for exchange in trace.exchanges]
    if cell.history == "sent":
        return shared_turns(records, cell, prompts.conversations)
    return shared_requests(records, cell, [exchange.number for exchange in trace.exchanges])


def _with_asked(request: RequestRecord, cell: Cell, number: int) -> RequestRecord:
    """Return the record with its requested lengths, if these vary between requests."""
    return dataclasses.replace(request, asked=lengths_of(cell, number)) if lengths_vary(cell) else request


def _expected(cell: Cell, answer_s: float) -> int:
    """Estimate, with a margin, the requests of a closed loop of a given duration, so that all are built before it."""
    if cell.duration_s is None:
        return cell.concurrency
    return math.ceil(cell.concurrency * (EXPECTED_MARGIN * cell.duration_s / max(answer_s, 0.001) + 1))


def _readings(trace: Trace) -> ClientReadings:
    return ClientReadings(
        trace.started_ns, trace.ended_ns, trace.lags_ns, trace.cpu_s, trace.retries, tuple(map(_readings, trace.parts))
    )


def _processes_for(load: Load, wave: Trace) -> int:
    """Return the client processes that a load needs so that each uses at most `PROCESS_SHARE` of its core.

    The estimate is based on the CPU time of a warm-up wave: for a closed loop, the CPU use of all its users in the
    wave; for an open loop, CPU seconds per request × request rate. One core is left for the server.
    """
    busy = wave.cpu_s / max(1e-9, (wave.ended_ns - wave.started_ns) / 1e9)
    if load.arrivals_ns is not None:
        busy = wave.cpu_s / len(wave.exchanges) * len(load.arrivals_ns) / max(1e-9, load.arrivals_ns[-1] / 1e9)
    return max(1, min(math.ceil(busy / PROCESS_SHARE), machine.within_quota(len(machine.usable_cpus())) - 1))


def _complete(requests: Sequence[RequestRecord]) -> tuple[RequestRecord, ...]:
    """Return the complete requests. Raises MeasurementError if there are none, since only they have latencies."""
    complete = tuple(request for request in requests if request.outcome == "complete")
    if complete:
        return complete
    (outcome, message), _ = Counter((r.outcome, r.message) for r in requests).most_common(1)[0]
    raise MeasurementError(
        f"None of {len(requests)} requests was complete, mostly {outcome}: {message} "
        "Check the server's log and the load."
    )


def _warm_up(
    server: ServerBackend, cell: Cell, prompts: PromptSet, report: ReportProgress
) -> tuple[float, list[float], bool, Trace]:
    """Send discarded waves of one request per user.

    Return the first answer in ms, the median answer of each wave in s, whether the waves became steady, and the last
    wave. Raises MeasurementError if no request of a wave was complete.
    """
    fixed = cell.warmup is not None
    most = max(cell.warmup or 0, 1) if fixed else MOST_WARMUPS
    users = cell.concurrency if not cell.open_loop else WARM_USERS
    durations: list[float] = []
    first_ms = 0.0
    steady = False
    while len(durations) < most and not (steady and not fixed):
        trace = server.send(prompts, cell, -1 - len(durations), Load(users, users))
        complete = _complete([server.read(exchange) for exchange in trace.exchanges])
        seconds = [(r.stamps_ns[-1] - r.t0_ns) / 1e9 for r in complete]
        first_ms = first_ms or seconds[0] * 1000
        durations.append(median(seconds))
        steady = len(durations) >= LEAST_WARMUPS and is_steady(durations)
        report(WarmupEnded(len(durations), most, durations[-1], until_steady=not fixed or None))
    return first_ms, durations, steady, trace
