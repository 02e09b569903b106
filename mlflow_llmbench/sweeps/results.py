"""Build results of cells from what the workers have told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ..config.spec import BenchSpec
from ..measure import quality_order
from ..measure.outcome import GroupOutcome, stages_of, timeline_of
from ..records.results import Failure, Repetition, RunResult
from ..system import machine
from .job import Job


def measured_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> RunResult:
    """Return the result of a job after all its processes have measured it; `environment` is the command's."""
    first, number = job.attempts[0]
    measured = [outcome.measured[own] for outcome, own in job.attempts]
    repetitions: list[Repetition] = []
    for process, one in enumerate(measured):
        repetitions += [
            dataclasses.replace(r, index=len(repetitions) + r.index, process=process) for r in one.repetitions
        ]
    result = empty_result(job, spec, first.environment or job.planned.environment or environment, "ok")
    return dataclasses.replace(
        result,
        load=first.load,
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
        compile_s=measured[0].compile_s,
        same_tokens=measured[0].same_tokens,
        logits=next((one.logits for one in measured if one.logits and one.logits.nonfinite), measured[0].logits),
        quality=quality_order.quality_of(spec.options, job.cell, first),
        log=tuple(first.log),
    )


def failed_result(
    job: Job,
    spec: BenchSpec,
    environment: Mapping[str, Any],
    word: str,
    failure: Failure,
    outcome: GroupOutcome | None = None,
) -> RunResult:
    """Return the result of a job that failed: outcome `word`, the failure, and the worker's memory use until then."""
    where = (outcome and outcome.environment) or job.planned.environment or environment
    result = dataclasses.replace(empty_result(job, spec, where, word), failure=failure)
    if outcome is None:
        return result
    number = outcome.current if outcome.current is not None else 0
    seen = {"memory": stages_of(outcome, number), "timeline": timeline_of(outcome, number)}
    return dataclasses.replace(result, load=outcome.load, log=tuple(outcome.log), **seen)  # type: ignore[arg-type]


def empty_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any], word: str) -> RunResult:
    """Return the fields that every result of a job has; `environment` is that of the machine that ran it."""
    now = int(time.time() * 1000)
    hashes = dataclasses.replace(job.planned.hashes, **environment.get("hashes", {}))
    return RunResult(
        job.cell,
        word,
        job.started_ms or now,
        now,
        hashes,
        job.planned.model,
        environment,
        predicted_bytes=job.planned.predicted_bytes,
        predicted_load_bytes=job.planned.predicted_load_bytes,
        price_per_hour=spec.options.price_per_hour,
        nominal_bandwidth=spec.options.nominal_bandwidth,
        sweep=job.folder.parent.name,
    )


def env_hashes(job: Job) -> set[str | None]:
    """Return the hashes of the environments in which a job was measured; None stands for the command's own."""
    return {outcome.environment["hashes"]["env"] if outcome.environment else None for outcome, _ in job.attempts}


def _marks(outcome: GroupOutcome, number: int) -> dict[str, int]:
    """Map each stage to the monotonic time in ns at which it was reached, for the memory timeline."""
    marks = {stage: event.sent_ns for stage, event in outcome.stages.items()}
    if cell := outcome.cells.get(number):
        marks["measuring"] = cell.begun_ns
        if cell.peak:
            marks["peak"] = cell.peak.sent_ns
    return marks
