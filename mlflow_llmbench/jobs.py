"""Jobs: a cell of a sweep with its model and folder, the outcomes of its processes, and the result made from them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import estimate, interpreter, machine, models, plan, reference, stages
from .cell import Cell
from .errors import JournalError, UsageError
from .journal import write_json
from .records import Failure, Hashes, ModelFacts, Repetition, RunResult, from_json
from .report import Row
from .spec import BenchSpec
from .supervise import GroupOutcome
from .workload import PromptSet


@dataclass(eq=False)  # compared by identity: lists of thousands are searched for a job
class Job:
    """One cell of a sweep: its model, hashes, folder and run, the reason if it is refused, and its row once it is done.

    `predicted` is the predicted peak memory in bytes, `started_ms` is Unix time in milliseconds.
    """

    cell: Cell
    model: ModelFacts
    hashes: Hashes
    folder: Path
    name: str
    predicted: int | None = None
    refused: str | None = None
    run_id: str = ""
    started_ms: int = 0
    # Outcome of each process that measured this cell, and the cell's number in that process.
    attempts: list[tuple[GroupOutcome, int]] = field(default_factory=list)
    environment: Mapping[str, Any] | None = None  # of the worker's interpreter, if it is not the command's
    lost: int = 0  # times that the machine was lost before it had measured this cell
    row: Row | None = None

    @property
    def measured(self) -> bool:
        """True if as many processes have measured it as were requested."""
        return len(self.attempts) >= self.cell.processes


def make_jobs(
    spec: BenchSpec,
    cells: Sequence[Cell],
    names: Sequence[str],
    model_of: Mapping[Cell, ModelFacts],
    prompts: Mapping[str, PromptSet],
    environment: Mapping[str, Any],
    room: Callable[[str], tuple[int | None, str]],
    folder: Path,
) -> list[Job]:
    """Make one job per cell, in the given order.

    A cell that does not fit its model or the `room` of its device is marked as refused (see `estimate.refusal`).
    """
    jobs: list[Job] = []
    for cell, name in zip(cells, names, strict=True):
        model = model_of[cell]
        config = plan.config_hash(cell, model)
        twins = sum(job.hashes.config == config for job in jobs)
        shape = models.Shape.from_config(model.config) if model.config else None
        where = interpreter.environment_of(cell, environment)
        own = where["hashes"]
        workload = workload_hash(cell, model, prompts[cell.workload])
        predicted = estimate.predicted_bytes(cell, model, shape)
        jobs.append(
            Job(
                cell,
                model,
                Hashes(config, workload, own["hardware"], own["software"], own["env"]),
                folder / (f"{config}-{twins + 1}" if twins else config),
                name,
                predicted,
                estimate.refusal(cell, model, predicted, (None, "") if spec.options.force else room(cell.device)),
                environment=where if cell.worker_python else None,
            )
        )
    return jobs


def workload_hash(cell: Cell, model: ModelFacts, prompts: PromptSet) -> str:
    """Return the hash of the prompts of a cell. Randomly drawn prompts depend on the model's vocabulary size."""
    shape = models.Shape.from_config(model.config) if model.config else None
    return prompts.digest(cell, shape.vocab_size if shape else None)


def refuse_twins(cells: Sequence[Cell], model_of: Mapping[Cell, ModelFacts]) -> None:
    """Raise UsageError if two cells are the same configuration under two model names."""
    first: dict[str, Cell] = {}
    for cell in cells:
        twin = first.setdefault(plan.config_hash(cell, model_of[cell]), cell)
        if twin is not cell:
            raise UsageError(
                f"{twin.model} and {cell.model} are the same model, so their cells are the same. Leave one of them out."
            )


def identity(job: Job) -> dict[str, str]:
    """Return the tags that identify the run of a job: its sweep, its folder in the sweep, its configuration."""
    return {"sweep": job.folder.parent.name, "cell": job.folder.name, "config_hash": job.hashes.config}


def write_job(job: Job) -> None:
    """Write cell.json: everything that a result needs besides the measurement. Raises JournalError."""
    known = {
        name: getattr(job, name)
        for name in ("cell", "model", "hashes", "name", "predicted", "started_ms", "environment")
    }
    write_json(job.folder / "cell.json", known)


def read_job(folder: Path) -> Job:
    """Read the job that `write_job` wrote into a folder. Raises JournalError."""
    try:
        known = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        cell, model, hashes = (
            from_json(Cell, known["cell"]),
            from_json(ModelFacts, known["model"]),
            from_json(Hashes, known["hashes"]),
        )
        own = {"started_ms": known["started_ms"], "environment": known.get("environment")}
        return Job(cell, model, hashes, folder, known["name"], known["predicted"], **own)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"Cannot read {folder / 'cell.json'}: {error}. Delete the folder {folder} and measure the cell again."
        ) from None


def measured_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any]) -> RunResult:
    """Return the result of a job after all its processes have measured it; `environment` is the command's."""
    first, number = job.attempts[0]
    measured = [outcome.measured[own] for outcome, own in job.attempts]
    repetitions: list[Repetition] = []
    for process, one in enumerate(measured):
        repetitions += [
            dataclasses.replace(r, index=len(repetitions) + r.index, process=process) for r in one.repetitions
        ]
    result = empty_result(job, spec, first.environment or job.environment or environment, "ok")
    return dataclasses.replace(
        result,
        load=first.load,
        first_call_ms=measured[0].first_call_ms if number == 0 else None,
        warmup_s=measured[0].warmup_s,
        steady=all(one.steady for one in measured),
        repetitions=tuple(repetitions),
        memory=stages.stages_of(first, number),
        timeline=stages.timeline_of(first, number),
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
        quality=reference.quality_of(spec.options, job.cell, first),
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
    where = (outcome and outcome.environment) or job.environment or environment
    result = dataclasses.replace(empty_result(job, spec, where, word), failure=failure)
    if outcome is None:
        return result
    number = outcome.current if outcome.current is not None else 0
    seen = {"memory": stages.stages_of(outcome, number), "timeline": stages.timeline_of(outcome, number)}
    return dataclasses.replace(result, load=outcome.load, log=tuple(outcome.log), **seen)  # type: ignore[arg-type]


def empty_result(job: Job, spec: BenchSpec, environment: Mapping[str, Any], word: str) -> RunResult:
    """Return the fields that every result of a job has; `environment` is that of the machine that ran it."""
    now = int(time.time() * 1000)
    hashes = dataclasses.replace(job.hashes, **environment.get("hashes", {}))
    return RunResult(
        job.cell,
        word,
        job.started_ms or now,
        now,
        hashes,
        job.model,
        environment,
        predicted_bytes=job.predicted,
        price_per_hour=spec.options.price_per_hour,
        sweep=job.folder.parent.name,
    )


def env_hashes(job: Job) -> set[str | None]:
    """Return the hashes of the environments in which a job was measured; None stands for the command's own."""
    return {outcome.environment["hashes"]["env"] if outcome.environment else None for outcome, _ in job.attempts}


def _marks(outcome: GroupOutcome, number: int) -> dict[str, int]:
    """Map each stage to the monotonic time in ns at which it was reached, for the memory timeline."""
    marks = {stage: int(event["t_ns"]) for stage, event in outcome.stages.items()}
    own = outcome.cells.get(number, {})
    return (
        marks
        | ({"measuring": int(own["cell"]["t_ns"])} if own else {})
        | ({"peak": int(own["peak"]["t_ns"])} if "peak" in own else {})
    )
