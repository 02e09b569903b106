"""Say in one line what an error of a store means and what to do.

It comes from MLflow, its database layer, the object store of the artifacts, or the network.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..records.errors import LlmbenchError, TrackingError, first_line
from ..records.installation import pip_install
from ..records.redaction import redact

LONGEST_ADVICE = 1500
"""Most characters of an error of MLflow that are shown. What to do often stands at its end."""

NO_ANSWER = r"(Connection refused|Name or service not known|Remote end closed connection|Connection reset)"
KNOWN_REASONS = (
    r"(Permission denied|password authentication failed for user \S+|(?:database|role) \S+ does not exist"
    r"|unable to open database file|attempt to write a readonly database|already exists)"
)

DISTRIBUTIONS = {
    "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient",
    "google.cloud.storage": "google-cloud-storage", "azure.storage.blob": "azure-storage-blob",
}  # fmt: skip
"""Modules that a store needs whose distribution has another name, or needs a compiler without its extra."""

USER = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@contextlib.contextmanager
def plain_errors(uri: str | None) -> Iterator[None]:
    """Turn whatever mlflow, its database layer or the network raises into a TrackingError with one line."""
    try:
        yield
    except LlmbenchError:
        raise
    except Exception as error:
        import mlflow

        raise TrackingError(_explained(uri or mlflow.get_tracking_uri(), error)) from None


def reason(error: Exception) -> str:
    """Return what an error of a store means, with what to do, without the final full stop.

    Errors of ours, and those that are not known here, are their own first line.
    """
    if isinstance(error, LlmbenchError):
        return first_line(error).rstrip(".")
    return _known(error) or first_line(error).rstrip(".")


def install_command(module: str) -> str:
    """Return the command that installs what a module of a store comes with."""
    return pip_install(DISTRIBUTIONS.get(module, module))


def _known(error: Exception) -> str:
    """Return what an error means if it is one that stores are known for, else ""."""
    said = _text(error)
    if re.search(r"\bcode 403\b|\b403 Client Error|PERMISSION_DENIED", said):
        return f"your user may not do this (403 Forbidden). Ask for the permission, or set {USER} to those of another"
    if re.search(r"\bcode 401\b|\b401 Client Error|UNAUTHENTICATED|not authenticated", said):
        return f"it asks for a user (401 Unauthorized). Set {USER}, or MLFLOW_TRACKING_TOKEN, to those of the server"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed. Run: {install_command(error.name)}"
    if "nable to locate credentials" in said:
        return f"the object store asks for credentials. Set {KEYS}"
    if endpoint := re.search(
        r'(?:connect to the endpoint|[Tt]imeout on endpoint|endpoint) URL: "?(\w+://[^/"\s]+)', said
    ):
        return f"the object store {endpoint[1]} does not answer. Check MLFLOW_S3_ENDPOINT_URL and that it runs"
    failed = re.search(r"too many (?P<code>5\d\d) error responses", said)
    if "/mlflow-artifacts/" in said and (failed or "Connection reset" in said):
        how = f"HTTP {failed['code']}" if failed else "it broke the connection"
        return f"the server could not keep an artifact ({how}). The reason is in the server's log"
    if failed:
        return f"the server failed (HTTP {failed['code']}). The reason is in the server's log"
    if re.search(r"[Rr]ead timed out|ReadTimeout", said):
        return "the server has not answered in time. Set MLFLOW_HTTP_REQUEST_TIMEOUT to more seconds if it is slow"
    # mlflow wraps urllib3, which wraps the system; the innermost sentence is the most helpful.
    if inner := re.findall(KNOWN_REASONS, said):
        return str(inner[-1])
    away = re.findall(NO_ANSWER, said)
    return f"the server does not answer ({away[-1]})" if away else ""


def _text(error: Exception) -> str:
    return " ".join(redact(str(error)).split())


def _explained(address: str, error: Exception) -> str:
    """Return what a store's error says, with what to do: MLflow's own advice if it gives any, else ours."""
    store, said = f"The MLflow store {address} cannot be used:", _text(error)[:LONGEST_ADVICE] or type(error).__name__
    known = _known(error)
    if ". " in known:  # with what to do; a command ends its line, so that it can be copied
        return f"{store} {known}" + ("" if "Run: " in known else ".")
    if not known and any(word in said for word in ("Please ", "please ", "set `", "MLFLOW_", "Supported URI")):
        return f"{store} {said}"
    advice = "Check the address and that the server runs, or leave it out for a SQLite file here."
    if address.startswith("sqlite"):
        advice = "Check the path and its permissions; delete a new file that was left incomplete."
    elif "authentication failed" in known or "does not exist" in known:
        advice = "Check user, password and database in the address."
    return f"{store} {known or first_line(error).rstrip('.')}. {advice}"
