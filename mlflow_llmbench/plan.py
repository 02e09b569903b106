"""BenchSpec → ordered cells, grouped by what has to be loaded for them; the identity of a cell."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from .cell import Cell
from .launch import offline_quant
from .quantizations import GPTQ_BITS, LLAMA_CPP, MIXED, backend_of
from .records import ModelFacts, hash16
from .redaction import escape_controls, redact
from .spec import MEANT_WITH, PARAMETERS, TWINS, BenchSpec, as_text, cell_fields

LOADED = (
    "model",
    "weights",
    "revision",
    "backend",
    "quant",
    "group_size",
    "quant_budget",
    "quant_plan",
    "int8_threshold",
    "double_quant",
    "device",
    "threads",
    "gpu_layers",
    "kv_cache",
    "mmap",
    "attention",
    "decode",
    "assistant",
    "draft_tokens",
    "trust_remote_code",
    "url",
    "launch",
    "endpoint",
    "worker_python",
)
"""Parameters that decide what is loaded, and the process settings that cannot be changed afterwards."""

WEIGHTS = (
    "model",
    "weights",
    "revision",
    "backend",
    "quant",
    "group_size",
    "quant_budget",
    "quant_plan",
    "double_quant",
    "device",
    "gpu_layers",
    "kv_cache",
    "mmap",
    "decode",
    "assistant",
    "url",
    "launch",
    "worker_python",
)
"""Parameters that decide what memory a load takes; cells that share them differ by their shape."""

UNDECISIVE = ("max_repetitions", "allow_pickle", "slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms", "worker_python")
"""Parameters of a cell that do not decide its result; of an interpreter its environment does, and not where it lies."""

OF_MIXED = ("quant_budget", "quant_plan")
"""Parameters of a mixed quantization; they belong to the identity of no other."""

LONGEST_NAME = 250
"""Characters of a run's name; MLflow's tables have room for no more."""


@dataclass(frozen=True)
class Group:
    """Cells that one load serves, largest shape first, so that the memory peak comes first."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """The largest cell; its load parameters are those of all."""
        return self.cells[0]


def expand_cells(spec: BenchSpec) -> list[Cell]:
    """The product of all lists, in the order in which they were given; cells that differ in nothing that has a meaning for them are one.

    A quantization of llama.cpp names its backend.
    """
    names = list(spec.axes)
    cells = [Cell(**dict(zip(names, values, strict=True))) for values in itertools.product(*spec.axes.values())]  # type: ignore[arg-type]
    cells = [_settled(dataclasses.replace(cell, backend=backend_of(cell.backend, cell.quant))) for cell in cells]
    return list(
        dict.fromkeys(without_server(cell) if cell.launch and cell.backend != "openai" else cell for cell in cells)
    )


def _settled(cell: Cell) -> Cell:
    """The cell with its settings at their default where they have no meaning."""
    idle: dict[str, Any] = {name: PARAMETERS[name].default for name in _idle(cell)}
    return dataclasses.replace(cell, **idle)


def _idle(cell: Cell) -> set[str]:
    """Parameters that mean nothing for a cell: those of another backend, of another quantization, or of another setting's value."""
    others = {name for name, (parameter, values) in MEANT_WITH.items() if getattr(cell, parameter) not in values}
    return others | {*(LLAMA_CPP if cell.backend != "llama_cpp" else ()), *(OF_MIXED if cell.quant != MIXED else ())}


def without_server(cell: Cell) -> Cell:
    """The same model, quantization and lengths without a server: its users' requests as the rows of one batch."""
    of_servers = {f.name: f.default for f in dataclasses.fields(Cell) if "offline" not in f.metadata["scenarios"]}
    own = {"backend": TWINS[0], "quant": offline_quant(cell.quant), "batch_size": cell.concurrency}
    return dataclasses.replace(cell, **of_servers, **own)  # type: ignore[arg-type]


def group_cells(cells: list[Cell]) -> list[Group]:
    """Cells by load key, groups in the order of their first cell.

    The seed belongs to the key where it makes the weights, and the workload where it calibrates a quantization.
    """
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        key = tuple(getattr(cell, name) for name in LOADED) + ((cell.seed,) if cell.weights == "random" else ())
        key += (cell.seed, cell.workload) if cell.quant in (*GPTQ_BITS, MIXED) else ()
        groups.setdefault(key, []).append(cell)
    return [Group(tuple(sorted(group, key=size, reverse=True))) for group in groups.values()]


def size(cell: Cell) -> tuple[int, int]:
    """Order of shapes: tokens held in the KV cache, then rows. An offline cell has one user, an online one one row."""
    rows = cell.batch_size * cell.concurrency
    return rows * ((cell.prompt_tokens or 0) + cell.output_tokens), rows


def needs_no_less(cell: Cell, other: Cell, of_any_shape: bool = False, of_time: bool = False) -> bool:
    """Whether a cell needs at least the memory of another: the same weights, and no smaller in any dimension.

    `of_any_shape`: the other did not even load, so its shape does not matter. `of_time`: at least its time, which more threads, say, may shorten.
    """
    alike = LOADED if of_time else WEIGHTS
    if any(
        getattr(cell, name) != getattr(other, name)
        for name in (*alike, *(() if of_any_shape else ("attention", "history", "batching")))
    ):
        return False
    if of_any_shape:
        return True
    unknown = cell.prompt_tokens is None or other.prompt_tokens is None
    same = (cell.prompt_tokens, cell.workload) == (other.prompt_tokens, other.workload)
    longer = same if unknown else (cell.prompt_tokens or 0) >= (other.prompt_tokens or 0)
    denser = cell.concurrency >= other.concurrency and (cell.request_rate or 0) >= (other.request_rate or 0)
    return longer and denser and cell.batch_size >= other.batch_size and cell.output_tokens >= other.output_tokens


def config_hash(cell: Cell, model: ModelFacts) -> str:
    """Identity of a configuration: the parameters that decide the result, with the resolved model and revision."""
    fields = [
        f for f in dataclasses.fields(cell) if f.name not in UNDECISIVE and cell.scenario in f.metadata["scenarios"]
    ]
    idle = _idle(cell) | {
        name for name in (*MEANT_WITH, "kv_cache") if getattr(cell, name) == PARAMETERS[name].default
    }  # identities are older than these
    decisive = {f.name: getattr(cell, f.name) for f in fields if f.name not in idle}
    decisive["model"], decisive["revision"] = model.identity
    if model.assistant:
        decisive["assistant"] = model.assistant.identity
    if model.quant_plan:  # what it says, not where it lies
        decisive["quant_plan"] = dict(model.quant_plan.schemes)
    return hash16(decisive)


def asked_params(spec: BenchSpec) -> dict[str, str]:
    """What was asked for, as text: each parameter with its value or its comma list."""
    names = cell_fields(spec.first)
    values = {
        name: spec.axes[name][-1:] if name == "backend" else spec.axes[name] for name in names
    }  # `twin` says that there is another
    return {
        name: PARAMETERS[name].metadata["separator"].join(as_text(name, value) for value in values[name])
        for name in names
    }


def option_params(spec: BenchSpec) -> dict[str, str]:
    """The options of the command as text."""
    return {name: as_text(name, value) for name, value in vars(spec.options).items()}


def cell_name(cell: Cell, varied: list[str]) -> str:
    """A run name: what varies (`quant=int4 batch_size=4`), or for a single cell what it is (`opt-1.3b int4 b1`)."""
    if not varied and cell.scenario == "online":
        load = f"trace {_last_part(cell.trace)}" if cell.trace else load_text(cell)
        return f"{cell.model.rstrip('/').rsplit('/', 1)[-1]} online {load}"
    if not varied and cell.batching:
        return _named(
            f"{_last_part(cell.model)} {cell.quant} {cell.batching} b{cell.batch_size} {cell.request_rate:g}/s"
        )
    if not varied:
        return _named(f"{_last_part(cell.model)} {cell.quant} b{cell.batch_size}")
    known = cell_fields(cell)
    names = [name for name in varied if name in known]
    names += ["batch_size"] if "concurrency" in varied and cell.scenario == "offline" else []  # a cell that `twin` adds
    return _named(" ".join(f"{name}={_shown(name, cell)}" for name in names))


def _shown(name: str, cell: Cell) -> str:
    """A parameter's value in a name: of a path its last part, a command whole."""
    text = as_text(name, getattr(cell, name))
    return redact(text) if name == "launch" else _last_part(text)


def load_text(cell: Cell) -> str:
    """The load on a server in a word: `c4` for four users, `5/s` for a rate."""
    return f"c{cell.concurrency}" if cell.request_rate is None else rate_text(cell)


def rate_text(cell: Cell) -> str:
    """The rate of an open loop in a word: `5/s`, or `1..10/s` for a ramp."""
    return f"{cell.request_rate:g}{'' if cell.ramp_to is None else f'..{cell.ramp_to:g}'}/s"


def sweep_name(spec: BenchSpec) -> str:
    """A parent's run name: the model and what varies (`opt-125m: quant × batch_size`)."""
    models = [_last_part(str(model)) for model in spec.axes["model"]]
    rest = [name for name in spec.varied if name != "model"]
    return _named(f"{', '.join(models[:3])}{' …' if len(models) > 3 else ''}: {' × '.join(rest) if rest else 'model'}")


def _last_part(path: str) -> str:
    """The last part of a path or a Hub id; all of it if there is nothing before a slash."""
    return redact(path).rstrip("/").rsplit("/", 1)[-1]  # before it is cut: half an address is not recognised


def _named(text: str) -> str:
    """A run's name as it may be shown: without control characters, cut to what MLflow's databases take."""
    text = escape_controls(text)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
