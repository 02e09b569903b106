"""Open a tracking store: its address, its experiment, and the run that MLFLOW_RUN_ID names.

An unreachable store is found here, before anything expensive starts. Errors of mlflow, its database layer and the
network become TrackingErrors with one line.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import shlex
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..records.errors import LlmbenchError, StoreAway, TrackingError, UsageError, first_line
from ..records.installation import pip_install
from ..records.redaction import CONTROLS, redact
from .client import guarded_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DEFAULT_EXPERIMENT = "llmbench"

HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Limits for mlflow's client, which waits 246 s for a dead server by default. Variables that the user set are kept."""

PROBE_S = 2.0
"""Seconds without an answer after which a server counts as unreachable."""

LONGEST_ADVICE = 1500
"""Most characters of an error of MLflow that are shown. What to do often stands at its end."""

KNOWN_REASONS = (
    r"(Connection refused|Name or service not known|[Tt]imed? ?out|Permission denied"
    r"|unable to open database file|attempt to write a readonly database|already exists|Max retries)"
)

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment by which MLflow's UI opens it on its table of runs and not on its page of traces."""

UPLOADED_TAG = "llmbench.uploaded"
"""Tag that is set when everything of a run has arrived."""


@dataclass(frozen=True)
class Store:
    """A tracking store that answered: client, address, experiment, and the run that MLFLOW_RUN_ID names, if any."""

    client: MlflowClient
    uri: str
    experiment_id: str
    given_run_id: str | None


def address_of(uri: str | None = None) -> str:
    """Return the store's address: the given one, else MLFLOW_TRACKING_URI, else MLflow's default."""
    import mlflow

    return uri or str(mlflow.get_tracking_uri())


def open_store(uri: str | None = None, experiment: str | None = None, own: str | None = None) -> Store:
    """Connect to the store, so that an unreachable one is found before anything expensive starts.

    If MLFLOW_RUN_ID names a run, as under `mlflow run`, its experiment is used, and the run must hold no result, unless
    it is the run `own`, which the same command has filled. Raises TrackingError with a one-line message, StoreAway for
    a server that does not answer, UsageError for an experiment name with control characters.
    """
    if experiment and CONTROLS.search(experiment):
        raise UsageError(f"The name of the experiment has control characters: {experiment}. Give a plain name.")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # This logger prints a traceback for each error that we report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with plain_errors(uri):
        if uri:
            mlflow.set_tracking_uri(uri)
        address = mlflow.get_tracking_uri()
        if not answers(address):
            raise StoreAway(AWAY.format(address))
        with _lock_sqlite(address):
            client = guarded_client()
            client.search_experiments(max_results=1)
        given = os.environ.get("MLFLOW_RUN_ID") or None
        if given:
            own_experiment = client.get_experiment(_given_run(client, given, own).info.experiment_id)
            return Store(client, address, _opened_on_runs(client, own_experiment), given)
        return Store(client, address, _experiment_id(client, experiment), None)


AWAY = "The MLflow server {} does not answer."
_told_away: ContextVar[str] = ContextVar("told_away", default="")


@contextlib.contextmanager
def told_at_once(uri: str | None, warn: Callable[[str], None] | None) -> Iterator[None]:
    """Tell before a command does anything that the server it was given does not answer.

    A command that goes on without it is given as `warn`, which gets the line, so that it is not told again in the
    block (`is_told`). Raises StoreAway without `warn`.
    """
    is_away = bool(uri) and not answers(str(uri))
    if is_away and warn is None:
        raise StoreAway(f"{AWAY.format(uri)} Check the address and that it runs.")
    if is_away and warn is not None:
        warn(f"{AWAY.format(uri)} {GOES_ON}")
    token = _told_away.set(str(uri) if is_away else "")
    try:
        yield
    finally:
        _told_away.reset(token)


GOES_ON = "Measuring all the same: results are kept on the disk and uploaded at the end, if it answers then."


def is_told(error: StoreAway) -> bool:
    """Return True if `told_at_once` has told this."""
    told = _told_away.get()
    return bool(told) and str(error) == str(StoreAway(AWAY.format(told)))


def answers(address: str) -> bool:
    """Return True if a server answers anything within `PROBE_S`; also True for stores that are not a server."""
    if not address.startswith(("http://", "https://")):
        return True
    try:
        with urllib.request.urlopen(f"{without_user(address).rstrip('/')}/health", timeout=PROBE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # With a TLS error the server is there, and its first use gives the best message.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return isinstance(error, ValueError | http.client.HTTPException)


def _given_run(client: MlflowClient, run_id: str, own: str | None) -> Run:
    """Return the run that MLFLOW_RUN_ID names.

    Raises TrackingError if it does not exist, or if it holds a result already and is not `own`.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            f"MLFLOW_RUN_ID names the run {run_id}, which is not there: {first_line(error)}. "
            "Unset it, or name a run of this store."
        ) from None
    if run_id != own and ("llmbench.outcome" in run.data.tags or UPLOADED_TAG in run.data.tags):
        raise TrackingError(
            f"MLFLOW_RUN_ID names the run {run_id}, which holds a result already. Unset it, or name a new run."
        )
    for key, value in run.data.tags.items():
        if redact(value) != value:  # `mlflow run` records the address of the git remote unchanged, with its token
            client.set_tag(run_id, key, redact(value))
    return run


def _experiment_id(client: MlflowClient, wanted: str | None) -> str:
    """Return the id of the experiment, created if missing. Raises TrackingError if it is deleted.

    Its name comes from `wanted`, else MLFLOW_EXPERIMENT_NAME, else MLFLOW_EXPERIMENT_ID (as id), else `llmbench`.
    """
    name = wanted or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name and redact(name) != name:
        name = name if client.get_experiment_by_name(name) else redact(name)  # so it was made, by an earlier command
    identifier = None if name else os.environ.get("MLFLOW_EXPERIMENT_ID")
    found = (
        client.get_experiment(identifier) if identifier else client.get_experiment_by_name(name or DEFAULT_EXPERIMENT)
    )
    if found is None:
        return str(client.create_experiment(name or DEFAULT_EXPERIMENT, tags=KIND))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The experiment {found.name} is deleted. Restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or give another: --experiment NAME."
        )
    return _opened_on_runs(client, found)


def _opened_on_runs(client: MlflowClient, experiment: Experiment) -> str:
    """Say what an experiment is about, unless somebody has; return its id."""
    for name, kind in KIND.items():
        if name not in experiment.tags:
            with contextlib.suppress(Exception):  # the user may add runs, but not change the experiment
                client.set_experiment_tag(experiment.experiment_id, name, kind)
    return str(experiment.experiment_id)


@contextlib.contextmanager
def _lock_sqlite(address: str) -> Iterator[None]:
    """Guard the first access to a SQLite store, which creates its tables: one process at a time, signals blocked.

    A store with only some of its tables can never be opened again.
    """
    path = address.removeprefix("sqlite:///")
    if path == address or os.name != "posix":
        yield
        return
    import fcntl
    import signal

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                # Locking the folder leaves no lock file behind.
                folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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


def _explained(address: str, error: Exception) -> str:
    """Return what a store's error says, with what to do: MLflow's own advice if it gives any, else ours."""
    store = f"The MLflow store {address} cannot be used:"
    said = " ".join(redact(str(error)).split())[:LONGEST_ADVICE] or type(error).__name__
    if re.search(r"\bcode 403\b|PERMISSION_DENIED", said):
        return (
            f"{store} its user may not do this (403 Forbidden). Ask for the permission, or set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of another user."
        )
    if re.search(r"\bcode 401\b|UNAUTHENTICATED|not authenticated", said):
        return (
            f"{store} it asks for a user (401 Unauthorized). Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to those of the server."
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{store} the package {error.name} is not installed. Run: {pip_install(str(error.name))}"
    # mlflow wraps urllib3, which wraps the system; the innermost sentence is the most helpful.
    inner = re.findall(KNOWN_REASONS, said)
    if not inner and any(word in said for word in ("Please ", "please ", "set `", "MLFLOW_", "Supported URI")):
        return f"{store} {said}"
    advice = "Check the address and that the server runs, or leave it out for a SQLite file here."
    if address.startswith("sqlite"):
        advice = "Check the path and its permissions; delete a new file that was left incomplete."
    return f"{store} {inner[-1] if inner else first_line(error).rstrip('.')}. {advice}"


def without_user(address: str) -> str:
    """Remove user and password from an address; urllib takes them for a part of the host's name."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def ui_command(address: str) -> str:
    """Return the address of a server's UI, or the command that opens the UI on a store, with passwords masked."""
    shown = redact(address)
    return shown if shown.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
