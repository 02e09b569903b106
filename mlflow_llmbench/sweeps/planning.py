"""Plan a sweep: expand cells, resolve models, refuse what cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backends.base import backend_class
from ..config import model_shape
from ..config.cells import config_hash, expand_cells
from ..config.spec import BenchSpec
from ..config.validation import check_declared
from ..measure import interpreter, quality_reference
from ..records.cell import Cell
from ..records.errors import MissingError, UsageError
from ..records.results import Hashes, ModelFacts
from ..system import estimate
from ..workloads.prompts import PromptSet
from .job import Job


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
        config = config_hash(cell, model)
        twins = sum(job.hashes.config == config for job in jobs)
        shape = model_shape.Shape.from_config(model.config) if model.config else None
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
    shape = model_shape.Shape.from_config(model.config) if model.config else None
    return prompts.digest(cell, shape.vocab_size if shape else None)


def refuse_twins(cells: Sequence[Cell], model_of: Mapping[Cell, ModelFacts]) -> None:
    """Raise UsageError if two cells are the same configuration under two model names."""
    first: dict[str, Cell] = {}
    for cell in cells:
        twin = first.setdefault(config_hash(cell, model_of[cell]), cell)
        if twin is not cell:
            raise UsageError(
                f"{twin.model} and {cell.model} are the same model, so their cells are the same. Leave one of them out."
            )


MOST_CELLS = 5000


def expand(spec: BenchSpec) -> list[Cell]:
    """Return the cells of a specification. Raises UsageError if there are more than `MOST_CELLS`."""
    cells = expand_cells(spec)
    if len(cells) > MOST_CELLS:
        raise UsageError(f"The lists make {len(cells)} cells, and the maximum is {MOST_CELLS}. Give shorter lists.")
    return cells


def resolve_models(
    groups: Sequence[Sequence[Cell]], on: str = "here", lacking: dict[Cell, str] | None = None
) -> dict[Cell, ModelFacts]:
    """Return the model of each cell. `groups` are cells that share a model.

    Raises UsageError if every cell exceeds its model's context or has settings that exclude each other. Otherwise such
    cells are refused later, one by one. Raises MissingError if a quantization needs a package that is not installed
    here. If `lacking` is given, that message is stored in it for each cell concerned instead.
    """

    def resolve(group: Sequence[Cell]) -> ModelFacts:
        # A cluster has other devices than this machine.
        cell = group[0] if on == "here" else dataclasses.replace(group[0], device="cpu")
        check_declared(cell)
        try:
            return interpreter.resolve(cell)
        except MissingError as error:
            if lacking is None or cell.quant == "none":
                raise
            lacking.update(dict.fromkeys(group, str(error)))
            plain = quality_reference.sibling(cell)  # the same model unquantized, which needs only transformers
            return backend_class(plain.backend).resolve(plain)

    facts = [resolve(group) for group in groups]
    model_of = {cell: model for group, model in zip(groups, facts, strict=True) for cell in group}
    messages = [
        estimate.beyond_context(cell, model) or estimate.contradiction(cell) for cell, model in model_of.items()
    ]
    if all(messages):
        raise UsageError(str(messages[0]))
    return model_of
