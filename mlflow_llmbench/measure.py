"""The measurement of one cell: warm up, repeat, stamp, stop. The only module that reads the clock of a result.

Inside a timed region there is the model, one clock reading and one list append per token. Everything else (prompts,
noise counters, journal, garbage collection) happens between repetitions.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import machine
from .backends.base import Backend
from .errors import MeasurementError
from .metrics import LEAST_REPETITIONS
from .records import Cell, Repetition, RequestRecord
from .stats import halves_agree, relative_half_width
from .workload import PromptSet

LEAST_WARMUPS = 3
MOST_WARMUPS = 12

Say = Callable[..., None]
"""Called between timed regions with an event name and its data: journal, progress."""


@dataclass(frozen=True)
class Measured:
    """What `measure_cell` returns. `outputs` holds prompt and output ids of each prompt's first repetition, for text workloads."""

    first_call_ms: float
    warmup_s: tuple[float, ...]
    steady: bool
    repetitions: tuple[Repetition, ...]
    outputs: tuple[tuple[list[int], list[int]], ...]


def time_request(
    backend: Backend, prompts: Sequence[Sequence[int]], output_tokens: int, on_first: Callable[[], None] | None = None
) -> tuple[RequestRecord, list[Any]]:
    """Generate once and stamp each step. Returns the record and the steps as the backend emitted them.

    t0 is taken with the prompt ids on the host, t(i) when the i-th id of each row is on the host. The stamps are those
    of `time.perf_counter_ns`, a monotonic clock, which a change of the wall clock does not move. `on_first` is called after
    the first step, inside the timed region: for a call that is not measured.
    """
    clock = time.perf_counter_ns
    stamps: list[int] = []
    steps: list[Any] = []
    add_stamp, add_step = stamps.append, steps.append

    def emit(step: Any) -> None:
        add_stamp(clock())
        add_step(step)

    def emit_and_tell(step: Any) -> None:
        emit(step)
        if on_first and len(stamps) == 1:
            on_first()

    gc.disable()
    try:
        t0 = clock()
        backend.generate(prompts, output_tokens, emit_and_tell if on_first else emit)
    finally:
        gc.enable()
    return RequestRecord(t0, tuple(stamps), rows=len(prompts), prompt_tokens=len(prompts[0])), steps


def measure_cell(backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, say: Say) -> Measured:
    """Warm up with the shape of the cell until steady, then repeat until the throughput's interval is narrow enough.

    `say("warmup" | "repetition", …)` is called after each run, outside the timed region. Raises MeasurementError.
    """
    encode = backend.encode if backend.capabilities.tokenizer else None

    def rows(number: int) -> list[list[int]]:
        return prompts.batch(cell, number, vocab_size, encode)

    first_call_ms, warmup_s, steady = _warm_up(backend, cell, rows, say)
    gc.collect()
    gc.freeze()
    repetitions: list[Repetition] = []
    outputs: list[tuple[list[int], list[int]]] = []
    limit = cell.repetitions or cell.max_repetitions
    try:
        while len(repetitions) < limit and not enough(cell, repetitions):
            index = len(repetitions)
            batch = rows(index)
            wall_ms, before = int(time.time() * 1000), machine.take_readings(backend.device)
            record, steps = time_request(backend, batch, cell.output_tokens)
            noise = machine.noise_between(before, machine.take_readings(backend.device))
            ids = checked_ids(steps, len(batch))
            repetitions.append(Repetition(index, wall_ms, (record,), noise))
            if prompts.texts and index * (1 if cell.prompt_tokens is None else cell.batch_size) < len(prompts.texts):
                outputs.append((batch[0], [step[0] for step in ids]))
            say("repetition", number=index + 1, limit=limit, repetition=repetitions[-1])
    finally:
        gc.unfreeze()
    return Measured(first_call_ms, tuple(warmup_s), steady, tuple(repetitions), tuple(outputs))


def _warm_up(backend: Backend, cell: Cell, rows: Callable[[int], list[list[int]]], say: Say) -> tuple[float, list[float], bool]:
    """Discarded runs of the measured shape. Returns the first call in ms, all durations in s, and whether they became steady."""
    durations: list[float] = []
    fixed = cell.warmup is not None
    most = max(cell.warmup or 0, 1) if fixed else MOST_WARMUPS
    steady = False
    while len(durations) < most and not (steady and not fixed):
        first = None if durations else lambda: say("first_token")
        record, steps = time_request(backend, rows(len(durations)), cell.output_tokens, first)
        checked_ids(steps, record.rows)
        if not record.stamps_ns:
            raise MeasurementError("The backend generated no token at all. Nothing can be measured.")
        durations.append((record.stamps_ns[-1] - record.t0_ns) / 1e9)
        steady = len(durations) >= LEAST_WARMUPS and halves_agree(durations)
        say("warmup", number=len(durations), limit=most, seconds=durations[-1])
    return durations[0] * 1000, durations, steady


def enough(cell: Cell, repetitions: Sequence[Repetition]) -> bool:
    """Whether `auto` may stop: at least 5 that nothing spoiled, and the 95 % interval of the throughput within `precision_target`.

    A spoiled repetition is repeated, and both are kept: what is left out by hand is how wishes become results. On a machine
    that is never quiet, five more than the least are enough to know it; the verdict says `contended`.
    """
    clean = [r for r in repetitions if not (r.noise and r.noise.spoiled)]
    if cell.repetitions is not None or len(repetitions) < LEAST_REPETITIONS:
        return False
    if len(clean) < LEAST_REPETITIONS and len(repetitions) < 2 * LEAST_REPETITIONS:
        return False
    width = relative_half_width([throughput(repetition) for repetition in repetitions])
    return width is not None and width <= cell.precision_target


def throughput(repetition: Repetition) -> float:
    """Output tokens per second of one repetition: all tokens of all rows ÷ (last arrival − first sending)."""
    requests = repetition.requests
    tokens = sum(r.rows * r.output_tokens for r in requests)
    span = max(r.stamps_ns[-1] for r in requests) - min(r.t0_ns for r in requests)
    return tokens / span * 1e9


def checked_ids(steps: Sequence[Any], rows: int) -> list[list[int]]:
    """The steps as lists of ids; each must hold one id per row."""
    ids = [[int(i) for i in (step.tolist() if hasattr(step, "tolist") else step)] for step in steps]
    for number, step in enumerate(ids, 1):
        if len(step) != rows:
            raise MeasurementError(f"Step {number} brought {len(step)} tokens for {rows} rows. The backend does not emit one token per row.")
    return ids
