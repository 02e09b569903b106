"""Parameters as text → a validated specification. Never acts: no import of a backend, no file but a YAML of parameters.

The parameters are declared once, as the fields of `records.Cell` and `records.Options`. MLproject, the command line,
YAML files and the params of the MLflow run use the same names; on the command line underscores become dashes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError
from .records import Cell, Options

QUANTIZATIONS = ("none", "fp32", "fp16", "bf16", "int8", "int4", "fp4")
BITSANDBYTES = ("int8", "int4", "fp4")
BACKENDS = {
    "transformers": "mlflow_llmbench.backends.transformers_local:TransformersBackend",
    "fake": "mlflow_llmbench.backends.fake:FakeBackend",
}
"""Name → `module:class`. The same table is declared as entry points; this one serves an uninstalled checkout."""

BACKEND_ENTRY_POINTS = "mlflow_llmbench.backends"
WORKLOADS = ("synthetic", "qa", "summarization", "creative", "code", "chat", "domain")
DECODES = ("generate",)
QUALITIES = {"none": "none", "auto": "auto", "true": "auto", "false": "none"}
BUNDLED_TEXT = "bundled"
LEAST_TEXT_TOKENS = 512
"""Tokens that a text for perplexity must have at least, so a file of fewer bytes never does."""

ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

PARAMETERS: dict[str, Field[Any]] = {f.name: f for kind in (Cell, Options) for f in dataclasses.fields(kind)}
"""Name → declaration, in the order of the vocabulary."""

SWEEPABLE = tuple(name for name, f in PARAMETERS.items() if f.metadata["sweep"])


@dataclass(frozen=True)
class BenchSpec:
    """What was asked for: for each parameter of a cell its list of values, and the options of the command."""

    axes: Mapping[str, tuple[object, ...]]
    options: Options = field(default_factory=Options)

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that have more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]


def known_backends() -> dict[str, str]:
    """Names of all backends, ours and those that installed packages declare, with their `module:class`."""
    return BACKENDS | {entry.name: entry.value for entry in metadata.entry_points(group=BACKEND_ENTRY_POINTS) if entry.name not in BACKENDS}


def as_text(name: str, value: object) -> str:
    """A parameter's value as it is written on the command line and logged: `auto` or `none` for None, `true`/`false`, 0.02."""
    if value is None:
        return str(PARAMETERS[name].metadata["unset"])
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


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


def read_yaml(path: str) -> dict[str, object]:
    """Parameters from a YAML file (a mapping of names to a value or a list); the `config.yaml` of a run is one."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read parameters from {path}: {str(error).splitlines()[0]}. Give a YAML file with one `name: value` per line."
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"No parameters in {path}. Give a YAML file with one `name: value` per line.")
    return {str(key): value for key, value in data.items()}


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


def _parse_workload(name: str, text: str) -> str:
    if text.lower() in WORKLOADS:
        return text.lower()
    if text.endswith((".jsonl", ".json")) or "/" in text:
        if not Path(text).is_file():
            raise UsageError(
                f"There is no workload file {text}. Give a JSON Lines file whose lines have a `prompt`, or one of {', '.join(WORKLOADS)}."
            )
        return text
    raise UsageError(f"Unknown {name}: {text}. {_nearest(text, WORKLOADS)} A file ends in .jsonl.")


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


def _parse_text(name: str, text: str) -> str:
    if any(ord(character) < 32 for character in text) or len(text) > 1000:
        raise UsageError(f"{name} has control characters or is longer than 1000 characters: {text[:40]!r}. Give a plain name or path.")
    return text


PARSERS: dict[str, Callable[[str, str, Mapping[str, Any]], object]] = {
    "text": lambda name, text, _: _parse_text(name, text),
    "count": lambda name, text, bounds: _parse_number(name, text, bounds, int),
    "number": lambda name, text, bounds: _parse_number(name, text, bounds, float),
    "size": _parse_size,
    "flag": lambda name, text, _: _parse_flag(name, text),
    "device": lambda name, text, _: _parse_device(name, text),
    "workload": lambda name, text, _: _parse_workload(name, text),
    "quality": lambda name, text, _: QUALITIES[_parse_choice(name, text, QUALITIES)],
    "text_file": lambda name, text, _: _parse_text_file(name, text),
    "weights": lambda name, text, _: _parse_choice(name, text, ("hub", "random")),
    "quant": lambda name, text, _: _parse_choice(name, text, QUANTIZATIONS),
    "backend": lambda name, text, _: _parse_choice(name, text, BACKENDS if text in BACKENDS else known_backends()),
    "decode": lambda name, text, _: _parse_choice(name, text, DECODES),
    "attention": lambda name, text, _: _parse_choice(name, text, ATTENTIONS),
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
        texts = [w for w in axes["workload"] if w != "synthetic"]
        if texts and "fake" not in axes["backend"]:
            raise UsageError(
                f"workload={texts[0]} needs a tokenizer, and weights=random has none. Use workload=synthetic with random weights, or weights=hub."
            )
    if None in axes["prompt_tokens"] and "synthetic" in axes["workload"]:
        raise UsageError("prompt_tokens=auto has no meaning for workload=synthetic. Give a number of tokens, or a workload with texts such as qa.")
