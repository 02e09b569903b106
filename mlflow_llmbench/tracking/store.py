"""Open a tracking store: its address, its experiment, and the run that MLFLOW_RUN_ID names.

A store that cannot be used is found here, before anything expensive starts: its server or database, and the place of
its artifacts if this process writes to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..records.errors import StoreAway, TrackingError, UsageError, first_line
from ..records.invocation import command_text
from ..records.redaction import CONTROLS, redact
from .client import guarded_client
from .explanations import plain_errors
from .reach import AWAY, answers, require_artifact_store, set_limits, try_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DEFAULT_EXPERIMENT = "llmbench"

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


def open_store(
    uri: str | None = None, experiment: str | None = None, own: str | None = None, *, reads: bool = False
) -> Store:
    """Connect to the store, so that an unreachable one is found before anything expensive starts.

    If MLFLOW_RUN_ID names a run, as under `mlflow run`, its experiment is used, and the run must hold no result, unless
    it is the run `own`, which the same command has filled. A command that `reads` makes no SQLite database: there is
    nothing to read in a new one. Raises TrackingError with a one-line message, StoreAway for
    a server that does not answer, UsageError for an experiment name with control characters.
    """
    if experiment and CONTROLS.search(experiment):
        raise UsageError(f"The name of the experiment has control characters: {experiment}. Give a plain name.")
    set_limits()
    import mlflow

    # This logger prints a traceback for each error that we report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if reads:
        _require_database(address_of(uri))
    with plain_errors(uri):
        if uri:
            mlflow.set_tracking_uri(uri)
        address = mlflow.get_tracking_uri()
        if not answers(address):
            raise StoreAway(AWAY.format(address))
        try_database(address)
        given = os.environ.get("MLFLOW_RUN_ID") or None
        with _lock_sqlite(address):
            client = guarded_client()
            run = _given_run(client, given, own) if given else None
            found = client.get_experiment(run.info.experiment_id) if run else _experiment(client, experiment)
        require_artifact_store(run.info.artifact_uri if run else found.artifact_location)
        _open_on_runs(client, found)
        return Store(client, address, str(found.experiment_id), given)


def open_store_if_any(uri: str | None = None, experiment: str | None = None, own: str | None = None) -> Store | None:
    """Connect like `open_store`. Return None if no address is given and MLflow's own default is no database yet.

    It is for commands that read their results from files, and makes no database.
    """
    return None if uri is None and _lacks_database(address_of()) else open_store(uri, experiment, own, reads=True)


def _lacks_database(address: str) -> bool:
    """Return True for the address of a SQLite database that does not exist."""
    path = address.partition("?")[0].removeprefix("sqlite:///")
    return address.startswith("sqlite:///") and path not in ("", ":memory:") and not os.path.exists(path)


def _require_database(address: str) -> None:
    """Raise TrackingError for the address of a SQLite database that does not exist."""
    if _lacks_database(address):
        raise TrackingError(
            f"There is no MLflow store at {address}. Check --tracking-uri, or measure first: "
            f"`{command_text('quickstart')}`."
        )


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


def _experiment(client: MlflowClient, wanted: str | None) -> Experiment:
    """Return the experiment, created if missing. Raises TrackingError if it is deleted.

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
        return client.get_experiment(client.create_experiment(name or DEFAULT_EXPERIMENT, tags=KIND))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The experiment {found.name} is deleted. Restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or give another: --experiment NAME."
        )
    return found


def _open_on_runs(client: MlflowClient, experiment: Experiment) -> None:
    """Say what an experiment is about, unless somebody has."""
    for name, kind in KIND.items():
        if name not in experiment.tags:
            with contextlib.suppress(Exception):  # the user may add runs, but not change the experiment
                client.set_experiment_tag(experiment.experiment_id, name, kind)


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


def ui_command(address: str) -> str:
    """Return the address of a server's UI, or the command that opens the UI on a store, with passwords masked."""
    shown = redact(address)
    return shown if shown.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
