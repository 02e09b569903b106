"""Fields that the user adds to each request: JSON of a body or of headers, in the parameter itself or in a file.

Both are recorded, so a secret in them has to be a reference to an environment variable (`records.references`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..records import reading, references
from ..records.errors import UsageError
from ..records.invocation import already_recorded
from ..records.reading import Unreadable
from ..records.redaction import LEAST_LENGTH, excerpt, is_secret_name, looks_secret

LONGEST = 5000
"""Most characters of such a parameter as it is recorded; MLflow takes 6,000."""

SCHEME_LENGTH = 12
"""Most characters beside the reference in a header that is named as a secret: the name of a scheme, `Bearer `."""

OWN_BODY = {
    "model": "give model",
    "messages": "give workload",
    "prompt": "give workload",
    "input": "give workload",
    "stream": "every request streams",
    "max_tokens": "give output_tokens",
    "max_output_tokens": "give output_tokens",
    "max_completion_tokens": "give output_tokens",
    "temperature": "give temperature",
    "ignore_eos": "give ignore_eos",
    "n": "each request has one answer",
    "best_of": "each request has one answer",
}
"""Fields of a body that have another place, and which."""

OWN_HEADERS = frozenset(
    ["accept", "accept-encoding", "connection", "content-length", "content-type", "expect",
     "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade", "x-request-id"]
)  # fmt: skip
"""Headers that frame or number a request, and the one with a proxy's password, which the server must not get."""

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
"""Name of a header (RFC 9110, section 5.1)."""


def parse_body(name: str, text: str) -> str:
    """Return the fields as JSON in one line. Raises UsageError for fields of ours, and for secrets."""
    found = _object(name, text)
    for field in found:
        if field in OWN_BODY:
            raise UsageError(
                f"{name} sets {field}, which has another place: {OWN_BODY[field]}. Leave it out of {name}."
            )
    for field, value in _texts(found):
        rest = references.without(value)
        if looks_secret(rest) or (is_secret_name(field) and len(rest) >= LEAST_LENGTH):
            raise _secret(name, field)
    return _line(name, found)


def parse_headers(name: str, text: str) -> str:
    """Return the headers as JSON in one line. Raises UsageError for those of ours, and for secrets."""
    found = _object(name, text)
    if twice := [header for header, count in Counter(map(str.lower, found)).items() if count > 1]:
        raise UsageError(f"{name} sets {excerpt(twice[0], 60)} more than once, in other capitals. Give it once.")
    for header, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (is_number or isinstance(value, str)):
            raise UsageError(f'{name} has no text for {excerpt(header, 60)}. Give a text, such as {{"X-Team": "a"}}.')
        if not (_HEADER.fullmatch(header) and str(value).isascii() and str(value).isprintable()):
            raise UsageError(f"{name} has a name or a value that no HTTP header can hold: {excerpt(header, 60)}.")
        if header.lower() in OWN_HEADERS:
            raise UsageError(f"{name} sets {header}, which the client sets itself. Leave it out.")
        rest = references.without(str(value))
        named = is_secret_name(header) or header.lower().endswith("authorization")
        literal = rest == str(value) or len(rest) > SCHEME_LENGTH
        if looks_secret(rest) or (named and literal):
            raise _secret(name, header)
    return _line(name, {header: str(value) for header, value in found.items()})


def loaded(text: str | None) -> dict[str, Any]:
    """Return the fields of a parameter that has been parsed; none if it is not given."""
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def variables_of(*texts: str | None) -> list[str]:
    """Return the names of the environment variables that parameters refer to, each once."""
    values = [value for text in texts for _, value in _texts(loaded(text))]
    return list(dict.fromkeys(name for value in values for name in references.names_in(value)))


def as_json(name: str, given: Mapping[Any, object]) -> str:
    """Return a mapping given in Python or YAML as JSON. Raises UsageError if it holds what JSON has not."""
    try:
        return json.dumps(given, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} cannot be written as JSON: {str(error)[:100]}. Give plain values.") from None


def _object(name: str, text: str) -> dict[str, Any]:
    """Return the JSON object of a text, or of the file that it names."""
    inline = text.lstrip().startswith("{")
    where = name if inline else f"{name}={excerpt(text, 200)}"
    try:
        found = reading.parse_json(text, unique=True) if inline else reading.read_json(text, 1 << 20, unique=True)
    except Unreadable as error:
        raise UsageError(
            f'Cannot read {where}: {error}. Give JSON such as {{"top_p": 0.9}}, or the path of a file of it.'
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f'{where} is not a JSON object. Give one such as {{"top_p": 0.9}}.')
    if not found:
        raise UsageError(f"{where} is empty. Leave it out.")
    return found


def _texts(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in JSON data with the name of its field."""
    if isinstance(data, str):
        yield name, data
    elif isinstance(data, dict):
        for field, value in data.items():
            yield from _texts(value, field)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value, name)


def _line(name: str, found: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(found, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except ValueError:
        raise UsageError(f"{name} has a number that JSON cannot hold. Give finite numbers.") from None
    if len(text) > LONGEST:
        raise UsageError(f"{name} has {len(text):,} characters of JSON. Give at most {LONGEST:,}.")
    if looks_secret(references.without(text)):
        raise _secret(name, "it")
    return text


def _secret(name: str, field: str) -> UsageError:
    return UsageError(
        f"{name} has what looks like a secret in {excerpt(field, 60)}, and it would be recorded. "
        f"Set an environment variable to it, and give its name in its place, such as $GATEWAY_KEY.{already_recorded()}"
    )
