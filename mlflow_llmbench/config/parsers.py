"""Parsers of parameter values: text in, a checked value or one clear error out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..records import reading
from ..records.backends import BACKENDS, known_backends
from ..records.cell import split_list
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.redaction import CONTROLS, excerpt
from ..records.text import known_words
from . import pruning, request_fields, server_command
from .choices import BUNDLED_TEXT, CHOICES, MIN_TEXT_TOKENS, QUALITIES, WORKLOADS


def _parse_number(name: str, text: str, bounds: Mapping[str, Any], kind: type[int] | type[float]) -> int | float:
    unset = f" or {bounds['unset']}" if bounds["unset"] else ""
    try:
        number = kind(text)
        if kind is float and not math.isfinite(number):
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
    raise UsageError(f"Unknown {name}: {text}. {known_words(text, known)}")


def _parse_flag(name: str, text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise UsageError(f"{name} is neither true nor false: {text}. Give true or false.")
    return words[text.lower()]


def _parse_device(name: str, text: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", text):
        return text
    raise UsageError(f"Unknown {name}: {text}. Give auto, cpu, cuda, cuda:N, xpu, xpu:N or mps.")


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
    raise UsageError(f"Unknown {name}: {text}. {known_words(text, WORKLOADS)} A file ends in .jsonl.")


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
    if Path(text).stat().st_size < MIN_TEXT_TOKENS:
        raise UsageError(
            f"{text} is too short for a perplexity: {Path(text).stat().st_size} bytes. "
            f"Give at least {MIN_TEXT_TOKENS} tokens of text."
        )
    try:
        reading.read_text(text)
    except Unreadable as error:
        raise UsageError(
            f"Cannot read the text file {text}: {error}. Give {name} a plain text file in UTF-8."
        ) from None
    return text


def _parse_tasks(name: str, text: str) -> str:
    """Parse names of tasks, or paths of YAML files or folders, separated by commas."""
    tasks = split_list(_parse_text(name, text))
    if not all(tasks):
        raise UsageError(f"{name} has an empty name: {text}. Give names such as arc_easy,hellaswag.")
    for task in tasks:
        if ("/" in task or task.endswith((".yaml", ".yml"))) and not os.path.exists(task):
            raise UsageError(
                f"There is no task file {task}. "
                f"Give {name} a YAML file, a folder with YAML files, or a name that lm-eval knows."
            )
    return ",".join(task.replace(",", r"\,") for task in dict.fromkeys(tasks))


def _parse_text(name: str, text: str) -> str:
    if re.search("[\ud800-\udfff]", text):
        raise UsageError(
            f"{name} is not UTF-8 in this locale: {excerpt(text, 80)}. "
            "Rename the file, or set PYTHONUTF8=1 if its name is UTF-8."
        )
    if CONTROLS.search(text) or len(text) > 1000:
        raise UsageError(
            f"{name} has control characters or is longer than 1000 characters: {excerpt(text, 40)}. "
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
        shown = excerpt(text.rpartition("@")[2], 100)
        raise UsageError(f"{name} is not a server's address: {shown}. Give one such as http://127.0.0.1:8000.")
    return _parse_text(name, text.rstrip("/").removesuffix("/v1"))


def _parse_pem(name: str, text: str) -> str:
    if not os.path.isfile(_parse_text(name, text)):
        raise UsageError(f"There is no file {text}. Give {name} a PEM file.")
    return text


def _parse_scheme(name: str, text: str) -> str:
    """Parse a quantization named in the word of the server that is started with it."""
    if not server_command.SCHEME.fullmatch(text):
        raise UsageError(
            f"{name} is not a word that a server could know: {excerpt(text, 60)}. "
            "Give letters, digits, dots, dashes and underscores."
        )
    return text


def _choice_of(words: Iterable[str]) -> Callable[[str, str, Mapping[str, Any]], object]:
    return lambda name, text, _: _parse_choice(name, text, words)


PARSERS: dict[str, Callable[[str, str, Mapping[str, Any]], object]] = {
    **{kind: _choice_of(words) for kind, words in CHOICES.items()},
    "text": lambda name, text, _: _parse_text(name, text),
    "count": lambda name, text, bounds: _parse_number(name, text, bounds, int),
    "number": lambda name, text, bounds: _parse_number(name, text, bounds, float),
    "size": _parse_size,
    "flag": lambda name, text, _: _parse_flag(name, text),
    "device": lambda name, text, _: _parse_device(name, text),
    "place": lambda name, text, _: _parse_place(name, text),
    "workload": lambda name, text, _: _parse_workload(name, text),
    "quality": lambda name, text, _: QUALITIES[_parse_choice(name, text, QUALITIES)],
    "text_file": lambda name, text, _: _parse_text_file(name, text),
    "tasks": lambda name, text, _: _parse_tasks(name, text),
    "scheme": lambda name, text, _: _parse_scheme(name, text),
    "launch": lambda name, text, _: server_command.check_command(_parse_text(name, text)),
    "budget": lambda name, text, _: text if read_budget(text) else None,
    "prune": lambda name, text, _: pruning.canonical(text),
    "interpreter": lambda name, text, _: _parse_interpreter(name, text),
    "plan_file": lambda name, text, _: _parse_plan_file(name, text),
    "backend": lambda name, text, _: _parse_choice(name, text, BACKENDS if text in BACKENDS else known_backends()),
    "url": lambda name, text, _: _parse_url(name, text),
    "trace": lambda name, text, _: _parse_trace(name, text),
    "body": lambda name, text, _: request_fields.parse_body(name, text),
    "headers": lambda name, text, _: request_fields.parse_headers(name, text),
    "pem": lambda name, text, _: _parse_pem(name, text),
}
"""Kind of a parameter → its parser."""

JSON_KINDS = ("body", "headers")
"""Kinds of values that are a JSON object."""

OF_A_MACHINE = frozenset(["interpreter", "launch", "pem", "plan_file", "tasks", "text_file", "trace", "workload"])
"""Kinds whose parsers look at files or programs of this machine."""
