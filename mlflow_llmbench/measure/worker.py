"""The worker process: load a model once, measure the cells that share it, journal every repetition, unload.

`python -m mlflow_llmbench.measure.worker` reads one job (JSON) from standard input and writes events as JSON lines to
standard output. Nothing else can write there: output of libraries goes to the log. It does not use MLflow.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ..backends.base import Backend, DecodingBackend, PlacingBackend, ServerBackend, backend_class
from ..backends.libraries import import_libraries
from ..backends.parallel import ParallelBackend, device_of, host_of, rank_pids
from ..records.backends import capabilities_of
from ..records.cell import Cell
from ..records.codec import from_json
from ..records.errors import LlmbenchError, MeasurementError, first_line
from ..records.results import LoadInfo, ModelFacts
from ..system import machine, memory, placement
from ..workloads.prompts import PromptSet, load_prompts
from . import events
from .batch import compare_decoding, compare_replies, measure_cell, natural_lengths, time_forward, time_texts, turns_of
from .events import Event, JobFailed, Report, Stage
from .journal import SERVER_LOG, EventLog
from .logits import check_logits
from .online import measure_server
from .stream import measure_stream
from .task import OFFLOADED, QualityOrder, WorkerJob

LINES_PER_MESSAGE = 3
"""Times that one log message is written. bitsandbytes logs one per matrix product, 100 000 in a minute."""


class Flood(logging.Handler):
    """A log handler that writes each distinct message `LINES_PER_MESSAGE` times, then only counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count the message, and write it unless it was written often enough."""
        key = (record.name, str(record.msg))
        self.counts[key] += 1
        if self.counts[key] <= LINES_PER_MESSAGE:
            sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")

    def summary(self) -> list[str]:
        """Return the 50 most frequent messages, each with its count."""
        return [f"{name}: {message} (× {count})" for (name, message), count in self.counts.most_common(50)]


def main() -> int:
    """Run the job on standard input. Return the exit code: 0 if its events report the end, success or failure."""
    machine.die_with_parent()
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a closed terminal signal the whole group; the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    flood = _tame_logs()

    def send(event: Event) -> None:
        pipe.write(events.encode(replace(event, t_ns=time.perf_counter_ns())) + "\n")

    job = WorkerJob.from_line(sys.stdin.readline())
    try:
        TASKS[job.task](job, send)
    except LlmbenchError as error:
        send(JobFailed(getattr(error, "outcome", "error"), type(error).__name__, str(error)))
    except MemoryError:
        send(JobFailed("oom", "OutOfMemory", "Memory ran out."))
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__
        send(JobFailed("error", kind, f"{kind}: {first_line(error)}"))
    send(events.JobEnded(tuple(flood.summary())))
    pipe.close()
    return 0


def _prepare(job: WorkerJob, send: Report) -> None:
    """Put the model's files on this machine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that an incomplete checkpoint is removed
    backend_class(job.cells[0].backend).prepare(job.cells[0], job.facts)


def _resolve(job: WorkerJob, send: Report) -> None:
    """Send the facts of the model."""
    send(events.ModelResolved(backend_class(job.cells[0].backend).resolve(job.cells[0])))


def _measure_group(job: WorkerJob, send: Report) -> None:
    """Load the model, measure the cells, evaluate the quality, and unload."""
    send(Stage("starting"))
    backend = _backend(job)
    with _ranks(backend, job.cells[0], send):
        _measure_cells(backend, job, send)


def _backend(job: WorkerJob) -> Backend:
    """Import the libraries of a job's backend, and make it."""
    kind, cell = backend_class(job.cells[0].backend), job.cells[0]
    import_libraries(kind.capabilities, job.threads)
    backend = kind(cell, job.facts)
    if cell.placement == placement.AUTO and "placement" in kind.capabilities.parameters:
        needs = placement.working(job.cells, job.facts, job.quality is not None)
        cast(PlacingBackend, backend).make_room(job.memory_bytes, needs, job.folders[0] / OFFLOADED)
    return backend


def _measure_cells(backend: Backend, job: WorkerJob, send: Report) -> None:
    cells, facts = job.cells, job.facts
    send(events.PeaksMeasured(backend.peaks(), machine.idle_power_w(backend.device)))
    gc.collect()
    _reset_peaks(backend)
    _stage("baseline", backend, send)
    send(Stage("loading"))
    info = _launch(cast(ServerBackend, backend), job.folders[0], send) if cells[0].launch else backend.load()
    gc.collect()
    backend.trim()  # the loader's scratch is not the model's
    send(events.ModelLoaded(info))
    _stage("loaded", backend, send)
    with _unloading(backend, send):
        for number, (cell, folder) in enumerate(_cells(job, send)):
            _measure_one(backend, cell, number, folder, info, facts.context, send)
        if job.quality:
            _pause(job, send)
            _evaluate(backend, job.quality, facts.context, send)


@contextlib.contextmanager
def _ranks(backend: Backend, cell: Cell, send: Report) -> Iterator[None]:
    """Start the other ranks of a cell with several, and end them at the end, whatever has happened."""
    if cell.tensor_parallel == 1 or "tensor_parallel" not in backend.capabilities.parameters:
        yield
        return
    parallel = cast(ParallelBackend, backend)
    try:
        parallel.start_ranks()
        send(events.RanksStarted(rank_pids(backend)))
        yield
    finally:
        parallel.end_ranks()


@contextlib.contextmanager
def _unloading(backend: Backend, send: Report) -> Iterator[None]:
    """Unload the model at the end and report the memory.

    An error of the unloading does not replace an earlier one: after an error of CUDA, every further call fails too.
    """
    try:
        yield
    except BaseException:
        try:
            _unload(backend, send)
        except Exception as error:
            print(f"Unloading failed too: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        raise
    _unload(backend, send)


def _unload(backend: Backend, send: Report) -> None:
    backend.close()
    gc.collect()
    memory.trim()  # empty the C allocator's cache like the device's, so that the reading has only memory in use
    _stage("unloaded", backend, send)


def _cells(job: WorkerJob, send: Report) -> Iterator[tuple[Cell, Path]]:
    """Yield the cells of a job with their folders; in a search, then those that the parent chooses from the results."""
    for number, planned in enumerate(zip(job.cells, job.folders, strict=True)):
        if number:
            _pause(job, send)
        yield planned
    while job.searches:
        send(events.CellRequested())
        found = json.loads(sys.stdin.readline() or "null")
        if found is None:
            return
        yield from_json(Cell, found["cell"]), Path(found["folder"])


def _pause(job: WorkerJob, send: Report) -> None:
    """Wait until the parent has kept the cell that was measured last, so that it does not work beside the next one."""
    if job.pauses:
        send(events.PauseBegun())
        sys.stdin.readline()


def _launch(backend: ServerBackend, folder: Path, send: Report) -> LoadInfo:
    """Start the server of a group's cells and return its facts.

    It ends with this process, and at once if it is not the requested one.
    """
    try:
        backend.launch(
            folder / SERVER_LOG,
            lambda keeper, seen: send(events.ServerLaunched(keeper, from_json(memory.HostMemory, seen))),
        )
        return backend.load()
    except LlmbenchError:
        backend.close()
        raise


def _evaluate(backend: Backend, order: QualityOrder, context: int | None, send: Report) -> None:
    """Measure the quality of the loaded model. Its modules are not in memory before that."""
    from . import evaluation

    evaluation.evaluate(backend, order, context, send)


def _loaded(job: WorkerJob, send: Report) -> tuple[Backend, ModelFacts, LoadInfo]:
    """Load the model of a job's first cell without measuring it."""
    backend = _backend(job)
    send(Stage("loading"))
    return backend, job.facts, backend.load()


def _evaluate_alone(job: WorkerJob, send: Report) -> None:
    """Measure only the quality of a model."""
    backend, facts, info = _loaded(job, send)
    send(events.ModelLoaded(info))
    assert job.quality
    _evaluate(backend, job.quality, facts.context, send)


def _train(job: WorkerJob, send: Report) -> None:
    """Train a model and write the checkpoint."""
    assert job.training
    send(Stage("starting"))
    import_libraries(capabilities_of(job.cells[0].backend), job.threads)
    from ..backends.huggingface import qat

    qat.train(job.cells[0], job.facts, job.training, TrainingEvents(send))


@dataclass(frozen=True)
class TrainingEvents:
    """Sender of the events of a training (`qat.TrainingReport`)."""

    send: Report

    def stage(self, name: str) -> None:
        """Send the beginning of a stage."""
        self.send(Stage(name))

    def planned(self, trained: int, frozen: int, layers: int, needed: int, sequences: int) -> None:
        """Send the plan."""
        self.send(events.TrainingPlanned(trained, frozen, layers, needed, sequences))

    def step(self, number: int, limit: int, loss: float) -> None:
        """Send a step that is done."""
        self.send(events.TrainingStep(number, limit, loss))

    def saved(self, folder: str) -> None:
        """Send the folder of the checkpoint."""
        self.send(events.CheckpointSaved(folder))


def _write_references(job: WorkerJob, send: Report) -> None:
    """Compute the reference for quantized models with the unquantized one."""
    from . import evaluation

    backend, facts, _ = _loaded(job, send)
    assert job.quality
    evaluation.write_references(backend, job.quality, facts, send)


TASKS: Mapping[str, Callable[[WorkerJob, Report], None]] = {
    "prepare": _prepare,
    "resolve": _resolve,
    "measure": _measure_group,
    "evaluate": _evaluate_alone,
    "reference": _write_references,
    "train": _train,
}
"""Task of a job → the function that does it."""


def _check_lengths(backend: Backend, cell: Cell, prompts: PromptSet, context: int | None) -> None:
    """Raise MeasurementError if a text of unchanged length leaves no room for the output in the context."""
    if cell.history != "none":
        _check_conversations(backend, cell, prompts, context)
        return
    longest = max(len(backend.encode(text)) for text in prompts.texts)
    if cell.prompt_tokens is None and context is not None and longest + cell.output_tokens > context:
        raise MeasurementError(
            f"The longest text of workload {prompts.name} has {longest} tokens, and with "
            f"output_tokens={cell.output_tokens} that is more than the context of {context}. "
            "Give a number of prompt_tokens, or shorter texts."
        )


def _check_conversations(backend: Backend, cell: Cell, prompts: PromptSet, context: int | None) -> None:
    """Raise MeasurementError if the backend cannot be measured turn by turn, or a conversation outgrows the context."""
    if not backend.capabilities.conversations:
        raise MeasurementError(f"backend={cell.backend} cannot be measured turn by turn. Use history=none.")
    turns = [backend.encode_turns(one.asks) for one in prompts.conversations]
    longest = max(sum(map(len, added)) + len(added) * cell.output_tokens for added in turns)
    if context is not None and longest > context:
        raise MeasurementError(
            f"The longest conversation of workload {prompts.name} has {longest} tokens with "
            f"output_tokens={cell.output_tokens} for each answer, and that is more than the context of {context}. "
            "Ask for shorter answers, or give shorter conversations."
        )


def _measure_one(
    backend: Backend, cell: Cell, number: int, folder: Path, info: LoadInfo, context: int | None, send: Report
) -> None:
    log = EventLog(folder / "events.jsonl")
    prompts = load_prompts(cell.workload)
    send(events.CellBegun(number))
    if prompts.texts and not backend.capabilities.online:
        _check_lengths(backend, cell, prompts, context)  # this also loads the tokenizer before the clock runs

    def report(event: events.CellProgress) -> None:
        if not isinstance(event, events.FirstToken):
            log.append(event)
        send(event.of_cell(number))

    try:
        compile_s = _compile(backend, cell, prompts, info, send)
        backend.trim()
        memory.trim()  # memory of a larger earlier cell is not this one's
        _reset_peaks(backend)
        backend.device_memory(reset=True)
        send(events.MeasuringBegun(number))
        if backend.capabilities.online:
            measured = measure_server(cast(ServerBackend, backend), cell, prompts, report)
        else:
            measured = (measure_stream if cell.batching else measure_cell)(
                backend, cell, prompts, info.vocab_size or 32000, report
            )
        _stage("peak", backend, send)
        measured = replace(measured, compile_s=compile_s, same_tokens=_same_tokens(backend, cell, prompts, info))
        if cell.history == "kept":  # after the peak was read, since this computes more than the cell did
            try:
                measured = replace(measured, same_replies=compare_replies(backend, cell, prompts, measured))
            except (LlmbenchError, MemoryError) as error:  # only this figure is lost
                print(f"Replies with a recomputed history: {error or 'memory ran out'}", file=sys.stderr)
        if not backend.capabilities.online:
            vocab = info.vocab_size or 32000
            measured = replace(measured, forward_ns=_forward(backend, cell, prompts, vocab, len(measured.repetitions)))
            measured = replace(measured, logits=check_logits(backend, cell, prompts, vocab, measured))
        if rank_pids(backend):
            measured = replace(measured, collective_share=_collective_share(backend, cell, prompts, info))
        texts = tuple(
            {"prompt": backend.decode(prompt), "output": backend.decode(output)} for prompt, output in measured.outputs
        )
        if texts and cell.history == "none" and not backend.capabilities.online:
            measured = replace(measured, text_times=time_texts(backend, texts, measured.outputs))
            measured = replace(measured, natural=natural_lengths(backend, measured.outputs))
        # On the disk before it is sent: the parent may be killed before it reads it.
        rest = replace(measured, repetitions=())
        log.append(events.CellCompleted(measured.steady, measured.first_call_ms, rest))
        send(events.CellMeasured(number, measured, texts))
        send(events.LoadDescribed(backend.describe()))
    finally:
        log.close()


def _compile(backend: Backend, cell: Cell, prompts: PromptSet, info: LoadInfo, send: Report) -> float | None:
    """Compile the decode step for the shape of a cell, before its clock and its peak memory begin.

    Return the seconds that it took, or None if the cell is not compiled.
    """
    if cell.decode != "compiled" or cell.decode not in backend.capabilities.decodes:
        return None
    send(events.CompilationBegun())
    encode = backend.encode if backend.capabilities.tokenizer else None
    sent = prompts.batch(cell, 0, info.vocab_size or 32000, encode)
    longest = cell.prompt_tokens or max(len(backend.encode(text)) for text in prompts.texts)
    return cast(DecodingBackend, backend).compile(sent, longest, cell.output_tokens)


def _forward(backend: Backend, cell: Cell, prompts: PromptSet, vocab: int, repetitions: int) -> tuple[int, ...]:
    """Time the forward pass alone. A stream of requests has no batch of its own."""
    try:
        return () if cell.batching else time_forward(backend, cell, prompts, vocab, repetitions)
    except (LlmbenchError, MemoryError) as error:  # only this figure is lost
        print(f"The forward pass alone: {error or 'memory ran out'}", file=sys.stderr)
        return ()


def _same_tokens(backend: Backend, cell: Cell, prompts: PromptSet, info: LoadInfo) -> tuple[int, ...]:
    """Compare the tokens of another decode path with plain decoding (see `compare_decoding`), after the peak was read.

    Return an empty tuple for plain decoding, or if the backend has only one decode path.
    """
    if (cell.decode == "generate" and cell.kv_cache is None) or len(backend.capabilities.decodes) == 1:
        return ()
    try:
        return compare_decoding(cast(DecodingBackend, backend), cell, prompts, info.vocab_size or 32000)
    except (LlmbenchError, MemoryError) as error:  # only this figure is lost
        print(f"Tokens of plain decoding: {error or 'memory ran out'}", file=sys.stderr)
        return ()


PROFILED_TOKENS = 32
"""Most output tokens of the pass in which collectives are timed: a profile grows with each step."""


def _collective_share(backend: Backend, cell: Cell, prompts: PromptSet, info: LoadInfo) -> float | None:
    """Return the share of time in collectives, in a pass over the prompts of the first repetition."""
    sent = turns_of(backend, cell, prompts, info.vocab_size or 32000, 0)[0]
    tokens = min(cell.output_tokens, PROFILED_TOKENS)
    try:
        return cast(ParallelBackend, backend).collective_share(sent, tokens)
    except (LlmbenchError, MemoryError) as error:  # only this figure is lost
        print(f"Time in collectives: {error or 'memory ran out'}", file=sys.stderr)
        return None


def _stage(stage: str, backend: Backend, send: Report) -> None:
    """Report that a stage is reached, with the memory of the process that holds the model; then reset the peak.

    That is this process with its exact peak, together with its other ranks, or the server that it has started.
    """
    if rank_pids(backend):
        ranks = cast(ParallelBackend, backend).rank_memory()
        send(events.StageMemory(stage, host_of(ranks), device_of(ranks), ranks))
    else:
        host = cast(ServerBackend, backend).server_memory() if backend.capabilities.online else memory.read()
        send(events.StageMemory(stage, host, backend.device_memory()))
    _reset_peaks(backend)


def _reset_peaks(backend: Backend) -> None:
    """Start new peaks of resident memory, of this process and of the other ranks."""
    memory.reset_peak()
    for pid in rank_pids(backend):
        memory.reset_peak(pid)


def _tame_logs() -> Flood:
    """Send the logs and warnings of all libraries through one `Flood` handler, and return it."""
    flood = Flood()
    logging.basicConfig(handlers=[flood], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    return flood


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # everything is written and closed; an orderly exit with torch would take more than a second
