"""Plan a sweep: expand the cells, resolve their models, and refuse what cannot work. Starts and writes nothing.

`plan` is the only place where cells are expanded, resolved, hashed and estimated. `llmbench plan` prints the plan, and
`sweep.execute` measures the same object.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.layout import weights_text
from ..backends.base import backend_class
from ..config import model_shape
from ..config.backend_checks import check_declared
from ..config.cells import cell_name, config_hash, expand_cells, group_cells, sweep_name
from ..config.spec import BenchSpec
from ..measure import interpreter, quality_order, quality_reference
from ..records.backends import capabilities_of
from ..records.cell import Cell, Options
from ..records.errors import MissingError, UsageError
from ..records.invocation import parameter_text
from ..records.results import Hashes, ModelFacts
from ..system import estimate, placement
from ..system.estimate import Refusal
from ..system.placement import Layout, Working
from ..workloads.prompts import PromptSet, prompts_of
from .executor import MachineFacts, this_machine

MOST_CELLS = 5000
"""Maximum number of cells of a sweep."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell with everything known of it before it is measured.

    `name` is that of its run, `folder` that of its files, unique in the sweep. `predicted_bytes` is the predicted peak
    memory, `predicted_load_bytes` that of the load alone, and `least_s` a lower bound of its seconds, all None if
    unknown. `predicted_placement` maps places to bytes of weights, with placement=auto. `environment` is that of the
    worker's interpreter, None if it is the command's. `refusal` is None if the cell will be tried.
    """

    cell: Cell
    model: ModelFacts
    hashes: Hashes
    name: str
    folder: str
    predicted_bytes: int | None = None
    least_s: float | None = None
    refusal: Refusal | None = None
    environment: Mapping[str, Any] | None = None
    predicted_load_bytes: int | None = None
    predicted_placement: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of one command.

    `cells` are in the order of the request; `groups` are the same cells in load groups, in the order of measurement.
    `parent_name` is the run name of the sweep, None for a single cell, which has no parent run. `prompts` maps each
    workload to its prompts.
    """

    spec: BenchSpec
    machine: MachineFacts
    cells: tuple[PlannedCell, ...]
    groups: tuple[tuple[PlannedCell, ...], ...]
    parent_name: str | None
    prompts: Mapping[str, PromptSet]

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of the parameters with more than one value."""
        return tuple(self.spec.varied)

    @property
    def tried(self) -> list[PlannedCell]:
        """Cells that will be measured."""
        return [planned for planned in self.cells if planned.refusal is None]

    @property
    def loads(self) -> int:
        """Number of load groups with a cell that will be measured."""
        return sum(any(planned.refusal is None for planned in group) for group in self.groups)

    def require_packages(self) -> None:
        """Raise MissingError if a cell is refused for want of a package: a command asks for it before it measures."""
        for planned in self.cells:
            if planned.refusal and planned.refusal.kind == "package":
                raise MissingError(planned.refusal.sentence)

    def only(self, cells: Sequence[PlannedCell]) -> Plan:
        """Return the plan of some of its cells, in the given order; lists, names and groups stay those of all."""
        kept = {planned.folder for planned in cells}
        groups = (tuple(planned for planned in group if planned.folder in kept) for group in self.groups)
        return dataclasses.replace(self, cells=tuple(cells), groups=tuple(filter(None, groups)))

    def with_cell(self, cell: Cell, origin: PlannedCell) -> Plan:
        """Return the plan with one more cell, last, in the load group of `origin`: a goodput search has chosen it."""
        rates = tuple(dict.fromkeys([*self.spec.axes["request_rate"], cell.request_rate]))
        spec = dataclasses.replace(self.spec, axes={**self.spec.axes, "request_rate": rates})
        resolved = _Resolved(origin.model, config_hash(cell, origin.model))
        folder = _folder(resolved.config_hash, sum(one.hashes.config == resolved.config_hash for one in self.cells))
        name = cell_name(cell, spec.varied)
        new = _planned_cell(cell, name, folder, resolved, self.prompts, self.machine, None)
        groups = tuple((*group, new) if origin in group else group for group in self.groups)
        return dataclasses.replace(self, spec=spec, cells=(*self.cells, new), groups=groups)


def plan(
    spec: BenchSpec,
    machine: MachineFacts | None = None,
    *,
    model: ModelFacts | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """Plan the cells of a request: the product of its lists, grouped by what must be loaded for them.

    `machine` are the facts of the executor that will measure, by default those of this machine. If `model` is given, it
    is the model of every cell, with `vocab_size` token ids, and nothing is resolved. Raises UsageError, ModelError or
    MissingError if nothing can be measured. A cell that cannot be measured beside others that can is refused alone.
    """
    cells = expand_cells(spec)
    if len(cells) > MOST_CELLS:
        raise UsageError(f"The lists make {len(cells)} cells, and the maximum is {MOST_CELLS}. Give shorter lists.")
    machine = machine or this_machine(spec.options, _devices(cells))
    groups = [group.cells for group in group_cells(cells)]
    if model:
        resolved = {cell: _Resolved(model, config_hash(cell, model), vocab_size) for cell in cells}
    else:
        resolved = _resolve(groups, spec.options)
        _refuse_same_configurations(resolved)
    number_of = {cell: number for number, cell in enumerate(cells)}
    return _plan(
        spec,
        machine,
        [(cell, cell_name(cell, spec.varied)) for cell in cells],
        [[number_of[cell] for cell in group] for group in groups],
        resolved,
        sweep_name(spec) if len(cells) > 1 or spec.options.find else None,
    )


def plan_in_turns(sides: Sequence[BenchSpec], options: Options, machine: MachineFacts | None = None) -> Plan:
    """Plan two requests of one cell each, A and B, which are measured in turns, each in its own processes.

    Both may be the same. `options` are those of the command. Raises as `plan` does.
    """
    cells = [cell for side in sides for cell in expand_cells(side)]
    spec = BenchSpec.of(cells, options)
    names = ["A", "B"]
    if cells[0] != cells[1]:
        names = [f"{letter}: {cell_name(cell, spec.varied)}" for letter, cell in zip(names, cells, strict=True)]
    machine = machine or this_machine(options, _devices(cells))
    resolved = _resolve([(cell,) for cell in dict.fromkeys(cells)], options)
    named = list(zip(cells, names, strict=True))
    return _plan(spec, machine, named, [[0], [1]], resolved, " against ".join(names))


@dataclass(frozen=True)
class _Resolved:
    """The model of a cell, the hash of its configuration, and the reason if its quantization lacks a package.

    `vocab_size` is only set if the model's facts do not have it.
    """

    model: ModelFacts
    config_hash: str
    vocab_size: int | None = None
    lacking: Refusal | None = None


def _plan(
    spec: BenchSpec,
    machine: MachineFacts,
    cells: Sequence[tuple[Cell, str]],
    groups: Sequence[Sequence[int]],
    resolved: Mapping[Cell, _Resolved],
    parent_name: str | None,
) -> Plan:
    """Plan cells, given with the names of their runs; `groups` are their positions. Raises as `plan` does."""
    prompts = prompts_of(cell for cell, _ in cells)
    quality_order.require(spec.options)
    scores = spec.options.quality != "none"
    needs: dict[int, Working | None] = {}  # a layout is that of a group
    for group in groups:
        sharing = [cells[number][0] for number in group]
        needs |= dict.fromkeys(group, placement.working(sharing, resolved[sharing[0]].model, scores))
    planned: list[PlannedCell] = []
    known = Counter[str]()  # configuration → how many cells have it so far
    for number, (cell, name) in enumerate(cells):
        config = resolved[cell].config_hash
        folder = _folder(config, known[config])
        planned.append(_planned_cell(cell, name, folder, resolved[cell], prompts, machine, needs[number]))
        known[config] += 1
    refusals = [one.refusal for one in planned if one.refusal and one.refusal.kind in ("context", "settings")]
    if len(refusals) == len(planned):
        raise UsageError(refusals[0].sentence)
    loads = tuple(tuple(planned[number] for number in group) for group in groups)
    return Plan(spec, machine, tuple(planned), loads, parent_name, prompts)


def _planned_cell(
    cell: Cell,
    name: str,
    folder: str,
    resolved: _Resolved,
    prompts: Mapping[str, PromptSet],
    machine: MachineFacts,
    needs: Working | None,
) -> PlannedCell:
    """Plan one cell; `needs` is what the cells of its group need besides weights."""
    model = resolved.model
    shape = model_shape.Shape.from_config(model.config) if model.config else None
    environment = interpreter.environment_of(cell, machine.environment)
    own = environment["hashes"]
    vocab_size = shape.vocab_size if shape else resolved.vocab_size
    workload = prompts[cell.workload].digest(cell, vocab_size)
    outlook = _outlook(cell, model, shape, machine, needs)
    rates = machine.rates.get(f"{own['hardware']} {cell.device} {cell.threads or 'auto'}", {})
    return PlannedCell(
        cell,
        model,
        Hashes(resolved.config_hash, workload, own["hardware"], own["software"], own["env"]),
        name,
        folder,
        outlook.predicted,
        estimate.least_seconds(cell, model, shape, rates),
        resolved.lacking or _backend_refusal(cell, model) or outlook.refusal,
        environment if cell.worker_python else None,
        outlook.loading,
        outlook.layout.weights if outlook.layout else None,
    )


@dataclass(frozen=True)
class _Outlook:
    """What is foreseen of a cell's memory: its peak, that of the load, its layout, and why it cannot be measured."""

    predicted: int | None = None
    loading: int | None = None
    layout: Layout | None = None
    refusal: Refusal | None = None


def _outlook(
    cell: Cell, model: ModelFacts, shape: model_shape.Shape | None, machine: MachineFacts, needs: Working | None
) -> _Outlook:
    rooms = machine.rooms.get(cell.device, {})
    if cell.placement == placement.AUTO:
        layout = placement.predict(cell, model, shape, rooms, needs)
        refused = placement.refusal(cell, model, layout)
        sizes = {"predicted": layout.needed, "loading": layout.loading} if layout else {}
        return _Outlook(layout=layout, refusal=refused, **sizes)
    predicted = estimate.predicted_bytes(cell, model, shape)
    loading = estimate.predicted_load_bytes(cell, model, shape)
    refused = estimate.refusal(cell, model, predicted, machine.memory.get(cell.device, (None, "")), loading)
    if refused and refused.kind == "memory" and (way := _way_out(cell, model, shape, rooms, needs)):
        refused = Refusal("memory", f"{refused.sentence} {way}")
    return _Outlook(predicted, loading, None, refused)


def _way_out(
    cell: Cell,
    model: ModelFacts,
    shape: model_shape.Shape | None,
    rooms: Mapping[str, int],
    needs: Working | None,
) -> str:
    """Say that placement=auto would measure a cell that does not fit on its device, and where weights would lie."""
    other = dataclasses.replace(cell, placement=placement.AUTO)
    if "placement" not in capabilities_of(cell.backend).parameters or _backend_refusal(other, model):
        return ""
    layout = placement.predict(other, model, shape, rooms, needs)
    if layout is None or layout.lacking:
        return ""
    return f"With {parameter_text('placement', 'auto')} its weights would lie in {weights_text(layout.weights)}."


def _backend_refusal(cell: Cell, model: ModelFacts) -> Refusal | None:
    """Return why the backend of a cell cannot measure it with this model; None if it can, or has no such rules."""
    refuse = getattr(backend_class(cell.backend), "refusal", None)
    sentence = refuse(cell, model) if refuse else None
    return Refusal("settings", sentence) if sentence else None


def _folder(config: str, known: int) -> str:
    """Name of a cell's folder: the hash of its configuration, with a number if `known` cells have the same."""
    return f"{config}-{known + 1}" if known else config


def _devices(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.device for cell in cells))


def _resolve(groups: Sequence[Sequence[Cell]], options: Options) -> dict[Cell, _Resolved]:
    """Return the model and the configuration of each cell. `groups` are cells that share a model.

    Raises what the backend's `resolve` raises, except for a quantization whose package is missing.
    """
    found: dict[Cell, _Resolved] = {}
    for group in groups:
        # A cluster has other devices than this machine.
        first = group[0] if options.on == "here" else dataclasses.replace(group[0], device="cpu")
        model, lacking = _resolve_one(first)
        found |= {cell: _Resolved(model, config_hash(cell, model), lacking=lacking) for cell in group}
    return found


def _resolve_one(cell: Cell) -> tuple[ModelFacts, Refusal | None]:
    """Return the model of a cell, and the reason if its quantization needs a package that is not installed here."""
    check_declared(cell)
    try:
        return interpreter.resolve(cell), None
    except MissingError as error:
        if cell.quant == "none":
            raise
        plain = quality_reference.sibling(cell)  # the same model unquantized, which needs only transformers
        return backend_class(plain.backend).resolve(plain), Refusal("package", str(error))


def _refuse_same_configurations(resolved: Mapping[Cell, _Resolved]) -> None:
    """Raise UsageError if two cells are the same configuration under two model names."""
    first: dict[str, Cell] = {}
    for cell, found in resolved.items():
        same = first.setdefault(found.config_hash, cell)
        if same is not cell:
            raise UsageError(
                f"{same.model} and {cell.model} are the same model, so their cells are the same. Leave one of them out."
            )
