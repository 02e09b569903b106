"""Ask the server of a deployment: its health, its memory of a model, its answers.

`mlflow models serve` answers rows with a `prompt`; the other servers have OpenAI's interface. Both give the same shape:
for each prompt its text, the numbers of prompt and output tokens, and the reason why it ended.
"""

from __future__ import annotations

import contextlib
import json
import operator
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..records.errors import MeasurementError, UsageError, first_line
from ..records.redaction import excerpt

Protocol = Literal["mlflow", "openai"]

FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
"""Keys of a request to `mlflow models serve` that hold its rows."""

MOST_BYTES = 100 << 20
"""Most bytes of an answer that are read."""

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Return True if the server says that it is healthy."""
    try:
        with _OPENER.open(f"{url}/health", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load_model(url: str, protocol: Protocol, timeout_s: float) -> None:
    """Let the server answer one prompt by one token, so that its model is loaded. Raises MeasurementError."""
    try:
        predict(url, protocol, {"dataframe_records": [{"prompt": "a"}], "params": {"max_new_tokens": 1}}, timeout_s)
    except UsageError:
        return  # it refuses this prompt by the measured limits, for which it has loaded the model


def predict(url: str, protocol: Protocol, inputs: Any, timeout_s: float = 3600.0) -> Any:
    """Return the answers to inputs.

    `inputs`: a data frame or rows with a `prompt`, texts, or a request of `mlflow models serve` with `params`. Raises
    UsageError for what the server refuses, MeasurementError if it does not answer.
    """
    body = _request(inputs)
    if protocol == "mlflow":
        answer = _post(f"{url}/invocations", body, timeout_s)
        with _known_form():
            return answer["predictions"]
    return _complete(url, _prompts(body), _limit(body.get("params") or {}), timeout_s)


def _request(inputs: Any) -> dict[str, Any]:
    if hasattr(inputs, "to_dict"):
        return {"dataframe_split": inputs.to_dict(orient="split")}
    if isinstance(inputs, Mapping):
        if any(form in inputs for form in FORMS):
            return dict(inputs)
        return {"dataframe_records": [dict(inputs)]}
    if isinstance(inputs, str):
        inputs = [inputs]
    if not isinstance(inputs, Sequence) or not inputs:
        raise UsageError("There are no inputs. Give rows with a prompt, such as [{'prompt': 'Hello'}].")
    return {"dataframe_records": [row if isinstance(row, Mapping) else {"prompt": row} for row in inputs]}


def _prompts(body: Mapping[str, Any]) -> list[str]:
    """Return the prompts of a request of `mlflow models serve`. Raises UsageError if a row has none."""
    rows: list[Any] = []
    with contextlib.suppress(KeyError, TypeError, ValueError):  # of another form: it has no rows
        if split := body.get("dataframe_split"):
            rows = [dict(zip(split["columns"], row, strict=True)) for row in split["data"]]
        else:
            rows = next((list(body[form]) for form in FORMS if form in body), [])
    asked = [row.get("prompt") if isinstance(row, Mapping) else row for row in rows]
    found = [prompt for prompt in asked if isinstance(prompt, str)]
    if not found or len(found) < len(asked):
        raise UsageError("A row has no prompt, or one that is no text. Give rows such as {'prompt': 'Hello'}.")
    return found


def _limit(params: Any) -> dict[str, int]:
    """Return the limit of an answer as a field of OpenAI's interface. Raises UsageError for any other parameter."""
    others = [name for name in params if name != "max_new_tokens"] if isinstance(params, Mapping) else [params]
    if others:
        raise UsageError(f"Unknown parameter of a request: {excerpt(str(others[0]), 60)}. Known: max_new_tokens.")
    if "max_new_tokens" not in params:
        return {}
    try:
        most = operator.index(params["max_new_tokens"])
    except TypeError:
        most = 0
    if most < 1:
        given = excerpt(str(params["max_new_tokens"]), 60)
        raise UsageError(f"max_new_tokens is not a whole number from 1: {given}. Give a number such as 64.")
    return {"max_tokens": most}


def _complete(url: str, prompts: Sequence[str], limit: Mapping[str, int], timeout_s: float) -> list[dict[str, Any]]:
    listed = _open(urllib.request.Request(f"{url}/v1/models"), timeout_s)
    with _known_form():
        asked = {"model": str(listed["data"][0]["id"]), "temperature": 0, **limit}
    found = []
    for prompt in prompts:
        answer = _post(f"{url}/v1/completions", {**asked, "prompt": prompt}, timeout_s)
        with _known_form():
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            found.append(
                {
                    "text": choice.get("text"),
                    "prompt_tokens": usage.get("prompt_tokens"),
                    "output_tokens": usage.get("completion_tokens"),
                    "finish": choice.get("finish_reason"),
                }
            )
    return found


@contextlib.contextmanager
def _known_form() -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, TypeError):
        raise MeasurementError(
            "The deployment's answer has another form than such servers give. Read its log."
        ) from None


def _post(address: str, body: Mapping[str, Any], timeout_s: float) -> Any:
    try:
        data = json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"The inputs cannot be written as JSON: {str(error)[:100]}. Give texts and numbers.") from None
    return _open(urllib.request.Request(address, data, {"Content-Type": "application/json"}), timeout_s)


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            said = _message(error.read(8192))
        if error.code == 400:
            raise UsageError(f"The deployment refuses the request: {said}") from None
        raise MeasurementError(f"The deployment answers with HTTP {error.code}: {said}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MeasurementError(f"The deployment does not answer: {first_line(error)}. Read its log.") from None


def _message(text: bytes) -> str:
    """Return the message of an error in JSON, else its text, in one line."""
    try:
        found = json.loads(text)
        told = found.get("message") or found.get("error") or found
    except (ValueError, AttributeError, RecursionError):
        told = text.decode("utf-8", "replace")
    return excerpt(" ".join(str(told).split()), 500)
