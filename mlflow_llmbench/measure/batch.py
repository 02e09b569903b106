"""Measure one cell in process: warm up, repeat, stamp, stop.

A timed region contains only the model and, per token, one clock reading and two list appends. Everything else (prompts,
noise counters, journal, garbage collection) happens between repetitions.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..backends.base import Backend, DecodingBackend, EndingBackend, ForwardBackend, History
from ..backends.parallel import ParallelBackend, rank_pids
from ..records.cell import Cell
from ..records.errors import MeasurementError
from ..records.results import CellMeasurements, Repetition, RequestRecord, TextTimes
from ..stats import is_steady
from ..system import machine
from ..system.garbage import frozen_heap
from ..workloads.prompts import PromptSet
from .events import FirstToken, RepetitionEnded, ReportProgress, WarmupEnded
from .stopping import enough

LEAST_WARMUPS = 3
MOST_WARMUPS = 12

MOST_FORWARDS = 10
"""Most timed forward passes alone: as many runs as the paper's evaluation has."""


@dataclass(frozen=True)
class Timed:
    """One run of a cell: its request, or one request per turn of a conversation.

    `prompt` and `output` are the ids of the first row in the last request, `zeros` the most zeros at a row's end in it.
    """

    requests: tuple[RequestRecord, ...]
    prompt: list[int]
    output: list[int]
    zeros: int = 0

    @property
    def seconds(self) -> float:
        """Seconds from the first sending to the last arrival."""
        return (self.requests[-1].stamps_ns[-1] - self.requests[0].t0_ns) / 1e9


def time_request(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    output_tokens: int,
    on_first: Callable[[], None] | None = None,
    history: History | None = None,
) -> tuple[RequestRecord, list[Any]]:
    """Generate once and stamp each step. Return the record and the steps as the backend emitted them.

    Prompt tokens that `history` holds are not computed; their number is `cached_tokens` of the record.

    t0 is taken with the prompt ids on the host, t(i) when the i-th id of each row is on the host. Stamps are ns of
    `time.perf_counter_ns`, a monotonic clock that changes of the wall clock do not affect. `on_first` is called after
    the first step, inside the timed region: use it only in warm-ups.
    """
    clock = time.perf_counter_ns
    stamps: list[int] = []
    steps: list[Any] = []
    add_stamp, add_step = stamps.append, steps.append

    def emit(step: Any) -> None:
        add_stamp(clock())
        add_step(step)

    def emit_and_report(step: Any) -> None:
        emit(step)
        if on_first and len(stamps) == 1:
            on_first()

    chosen = emit_and_report if on_first else emit
    if rank_pids(backend):
        cast(ParallelBackend, backend).ready(prompts, output_tokens)
    kept = {} if history is None else {"history": history}
    cached = None if history is None else history.tokens
    gc.disable()
    try:
        t0 = clock()
        backend.generate(prompts, output_tokens, chosen, **kept)
    finally:
        gc.enable()
    counted: dict[str, Any] = {}
    if any(map(_is_wide, steps)):
        sizes = tuple(len(step[0]) if _is_wide(step) else 1 for step in steps)
        counted = {"tokens": sum(sizes), "chunk_tokens": sizes}
    return RequestRecord(
        t0, tuple(stamps), rows=len(prompts), prompt_tokens=len(prompts[0]), cached_tokens=cached, **counted
    ), steps


def _is_wide(step: Any) -> bool:
    """Return True if a step holds a sequence of tokens for each row instead of one token."""
    return (
        hasattr(step, "__len__") and len(step) > 0 and hasattr(step[0], "__len__") and getattr(step[0], "ndim", 1) > 0
    )


def time_turns(
    backend: Backend,
    turns: Sequence[Sequence[Sequence[int]]],
    output_tokens: int,
    kept: bool = False,
    on_first: Callable[[], None] | None = None,
) -> Timed:
    """Send turns one after another, each with the whole conversation before it. A single prompt is one turn.

    `turns` holds for each turn the ids that it adds to each row. Answers in the history are the ids that the model
    itself generated. With `kept`, the KV cache of previous turns and answers is kept.
    """
    history = backend.new_history() if kept else None
    rows: list[list[int]] = [[] for _ in turns[0]]
    requests: list[RequestRecord] = []
    prompt, output = rows[0], rows[0]
    ids: list[list[int]] = []
    for added in turns:
        rows = [[*row, *more] for row, more in zip(rows, added, strict=True)]
        record, steps = time_request(backend, rows, output_tokens, None if requests else on_first, history)
        requests.append(record)
        ids = checked_ids(steps, len(rows))
        prompt, output = rows[0], [step[0] for step in ids]
        rows = [[*row, *answer] for row, answer in zip(rows, zip(*ids, strict=True), strict=True)] if ids else rows
    return Timed(tuple(requests), prompt, output, zeros_at_end(zip(*ids, strict=True)))


def zeros_at_end(rows: Iterable[Sequence[int]]) -> int:
    """Return the most ids 0 at the end of a row: the id that is chosen from logits that are all NaN."""
    return max((sum(1 for _ in itertools.takewhile(lambda i: i == 0, reversed(row))) for row in rows), default=0)


def measure_cell(
    backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, report: ReportProgress
) -> CellMeasurements:
    """Warm up with the shape of the cell until steady, then repeat until the throughput's interval is narrow enough.

    Each run is reported after it, outside the timed region. Raises MeasurementError if the backend generates no token
    or a malformed step.
    """

    def turns(number: int) -> list[list[list[int]]]:
        return turns_of(backend, cell, prompts, vocab_size, number)

    first_call_ms, warmup_s, steady = _warm_up(backend, cell, turns, report)
    repetitions: list[Repetition] = []
    outputs: list[tuple[list[int], list[int]]] = []
    zeros: list[int] = []
    limit, ranks = cell.repetitions or cell.max_repetitions, rank_pids(backend)
    with frozen_heap():
        while len(repetitions) < limit and not enough(cell, repetitions):
            index = len(repetitions)
            sent = turns(index)
            wall_ms, before = int(time.time() * 1000), machine.take_readings(backend.device, ranks)
            timed = time_turns(backend, sent, cell.output_tokens, cell.history == "kept")
            noise = machine.noise_between(before, machine.take_readings(backend.device, ranks))
            repetitions.append(Repetition(index, wall_ms, timed.requests, noise))
            zeros.append(timed.zeros)
            if prompts.texts and index * (1 if cell.prompt_tokens is None else cell.batch_size) < len(prompts.texts):
                outputs.append((timed.prompt, timed.output))
            report(RepetitionEnded(index + 1, limit, repetitions[-1]))
    return CellMeasurements(
        first_call_ms, tuple(warmup_s), steady, tuple(repetitions), tuple(outputs), zeros=tuple(zeros)
    )


def turns_of(backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, number: int) -> list[list[list[int]]]:
    """Return the turns of repetition `number`: one batch of prompts, or a conversation, the same one in every row."""
    if cell.history == "none":
        return [prompts.batch(cell, number, vocab_size, backend.encode if backend.capabilities.tokenizer else None)]
    asks = prompts.conversations[number % len(prompts.conversations)].asks
    return [[list(ids)] * cell.batch_size for ids in backend.encode_turns(asks)]


def compare_replies(backend: Backend, cell: Cell, prompts: PromptSet, measured: CellMeasurements) -> tuple[bool, ...]:
    """Compare kept and recomputed history. Return per turn of the first conversation whether the answers are the same.

    Each turn gets the ids of the kept history, so a different answer does not make the next ones differ. Not timed.
    """
    prompt, output = measured.outputs[0]
    conversation, same, end = [*prompt, *output], [], 0
    for added in turns_of(backend, cell, prompts, 0, 0):
        end += len(added[0])
        again = time_turns(backend, [[conversation[:end]] * cell.batch_size], cell.output_tokens)
        same.append(again.output == conversation[end : end + cell.output_tokens])
        end += cell.output_tokens
    return tuple(same)


def time_texts(
    backend: Backend, texts: Sequence[Mapping[str, str]], outputs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> TextTimes:
    """Time the tokenizer: encode each prompt and decode each output, one text after another, in this thread."""
    clock = time.perf_counter_ns
    stamps = []
    for text, (_, output) in zip(texts, outputs, strict=True):
        begun = clock()
        backend.encode(text["prompt"])
        encoded = clock()
        backend.decode(output)
        stamps.append((encoded - begun, clock() - encoded))
    return TextTimes(tuple(one for one, _ in stamps), tuple(other for _, other in stamps))


def time_forward(
    backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, repetitions: int
) -> tuple[int, ...]:
    """Time the forward pass over the prompts alone, without `generate`: ns for each of at most `MOST_FORWARDS` runs.

    The prompts are those of the first repetitions; one run before them is discarded. Empty if the backend has no such
    pass, for conversations, and for a model in several ranks. Called after the peak memory was read.
    """
    if not hasattr(backend, "forward") or cell.history != "none" or rank_pids(backend):
        return ()
    forward, found = cast(ForwardBackend, backend).forward, []
    for number in (0, *range(min(repetitions, MOST_FORWARDS))):
        [rows] = turns_of(backend, cell, prompts, vocab_size, number)
        gc.disable()
        try:
            begun = time.perf_counter_ns()
            forward(rows)
            found.append(time.perf_counter_ns() - begun)
        finally:
            gc.enable()
    return tuple(found[1:])


def natural_lengths(
    backend: Backend, outputs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[int | None, ...] | None:
    """Return the tokens of each output up to the one by which the model ends its answer; None for one that has none.

    None for all if it is not known by which tokens the model ends. Generating goes on after that token, and greedy
    decoding chooses the same ones before it, whether it stops there or not.
    """
    ends = cast(EndingBackend, backend).ends if hasattr(backend, "ends") else ()
    if not ends or not outputs:
        return None
    return tuple(next((n for n, one in enumerate(output, 1) if one in ends), None) for _, output in outputs)


def compare_decoding(backend: DecodingBackend, cell: Cell, prompts: PromptSet, vocab_size: int) -> tuple[int, ...]:
    """Count, per row of the first repetition, the output tokens before the first difference from plain decoding.

    Only the first turn of a conversation is compared. Not timed.
    """
    sent = turns_of(backend, cell, prompts, vocab_size, 0)[0]
    outputs = []
    for generate in (backend.generate, backend.generate_plainly):
        steps: list[Any] = []
        generate(sent, cell.output_tokens, steps.append)
        outputs.append(list(zip(*checked_ids(steps, len(sent)), strict=True)))
    return tuple(
        sum(1 for _ in itertools.takewhile(bool, map(operator.eq, own, plain)))
        for own, plain in zip(*outputs, strict=True)
    )


def _warm_up(
    backend: Backend, cell: Cell, turns: Callable[[int], list[list[list[int]]]], report: ReportProgress
) -> tuple[float, list[float], bool]:
    """Make discarded runs of the measured shape. Return the first in ms, all in s, and whether they became steady.

    Conversations differ in their number of turns, so the first one is always used to judge steadiness.
    """
    durations: list[float] = []
    fixed = cell.warmup is not None
    most = max(cell.warmup or 0, 1) if fixed else MOST_WARMUPS
    steady = False
    while len(durations) < most and not (steady and not fixed):
        first = None if durations else functools.partial(report, FirstToken())
        timed = time_turns(
            backend,
            turns(len(durations) if cell.history == "none" else 0),
            cell.output_tokens,
            cell.history == "kept",
            first,
        )
        if not all(record.stamps_ns for record in timed.requests):
            raise MeasurementError("The backend generated no token. Nothing can be measured.")
        durations.append(timed.seconds)
        steady = len(durations) >= LEAST_WARMUPS and is_steady(durations)
        report(WarmupEnded(len(durations), most, durations[-1], until_steady=not fixed or None))
    return durations[0] * 1000, durations, steady


def checked_ids(steps: Sequence[Any], rows: int) -> list[list[int]]:
    """Return the ids by token: tokens × rows.

    Each step must hold one id per row, or the same number of ids for every row. Raises MeasurementError otherwise.
    """
    ids: list[list[int]] = []
    for number, step in enumerate(steps, 1):
        if hasattr(step, "__len__") and len(step) != rows:
            raise MeasurementError(
                f"Step {number} has {len(step)} tokens for {rows} rows. The backend must emit one token per row."
            )
        held = step.tolist() if hasattr(step, "tolist") else step
        try:
            ids += [[int(i) for i in token] for token in (zip(*held, strict=True) if _is_wide(step) else [held])]
        except (TypeError, ValueError):
            raise MeasurementError(
                f"Step {number} is not a list of ids: {repr(step)[:80]}. Emit one integer for each row."
            ) from None
    return ids
