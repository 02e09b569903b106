"""Log results as MLflow runs and read them back: params, metrics, tags, artifacts.

This is the only module of the measuring parts that uses mlflow. Everything is sent after the measurement, with the
times at which it happened. An upload can be repeated: values that are already there are not changed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import shlex
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.summary import Point, gpu_of, series, summarize
from ..analysis.verdict import judge
from ..config.choices import WORKLOADS
from ..config.spec import cell_fields
from ..records.cell import Cell, as_text
from ..records.errors import StoreAway, TrackingError, UsageError, first_line
from ..records.quantizations import COLOURS
from ..records.redaction import CONTROLS, redact, redact_all
from ..records.results import SCHEMA, Hashes, RunResult, Verdict
from ..records.verdicts import OUTCOMES
from ..reports.result import summary_markdown
from .run_context import fingerprint_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


DEFAULT_EXPERIMENT = "llmbench"
HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Limits for mlflow's client, which waits 246 s for a dead server by default. Variables that the user set are kept."""

PROBE_S = 2.0
"""Seconds without an answer after which a server counts as unreachable."""

PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's own, which `log_table` sets
UPLOADED_TAG = "llmbench.uploaded"
"""Tag that is set when everything of a run has arrived."""

RUN_ID = re.compile(r"[0-9a-f]{32}")

GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
"""Run names that MLflow generates. Only these are replaced; a name that a person gave is kept."""


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
    from mlflow import MlflowClient

    # This logger prints a traceback for each error that we report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with _plain_errors(uri):
        if uri:
            mlflow.set_tracking_uri(uri)
        address = mlflow.get_tracking_uri()
        if not answers(address):
            raise StoreAway(f"The MLflow server {address} does not answer.")
        with _undisturbed(address):
            client = MlflowClient()
            client.search_experiments(max_results=1)
        given = os.environ.get("MLFLOW_RUN_ID") or None
        if given:
            return Store(client, address, _given_run(client, given, own).info.experiment_id, given)
        return Store(client, address, _experiment_id(client, experiment), None)


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
    identifier = None if name else os.environ.get("MLFLOW_EXPERIMENT_ID")
    found = (
        client.get_experiment(identifier) if identifier else client.get_experiment_by_name(name or DEFAULT_EXPERIMENT)
    )
    if found is None:
        return str(client.create_experiment(name or DEFAULT_EXPERIMENT))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The experiment {found.name} is deleted. Restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or give another: --experiment NAME."
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def _undisturbed(address: str) -> Iterator[None]:
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
def _plain_errors(uri: str | None) -> Iterator[None]:
    """Turn whatever mlflow, its database layer or the network raises into a TrackingError with one line."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        import mlflow

        # mlflow wraps urllib3, which wraps the system; the innermost sentence is the most helpful.
        known = (
            r"(Connection refused|Name or service not known|[Tt]imed? ?out|Permission denied"
            r"|unable to open database file|attempt to write a readonly database|already exists|Max retries)"
        )
        inner = re.findall(known, str(error))
        address = uri or mlflow.get_tracking_uri()
        advice = "Check the address and that the server runs, or leave it out for a SQLite file here."
        if address.startswith("sqlite"):
            advice = "Check the path and its permissions; delete a new file that was left incomplete."
        why = inner[-1] if inner else first_line(error).rstrip(".")
        raise TrackingError(f"The MLflow store {address} cannot be used: {why}. {advice}") from None


def refuse_other_params(store: Store, params: Mapping[str, str]) -> None:
    """Raise TrackingError if the given run has one of these params with another value. Call it before measuring."""
    if store.given_run_id:
        _agreed_params(store, store.given_run_id, params, "was asked for. Use a new run, or unset MLFLOW_RUN_ID.")


def _agreed_params(store: Store, run_id: str, params: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """Return a run's params. Raises TrackingError, ending in `otherwise`, if one differs by more than shell quotes."""
    there: dict[str, str] = store.client.get_run(run_id).data.params
    for key, value in redact_all(params).items():
        if key in there and redact(there[key]) != value and redact(_unquoted(there[key])) != value:
            raise TrackingError(f"The run {run_id} has {key}={there[key]} already, and {value} {otherwise}")
    return there


def begin_run(
    store: Store, name: str, identity: Mapping[str, str], parent_id: str | None = None, started_ms: int | None = None
) -> str:
    """Return the id of a RUNNING run: the one that MLFLOW_RUN_ID names (top level only), or a new one.

    `identity`: tags without their prefix, by which the run is found again: `sweep`, and for a cell `cell` and
    `config_hash`. Raises TrackingError.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

    with _plain_errors(None):
        tags = {"llmbench.schema": str(SCHEMA)} | {f"llmbench.{key}": value for key, value in identity.items()}
        if parent_id is None and store.given_run_id:
            run = store.client.get_run(store.given_run_id)
            if GENERATED_NAME.fullmatch(run.info.run_name or ""):
                store.client.update_run(run.info.run_id, name=name)
            for key, value in tags.items():
                store.client.set_tag(run.info.run_id, key, value)
            return str(run.info.run_id)
        tags |= {MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "llmbench", MLFLOW_SOURCE_TYPE: "LOCAL"}
        with contextlib.suppress(Exception):
            import getpass

            tags[MLFLOW_USER] = getpass.getuser()
        if parent_id:
            tags[PARENT_TAG] = parent_id
        return str(store.client.create_run(store.experiment_id, start_time=started_ms, tags=tags).info.run_id)


def end_run(store: Store, run_id: str, outcome: str, ended_ms: int | None = None) -> None:
    """End a run with the status that belongs to its outcome."""
    store.client.set_terminated(run_id, OUTCOMES[outcome], ended_ms or int(time.time() * 1000))


def log_params(store: Store, run_id: str, params: Mapping[str, str]) -> None:
    """Log the params that a run does not have yet.

    `mlflow run` has already logged the MLproject's parameters, shell-quoted. Raises TrackingError if one has another
    value after unquoting, because then the run belongs to another configuration.
    """
    from mlflow.entities import Param

    there = _agreed_params(store, run_id, params, "was measured. Use a new run.")
    missing = [Param(key, value) for key, value in redact_all(params).items() if key not in there]
    for start in range(0, len(missing), 100):
        store.client.log_batch(run_id, params=missing[start : start + 100])


def _unquoted(text: str) -> str:
    try:
        parts = shlex.split(text)
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else text


def cell_params(cell: Cell) -> dict[str, str]:
    """Return the params of a cell as text."""
    return {name: as_text(name, getattr(cell, name)) for name in cell_fields(cell)}


def upload_cell(store: Store, run_id: str, result: RunResult, artifacts: Path, asked: Mapping[str, str]) -> None:
    """Upload everything of one cell: params, tags, metrics, series, artifacts.

    `asked`: params as `mlflow run` has logged them (`INT4`, `08`). Can be repeated: existing params are not changed,
    and a point with the same key, step, time and value is stored once.
    """
    metrics = summarize(result)
    verdict = judge(result, metrics)
    facts = {key: str(value) for key, value in (result.load.facts if result.load else {}).items()}
    log_params(store, run_id, {**cell_params(result.cell), **asked, **facts})
    note = _linked(store, result) + summary_markdown(result, metrics, None if result.failure else verdict)
    log_tags(store, run_id, cell_tags(result, verdict) | {"mlflow.note.content": note})
    log_metrics(
        store, run_id, [Point(key, 0, value, result.ended_ms) for key, value in metrics.items()] + series(result)
    )
    _log_workload(store, run_id, result)
    _log_artifacts(store, run_id, artifacts)
    store.client.set_tag(run_id, UPLOADED_TAG, "true")  # last, so that an interrupted upload can be found again


def _linked(store: Store, result: RunResult) -> str:
    """Say where and when a reused result was measured; empty for one that was measured in this run."""
    if not result.linked:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(result.started_ms / 1000))
    where = (
        f"run [{result.linked}](#/experiments/{store.experiment_id}/runs/{result.linked})"
        if RUN_ID.fullmatch(result.linked)
        else result.linked
    )
    return (
        f"Measured on {when} in {where}, with the same configuration, environment and workload. "
        "Measure again with `rerun=true`.\n\n"
    )


def find_measured(store: Store, hashes: Hashes) -> list[str]:
    """Find runs with a complete, valid result of this configuration, environment and workload, in any experiment.

    Returns at most 5 ids, newest first.
    """
    wanted = {
        "config_hash": hashes.config,
        "env_hash": hashes.env,
        "workload_hash": hashes.workload,
        "outcome": "ok",
        "verdict": "valid",
        "schema": str(SCHEMA),
    }
    clauses = [f"tags.`llmbench.{key}` = '{value}'" for key, value in wanted.items()] + [
        f"tags.`{UPLOADED_TAG}` = 'true'"
    ]
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    found = store.client.search_runs(
        experiments, " and ".join(clauses), order_by=["attributes.start_time DESC"], max_results=5
    )
    return [str(run.info.run_id) for run in found]


def cell_tags(result: RunResult, verdict: Verdict) -> dict[str, str]:
    """Return the tags of one cell's run."""
    from .. import __version__

    tags = fingerprint_tags(result.environment, gpu_of(result)) | {
        "schema": str(SCHEMA),
        "version": __version__,
        "mlflow_llmbench": __version__,
        "sweep": result.sweep,
        "config_hash": result.hashes.config,
        "env_hash": result.hashes.env,
        "hardware_hash": result.hashes.hardware,
        "software_hash": result.hashes.software,
        "workload_hash": result.hashes.workload,
        "scenario": result.cell.scenario,
        "outcome": result.outcome,
        "verdict": verdict.word,
        "verdict_reasons": ",".join(r.code for r in verdict.reasons),
        "linked_run": result.linked,
        "failure": f"{result.failure.stage}: {result.failure.message}" if result.failure else None,
    }
    found = {f"llmbench.{key}": str(value)[:5000] for key, value in tags.items() if value}
    return found | {"mlflow.runColor": COLOURS.get(result.cell.quant, COLOURS["none"])}


def log_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags by their full names, with secrets redacted."""
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in redact_all(tags).items()])


def log_metrics(store: Store, run_id: str, points: Sequence[Point]) -> None:
    """Log points, a thousand per request, which is the most that a server accepts."""
    from mlflow.entities import Metric

    values = [Metric(p.key, p.value, p.wall_ms, p.step) for p in points]
    for start in range(0, len(values), 1000):
        store.client.log_batch(run_id, metrics=values[start : start + 1000])


def log_figures(store: Store, run_id: str, figures: Mapping[str, float], at_ms: int) -> None:
    """Log summary metrics that compare a run with other runs. Repeating it changes nothing."""
    log_metrics(store, run_id, [Point(key, 0, value, at_ms) for key, value in figures.items()])


def _log_workload(store: Store, run_id: str, result: RunResult) -> None:
    """Log the prompts as the run's dataset, with `workload_hash` as digest.

    `dataset.digest = '…'` finds all runs with the same prompts. The texts themselves are not uploaded. Repeating it
    changes nothing: MLflow identifies a dataset by name and digest.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    cell = result.cell
    own_file = cell.workload not in WORKLOADS
    source = (
        {"uri": redact(cell.workload)}
        if own_file
        else {"tags": {"mlflow.source.name": f"mlflow_llmbench/workloads: {cell.workload}"}}
    )
    lengths = {name: as_text(name, getattr(cell, name)) for name in ("prompt_tokens", "output_tokens")}
    name = redact(Path(cell.workload).stem if own_file else cell.workload)
    prompts = Dataset(
        name, result.hashes.workload, "local" if own_file else "code", json.dumps(source), profile=json.dumps(lengths)
    )
    store.client.log_inputs(run_id, [DatasetInput(prompts, [InputTag("mlflow.data.context", "benchmark")])])


def log_dataset(
    store: Store, run_id: str, name: str, digest: str, uri: str, context: str, profile: Mapping[str, object]
) -> None:
    """Log data of a run other than its workload, such as training data.

    The texts themselves are not uploaded. Repeating it changes nothing.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(redact(name), digest, "local", json.dumps({"uri": redact(uri)}), profile=json.dumps(profile))
    store.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


def upload_parent(
    store: Store, run_id: str, params: Mapping[str, str], note: str, artifacts: Path, figures: Sequence[Point] = ()
) -> None:
    """Upload the parent run of a sweep: its params, the comparison as description and artifacts, overall figures."""
    log_params(store, run_id, params)
    log_metrics(store, run_id, figures)
    log_tags(store, run_id, {"mlflow.note.content": note, "llmbench.schema": str(SCHEMA)})
    if artifacts.is_dir():
        _log_artifacts(store, run_id, artifacts)
    store.client.set_tag(run_id, UPLOADED_TAG, "true")


def _log_artifacts(store: Store, run_id: str, folder: Path) -> None:
    """Log all files of a folder, and list its tables in the tag that the UI's comparison reads, `texts.json` first."""
    store.client.log_artifacts(run_id, str(folder))
    tables = sorted(folder.glob("tables/*.json"), key=lambda file: (file.name != "texts.json", file.name))
    if tables:
        named = [{"path": file.relative_to(folder).as_posix(), "type": "table"} for file in tables]
        store.client.set_tag(run_id, TABLES_TAG, json.dumps(named))


def runs_of_sweep(store: Store, sweep: str) -> list[Run]:
    """Return all runs of a sweep in the store, in any experiment."""
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    return list(store.client.search_runs(experiments, f"tags.`llmbench.sweep` = '{sweep}'", max_results=50_000))


def cells_of_sweep(store: Store, sweep: str) -> list[str]:
    """Return the ids of a sweep's runs that hold a result, in the order in which they started."""
    runs = [r for r in runs_of_sweep(store, sweep) if "llmbench.outcome" in r.data.tags]
    return [str(r.info.run_id) for r in sorted(runs, key=lambda r: int(r.info.start_time or 0))]


def cells_of_run(store: Store, run_id: str) -> list[str]:
    """Return the run itself if it holds a result, else its children that do. Empty if the store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        run = store.client.get_run(run_id)
    except MlflowException:
        return []
    if "llmbench.outcome" in run.data.tags:
        return [run_id]
    return cells_of_sweep(store, run.data.tags["llmbench.sweep"]) if "llmbench.sweep" in run.data.tags else []


def download_result(store: Store, run_id: str, folder: Path) -> Path:
    """Fetch a run's result.json into `folder`, and return the folder. Raises TrackingError if the run has none."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException

    folder.mkdir(parents=True, exist_ok=True)
    try:
        store.client.download_artifacts(run_id, "result.json", str(folder))
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"The run {run_id} has no result.json that can be read: {first_line(error)}. "
            "`llmbench upload FOLDER` completes a run."
        ) from None
    return folder


def log_folder(store: Store, run_id: str, folder: Path, under: str) -> None:
    """Log a folder's files as artifacts of a run, below `under`. Raises TrackingError if the run does not exist."""
    require_run(store, run_id)
    with _plain_errors(store.uri):
        store.client.log_artifacts(run_id, str(folder), under)


def require_run(store: Store, run_id: str) -> None:
    """Raise TrackingError unless the store has a run."""
    from mlflow.exceptions import MlflowException

    with _plain_errors(store.uri):
        try:
            store.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise TrackingError(
                f"There is no run {run_id} in the MLflow store {without_user(store.uri)}. "
                "Give the id of one of its runs."
            ) from None


def find_tagged(store: Store, identity: Mapping[str, str]) -> str | None:
    """Return the newest complete run with these tags (named without `llmbench.`) in any experiment, or None."""
    with _plain_errors(store.uri):
        clauses = [f"tags.`llmbench.{name}` = '{value}'" for name, value in identity.items()] + [
            f"tags.`{UPLOADED_TAG}` = 'true'"
        ]
        experiments = [e.experiment_id for e in store.client.search_experiments()]
        found = store.client.search_runs(
            experiments, " and ".join(clauses), order_by=["attributes.start_time DESC"], max_results=1
        )
        return str(found[0].info.run_id) if found else None


def source_of(store: Store, run_id: str) -> str | None:
    """Return the program that an imported run comes from; None for a run of ours or one that does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        source: str | None = store.client.get_run(run_id).data.tags.get("llmbench.source")
    except MlflowException:
        return None
    return source


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags on a run, named without the prefix `llmbench.`. Raises TrackingError if the run does not exist."""
    with _plain_errors(store.uri):
        for name, value in tags.items():
            store.client.set_tag(run_id, f"llmbench.{name}", redact(value)[:5000])


def without_user(address: str) -> str:
    """Remove user and password from an address; urllib takes them for a part of the host's name."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def ui_command(address: str) -> str:
    """Return the address of a server's UI, or the command that opens the UI on a store, with passwords masked."""
    shown = redact(address)
    return shown if shown.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
