"""Parse parameters given as text into a validated specification. Import no backend, read no file but a YAML of them.

Parameters are declared once, as the fields of `cell.Cell` and `cell.Options`. MLproject, the command line, YAML files
and the params of the MLflow run use the same names; on the command line underscores become dashes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import launch
from .cell import DRAWN, SPECULATIVE, Cell, Options
from .combinations import check_find, check_place, check_together, check_twin
from .errors import UsageError
from .parameters import LENGTHS as LENGTHS
from .parameters import MEANT_WITH as MEANT_WITH
from .parameters import PARAMETERS as PARAMETERS
from .parameters import SWEEPABLE as SWEEPABLE
from .parameters import as_text as as_text
from .parameters import default_text as default_text
from .quantizations import KV_CACHES, QUANTIZATIONS
from .redaction import CONTROLS, redact

BACKENDS = {
    "transformers": "mlflow_llmbench.backends.transformers_local:TransformersBackend",
    "llama_cpp": "mlflow_llmbench.backends.llama_cpp_local:LlamaCppBackend",
    "vllm": "mlflow_llmbench.backends.vllm_local:VllmBackend",
    "openvino": "mlflow_llmbench.backends.openvino_local:OpenVinoBackend",
    "fake": "mlflow_llmbench.backends.fake:FakeBackend",
    "openai": "mlflow_llmbench.backends.openai_server:OpenAIBackend",
    "callback": "mlflow_llmbench.backends.callback:CallbackBackend",
}
"""Name → `module:class`. The same table is declared as entry points; this one works in an uninstalled checkout."""

BACKEND_ENTRY_POINTS = "mlflow_llmbench.backends"
WORKLOADS = (*DRAWN, "qa", "summarization", "creative", "code", "chat", "domain")
HISTORIES = ("none", "recomputed", "kept", "sent")
BATCHINGS = ("static", "dynamic", "continuous")
DECODES = ("generate", "compiled", *SPECULATIVE)
QUALITIES = {"none": "none", "auto": "auto", "true": "auto", "false": "none"}
BUNDLED_TEXT = "bundled"
LEAST_TEXT_TOKENS = 512
"""Minimum tokens of a text for perplexity. A file with fewer bytes cannot have them."""

ENDPOINTS = ("completions", "chat")
ARRIVALS = ("poisson", "constant", "gamma")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

GRIDS: dict[str, dict[str, str]] = {
    "quick": {"batch_size": "1,4,16", "prompt_tokens": "64,128,256,512", "output_tokens": "64", "repetitions": "5"},
    "effillm": {
        "quant": ",".join(quant for quant in ("fp32", "fp16", "int8", "int4", "gptq") if quant in QUANTIZATIONS),
        "batch_size": "1,2,4,8,16,32,64",
        "prompt_tokens": "128,256,512,1024,2048,4096,8192",
        "output_tokens": "256",
        "repetitions": "10",
    },
}
"""Preset → its parameters. `effillm` is the grid of the EffiLLM paper (axes and method), for any models; `quick` has a
twentieth of its cells, with enough batch sizes and lengths for every law."""

SLOS: dict[str, dict[str, str]] = {
    "llama2-70b": {"slo_ttft_ms": "2000", "slo_tpot_ms": "200"},
    "llama2-70b-interactive": {"slo_ttft_ms": "450", "slo_tpot_ms": "40"},
    "llama3.1-8b": {"slo_ttft_ms": "2000", "slo_tpot_ms": "100"},
    "llama3.1-8b-interactive": {"slo_ttft_ms": "500", "slo_tpot_ms": "30"},
}
"""MLPerf Inference benchmark → its server scenario limits (mlperf.conf), which hold there for 99 % of requests."""

LOCAL = (
    "weights", "revision", "backend", "group_size", "quant_budget", "quant_plan", "int8_threshold", "double_quant",
    "batch_size", "device", "threads", "gpu_layers", "kv_cache", "mmap", "attention", "decode", "assistant",
    "draft_tokens", "trust_remote_code", "allow_pickle", "preset", "on", "force", "memory_limit", "quality",
    "quality_text", "quality_reference", "worker_python", "quality_tasks", "quality_limit",
)  # fmt: skip
"""Parameters that have no meaning if another process runs the model."""

TWINS = ("transformers", "openai")
"""Backends of `twin`: the model in this process, and the model behind its server."""

SERVERS = ("url", "launch")
"""Parameters that name the server to measure; one of them is given."""

COMMANDS = {
    "run": tuple(name for name, f in PARAMETERS.items() if "batching" in f.metadata["scenarios"]),
    "online": (
        *SERVERS,
        *(
            name
            for name, f in PARAMETERS.items()
            if name not in (*LOCAL, *SERVERS) and "online" in f.metadata["scenarios"]
        ),
    ),
    "qat": (
        "model", "revision", "group_size", "device", "threads", "seed", "trust_remote_code", "allow_pickle",
        "output_dir", "force", "memory_limit",
    ),
}  # fmt: skip
"""Command (also entry point of the MLproject) → its parameters; `qat` also has those of `training.Training`."""


def cell_fields(cell: Cell) -> list[str]:
    """Return the parameters that have a meaning for a cell. Startup settings of a foreign server are unknown."""
    scenario = cell.scenario
    known = {*COMMANDS["online"], "backend"} if scenario == "online" else {*COMMANDS["run"]}
    known -= {"url"} if cell.launch else {"launch", "quant"} if cell.url else set()
    known -= {*LENGTHS} if cell.trace else set()
    return [f.name for f in dataclasses.fields(Cell) if f.name in known and scenario in f.metadata["scenarios"]]


@dataclass(frozen=True)
class BenchSpec:
    """The request: a list of values for each parameter of a cell, and the options of the command."""

    axes: Mapping[str, tuple[object, ...]]
    options: Options = field(default_factory=Options)

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


def known_backends() -> dict[str, str]:
    """Return all backends with their `module:class`: ours, and those that installed packages declare."""
    return BACKENDS | {
        entry.name: entry.value
        for entry in metadata.entry_points(group=BACKEND_ENTRY_POINTS)
        if entry.name not in BACKENDS
    }


def parse(values: Mapping[str, object]) -> BenchSpec:
    """Validate parameters given as text (or numbers) and expand comma lists.

    Missing parameters take their defaults. Raises UsageError, one line, on the first error.
    """
    for name in values:
        if name not in PARAMETERS:
            raise UsageError(f"Unknown parameter: {name}. {_nearest(name, PARAMETERS)}")
    values = {**values, **_from_preset(values)}
    values |= _from_slo(values)
    axes: dict[str, tuple[object, ...]] = {}
    options: dict[str, object] = {}
    launched = str(values.get("launch") or "none").lower() != "none"
    for name, declared in PARAMETERS.items():
        given = values.get(name)
        texts = [default_text(name)] if given is None else _texts(name, given)
        if len(texts) > 1 and not declared.metadata["sweep"]:
            raise UsageError(
                f"{name} takes one value: {','.join(texts)}. Lists are allowed for {', '.join(SWEEPABLE)}."
            )
        kind = "scheme" if name == "quant" and launched else declared.metadata["kind"]
        parsed = tuple(dict.fromkeys(_parse_one(name, declared, text, kind) for text in texts))
        if name in Options.__dataclass_fields__:
            options[name] = parsed[0]
        else:
            axes[name] = parsed
    if options["find"]:
        check_find(axes, bool(options["twin"]))
    if options["twin"]:
        check_twin(axes, QUANTIZATIONS)
        axes["backend"] = TWINS
    check_together(axes)
    check_place(axes, str(options["on"]))
    return BenchSpec(axes, Options(**options))  # type: ignore[arg-type]


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
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"Cannot read parameters from {path}: {str(error).splitlines()[0]}. "
            "Give a YAML file with one `name: value` per line."
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"No parameters in {path}. Give a YAML file with one `name: value` per line.")
    # YAML 1.1 reads an unquoted `on` as true
    return {"on" if key is True else str(key): value for key, value in data.items()}


def _texts(name: str, given: object) -> list[str]:
    if isinstance(given, bool):
        return ["true" if given else "false"]
    if isinstance(given, str):
        parts = given.split(PARAMETERS[name].metadata["separator"]) if PARAMETERS[name].metadata["sweep"] else [given]
    elif isinstance(given, Iterable):
        parts = [str(item) for item in given]
    else:
        parts = [str(given)]
    parts = [part.strip() for part in parts]
    if not parts or not all(parts):
        raise UsageError(
            f"{name} has an empty value: '{given}'. Leave the parameter out for its default ({default_text(name)})."
        )
    return parts


def _parse_one(name: str, declared: Field[Any], text: str, kind: str) -> object:
    unset = declared.metadata["unset"]
    if unset and text.lower() == unset:
        return None
    return PARSERS[kind](name, text, declared.metadata)


def _parse_number(name: str, text: str, bounds: Mapping[str, Any], kind: type[int] | type[float]) -> int | float:
    unset = f" or {bounds['unset']}" if bounds["unset"] else ""
    try:
        number = kind(text)
        if not math.isfinite(number):
            raise ValueError
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} is not {wanted}: {text}. Give {wanted} from {bounds['low']:g}{unset}.") from None
    if number < bounds["low"]:
        raise UsageError(f"{name} is too small: {text}. The smallest is {bounds['low']:g}{unset}.")
    if number > bounds["high"]:
        raise UsageError(
            f"{name} is too large: {text}. "
            f"The largest is {int(bounds['high']) if kind is int else bounds['high']:,}{unset}."
        )
    return number


def _parse_size(name: str, text: str, bounds: Mapping[str, Any]) -> int:
    """Parse bytes from `6GB` (10⁹), `6GiB` (2³⁰) or a plain number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.lower())
    if not found:
        raise UsageError(
            f"{name} is not a size: {text}. Give a number with its unit, such as 6GB or 800MiB, or {bounds['unset']}."
        )
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    if not bounds["low"] <= size <= bounds["high"]:
        raise UsageError(
            f"{name} is out of range: {text}. The smallest is {bounds['low'] / 1e6:g}MB; did you leave out the unit?"
        )
    return int(size)


def read_budget(text: str) -> tuple[float | None, int | None]:
    """Parse a budget of mixed quantization into bits per weight (`5.5`) or bytes of the whole model (`300MB`).

    Raises UsageError if it is neither.
    """
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return None, _parse_size(
            "quant_budget", text, {"low": 1e5, "high": 1e15, "unset": "bits per weight, such as 5.5"}
        )
    if not 1 <= float(text) <= 32:
        raise UsageError(
            f"quant_budget is not from 1 to 32 bits per weight: {text}. "
            "Give such a number, or a size with its unit such as 300MB."
        )
    return float(text), None


def _parse_plan_file(name: str, text: str) -> str:
    if not os.path.isfile(_parse_text(name, text)):
        raise UsageError(f"There is no plan file {text}. Give {name} the quant_plan.json of a run with quant=mixed.")
    return text


def _parse_interpreter(name: str, text: str) -> str:
    """Return the absolute path of a program. Links are kept: an interpreter finds its environment by its start path."""
    path = os.path.abspath(os.path.expanduser(_parse_text(name, text)))
    if os.path.isdir(path):
        raise UsageError(
            f"{name} is a folder: {text}. Give the interpreter in it, such as {os.path.join(text, 'bin', 'python')}."
        )
    if not os.path.isfile(path):
        raise UsageError(
            f"There is no interpreter {text}. "
            f"Give {name} the path of a Python 3.10 or later, such as ENVIRONMENT/bin/python."
        )
    if not os.access(path, os.X_OK):
        raise UsageError(
            f"{name} cannot be executed: {text}. "
            "Give the path of a Python 3.10 or later, such as ENVIRONMENT/bin/python."
        )
    return path


def _parse_choice(name: str, text: str, choices: Iterable[str]) -> str:
    known = list(choices)
    if text in known:
        return text
    if text.lower() in known:
        return text.lower()
    raise UsageError(f"Unknown {name}: {text}. {_nearest(text, known)}")


def _parse_flag(name: str, text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise UsageError(f"{name} is neither true nor false: {text}. Give true or false.")
    return words[text.lower()]


def _parse_device(name: str, text: str) -> str:
    if text in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:\d{1,3}", text):
        return text
    raise UsageError(f"Unknown {name}: {text}. Give auto, cpu, cuda or cuda:N.")


def _parse_place(name: str, text: str) -> str:
    if text in ("here", "ray"):
        return text
    address = re.fullmatch(r"ray://([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", text)
    if address and 0 < int(address[2]) < 65536:
        return text
    raise UsageError(
        f"Unknown {name}: {text}. "
        "Give here, ray, or ray://HOST:PORT (the port of the Ray Client server, 10001 unless told otherwise)."
    )


def _parse_workload(name: str, text: str) -> str:
    if text.lower() in WORKLOADS:
        return text.lower()
    if _parse_text(name, text).endswith((".jsonl", ".json")) or "/" in text:
        if not os.path.isfile(text):
            raise UsageError(
                f"There is no workload file {text}. "
                f"Give a JSON Lines file whose lines have a `prompt`, or one of {', '.join(WORKLOADS)}."
            )
        return text
    raise UsageError(f"Unknown {name}: {text}. {_nearest(text, WORKLOADS)} A file ends in .jsonl.")


def _parse_trace(name: str, text: str) -> str:
    if not os.path.isfile(_parse_text(name, text)):
        raise UsageError(
            f"There is no trace file {text}. "
            "Give a JSON Lines file of timestamp (ms), input_length and output_length (tokens)."
        )
    return text


def _parse_text_file(name: str, text: str) -> str:
    if text.lower() == BUNDLED_TEXT:
        return BUNDLED_TEXT
    if not os.path.isfile(text):  # Path.is_file raises for a name that is too long
        raise UsageError(f"There is no text file {text}. Give {name} a plain text file, or {BUNDLED_TEXT}.")
    if Path(text).stat().st_size < LEAST_TEXT_TOKENS:
        raise UsageError(
            f"{text} is too short for a perplexity: {Path(text).stat().st_size} bytes. "
            f"Give at least {LEAST_TEXT_TOKENS} tokens of text."
        )
    try:
        Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read the text file {text}: {error}. Give {name} a plain text file in UTF-8."
        ) from None
    return text


def _parse_tasks(name: str, text: str) -> str:
    """Parse names of tasks, or paths of YAML files or folders, separated by commas."""
    tasks = [task.strip() for task in _parse_text(name, text).split(",")]
    if not all(tasks):
        raise UsageError(f"{name} has an empty name: {text}. Give names such as arc_easy,hellaswag.")
    for task in tasks:
        if ("/" in task or task.endswith((".yaml", ".yml"))) and not os.path.exists(task):
            raise UsageError(
                f"There is no task file {task}. "
                f"Give {name} a YAML file, a folder with YAML files, or a name that lm-eval knows."
            )
    return ",".join(dict.fromkeys(tasks))


def _parse_text(name: str, text: str) -> str:
    if CONTROLS.search(text) or len(text) > 1000:
        raise UsageError(
            f"{name} has control characters or is longer than 1000 characters: {redact(text)[:40]}. "
            "Give a plain name or path."
        )
    return text


def _parse_url(name: str, text: str) -> str:
    """Parse a server's URL. User, password and query are refused, because the URL is logged."""
    try:
        parts = urlsplit(text)
        port_is_good = parts.port is None or parts.port > 0
        # As the resolver does: no part of a name may be empty or longer than 63 characters.
        (parts.hostname or "").encode("idna")
    except ValueError:
        parts, port_is_good = urlsplit(""), False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{name} has a user, a password or a query, and it would be logged. "
            "Give the key in the environment, LLMBENCH_API_KEY."
        )
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not port_is_good
        or not text.isascii()
        or " " in text
    ):
        shown = text.rpartition("@")[2][:100]
        raise UsageError(f"{name} is not a server's address: {shown}. Give one such as http://127.0.0.1:8000.")
    return _parse_text(name, text.rstrip("/").removesuffix("/v1"))


def _parse_scheme(name: str, text: str) -> str:
    """Parse a quantization named in the word of the server that is started with it."""
    if not launch.SCHEME.fullmatch(text):
        raise UsageError(
            f"{name} is not a word that a server could know: {text[:60]}. "
            "Give letters, digits, dots, dashes and underscores."
        )
    return text


PARSERS: dict[str, Callable[[str, str, Mapping[str, Any]], object]] = {
    "text": lambda name, text, _: _parse_text(name, text),
    "count": lambda name, text, bounds: _parse_number(name, text, bounds, int),
    "number": lambda name, text, bounds: _parse_number(name, text, bounds, float),
    "size": _parse_size,
    "flag": lambda name, text, _: _parse_flag(name, text),
    "preset": lambda name, text, _: _parse_choice(name, text, GRIDS),
    "device": lambda name, text, _: _parse_device(name, text),
    "place": lambda name, text, _: _parse_place(name, text),
    "workload": lambda name, text, _: _parse_workload(name, text),
    "quality": lambda name, text, _: QUALITIES[_parse_choice(name, text, QUALITIES)],
    "text_file": lambda name, text, _: _parse_text_file(name, text),
    "tasks": lambda name, text, _: _parse_tasks(name, text),
    "weights": lambda name, text, _: _parse_choice(name, text, ("hub", "random")),
    "quant": lambda name, text, _: _parse_choice(name, text, QUANTIZATIONS),
    "scheme": lambda name, text, _: _parse_scheme(name, text),
    "slo": lambda name, text, _: _parse_choice(name, text, SLOS),
    "find": lambda name, text, _: _parse_choice(name, text, ("goodput",)),
    "launch": lambda name, text, _: launch.check_command(_parse_text(name, text)),
    "budget": lambda name, text, _: text if read_budget(text) else None,
    "interpreter": lambda name, text, _: _parse_interpreter(name, text),
    "plan_file": lambda name, text, _: _parse_plan_file(name, text),
    "backend": lambda name, text, _: _parse_choice(name, text, BACKENDS if text in BACKENDS else known_backends()),
    "history": lambda name, text, _: _parse_choice(name, text, HISTORIES),
    "decode": lambda name, text, _: _parse_choice(name, text, DECODES),
    "kv_cache": lambda name, text, _: _parse_choice(name, text, KV_CACHES),
    "attention": lambda name, text, _: _parse_choice(name, text, ATTENTIONS),
    "url": lambda name, text, _: _parse_url(name, text),
    "endpoint": lambda name, text, _: _parse_choice(name, text, ENDPOINTS),
    "trace": lambda name, text, _: _parse_trace(name, text),
    "arrival": lambda name, text, _: _parse_choice(name, text, ARRIVALS),
    "batching": lambda name, text, _: _parse_choice(name, text, BATCHINGS),
}
"""Kind of a parameter → its parser."""


def _nearest(text: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]}? " if near else ""
    return f"{meant}Known: {', '.join(names)}."
