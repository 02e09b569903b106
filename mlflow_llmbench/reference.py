"""What quality is measured against: the unquantized model. Which one it is, where its logits are kept, and when there is none.

A reference is computed once, in a worker of its own before the first cell that needs it is measured, and kept in the cache by
its content: model, workload, text, hardware and software.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import estimate, machine, models, supervise
from .backends.base import backend_class
from .errors import LlmbenchError
from .records import Cell, ModelFacts, Quality, hash16
from .spec import BenchSpec
from .supervise import GroupOutcome, Limits
from .workload import Text, load_prompts, load_text

if TYPE_CHECKING:
    from .jobs import Job

FORMAT = 1
"""Version of what is written and how it is computed; a change makes new files."""

MOST_KEPT = 8
"""References that the cache keeps, the newest; one takes up to 300 MB."""


def never(cell: Cell) -> str | None:
    """Why the quality of a cell is never measured; None if it can be."""
    if cell.weights == "random":
        return "Quality is not measured with weights=random: they write no language."
    if not backend_class(cell.backend).capabilities.logits:
        return f"Quality is not measured with backend={cell.backend}, which gives no logits."
    return None


def sibling(cell: Cell) -> Cell:
    """The unquantized model of a cell, run the ordinary way on the same device: the same for all cells that are compared with it."""
    names = ("model", "weights", "revision", "backend", "device", "threads", "trust_remote_code")
    return Cell(**{name: getattr(cell, name) for name in names})


def order(
    spec: BenchSpec,
    waiting: Sequence[Job],
    failures: dict[str, str],
    tell: Callable[[Mapping[str, Any]], None],
    note: Callable[[str], None],
    limits: Limits,
) -> dict[str, Any] | None:
    """What a worker is to evaluate after its last cell, its references being there; None if nothing.

    Computes the references that are missing. `failures` holds why some could not be computed in this sweep, and is added to:
    a model too large for this machine is not tried for each of its quantizations. `note` is told once why something is withheld.
    Raises KeyboardInterrupt.
    """
    cell = waiting[0].cell
    if spec.options.quality == "none" or any(job.attempts for job in waiting):
        return None
    if why := never(cell):
        _say_once(why, failures, note)
        return None
    own = sibling(cell)
    text = load_text(spec.options.quality_text)
    is_reference = cell.quant == "none" and cell.attention == "auto"
    found: dict[str, Any] = {"text": text.name, "digest": text.digest, "references": {}, "is_reference": is_reference}
    try:
        model = backend_class(cell.backend).resolve(own)
        refused = _already_quantized(cell, model)
        files = {job.cell.workload: _file(job, model, text) for job in waiting}
        missing = {workload: file for workload, file in files.items() if not file.exists()}
        if missing and not refused:
            key = hash16(sorted(map(str, missing.values())))
            if key not in failures:
                failures[key] = _compute(spec, waiting[0], own, model, missing, tell, limits)
                _forget_old([*files.values()])
            refused = failures[key] and f"There is no unquantized model to compare with: {failures[key]}"
    except LlmbenchError as error:
        refused, files = f"There is no unquantized model to compare with: {error}", {}
    if refused:
        _say_once(refused, failures, note)
        return found | {"withheld": refused}
    return found | {"references": {workload: str(file) for workload, file in files.items()}}


def _say_once(sentence: str, said: dict[str, str], note: Callable[[str], None]) -> None:
    if sentence not in said:
        said[sentence] = sentence
        note(sentence)


def _already_quantized(cell: Cell, model: ModelFacts) -> str:
    method = ((model.config or {}).get("quantization_config") or {}).get("quant_method")
    if model.source == "gguf" or method:
        how = f"quantized already ({method})" if method else "a GGUF file"
        return f"{cell.model} is {how}, so there is no unquantized model to compare with; only the perplexity is measured."
    return ""


def _file(job: Job, model: ModelFacts, text: Text) -> Path:
    """The file of a job's reference, by what decides its content."""
    content = {
        "format": FORMAT,
        "model": [model.location if model.source in ("hub", "preset") else model.name, model.revision],
        "prompts": load_prompts(job.cell.workload).texts,
        "text": text.content,
        "device": job.cell.device,
        "environment": job.hashes.env,
    }
    return machine.cache_folder() / "references" / f"{hash16(content)}.safetensors"


def _compute(
    spec: BenchSpec, job: Job, own: Cell, model: ModelFacts, missing: Mapping[str, Path], tell: Callable[[Mapping[str, Any]], None], limits: Limits
) -> str:
    """Run the unquantized model and write its references. Returns why that failed, empty if it did not."""
    shape = models.Shape.from_config(model.config) if model.config else None
    largest = dataclasses.replace(own, prompt_tokens=max(min(512, model.context or 512) - 32, 1), output_tokens=32)
    refused = estimate.refusal(largest, model, estimate.predicted_bytes(largest, model, shape), limits.memory_bytes, spec.options.force)
    if refused:
        return refused
    tell({"event": "stage", "stage": "reference"})
    wanted = {"text": spec.options.quality_text, "references": {workload: str(file) for workload, file in missing.items()}}
    outcome = supervise.run_worker("reference", [own], model, [job.folder], job.folder / "reference.log", limits=limits, quality=wanted)
    if outcome.interrupted:
        raise KeyboardInterrupt
    return str(outcome.error) if outcome.error else ""


def _forget_old(needed: Sequence[Path]) -> None:
    """Keep the newest references in the cache, and those that are needed now."""
    with contextlib.suppress(OSError):
        newest = sorted(needed[0].parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in set(newest[MOST_KEPT:]) - set(needed):
            file.unlink()


def quality_of(spec: BenchSpec, cell: Cell, outcome: GroupOutcome) -> Quality | None:
    """What a worker found of a cell's quality; None if it was not asked for. Whatever is absent has its sentence."""
    if spec.options.quality == "none":
        return None
    if why := never(cell):
        return Quality(withheld=(why,))
    compared = outcome.divergences.get(cell.workload)
    withheld = outcome.withheld
    if not withheld and (compared is None or outcome.scores is None):
        withheld = ["The worker ended before the quality was evaluated. Measure the cell again with rerun=true."]
    return Quality(outcome.text_digest, outcome.scores, compared, tuple(withheld))
