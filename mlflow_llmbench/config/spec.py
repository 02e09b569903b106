"""Parse parameters given as text into a validated specification. Import no backend, read no file but a YAML of them.

Parameters are declared once, as the fields of `cell.Cell` and `cell.Options`. MLproject, the command line, YAML files
and the params of the MLflow run use the same names; on the command line underscores become dashes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any

from ..records import reading
from ..records.backends import SERVER_BACKEND, backend_of, capabilities_of
from ..records.cell import (
    BACKEND_SPECIFIC,
    LENGTHS,
    OF_ANSWERS,
    PARAMETERS,
    SWEEPABLE,
    Cell,
    Options,
    default_text,
    idle_parameters,
    split_list,
)
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.redaction import excerpt
from ..records.text import known_words
from .choices import GRIDS, SLOS
from .parsers import JSON_KINDS, OF_A_MACHINE, PARSERS, _parse_choice
from .request_fields import LONGEST as LONGEST_JSON
from .request_fields import as_json
from .validation import (
    check_cluster,
    check_find,
    check_offline_baseline,
    check_placement,
    check_ranks,
    check_together,
)

IN_PROCESS_ONLY = (
    "weights", "revision", "backend", "group_size", "quant_budget", "quant_plan", "int8_threshold", "double_quant",
    "prune", "batch_size", "device", "threads", "tensor_parallel", "placement", "gpu_layers", "kv_cache", "mmap",
    "attention", "decode", "assistant", "draft_tokens", "trust_remote_code", "allow_pickle", "preset", "on", "force",
    "memory_limit", "quality", "quality_text", "quality_reference", "worker_python", "quality_tasks", "quality_limit",
)  # fmt: skip
"""Parameters that have no meaning if another process runs the model."""

PATHS = ("text", "workload", "trace")
"""Kinds of parameters that may be paths. The path of a file or folder that exists is one value, with its commas."""

LONGEST_VALUE = 1000
"""Most characters of one value."""

SERVERS = ("url", "launch")
"""Parameters that name the server to measure; one of them is given."""

COMMANDS = {
    "run": tuple(name for name, f in PARAMETERS.items() if "batching" in f.metadata["scenarios"]),
    "online": (
        *SERVERS,
        *(
            name
            for name, f in PARAMETERS.items()
            if name not in (*IN_PROCESS_ONLY, *SERVERS) and "online" in f.metadata["scenarios"]
        ),
    ),
    "tune": tuple(name for name in PARAMETERS if name not in ("on", "twin", "find", "attainment")),
    "qat": (
        "model", "revision", "group_size", "device", "threads", "seed", "trust_remote_code", "allow_pickle",
        "output_dir", "force", "memory_limit",
    ),
}  # fmt: skip
"""Command (also entry point of the MLproject) → its parameters; `qat` also has those of `training.Training`."""


def cell_fields(cell: Cell) -> list[str]:
    """Return the parameters that have a meaning for a cell. Startup settings of a foreign server are unknown."""
    return _meant(cell, {f.name: (getattr(cell, f.name),) for f in dataclasses.fields(Cell)}, [cell.backend])


def asked_fields(spec: BenchSpec) -> list[str]:
    """Return the parameters that have a meaning for any cell of a request."""
    backends = [
        backend_of(str(backend), str(quant)) for backend in spec.axes["backend"] for quant in spec.axes["quant"]
    ]
    return _meant(spec.first, spec.axes, backends)


def _meant(first: Cell, values: Mapping[str, Collection[object]], backends: Iterable[str]) -> list[str]:
    """Return the parameters that have a meaning for any cell of these values and backends; the first shows how it runs.

    One that is not given, whose word for that is `none`, has none.
    """
    scenario = first.scenario
    known = {*COMMANDS["online"], "backend"} if scenario == "online" else {*COMMANDS["run"]}
    known -= {"url"} if first.launch else {"launch", "quant"} if first.url else set()
    known -= {*LENGTHS} if first.trace else set()
    known -= set() if first.generates else {*OF_ANSWERS}
    taken = {name for backend in backends for name in capabilities_of(backend).parameters}
    idle = idle_parameters(values) | ({*BACKEND_SPECIFIC} - taken)
    found = []
    for name in (f.name for f in dataclasses.fields(Cell)):
        about, default = PARAMETERS[name].metadata, PARAMETERS[name].default
        says_nothing = name in idle or (default is None and about["unset"] == "none")
        if (
            name in known
            and scenario in about["scenarios"]
            and not (says_nothing and tuple(values[name]) == (default,))
        ):
            found.append(name)
    return found


@dataclass(frozen=True)
class BenchSpec:
    """The request: a list of values for each parameter of a cell, and the options of the command."""

    axes: Mapping[str, tuple[object, ...]]
    options: Options = field(default_factory=Options)

    @classmethod
    def of(cls, cells: Sequence[Cell], options: Options) -> BenchSpec:
        """Return the request whose lists have the values of these cells, each once, in their order."""
        names = [f.name for f in dataclasses.fields(Cell)]
        return cls({name: tuple(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in names}, options)

    @property
    def varied(self) -> list[str]:
        """Names of the parameters with more than one value."""
        return [
            name
            for name, values in self.axes.items()
            if len(values) > 1 or (name == "request_rate" and self.options.find)
        ]

    @property
    def scenario(self) -> str:
        """The scenario that all cells share: see `Cell.scenario`."""
        return self.first.scenario

    @property
    def first(self) -> Cell:
        """The cell of the first values. Facts that all cells share can be read from it."""
        return Cell(**{name: values[0] for name, values in self.axes.items()})  # type: ignore[arg-type]


def parse(values: Mapping[str, object], recorded: bool = False) -> BenchSpec:
    """Validate parameters given as text (or numbers) and expand comma lists.

    Missing parameters take their defaults. `recorded`: those of an earlier command, perhaps of another machine, so no
    file that they name is looked at. Raises UsageError, one line, on the first error.
    """
    for name in values:
        if name not in PARAMETERS:
            raise UsageError(f"Unknown parameter: {name}. {known_words(name, PARAMETERS)}")
    values = {**values, **_from_preset(values)}
    values |= _from_slo(values)
    axes: dict[str, tuple[object, ...]] = {}
    options: dict[str, object] = {}
    launched = str(values.get("launch") or "none").lower() != "none"
    for name, declared in PARAMETERS.items():
        given = values.get(name)
        texts = [default_text(name)] if given is None else values_of(name, given)
        if len(texts) > 1 and not declared.metadata["sweep"]:
            raise UsageError(
                f"{name} takes one value: {excerpt(','.join(texts), 200)}. "
                f"Lists are allowed for {', '.join(SWEEPABLE)}."
            )
        kind = "scheme" if name == "quant" and launched else declared.metadata["kind"]
        kind = "text" if recorded and kind in OF_A_MACHINE else kind
        parsed = tuple(dict.fromkeys(_parse_one(name, declared, text, kind) for text in texts))
        if name in Options.__dataclass_fields__:
            options[name] = parsed[0]
        else:
            axes[name] = parsed
    if options["find"]:
        check_find(axes, bool(options["twin"]))
    if options["twin"]:
        check_offline_baseline(axes)
        server = str(axes["backend"][0])
        axes["backend"] = (capabilities_of(server).offline_baseline, server)
    check_together(axes)
    check_cluster(axes, options)
    check_ranks(axes, options)
    check_placement(axes, options)
    return BenchSpec(axes, Options(**options))  # type: ignore[arg-type]


def with_backend(values: Mapping[str, object]) -> dict[str, object]:
    """Return parameters with the backend for servers, if they name a server and no other backend."""
    given = dict(values)
    is_server = any(str(given.get(name) or "none").lower() != "none" for name in SERVERS)
    if is_server and given.get("backend") in (None, PARAMETERS["backend"].default):
        given["backend"] = SERVER_BACKEND
    return given


def _from_preset(values: Mapping[str, object]) -> dict[str, str]:
    """Return the parameters that the named preset sets: those of its grid that are not given.

    If every parameter is given, as MLproject does, values equal to the default count as not given.
    """
    preset = str(values.get("preset") or "none")
    if preset.lower() == "none":
        return {}
    grid = GRIDS[_parse_choice("preset", preset, GRIDS)]
    whole = all(values.get(name) is not None for name in COMMANDS["run"])
    return {
        name: text
        for name, text in grid.items()
        if values.get(name) is None or (whole and str(values[name]) == default_text(name))
    }


def _from_slo(values: Mapping[str, object]) -> dict[str, str]:
    """Return the limits of the named benchmark that are not given."""
    name = str(values.get("slo") or "none")
    if name.lower() == "none":
        return {}
    limits = SLOS[_parse_choice("slo", name, SLOS)]
    return {limit: text for limit, text in limits.items() if str(values.get(limit) or "none").lower() == "none"}


def read_yaml(path: str) -> dict[str, object]:
    """Read parameters from a YAML file that maps names to a value or a list, such as the `config.yaml` of a run.

    Raises UsageError if it cannot be read.
    """
    try:
        data = reading.read_yaml(path)
    except Unreadable as error:
        raise UsageError(
            f"Cannot read parameters from {path}: {error}. Give a YAML file with one `name: value` per line."
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"No parameters in {path}. Give a YAML file with one `name: value` per line.")
    # YAML 1.1 reads an unquoted `on` as true
    return {"on" if key is True else str(key): value for key, value in data.items()}


def values_of(name: str, given: object) -> list[str]:
    """Return the values of a parameter that may be a list, as texts. Raises UsageError for an empty one."""
    metadata = PARAMETERS[name].metadata
    if metadata["kind"] in JSON_KINDS and isinstance(given, Mapping):
        parts = [as_json(name, given)]
    elif isinstance(given, str):
        whole = not metadata["sweep"] or (metadata["kind"] in PATHS and "," in given and os.path.exists(given))
        parts = [given.strip()] if whole else split_list(given, metadata["separator"])
    else:
        several = given if isinstance(given, Iterable) and not isinstance(given, Mapping | bytes) else (given,)
        parts = [_plain(name, one).strip() for one in several]
    if not parts or not all(parts):
        raise UsageError(
            f"{name} has an empty value: '{excerpt(str(given), 200)}'. "
            f"Leave the parameter out for its default ({default_text(name)})."
        )
    return parts


def _plain(name: str, value: object) -> str:
    """Return one value as text. Raises UsageError for what is no plain value, such as a list within a list."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or (isinstance(value, Iterable) and not isinstance(value, str)):
        raise UsageError(
            f"{name} has a value that is neither a text nor a number: {excerpt(str(value), 60)}. "
            f"Give one value, or a list of values, such as {default_text(name)}."
        )
    return str(value)


def _parse_one(name: str, declared: Field[Any], text: str, kind: str) -> object:
    unset = declared.metadata["unset"]
    most = LONGEST_JSON if kind in JSON_KINDS else LONGEST_VALUE
    if len(text) > most:
        raise UsageError(
            f"{name} has a value of {len(text):,} characters: {excerpt(text, 40)}. Give at most {most:,} characters."
        )
    if unset and text.lower() == unset:
        return None
    return PARSERS[kind](name, text, declared.metadata)
