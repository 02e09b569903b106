"""Build results of cells from what the workers have told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ..analysis.repetitions import process_count
from ..config.spec import BenchSpec
from ..measure import quality_order
from ..measure.outcome import GroupOutcome, stages_of, timeline_of
from ..records.results import Failure, Repetition, RunResult
from ..system import machine
from .job import Job


def measured_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> RunResult:
    """Return the result of the processes that have measured a job, whose figures are those of all its repetitions.

    `environment` is the command's. The first of them may belong to an earlier command (`Job.earlier`).
    """
    if not job.attempts:
        assert job.earlier
        return _continued(job.earlier, (), empty_result(job, spec, job.earlier.environment, "ok"))
    first, number = job.attempts[0]
    measured = [outcome.measured[own] for outcome, own in job.attempts]
    repetitions: list[Repetition] = []
    for process, one in enumerate(measured):
        repetitions += [
            dataclasses.replace(r, index=len(repetitions) + r.index, process=process) for r in one.repetitions
        ]
    result = empty_result(job, spec, first.environment or job.planned.environment or environment, "ok")
    found = dataclasses.replace(
        result,
        load=first.load_of(number),
        first_call_ms=measured[0].first_call_ms if number == 0 else None,
        warmup_s=measured[0].warmup_s,
        steady=all(one.steady for one in measured),
        repetitions=tuple(repetitions),
        memory=stages_of(first, number),
        timeline=timeline_of(first, number),
        marks=_marks(first, number),
        peaks=machine.best_peaks(
            first.peaks, f"{result.hashes.hardware} {job.cell.device} {job.cell.threads or 'auto'}"
        ),
        idle_w=first.idle_w,
        texts=tuple(first.texts[number]),
        same_replies=measured[0].same_replies,
        text_times=measured[0].text_times,
        natural=measured[0].natural,
        forward_ns=tuple(ns for one in measured for ns in one.forward_ns or ()) or None,
        compile_s=measured[0].compile_s,
        same_tokens=measured[0].same_tokens,
        logits=next((one.logits for one in measured if one.logits and one.logits.nonfinite), measured[0].logits),
        collective_share=measured[0].collective_share,
        quality=quality_order.quality_of(spec.options, job.cell, first),
        log=tuple(first.log),
    )
    return _continued(job.earlier, found.repetitions, found) if job.earlier else found


def incomplete_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> RunResult:
    """Return the result of a job whose group is still being measured: without what the end of the group brings.

    What it has does not change any more, so its figures are those of the whole result.
    """
    result = measured_result(job, spec, environment)
    quality = result.quality if quality_order.never(job.cell) else None
    return dataclasses.replace(result, timeline=(), log=(), quality=quality, incomplete=True)


def _continued(earlier: RunResult, more: tuple[Repetition, ...], now: RunResult) -> RunResult:
    """Return the result of an earlier command with the repetitions that this one has added in further processes."""
    index, process = len(earlier.repetitions), process_count(earlier)
    later = (dataclasses.replace(r, index=index + r.index, process=process + r.process) for r in more)
    bad = now.logits if now.logits and now.logits.nonfinite else earlier.logits
    return dataclasses.replace(
        earlier,
        outcome=now.outcome,
        failure=None,
        started_ms=now.started_ms,
        ended_ms=now.ended_ms,
        steady=earlier.steady and (now.steady or not more),
        repetitions=(*earlier.repetitions, *later),
        logits=bad,
        price_per_hour=now.price_per_hour,
        nominal_bandwidth=now.nominal_bandwidth,
        sweep=now.sweep,
    )


def failed_result(
    job: Job,
    spec: BenchSpec,
    environment: Mapping[str, Any],
    word: str,
    failure: Failure,
    outcome: GroupOutcome | None = None,
    ended_ms: int | None = None,
) -> RunResult:
    """Return the result of a job that failed: outcome `word`, the failure, and the worker's memory use until then.

    If some of its processes had measured it, their repetitions are kept, and the message counts them. `ended_ms`: epoch
    time of its end, if it was not now.
    """
    if job.processes_done:
        whole = measured_result(job, spec, environment)
        failure = dataclasses.replace(failure, message=f"{failure.message} {job.count_text()}")
        return dataclasses.replace(whole, outcome=word, failure=failure, ended_ms=ended_ms or whole.ended_ms)
    where = (outcome and outcome.environment) or job.planned.environment or environment
    result = dataclasses.replace(empty_result(job, spec, where, word), failure=failure)
    if ended_ms is not None:
        result = dataclasses.replace(result, started_ms=min(result.started_ms, ended_ms), ended_ms=ended_ms)
    if outcome is None:
        return result
    number = outcome.current if outcome.current is not None else 0
    seen = {"memory": stages_of(outcome, number), "timeline": timeline_of(outcome, number)}
    return dataclasses.replace(result, load=outcome.load, log=tuple(outcome.log), **seen)  # type: ignore[arg-type]


def empty_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any], word: str) -> RunResult:
    """Return the fields that every result of a job has; `environment` is that of the machine that ran it."""
    started_ms, ended_ms = _dates(job)
    hashes = dataclasses.replace(job.planned.hashes, **environment.get("hashes", {}))
    return RunResult(
        job.cell,
        word,
        started_ms,
        ended_ms,
        hashes,
        job.planned.model,
        environment,
        predicted_bytes=job.planned.predicted_bytes,
        predicted_load_bytes=job.planned.predicted_load_bytes,
        predicted_placement=job.planned.predicted_placement,
        price_per_hour=spec.options.price_per_hour,
        nominal_bandwidth=spec.options.nominal_bandwidth,
        sweep=job.folder.parent.name,
    )


def _dates(job: Job) -> tuple[int, int]:
    """Return begin and end of a job in epoch ms: its own, not those of its group.

    The first cell of a worker has the load too. A job that no worker has begun begins and ends now; one that its worker
    has not ended ends now.
    """
    now = int(time.time() * 1000)
    dates = [outcome.dates_ms(own) for outcome, own in (*job.attempts, *([job.tried] if job.tried else []))]
    began = [begun for begun, _ in dates if begun is not None]
    ended = [end for _, end in dates if end is not None]
    known = job.started_ms and (job.run_id or job.attempts)
    started_ms = min(began, default=min(job.started_ms, now) if known else now)
    is_ended = bool(ended) and not job.tried
    return started_ms, max(max(ended) if is_ended else now, started_ms)


def env_hashes(job: Job) -> set[str]:
    """Return the hashes of the environments in which a job was measured."""
    own = job.planned.hashes.env
    found = {outcome.environment["hashes"]["env"] if outcome.environment else own for outcome, _ in job.attempts}
    return found | ({job.earlier.hashes.env} if job.earlier else set())


def _marks(outcome: GroupOutcome, number: int) -> dict[str, int]:
    """Map each stage to the monotonic time in ns at which it was reached, for the memory timeline."""
    marks = {stage: event.sent_ns for stage, event in outcome.stages.items()}
    if cell := outcome.cells.get(number):
        marks["measuring"] = cell.begun_ns
        if cell.peak:
            marks["peak"] = cell.peak.sent_ns
    return marks
