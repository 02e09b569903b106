"""Predict cells that were not measured: from stored results, or for a machine given by its nominal rates."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..analysis.scaling.cells import Measured, parameter_count, select_usable
from ..analysis.scaling.focus import find_machines
from ..analysis.scaling.prediction import (
    AskedModel,
    PredictedCell,
    Prediction,
    costs_of,
    predict_cell,
    predict_on,
    shares_of,
)
from ..config import model_shape
from ..config.cells import MIXED_PARAMETERS, expand_cells
from ..config.models import find_preset
from ..config.spec import parse, values_of
from ..measure import interpreter
from ..records.cell import BACKEND_SPECIFIC, Cell, as_text
from ..records.errors import UsageError
from ..records.hardware import Hardware
from ..records.quantizations import FLOAT_DTYPES
from ..records.results import LoadInfo, ModelFacts, RunResult
from ..system import estimate
from ..tracking.load_results import Given, load_all

OF_A_QUANTIZATION = (*BACKEND_SPECIFIC, *MIXED_PARAMETERS, "group_size", "int8_threshold", "double_quant")
"""Settings of one runtime or quantization. Cells with another one say nothing of them."""


def predict(
    parameters: Mapping[str, object],
    of: Given | Iterable[Given] = (),
    hardware: Hardware | None = None,
    *,
    tracking_uri: str | None = None,
) -> Prediction:
    """Predict the cells of `parameters` (text or values; several values make several cells).

    Without `hardware` the machine is that of most results in `of`; what `parameters` leave out is as in most of its
    cells. With `hardware` its rates bound the figures, and results in `of` give the share of them that is reached.
    Nothing is measured or logged. Raises UsageError if there is nothing to predict from, or a parameter is wrong, and
    the errors of `load_results`.
    """
    results = load_all(of, tracking_uri)
    cells = [m for m in select_usable(results)[0] if m.cell.scenario == "offline"]
    if results and not cells:
        raise UsageError(
            f"None of the {len(results)} results can be used: a prediction needs valid or suspect cells of batches. "
            "Give others with --of, or name a machine with --hardware."
        )
    if not cells and hardware is None:
        raise UsageError("A prediction needs measured cells, or a machine. Give --of SWEEP, or --hardware rtx-4090.")
    machine = find_machines(cells)[0] if cells else None
    here = [m for m in cells if machine and m.result.hashes.env == machine.env]
    asked = _asked(parameters, here, hardware)
    models: dict[tuple[str, str, str], AskedModel | str] = {}
    found = []
    for cell in asked:
        key = cell.model, cell.quant, cell.backend
        if key not in models:
            models[key] = _model_of(cell, here, hardware)
        model = models[key]
        found.append(
            PredictedCell(cell, notes=(model,))
            if isinstance(model, str)
            else predict_on(hardware, cell, model, shares_of(_alike(here, cell)))
            if hardware
            else predict_cell(here, cell, model, _formula)
        )
    sweeps, suspect = tuple(dict.fromkeys(m.result.sweep for m in here)), sum(m.is_suspect for m in here)
    return Prediction(tuple(found), machine.name if machine else None, hardware, sweeps, len(here), suspect)


def _alike(here: Sequence[Measured], cell: Cell) -> list[Measured]:
    def setting(one: Cell) -> tuple[object, ...]:
        return one.quant, one.tensor_parallel, one.placement

    return [m for m in here if setting(m.cell) == setting(cell)]


def _asked(parameters: Mapping[str, object], here: Sequence[Measured], hardware: Hardware | None) -> list[Cell]:
    """Return the asked cells: each setting as given, else as in most measured cells, else its default.

    With `hardware`, which is one device, there is one rank.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    if not here and "model" not in given:
        raise UsageError("There is no model to predict. Name one: --model opt-1.3b.")
    names = [f.name for f in dataclasses.fields(Cell) if not (hardware and f.name == "tensor_parallel")]
    alike = here
    for name in ("backend", "quant"):
        asked = values_of(name, given[name]) if name in given else [_usual(name, alike)] if alike else []
        alike = [m for m in alike if as_text(name, getattr(m.cell, name)) in asked]
    texts = {name: _usual(name, alike if name in OF_A_QUANTIZATION else here) for name in names}
    usual = {name: text for name, text in texts.items() if text is not None}
    return expand_cells(parse({**usual, **given}, recorded=True))


def _usual(name: str, cells: Sequence[Measured]) -> str | None:
    """Return the value that most cells have, as text; None for an unset one, and without cells."""
    counts = Counter(getattr(m.cell, name) for m in cells)
    value = counts.most_common(1)[0][0] if counts else None
    return None if value is None else as_text(name, value)


def _facts_of(cell: Cell, here: Sequence[Measured]) -> ModelFacts:
    """Return the facts of a cell's model: of a measured cell, of the preset, or of its files."""
    measured = [m.result.model for m in here if m.cell.model == cell.model]
    if found := next((facts for facts in measured if facts.config), None):
        return found
    if preset := find_preset(cell.model):
        config = preset.config
        return ModelFacts(preset.name, "preset", preset.repository, "main", config, preset.dtype, preset.context)
    return measured[0] if measured else interpreter.resolve(cell)


def _model_of(cell: Cell, here: Sequence[Measured], hardware: Hardware | None) -> AskedModel | str:
    """Return what is known of a cell's model, or why it cannot be predicted."""
    facts = _facts_of(cell, here)
    if refusal := estimate.beyond_context(cell, facts) or estimate.contradiction(cell):
        return refusal.sentence
    shape = model_shape.Shape.from_config(facts.config) if facts.config else None
    dtype = FLOAT_DTYPES.get(cell.quant) or (facts.dtype if cell.quant == "none" else None) or ""
    loaded = next((m.result for m in here if (m.cell.model, m.cell.quant) == (cell.model, cell.quant)), None)
    stored = facts.dtype if facts.dtype in model_shape.VALUE_BYTES else "bfloat16"
    try:
        formula = costs_of(shape, cell.quant, stored or "") if shape else None
    except ValueError as error:
        return f"{cell.model} with quant={cell.quant} cannot be predicted: {error}"
    known = loaded.load if loaded and loaded.load and loaded.load.flops_per_token else None
    count = (parameter_count(loaded) if loaded else None) or (shape.parameters if shape else None)

    def memory(one: Cell) -> float | None:
        if shape is None or hardware is None:
            return estimate.predicted_bytes(one, facts, shape)
        lengths = one.prompt_tokens or 512, one.output_tokens
        return model_shape.memory_estimate(shape, one.quant, stored or "", one.batch_size, *lengths)

    costs: LoadInfo | None = formula if hardware else known or formula
    return AskedModel(costs, count, dtype, memory)


def _formula(cell: Cell, result: RunResult) -> float | None:
    """Estimate the peak memory of a measured cell as that of an asked one."""
    shape = model_shape.Shape.from_config(result.model.config) if result.model.config else None
    return estimate.predicted_bytes(cell, result.model, shape)
