"""Parameters as text → a validated specification. Never acts: no import of a backend, no file but a YAML of parameters.

The parameters are declared once, as the fields of `records.Cell` and `records.Options`. MLproject, the command line,
YAML files and the params of the MLflow run use the same names; on the command line underscores become dashes.
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

from .errors import UsageError
from .records import DRAWN, Cell, Options
from .redaction import CONTROLS, redact

BITSANDBYTES = ("int8", "int4", "fp4")
GPTQ_BITS = {"gptq": 4, "gptq3": 3, "gptq8": 8}
MIXED = "mixed"
MADE = (*BITSANDBYTES, *GPTQ_BITS, MIXED)
"""Quantizations that are made of a checkpoint which is not quantized yet."""

QUANTIZATIONS = ("none", "fp32", "fp16", "bf16", *MADE)
BACKENDS = {
    "transformers": "mlflow_llmbench.backends.transformers_local:TransformersBackend",
    "fake": "mlflow_llmbench.backends.fake:FakeBackend",
    "openai": "mlflow_llmbench.backends.openai_server:OpenAIBackend",
    "callback": "mlflow_llmbench.backends.callback:CallbackBackend",
}
"""Name → `module:class`. The same table is declared as entry points; this one serves an uninstalled checkout."""

BACKEND_ENTRY_POINTS = "mlflow_llmbench.backends"
WORKLOADS = (*DRAWN, "qa", "summarization", "creative", "code", "chat", "domain")
HISTORIES = ("none", "recomputed", "kept", "sent")
BATCHINGS = ("static", "dynamic", "continuous")
DECODES = ("generate",)
QUALITIES = {"none": "none", "auto": "auto", "true": "auto", "false": "none"}
BUNDLED_TEXT = "bundled"
LEAST_TEXT_TOKENS = 512
"""Tokens that a text for perplexity must have at least, so a file of fewer bytes never does."""

LENGTHS = ("prompt_tokens", "output_tokens")
"""Parameters that a trace replaces."""

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
"""Preset → the parameters that it gives. `effillm` is the grid of the paper (facts/effillm.md, Axes and Method) for any models; `quick` has
a twentieth of its cells, and enough batch sizes and lengths for every law."""

PARAMETERS: dict[str, Field[Any]] = {f.name: f for kind in (Cell, Options) for f in dataclasses.fields(kind)}
"""Name → declaration, in the order of the vocabulary."""

SWEEPABLE = tuple(name for name, f in PARAMETERS.items() if f.metadata["sweep"])


LOCAL = (
    "weights", "revision", "backend", "quant", "group_size", "quant_budget", "quant_plan", "batch_size", "device", "threads", "attention", "decode", "trust_remote_code", "allow_pickle",
    "preset", "on", "force", "memory_limit", "quality", "quality_text",
    "quality_tasks", "quality_limit",
)  # fmt: skip
"""Parameters that mean nothing where another process runs the model."""

COMMANDS = {
    "run": tuple(name for name, f in PARAMETERS.items() if "batching" in f.metadata["scenarios"]),
    "online": ("url", *(name for name, f in PARAMETERS.items() if name not in (*LOCAL, "url") and "online" in f.metadata["scenarios"])),
}
"""Command, and entry point of the MLproject, → its parameters."""


def cell_fields(scenario: str) -> list[str]:
    """The parameters that a cell of this scenario has."""
    online = scenario == "online"
    known = (*COMMANDS["online"], "backend") if online else COMMANDS["run"]
    return [f.name for f in dataclasses.fields(Cell) if f.name in known and scenario in f.metadata["scenarios"]]


@dataclass(frozen=True)
class BenchSpec:
    """What was asked for: for each parameter of a cell its list of values, and the options of the command."""

    axes: Mapping[str, tuple[object, ...]]
    options: Options = field(default_factory=Options)

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that have more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    @property
    def scenario(self) -> str:
        """That of its cells, which is one: see `Cell.scenario`."""
        return Cell(url=self.axes["url"][0], batching=self.axes["batching"][0]).scenario  # type: ignore[arg-type]


def known_backends() -> dict[str, str]:
    """Names of all backends, ours and those that installed packages declare, with their `module:class`."""
    return BACKENDS | {entry.name: entry.value for entry in metadata.entry_points(group=BACKEND_ENTRY_POINTS) if entry.name not in BACKENDS}


def as_text(name: str, value: object) -> str:
    """A parameter's value as it is written on the command line and logged: `auto` or `none` for None, `true`/`false`, 0.02."""
    if value is None:
        return str(PARAMETERS[name].metadata["unset"])
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def default_text(name: str) -> str:
    """The default of a parameter as text."""
    return as_text(name, PARAMETERS[name].default)


def parse(values: Mapping[str, object]) -> BenchSpec:
    """Validate parameters given as text (or numbers) and expand comma lists.

    Parameters that are not given take their defaults. Raises UsageError, one line, on the first thing that is wrong.
    """
    for name in values:
        if name not in PARAMETERS:
            raise UsageError(f"Unknown parameter: {name}. {_nearest(name, PARAMETERS)}")
    values = {**values, **_from_preset(values)}
    axes: dict[str, tuple[object, ...]] = {}
    options: dict[str, object] = {}
    for name, declared in PARAMETERS.items():
        given = values.get(name)
        texts = [default_text(name)] if given is None else _texts(name, given)
        if len(texts) > 1 and not declared.metadata["sweep"]:
            raise UsageError(f"{name} takes one value: {','.join(texts)}. Lists are allowed for {', '.join(SWEEPABLE)}.")
        parsed = tuple(dict.fromkeys(_parse_one(name, declared, text) for text in texts))
        if name in Options.__dataclass_fields__:
            options[name] = parsed[0]
        else:
            axes[name] = parsed
    _check_together(axes)
    return BenchSpec(axes, Options(**options))  # type: ignore[arg-type]


def _from_preset(values: Mapping[str, object]) -> dict[str, str]:
    """The parameters that come from the named preset: those of its grid that are not given.

    Where every parameter is given, as MLproject does with its defaults, those at their default count as not given.
    """
    preset = str(values.get("preset") or "none")
    if preset.lower() == "none":
        return {}
    grid = GRIDS[_parse_choice("preset", preset, GRIDS)]
    whole = all(values.get(name) is not None for name in COMMANDS["run"])
    return {name: text for name, text in grid.items() if values.get(name) is None or (whole and str(values[name]) == default_text(name))}


def read_yaml(path: str) -> dict[str, object]:
    """Parameters from a YAML file (a mapping of names to a value or a list); the `config.yaml` of a run is one."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"Cannot read parameters from {path}: {str(error).splitlines()[0]}. Give a YAML file with one `name: value` per line."
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"No parameters in {path}. Give a YAML file with one `name: value` per line.")
    return {"on" if key is True else str(key): value for key, value in data.items()}  # YAML 1.1 reads an unquoted `on` as true


def _texts(name: str, given: object) -> list[str]:
    if isinstance(given, bool):
        return ["true" if given else "false"]
    if isinstance(given, str):
        parts = given.split(",") if PARAMETERS[name].metadata["sweep"] else [given]
    elif isinstance(given, Iterable):
        parts = [str(item) for item in given]
    else:
        parts = [str(given)]
    parts = [part.strip() for part in parts]
    if not parts or not all(parts):
        raise UsageError(f"{name} has an empty value: '{given}'. Leave the parameter out for its default ({default_text(name)}).")
    return parts


def _parse_one(name: str, declared: Field[Any], text: str) -> object:
    unset = declared.metadata["unset"]
    if unset and text.lower() == unset:
        return None
    return PARSERS[declared.metadata["kind"]](name, text, declared.metadata)


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
        raise UsageError(f"{name} is too large: {text}. The largest is {int(bounds['high']) if kind is int else bounds['high']:,}{unset}.")
    return number


def _parse_size(name: str, text: str, bounds: Mapping[str, Any]) -> int:
    """Bytes from `6GB` (10⁹), `6GiB` (2³⁰) or a plain number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.lower())
    if not found:
        raise UsageError(f"{name} is not a size: {text}. Give a number with its unit, such as 6GB or 800MiB, or {bounds['unset']}.")
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    if not bounds["low"] <= size <= bounds["high"]:
        raise UsageError(f"{name} is out of range: {text}. The smallest is {bounds['low'] / 1e6:g}MB; did you leave out the unit?")
    return int(size)


def read_budget(text: str) -> tuple[float | None, int | None]:
    """A budget of mixed quantization: bits per weight (`5.5`), or bytes of the whole model (`300MB`). Raises UsageError if it is neither."""
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return None, _parse_size("quant_budget", text, {"low": 1e5, "high": 1e15, "unset": "bits per weight, such as 5.5"})
    if not 1 <= float(text) <= 32:
        raise UsageError(f"quant_budget is not from 1 to 32 bits per weight: {text}. Give such a number, or a size with its unit such as 300MB.")
    return float(text), None


def _parse_plan_file(name: str, text: str) -> str:
    if not os.path.isfile(_parse_text(name, text)):
        raise UsageError(f"There is no plan file {text}. Give {name} the quant_plan.json of a run with quant=mixed.")
    return text


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
    raise UsageError(f"Unknown {name}: {text}. Give here, ray, or ray://HOST:PORT (the port of the Ray Client server, 10001 unless told otherwise).")


def _parse_workload(name: str, text: str) -> str:
    if text.lower() in WORKLOADS:
        return text.lower()
    if _parse_text(name, text).endswith((".jsonl", ".json")) or "/" in text:
        if not os.path.isfile(text):
            raise UsageError(
                f"There is no workload file {text}. Give a JSON Lines file whose lines have a `prompt`, or one of {', '.join(WORKLOADS)}."
            )
        return text
    raise UsageError(f"Unknown {name}: {text}. {_nearest(text, WORKLOADS)} A file ends in .jsonl.")


def _parse_trace(name: str, text: str) -> str:
    if not os.path.isfile(_parse_text(name, text)):
        raise UsageError(f"There is no trace file {text}. Give a JSON Lines file of timestamp (ms), input_length and output_length (tokens).")
    return text


def _parse_text_file(name: str, text: str) -> str:
    if text.lower() == BUNDLED_TEXT:
        return BUNDLED_TEXT
    if not Path(text).is_file():
        raise UsageError(f"There is no text file {text}. Give {name} a plain text file, or {BUNDLED_TEXT}.")
    if Path(text).stat().st_size < LEAST_TEXT_TOKENS:
        raise UsageError(
            f"{text} is too short for a perplexity: {Path(text).stat().st_size} bytes. Give at least {LEAST_TEXT_TOKENS} tokens of text."
        )
    return text


def _parse_tasks(name: str, text: str) -> str:
    """Names of tasks, or paths of YAML files or of folders, with commas."""
    tasks = [task.strip() for task in _parse_text(name, text).split(",")]
    if not all(tasks):
        raise UsageError(f"{name} has an empty name: {text}. Give names such as arc_easy,hellaswag.")
    for task in tasks:
        if ("/" in task or task.endswith((".yaml", ".yml"))) and not os.path.exists(task):
            raise UsageError(f"There is no task file {task}. Give {name} a YAML file, a folder with YAML files, or a name that lm-eval knows.")
    return ",".join(dict.fromkeys(tasks))


def _parse_text(name: str, text: str) -> str:
    if CONTROLS.search(text) or len(text) > 1000:
        raise UsageError(f"{name} has control characters or is longer than 1000 characters: {redact(text)[:40]}. Give a plain name or path.")
    return text


def _parse_url(name: str, text: str) -> str:
    """A server's URL without user, password and query: what it holds is logged."""
    try:
        parts = urlsplit(text)
        port_is_good = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_good = urlsplit(""), False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{name} has a user, a password or a query, and it would be logged. Give the key in the environment, LLMBENCH_API_KEY.")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_good or not text.isascii() or " " in text:
        shown = text.rpartition("@")[2][:100]
        raise UsageError(f"{name} is not that of a server: {shown}. Give one such as http://127.0.0.1:8000.")
    return _parse_text(name, text.rstrip("/").removesuffix("/v1"))


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
    "budget": lambda name, text, _: text if read_budget(text) else None,
    "plan_file": lambda name, text, _: _parse_plan_file(name, text),
    "backend": lambda name, text, _: _parse_choice(name, text, BACKENDS if text in BACKENDS else known_backends()),
    "history": lambda name, text, _: _parse_choice(name, text, HISTORIES),
    "decode": lambda name, text, _: _parse_choice(name, text, DECODES),
    "attention": lambda name, text, _: _parse_choice(name, text, ATTENTIONS),
    "url": lambda name, text, _: _parse_url(name, text),
    "endpoint": lambda name, text, _: _parse_choice(name, text, ENDPOINTS),
    "trace": lambda name, text, _: _parse_trace(name, text),
    "arrival": lambda name, text, _: _parse_choice(name, text, ARRIVALS),
    "batching": lambda name, text, _: _parse_choice(name, text, BATCHINGS),
}
"""Kind of a parameter → how its text is read."""


def _nearest(text: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]}? " if near else ""
    return f"{meant}Known: {', '.join(names)}."


def _check_together(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Combinations that no value by itself shows to be wrong."""
    if "random" in axes["weights"]:
        texts = [w for w in axes["workload"] if w not in DRAWN]
        if texts and "fake" not in axes["backend"]:
            raise UsageError(
                f"workload={texts[0]} needs a tokenizer, and weights=random has none. Use workload=synthetic with random weights, or weights=hub."
            )
    drawn = [w for w in axes["workload"] if w in DRAWN]
    if None in axes["prompt_tokens"] and drawn:
        raise UsageError(f"prompt_tokens=auto has no meaning for workload={drawn[0]}. Give a number of tokens, or a workload with texts such as qa.")
    if axes["history"] != ("none",) and axes["prompt_tokens"] != (None,):
        asked = next(history for history in axes["history"] if history != "none")
        raise UsageError(f"history={asked} sends each turn of a conversation at its own length. Give prompt_tokens=auto.")
    _check_mixed(axes)
    _check_online(axes)
    _check_batching(axes)


def _check_mixed(axes: Mapping[str, tuple[object, ...]]) -> None:
    """A mixed quantization has a budget or a plan, and nothing else has one."""
    given = [name for name in ("quant_budget", "quant_plan") if axes[name] != (None,)]
    if MIXED in axes["quant"] and not given:
        raise UsageError("quant=mixed needs a budget. Give quant_budget=5.5 (bits per weight) or 300MB (the whole model), or quant_plan=FILE.")
    if MIXED not in axes["quant"] and given:
        raise UsageError(f"{given[0]} is of quant=mixed. Add quant=mixed, or leave it out.")
    if len(given) > 1:
        raise UsageError("quant_plan has a scheme for each block, and quant_budget asks for them to be chosen. Give one of them.")


def _check_online(axes: Mapping[str, tuple[object, ...]]) -> None:
    """A server is measured with a URL and its backend, and those of its parameters that do not exclude each other."""
    url, backend = axes["url"][0], axes["backend"][0]
    if url and backend != "openai":
        raise UsageError(f"url is given, and backend={backend} runs the model in this process. Add backend=openai, or use `llmbench online`.")
    if backend == "openai" and not url:
        raise UsageError("backend=openai needs the address of a server. Give url=http://127.0.0.1:8000.")
    given = [name for name, f in PARAMETERS.items() if name in axes and f.metadata["scenarios"] == ["online"] and axes[name] != (f.default,)]
    if given and not url:
        raise UsageError(f"{given[0]} has a meaning only where a server is measured. Give url=http://…, or leave it out.")
    rates = [rate for rate in axes["request_rate"] if rate is not None]
    if rates and axes["concurrency"] != (PARAMETERS["concurrency"].default,):
        raise UsageError("request_rate makes an open loop and concurrency a closed one. Give one of them.")
    _check_dialogues(axes)
    _check_trace(axes)
    top = axes["ramp_to"][0]
    if top is not None and not all(isinstance(rate, float) and rate < float(str(top)) for rate in axes["request_rate"]):
        raise UsageError(
            f"ramp_to is the rate at which a ramp ends, {as_text('ramp_to', top)}, and request_rate where it begins is "
            f"{','.join(as_text('request_rate', rate) for rate in axes['request_rate'])}. Give a lower request_rate."
        )
    if axes["burstiness"] != (1.0,) and axes["arrival"] != ("gamma",):
        raise UsageError(f"burstiness is the shape of arrival=gamma, and arrival is {axes['arrival'][0]}. Add arrival=gamma.")
    if url and (axes["batch_size"] != (1,) or axes["quant"] != ("none",) or axes["weights"] != ("hub",)):
        raise UsageError("batch_size, quant and weights are the server's own settings, which a client cannot change. Start the server with them.")


def _check_dialogues(axes: Mapping[str, tuple[object, ...]]) -> None:
    """A server gets the history of a conversation with each turn, as messages, from users who wait for their answers."""
    url, histories = axes["url"][0], axes["history"]
    own = [history for history in histories if history in ("recomputed", "kept")]
    if url and own:
        raise UsageError(f"history={own[0]} is of a model in this process; a server gets the history with each turn. Use history=sent.")
    if "sent" not in histories:
        return
    if not url:
        raise UsageError("history=sent is of a server. Use history=recomputed or history=kept for a model in this process.")
    if axes["endpoint"] != ("chat",):
        raise UsageError("history=sent sends the messages of a conversation, and endpoint=completions takes one prompt. Give endpoint=chat.")
    if axes["request_rate"] != (None,) or axes["trace"] != (None,):
        raise UsageError(
            "history=sent is a closed loop: each user waits for an answer before the next turn. Give concurrency, and no request_rate or trace."
        )


def _check_trace(axes: Mapping[str, tuple[object, ...]]) -> None:
    """A trace has its own times and lengths."""
    if axes["trace"] == (None,):
        return
    replaced = ("request_rate", "ramp_to", "concurrency", "arrival", "burstiness", *LENGTHS)
    given = [name for name in replaced if axes[name] != (PARAMETERS[name].default,)]
    if given:
        raise UsageError(f"A trace says when requests come and how long they are, and {given[0]} is given too. Leave one of them out.")
    if "mixed" in axes["workload"]:
        raise UsageError("A trace has its own lengths, and workload=mixed draws them. Use workload=synthetic, or a workload with texts.")


def _check_batching(axes: Mapping[str, tuple[object, ...]]) -> None:
    """A stream of requests in process has a rate, and a way of batching in every cell; what is of streams is of nothing else."""
    url, batching = axes["url"][0], axes["batching"]
    own = [name for name in ("batching", "batch_wait_ms") if axes[name] != (PARAMETERS[name].default,)]
    if url and own:
        raise UsageError(f"{own[0]} is a setting of a model in this process, and the server batches as it was started. Leave it out.")
    if None in batching and len(batching) > 1:
        raise UsageError("batching=none measures single batches and no stream of requests, so it is not comparable. Leave none out of the list.")
    if batching != (None,):
        if axes["history"] != ("none",):
            raise UsageError("batching measures a stream of single requests, and history is of conversations. Leave one of them out.")
        if None in axes["request_rate"]:
            raise UsageError(
                "batching needs a stream of requests. Give request_rate, requests per second; a high one is a backlog that is there at once."
            )
        if axes["batch_wait_ms"] != (PARAMETERS["batch_wait_ms"].default,) and "dynamic" not in batching:
            raise UsageError("batch_wait_ms is how long batching=dynamic waits for a full batch. Add batching=dynamic, or leave it out.")
    elif not url:
        given = [n for n in axes if "offline" not in PARAMETERS[n].metadata["scenarios"] and axes[n] != (PARAMETERS[n].default,)]
        if given:
            raise UsageError(f"{given[0]} is of a stream of requests. Add batching=static,dynamic,continuous, or measure a server with url=http://….")
        if "mixed" in axes["workload"]:
            raise UsageError(
                "workload=mixed is a stream of requests of varying lengths, and one batch has one exact length. Add batching=static,dynamic,continuous "
                "and request_rate, or measure a server with `llmbench online`."
            )
