"""Results ↔ MLflow runs: params, metrics, tags, artifacts. The only user of mlflow among the measuring parts.

Everything is sent after the measurement, with the times at which things happened. An upload can be repeated: what is
there already with the same value is left alone.
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
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cell import Cell
from .context import fingerprint_tags
from .errors import StoreAway, TrackingError, UsageError, first_line
from .metrics import COLOURS, OUTCOMES
from .records import SCHEMA, Hashes, RunResult, Verdict
from .redaction import CONTROLS, redact, redact_all
from .report import summary_markdown
from .spec import WORKLOADS, as_text, cell_fields
from .summary import Point, gpu_of, series, summarize
from .validity import judge

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_EXPERIMENT = "llmbench"
HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""A dead server blocks mlflow's client for 246 s with its own defaults; whoever sets these variables is left alone."""

PROBE_S = 2.0
"""Seconds after which a server that says nothing is taken for away."""

PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's own, which `log_table` sets
UPLOADED_TAG = "llmbench.uploaded"
"""Set when everything of a run has arrived."""

RUN_ID = re.compile(r"[0-9a-f]{32}")

GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
"""Run names that MLflow makes up; a name that a person gave is kept."""


@dataclass(frozen=True)
class Store:
    """A tracking store that answered: its client and address, the experiment, and the run that the environment gave, if any."""

    client: MlflowClient
    uri: str
    experiment_id: str
    given_run_id: str | None


def address_of(uri: str | None = None) -> str:
    """The store's address: the one given, that of MLFLOW_TRACKING_URI, or MLflow's default."""
    import mlflow

    return uri or str(mlflow.get_tracking_uri())


def open_store(uri: str | None = None, experiment: str | None = None, own: str | None = None) -> Store:
    """Connect to the store, so that an unreachable one is known before anything expensive starts.

    `mlflow run` gives a run by MLFLOW_RUN_ID; then its experiment holds, and it must be empty unless it is the run `own`, which the same
    command has filled. Raises TrackingError, one line.
    """
    if experiment and CONTROLS.search(experiment):
        raise UsageError(f"The name of the experiment has control characters: {experiment}. Give a plain name.")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.CRITICAL
    )  # it prints a traceback for each error that we tell in a line
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
    """Whether a server says anything at all within `PROBE_S`; True for stores that are no server, which are just tried."""
    if not address.startswith(("http://", "https://")):
        return True
    try:
        with urllib.request.urlopen(f"{without_user(address).rstrip('/')}/health", timeout=PROBE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(
            error.reason, ssl.SSLError
        )  # then it is there, and its first use tells best what is wrong with it
    except (OSError, http.client.HTTPException, ValueError) as error:
        return isinstance(error, ValueError | http.client.HTTPException)


def _given_run(client: MlflowClient, run_id: str, own: str | None) -> Run:
    """The run that MLFLOW_RUN_ID names. Raises TrackingError if it is not there, or is not our own and holds a result already."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(
            f"MLFLOW_RUN_ID names the run {run_id}, which is not there: {first_line(error)}. Unset it, or name a run of this store."
        ) from None
    if run_id != own and ("llmbench.outcome" in run.data.tags or UPLOADED_TAG in run.data.tags):
        raise TrackingError(
            f"MLFLOW_RUN_ID names the run {run_id}, which holds a result already. Unset it, or name a new run."
        )
    for key, value in run.data.tags.items():
        if redact(value) != value:  # `mlflow run` notes the address of the git remote as it is, its token included
            client.set_tag(run_id, key, redact(value))
    return run


def _experiment_id(client: MlflowClient, wanted: str | None) -> str:
    """The experiment by parameter, MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else `llmbench`; made if it is not there."""
    name = wanted or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    identifier = None if name else os.environ.get("MLFLOW_EXPERIMENT_ID")
    found = (
        client.get_experiment(identifier) if identifier else client.get_experiment_by_name(name or DEFAULT_EXPERIMENT)
    )
    if found is None:
        return str(client.create_experiment(name or DEFAULT_EXPERIMENT))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The experiment {found.name} is deleted. Restore it with `mlflow experiments restore -x {found.experiment_id}`, or give another: --experiment NAME."
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def _undisturbed(address: str) -> Iterator[None]:
    """The first touch of a SQLite store, which makes its tables: one process at a time, and no signal in the middle.

    A store that was left half made can never be opened again.
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
                folder = os.open(
                    os.path.dirname(os.path.abspath(path)), os.O_RDONLY
                )  # no lock file of ours stays behind
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _plain_errors(uri: str | None) -> Iterator[None]:
    """Map whatever mlflow, its database layer or the network raises to one line."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        import mlflow

        # mlflow wraps urllib3, which wraps the system: the innermost sentence is the one that helps.
        known = r"(Connection refused|Name or service not known|[Tt]imed? ?out|Permission denied|unable to open database file|attempt to write a readonly database|already exists|Max retries)"
        inner = re.findall(known, str(error))
        address = uri or mlflow.get_tracking_uri()
        advice = "Check the address and that the server runs, or leave it out for a SQLite file here."
        if address.startswith("sqlite"):
            advice = "Check the path and its permissions; a new file that was left half made must be deleted."
        why = inner[-1] if inner else first_line(error).rstrip(".")
        raise TrackingError(f"The MLflow store {address} cannot be used: {why}. {advice}") from None


def refuse_other_params(store: Store, params: Mapping[str, str]) -> None:
    """Raise TrackingError, before anything is measured, if the given run has one of these params with another value."""
    if store.given_run_id:
        _agreed_params(store, store.given_run_id, params, "was asked for. Use a new run, or unset MLFLOW_RUN_ID.")


def _agreed_params(store: Store, run_id: str, params: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """The params that a run has. Raises TrackingError, ending in `otherwise`, if one has another value, shell quotes aside."""
    there: dict[str, str] = store.client.get_run(run_id).data.params
    for key, value in redact_all(params).items():
        if key in there and redact(there[key]) != value and redact(_unquoted(there[key])) != value:
            raise TrackingError(f"The run {run_id} has {key}={there[key]} already, and {value} {otherwise}")
    return there


def begin_run(
    store: Store, name: str, identity: Mapping[str, str], parent_id: str | None = None, started_ms: int | None = None
) -> str:
    """The id of a RUNNING run: the one that the environment gave (top level only), or a new one. Raises TrackingError.

    `identity` are tags, without their prefix, by which the run is found again: `sweep`, and for a cell `cell` and `config_hash`.
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

    `mlflow run` has logged the MLproject's parameters before us, shell-quoted. Raises TrackingError if one is there with
    another value after unquoting: the run belongs to another configuration.
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
    """The params of a cell as text."""
    return {name: as_text(name, getattr(cell, name)) for name in cell_fields(cell)}


def upload_cell(store: Store, run_id: str, result: RunResult, artifacts: Path, asked: Mapping[str, str]) -> None:
    """Everything of one cell: params, tags, metrics, series, artifacts. `asked` are params as `mlflow run` has logged them (`INT4`, `08`).

    Can be repeated: params that are there are left alone, and a point with the same key, step, time and value is stored once.
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
    store.client.set_tag(run_id, UPLOADED_TAG, "true")  # last: what was cut off in the middle must be found again


def _linked(store: Store, result: RunResult) -> str:
    """For a result that was not measured again: where and when it was."""
    if not result.linked:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(result.started_ms / 1000))
    where = (
        f"run [{result.linked}](#/experiments/{store.experiment_id}/runs/{result.linked})"
        if RUN_ID.fullmatch(result.linked)
        else result.linked
    )
    return f"Measured on {when} in {where}, with the same configuration, environment and workload, and not again; `rerun=true` measures again.\n\n"


def find_measured(store: Store, hashes: Hashes) -> list[str]:
    """Ids of runs that hold a whole and valid result of this configuration, environment and workload, newest first, in any experiment."""
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
    """The tags of the vocabulary for one cell."""
    from . import __version__

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
    """Set tags by their whole names, without secrets."""
    from mlflow.entities import RunTag

    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in redact_all(tags).items()])


def log_metrics(store: Store, run_id: str, points: Sequence[Point]) -> None:
    """Log points, a thousand per request: the most that a server takes."""
    from mlflow.entities import Metric

    values = [Metric(p.key, p.value, p.wall_ms, p.step) for p in points]
    for start in range(0, len(values), 1000):
        store.client.log_batch(run_id, metrics=values[start : start + 1000])


def log_figures(store: Store, run_id: str, figures: Mapping[str, float], at_ms: int) -> None:
    """Log summary metrics that a run has by others: what compares it with them. A second time changes nothing."""
    log_metrics(store, run_id, [Point(key, 0, value, at_ms) for key, value in figures.items()])


def _log_workload(store: Store, run_id: str, result: RunResult) -> None:
    """The prompts as the run's dataset, whose digest is `workload_hash`: `dataset.digest = '…'` finds all runs that were sent the same.

    The texts themselves stay where they are. A second time changes nothing: MLflow knows a dataset by its name and digest.
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
    """Data of a run that is no workload, such as what it was trained on; the texts themselves stay where they are. Repeating it changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(redact(name), digest, "local", json.dumps({"uri": redact(uri)}), profile=json.dumps(profile))
    store.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


def upload_parent(
    store: Store, run_id: str, params: Mapping[str, str], note: str, artifacts: Path, figures: Sequence[Point] = ()
) -> None:
    """The parent of a sweep: what was asked, the comparison as description and artifacts, and figures of the whole."""
    log_params(store, run_id, params)
    log_metrics(store, run_id, figures)
    log_tags(store, run_id, {"mlflow.note.content": note, "llmbench.schema": str(SCHEMA)})
    if artifacts.is_dir():
        _log_artifacts(store, run_id, artifacts)
    store.client.set_tag(run_id, UPLOADED_TAG, "true")


def _log_artifacts(store: Store, run_id: str, folder: Path) -> None:
    """All files of a folder, its tables named where the UI looks for those that it sets side by side: `texts.json` first."""
    store.client.log_artifacts(run_id, str(folder))
    tables = sorted(folder.glob("tables/*.json"), key=lambda file: (file.name != "texts.json", file.name))
    if tables:
        named = [{"path": file.relative_to(folder).as_posix(), "type": "table"} for file in tables]
        store.client.set_tag(run_id, TABLES_TAG, json.dumps(named))


def runs_of_sweep(store: Store, sweep: str) -> list[Run]:
    """All runs of a sweep that the store has, in any experiment."""
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    return list(store.client.search_runs(experiments, f"tags.`llmbench.sweep` = '{sweep}'", max_results=50_000))


def cells_of_sweep(store: Store, sweep: str) -> list[str]:
    """Ids of the runs of a sweep that hold a result, in the order in which they were begun."""
    runs = [r for r in runs_of_sweep(store, sweep) if "llmbench.outcome" in r.data.tags]
    return [str(r.info.run_id) for r in sorted(runs, key=lambda r: int(r.info.start_time or 0))]


def cells_of_run(store: Store, run_id: str) -> list[str]:
    """The run itself if it holds a result, or those of its children that do. Empty if the store does not have it."""
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
            f"The run {run_id} has no result.json that can be read: {first_line(error)}. `llmbench upload FOLDER` completes a run."
        ) from None
    return folder


def log_folder(store: Store, run_id: str, folder: Path, under: str) -> None:
    """Keep the files of a folder as artifacts of a run, below `under`. Raises TrackingError if the run is not there."""
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
                f"There is no run {run_id} in the MLflow store {without_user(store.uri)}. Give the id of one of its runs."
            ) from None


def find_tagged(store: Store, identity: Mapping[str, str]) -> str | None:
    """The newest whole run with these tags of ours, named without their prefix, in any experiment; None if there is none."""
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
    """The program that an imported run comes from; None for a run of ours, or one that is not there."""
    from mlflow.exceptions import MlflowException

    try:
        source: str | None = store.client.get_run(run_id).data.tags.get("llmbench.source")
    except MlflowException:
        return None
    return source


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of ours on a run, named without their prefix. Raises TrackingError if the run is not there."""
    with _plain_errors(store.uri):
        for name, value in tags.items():
            store.client.set_tag(run_id, f"llmbench.{name}", redact(value)[:5000])


def without_user(address: str) -> str:
    """An address without the user and password in it, which urllib takes for a part of the host's name."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def ui_command(address: str) -> str:
    """How to open the UI on a store, passwords masked."""
    shown = redact(address)
    return shown if shown.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
