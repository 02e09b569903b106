"""The order of a quality evaluation that a worker does after its last cell, and the quality in its outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends.huggingface import lm_eval
from ..records.backends import capabilities_of
from ..records.cell import Cell, Options, split_list
from ..records.results import Quality, hash16
from ..workloads.prompts import load_text
from . import quality_reference
from .events import QualityWithheld, Report
from .outcome import GroupOutcome
from .supervise import Limits
from .task import QualityOrder, Task


def never(cell: Cell) -> str | None:
    """Return the reason why the quality of a cell is never measured, or None if it can be."""
    if cell.weights == "random":
        return "Quality is not measured with weights=random: they write no language."
    if not capabilities_of(cell.backend).logits:
        return f"Quality is not measured with backend={cell.backend}, which gives no logits."
    return None


def order(task: Task, report: Report, environment: Mapping[str, Any] | None, limits: Limits) -> QualityOrder | None:
    """Return the evaluation that a worker does after its last cell, with its references ready; None if there is none.

    Missing references are computed, which is reported. `environment` is that of this machine, if known. Raises
    KeyboardInterrupt, and UsageError if the text cannot be read.
    """
    cell, options = task.cells[0], task.options
    if options.quality == "none" and options.quality_tasks is None:
        return None
    if why := never(cell):
        report(QualityWithheld(why))
        return None
    asked = options.quality_tasks
    if asked and not capabilities_of(cell.backend).harness:
        report(QualityWithheld(f"backend={cell.backend} gives lm-eval no model. Leave quality_tasks out."))
        asked = None
        if options.quality == "none":
            return None
    texts = QualityOrder() if options.quality == "none" else _text_order(task, report, environment, limits)
    if asked is None:
        return texts
    tasks = tuple(split_list(asked))
    return dataclasses.replace(texts, tasks=tasks, most_documents=options.quality_limit)


def _text_order(task: Task, report: Report, environment: Mapping[str, Any] | None, limits: Limits) -> QualityOrder:
    """Return the part of the order about texts: perplexity and divergence from the reference."""
    cell, text = task.cells[0], load_text(task.options.quality_text)
    own = quality_reference.sibling(cell, task.options.quality_reference)
    plain = cell.quant == "none" and cell.attention == "auto" and cell.worker_python is None
    plain = plain and cell.kv_cache is None and cell.prune is None
    found = quality_reference.provide(task, own, text, report, environment=environment, limits=limits)
    return QualityOrder(
        text.name,
        text.digest,
        {workload: str(file) for workload, file in found.files.items()},
        is_reference=plain and (cell.backend, cell.model) == (own.backend, own.model),
        withheld=found.missing,
    )


def quality_of(options: Options, cell: Cell, outcome: GroupOutcome) -> Quality | None:
    """Return the quality of a cell from a worker's outcome, with a sentence for anything absent.

    Return None if quality was not requested.
    """
    if options.quality == "none" and options.quality_tasks is None:
        return None
    if why := never(cell):
        return Quality(withheld=(why,))
    compared = outcome.divergences.get(cell.workload)
    withheld = outcome.withheld
    missing = options.quality != "none" and (compared is None or outcome.scores is None)
    if not withheld and (missing or (options.quality_tasks and not outcome.task_scores)):
        withheld = ["The worker ended before the quality was evaluated. Measure the cell again with rerun=true."]
    tasks = tuple(score for scores in outcome.task_scores.values() for score in scores)
    return Quality(
        outcome.text_digest,
        outcome.scores,
        compared,
        tuple(withheld),
        options.quality_tasks or "",
        tasks_digest(options),
        tasks,
        outcome.nonfinite,
    )


def require(options: Options) -> None:
    """Raise MissingError if a package that the options need is not installed."""
    if options.quality_tasks is not None:
        lm_eval.require()


def tasks_digest(options: Options) -> str:
    """Return 16 hex digits over the requested lm-eval tasks, their limit and their files; empty if there are none."""
    if options.quality_tasks is None:
        return ""
    paths = [Path(task) for task in split_list(options.quality_tasks)]
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*.y*ml")) if path.is_dir() else [])
    ]
    return hash16(
        [
            options.quality_tasks,
            options.quality_limit,
            [file.read_text(encoding="utf-8", errors="replace") for file in files],
        ]
    )
