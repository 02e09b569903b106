"""The reference of quality figures: find the unquantized model, compute its logits, and cache them.

A reference is computed once, in a separate worker, before the first cell that needs it is measured. It is cached under
a hash of what decides its content: model, workload, text, device, hardware and software.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends.base import backend_class
from ..config import model_shape
from ..records.backends import capabilities_of
from ..records.cell import Cell
from ..records.errors import LlmbenchError
from ..records.results import ModelFacts, hash16
from ..system import estimate, machine, placement
from ..workloads.prompts import Text, load_prompts
from . import supervise
from .events import Report, Stage
from .supervise import Limits
from .task import QualityOrder, Task, WorkerJob

FORMAT = 2
"""Version of the file content and of its computation. A change makes new files."""

MOST_KEPT = 8
"""Newest references that the cache keeps. One takes up to 300 MB."""


def sibling(cell: Cell, named: str | None = None) -> Cell:
    """Return the unquantized counterpart of a cell, run with default settings on the same device.

    All cells that are compared with it have the same. Cells of other runtimes or interpreters get one that transformers
    runs in the command's own environment, so that all share one reference. `named` is a model requested as reference;
    its main revision is used.
    """
    names = (
        "model", "weights", "revision", "backend", "device", "threads", "placement", "trust_remote_code",
        "allow_pickle",
    )  # fmt: skip
    own = Cell(**{name: getattr(cell, name) for name in names})
    own = dataclasses.replace(own, backend=capabilities_of(own.backend).reference or own.backend)
    return dataclasses.replace(own, model=named, revision="main", weights="hub") if named else own


@dataclass(frozen=True)
class Found:
    """Reference files by workload, or the sentence that says why there are none."""

    files: Mapping[str, Path] = field(default_factory=dict)
    missing: str = ""


def provide(
    task: Task, own: Cell, text: Text, report: Report, *, environment: Mapping[str, Any] | None, limits: Limits
) -> Found:
    """Return the references of a task's cells from the cache. Missing ones are computed, which is reported.

    `own`: their unquantized counterpart (see `sibling`). A computation that fails is not tried again in the same sweep:
    a model too large for this machine is not loaded for each of its quantizations. `environment` is that of this
    machine, if known. Raises KeyboardInterrupt.
    """
    try:
        model = backend_class(own.backend).resolve(own)
        if quantized := _already_quantized(own, model):
            return Found(missing=quantized)
        env_hash = (environment or machine.environment())["hashes"]["env"]
        files = {one.workload: _file(one, model, text, env_hash) for one in task.cells}
        absent = {workload: str(file) for workload, file in files.items() if not file.exists()}
        if not absent:
            return Found(files)
        key = hash16([str(task.folders[0].parent), sorted(absent.values())])
        if key not in _FAILED:
            _FAILED[key] = _compute(task, own, model, absent, report, limits)
            _forget_old([*files.values()])
        problem = _FAILED[key]
    except LlmbenchError as error:
        problem = str(error)
    return Found(missing=f"There is no unquantized model to compare with: {problem}") if problem else Found(files)


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
    room = (None, "") if task.options.force else estimate.available_memory(own.device, limits.memory_bytes)
    refused = estimate.refusal(largest, model, estimate.predicted_bytes(largest, model, shape), room)
    if refused and own.placement != placement.AUTO:
        return refused.sentence
    report(Stage("reference"))
    log = task.folders[0] / "reference.log"
    # It may be missing here: the cells' own file may have been made from it long ago, or it is another model.
    if not backend_class(own.backend).is_prepared(own, model):
        fetched = supervise.run_worker(WorkerJob("prepare", (own,), model, task.folders[:1]), log, waited=report)
        if fetched.interrupted:
            raise KeyboardInterrupt
        if fetched.error:
            return str(fetched.error)
    order = QualityOrder(task.options.quality_text, references=missing)
    job = WorkerJob("reference", (own,), model, task.folders[:1], order)
    outcome = supervise.run_worker(job, log, limits=limits, waited=report)
    if outcome.interrupted:
        raise KeyboardInterrupt
    return str(outcome.error) if outcome.error else ""


def _forget_old(needed: Sequence[Path]) -> None:
    """Delete all references from the cache except the newest ones and those that are needed now."""
    with contextlib.suppress(OSError):
        newest = sorted(needed[0].parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in set(newest[MOST_KEPT:]) - set(needed):
            file.unlink()
