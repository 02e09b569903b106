"""Command that starts a server: from text with placeholders to the arguments of a process, without a shell.

`{port}` is a free loopback port, `{model}` the model and `{quant}` the quantization of a cell. Quotes group words as in
a shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from ..records.errors import UsageError
from ..records.invocation import already_recorded
from ..records.redaction import excerpt, is_secret_name, looks_secret

PLACEHOLDERS = ("model", "port", "quant")
EXAMPLE = "launch='transformers serve {model} --port {port}'"
_GIVEN = re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w.-]{0,99}|[A-Za-z_]\w{0,99}(?==))")
"""An option, or a variable before its value, also in the quotes of `sh -c '…'`."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
SCHEME = re.compile(r"[\w.+-]{1,64}", re.ASCII)
"""A quantization named in a server's own word."""


OFFLINE = {"bnb-8bit": "int8", "float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
"""Server's word for a quantization → ours. transformers' `bnb-4bit` is missing: it quantizes its scales, `int4` does
not."""


def offline_quant(word: str) -> str:
    """Return our word for a server's quantization, or the server's own if we have none."""
    return OFFLINE.get(word, word)


def check_command(text: str) -> str:
    """Return the command unchanged. Raises UsageError if it cannot be started, or if it would log a secret."""
    _refuse_secrets(text)
    words = _words(text)
    unknown = [name for word in words for name in _PLACEHOLDER.findall(word) if name not in PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise UsageError(f"launch has an unknown placeholder: {{{unknown[0]}}}. Known: {known}.")
    if not takes(text, "port"):
        raise UsageError(
            f"launch does not say where the server is to listen: {excerpt(text, 100)}. "
            f"Add the server's option for it with {{port}}: {EXAMPLE}."
        )
    return text


def _refuse_secrets(text: str) -> None:
    """Raise UsageError for an option or a variable that is named as a secret, or a value that looks like a key."""
    named = next((found["name"] for found in _GIVEN.finditer(text) if is_secret_name(found["name"])), None)
    if named or looks_secret(text):
        kind = "an option" if (named or "").startswith("-") else "a variable"
        told = f"{kind} that is named as a secret, {named}," if named else "what looks like a secret"
        raise UsageError(
            f"launch has {told} and the command would be logged. "
            f"Start the server without it, or from a script of your own.{already_recorded()}"
        )


def takes(command: str, placeholder: str) -> bool:
    """Return True if a command has this placeholder."""
    return f"{{{placeholder}}}" in command


def arguments(command: str, *, model: str, port: int, quant: str) -> list[str]:
    """Arguments of the process. With quant=none, an option whose whole value is `{quant}` is left out."""
    return [
        _filled(word, {"model": model, "port": str(port), "quant": quant}) for word in _without_quant(command, quant)
    ]


def _without_quant(command: str, quant: str) -> Iterator[str]:
    words = _words(command)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        leads = word.startswith("-") and following == "{quant}"
        if quant != "none" or not (
            leads or word == "{quant}" or (equals and name.startswith("-") and value == "{quant}")
        ):
            yield word


def _filled(word: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], word)


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"launch cannot be read, {str(error).lower()}: {excerpt(text, 100)}. Quote it as for a shell: {EXAMPLE}."
        ) from None
    if not words:
        raise UsageError(f"launch is empty. Give a command such as {EXAMPLE}.")
    return words
