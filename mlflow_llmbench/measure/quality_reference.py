"""The reference of quality figures: find the unquantized model, compute its logits, and cache them.

A reference is computed once, in a separate worker, before the first cell that needs it is measured. It is cached under
a hash of what decides its content: model, workload, text, device, hardware and software.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import PACKAGE_DIR
from ..backends.base import backend_class
from ..backends.huggingface import lm_eval
from ..config import model_shape
from ..records.backends import capabilities_of
from ..records.cell import Cell, Options
from ..records.errors import LlmbenchError
from ..records.results import ModelFacts, Quality, hash16
from ..system import estimate, machine
from ..workloads.prompts import Text, load_prompts, load_text
from . import supervise
from .events import QualityWithheld, Report, Stage
from .outcome import GroupOutcome
from .supervise import Limits

if TYPE_CHECKING:
    from .task import Task


FORMAT = 2
"""Version of the file content and of its computation. A change makes new files."""

MOST_KEPT = 8
"""Newest references that the cache keeps. One takes up to 300 MB."""


def never(cell: Cell) -> str | None:
    """Return the reason why the quality of a cell is never measured, or None if it can be."""
    if cell.weights == "random":
        return "Quality is not measured with weights=random: they write no language."
    if not capabilities_of(cell.backend).logits:
        return f"Quality is not measured with backend={cell.backend}, which gives no logits."
    return None


def sibling(cell: Cell, named: str | None = None) -> Cell:
    """Return the unquantized counterpart of a cell, run with default settings on the same device.

    All cells that are compared with it have the same. Cells of other runtimes or interpreters get one that transformers
    runs in the command's own environment, so that all share one reference. `named` is a model requested as reference;
    its main revision is used.
    """
    names = ("model", "weights", "revision", "backend", "device", "threads", "trust_remote_code", "allow_pickle")
    own = Cell(**{name: getattr(cell, name) for name in names})
    own = dataclasses.replace(own, backend=capabilities_of(own.backend).reference or own.backend)
    return dataclasses.replace(own, model=named, revision="main", weights="hub") if named else own


def order(task: Task, report: Report, environment: Mapping[str, Any] | None, limits: Limits) -> dict[str, Any] | None:
    """Return the evaluation that a worker does after its last cell, with its references ready; None if there is none.

    Missing references are computed, which is reported. One that fails is not tried again in the same sweep: a
    model too large for this machine is not loaded for each of its quantizations. `environment` is that of this machine,
    if known. Raises KeyboardInterrupt, and UsageError if the text cannot be read.
    """
    cell, options = task.cells[0], task.options
    if options.quality == "none" and options.quality_tasks is None:
        return None
    if why := never(cell):
        report(QualityWithheld(why))
        return None
    tasks = {"tasks": options.quality_tasks.split(","), "most": options.quality_limit} if options.quality_tasks else {}
    if tasks and not capabilities_of(cell.backend).harness:
        report(QualityWithheld(f"backend={cell.backend} gives lm-eval no model. Leave quality_tasks out."))
        tasks = {}
    if options.quality == "none":
        return {"digest": "", **tasks} if tasks else None
    return _text_order(task, report, environment, limits) | tasks


def _text_order(task: Task, report: Report, environment: Mapping[str, Any] | None, limits: Limits) -> dict[str, Any]:
    """Return the part of the order about texts: perplexity and divergence from the reference."""
    cell = task.cells[0]
    own, text = sibling(cell, task.options.quality_reference), load_text(task.options.quality_text)
    plain = cell.quant == "none" and cell.attention == "auto" and cell.kv_cache is None and cell.worker_python is None
    is_reference = plain and (cell.backend, cell.model) == (own.backend, own.model)
    found: dict[str, Any] = {"text": text.name, "digest": text.digest, "references": {}, "is_reference": is_reference}
    try:
        model = backend_class(own.backend).resolve(own)
        refused = _already_quantized(own, model)
        if not refused:
            env = (environment or machine.environment(str(PACKAGE_DIR)))["hashes"]["env"]
            files = {one.workload: _file(one, model, text, env) for one in task.cells}
            missing = {workload: str(file) for workload, file in files.items() if not file.exists()}
            found["references"] = {workload: str(file) for workload, file in files.items()}
            if missing:
                key = hash16([str(task.folders[0].parent), sorted(missing.values())])
                if key not in _FAILED:
                    _FAILED[key] = _compute(task, own, model, missing, report, limits)
                    _forget_old([*files.values()])
                refused = _FAILED[key] and f"There is no unquantized model to compare with: {_FAILED[key]}"
    except LlmbenchError as error:
        refused = f"There is no unquantized model to compare with: {error}"
    return found | ({"references": {}, "withheld": refused} if refused else {})


_FAILED: dict[str, str] = {}
"""References that were tried → why they could not be computed, empty if they were. Keyed by sweep and files."""


def _already_quantized(cell: Cell, model: ModelFacts) -> str:
    method = ((model.config or {}).get("quantization_config") or {}).get("quant_method")
    if model.source in ("gguf", "hub_gguf") or method:
        how = f"quantized already ({method})" if method else "a GGUF file"
        return (
            f"{cell.model} is {how}, so there is no unquantized model to compare with; only the perplexity is "
            "measured. Name one with quality_reference."
        )
    return ""


def _file(cell: Cell, model: ModelFacts, text: Text, env_hash: str) -> Path:
    """Return the file of a cell's reference, named by a hash of everything that decides its content."""
    content = {
        "format": FORMAT,
        "model": model.identity,
        "prompts": load_prompts(cell.workload).texts,
        "text": text.content,
        "device": cell.device,
        "environment": env_hash,
    }
    return machine.cache_folder() / "references" / f"{hash16(content)}.safetensors"


def _compute(
    task: Task,
    own: Cell,
    model: ModelFacts,
    missing: Mapping[str, str],
    report: Report,
    limits: Limits,
) -> str:
    """Run the unquantized model and write its references. Return why that failed, or an empty string."""
    shape = model_shape.Shape.from_config(model.config) if model.config else None
    largest = dataclasses.replace(own, prompt_tokens=max(min(512, model.context or 512) - 32, 1), output_tokens=32)
    room = (None, "") if task.options.force else estimate.room_here(own.device, limits.memory_bytes)
    refused = estimate.refusal(largest, model, estimate.predicted_bytes(largest, model, shape), room)
    if refused:
        return refused
    report(Stage("reference"))
    # It may be missing here: the cells' own file may have been made from it long ago, or it is another model.
    if not backend_class(own.backend).is_prepared(own, model):
        fetched = supervise.run_worker("prepare", [own], model, task.folders[:1], task.folders[0] / "reference.log")
        if fetched.interrupted:
            raise KeyboardInterrupt
        if fetched.error:
            return str(fetched.error)
    wanted = {"text": task.options.quality_text, "references": missing}
    log = task.folders[0] / "reference.log"
    outcome = supervise.run_worker("reference", [own], model, task.folders[:1], log, limits=limits, quality=wanted)
    if outcome.interrupted:
        raise KeyboardInterrupt
    return str(outcome.error) if outcome.error else ""


def _forget_old(needed: Sequence[Path]) -> None:
    """Delete all references from the cache except the newest ones and those that are needed now."""
    with contextlib.suppress(OSError):
        newest = sorted(needed[0].parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in set(newest[MOST_KEPT:]) - set(needed):
            file.unlink()


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
    )


def require(options: Options) -> None:
    """Raise MissingError if a package that the options need is not installed."""
    if options.quality_tasks is not None:
        lm_eval.require()


def tasks_digest(options: Options) -> str:
    """Return 16 hex digits over the requested lm-eval tasks, their limit and their files; empty if there are none."""
    if options.quality_tasks is None:
        return ""
    paths = [Path(task) for task in options.quality_tasks.split(",")]
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
