"""Expand a specification into ordered cells, grouped by what must be loaded for them, and identify cells."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records.backends import backend_of, capabilities_of
from ..records.cell import BACKEND_SPECIFIC, DEPENDS_ON, LENGTHS, PARAMETERS, Cell, as_text, list_text
from ..records.quantizations import CALIBRATED, MIXED
from ..records.redaction import escape_controls, redact
from ..records.results import ModelFacts, hash16
from .server_command import offline_quant
from .spec import BenchSpec, asked_fields, cell_fields

LOADED = (
    "model", "weights", "revision", "backend", "quant", "group_size", "quant_budget", "quant_plan", "int8_threshold",
    "double_quant", "prune", "device", "threads", "tensor_parallel", "placement", "gpu_layers", "kv_cache", "mmap",
    "attention", "decode", "assistant", "draft_tokens", "trust_remote_code", "url", "launch", "endpoint",
    "worker_python", "temperature", "ignore_eos", "thinking", "max_tokens_field", "extra_body", "headers", "tls_ca",
    "tls_cert", "tls_key", "proxy",
)  # fmt: skip
"""Load key: parameters that decide what is loaded, and process settings that cannot change afterwards."""

WEIGHTS = (
    "model", "weights", "revision", "backend", "quant", "group_size", "quant_budget", "quant_plan", "double_quant",
    "prune", "device", "tensor_parallel", "placement", "gpu_layers", "kv_cache", "mmap", "decode", "assistant", "url",
    "launch", "worker_python",
)  # fmt: skip
"""Parameters that decide the memory of a load; cells that share them differ only by their shape."""

NOT_IN_IDENTITY = (
    "max_repetitions", "allow_pickle", "slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms", "worker_python", "tls_ca",
    "tls_cert", "tls_key",
)  # fmt: skip
"""Parameters of a cell that do not decide its result. Of an interpreter the environment counts, not its path."""

LATER = (
    *DEPENDS_ON, "prune", "kv_cache", "tensor_parallel", "placement", "temperature", "ignore_eos", "thinking",
    "max_tokens_field", "extra_body", "headers", "proxy", "prefix_tokens", "prefix_count",
)  # fmt: skip
"""Parameters that older identities lack, so they are left out of an identity at their defaults."""

MIXED_PARAMETERS = ("quant_budget", "quant_plan")
"""Parameters of a mixed quantization; they are part of no other cell's identity."""

SHORT = {"batch_size": "b", "tensor_parallel": "tp"}
"""Parameter → its short name in the name of a run."""

LONGEST_NAME = 250
"""Maximum characters of a run name, the limit of MLflow's tables."""


@dataclass(frozen=True)
class Group:
    """Load group: cells that one load serves, largest shape first, so that the memory peak comes first."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """The largest cell; all cells share its load parameters."""
        return self.cells[0]


def expand_cells(spec: BenchSpec) -> list[Cell]:
    """Return the product of all lists, in the given order. Cells that differ in nothing meaningful are merged.

    A quantization that the requested backend lacks gets the delegate that has it.
    """
    names = list(spec.axes)
    products: Iterable[tuple[Any, ...]] = itertools.product(*spec.axes.values())
    cells = [Cell(**dict(zip(names, values, strict=True))) for values in products]
    cells = [_settled(dataclasses.replace(cell, backend=backend_of(cell.backend, cell.quant))) for cell in cells]
    return list(
        dict.fromkeys(
            without_server(cell) if cell.launch and not capabilities_of(cell.backend).online else cell for cell in cells
        )
    )


def _settled(cell: Cell) -> Cell:
    """Return the cell with parameters that have no meaning for it set to their defaults."""
    idle: dict[str, Any] = {name: PARAMETERS[name].default for name in _idle(cell)}
    return dataclasses.replace(cell, **idle)


def _idle(cell: Cell) -> set[str]:
    """Return the parameters without meaning for a cell: of another backend, quantization, or value of a setting."""
    others = {name for name, (parameter, values) in DEPENDS_ON.items() if getattr(cell, parameter) not in values}
    foreign = {*BACKEND_SPECIFIC} - {*capabilities_of(cell.backend).parameters}
    without_prefix = {"prefix_count"} if cell.prefix_tokens is None else set()
    return others | foreign | without_prefix | {*(MIXED_PARAMETERS if cell.quant != MIXED else ())}


def without_server(cell: Cell) -> Cell:
    """Return the same model, quantization and lengths without a server: its users become the rows of one batch."""
    of_servers = {f.name: f.default for f in dataclasses.fields(Cell) if "offline" not in f.metadata["scenarios"]}
    backend, quant = capabilities_of(cell.backend).offline_baseline or cell.backend, offline_quant(cell.quant)
    own = {"backend": backend_of(backend, quant), "quant": quant, "batch_size": cell.concurrency}
    return dataclasses.replace(cell, **of_servers, **own)  # type: ignore[arg-type]


def group_cells(cells: list[Cell]) -> list[Group]:
    """Group cells by load key, in the order of each group's first cell.

    The seed is part of the key if it makes the weights, and seed and workload if they calibrate a quantization.
    """
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        key = tuple(getattr(cell, name) for name in LOADED) + ((cell.seed,) if cell.weights == "random" else ())
        key += (cell.seed, cell.workload) if cell.quant in CALIBRATED else ()
        groups.setdefault(key, []).append(cell)
    return [Group(tuple(sorted(group, key=size, reverse=True))) for group in groups.values()]


def size(cell: Cell) -> tuple[int, int]:
    """Sort key of shapes: tokens in the KV cache, then rows. Offline concurrency is 1; online batch size is 1."""
    rows = cell.batch_size * cell.concurrency
    return rows * ((cell.prompt_tokens or 0) + cell.output_tokens), rows


def needs_no_less(cell: Cell, other: Cell, ignore_shape: bool = False, compare_time: bool = False) -> bool:
    """Return True if a cell needs at least the memory of another: same weights, and no smaller in any dimension.

    `ignore_shape`: the other did not even load, so shapes do not matter. `compare_time`: compare time instead of
    memory, which settings such as more threads may shorten.
    """
    alike = LOADED if compare_time else WEIGHTS
    if any(
        getattr(cell, name) != getattr(other, name)
        for name in (*alike, *(() if ignore_shape else ("attention", "history", "batching")))
    ):
        return False
    if ignore_shape:
        return True
    unknown = cell.prompt_tokens is None or other.prompt_tokens is None
    same = (cell.prompt_tokens, cell.workload) == (other.prompt_tokens, other.workload)
    longer = same if unknown else (cell.prompt_tokens or 0) >= (other.prompt_tokens or 0)
    denser = cell.concurrency >= other.concurrency and (cell.request_rate or 0) >= (other.request_rate or 0)
    return longer and denser and cell.batch_size >= other.batch_size and cell.output_tokens >= other.output_tokens


def config_hash(cell: Cell, model: ModelFacts) -> str:
    """Identity of a configuration: the parameters that decide the result, with the resolved model and revision."""
    fields = [
        f
        for f in dataclasses.fields(cell)
        if f.name not in NOT_IN_IDENTITY and cell.scenario in f.metadata["scenarios"]
    ]
    idle = _idle(cell) | {name for name in LATER if getattr(cell, name) == PARAMETERS[name].default}
    decisive = {f.name: getattr(cell, f.name) for f in fields if f.name not in idle}
    decisive["model"], decisive["revision"] = model.identity
    if model.assistant:
        decisive["assistant"] = model.assistant.identity
    if model.quant_plan:  # its content counts, not its path
        decisive["quant_plan"] = dict(model.quant_plan.schemes)
    return hash16(decisive)


def asked_params(spec: BenchSpec) -> dict[str, str]:
    """Return the requested parameters as text, each with its value or its comma list."""
    values = {
        # The last backend is the one that was asked for; `twin` adds another before it.
        name: spec.axes[name][-1:] if name == "backend" else spec.axes[name]
        for name in asked_fields(spec)
    }
    return {name: list_text(name, of) for name, of in values.items()}


def option_params(spec: BenchSpec) -> dict[str, str]:
    """Return the options of the command as text."""
    return {name: as_text(name, value) for name, value in vars(spec.options).items()}


def cell_name(cell: Cell, varied: Sequence[str] = ()) -> str:
    """Return a run name: the model, then what varies (`opt-125m int4 b4`).

    A single cell is named by quantization, load and lengths: `opt-125m int4 b4 128+128`, `opt-125m online c2 64+32`.
    """
    if not varied:
        quant = [] if cell.scenario == "online" and cell.quant == "none" else [cell.quant]
        lengths = [] if cell.trace else [_lengths_text(cell)]
        pruned = [cell.prune] if cell.prune else []
        return _named(_last_part(cell.model), [*pruned, *quant, *_loads(cell), *lengths])
    known = cell_fields(cell)
    names = [name for name in varied if name in known and name != "model"]
    names += ["batch_size"] if "concurrency" in varied and cell.scenario == "offline" else []  # a cell that `twin` adds
    both = {*LENGTHS} <= {*names}
    parts = [_lengths_text(cell) if both and name in LENGTHS else setting_text(name, cell) for name in names]
    return _named(_last_part(cell.model), list(dict.fromkeys(parts)))


def setting_text(name: str, cell: Cell) -> str:
    """Return a parameter with its value as part of a name: `int4`, `b4`, `tp2`, `c2`, `5/s`, else `threads=2`."""
    if name in ("concurrency", "request_rate"):
        return load_text(cell)
    text = as_text(name, getattr(cell, name))
    text = redact(text) if name == "launch" else _last_part(text)
    if name == "quant" or (name == "prune" and text != "none"):
        return text
    return f"{SHORT[name]}{text}" if name in SHORT else f"{name}={text}"


def _loads(cell: Cell) -> list[str]:
    """Return how a single cell is loaded, as parts of its name."""
    if cell.scenario == "online":
        return ["online", f"trace {_last_part(cell.trace)}" if cell.trace else load_text(cell)]
    stream = [load_text(cell)] if cell.batching else []
    ranks = [f"tp{cell.tensor_parallel}"] if cell.tensor_parallel > 1 else []
    placed = [] if cell.placement == PARAMETERS["placement"].default else [f"placement={cell.placement}"]
    return [*([cell.batching] if cell.batching else []), f"b{cell.batch_size}", *ranks, *placed, *stream]


def _lengths_text(cell: Cell) -> str:
    """Short name of the lengths of prompt and output: `128+64`, or `qa+64` if they are those of the workload."""
    prompt = _last_part(cell.workload) if cell.prompt_tokens is None else str(cell.prompt_tokens)
    return f"{prompt}+{cell.output_tokens}" if cell.generates else f"{prompt} embedded"


def load_text(cell: Cell) -> str:
    """Short name of the load on a server: `c4` for four users, `5/s` for a rate."""
    return f"c{cell.concurrency}" if cell.request_rate is None else rate_text(cell)


def rate_text(cell: Cell) -> str:
    """Short name of an open loop's rate: `5/s`, or `1..10/s` for a ramp."""
    return f"{cell.request_rate:g}{'' if cell.ramp_to is None else f'..{cell.ramp_to:g}'}/s"


def sweep_name(spec: BenchSpec) -> str:
    """Run name of a sweep: the model and the varied parameters (`opt-125m: quant × batch_size`)."""
    models = [_last_part(str(model)) for model in spec.axes["model"]]
    rest = [name for name in spec.varied if name != "model"]
    return _cut(f"{', '.join(models[:3])}{' …' if len(models) > 3 else ''}: {' × '.join(rest) if rest else 'model'}")


def _last_part(path: str) -> str:
    """Last part of a path or a Hub id; all of it if there is nothing before a slash."""
    return redact(path).rstrip("/").rsplit("/", 1)[-1]  # redacted first: half an address is not recognised


def _named(model: str, parts: Sequence[str]) -> str:
    """Return a run name fit to be shown. A long model is cut, since the parts tell the runs of a sweep apart."""
    rest = "".join(f" {part}" for part in parts)
    return _cut(f"{_cut(model, max(LONGEST_NAME - len(escape_controls(rest)), 1))}{rest}")


def _cut(text: str, most: int = LONGEST_NAME) -> str:
    """Return a text without control characters, cut to a number of characters."""
    text = escape_controls(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
